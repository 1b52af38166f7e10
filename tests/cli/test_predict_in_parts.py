"""A file answered in parts: what ends early is gone on with, in as many processes as there are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from running import call, message, succeed
from torch.distributed import TCPStore

import tiny_seq2seq
from ia3.inference.label_file import Labelled, label_file
from ia3.inference.parts import Parts
from ia3.inference.work import Telling

# With one text a batch, 32 rows are a part.
HOW: dict[str, Any] = {"batch_size": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 rows, three parts of them, some without a text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [each.text for each in islice(cycle(tiny_seq2seq.examples(16)), 70)]
    content = [{"id": number, "text": "" if number % 23 == 5 else text} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(each) + "\n" for each in content))
    return path


@pytest.fixture(scope="module")
def expected(adapter: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    label_file(adapter, rows, output, **HOW)
    return output.read_bytes()


@pytest.fixture
def ended(adapter: Path, rows: Path, tmp_path: Path) -> Path:
    """An output that was left when one part was there."""
    with pytest.raises(KeyboardInterrupt):
        label_file(adapter, rows, tmp_path / "out.jsonl", **HOW, tell=Telling(beat=_stop_after(40)))
    return tmp_path / "out.jsonl"


def _stop_after(count: int) -> Any:
    answered = []

    def beat(rows: int) -> None:
        answered.append(rows)
        if len(answered) == count:
            raise KeyboardInterrupt

    return beat


def test_parts_give_what_one_stretch_gives(adapter: Path, rows: Path, expected: bytes, tmp_path: Path) -> None:
    found = label_file(adapter, rows, tmp_path / "out.jsonl", batch_size=32)
    assert (found.rows, found.answered) == (70, 67)
    assert sum(found.labels.values()) == 67
    whole, parts = ([json.loads(line) for line in each.splitlines()] for each in (_read(tmp_path), expected))
    assert [each["prediction"] for each in whole] == [each["prediction"] for each in parts]
    assert [each["id"] for each in parts] == list(range(70))
    assert {each["prediction"] is None for each in parts if each["id"] % 23 == 5} == {True}
    assert [each["probability"] for each in whole if each["prediction"]] == pytest.approx(
        [each["probability"] for each in parts if each["prediction"]], abs=1e-5
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def _read(folder: Path) -> bytes:
    return (folder / "out.jsonl").read_bytes()


def test_what_ended_early_goes_on_and_answers_nothing_twice(
    adapter: Path, rows: Path, expected: bytes, ended: Path
) -> None:
    assert not ended.exists()
    assert Parts(ended).done() == {0}
    beats, said = [], []
    label_file(adapter, rows, ended, **HOW, resume=True, tell=Telling(beat=beats.append, say=said.append))
    assert ended.read_bytes() == expected
    assert sum(beats) == 67 - 30  # two rows of the first part have no text
    assert "Going on: 1 of 3 parts are there." in said
    assert [path.name for path in ended.parent.iterdir()] == ["out.jsonl"]


def test_the_command_goes_on(adapter: Path, rows: Path, expected: bytes, ended: Path) -> None:
    flags = ("--file", rows, "--output", ended, "--batch-size", 1)
    refused = call("predict", adapter, *flags)
    assert refused.exit_code == 2
    assert "1 of 3 parts of a work that ended early: --resume goes on with it" in message(refused)
    result = succeed("predict", adapter, *flags, "--resume")
    assert "67 predictions are in" in result.stdout
    assert ended.read_bytes() == expected
    assert "begun with the first row" in succeed("predict", adapter, *flags, "--resume").stderr
    assert "--resume goes on with an --output" in message(call("predict", adapter, "--file", rows, "--resume"))


def test_an_early_end_says_what_is_kept(adapter: Path, rows: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for count, kept in ((3, False), (50, True)):
        tell = Telling(beat=_stop_after(count), say=said.append)
        with pytest.raises(KeyboardInterrupt):
            label_file(adapter, rows, tmp_path / "out.csv", **HOW, tell=tell)
        assert (tmp_path / "out.csv.parts").exists() is kept
    assert said[-1].startswith("1 of 3 parts are kept in ")


@pytest.mark.parametrize("what", ["rows", "adapter", "max_length", "batch_size"])
def test_another_work_is_not_gone_on_with(what: str, adapter: Path, rows: Path, ended: Path, tmp_path: Path) -> None:
    own, data = Path(shutil.copytree(adapter, tmp_path / "own")), tmp_path / "own.jsonl"
    data.write_bytes(rows.read_bytes())
    how = {**HOW}
    if what == "rows":
        data.write_text(data.read_text().replace('"id": 69', '"id": 70'))
    elif what == "adapter":
        task = json.loads((own / "ia3_task.json").read_text())
        (own / "ia3_task.json").write_text(json.dumps({**task, "labels": task["labels"][::-1]}))
    else:
        how[what] = 2
    with pytest.raises(ValueError, match=f"was begun with another {what} "):
        label_file(own, data, ended, **how, resume=True)
    assert Parts(ended).done() == {0}


def test_a_damaged_part_is_named(adapter: Path, rows: Path, ended: Path) -> None:
    part = ended.with_name("out.jsonl.parts") / "000000.part"
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"000000\.part is damaged"):
        label_file(adapter, rows, ended, **HOW, resume=True)
    plan = part.with_name("plan.json")
    others = ('{"version": 1, "parts": 3, "settings": []}', '{"version": 1, "parts": "x", "settings": {}}', "[" * 10**5)
    for text in ("{", *others):
        plan.write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json can't be read"):
            label_file(adapter, rows, ended, **HOW, resume=True)


def test_texts_from_python(adapter: Path, tmp_path: Path) -> None:
    texts = ["the share falls", "a company rises"]
    found = label_file(adapter, texts, tmp_path / "out.jsonl")
    assert isinstance(found, Labelled)
    assert [json.loads(line)["text"] for line in _read(tmp_path).splitlines()] == texts


def test_rows_of_adapters_with_models_of_their_own_come_in_order(adapter: Path, tmp_path: Path) -> None:
    for name, precision in (("a", "fp32"), ("b", "bf16")):
        own = Path(shutil.copytree(adapter, tmp_path / "fleet" / name))
        task = json.loads((own / "ia3_task.json").read_text())
        (own / "ia3_task.json").write_text(json.dumps({**task, "precision": precision}))
    rows = [{"id": number, "text": "the share falls", "who": "ab"[number % 3 == 1]} for number in range(80)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label_file(tmp_path / "fleet", tmp_path / "in.jsonl", tmp_path / "out.jsonl", adapter_column="who", batch_size=1)
    found = [json.loads(line) for line in _read(tmp_path).splitlines()]
    assert [{key: row[key] for key in ("id", "text", "who")} for row in found] == rows
    of_name = {name: {row["probability"] for row in found if row["who"] == name} for name in "ab"}
    assert [len(each) for each in of_name.values()] == [1, 1]
    assert not of_name["a"] & of_name["b"]


def test_labels_behind_phrasebanks_sentences_are_no_text(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the share falls@negative\n\na company rises@positive\n")
    lines = succeed("predict", adapter, "--file", tmp_path / "in.txt").stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["the share falls", "a company rises"]
    (tmp_path / "in.txt").write_text("the share falls@negative\nask me@home\n")
    lines = succeed("predict", adapter, "--file", tmp_path / "in.txt").stdout.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["the share falls@negative", "ask me@home"]


def test_rows_are_printed_as_they_come(adapter: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = succeed("predict", adapter, "--file", rows, "--batch-size", 1)
    assert len(whole.stdout.splitlines()) == 67
    content = json.loads(succeed("predict", adapter, "--file", rows, "--batch-size", 1, "--json").stdout)
    assert [each["label"] for each in content["predictions"]] == [
        line.split("\t")[0] for line in whole.stdout.splitlines()
    ]


def test_processes_share_the_rows(adapter: Path, rows: Path, expected: bytes, ended: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "ia3", "predict"]
    flags = ["--file", str(rows), "--output", str(ended), "--batch-size", "1"]
    refused = subprocess.run([*command, str(adapter), *flags], capture_output=True, text=True, check=False)
    assert refused.returncode
    assert refused.stderr.count("a work that ended early") == 1  # the first process alone speaks
    done = subprocess.run([*command, str(adapter), *flags, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predictions are in") == 1
    assert ended.read_bytes() == expected
    assert [path.name for path in ended.parent.iterdir()] == ["out.jsonl"]


# The second process ends at its first part.
_DIES = """
import os, sys
from ia3.inference.label_file import label_file
from ia3.inference.parts import Parts
if os.environ["RANK"] == "1":
    Parts.write = lambda *_: os._exit(9)
label_file(*sys.argv[1:], batch_size=1)
"""


def test_a_process_that_is_gone_is_said_and_its_rows_are_made_up_for(
    adapter: Path, rows: Path, expected: bytes, tmp_path: Path
) -> None:
    # As torchrun's, which listens before it starts them: a port that was free may be taken by then.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    output = tmp_path / "out.jsonl"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _DIES, str(adapter), str(rows), str(output)],
            env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [1, 9], said
    assert "LostProcessError: Another of the processes that share this work ended" in said[0]
    assert Parts(output).done() == {0, 2}
    label_file(adapter, rows, output, **HOW, resume=True)
    assert output.read_bytes() == expected


def test_an_output_is_made_by_one_work_at_a_time(adapter: Path, rows: Path, ended: Path) -> None:
    with Parts(ended).held(), pytest.raises(BlockingIOError, match="is in use by"):
        label_file(adapter, rows, ended, **HOW, resume=True)
    assert Parts(ended).done() == {0}


def test_parts_that_another_machine_keeps_to_itself(
    adapter: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "done", lambda self: {0})
    with pytest.raises(FileNotFoundError, match="lacks 2 of 3 parts, which other processes wrote elsewhere"):
        label_file(adapter, rows, tmp_path / "out.jsonl", **HOW)


def test_texts_have_no_column_of_adapters(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`adapter_column` names a column of a file"):
        label_file(adapter, ["a"], tmp_path / "out.jsonl", adapter_column="who")

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import call, message, succeed, unwrapped

import tiny_seq2seq
from ia3 import AutoPeftModelForSeq2SeqLM, PeftModel
from ia3.runs.likeness import likeness
from ia3.sites import Site
from ia3.tasks.task import load_task
from ia3.tensors import load_peft_weights


@pytest.fixture(scope="module")
def pair(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    how = ("train", "--model", base, "--data", data, "--epochs", 1, "--lr", 0.1)
    for name, targets in (("one", []), ("other", ["--target-modules", "v,wo", "--feedforward-modules", "wo"])):
        succeed(*how, *targets, "--output", folder / name)
    return folder / "one" / "adapter", folder / "other" / "adapter"


@pytest.mark.parametrize(
    ("rule", "weights"),
    [("mean", "1,3"), ("task_arithmetic", "0.3,-1"), ("product", "1,1"), ("sum", "1,1"), ("ties", "1,1")],
)
def test_a_combination_is_what_the_model_combines(
    pair: tuple[Path, Path], tmp_path: Path, rule: str, weights: str
) -> None:
    density = ("--density", 0.4) if rule == "ties" else ()
    succeed("combine", *pair, "--output", tmp_path / "both", "--type", rule, "--weights", weights, *density)
    model = PeftModel.from_pretrained(tiny_seq2seq.base(), pair[0], adapter_name="one")
    model.load_adapter(pair[1], "other")
    numbers = [float(weight) for weight in weights.split(",")]
    model.add_weighted_adapter(["one", "other"], numbers, "both", rule, density=0.4 if density else None)
    model.set_adapter("both")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "both")
    ids = torch.tensor([[4, 5, 6, 1]])
    expected, found = (each.eval()(input_ids=ids, labels=ids).logits for each in (model, loaded))
    torch.testing.assert_close(found, expected)
    assert load_task(tmp_path / "both") == load_task(pair[0])
    assert succeed("predict", tmp_path / "both", "the share falls").stdout


def test_negation(pair: tuple[Path, Path], tmp_path: Path) -> None:
    how = ("--type", "task_arithmetic", "--weights", "-1")
    content = json.loads(succeed("combine", pair[0], "--output", tmp_path / "not", *how, "--json").stdout)
    assert content["weights"] == [-1.0]
    before, after = load_peft_weights(pair[0]), load_peft_weights(tmp_path / "not")
    assert before.keys() == after.keys()
    for name, vector in before.items():
        torch.testing.assert_close(after[name], 2 - vector)


def test_different_tasks_leave_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    path = other / "ia3_task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "template": "x {text}"}))
    result = succeed("combine", pair[0], other, "--output", tmp_path / "both")
    assert "different tasks" in result.stderr
    assert not (tmp_path / "both" / "ia3_task.json").exists()


def test_one_task_asked_in_different_ways_is_asked_in_the_usual_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    path = other / "ia3_task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "answer_by": "generation"}))
    succeed("combine", other, pair[0], "--output", tmp_path / "both")
    task, own = load_task(tmp_path / "both"), load_task(pair[0])
    assert task is not None
    assert own is not None
    assert task.ranks
    assert (task.template, task.labels) == (own.template, own.labels)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights", "1"], "2 adapters and 1 weights"),
        (["--weights", "a,b"], "expected numbers with commas between"),
        (["--type", "average"], "Unknown combination_type 'average'"),
        (["--type", "ties"], "'ties' needs a density"),
    ],
)
def test_wrong_combinations(pair: tuple[Path, Path], tmp_path: Path, flags: list[str], said: str) -> None:
    result = call("combine", *pair, "--output", tmp_path / "both", *flags)
    assert result.exit_code == 2
    assert said in message(result)
    assert not (tmp_path / "both").exists()
    taken = call("combine", *pair, "--output", tmp_path)
    assert "replaces nothing" in message(taken)


def test_adapters_of_different_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    path = other / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "some/other"}))
    said = message(call("combine", pair[0], other, "--output", tmp_path / "both"))
    base = json.loads((pair[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    together = unwrapped(said)
    assert "differentbasemodels" in together
    assert unwrapped(f"{pair[0]} to {base!r}") in together
    assert unwrapped(f"{other} to 'some/other'") in together


def test_compare(pair: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "likeness.png"
    result = succeed("compare", *pair, pair[0], "--output", picture, "--json")
    pairs = json.loads(result.stdout)["pairs"]
    assert len(pairs) == 3
    assert pairs[1]["cosine"] == pytest.approx(1.0)
    assert pairs[1]["distance"] == 0.0
    assert list(pairs[0]["blocks"]) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert picture.stat().st_size > 10_000
    assert "least alike block" in succeed("compare", *pair, "--output", picture).stdout
    assert "nothing to compare it with" in message(call("compare", pair[0]))
    assert "must end in .png" in message(call("compare", *pair, "--output", tmp_path / "x.svg"))


def test_adapters_without_a_place_in_common_are_of_different_models() -> None:
    here, there = (Site(path, "output", (2, 1)) for path in ("block.0.k", "layer.0.key"))
    with pytest.raises(ValueError, match="no vector in the same place, so they belong to different models"):
        likeness({here: torch.ones(2, 1)}, {there: torch.ones(2, 1)})


def test_a_block_that_one_adapter_leaves_alone() -> None:
    from ia3 import Site

    a, b = Site("encoder.block.0.k", "output", (2, 1)), Site("encoder.block.10.k", "output", (2, 1))
    found = likeness({a: torch.full((2, 1), 2.0)}, {a: torch.full((2, 1), 0.0), b: torch.full((2, 1), 3.0)})
    assert found.blocks == {"encoder 0": pytest.approx(-1.0), "encoder 10": 0.0}


def test_blocks_of_a_model_without_encoder_and_decoder() -> None:
    from ia3 import Site

    vectors = {
        Site(f"model.layers.{number}.k_proj", "output", (2, 1)): torch.full((2, 1), 2.0) for number in (0, 2, 10)
    }
    assert list(likeness(vectors, vectors).blocks) == ["block 0", "block 2", "block 10"]

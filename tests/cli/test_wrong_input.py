"""Calls that can't work: one screen with the remedy, exit code 2, nothing half written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import DRAWING, call, message, processor_seconds
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

import tiny_seq2seq

ROWS = "the share falls,negative\na company rises,positive\nthe share stays,neutral\n"
FILES = {
    "empty.csv": b"",
    "header.csv": b"text,label\n",
    "blank.csv": b"text,label\n,negative\n",
    "one_class.csv": b"text,label\n" + b"".join(b"the share %d,positive\n" % number for number in range(12)),
    "cut.csv": "text,label\näöü,negative\nä".encode()[:-1],
    "utf16.csv": f"text,label\n{ROWS}".encode("utf-16-le"),
    "nan.csv": b"text,label\nthe share falls,negative\nthe share rises,NaN\n",
    "no_label.csv": b"text,label\nthe share falls,negative\nthe share rises,\n",
    "commas.csv": b"text,label\nthe share, today, falls,negative\n",
    "quotes.csv": b'text,label\n"the share falls,negative\n',
    "twice.csv": b"text,text,label\na,b,negative\n",
    "broken.jsonl": b'{"text": "the share falls", "label": "negative"}\n{"text": \n',
    "lists.jsonl": b"[1, 2]\n",
    "nested.jsonl": b'{"text": ["the", "share"], "label": "negative"}\n',
    "broken.parquet": b"PAR1half",
    "unknown.csv": f"text,label\n{ROWS}the share rises,postive\n".encode(),
    "unseen.csv": b"text,label\nthe share rises,wonderful\n",
    "unspellable.csv": b"text,label\n" + b"".join(b"the share %d,hm%d\n" % (n, n % 2) for n in range(12)),
    "taken.csv": b"text,prediction\nthe share falls,negative\n",
    "other.doc": b"the share falls",
    "good.csv": f"text,label\n{ROWS}".encode(),
    "typo.yaml": b"epoch: 3\n",
    "stranger.yaml": b"zebra: 3\n",
    "type.yaml": b"epochs: many\n",
    "range.yaml": b"batch_size: 0\n",
    "list.yaml": b"- epochs\n",
    "twice.yaml": b"epochs: 1\nepochs: 2\n",
    "broken.yaml": b"epochs: [1\n",
    "empty.yaml": b"",
}

# The call, with {base}, {data}, {adapter} and {folder}, and a part of what it must say.
TRAIN = "train --model {base} --data"
WRONG = {
    "no data file": (f"{TRAIN} nothing.csv", "There is no file nothing.csv"),
    "no data at all": ("train --model {base}", "There is no --data: give it, or name it in a recipe"),
    "no model at all": ("train --data {data}", "There is no --model: give it, or name it in a recipe"),
    "empty file": (f"{TRAIN} empty.csv", "empty.csv is empty; expected a header"),
    "header alone": (f"{TRAIN} header.csv", "has no rows: expected at least one"),
    "blank texts": (f"{TRAIN} blank.csv", "has no rows with a text (1 empty)"),
    "no such label column": (f"{TRAIN} {{data}} --label-column tone", "no column 'tone'; its columns are 'text'"),
    "no such text column": (f"{TRAIN} {{data}} --text-column review", "no column 'review'; its columns are 'text'"),
    "one class": (f"{TRAIN} one_class.csv", "have the label 'positive', so there is nothing to tell apart"),
    "cut UTF-8": (f"{TRAIN} cut.csv", "cut.csv is UTF-8 but for byte 0xc3 at position 27: save it again as UTF-8"),
    "UTF-16 unmarked": (f"{TRAIN} utf16.csv", "UTF-16 with a byte order mark (zero byte at position 1)"),
    "NaN label": (f"{TRAIN} nan.csv", "line 3: the text has no label"),
    "empty label": (f"{TRAIN} no_label.csv", "line 3: the text has no label"),
    "unquoted commas": (f"{TRAIN} commas.csv", "put texts with commas in double quotes"),
    "open quote": (f"{TRAIN} quotes.csv", "is not CSV"),
    "broken JSON": (f"{TRAIN} broken.jsonl", "line 2 is not JSON"),
    "JSON lists": (f"{TRAIN} lists.jsonl", "expected one JSON object a line"),
    "nested text": (f"{TRAIN} nested.jsonl", "the text is a list, expected a text or a number"),
    "broken parquet": (f"{TRAIN} broken.parquet", "is not a whole parquet file"),
    "unknown kind": (f"{TRAIN} other.doc", "is a file of a kind that is not read"),
    "unseen held-out label": (
        f"{TRAIN} {{data}} --test-data unseen.csv",
        "labels ['wonderful'] never occur in training",
    ),
    "unspellable label": (f"{TRAIN} unspellable.csv", "Choose a label word that the tokenizer gives back unchanged"),
    "test size": (f"{TRAIN} {{data}} --test-size 2", "expected a fraction between 0 and 1"),
    "learning rate": (f"{TRAIN} {{data}} --lr 0", "--learning-rate is '0': expected a positive number"),
    "limit": (f"{TRAIN} {{data}} --limit 0", "--limit is '0': expected a positive number"),
    "diverging": (f"{TRAIN} {{data}} --lr 3e37 --output run", "Lower the learning rate"),
    "output is a file": (f"{TRAIN} {{data}} --output good.csv", "is a file"),
    "stray brace": (f"{TRAIN} {{data}} --template {{{{text", "has a '{' that belongs to no field"),
    "template without field": (f"{TRAIN} {{data}} --template text", "shows no column to the model"),
    "template with the label": (f"{TRAIN} {{data}} --template {{{{text}}}}{{{{label}}}}", "shows the label column"),
    "template of no column": (f"{TRAIN} {{data}} --template {{{{a}}}}{{{{b}}}}", "no column 'a'"),
    "template and column": (
        f"{TRAIN} {{data}} --template {{{{a}}}} --text-column a",
        "so leave --text-column out",
    ),
    "target that matches nothing": (f"{TRAIN} {{data}} --target-modules keys,v", "'keys' matches no module"),
    "no recipe": ("train --recipe nothing.yaml", "There is no recipe nothing.yaml"),
    "recipe typo": ("train --recipe typo.yaml", "typo.yaml: There is no setting 'epoch'. Did you mean epochs?"),
    "recipe stranger": (f"{TRAIN} {{data}} --recipe stranger.yaml", "The settings are answer_by, balance,"),
    "recipe type": (f"{TRAIN} {{data}} --recipe type.yaml", "type.yaml: epochs is 'many': expected a whole number"),
    "recipe range": (f"{TRAIN} {{data}} --recipe range.yaml", "range.yaml: batch_size is 0: expected a positive"),
    "recipe list": ("train --recipe list.yaml", "list.yaml is no recipe: expected one key and its value a line"),
    "recipe key twice": ("train --recipe twice.yaml", "the keys ['epochs'] stand there more than once"),
    "recipe broken": ("train --recipe broken.yaml", "broken.yaml is not YAML"),
    "recipe empty": ("train --recipe empty.yaml", "empty.yaml is no recipe"),
    "misspelt model": ("train damage {data}", "There is no model 'damage'. Did you mean damaged?"),
    "misspelt folder": ("train some/folders/model {data}", "Expected a folder, or a hub repository"),
    "folder without a model": ("train . {data}", "No config.json in .: the folder holds no model"),
    "misspelt flag": (f"{TRAIN} {{data}} --learning-rat 1", "No such option: --learning-rat"),
    "wrong choice": (f"{TRAIN} {{data}} --precision fp16", "--precision is 'fp16': input should be 'fp32' or 'bf16'"),
    "model twice": ("train a b --model c", "There are both a and --model c: give one of them"),
    "recipe twice": (
        "train a b --recipe t-few --like-peft",
        "There are both --recipe t-few and --like-peft: give one of them",
    ),
    "recipe nearly": (
        f"{TRAIN} {{data}} --recipe T_Few",
        "There is no recipe T_Few, did you mean t-few? Expected a YAML file",
    ),
    "recipe without a name": (
        f"{TRAIN} {{data}} --recipe=",
        "--recipe is empty: expected a YAML file, or one of all-linear",
    ),
    "recipe's setting": (
        f"{TRAIN} {{data}} --recipe t-few --steps 60",
        "the training has 60 steps: expected fewer. The recipe t-few has --warmup-steps: give others beside it",
    ),
    "recipe and its one setting": (
        f"{TRAIN} {{data}} --recipe all-linear --target-modules k",
        "There are both --target-modules and the recipe all-linear, which is nothing but those",
    ),
    "both lengths": (f"{TRAIN} {{data}} --epochs 1 --steps 2", "There are both --epochs and --steps: leave one"),
    "misspelt setting to try": ("sweep {base} {data} --over learning_rat=1", "Did you mean learning_rate?"),
    "column of a sweep": ("sweep {base} {data} --text-column body", "no column 'body'; its columns are 'text'"),
    "misspelt adapter": ("predict half_ sentence", "There is no adapter 'half_'. Did you mean half?"),
    "no data to evaluate": ("evaluate {adapter} --data nothing.csv", "There is no file nothing.csv"),
    "no such model": ("train --model nosuch/model --data {data}", "base model 'nosuch/model' cannot be read"),
    "bundled model": ("train --model bundled:gpt5 --data {data}", "No bundled model 'bundled:gpt5'"),
    "unreadable model": ("train --model damaged --data {data}", "weights of the base model 'damaged' cannot be read"),
    "decoder model": ("train --model decoder --data {data} --task label-words", "label-words needs a seq2seq model"),
    "no adapter": ("predict damaged sentence", "No adapter_config.json"),
    "adapter of another base": ("predict foreign sentence", "Was it made for another base model"),
    "adapter with a damaged base": ("predict on_damaged sentence", "weights of the base model"),
    "adapter with no base": ("predict on_nothing sentence", "base model 'nosuch/model' cannot be read"),
    "damaged adapter": ("predict half sentence", "is truncated or damaged"),
    "NaN in an adapter": ("predict not_finite sentence", "hold NaN or infinity"),
    "adapter without its file": ("predict no_file sentence", "No adapter_model.safetensors"),
    "damaged task": ("predict bad_task sentence", "is not valid JSON"),
    "a run's folder": ("evaluate {adapter}/.. --data good.csv", "is no adapter but a folder with"),
    "no text": ("predict {adapter}", "Standard input holds no text"),
    "sentence and file": ("predict {adapter} sentence --file good.csv", "give one of them"),
    "no input file": ("predict {adapter} --file nothing.csv", "There is no file nothing.csv"),
    "input without rows": ("predict {adapter} --file header.csv", "has no rows: expected at least one"),
    "input without texts": ("predict {adapter} --file blank.csv", "None of the 1 rows of blank.csv has a text"),
    "input of another kind": (
        "predict {adapter} --file other.doc",
        "expected .csv, .tsv, .xlsx, .jsonl, .json, .parquet",
    ),
    "input of another column": ("predict {adapter} --file good.csv --text-column review", "has no column 'review'"),
    "input cut": ("predict {adapter} --file cut.csv", "save it again as UTF-8"),
    "input with a column twice": ("predict {adapter} --file twice.csv", "several columns named ['text']"),
    "input with unquoted commas": ("predict {adapter} --file commas.csv", "has 4 cells, and the header 2"),
    "input with an open quote": ("predict {adapter} --file quotes.csv", "is not CSV"),
    "input of broken JSON": ("predict {adapter} --file broken.jsonl", "line 2 is not JSON"),
    "input of JSON lists": ("predict {adapter} --file lists.jsonl", "is a list; expected one JSON object a line"),
    "input of broken parquet": ("predict {adapter} --file broken.parquet", "is not a whole parquet file"),
    "output over the input": ("predict {adapter} --file good.csv --output good.csv", "is the input"),
    "output of another kind": (
        "predict {adapter} sentence --output out.xls",
        "one that ends in .csv, .tsv, .xlsx or .jsonl",
    ),
    "output nowhere": ("predict {adapter} sentence --output no/out.csv", "expected a file name in a folder"),
    "output column taken": ("predict {adapter} --file taken.csv --output out.csv", "named ['prediction'] already"),
    "unknown label": ("evaluate {adapter} --data unknown.csv", "Did you mean 'positive' for 'postive'?"),
    "nothing to evaluate": ("evaluate {adapter} --data header.csv", "has no rows: expected at least one"),
}


# What is found before anything heavy is imported.
EARLY = (
    *("no data file", "no data at all", "no model at all", "empty file", "header alone", "open quote"),
    *("no such label column", "no such text column", "unquoted commas", "broken JSON", "unknown kind", "test size"),
    *("learning rate", "limit", "output is a file", "stray brace", "template without field", "template with the label"),
    *(
        "template of no column",
        "template and column",
        "no recipe",
        "recipe typo",
        "recipe type",
        "bundled model",
    ),
    *("no adapter", "a run's folder", "sentence and file", "no input file", "misspelt model", "misspelt folder"),
    *("folder without a model", "misspelt flag", "wrong choice", "model twice", "recipe twice", "both lengths"),
    *("misspelt setting to try", "column of a sweep", "misspelt adapter", "no data to evaluate"),
)
HEAVY = """
import json, sys
from typer.testing import CliRunner
from ia3.cli.main import app
for name, arguments in json.loads(sys.stdin.read()).items():
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (name, result.output)
    heavy = {"torch", "transformers", "matplotlib", "accelerate", "datasets", "pandas", "numpy"} & {*sys.modules}
    assert not heavy, (name, heavy)
"""


@pytest.fixture(scope="session")
def workplace(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, models and adapters of which each has something wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    shutil.copytree(base, folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:900])
    tiny_seq2seq.tokenizer().save_pretrained(folder / "decoder")
    AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2).save_pretrained(folder / "decoder")
    wider = T5Config(vocab_size=17, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(wider).save_pretrained(folder / "other_base")
    tiny_seq2seq.tokenizer().save_pretrained(folder / "other_base")

    for name in ("foreign", "on_damaged", "on_nothing", "half", "not_finite", "no_file", "bad_task"):
        shutil.copytree(adapter, folder / name)
    rename_base(folder / "foreign", str(folder / "other_base"))
    rename_base(folder / "on_damaged", str(folder / "damaged"))
    rename_base(folder / "on_nothing", "nosuch/model")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (folder / "half" / "adapter_model.safetensors").write_bytes(b"half")
    key = next(iter(tensors))
    infinite = {**tensors, key: torch.full_like(tensors[key], torch.inf)}
    save_file(infinite, folder / "not_finite" / "adapter_model.safetensors")
    (folder / "no_file" / "adapter_model.safetensors").unlink()
    (folder / "bad_task" / "ia3_task.json").write_text("{")
    return folder


def rename_base(adapter: Path, name: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRONG)
def test_one_screen_with_the_remedy(
    name: str, base: Path, data: Path, adapter: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    before = snapshot(workplace)
    arguments, said = WRONG[name]
    result = call(*arguments.format(base=base, data=data, adapter=adapter).split(), text="")
    assert result.exit_code == 2, result.output
    assert said in message(result)
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) < 24
    left = {path for path in snapshot(workplace) if path not in before}
    # A training that diverged leaves its losses to look at.
    kept = ("recipe.yaml", "environment.json", "metrics.jsonl") if name == "diverging" else ()
    assert left == {str(workplace / "run" / file) for file in kept}
    assert {path: content for path, content in snapshot(workplace).items() if path in before} == before


def test_trivial_mistakes_wait_for_nothing_heavy(base: Path, data: Path, adapter: Path, workplace: Path) -> None:
    calls = {name: WRONG[name][0].format(base=base, data=data, adapter=adapter).split() for name in EARLY}
    subprocess.run(
        [sys.executable, "-c", HEAVY], input=json.dumps(calls), text=True, cwd=workplace, check=True, timeout=100
    )


def test_a_trivial_mistake_is_answered_at_once(base: Path, data: Path) -> None:
    """Next to the packages that draw the answer, which take a third or a quarter of that."""
    mistake = (sys.executable, "-m", "ia3", "train", base, data, "--text-column", "body")
    times = [(processor_seconds(*mistake, code=2), processor_seconds(sys.executable, "-c", DRAWING)) for _ in range(3)]
    answer, drawing = map(min, zip(*times, strict=True))
    assert answer < 8 * drawing


@pytest.mark.parametrize(
    "command",
    [("predict", "{}", "a text"), ("evaluate", "{}", "data.csv"), ("inspect", "{}"), ("merge", "{}", "out"),
     ("compare", "{}", "{}"), ("combine", "{}", "{}", "--output", "out"), ("push", "{}", "you/it")],
    ids=lambda command: command[0],
)  # fmt: skip
def test_an_adapter_that_is_not_what_its_training_left(trained: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    result = call(*(each.format(run / "adapter") for each in command))
    assert result.exit_code == 2
    assert "adapter_model.safetensors is not what its training left, by SHA256SUMS" in message(result).replace(
        " /", "/"
    )

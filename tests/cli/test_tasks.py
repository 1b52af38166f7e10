"""Each kind of task by its commands: a file in, an adapter out, answers to a second file, an evaluation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import call, message, succeed

import tiny_causal
import tiny_classifier
from ia3 import IA3Config, PeftModel
from ia3.inference.loading import load_adapter
from ia3.tasks.examples import Example
from ia3.tasks.task import TaskKind, load_task
from tiny_heads import load_base, save_base


@pytest.fixture
def encoder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    tiny("bert", initializer_range=0.3).save_pretrained(folder)
    tiny_classifier.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def decoder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    folder = tmp_path / "decoder"
    tiny("llama", vocab_size=len(tiny_causal.WORDS), bos_token_id=3, tie_word_embeddings=False).save_pretrained(folder)
    tiny_causal.tokenizer().save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[Example]) -> Path:
    lines = ["text,label", *(f"{row.text},{row.label}" for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_classes_of_texts(encoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", tiny_classifier.labelled(60))
    run = tmp_path / "run"
    how = ("--epochs", 12, "--lr", 0.05, "--output", run, "--no-dropout", "--balance", "--test-data", data)
    content = json.loads(succeed("train", "--model", encoder, "--data", data, *how, "--json").stdout)
    assert content["task"] == "sequence-classification"
    assert content["accuracy"] == 1.0
    task = load_task(run / "adapter")
    assert task is not None
    assert (task.kind, task.labels) == (TaskKind.SEQUENCE_CLASSIFICATION, tiny_classifier.LABELS)
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    assert evaluated["accuracy"] == 1.0
    assert evaluated["method"] == "the head's likeliest label"
    answered = json.loads(succeed("predict", run / "adapter", "--json", "the share falls").stdout)["predictions"]
    assert answered[0]["label"] == "negative"
    assert list(answered[0]["probabilities"]) == list(tiny_classifier.LABELS)
    refused = call("evaluate", run / "adapter", "--data", data, "--answer-by", "generation")
    assert refused.exit_code == 2
    assert "--answer-by: Answers by generation are for label-words, and this task is sequence" in message(refused)
    refused = call("predict", run / "adapter", "--max-new-tokens", 3, "the share falls")
    assert "which writes nothing: leave --max-new-tokens out" in message(refused)


def test_classes_without_the_task_file_have_their_number(encoder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", tiny_classifier.labelled(12))
    succeed("train", "--model", encoder, "--data", data, "--epochs", 1, "--output", tmp_path / "run")
    adapter = tmp_path / "bare"
    shutil.copytree(tmp_path / "run" / "adapter", adapter)
    (adapter / "ia3_task.json").unlink()
    answered = json.loads(succeed("predict", adapter, "--json", "the share falls").stdout)["predictions"]
    assert list(answered[0]["probabilities"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    (adapter / "ia3_task.json").write_text("{")
    assert "is not valid JSON" in message(call("predict", adapter, "the share falls"))


XLNET = ("--target-modules", "layer_1,layer_2", "--feedforward-modules", "layer_2")
DEBERTA = ("--target-modules", "key_proj,value_proj,output.dense", "--feedforward-modules", "output.dense")


@pytest.mark.parametrize(
    ("family", "saved", "where", "whole"),
    [
        ("bert", "MaskedLM", (), ["bert.pooler", "classifier"]),
        ("xlnet", "", XLNET, ["logits_proj", "sequence_summary"]),
        ("deberta-v2", "MaskedLM", DEBERTA, ["classifier", "pooler"]),
    ],
)
def test_classes_on_a_base_that_lacks_the_head(
    family: str, saved: str, where: tuple[str, ...], whole: list[str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, saved)
    tiny_classifier.tokenizer().save_pretrained(base)
    data = write_csv(tmp_path / "data.csv", tiny_classifier.labelled(12))
    how = ("--task", "sequence-classification", "--epochs", 2, "--output", tmp_path / "run", "--no-dropout")
    succeed("train", "--model", base, "--data", data, *how, *where)
    adapter = tmp_path / "run" / "adapter"
    assert IA3Config.from_pretrained(adapter).modules_to_save == whole
    first, again = (succeed("predict", adapter, "--json", "the share falls").stdout for _ in range(2))
    assert json.loads(first) == json.loads(again)
    model, tokenizer = load_adapter(adapter)
    batch = tokenizer(["the share falls"], return_tensors="pt")
    by_hand = PeftModel.from_pretrained(load_base(base, "SequenceClassification", 9, num_labels=3), adapter)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, by_hand(**batch).logits)


def test_tags_of_words(encoder: Path, tmp_path: Path) -> None:
    pairs = [("rises in x", "O O B-LOC"), ("the y z falls", "O B-PER I-PER O"), ("x stays", "B-LOC O")]
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"tokens": words.split(), "tags": tags.split()}) for words, tags in pairs]
    data.write_text("\n".join(lines * 8) + "\n")
    run = tmp_path / "run"
    how = ("--task", "token-classification", "--text-column", "tokens", "--label-column", "tags", "--test-data", data)
    how = (*how, "--epochs", 20, "--lr", 0.05, "--no-dropout")
    content = json.loads(succeed("train", "--model", encoder, "--data", data, *how, "--output", run, "--json").stdout)
    assert content["scores"]["entity_f1"] == content["accuracy"] == 1.0
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    assert (evaluated["entity_f1"], evaluated["examples"]) == (1.0, 8 * 9)
    assert "entity f1" in succeed("evaluate", run / "adapter", "--data", data).stdout
    output = tmp_path / "tagged.jsonl"
    succeed("predict", run / "adapter", "--file", data, "--output", output)
    answered = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    assert answered == [tags for _, tags in pairs] * 8
    assert "24 predictions are in" in succeed("predict", run / "adapter", "--file", data, "--output", output).stdout
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text(json.dumps({"tokens": ["x"], "tags": ["B-LOCK"]}) + "\n")
    assert "Did you mean 'B-LOC' for 'B-LOCK'?" in message(call("evaluate", run / "adapter", "--data", unknown))


def test_words_beyond_the_longest_length_have_no_tag(encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    rows = [Example(f"the share {word} x", "O O B-X O") for word in ("rises", "falls", "stays", "x", "y", "z")]
    write_csv(data, rows)
    run = tmp_path / "run"
    how = ("--task", "token-classification", "--epochs", 1, "--max-length", 5, "--output", run, "--json")
    content = json.loads(succeed("train", "--model", encoder, "--data", data, "--test-data", data, *how).stdout)
    assert content["scores"]["words_left_out"] == 6
    assert content["test_examples"] == 18
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    assert evaluated["examples"] == 18


@pytest.mark.parametrize("packing", [False, True])
def test_instructions(decoder: Path, tmp_path: Path, packing: bool) -> None:
    data = write_csv(tmp_path / "data.csv", tiny_causal.examples(48))
    run = tmp_path / "run"
    flags = ["--packing"] if packing else []
    how = ("--epochs", 2, "--system", "be brief", "--max-length", 32, "--output", run)
    content = json.loads(succeed("train", "--model", decoder, "--data", data, *how, *flags, "--json").stdout)
    assert content["task"] == "instructions"
    assert content["loss"] < content["evaluations"][0]["loss"]
    assert content["majority_baseline"] is None
    task = load_task(run / "adapter")
    assert task is not None
    assert (task.system, task.labels) == ("be brief", ())
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    assert evaluated["method"] == "written answers, exact match"
    assert "labels" not in evaluated
    held_out = json.loads((run / "result.json").read_text())["predictions"]
    texts = [each["text"] for each in held_out]
    answered = json.loads(succeed("predict", run / "adapter", "--json", *texts).stdout)["predictions"]
    assert [each["label"] for each in answered] == [each["prediction"] for each in held_out]


def test_texts_alone(decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    texts = [f"{row.text} {row.label} " * 4 for row in tiny_causal.examples(40)]
    data.write_text("\n".join(texts) + "\n")
    run = tmp_path / "runs" / "one"
    how = ("--task", "language-modelling", "--epochs", 2, "--max-length", 16, "--batch-size", 4)
    ran = succeed("train", "--model", decoder, "--data", data, *how, "--output", run)
    assert "perplexity" in ran.stdout
    assert "accuracy" not in ran.stdout
    assert "nan" not in ran.stdout.casefold()
    content = json.loads((run / "result.json").read_text())
    assert content["loss"] < content["evaluations"][0]["loss"]
    assert content["accuracy"] is content["accuracy_interval_95"] is content["best"].get("accuracy") is None
    assert content["predictions"] == []
    for name in ("report.md", "adapter/README.md"):
        text = (run / name).read_text()
        assert "ccuracy" not in text.replace("![Loss, accuracy and", "")
        assert " nan" not in text.casefold()
    compared = succeed("runs", run.parent).stdout
    assert "accuracy" not in compared
    assert f"{content['loss']:.3f}" in compared
    assert "nan" not in compared.replace("language", "")
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    model, tokenizer = load_adapter(run / "adapter")
    losses, count = 0.0, 0
    for text in texts:
        whole = [3, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        for start in range(0, len(whole) - 1, 15):
            ids = torch.tensor([whole[start : start + 16]])
            with torch.no_grad():
                losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert evaluated["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert evaluated["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-4)
    # The tokenizer has a chat template; a text is gone on with as it is.
    asked = ("--max-new-tokens", 5, "--json", "say the number")
    (answered,) = json.loads(succeed("predict", run / "adapter", *asked).stdout)["predictions"]
    start = torch.tensor([[3, *tokenizer("say the number", add_special_tokens=False)["input_ids"]]])
    wanted = model.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=5, eos_token_id=1)
    assert answered["label"] == tokenizer.decode(wanted[0, start.shape[1] :], skip_special_tokens=True).strip()


def test_a_sweep_of_texts_alone_tells_their_loss(decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(f"{row.text} {row.label} " * 4 for row in tiny_causal.examples(30)) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: language-modelling\nmax_length: 16\nbatch_size: 4\nsteps: 6\n")
    flags = ("--recipe", recipe, "--over", "learning_rate=0.01,0.05", "--output", tmp_path / "sweep")
    ran = succeed("sweep", decoder, data, *flags)
    assert "accuracy" not in ran.stdout
    assert "nan" not in ran.stdout.casefold()
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [each["accuracy"] for each in found["runs"]] == [None, None]


def test_whole_conversations(decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "say one"},
                    {"role": "assistant", "content": "one"},
                    {"role": "user", "content": row.text},
                    {"role": "assistant", "content": row.label},
                ]
            }
        )
        for row in tiny_causal.examples(24)
    ]
    data.write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    content = json.loads(
        succeed("train", "--model", decoder, "--data", data, "--epochs", 1, "--output", run, "--json").stdout
    )
    assert content["train_examples"] + content["test_examples"] == 24
    assert json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)["examples"] == 24
    answered = json.loads(succeed("predict", run / "adapter", "--file", data, "--json").stdout)["predictions"]
    assert [each["text"] for each in answered] == [row.text for row in tiny_causal.examples(24)]
    questions = tmp_path / "questions.jsonl"
    records = [json.loads(line)["messages"][:-1] for line in lines]
    questions.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    asked = json.loads(succeed("predict", run / "adapter", "--file", questions, "--json").stdout)["predictions"]
    assert asked == answered


def test_free_text_from_a_seq2seq_model(base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = ("--task", "generation", "--epochs", 1, "--output", run, "--json")
    content = json.loads(succeed("train", "--model", base, "--data", data, *how).stdout)
    assert (content["task"], content["labels"], content["macro_f1"]) == ("generation", [], None)
    evaluated = json.loads(succeed("evaluate", run / "adapter", "--data", data, "--json").stdout)
    assert evaluated["method"] == "written answers, exact match"
    assert "confusion" not in evaluated


def test_an_architecture_that_does_not_tell(tmp_path: Path, tiny: Callable[..., Any], data: Path) -> None:
    tiny("bert").config.save_pretrained(tmp_path / "bare")
    path = tmp_path / "bare" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
    result = call("train", "--model", tmp_path / "bare", "--data", data)
    assert result.exit_code == 2
    assert "doesn't say what to train it for: name the task, one of label-words" in message(result)

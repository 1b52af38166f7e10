"""Classifiers on one encoder: what each adapter answers alone, in batches that mix them; and the vectors of texts."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from fleet import TASKS, TEXTS, alone, ask, bare, save, save_fleet, serving, task_of, tokenizer_of
from transformers import BertConfig, BertForMaskedLM

import tiny_classifier
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.fast.encoding import FusedEncoder
from ia3.inference.classify import classify, load_classifier
from ia3.inference.loading import load_adapter
from ia3.serving.encoders import no_vectors_reason
from ia3.serving.engine import Engine
from ia3.serving.http import make_app
from ia3.serving.intake import Limits
from ia3.serving.requests import NotServed, Request
from ia3.serving.starting import start
from ia3.tasks.task import TaskKind, load_task, save_task

BASE = "base"
CLASSES = TaskKind.SEQUENCE_CLASSIFICATION
LABELS = {"tone": ("negative", "neutral", "positive"), "spam": ("spam", "ham"), "five": ("a", "b", "c", "d", "e")}
LABELS["tone too"] = LABELS["tone"]


def save_classifier(folder: Path, base: str, labels: tuple[str, ...], seed: int, *, pooler: bool = False) -> None:
    """An adapter whose vectors, head and pooler are drawn at random."""
    model = load_classifier(base, CLASSES, labels)
    saved = ["classifier", *(["pooler"] if pooler else [])]
    model = get_peft_model(model, IA3Config(task_type="SEQ_CLS", modules_to_save=saved))
    tiny_classifier.randomise(model, seed, 0, 2)
    model.save_pretrained(folder)
    save_task(folder, task_of(kind=CLASSES, labels=labels, max_length=12, pattern="the {text}" if seed else "{text}"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A BERT that lacks a head and a pooler, and a folder of classifiers on it."""
    folder = tmp_path_factory.mktemp("encoder")
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.5}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder / BASE)
    tiny_classifier.tokenizer().save_pretrained(folder / BASE)
    for seed, (name, labels) in enumerate(LABELS.items()):
        save_classifier(folder / "adapters" / name, str(folder / BASE), labels, seed, pooler=True)
    return str(folder / BASE), folder / "adapters"


@contextmanager
def started(base: str, folder: Path, **how: Any) -> Iterator[Engine]:
    engine = start(base, folder, Limits(batch_size=8, gather_s=0.05, **how))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(encoder: tuple[str, Path]) -> Iterator[Engine]:
    with started(*encoder) as running:
        yield running


def test_each_text_is_answered_as_predict_answers_it(encoder: tuple[str, Path], engine: Engine) -> None:
    texts = tiny_classifier.TEXTS
    assert engine.registry.refused() == {}
    asked = [(name, text) for text in texts for name in LABELS]
    futures = [engine.submit(Request(text, name)) for name, text in asked]
    found = dict(zip(asked, (future.result(60) for future in futures), strict=True))
    assert engine.stats()["batches"] < len(asked) / 4  # they share batches, whatever their labels are
    assert engine._answer._encoder.reason is None  # by fused blocks
    answered = set()
    for name, labels in LABELS.items():
        model, tokenizer = load_adapter(encoder[1] / name)
        task = load_task(encoder[1] / name)
        assert task is not None
        rendered = [task.template.render({"text": text}) for text in texts]
        expected = classify(model, tokenizer, rendered, max_length=task.max_length, batch_size=1)
        answered |= {(name, each.label) for each in expected}
        for text, each in zip(texts, expected, strict=True):
            answer = found[name, text]
            assert (answer.text, answer.label, answer.completion_tokens) == (each.label, each.label, 0)
            assert answer.probabilities == pytest.approx(each.probabilities, abs=1e-6)
            assert [*(answer.probabilities or ())] == [*labels]
    assert len(answered) > len(LABELS)  # else they tell nothing


def test_the_models_own_forward_where_fused_blocks_are_others(
    encoder: tuple[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the share rises"
    expected = {name: ask(engine, name, text).probabilities for name in LABELS}
    monkeypatch.setattr(FusedEncoder, "difference", lambda *given: "its numbers are others")
    monkeypatch.setattr(FusedEncoder, "__call__", None)
    with started(*encoder) as other:
        for name in LABELS:
            assert ask(other, name, text).probabilities == pytest.approx(expected[name], abs=1e-6)
        assert other._answer._encoder.reason == "its numbers are others"


def test_the_same_to_the_last_bit_in_any_company(encoder: tuple[str, Path]) -> None:
    """Whose own numbers hardly differ with their company: its fixed shapes are seen at what it is called with."""
    asked = [(text, name, embeds) for text in tiny_classifier.TEXTS for name in LABELS for embeds in (False, True)]
    draw = random.Random(0)
    with started(*encoder, batch_invariant=True) as engine:
        shapes, own = set[tuple[int, ...]](), engine._answer._encoder._own

        def note(batch: Any, **how: Any) -> Any:
            shapes.add(tuple(batch["input_ids"].shape))
            return own(batch, **how)

        engine._answer._encoder._own = note  # type: ignore[method-assign]

        def answers(some: list[tuple[str, str, bool]]) -> list[Any]:
            futures = [engine.submit(Request(text, name, embeds=embeds)) for text, name, embeds in some]
            found = [future.result(60) for future in futures]
            return [(each.probabilities, each.vector) for each in found]

        alone = [answers([each])[0] for each in asked]
        together = answers(asked)
        mixed = draw.sample(range(len(asked)), len(asked))
        others = dict(zip(mixed, answers([asked[index] for index in mixed]), strict=True))
    assert together == alone
    assert [others[index] for index in range(len(alone))] == alone
    assert shapes == {(8, 16)}


def test_another_model_is_compared_anew(encoder: tuple[str, Path]) -> None:
    with started(*encoder) as engine:
        first = ask(engine, "five", "the share rises").probabilities
        with torch.no_grad():
            engine.registry.model.bert.encoder.layer[0].output.dense.weight.mul_(2)
        changed = ask(engine, "five", "the share rises").probabilities
        assert changed != pytest.approx(first, abs=1e-3)


def test_the_base_answers_nothing(engine: Engine) -> None:
    with pytest.raises(NotServed, match="encoder, which answers nothing by itself: ask one of its adapters"):
        ask(engine, BASE, "the share rises")


def mean_of(hidden: torch.Tensor) -> list[float]:
    mean = hidden[0].mean(dim=0)
    return (mean / mean.norm()).tolist()


@torch.no_grad()
def test_vectors_are_means_of_hidden_states(encoder: tuple[str, Path], engine: Engine) -> None:
    texts = tiny_classifier.TEXTS
    for name in (BASE, "tone", "five"):
        futures = [engine.submit(Request(text, name, embeds=True)) for text in texts]
        if name == BASE:
            model, tokenizer, pattern = load_classifier(encoder[0], CLASSES, ("x", "y")), None, "{text}"
        else:
            model, tokenizer = load_adapter(encoder[1] / name)
            pattern = "the {text}" if name == "five" else "{text}"
        tokenizer = tokenizer or tiny_classifier.tokenizer()
        for text, future in zip(texts, futures, strict=True):
            length = 32 if name == BASE else 12
            ids = tokenizer(pattern.format(text=text), truncation=True, max_length=length, return_tensors="pt")
            answer = future.result(60)
            assert answer.vector == pytest.approx(mean_of(model.bert(ids["input_ids"]).last_hidden_state), abs=1e-5)
            assert answer.prompt_tokens == ids["input_ids"].shape[1]


def test_the_bases_vectors_alone_take_the_blocks_of_all(
    encoder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], FusedEncoder.__init__
    monkeypatch.setattr(FusedEncoder, "__init__", lambda *given: made.append(1) or make(*given))
    with started(*encoder) as engine:
        for name in (BASE, "tone", BASE, BASE):
            engine.submit(Request("the share rises", name, embeds=True)).result(60)
    assert made == [1]


@torch.no_grad()
def test_an_encoder_decoders_encoder_too(tmp_path: Path) -> None:
    folder = save_fleet(tmp_path, {"news": TASKS["news"], "sports": TASKS["sports"]})
    with serving(folder) as engine:
        found = engine.submit(Request(TEXTS[0], "sports", embeds=True)).result(60)
        assert ask(engine, "news", TEXTS[0]).label == alone(folder / "news", TEXTS[:1])[0].label
    model: Any = PeftModel.from_pretrained(bare(), folder / "sports")
    ids = tokenizer_of()(f"the share {TEXTS[0]}", truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    assert found.vector == pytest.approx(mean_of(model.get_encoder()(ids).last_hidden_state), abs=1e-5)


def test_a_causal_model_gives_no_vectors(tmp_path: Path, tiny: Any) -> None:
    chat = {"kind": TaskKind.INSTRUCTIONS, "max_length": 64, "max_new_tokens": 5}
    folder = save_fleet(tmp_path, {"chat": chat}, causal=True)
    said = "gives no embeddings, since a causal model's tokens don't see"
    with serving(folder, causal=True) as engine, pytest.raises(NotServed, match=said):
        engine.submit(Request("one", "chat", embeds=True))
    assert no_vectors_reason(tiny("llama", task="SEQ_CLS")) == "its tokens don't see what comes after them"
    assert no_vectors_reason(tiny("bert")) is None


def test_what_an_encoder_does_not_answer(encoder: tuple[str, Path], tmp_path: Path) -> None:
    base, _ = encoder
    save(tmp_path / "words", 0, task_of(**TASKS["news"]))
    save_classifier(tmp_path / "tags", base, tiny_classifier.TAGS, 0, pooler=True)
    save_task(tmp_path / "tags", tiny_classifier.task(TaskKind.TOKEN_CLASSIFICATION))
    save_classifier(tmp_path / "counts", base, LABELS["spam"], 0, pooler=True)
    save_task(tmp_path / "counts", task_of(kind=CLASSES, labels=LABELS["tone"], max_length=12))
    save_classifier(tmp_path / "good", base, LABELS["spam"], 0, pooler=True)
    with started(base, tmp_path) as engine:
        refused = engine.registry.refused()
        assert "its task is label-words, which an encoder with heads for classes of texts doesn't" in refused["words"]
        assert "its task is token-classification" in refused["tags"]
        assert "its head chooses from 2 classes, and its task has 3 labels" in refused["counts"]
        assert len(engine.registry.table) == 1
        assert ask(engine, "good", "the share rises").label in LABELS["spam"]


def test_over_http(engine: Engine) -> None:
    client = TestClient(make_app(engine))
    models = ["tone", "spam", f"{BASE}:five"]
    found = client.post("/v1/classify", json={"models": models, "input": "the share rises"}).json()
    assert [[*each["probabilities"]] for each in found["data"]] == [[*LABELS[n]] for n in ("tone", "spam", "five")]
    assert all(sum(each["probabilities"].values()) == pytest.approx(1) for each in found["data"])
    body = {"model": "tone", "input": ["the share", "it falls"]}
    plain = client.post("/v1/embeddings", json=body).json()
    coded = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    for one, other in zip(plain["data"], coded["data"], strict=True):
        assert struct.unpack("<16f", base64.b64decode(other["embedding"])) == pytest.approx(one["embedding"])
    for route, field in (("/v1/completions", "prompt"), ("/v1/classify", "input")):
        answer = client.post(route, json={"model": BASE, field: "the share"})
        assert answer.status_code == 400
        assert "ask /v1/embeddings for the text's vector" in answer.json()["error"]["message"]

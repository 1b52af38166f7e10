from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import builders
import tiny_seq2seq
from ia3 import AdapterTable, IA3Config, get_peft_model
from ia3.fast.fused import FusedLoss
from ia3.inference.rank import LabelScorer, _under_masks, likeliest, rank, rankings, tokenise_labels
from ia3.mixing import gather_rows
from ia3.rows import BASE, acting
from ia3.state import attached
from ia3.tasks.losses import choice_log_probabilities, choice_scores, pad_choices
from replayed import recording

TOKENIZER = tiny_seq2seq.tokenizer()
LABELS = ("negative", "very much positive", "the share stays", "neutral")
TEXTS = [row.text for row in tiny_seq2seq.examples(7)]


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64, with vectors far from one, and dropout that must not act."""
    model = tiny_seq2seq.adapted(dropout=0.3).double()
    builders.randomise(model, spread=2.0)
    return model


def score_labels(model: Any, tokenizer: Any, texts: list[str], labels: tuple[str, ...], **how: Any) -> torch.Tensor:
    return LabelScorer(model, tokenizer, labels, **how)(texts)


def alone(model: Any, text: str, label: str, *, length_normalised: bool = True) -> float:
    """The model's own loss on one text and one label."""
    labels = TOKENIZER(text_target=label, return_tensors="pt")["input_ids"]
    loss = model(**TOKENIZER(text, return_tensors="pt"), labels=labels).loss.item()
    return -loss if length_normalised else -loss * labels.shape[1]


@pytest.mark.parametrize("length_normalised", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_pair_alone(model: Any, length_normalised: bool, batch_size: int) -> None:
    model.train()
    scores = score_labels(model, TOKENIZER, TEXTS, LABELS, length_normalised=length_normalised, batch_size=batch_size)
    assert scores.dtype == torch.float64
    expected = [[alone(model, text, label, length_normalised=length_normalised) for label in LABELS] for text in TEXTS]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_adapter_decides(model: Any) -> None:
    adapted = score_labels(model, TOKENIZER, TEXTS, LABELS)
    with model.disable_adapter():
        plain = score_labels(model, TOKENIZER, TEXTS, LABELS)
    assert (adapted - plain).abs().max() > 0.01


def test_the_likeliest_label_with_its_probability(model: Any) -> None:
    rankings = rank(model, TOKENIZER, TEXTS, LABELS, batch_size=2)
    assert len(rankings) == len(TEXTS)
    for text, ranking in zip(TEXTS, rankings, strict=True):
        weights = [math.exp(alone(model, text, label)) for label in LABELS]
        expected = {label: weight / sum(weights) for label, weight in zip(LABELS, weights, strict=True)}
        assert ranking.probabilities == pytest.approx(expected, abs=1e-10)
        assert list(ranking.probabilities) == list(LABELS)
        assert ranking.label == max(expected, key=expected.__getitem__)


def test_sums_favour_short_labels(model: Any) -> None:
    labels = ("the share of a company", "neutral")
    by_sum = rank(model, TOKENIZER, TEXTS, labels, length_normalised=False)
    assert by_sum != rank(model, TOKENIZER, TEXTS, labels)
    assert {ranking.label for ranking in by_sum} == {"neutral"}


def test_the_encoder_runs_once_a_text(model: Any) -> None:
    rows = []
    handle = model.get_encoder().register_forward_hook(
        lambda module, args, output: rows.append(output.last_hidden_state.shape[0])
    )
    rank(model, TOKENIZER, TEXTS, LABELS, batch_size=3)
    handle.remove()
    assert rows == [3, 3, 1]


def test_many_labels_make_small_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score_labels(model, TOKENIZER, TEXTS, LABELS)
    most = 2 * len(LABELS) * 4 * model.config.vocab_size  # the logits of two texts with all labels
    monkeypatch.setattr("ia3.inference.rank._MOST_LOGITS", most)
    scorer, beats = LabelScorer(model, TOKENIZER, LABELS, batch_size=5), []
    torch.testing.assert_close(scorer(TEXTS, beats.append), wanted, rtol=0, atol=1e-10)
    assert beats == [2, 2, 2, 1]


def test_of_equal_scores_the_first_wins() -> None:
    assert likeliest(torch.tensor([[1.0, 3.0, 3.0], [-2.0, -2.0, -2.5], [0.0, -1.0, 0.0]])) == [1, 0, 0]
    found = rankings(("a", "b", "c"), torch.tensor([[1.0, 3.0, 3.0]]))
    assert found[0].label == "b"


@pytest.fixture
def without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: batches are filled up and recorded."""
    monkeypatch.setattr("ia3.inference.rank._why_not", lambda model: None)


@pytest.mark.usefixtures("without_a_reason")
@pytest.mark.parametrize("reason", [None, "only the model's own forward"], ids=["by hand", "forward"])
def test_recorded_scores_are_the_same(model: Any, monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr("ia3.fast.scores.unsupported_reason", lambda model, layout: reason)
    plain = score_labels(model, TOKENIZER, TEXTS, LABELS, batch_size=3)
    with recording() as recorded:
        scorer = LabelScorer(model, TOKENIZER, LABELS, batch_size=3)
        for _ in range(2):
            torch.testing.assert_close(scorer(TEXTS), plain, rtol=0, atol=1e-10)
        if reason is not None:
            assert len(recorded) == 1  # of three batches, all filled up to three rows of sixteen tokens
        long = [*TEXTS, "the share " * 12]
        wanted = score_labels(model, TOKENIZER, long, LABELS)
        for _ in range(2):
            torch.testing.assert_close(scorer(long), wanted, rtol=0, atol=1e-10)
        if reason is not None:
            assert len(recorded) == 2
        assert scorer([]).shape == (0, len(LABELS))


@pytest.mark.usefixtures("without_a_reason")
def test_a_scorer_follows_the_model(model: Any) -> None:
    with recording():
        scorer = LabelScorer(model, TOKENIZER, LABELS, batch_size=3)
        adapted = scorer(TEXTS)
        with model.disable_adapter():
            plain = scorer(TEXTS)
        torch.testing.assert_close(scorer(TEXTS), adapted)
    assert (adapted - plain).abs().max() > 0.01


@pytest.mark.usefixtures("without_a_reason")
def test_autocast_is_the_own_forwards(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_seq2seq.adapted()
    builders.randomise(model, spread=2.0)
    scorer = LabelScorer(model, TOKENIZER, LABELS)
    exact = scorer(TEXTS)
    with caplog.at_level("INFO", logger="ia3"), torch.autocast("cpu", torch.bfloat16):
        found = [scorer(TEXTS) for _ in range(2)]
        shared = scorer.choices.expand(len(TEXTS), -1, -1)
        batch = TOKENIZER(TEXTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            own = scorer.scores(choice_log_probabilities(model, shared, **batch))
    torch.testing.assert_close(found[1], own, rtol=0, atol=1e-2)
    assert torch.equal(*found)
    assert (own - exact).abs().max() > 2e-4
    assert (found[1] - exact).abs().max() > 2e-4
    assert caplog.text.count("the model's own forward, since autocast is on") == 1
    torch.testing.assert_close(scorer(TEXTS), exact)


@pytest.mark.parametrize("part", ["", "encoder", "decoder.block.1.layer.0.dropout"])
def test_what_is_put_to_train_between_batches_drops_nothing(model: Any, part: str) -> None:
    scorer = LabelScorer(model, TOKENIZER, LABELS)
    before = scorer(TEXTS)
    model.get_base_model().get_submodule(part).train()
    assert torch.equal(scorer(TEXTS), before)


def test_a_module_that_was_replaced_drops_nothing(model: Any) -> None:
    block = model.get_base_model().decoder.block[1].layer[0]
    scorer, former = LabelScorer(model, TOKENIZER, LABELS), block.dropout
    before = scorer(TEXTS)
    block.dropout = torch.nn.Dropout(0.5)
    try:
        assert torch.equal(scorer(TEXTS), before)
    finally:
        block.dropout = former


@pytest.fixture
def many(tmp_path: Path) -> Any:
    """A base with a table of adapters: all of these of an encoder and a decoder, these of the decoder alone."""
    model = tiny_seq2seq.base().double().eval()
    for name, towers in {"a": None, "b": None, "c": "decoder", "d": "decoder", "e": "decoder"}.items():
        config = IA3Config(task_type="SEQ_2_SEQ_LM", towers=towers)
        model = get_peft_model(model, config)
        builders.randomise(model, spread=2.0, seed=ord(name))
        model.save_pretrained(tmp_path / name)
        model = model.unload()
    table = AdapterTable(model, capacity=8)
    for name in "abcde":
        table.register(name, tmp_path / name)
    return model


def each_alone(model: Any, texts: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """By the model's own forward, one text under one adapter at a time."""
    tokens = pad_choices(tokenise_labels(LABELS, TOKENIZER))
    found = []
    for text, name in zip(texts, names, strict=True):
        inputs = TOKENIZER(text, return_tensors="pt")
        with torch.no_grad(), acting(gather_rows(model, [name])):
            own = choice_log_probabilities(
                model, tokens[None], input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
        found.append(choice_scores(own, tokens[None]))
    return torch.cat(found)


WAYS = pytest.mark.parametrize("reason", [None, "only the model's own forward"], ids=["by the block", "by the model"])


@WAYS
@pytest.mark.parametrize("batch_size", [3, 32])
def test_a_mixed_batch_is_scored_as_each_text_alone(many: Any, monkeypatch: Any, reason: Any, batch_size: int) -> None:
    monkeypatch.setattr("ia3.fast.scores.unsupported_reason", lambda model, layout: reason)
    names = ["a", "c", BASE, "b", "d", "a", "e"]
    scorer = LabelScorer(many, TOKENIZER, LABELS, batch_size=batch_size)
    found = scorer(TEXTS, adapter_names=names)
    torch.testing.assert_close(found, each_alone(many, TEXTS, names), rtol=0, atol=1e-10)
    assert (scorer.fused is None, scorer.difference) == (reason is not None, None)


@WAYS
@pytest.mark.parametrize("recorded", [False, True])
def test_one_text_under_many_adapters_is_encoded_once(many: Any, monkeypatch: Any, reason: Any, recorded: bool) -> None:
    """For those that encode it alike: the base and the decoder's; each of the others encodes for itself."""
    monkeypatch.setattr("ia3.fast.scores.unsupported_reason", lambda model, layout: reason)
    texts = [TEXTS[0]] * 7 + [TEXTS[1]] * 4
    names = ["c", "d", "a", BASE, "e", "c", "a", BASE, "c", "d", "e"]
    expected = each_alone(many, texts, names)
    counts = inputs_read(many, monkeypatch)
    with recording() if recorded and reason is None else nullcontext():
        scorer = LabelScorer(many, TOKENIZER, LABELS, batch_size=3)
        for _ in range(2):
            beats: list[int] = []
            counts.clear()
            torch.testing.assert_close(scorer(texts, beats.append, names), expected, rtol=0, atol=1e-10)
            assert beats == [4, 7]  # as many as the table has room for
    if not recorded:
        assert counts == [1, 2]
    assert (scorer.fused is None, scorer.difference) == (reason is not None, None)


def test_modules_of_the_encoder_that_are_trained_in_full_encode() -> None:
    config = {"target_modules": r"decoder\..*\.(k|v)", "feedforward_modules": []}
    model = get_peft_model(tiny_seq2seq.base(), IA3Config(task_type="SEQ_2_SEQ_LM", **config), adapter_name="a")
    own = ["encoder.final_layer_norm"]
    for name in "bc":
        model.add_adapter(name, IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=own, **config))
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if f"modules_to_save.{name}" in path:
                    weight.mul_(2 + ord(name) % 5)
    texts, names = [TEXTS[0]] * 6, ["b", "c", "b", "c", "b", "c"]
    found = LabelScorer(model, TOKENIZER, LABELS)(texts, adapter_names=names)
    torch.testing.assert_close(found, each_alone(model, texts, names).double(), rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_scorer_follows_a_table_that_grows(many: Any, tmp_path: Path) -> None:
    """By sites of the encoder, which the first adapters don't have, and by another content under a name."""
    table = attached(many).table
    assert isinstance(table, AdapterTable)
    table.close()
    table = AdapterTable(many)
    table.register("c", tmp_path / "c")
    scorer, names = LabelScorer(many, TOKENIZER, LABELS), ["c", BASE] * 3 + ["c"]
    torch.testing.assert_close(scorer(TEXTS, adapter_names=names), each_alone(many, TEXTS, names), rtol=0, atol=1e-10)
    table.register("a", tmp_path / "a")
    for content in ("d", "b"):
        table.register("c", tmp_path / content)
        names = ["c", "a", BASE, "c", "a", "c", "c"]
        found = scorer([TEXTS[0]] * 7, adapter_names=names)
        torch.testing.assert_close(found, each_alone(many, [TEXTS[0]] * 7, names), rtol=0, atol=1e-10)
    assert scorer.fused is not None
    assert scorer.difference is None


def test_more_adapters_than_a_table_has_room_for(many: Any) -> None:
    table = attached(many).table
    assert table is not None
    table.capacity = 3
    names = ["c", "d", "e", "a", "b", BASE]
    found = LabelScorer(many, TOKENIZER, LABELS, batch_size=2)([TEXTS[0]] * 6, adapter_names=names)
    torch.testing.assert_close(found, each_alone(many, [TEXTS[0]] * 6, names), rtol=0, atol=1e-10)


def inputs_read(model: Any, monkeypatch: Any) -> list[int]:
    """How many inputs each run of the encoder reads, by whichever way."""
    counts: list[int] = []
    read = FusedLoss.read_source

    def reading(self: Any, run: Any, packed: Any, source: Any) -> Any:
        counts.append(source.examples)
        return read(self, run, packed, source)

    monkeypatch.setattr(FusedLoss, "read_source", reading)
    model.get_encoder().register_forward_hook(lambda module, args, output: counts.append(len(output.last_hidden_state)))
    return counts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recorded_scores_look_at_nothing_on_the_host(implementation: str) -> None:
    model = tiny_seq2seq.adapted().eval()
    model.set_attn_implementation(implementation)
    model.to("meta")
    batch = {name: torch.ones(3, 16, dtype=torch.long, device="meta") for name in ("input_ids", "attention_mask")}
    choices = pad_choices([[5, 1], [4, 3, 1]]).to("meta")
    with torch.inference_mode():
        assert _under_masks(model, choices, **batch).shape == (3, 2, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_captured_scores(model: Any) -> None:
    plain = score_labels(model, TOKENIZER, TEXTS, LABELS, batch_size=3)
    try:
        scorer = LabelScorer(model.cuda(), TOKENIZER, LABELS, batch_size=3)
        assert (scorer.path, scorer.reason) == ("captured", None)
        for _ in range(3):
            torch.testing.assert_close(scorer(TEXTS), plain, rtol=0, atol=1e-5)
    finally:
        model.cpu()


def test_on_a_cpu_nothing_is_recorded(model: Any) -> None:
    scorer = LabelScorer(model, TOKENIZER, LABELS)
    assert (scorer.path, scorer.reason) == ("eager", "there is no GPU")


def test_models_whose_positions_are_no_distances(tiny: Any) -> None:
    """A BART's choices stand in rows of their own."""
    model = tiny("bart", vocab_size=20, pad_token_id=0, eos_token_id=1, decoder_start_token_id=1).double()
    scores = score_labels(model, TOKENIZER, TEXTS, LABELS, batch_size=3)
    expected = [[alone(model, text, label) for label in LABELS] for text in TEXTS]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_long_texts_are_cut(model: Any) -> None:
    cut = score_labels(model, TOKENIZER, ["the share of a company falls"], LABELS, max_length=4)
    torch.testing.assert_close(cut, score_labels(model, TOKENIZER, ["the share of"], LABELS))


def test_no_texts(model: Any) -> None:
    assert rank(model, TOKENIZER, [], LABELS) == []
    assert score_labels(model, TOKENIZER, [], LABELS).shape == (0, len(LABELS))


@pytest.mark.parametrize("labels", [[], ["neutral"]])
def test_too_few_labels_are_refused(model: Any, labels: list[str]) -> None:
    with pytest.raises(ValueError, match="at least two to choose from"):
        rank(model, TOKENIZER, TEXTS, labels)


@pytest.mark.parametrize("labels", [["neutral", "neutral"], ["neutral", "red", "blue"]])
def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused(model: Any, labels: list[str]) -> None:
    with pytest.raises(ValueError, match=f"The labels '{labels[-2]}' and '{labels[-1]}' are the same"):
        rank(model, TOKENIZER, TEXTS, labels)

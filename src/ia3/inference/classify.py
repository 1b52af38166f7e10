"""Classes of texts and of their words, chosen by a head instead of written by the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from ia3.auto import name_padding, without_the_loading_report
from ia3.bundled import resolve_model
from ia3.errors import listed, tokenizer_named
from ia3.heads import head_parts
from ia3.inference.predict import Beat, most_positions, pad_rows, sorted_batches, tokenise_inputs
from ia3.inference.rank import Ranking, likeliest, rankings
from ia3.inference.tokens import TokenRows
from ia3.pretrained import load_pretrained
from ia3.tasks.task import TaskKind

_logger = logging.getLogger(__name__)

_AUTO_CLASSES: dict[TaskKind, Any] = {
    TaskKind.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    TaskKind.TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
}


@dataclass(frozen=True)
class Tagged:
    """A word of a text, its likeliest tag and that tag's probability; None of both where no token was read for it."""

    word: str
    tag: str | None
    probability: float | None


@dataclass(frozen=True)
class SplitText:
    """The tokens of a text that came in words.

    Args:
        input_ids: the tokens, cut at the longest length allowed, special ones included.
        starts: the position of each word's first token, by the word's index; a word without one is not there.
    """

    input_ids: list[int]
    starts: dict[int, int]


def load_classifier(
    model_name: str,
    kind: TaskKind,
    labels: Sequence[str],
    dtype: torch.dtype | str = "auto",
    *,
    seed: int = 42,
    trust_remote_code: bool = False,
) -> Any:
    """Load a base model with a head for these labels.

    What the checkpoint lacks of the head, or has in another size, is drawn anew; train it in full, see `head_modules`.

    Args:
        model_name: a hub name, a directory or a `bundled:` name.
        kind: classes of texts or of their words.
        labels: the classes in the order of the head's outputs.
        dtype: its numbers' type; `"auto"` is the saved one.
        seed: decides the new head, whatever was drawn before.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model in evaluation mode, the labels in its configuration.

    Raises:
        OSError: there is no such model, or the hub cannot be reached.
        ValueError: fewer than two labels or one twice; a model that transformers has no such head for; weights
            that lack more than the head.
    """
    _check_labels(labels)
    folder = resolve_model(model_name)
    config = load_pretrained(AutoConfig, folder, trust_remote_code=trust_remote_code)
    auto_class = _auto_class(kind, config, model_name)
    known = tuple(config.id2label[index] for index in sorted(config.id2label))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if kind is TaskKind.SEQUENCE_CLASSIFICATION:
        config.problem_type = "single_label_classification"
    name_padding(config)
    with without_the_loading_report(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, loading = load_pretrained(
            auto_class,
            folder,
            trust_remote_code=trust_remote_code,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.name_or_path = model.config.name_or_path = model_name
    fresh = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    _expect_the_base(model, fresh, model_name)
    # transformers calls labels without names LABEL_0 and so on.
    if not fresh and known not in (tuple(labels), tuple(f"LABEL_{index}" for index in range(len(known)))):
        _logger.warning(
            "%s comes with a head for %s; its outputs now mean %s, in this order.", model_name, [*known], [*labels]
        )
    return model.eval()


def head_modules(model: nn.Module) -> list[str]:
    """The modules to train in full beside the vectors: name them in `IA3Config.modules_to_save`.

    These are the parts that the checkpoint lacked, the head, which is all that stands outside of the base, and a
    pooler that was never trained, since it shrinks what the head sees, so that low rates learn little. It shows in the
    biases: they are zeros, and any step would have moved one.

    Args:
        model: as `load_classifier` gives it, without an adapter.
    """
    poolers = [path for path, module in model.named_modules() if path.endswith(".pooler") and _is_untrained(module)]
    return sorted({*poolers, *head_parts(model)})


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 32,
    beat: Beat | None = None,
) -> list[Ranking]:
    """Choose a class for each text.

    Args:
        model: a model with a head for classes of texts, with or without an adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        texts: the texts.
        max_length: where longer texts are cut, in tokens.
        batch_size: texts a batch, sorted by length.
        beat: called after each batch with its number of texts.

    Returns:
        The likeliest label and the probabilities of all, one ranking a text, in the order of `texts`. The labels
        are those of the model's configuration.

    Raises:
        ValueError: a configuration without a padding token, a text without tokens, or one longer than the model's
            positions.
    """
    rows = tokenise_texts(texts, model, tokenizer, max_length)
    labels = class_labels(model)
    found: dict[int, Ranking] = {}
    for indices, logits in batched_logits(model, rows, batch_size, beat):
        found |= zip(indices, rankings(labels, logits), strict=True)
    return [found[index] for index in range(len(rows))]


def tag(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Sequence[str]],
    *,
    max_length: int = 128,
    batch_size: int = 32,
    beat: Beat | None = None,
) -> list[list[Tagged]]:
    """Choose a tag for each word of each text, by the word's first token.

    The arguments are those of `classify`, but for a head for classes of words, a fast tokenizer, and texts that come
    as words. Words beyond `max_length` get no tag, and a warning counts them.

    Returns:
        One list a text, one `Tagged` a word, in their order.

    Raises:
        ValueError: a tokenizer that can't tell words apart, or what `classify` raises.
    """
    rows = split_words(texts, model, tokenizer, max_length)
    labels = class_labels(model)
    answers = [[Tagged(word, None, None) for word in words] for words in texts]
    for indices, logits in batched_logits(model, [row.input_ids for row in rows], batch_size, beat):
        for index, own in zip(indices, logits, strict=True):
            at_words = own[list(rows[index].starts.values())]
            best, shares = likeliest(at_words), at_words.softmax(dim=-1).tolist()
            for place, choice, row in zip(rows[index].starts, best, shares, strict=True):
                answers[index][place] = Tagged(texts[index][place], labels[choice], row[choice])
    return answers


def batched_logits(
    model: Any, rows: Sequence[Sequence[int]], batch_size: int, beat: Beat | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """What the head answers, batch by batch from the longest row to the shortest, in training's evaluations and after.

    Args:
        model: left in evaluation mode.
        rows: token ids.
        batch_size: rows a batch.
        beat: called after each batch with its number of rows.

    Yields:
        The rows' indices, and logits `[rows, classes]` or `[rows, length, classes]` on the CPU in float64.
    """
    model.eval()
    for indices in sorted_batches([len(row) for row in rows], batch_size):
        batch = pad_rows([rows[i] for i in indices], padding_token(model))
        with torch.inference_mode():
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        yield indices, logits.cpu().double()
        if beat is not None:
            beat(len(indices))


def padding_token(model: Any) -> int:
    """What to pad with: the token by which the model tells padding, which is the configuration's.

    A causal model's head reads the last token that is another, and RoBERTa counts positions without it.

    Raises:
        ValueError: the configuration names none.
    """
    token: int | None = model.config.get_text_config().pad_token_id
    if token is None:
        raise ValueError(
            f"The configuration of this {type(model).__name__} names no padding token, so its head can't find where "
            "a text of a batch ends: set model.config.pad_token_id = tokenizer.pad_token_id, or to the end token's."
        )
    return token


def class_labels(model: Any) -> tuple[str, ...]:
    """The labels of a model's head in the order of its outputs."""
    return tuple(model.config.id2label[index] for index in range(model.config.num_labels))


def tokenise_texts(texts: Sequence[str], model: Any, tokenizer: Any, max_length: int) -> TokenRows:
    """The tokens of each text, cut at `max_length`.

    Raises:
        ValueError: a text without tokens, or one longer than the model's positions.
    """
    rows = tokenise_inputs(tokenizer, texts, max_length)
    _check_lengths(rows, texts, model, tokenizer)
    return rows


def split_words(texts: Sequence[Sequence[str]], model: Any, tokenizer: Any, max_length: int) -> list[SplitText]:
    """The tokens of texts that come in words, cut at `max_length`; a warning counts the words without a token.

    Raises:
        ValueError: a tokenizer that can't tell words apart, a text without tokens, or one longer than the model's
            positions.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} can't say which word a token belongs to: load the model's fast tokenizer."
        )
    if not texts:
        return []
    # RoBERTa's and GPT-2's tokenizers read a word with the blank before it, and words one by one as run together.
    together = tokenizer("a a", add_special_tokens=False)["input_ids"]
    apart = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    blank = " " if together != apart else ""
    spaced = [[*words[:1], *(blank + word for word in words[1:])] for words in texts]
    encoded = tokenizer(spaced, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = [SplitText(ids, _starts(encoded.word_ids(index))) for index, ids in enumerate(encoded["input_ids"])]
    _check_lengths([row.input_ids for row in rows], [" ".join(words) for words in texts], model, tokenizer)
    count = sum(len(words) for words in texts)
    unread = count - sum(len(row.starts) for row in rows)
    if unread:
        said = "%d of %d words have no token within the first %d, so they get no tag: raise max_length."
        _logger.warning(said, unread, count, max_length)
    return rows


def _starts(word_ids: Iterable[int | None]) -> dict[int, int]:
    starts: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            starts.setdefault(word, position)
    return starts


def _check_labels(labels: Sequence[str]) -> None:
    if len({*labels}) < max(len(labels), 2):
        raise ValueError(f"The labels are [{listed(labels)}]: expected at least two to choose from, each once.")


def _auto_class(kind: TaskKind, config: Any, model_name: str) -> Any:
    if kind not in _AUTO_CLASSES:
        raise ValueError(f"A task of the type {kind.value!r} has no head: expected {[k.value for k in _AUTO_CLASSES]}.")
    auto_class = _AUTO_CLASSES[kind]
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"{model_name} is a {config.model_type} model, which transformers has no head for {kind.value} for "
            f"({auto_class.__name__}): choose another base model, such as a BERT."
        )
    return auto_class


def _expect_the_base(model: nn.Module, fresh: Iterable[str], model_name: str) -> None:
    """Raise where a weight is new that belongs to no head and no pooler."""
    base = f"{model.base_model_prefix}."
    foreign = sorted(key for key in fresh if key.startswith(base) and ".pooler." not in key)
    if foreign:
        raise ValueError(
            f"The weights of the base model {model_name!r} lack {len(foreign)} tensors besides the head, or have them "
            f"in another size (such as {foreign[0]}): copy or download it again, or name another base model."
        )


def _is_untrained(pooler: nn.Module) -> bool:
    biases = [value for name, value in pooler.named_parameters() if name.rpartition(".")[2] == "bias"]
    return bool(biases) and not any(bool(bias.any()) for bias in biases)


def _check_lengths(rows: Sequence[Sequence[int]], texts: Sequence[str], model: Any, tokenizer: Any) -> None:
    limit = min(tokenizer.model_max_length, most_positions(model) or tokenizer.model_max_length)
    for row, text in zip(rows, texts, strict=True):
        if not row:
            raise ValueError(f"The {tokenizer_named(tokenizer)} makes no token of the text {text[:60]!r}: remove it.")
        if len(row) > limit:
            raise ValueError(
                f"A text has {len(row)} tokens ({text[:60]!r}), and the model has {limit} positions: cut at "
                f"max_length {limit} or less."
            )

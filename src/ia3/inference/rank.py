"""Rank classification: the label word that the model finds likeliest, instead of one that it generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from ia3.errors import listed, shorten, tokenizer_named
from ia3.fast import scores as fused
from ia3.fast.cache import additive_mask, fill_up
from ia3.fast.capture import GraphedCallable
from ia3.fast.generate import capture_unsupported_reason
from ia3.fast.guard import Guard
from ia3.fast.sessions import BUCKET, over
from ia3.fast.surroundings import SayOnce, unusual_surroundings
from ia3.inference.predict import Beat, names_of, pad_rows, sorted_batches, tokenise_inputs
from ia3.inference.tokens import TokenRows
from ia3.mixing import acting_flat, gather_rows, own_sites
from ia3.rows import BASE, Rows, acting, acting_here
from ia3.sites import Layout, Site, logger
from ia3.state import attached, find_attached
from ia3.tasks.losses import choice_log_probabilities, choice_scores, hides_choices, pad_choices

# Logits that are held at once: with many labels, batches are smaller.
_MOST_LOGITS = 2**28
# So many rows of one text share a batch, where no table says how many vectors it has room for.
_MOST_ADAPTERS = 256
# Batches that are under way before the scores of the first are looked at.
_AHEAD = 8


@dataclass(frozen=True)
class Ranking:
    """The likeliest label of a text, and the probability of each label among all of them."""

    label: str
    probabilities: dict[str, float]


def rank(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    length_normalised: bool = True,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[Ranking]:
    """Choose a label for each text by its probability, so that the answer is always one of the labels.

    The probabilities are the softmax of the scores over the labels (Liu et al. 2022, sections 3.2 and 3.4);
    of equal ones the first label wins. The arguments are those of `LabelScorer`.

    Returns:
        One ranking a text, in the order of `texts`.

    Raises:
        ValueError: what `LabelScorer` raises.
    """
    how: dict[str, Any] = {"length_normalised": length_normalised, "max_length": max_length, "batch_size": batch_size}
    return rankings(labels, LabelScorer(model, tokenizer, labels, **how)(texts))


def rankings(labels: Sequence[str], scores: Tensor) -> list[Ranking]:
    """The likeliest label of each row of scores `[texts, labels]`, with all probabilities."""
    shares = scores.softmax(dim=-1).tolist()
    return [
        Ranking(labels[best], dict(zip(labels, row, strict=True)))
        for best, row in zip(likeliest(scores), shares, strict=True)
    ]


def likeliest(scores: Tensor) -> list[int]:
    """The place of the highest score of each row of `[rows, labels]`, of equal ones the first; every task's rule."""
    return [max(range(len(row)), key=row.__getitem__) for row in scores.tolist()]


class LabelScorer:
    """The log-probability of each label after each text; on a GPU recorded once a length of texts and replayed.

    All that ranks labels scores them here: evaluations in training and in sweeps, `rank`, and the commands. Equal texts
    under adapters without vectors in the encoder are encoded once.

    Args:
        model: a seq2seq model, with or without an adapter; left in evaluation mode.
        tokenizer: the base model's tokenizer.
        labels: the label words.
        length_normalised: the mean over a label's tokens; False takes their sum, which favours short labels.
        max_length: where longer inputs are cut, in tokens. Labels are never cut.
        batch_size: sentences a batch, sorted by length; fewer where there are many labels. The encoder runs once a
            sentence, the decoder on all labels of each.

    Raises:
        ValueError: fewer than two labels, or labels that the tokenizer can't tell apart.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        length_normalised: bool = True,
        max_length: int = 128,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.max_length, self.labels = model.eval(), tokenizer, max_length, labels
        self.tokens = pad_choices(tokenise_labels(labels, tokenizer))
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
        self.most_answers = max(1, _MOST_LOGITS // (self.tokens.numel() * vocabulary))
        self.batch_size = min(batch_size, self.most_answers)
        self.length_normalised, self.rows = length_normalised, 0
        self.say = SayOnce("Labels are scored by the model's own forward")
        self._record_anew()

    def _record_anew(self) -> None:
        """Forget what was made of a model that has changed."""
        self.choices, self.reason = self.tokens.to(self.model.device), _why_not(self.model)
        self.path = "captured" if self.reason is None else "eager"
        self.fused: fused.ChoiceScores | None = None
        self.difference: str | None = None
        self.reasons: dict[Layout, str | None] = {}
        # By the identity of sites that are held here: to hash hundreds of them for each text takes longer than a batch.
        self.sites_that_write: dict[int, tuple[tuple[Site, ...], bool]] = {}
        self._watch(Guard(self.model))

    def _watch(self, guard: Guard) -> None:
        score = partial(_under_masks, self.model, self.choices)
        self.guard, self.captured = guard, GraphedCallable(score, self.model.device)

    def __call__(
        self, texts: Sequence[str], beat: Beat | None = None, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        """Scores `[texts, labels]` on the CPU in float64, in the order of `texts`.

        Args:
            texts: the texts.
            beat: called with a number of texts once that many more are scored.
            adapter_names: the adapter of each text, attached or in the model's table; the active ones where left out.

        Raises:
            ValueError: a model without encoder and decoder.
        """
        rows = tokenise_inputs(self.tokenizer, texts, self.max_length)
        scores = torch.empty(len(rows), len(self.labels), dtype=torch.float64)
        batches = list(self._batches(rows, adapter_names))
        for start in range(0, len(batches), _AHEAD):
            ahead = batches[start : start + _AHEAD]
            # Nothing is looked at before all of it is under way.
            found = [self._mixed(rows, adapter_names, indices) for indices in ahead]
            for indices, part in zip(ahead, found, strict=True):
                scores[indices] = self.scores(part)
                if beat is not None:
                    beat(len(indices))
        return scores

    def _batches(self, rows: TokenRows, adapter_names: Sequence[str] | None) -> Iterator[list[int]]:
        """Indices from the longest text to the shortest; a batch has more of them where many read one input."""
        if adapter_names is None:
            yield from sorted_batches(rows.lengths, self.batch_size)
            return
        sites = own_sites(self.model, set(adapter_names))
        encoding = {name: self._encodes_as(name, own) for name, own in sites.items()}
        inputs: dict[tuple[Any, ...], list[int]] = {}
        for place, name in enumerate(adapter_names):
            inputs.setdefault((encoding[name], *rows[place]), []).append(place)
        table = attached(self.model).table
        room = _MOST_ADAPTERS if table is None else table.capacity
        most = min(self.most_answers, max(self.batch_size, room))
        batch: list[int] = []
        count = 0
        for places in sorted(inputs.values(), key=lambda places: -rows.lengths[places[0]]):
            for start in range(0, len(places), most):
                part = places[start : start + most]
                if batch and (count == self.batch_size or len(batch) + len(part) > most):
                    yield batch
                    batch, count = [], 0
                batch, count = [*batch, *part], count + 1
        if batch:
            yield batch

    def _encodes_as(self, name: str, own: tuple[Site, ...]) -> str:
        """The name of an adapter that encodes as this one does: the base's, where only the decoder has vectors."""
        state = find_attached(self.model)
        adapter = None if state is None else state.adapters.get(name)
        if adapter is not None and adapter.saved:  # which may be modules of the encoder
            return name
        if id(own) not in self.sites_that_write:
            self.sites_that_write[id(own)] = own, decode_alone(self.model, own)
        return BASE if self.sites_that_write[id(own)][1] else name

    def _mixed(self, rows: Sequence[list[int]], adapter_names: Sequence[str] | None, indices: list[int]) -> Tensor:
        """`log_probabilities` of one batch, each row under its own adapter where they are named."""
        names = names_of(adapter_names, indices)
        with nullcontext() if names is None else acting(gather_rows(self.model, names)):
            return self.log_probabilities([rows[i] for i in indices])

    @torch.inference_mode()
    def log_probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Those of each token of each label after each row of `tokenise_inputs`, one batch.

        Rows of vectors that act in this thread, one a row, are heard.

        Returns:
            `[rows, labels, length]` on the model's device, 0 behind a label's end.
        """
        is_valid = self.guard.is_valid()
        # Telling a thousand modules what they know would take long each time.
        if not is_valid or self.model.training or not self.guard.in_one_mode:
            self.model.eval()
        if not is_valid:
            self._record_anew()
        mixed = acting_here()
        inputs = self._inputs(rows, mixed)
        around = unusual_surroundings(self.model)
        if around is not None:
            self.say(around)
            return self._by_the_model(inputs, mixed)
        if mixed is not None or self.reason is None:
            found = self._by_the_block(inputs, mixed)
            if found is not None:
                return found
        if mixed is None and self.reason is None:
            return self._filled_up(rows)
        return self._by_the_model(inputs, mixed)

    def scores(self, log_probabilities: Tensor) -> Tensor:
        """One score a label of what `log_probabilities` gives: `[rows, labels]` on the CPU, summed in float64."""
        found = log_probabilities.cpu().double()
        shared = self.tokens.expand(len(found), -1, -1)
        return choice_scores(found, shared, length_normalised=self.length_normalised)

    def _inputs(self, rows: Sequence[Sequence[int]], mixed: Rows | None) -> Shared:
        """What is encoded: each text once for the adapters that encode it alike."""
        if not self.model.config.is_encoder_decoder:  # which is refused where its encoder is looked for
            return Shared(rows)
        if mixed is None or mixed.flat is None:
            return Shared.of(rows, None if mixed is None else mixed.names)
        own = zip(mixed.names, mixed.flat.own, strict=True)
        return Shared.of(rows, [self._encodes_as(name, sites) for name, sites in own])

    # The ways

    def _by_the_block(self, inputs: Shared, mixed: Rows | None) -> Tensor | None:
        """By the fused forward, under any vectors that it can have; None where it can't."""
        if mixed is None:
            found = acting_flat(self.model)
        else:
            found = None if mixed.flat is None else (mixed.flat.layout, mixed.flat.vectors)
        scores = None if found is None else self._scores_over(found[0])
        if found is None or scores is None:
            return None
        flat = over(scores.layout, *found)
        if len(flat) > 1 and inputs.order is not None:
            flat = flat[inputs.order]
        batch = pad_rows(inputs.rows, self.tokenizer.pad_token_id)
        self.difference = scores.difference(**batch, flat=flat, readers=inputs.readers)
        if self.difference is not None:
            logger.warning("Labels are scored by the model's own forward from now on: %s.", self.difference)
            return None
        answers = scores(**batch, flat=flat, readers=inputs.readers)
        return answers if inputs.order is None else answers[inputs.places]

    def _scores_over(self, layout: Layout) -> fused.ChoiceScores | None:
        """The fused forward with vectors at these sites, and at those of former batches; None where there is none."""
        if self.difference is not None:
            return None
        former = Layout(()) if self.fused is None else self.fused.layout
        if self.fused is not None and (layout == former or {*layout.sites} <= {*former.sites}):
            return self.fused
        for wanted in (Layout(tuple(dict.fromkeys((*layout.sites, *former.sites)))), layout):
            if wanted not in self.reasons:
                self.reasons[wanted] = fused.unsupported_reason(self.model, wanted)
            if self.reasons[wanted] is None:
                self.fused = fused.ChoiceScores(self.model, self.choices, wanted)
                self._watch(self.fused.guard)  # its weights were fused: what was recorded read them where they were
                return self.fused
        return None

    def _by_the_model(self, inputs: Shared, mixed: Rows | None) -> Tensor:
        """By its own forward; the encoder's once an input, which is then repeated for all that read it."""
        device, count = self.model.device, len(inputs.rows) if inputs.order is None else len(inputs.order)
        padded = pad_rows(inputs.rows, self.tokenizer.pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in padded.items()}
        if inputs.order is not None:
            with nullcontext() if mixed is None else acting(mixed.chosen(inputs.first)):
                encoded = self.model.get_encoder()(**batch).last_hidden_state
            batch = {"encoded": encoded, "attention_mask": batch["attention_mask"]}
            batch = {name: tensor[inputs.input_of] for name, tensor in batch.items()}
        return choice_log_probabilities(self.model, self.choices.expand(count, -1, -1), **batch)

    def _filled_up(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Of a batch that is filled up to one of few shapes."""
        self.rows = max(self.rows, len(rows))
        batch = pad_rows(rows, self.tokenizer.pad_token_id, BUCKET)
        found: Tensor = self.captured(**{name: fill_up(tensor, self.rows) for name, tensor in batch.items()})
        return found[: len(rows)].clone()


@dataclass(frozen=True)
class Shared:
    """The inputs of a batch, each once, where that makes at least half as many of them.

    Args:
        rows: the inputs' tokens.
        order: the batch's rows, those of one input next to each other; None where each row has an input of its own.
        readers: how many rows each input has; None likewise.
    """

    rows: Sequence[Sequence[int]]
    order: list[int] | None = None
    readers: list[int] | None = None

    @staticmethod
    def of(rows: Sequence[Sequence[int]], encodings: Sequence[str] | None) -> Shared:
        """Of a batch's rows, and for each what tells its vectors in the encoder apart; None where all have the same."""
        same: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(rows):
            same.setdefault((None if encodings is None else encodings[place], *row), []).append(place)
        if 2 * len(same) > len(rows):
            return Shared(rows)
        places = list(same.values())
        return Shared([rows[each[0]] for each in places], [*chain.from_iterable(places)], [*map(len, places)])

    @property
    def first(self) -> list[int]:
        """A row of each input."""
        assert self.order is not None
        assert self.readers is not None
        return [self.order[before] for before in accumulate(self.readers[:-1], initial=0)]

    @property
    def places(self) -> list[int]:
        """Where each row is in the order."""
        assert self.order is not None
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    @property
    def input_of(self) -> list[int]:
        """The input of each row."""
        assert self.readers is not None
        ordered = [number for number, count in enumerate(self.readers) for _ in range(count)]
        return [ordered[place] for place in self.places]


def decode_alone(model: Any, sites: Sequence[Site]) -> bool:
    """Whether vectors at these sites act in the decoder alone."""
    of_encoder = {id(module) for module in model.get_encoder().modules()}
    of_decoder = {id(module) for module in model.get_decoder().modules()} - of_encoder
    return all(id(model.get_submodule(site.path)) in of_decoder for site in sites)


def _why_not(model: Any) -> str | None:
    """Why the scores can't be recorded; None where they can."""
    if model.device.type != "cuda":
        return "there is no GPU"
    if not hides_choices(model):
        return f"it is written for T5 and mT5, and this is a {type(model).__name__}"
    return capture_unsupported_reason(model)


def _under_masks(model: Any, choices: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Those of all choices `[choices, length]` after each row; the model looks at no mask's values on the host."""
    mask = additive_mask(attention_mask[:, None, None] != 0, model.dtype)
    shared = choices.expand(len(input_ids), -1, -1)
    return choice_log_probabilities(model, shared, input_ids=input_ids, attention_mask=mask)


def tokenise_labels(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each label, its end token included.

    Raises:
        ValueError: fewer than two labels, or labels that the tokenizer can't tell apart.
    """
    if len(labels) < 2:
        raise ValueError(f"The labels are [{listed(labels)}]: expected at least two to choose from.")
    tokens: list[list[int]] = tokenizer(text_target=list(labels))["input_ids"]
    known: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, tokens, strict=True):
        if tuple(ids) in known:
            raise ValueError(
                f"The labels {shorten(known[tuple(ids)])} and {shorten(label)} are the same to the "
                f"{tokenizer_named(tokenizer)}, so their scores would be too: leave out repeated labels, or choose "
                "words that it knows."
            )
        known[tuple(ids)] = label
    return tokens

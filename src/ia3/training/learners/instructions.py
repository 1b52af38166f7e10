"""What a causal model learns to write: the answers in conversations, or texts; one or several of them a row."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ia3.fast.generate import Generate
from ia3.fast.ragged import IGNORE_INDEX
from ia3.inference.complete import (
    check_positions,
    compile_answers,
    cut_prompt,
    encode,
    end_tokens,
    has_template,
    messages,
    prompt_batches,
    prompt_text,
    render,
    without_template,
    write,
)
from ia3.inference.predict import pad_rows
from ia3.inference.processes import ALONE, Processes
from ia3.tasks.examples import Example
from ia3.tasks.losses import token_log_probabilities
from ia3.training.learner import Answered, EvalOutput, Writer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialogue:
    """One conversation as tokens, or a part of one.

    Args:
        ids: what is read in training, cut so that it fits into the task's length.
        labels: the tokens that are learned, in their places: of answers, end tokens included; -100 elsewhere.
        place: which of the examples this is.
        cut: whether its beginning was cut for training.
        asked: what is answered in evaluation: the last prompt as `complete` makes it, whatever its right answer; none
            where nothing is asked.
        text: the user's message there.
        label: the right answer to it.
    """

    ids: list[int]
    labels: list[int]
    place: int
    cut: bool = False
    asked: Sequence[int] = ()
    text: str = ""
    label: str = ""

    def __len__(self) -> int:
        return len(self.ids)


# One dialogue, or with packing as many as fit.
Row = tuple[Dialogue, ...]


def count_cut(rows: Sequence[Row]) -> int:
    """How many conversations were longer than the task's length, so that their prompts were cut."""
    return sum(dialogue.cut for row in rows for dialogue in row)


@dataclass(frozen=True)
class Instructions(Writer[Row]):
    """The assistant's answers in conversations; the loss is that of their tokens alone."""

    @property
    def is_the_models_loss(self) -> bool:
        """Of one dialogue a row: packed ones come with masks or positions of their own."""
        return not self.settings.packing

    def tokenise(self, examples: Sequence[Example]) -> list[Row]:
        """Conversations by the chat template, or prompts and answers plain where the tokenizer has none.

        Prompts are cut as `ia3.inference.complete` does it; answers never are. A conversation becomes several rows
        where it is too long for one, and where the template writes earlier answers in another way than it asks for
        them; a warning counts these.

        Raises:
            ValueError: an answer longer than the task's length or changed by the chat template, a template
                that refuses the messages, or, with packing, a model whose rows would read each other.
        """
        dialogues = list(self._dialogues(examples))
        check_positions(self.model, max(map(len, dialogues), default=0))
        if not self.settings.packing:
            return [(dialogue,) for dialogue in dialogues]
        _ = self._separation  # refuses a model now, not at its first step
        return [
            tuple(dialogues[place] for place in places)
            for places in pack([len(dialogue) for dialogue in dialogues], self.task.max_length)
        ]

    def length(self, row: Row) -> int:
        """Of all that is read."""
        return sum(map(len, row))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids` and `labels` `[batch, length]`, -100 where nothing is learned, padded on the right.

        With packing, `position_ids` that count from 0 in each conversation; without, the `attention_mask`.
        """
        ids, labels = (
            [[token for dialogue in row for token in getattr(dialogue, name)] for row in rows]
            for name in ("ids", "labels")
        )
        pad = self.tokenizer.pad_token_id
        filler = end_tokens(self.model, self.tokenizer)[0] if pad is None else pad
        batch = pad_rows(ids, filler, self.settings.pad_to_multiple_of)
        batch["labels"] = pad_rows(labels, IGNORE_INDEX, self.settings.pad_to_multiple_of)["input_ids"]
        if self.settings.packing:
            length = batch.pop("attention_mask").shape[1]
            batch["position_ids"] = torch.tensor([_positions(row, length) for row in rows])
        return batch

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The tokens that are learned."""
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a learned token, in float32 where the model is of half precision."""
        losses, learned = self.token_losses(batch)
        return losses.sum() / learned.sum()

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """At the places where any row of the batch learns a token."""
        following = batch["labels"][:, 1:]
        places = (following != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
        following = following[:, places]
        return -token_log_probabilities(self._logits(places, batch), following), following != IGNORE_INDEX

    def measure(self, rows: Sequence[Row], beat: Callable[[int], None], processes: Processes = ALONE) -> EvalOutput:
        """The loss of all that is learned, and the last answers, written greedily, in the examples' order."""
        dialogues = sorted((dialogue for row in rows for dialogue in row), key=lambda dialogue: dialogue.place)
        per_row = len(rows) / len(dialogues)
        done = 0

        def beat_rows(count: int) -> None:
            nonlocal done
            former, done = done, done + count
            beat(round(done * per_row) - round(former * per_row))

        return super().measure([(dialogue,) for dialogue in dialogues], beat_rows, processes)

    def asked(self, row: Row) -> int:
        """Of the prompt as it is asked, or of all that is read where none is."""
        return len(row[0].asked or row[0])

    def batches(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """As `complete` makes them."""
        return prompt_batches(self.model, lengths, self._max_new_tokens, self.settings.evaluation_batch_size)

    @torch.inference_mode()
    def answer(self, rows: Sequence[Row]) -> list[Answered]:
        """Written greedily, as `complete` does."""
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collate(rows).items()}
        losses, learned = self.token_losses(batch)
        dialogues = [dialogue for (dialogue,) in rows]
        written: Iterator[str] = iter(())
        if prompts := [dialogue.asked for dialogue in dialogues if dialogue.asked]:
            check_positions(self.model, max(map(len, prompts)) + 1)
            written = iter(write(self.model, self.tokenizer, prompts, self._max_new_tokens, self._generate))
        figures = zip(dialogues, losses.double().sum(1).tolist(), learned.sum(1).tolist(), strict=True)
        return [
            Answered(each.text, each.label, next(written), *of_all) if each.asked else Answered("", None, "", *of_all)
            for each, *of_all in figures
        ]

    @property
    def _max_new_tokens(self) -> int:
        assert self.task.max_new_tokens is not None
        return self.task.max_new_tokens

    @cached_property
    def _generate(self) -> Generate:
        return compile_answers(self.model, self.tokenizer, self._max_new_tokens)

    def _logits(self, places: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The logits after the tokens at `places`, `[batch, places, vocabulary]`: the head runs there alone."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        if "position_ids" in inputs and self._separation == "mask":
            inputs["attention_mask"] = separating_mask(inputs["position_ids"], self.model.dtype)
        if "logits_to_keep" in signature(self.model.forward).parameters:
            kept: Tensor = self.model(**inputs, logits_to_keep=places, use_cache=False).logits
            return kept
        every: Tensor = self.model(**inputs, use_cache=False).logits
        return every[:, places]

    @cached_property
    def _separation(self) -> Separation:
        return find_separation(self.model)

    def _dialogues(self, examples: Sequence[Example]) -> Iterator[Dialogue]:
        learns_all = self.settings.train_on == "all"
        questions = [
            (place, each) for place, row in enumerate(examples) for each in (answers_of(row) if learns_all else [row])
        ]
        prompt_texts = [prompt_text(self.tokenizer, row.text, row.turns, self.task.system) for _, row in questions]
        whole_texts = [self._whole_text(row, prompt) for (_, row), prompt in zip(questions, prompt_texts, strict=True)]
        tails = [whole[len(prompt) :] for whole, prompt in zip(whole_texts, prompt_texts, strict=True)]
        prompts = encode(self.tokenizer, prompt_texts)
        completions = map(self._completion, prompts, encode(self.tokenizer, whole_texts), tails)
        split = 0
        for place, answered in groupby(zip(questions, prompts, completions, strict=True), key=lambda each: each[0][0]):
            found = list(self._joined(place, [(row, prompt, answer) for (_, row), prompt, answer in answered]))
            split += len(found) > 1
            yield from found
        if split:
            _logger.warning(
                "%d of %d conversations are learned in parts, an answer with all that stands before it in each: they "
                "are longer than %d tokens, or the chat template changes earlier answers.",
                split,
                len(examples),
                self.task.max_length,
            )

    def _whole_text(self, row: Example, prompt: str) -> str:
        """The prompt with its answer."""
        if not has_template(self.tokenizer):
            return prompt + row.label
        conversation = messages(row.text, row.turns, self.task.system)
        conversation.append({"role": "assistant", "content": row.label})
        whole = render(self.tokenizer, conversation, answering=False)
        _check_rendering(prompt, whole, row.label)
        return whole

    def _completion(self, prompt: list[int], whole: list[int], tail: str) -> list[int]:
        """The answer's tokens up to its end token, which is added where the template has none."""
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:  # a token reaches over the border, which it never does in generating
            completion = self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        ends = end_tokens(self.model, self.tokenizer)
        for place, token in enumerate(completion):
            # What some templates put behind, such as another end, would never be written.
            if token in ends and not self.tokenizer.decode(completion[place + 1 :], skip_special_tokens=True).strip():
                return completion[: place + 1]
        return [*completion, ends[0]]

    def _joined(self, place: int, answers: Sequence[tuple[Example, list[int], list[int]]]) -> Iterator[Dialogue]:
        """Answers with their prompts in one dialogue as long as each prompt begins with all before it, and it fits."""
        ids: list[int] = []
        labels: list[int] = []
        cut = False
        for row, prompt, completion in answers:
            if ids and (prompt[: len(ids)] != ids or len(prompt) + len(completion) > self.task.max_length):
                yield Dialogue(ids, labels, place, cut)
                ids, labels = [], []
            if not ids:
                if len(completion) >= self.task.max_length:
                    raise ValueError(
                        f"The completion {row.label[:60]!r} takes {len(completion)} tokens, its end token included, "
                        f"and the length is {self.task.max_length} with its prompt: completions are never cut. Raise "
                        "max_length, or shorten it."
                    )
                whole, prompt = prompt, self._cut_to(self.task.max_length - len(completion), prompt, row)
                cut = prompt is not whole
            labels = [*labels, *[IGNORE_INDEX] * (len(prompt) - len(ids)), *completion]
            ids = prompt + completion
        row, prompt, _ = answers[-1]
        asked = self._cut_to(self.task.max_length, prompt, row)
        yield Dialogue(ids, labels, place, cut, asked, row.text, row.label)

    def _cut_to(self, room: int, prompt: list[int], row: Example) -> list[int]:
        if len(prompt) <= room:
            return prompt
        return cut_prompt(self.tokenizer, row.text, row.turns, self.task.system, room=room)


def answers_of(row: Example) -> list[Example]:
    """Each answer to a user's message in a conversation, with what stands before it; the last is the example."""
    turns = [*row.turns, ("user", row.text), ("assistant", row.label)]
    return [
        Example(text, content, tuple(turns[:place]))
        for place, ((asking, text), (role, content)) in enumerate(pairwise(turns))
        if (asking, role) == ("user", "assistant")
    ]


@dataclass(frozen=True)
class Texts(Instructions):
    """Texts without answers: every token is learned that has one before it, the end token behind a text included."""

    def _dialogues(self, examples: Sequence[Example]) -> Iterator[Dialogue]:
        """Pieces of the task's length; each begins with the last token of the one before, so that none is lost."""
        step = self.task.max_length - 1
        if step < 1:
            raise ValueError(f"max_length is {self.task.max_length}: expected at least 2, a token and the next.")
        end = end_tokens(self.model, self.tokenizer)[0]
        texts = encode(without_template(self.tokenizer), [row.text for row in examples])
        for place, ids in enumerate(texts):
            whole = [*ids, end]
            for start in range(0, len(ids), step):
                piece = whole[start : start + step + 1]
                yield Dialogue(piece, [IGNORE_INDEX, *piece[1:]], place)


def _check_rendering(prompt: str, whole: str, label: str) -> None:
    """Raise where a chat template doesn't write the answer as it is, right behind the prompt."""
    remedy = "set another tokenizer.chat_template, or an empty one for plain text"
    if not whole.startswith(prompt):
        same = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
        raise ValueError(
            "The tokenizer's chat template writes a conversation differently once it is answered, so what is "
            f"trained would never be asked: {prompt[same : same + 40]!r} becomes {whole[same : same + 40]!r}. "
            f"{remedy.capitalize()}."
        )
    before, found, _ = whole[len(prompt) :].partition(label.strip())
    if not found:
        raise ValueError(
            f"The tokenizer's chat template changes or drops the answer {label[:60]!r}: it writes "
            f"{before[:60]!r}. Change the answer, or {remedy}."
        )
    if before.strip():
        raise ValueError(
            f"The tokenizer's chat template writes {before[:60]!r} before an answer, but doesn't when it asks for one, "
            f"so the model would write it into every answer: {remedy}."
        )


def _positions(row: Row, length: int) -> list[int]:
    """Each conversation counts from 0, and so does the padding, which makes it one more of them."""
    lengths = [*map(len, row), length - sum(map(len, row))]
    return [position for own in lengths for position in range(own)]


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put pieces into as few rows as best-fit decreasing finds: the longest first, each where it fits closest.

    Args:
        lengths: of the pieces, none above `room`.
        room: of a row.

    Returns:
        The pieces of each row as indices, in rising order.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # what is left in each open row, and the row
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(left, (lengths[index], 0))
        if place == len(left):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = left.pop(place)
        rows[row].append(index)
        if free > lengths[index]:
            insort(left, (free - lengths[index], row))
    return [sorted(row) for row in rows]


# How the conversations of a row are kept from reading each other: by the model, which tells them by positions that
# begin anew, or by a mask that says so.
Separation = Literal["positions", "mask"]


@torch.no_grad()
def find_separation(model: Any) -> Separation:
    """How a model keeps the conversations of one row apart, found by trying.

    transformers' masks know from the positions where a conversation begins, sliding windows included; some
    families (OPT, Falcon) make their masks without them, and then a mask for each pair of tokens does it.

    Args:
        model: a causal model, with or without an adapter.

    Raises:
        ValueError: neither does, as where the model carries a state along or counts positions from the mask.
    """
    training = model.training
    model.eval()
    # Two pieces apart, in a row, and in a row with each separation, which has to undo what the row did.
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (
        torch.tensor([[start * vocabulary // 23 for start in starts]], device=model.device)
        for starts in ((3, 19, 7, 11, 2), (13, 5, 17, 21, 8, 1))
    )
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(piece.shape[1], device=model.device) for piece in (first, second)])[None]
    apart = slice(first.shape[1], None)
    ways: dict[Separation, dict[str, Tensor]] = {
        "positions": {},
        "mask": {"attention_mask": separating_mask(positions, model.dtype)},
    }
    try:
        alone = model(input_ids=second, use_cache=False).logits
        read = (model(input_ids=row, use_cache=False).logits[:, apart] - alone).abs().max()
        for separation, mask in ways.items():
            try:
                logits = model(input_ids=row, position_ids=positions, use_cache=False, **mask).logits[:, apart]
            except (TypeError, ValueError, RuntimeError):  # a model that takes no positions, or no such mask
                continue
            # The shapes differ, so in half precision the numbers do; reading on would make the whole difference.
            if (logits - alone).abs().max() <= 0.05 * read:
                return separation
    finally:
        model.train(training)
    raise ValueError(
        f"Several conversations in one row of a {model.config.model_type} model would read each other: train it "
        "without packing."
    )


def separating_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores so that a token reads its own conversation up to itself.

    Args:
        position_ids: `[batch, length]`, from 0 in each conversation.
        dtype: the scores' type.

    Returns:
        `[batch, 1, length, length]`, 0 or the least number of the type.
    """
    conversation = (position_ids == 0).cumsum(dim=-1)
    own = conversation.unsqueeze(-1) == conversation.unsqueeze(-2)
    readable = own & torch.ones_like(own).tril()
    mask = torch.zeros(own.shape, dtype=dtype, device=own.device).masked_fill(~readable, torch.finfo(dtype).min)
    return mask.unsqueeze(1)

"""Instruction tuning: a causal model learns completions after prompts, one or several conversations a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
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
    write,
)
from ia3.tasks.examples import Example
from ia3.tasks.losses import token_log_probabilities
from ia3.training.learner import Answered, EvalOutput, Writer


@dataclass(frozen=True)
class Dialogue:
    """One conversation as tokens.

    Args:
        prompt: what is read in training, cut so that prompt and completion fit into the task's length.
        completion: what is learned, the end token included.
        asked: what is answered in evaluation: the prompt as `complete` makes it, whatever its right answer.
        cut: whether the prompt was cut for training.
        place: which of the examples this is.
        text: the user's message.
        label: the right answer.
    """

    prompt: list[int]
    completion: list[int]
    asked: list[int]
    cut: bool
    place: int
    text: str
    label: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


# One dialogue, or with packing as many as fit.
Row = tuple[Dialogue, ...]


def count_cut(rows: Sequence[Row]) -> int:
    """How many conversations were longer than the task's length, so that their prompts were cut."""
    return sum(dialogue.cut for row in rows for dialogue in row)


@dataclass(frozen=True)
class Instructions(Writer[Row]):
    """Completions after prompts; the loss is that of the completions' tokens alone."""

    @property
    def is_the_models_loss(self) -> bool:
        """Of one dialogue a row: packed ones come with masks or positions of their own."""
        return not self.settings.packing

    def tokenise(self, examples: Sequence[Example]) -> list[Row]:
        """Prompts by the chat template, or plain where the tokenizer has none, and whole completions.

        Prompts are cut as `ia3.inference.complete` does it; completions never are.

        Raises:
            ValueError: a completion longer than the task's length or changed by the chat template, a template
                that refuses the messages, or, with packing, a model whose rows would read each other.
        """
        dialogues = self._dialogues(examples)
        check_positions(self.model, max(map(len, dialogues), default=0))
        if not self.settings.packing:
            return [(dialogue,) for dialogue in dialogues]
        _ = self._separation  # refuses a model now, not at its first step
        return [
            tuple(dialogues[place] for place in places)
            for places in pack([len(dialogue) for dialogue in dialogues], self.task.max_length)
        ]

    def length(self, row: Row) -> int:
        """Of all prompts and completions."""
        return sum(map(len, row))

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids` and `labels` `[batch, length]`, -100 where nothing is learned, padded on the right.

        With packing, `position_ids` that count from 0 in each conversation; without, the `attention_mask`.
        """
        length = max(self.length(row) for row in rows)
        if self.settings.pad_to_multiple_of is not None:
            length += -length % self.settings.pad_to_multiple_of
        filler = self._filler()
        batch = {
            "input_ids": torch.tensor([_ids(row) + [filler] * (length - self.length(row)) for row in rows]),
            "labels": torch.tensor([_labels(row) + [IGNORE_INDEX] * (length - self.length(row)) for row in rows]),
        }
        if self.settings.packing:
            batch["position_ids"] = torch.tensor([_positions(row, length) for row in rows])
        else:
            lengths = torch.tensor([self.length(row) for row in rows])
            batch["attention_mask"] = (torch.arange(length) < lengths.unsqueeze(-1)).long()
        return batch

    def targets(self, batch: dict[str, Tensor]) -> int:
        """The completions' tokens."""
        return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The cross-entropy a token of the completions, in float32 where the model is of half precision."""
        losses, learned = self.token_losses(batch)
        return losses.sum() / learned.sum()

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """At the places where any row of the batch learns a token."""
        following = batch["labels"][:, 1:]
        places = (following != IGNORE_INDEX).any(dim=0).nonzero().squeeze(-1)
        following = following[:, places]
        return -token_log_probabilities(self._logits(places, batch), following), following != IGNORE_INDEX

    def measure(self, rows: Sequence[Row], beat: Callable[[int], None]) -> EvalOutput:
        """The loss of the right completions, and the answers, written greedily, in the examples' order."""
        dialogues = sorted((dialogue for row in rows for dialogue in row), key=lambda dialogue: dialogue.place)
        per_row = len(rows) / len(dialogues)
        done = 0

        def beat_rows(count: int) -> None:
            nonlocal done
            former, done = done, done + count
            beat(round(done * per_row) - round(former * per_row))

        return super().measure([(dialogue,) for dialogue in dialogues], beat_rows)

    def asked(self, row: Row) -> int:
        """Of the prompt as it is asked."""
        return len(row[0].asked)

    def batches(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """As `complete` makes them."""
        return prompt_batches(self.model, lengths, self._max_new_tokens, self.settings.evaluation_batch_size)

    @torch.inference_mode()
    def answer(self, rows: Sequence[Row]) -> list[Answered]:
        """Written greedily, as `complete` does."""
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collate(rows).items()}
        losses, learned = self.token_losses(batch)
        dialogues = [dialogue for (dialogue,) in rows]
        asked = [dialogue.asked for dialogue in dialogues]
        check_positions(self.model, max(map(len, asked)) + 1)
        written = write(self.model, self.tokenizer, asked, self._max_new_tokens, self._generate)
        figures = zip(dialogues, written, losses.double().sum(1).tolist(), learned.sum(1).tolist(), strict=True)
        return [Answered(each.text, each.label, answer, loss, count) for each, answer, loss, count in figures]

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

    def _filler(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        return end_tokens(self.model, self.tokenizer)[0] if pad is None else pad

    def _dialogues(self, examples: Sequence[Example]) -> list[Dialogue]:
        prompt_texts = [prompt_text(self.tokenizer, row.text, row.turns, self.task.system) for row in examples]
        whole_texts = [self._whole_text(row, prompt) for row, prompt in zip(examples, prompt_texts, strict=True)]
        tails = [whole[len(prompt) :] for whole, prompt in zip(whole_texts, prompt_texts, strict=True)]
        prompts = encode(self.tokenizer, prompt_texts)
        completions = map(self._completion, prompts, encode(self.tokenizer, whole_texts), tails)
        return list(map(self._dialogue, range(len(examples)), examples, prompts, completions))

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
        last = max((place for place, token in enumerate(completion) if token in ends), default=None)
        return [*completion, ends[0]] if last is None else completion[: last + 1]

    def _dialogue(self, place: int, row: Example, prompt: list[int], completion: list[int]) -> Dialogue:
        length = self.task.max_length
        if len(completion) >= length:
            raise ValueError(
                f"The completion {row.label[:60]!r} takes {len(completion)} tokens, its end token included, and the "
                f"length is {length} with its prompt: completions are never cut. Raise max_length, or shorten it."
            )
        fit = self._cut_to(length - len(completion), prompt, row)
        asked = self._cut_to(length, prompt, row)
        return Dialogue(fit, completion, asked, fit is not prompt, place, row.text, row.label)

    def _cut_to(self, room: int, prompt: list[int], row: Example) -> list[int]:
        if len(prompt) <= room:
            return prompt
        return cut_prompt(self.tokenizer, row.text, row.turns, self.task.system, room=room)


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


def _ids(row: Row) -> list[int]:
    return [token for dialogue in row for token in (*dialogue.prompt, *dialogue.completion)]


def _labels(row: Row) -> list[int]:
    return [label for dialogue in row for label in (*[IGNORE_INDEX] * len(dialogue.prompt), *dialogue.completion)]


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
    try:
        found = _try_separations(model)
    finally:
        model.train(training)
    if found is None:
        raise ValueError(
            f"Several conversations in one row of a {model.config.model_type} model would read each other: train it "
            "without packing."
        )
    return found


@torch.no_grad()
def _try_separations(model: Any) -> Separation | None:
    """Run two pieces apart, in a row, and in a row with each separation, which has to undo what the row did."""
    vocabulary = model.config.get_text_config().vocab_size
    first, second = (
        torch.tensor([[start * vocabulary // 23 for start in starts]], device=model.device)
        for starts in ((3, 19, 7, 11, 2), (13, 5, 17, 21, 8, 1))
    )
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(piece.shape[1], device=model.device) for piece in (first, second)])[None]
    alone = model(input_ids=second, use_cache=False).logits
    apart = slice(first.shape[1], None)
    read = (model(input_ids=row, use_cache=False).logits[:, apart] - alone).abs().max()
    ways: dict[Separation, dict[str, Tensor]] = {
        "positions": {},
        "mask": {"attention_mask": separating_mask(positions, model.dtype)},
    }
    for separation, mask in ways.items():
        try:
            logits = model(input_ids=row, position_ids=positions, use_cache=False, **mask).logits[:, apart]
        except (TypeError, ValueError, RuntimeError):  # a model that takes no positions, or no such mask
            continue
        # The shapes differ, so in half precision the numbers do; reading on would make the whole difference.
        if (logits - alone).abs().max() <= 0.05 * read:
            return separation
    return None


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

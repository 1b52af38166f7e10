"""Batches packed for a fused loss: without padding, and rounded up to one of few shapes for a GPU's graphs.

A GPU may wait for a batch that is packed, and of tensors as small as these numpy's operations take half of the time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ia3.fast.ops.launch import next_power_of_2
from ia3.fast.ragged import IGNORE_INDEX, Ragged

_Array = NDArray[Any]
INPUTS = ("input_ids", "attention_mask", "labels")
# `round_up`'s parts in training.
PARTS = 16
# And where nothing is trained, so that each shape comes a few times alone, and each is recorded: half as
# many shapes as in training, for at most a seventh more tokens.
FEW_PARTS = 8
# Tokens that take a GPU no longer than one.
_FOR_NOTHING = 128


@dataclass(frozen=True)
class Packed:
    """A batch without padding.

    Args:
        tensors: by name. Of every mode `cu_seqlens` and `labels`, see `Ragged`;

            - of causal and seq2seq models `tokens` of all inputs, `[total_tokens]`, and where positions are learned
              each token's, `positions`;
            - of causal models `label_at`, the token behind which each of the labels `[labels]` follows, rising;
            - of seq2seq models the labels are `[examples, target]`;
            - of encoders what the model's own forward takes, padded, `token_at` `[total_tokens]`, where each token is
              among the padded, and `slot_of`, the token of each padded place.

        max_seqlen: no input has more tokens.
        uniform: see `Ragged`.
    """

    tensors: Mapping[str, Tensor]
    max_seqlen: int
    uniform: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def fixed(self) -> tuple[Hashable, ...]:
        """What tells shapes apart besides the tensors': `Packed(tensors, *fixed)`."""
        return self.max_seqlen, self.uniform

    @property
    def examples(self) -> int:
        return len(self["cu_seqlens"]) - 1

    @property
    def total_tokens(self) -> int:
        return len(self.tensors["tokens" if "tokens" in self.tensors else "token_at"])

    def ragged(self, groups: int) -> Ragged:
        """Of the inputs.

        Raises:
            ValueError: the examples can't be divided into these groups.
        """
        return Ragged(self["cu_seqlens"], self.max_seqlen, self.total_tokens, groups, self.uniform)


def pad_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of several inputs on the CPU and their mask, both `[rows, length]`."""
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    ids = pad_sequence(list(rows), batch_first=True)
    return ids, (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).long()


def pack_prompts(ids: Tensor, mask: Tensor, *, positions: bool = False, left_padded: bool = False) -> Packed:
    """Leave out the padding of what a generation reads; the labels only say how many examples there are.

    Args:
        ids: `[batch, length]`, best on the CPU.
        mask: alike, one for which `packable` is true.
        positions: whether the model has learned ones.
        left_padded: whether they are counted from the first token, not from the first column.
    """
    nothing = torch.full((len(ids), 1), IGNORE_INDEX, device="cpu")
    return _packed(
        ids.cpu().numpy(), mask.cpu().numpy() != 0, {"labels": nothing}, positions=positions, left_padded=left_padded
    )


def pack_seq2seq(batch: Mapping[str, Tensor], *, positions: bool = False) -> Packed:
    """Leave out the padding of inputs and keep the labels as they are.

    Args:
        batch: `input_ids` and `attention_mask` `[batch, source]`, `labels` `[batch, target]`, best on the CPU: how long
            the examples are must be known here.
        positions: whether the model has learned ones.

    Raises:
        ValueError: other or missing inputs; a mask that hides tokens between others; an example with labels whose
            input has no token.
    """
    ids, mask, labels = _checked(batch)
    return _packed(ids, mask, {"labels": torch.from_numpy(labels)}, positions=positions)


def pack_causal(batch: Mapping[str, Tensor], *, positions: bool = False, left_padded: bool = False) -> Packed:
    """Leave out the padding, and find the labels.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` `[batch, length]`, best on the CPU: where the labels are must
            be known here. As in transformers, position t predicts the label at t + 1.
        positions: whether the model has learned ones.
        left_padded: whether they are counted from the first token, not from the first column.

    Raises:
        ValueError: as `pack_seq2seq`; labels of another shape; a label that padding would predict.
    """
    ids, mask, labels = _checked(batch)
    if labels.shape != ids.shape:
        raise ValueError(
            f"The labels are {list(labels.shape)}; a causal model's are as its input_ids {list(ids.shape)}."
        )
    following = np.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    astray = (following != IGNORE_INDEX) & ~mask
    if astray.any():
        example, place = np.argwhere(astray)[0].tolist()
        raise ValueError(
            f"Padding would predict the label at [{example}, {place + 1}], since the attention_mask hides the token "
            f"before it: set labels to {IGNORE_INDEX} on padding, and on the first token behind it."
        )
    of_tokens = following[mask]
    label_at = np.flatnonzero(of_tokens != IGNORE_INDEX)
    more = {"label_at": torch.from_numpy(label_at), "labels": torch.from_numpy(of_tokens[label_at])}
    return _packed(ids, mask, more, positions=positions, left_padded=left_padded)


def pack_encoder(batch: Mapping[str, Tensor]) -> Packed:
    """Find the tokens of a batch that the model's own embeddings and head take padded.

    Args:
        batch: `input_ids` and `attention_mask` `[batch, length]`, `labels` and whatever else the model's forward takes.

    Raises:
        ValueError: a mask that hides more than padding behind the tokens, since a head looks at the first place.
    """
    missing = {"input_ids", "labels"} - set(batch)
    if missing:
        raise ValueError(f"The batch holds {sorted(batch)}, and no {' and no '.join(sorted(missing))}.")
    own = {name: tensor.cpu() for name, tensor in batch.items() if name != "attention_mask"}
    mask = _seen(batch["attention_mask"])
    if not ((_pieces(mask) == 1).all() and mask[:, 0].all()):
        raise ValueError(
            "An example has no token, or its attention_mask hides more than padding behind its tokens: pad on the "
            "right (tokenizer.padding_side = 'right')."
        )
    return _padded_too(own, mask)


def _padded_too(own: dict[str, Tensor], mask: _Array) -> Packed:
    lengths, token_at = mask.sum(1), np.flatnonzero(mask)
    slot_of = np.zeros(mask.size, dtype=np.int64)
    slot_of[token_at] = np.arange(len(token_at))
    places = {"token_at": torch.from_numpy(token_at), "slot_of": torch.from_numpy(slot_of)}
    tensors = {**own, "cu_seqlens": _cu_seqlens(lengths), **places}
    longest = int(lengths.max())
    return Packed(tensors, longest, uniform=bool((lengths == longest).all()))


def _checked(batch: Mapping[str, Tensor]) -> tuple[_Array, _Array, _Array]:
    """Inputs, mask and labels."""
    if set(batch) != set(INPUTS):
        raise ValueError(f"The batch holds {sorted(batch)}; this step takes {sorted(INPUTS)} and no more.")
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    mask = _seen(batch["attention_mask"])
    pieces = _pieces(mask)
    if (pieces > 1).any():
        raise ValueError(
            f"The attention_mask of example {int(pieces.argmax())} hides tokens between others. This step leaves "
            "padding out, at the end or the beginning; train with the model's own forward where a mask has holes."
        )
    empty = (pieces == 0) & (labels != IGNORE_INDEX).any(1)
    if empty.any():
        raise ValueError(f"Example {int(empty.argmax())} has labels, and no token in its input.")
    return ids, mask, labels


def _packed(
    ids: _Array, mask: _Array, more: dict[str, Tensor], *, positions: bool, left_padded: bool = False
) -> Packed:
    lengths = mask.sum(1)
    tensors = {"tokens": torch.from_numpy(ids[mask]), "cu_seqlens": _cu_seqlens(lengths), **more}
    if positions:
        columns = mask.cumsum(1) - 1 if left_padded else np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
        tensors["positions"] = torch.from_numpy(columns[mask])
    longest = max(1, int(lengths.max()))
    return Packed(tensors, longest, uniform=bool((lengths == longest).all()))


def _cu_seqlens(lengths: _Array) -> Tensor:
    found = np.zeros(len(lengths) + 1, dtype=np.int32)
    lengths.cumsum(out=found[1:])
    return torch.from_numpy(found)


def packable(mask: Tensor) -> bool:
    """Whether each example has tokens, without any hidden between others: `[batch, source]`, 0 at padding."""
    return bool((_pieces(_seen(mask)) == 1).all())


def _seen(mask: Tensor) -> _Array:
    """Where an `attention_mask` of any kind hides nothing."""
    return (mask.cpu() != 0).numpy()


def _pieces(mask: _Array) -> _Array:
    """In how many pieces each row's tokens are."""
    pieces: _Array = mask[:, 0] + (mask[:, 1:] > mask[:, :-1]).sum(1)
    return pieces


def round_up(packed: Packed, examples: int, filler: int, parts: int = PARTS) -> Packed:
    """To one of few shapes, so that few graphs serve all batches: filled up with padding tokens and empty examples.

    Args:
        packed: a batch.
        examples: as many as the largest batch has; an encoder's are as many as they are.
        filler: a token.
        parts: how many numbers of tokens there are between one and its double, where these are not 64 apart.
    """
    total = _rounded(packed.total_tokens, parts)
    if "token_at" in packed.tensors:
        return _round_up_padded(packed, filler, total)
    more, missing = examples - packed.examples, total - packed.total_tokens
    tensors = dict(packed.tensors)
    tensors["tokens"] = functional.pad(packed["tokens"], (0, missing), value=filler)
    tensors["cu_seqlens"] = torch.cat([packed["cu_seqlens"], packed["cu_seqlens"][-1:].expand(more)])
    if "positions" in tensors:
        tensors["positions"] = functional.pad(packed["positions"], (0, missing))
    longest = rounded_length(packed.max_seqlen)
    if "label_at" not in tensors:
        width = -packed["labels"].shape[1] % 4
        tensors["labels"] = functional.pad(packed["labels"], (0, width, 0, more), value=IGNORE_INDEX)
        return Packed(tensors, longest)
    # All tokens, or a half, a quarter or an eighth of them.
    wanted = len(packed["labels"])
    labels = next(count for shift in (3, 2, 1, 0) if (count := max(1, total >> shift)) >= wanted)
    tensors["label_at"] = functional.pad(packed["label_at"], (0, labels - wanted))
    tensors["labels"] = functional.pad(packed["labels"], (0, labels - wanted), value=IGNORE_INDEX)
    return Packed(tensors, longest, packed.uniform and longest * examples == packed.total_tokens == total)


def _round_up_padded(packed: Packed, filler: int, total: int) -> Packed:
    """An encoder's batch: padded further, and more padding tokens."""
    examples, length = packed["input_ids"].shape
    wider = rounded_length(length) - length
    fillers = {"input_ids": filler, "labels": IGNORE_INDEX}
    tensors = {
        name: functional.pad(tensor, (0, wider), value=fillers.get(name, 0))
        if tensor.shape[:2] == (examples, length) and not tensor.is_floating_point()
        else tensor
        for name, tensor in packed.tensors.items()
    }
    token_at = packed["token_at"]
    tensors["token_at"] = token_at + token_at // length * wider
    tensors["slot_of"] = functional.pad(packed["slot_of"].view(examples, length), (0, wider)).flatten()
    missing = total - packed.total_tokens
    tensors["token_at"] = functional.pad(tensors["token_at"], (0, missing))
    uniform = packed.uniform and not missing and packed.max_seqlen == rounded_length(packed.max_seqlen)
    return Packed(tensors, rounded_length(packed.max_seqlen), uniform)


def filled_examples(count: int, tokens: int = 1) -> int:
    """The number, one of few, that so many examples are filled up to where nothing is trained.

    Args:
        count: how many there are.
        tokens: what an example that fills up costs. A GPU takes as long for a few of them as for none.
    """
    least = max((some for some in (1, 2, 4, 8) if some * tokens <= _FOR_NOTHING), default=1)
    return max(least, next_power_of_2(count))


def rounded_length(longest: int) -> int:
    """The length, one of few, that so many tokens are rounded up to."""
    return next((length for length in (16, 64, 128, 256) if longest <= length), -(-longest // 64) * 64)


def _rounded(count: int, parts: int) -> int:
    """Up to a multiple of 64, of more from 128 for each of the parts on: with 16 of them at most a fifteenth more."""
    multiple = max(64, (1 << max(0, count.bit_length() - 1)) // parts)
    return max(1, -(-count // multiple)) * multiple

"""A generation's logits beside those of the model's own forward: behind a few inputs, and behind one more token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ia3.architectures import has_learned_positions
from ia3.fast.batch import Packed, pack_prompts, pad_right, round_up
from ia3.fast.compare import Numbers, difference, in_less_memory, telling_examples
from ia3.fast.decoding import Decoding, Room
from ia3.fast.fused import FusedLoss
from ia3.fast.graphed import moved_by
from ia3.fast.guard import own_forward
from ia3.fast.ops.launch import start_compiling
from ia3.fast.sessions import BUCKET, over, round_up_to
from ia3.mixing import make_rows
from ia3.rows import acting
from ia3.sites import Layout

_SAID = "its logits differ from the model's own forward by {1:.1e}"


def decoding_difference(
    loss: FusedLoss, ids: Tensor, mask: Tensor, layout: Layout, flat: Tensor, start: int
) -> str | None:
    """In what the block's logits are not the model's own; None if in nothing.

    Args:
        loss: what generates; the model is in evaluation mode.
        ids: inputs `[examples, length]`, of which a few are looked at, padded on either side.
        mask: `[examples, length]`, 0 at padding.
        layout: the sites of `flat`, some of the loss's.
        flat: the vectors of all examples or of each, `[1 or examples, D]`.
        start: a decoder's first token behind an encoder.
    """
    mask = mask.cpu() != 0
    examples = telling_examples(mask.sum(1), mask.any(1))
    if not examples:
        return None

    def compare(chosen: Sequence[int]) -> str | None:
        rows = [ids[each].cpu()[mask[each]] for each in chosen]
        vectors = flat if len(flat) == 1 else flat[list(chosen)]
        return _Beside(loss, rows, layout, vectors, start).difference()

    with torch.inference_mode(), torch.autocast(loss.model.device.type, enabled=False):
        return in_less_memory(compare, examples)


@dataclass(frozen=True)
class _Beside:
    """Both ways over the same inputs.

    Args:
        loss, layout, start: as above.
        rows: the tokens of each input.
        flat: the vectors of all or of each, `[1 or inputs, D]`.
    """

    loss: FusedLoss
    rows: Sequence[Tensor]
    layout: Layout
    flat: Tensor
    start: int

    def difference(self) -> str | None:
        model = self.loss.model
        # While the model's own numbers are computed.
        wait = start_compiling(self._by_block, model.device)

        def fused() -> Numbers:
            wait()
            return _numbers(self._by_block())

        def own(moved: float) -> Numbers:
            return _numbers(self._by_model(moved))

        return difference(model, fused, own, dtype=model.dtype, saying=_SAID)

    @property
    def _reads_source(self) -> bool:
        return self.loss.architecture.mode == "seq2seq"

    @property
    def _prompts(self) -> Sequence[Tensor]:
        """What is read at once: of a causal model's input all but the last token, which is written behind it."""
        return self.rows if self._reads_source else [row[:-1] if len(row) > 1 else row for row in self.rows]

    @property
    def _written(self) -> Tensor:
        """One token more of each, `[inputs]`."""
        if not self._reads_source:
            return torch.stack([row[-1] for row in self.rows])
        # Behind the first token the same again would look alike to an attention that sees both and one that sees one.
        vocabulary: int = self.loss.model.get_output_embeddings().weight.shape[0]
        return torch.full((len(self.rows),), (self.start + 1) % vocabulary, device="cpu")

    def _by_block(self) -> Tensor:
        """`[2, inputs, vocabulary]`."""
        loss, model, count = self.loss, self.loss.model, len(self.rows)
        packed = pack_prompts(
            *pad_right(self._prompts),
            positions=has_learned_positions(loss.architecture),
            left_padded=not self._reads_source,
        )
        packed = round_up(packed, count, 0)
        sent = {name: each.to(model.device) for name, each in packed.tensors.items()}
        packed = Packed(sent, packed.max_seqlen, packed.uniform)
        positions = BUCKET + (0 if self._reads_source else round_up_to(packed.max_seqlen, BUCKET))
        room = Room(count, len(self.flat), positions, packed.total_tokens, packed.max_seqlen)
        decoding = Decoding(loss, room)
        vectors = loss.layout.split(over(loss.layout, self.layout, self.flat).to(model.dtype)[None])
        first = decoding.read(packed, vectors, self.start)
        return torch.stack([first, decoding.step(self._written.to(model.device), vectors)])

    def _by_model(self, moved: float) -> Tensor:
        """The same with vectors that are moved by a part of themselves."""
        count, model = len(self.rows), self.loss.model
        vectors = moved_by(self.flat.detach(), moved).detach().expand(count, -1)
        layout, vectors = _whole(self.layout, vectors)
        names = [f"input {number}" for number in range(count)]
        with acting(make_rows(model, names, layout, vectors)) if layout.sites else nullcontext():
            return self._seq2seq_logits() if self._reads_source else self._causal_logits()

    def _seq2seq_logits(self) -> Tensor:
        start = torch.full_like(self._written, self.start)
        given = torch.stack([start, self._written], dim=1)
        return self._run(*pad_right(self.rows), decoder_input_ids=given).transpose(0, 1)

    def _causal_logits(self) -> Tensor:
        """Padded on the right, where a token has its place without being told."""
        whole = [torch.cat([row, more[None]]) for row, more in zip(self._prompts, self._written, strict=True)]
        last = torch.tensor([len(row) - 1 for row in whole], device="cpu")
        places = torch.stack([last - 1, last])
        # Of long inputs all logits would take much memory.
        kept = torch.tensor(sorted({*places.flatten().tolist()}), device="cpu")
        logits = self._run(*pad_right(whole), logits_to_keep=kept)
        inputs, found = torch.arange(len(whole), device="cpu"), torch.searchsorted(kept, places)
        return logits[inputs.to(logits.device), found.to(logits.device)]

    def _run(self, ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        model = self.loss.model
        batch = {"input_ids": ids, "attention_mask": mask, **more}
        sent: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits: Tensor = own_forward(type(model))(model, **sent, use_cache=False, return_dict=True).logits
        return logits


def _whole(layout: Layout, flat: Tensor) -> tuple[Layout, Tensor]:
    """Vectors `[rows, D]` over all channels of their sites, with ones where none are trained."""
    whole = Layout(tuple(site.whole for site in layout.sites))
    if whole == layout:
        return layout, flat
    wide = flat.new_ones(len(flat), whole.size)
    for site, place, part in zip(layout.sites, whole.split(wide), layout.split(flat), strict=True):
        place.index_copy_(-1, site.channels().to(flat.device), part)
    return whole, wide


def _numbers(logits: Tensor) -> Numbers:
    """Their mean square, and all of them, where a training's comparison has a gradient."""
    return logits.double().square().mean(), logits.flatten()

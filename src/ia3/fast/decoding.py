"""A generation by the block: the prompt's tokens once, then one token an example and step.

The block is that of the loss. What differs is where keys and values are: multiplied by their vectors and rotated, they
go to a cache that stays in place, and no later attention reads a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ia3.fast.batch import Packed
from ia3.fast.block import Inputs, Run
from ia3.fast.fused import FusedLoss
from ia3.fast.layers import Blocks, CrossLayer, ParallelLayer, SelfLayer
from ia3.fast.ops.append import append
from ia3.fast.ops.attention import causal_attention, of_layer, self_attention
from ia3.fast.ops.backend import scaled
from ia3.fast.ops.decode import Scores, Source, attend_across, attend_to_cache
from ia3.fast.ops.rotary import rotary_heads
from ia3.fast.ragged import Ragged


@dataclass(frozen=True)
class Room:
    """For what a generation keeps.

    Args:
        examples: how many.
        groups: they are divided into so many equal groups in their order, each with vectors of its own.
        positions: no example has more tokens, the prompt's and the new ones.
        source_tokens: all inputs of an encoder together have no more.
        max_seqlen: no input of an encoder has more.
    """

    examples: int
    groups: int
    positions: int
    source_tokens: int
    max_seqlen: int


class Decoding:
    """The logits of each example's next token, by the block of the loss.

    Args:
        loss: of a causal model or an encoder-decoder.
        room: for what is kept.

    Attributes:
        place: how many tokens each example's decoder has read, `[examples]`.
    """

    def __init__(self, loss: FusedLoss, room: Room) -> None:
        self.loss, self.room, device = loss, room, loss.model.device
        whole = {"dtype": loss.model.dtype, "device": device}
        self.reads_source = loss.architecture.mode == "seq2seq"
        self.place = torch.zeros(room.examples, dtype=torch.long, device=device)
        self.cu_seqlens = torch.zeros(room.examples + 1, dtype=torch.int32, device=device)
        self.caches = [
            torch.zeros(2, room.examples, layer.kv_heads, room.positions, layer.dim, **whole)
            for layer in _own_attentions(loss.weights.stacks[-1])
        ]
        across = loss.weights.cross_kv
        self.kv = None if across is None else torch.zeros(room.source_tokens, len(across.weight), **whole)
        self.one = Ragged.even(room.examples, 1, room.groups, device)
        _ = self.one.group_of_token  # known before a step is recorded

    def read(self, packed: Packed, vectors: Sequence[Tensor], start: int) -> Tensor:
        """Take inputs in: a causal model's prompts, or what an encoder reads. The logits `[examples, vocabulary]`.

        Args:
            packed: the inputs, without padding; its labels only say how many examples there are.
            vectors: one a site, `[1, groups, width]`.
            start: a decoder's first token behind an encoder.
        """
        self.cu_seqlens.copy_(packed["cu_seqlens"])
        ragged = packed.ragged(self.room.groups)
        if self.reads_source:
            assert self.kv is not None
            found = self.loss.read_source(self.loss.run(vectors), packed, ragged)
            self.multiply_source(found, ragged, vectors, self.kv)
            self.place.zero_()
            return self.step(torch.full_like(self.place, start), vectors)
        run = _Prompt(self.loss, vectors, self.caches)
        (stack,), (blocks,) = self.loss.architecture.stacks, self.loss.weights.stacks
        x = self.loss.embed(run, stack, packed["tokens"], packed.tensors.get("positions"))
        y = run.through(blocks, x, Inputs(ragged, ragged))
        self.place.copy_(self.cu_seqlens[1:] - self.cu_seqlens[:-1])
        return self.loss.logits(y[(self.cu_seqlens[1:] - 1).clamp(min=0)])

    def step(self, token: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """The logits `[examples, vocabulary]` behind one more token.

        Args:
            token: of each example, `[examples]`; its key and value are kept.
            vectors: as in `read`.
        """
        source = Source(self.cu_seqlens[:-1], self.cu_seqlens[1:], self.room.max_seqlen)
        return self.logits_behind(token, vectors, self.place, self.caches, source, self.one)

    def logits_behind(
        self, token: Tensor, vectors: Sequence[Tensor], place: Tensor, caches: Sequence[Tensor], source: Source,
        one: Ragged,
    ) -> Tensor:  # fmt: skip
        """The same of some of the examples, whose places, caches and source these are; `one` token an example."""
        run = _Step(self.loss, vectors, caches, place, source)
        stack, blocks = self.loss.architecture.stacks[-1], self.loss.weights.stacks[-1]
        x = self.loss.embed(run, stack, token, place)
        y = run.through(blocks, x, Inputs(one, one, self.kv))
        place.add_(1)
        return self.loss.logits(y)

    def multiply_source(self, found: Tensor, source: Ragged, vectors: Sequence[Tensor], kv: Tensor) -> None:
        """Write the keys and values of all attentions across, multiplied, `[at least tokens, layers · 2 · inner]`.

        Args:
            found: what `FusedLoss.read_source` gives, or what was copied of it.
            source: whose it is.
            vectors: as in `read`.
            kv: where; it may be `found` itself.
        """
        run = self.loss.run(vectors)
        layers = [layer for layer in self.loss.weights.stacks[-1].layers if isinstance(layer, CrossLayer)]
        width = found.shape[1] // len(layers)
        for layer in layers:
            own = slice(layer.index * width, (layer.index + 1) * width)
            append(found[:, own], run.at(layer.k), run.at(layer.v), source, kv[:, own], run.backend)


def _own_attentions(blocks: Blocks) -> Iterator[SelfLayer]:
    """A stack's attentions to itself, in their order."""
    for layer in blocks.layers:
        if isinstance(layer, ParallelLayer):
            yield layer.attention
        elif isinstance(layer, SelfLayer):
            yield layer


class _Cached(Run):
    """A forward whose attentions have caches, in their order.

    Args:
        loss: the model's.
        vectors: one a site, `[1, groups, width]`.
        caches: one an attention, `[2, examples, kv_heads, positions, dim]`.
    """

    def __init__(self, loss: FusedLoss, vectors: Sequence[Tensor], caches: Sequence[Tensor]) -> None:
        super().__init__(loss.weights, loss.positions, vectors, loss.backend, recompute=False)
        self.caches = iter(caches)

    def project_scaled(self, layer: SelfLayer, x: Tensor, ragged: Ragged) -> Tensor:
        """The queries multiplied by their vector; keys and values are where they are kept."""
        return scaled(self.project(layer, x), self.together((layer.q, None, None), layer.widths), ragged)


class _Prompt(_Cached):
    """All tokens of the prompts, whose keys and values are kept."""

    def attend(self, layer: SelfLayer, x: Tensor, ragged: Ragged) -> Tensor:
        qkv, cache = self.project_scaled(layer, x, ragged), next(self.caches)
        if self.positions.rotary is None:
            q, k, v = qkv.chunk(3, -1)
            k, v = scaled(k, self.at(layer.k), ragged), scaled(v, self.at(layer.v), ragged)
            attended = self_attention(
                torch.cat([q, k, v], -1), None, ragged, None, None, layer.heads, scale=layer.scale, causal=True, p=0.0,
                seed=None, backend=self.backend,
            )  # fmt: skip
            k, v = (
                ragged.pad(each).view(ragged.examples, ragged.max_seqlen, layer.kv_heads, -1).transpose(1, 2)
                for each in (k, v)
            )
        else:
            cos, sin = self.positions.angles(layer, ragged.max_seqlen)
            q, k, v = rotary_heads(
                qkv, cos, sin, ragged, self.at(layer.k), self.at(layer.v), layer.heads, layer.kv_heads,
                backend=self.backend, qk_norm=layer.qk_norm,
            )  # fmt: skip
            attended = causal_attention(
                q, k, v, ragged, 0.0, scale=layer.scale, window=layer.window, softcap=layer.softcap
            )
        # Behind an example's tokens anything may stand: a step writes there before it reads.
        cache[0, :, :, : ragged.max_seqlen].copy_(k)
        cache[1, :, :, : ragged.max_seqlen].copy_(v)
        return self.out(layer, attended, ragged)


class _Step(_Cached):
    """One more token an example.

    Args:
        loss, vectors, caches: see `_Cached`.
        place: the token's position in each example, `[examples]`.
        source: where each example's keys and values of the encoder's output are.
    """

    def __init__(
        self, loss: FusedLoss, vectors: Sequence[Tensor], caches: Sequence[Tensor], place: Tensor, source: Source
    ) -> None:
        super().__init__(loss, vectors, caches)
        self.place, self.source = place, source

    def attend(self, layer: SelfLayer, x: Tensor, ragged: Ragged) -> Tensor:
        qkv, cache = self.project_scaled(layer, x, ragged), next(self.caches)
        positions = cache.shape[3]
        angles = None if self.positions.rotary is None else self.positions.angles(layer, positions)
        bias = self.positions.bias_by_distance(layer, positions)
        scores = Scores(layer.scale, layer.softcap, layer.window, bias)
        attended = attend_to_cache(
            qkv, cache, self.place, self.at(layer.k), self.at(layer.v), ragged, layer.heads, scores, angles,
            self.backend, layer.qk_norm,
        )  # fmt: skip
        return self.out(layer, attended, ragged)

    def _attend_across(self, layer: CrossLayer, x: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.kv is not None
        q = scaled(layer.project(x), self.at(layer.q), inputs.tokens)
        k, v = of_layer(inputs.kv, layer.index, q.shape[-1])
        attended = attend_across(q, k, v, self.source, layer.heads, layer.scale, self.backend)
        return self.out(layer, attended, inputs.tokens)

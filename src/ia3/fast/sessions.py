"""Sessions of generation: the tensors that stay in place while batches of one size come and go, and their steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ia3.fast.batch import Packed
from ia3.fast.cache import additive_mask, fill_up, fixed_cache
from ia3.fast.capture import GraphedCallable
from ia3.fast.decoding import Decoding, Room
from ia3.fast.fused import FusedLoss
from ia3.fast.ops.backend import Backend
from ia3.fast.ops.greedy import Answers, take_likeliest
from ia3.fast.ops.launch import compile_kernels
from ia3.sites import Layout

BUCKET = 16
"""Prompts are filled up to a multiple of this, so that few graphs serve all lengths."""
AHEAD = 2
"""The host looks at what a step leaves when so many more are under way: the GPU never waits for it."""
# The length of a decoder's cache is a multiple of this.
_CACHE_BUCKET = 64


@dataclass(frozen=True)
class GenerationPlan:
    """What `generate` was asked for.

    Args:
        max_new_tokens: the most new tokens.
        ends: the end tokens.
        pad: what stands behind them.
        last: what the last of all tokens is, where an example has not ended before; None for its likeliest.
        start: the decoder's first token.
        min_length: the fewest tokens, the prompt or the decoder's start included.
        min_new_tokens: the fewest new ones.
    """

    max_new_tokens: int
    ends: tuple[int, ...]
    pad: int
    last: int | None
    start: int
    min_length: int
    min_new_tokens: int

    @staticmethod
    def of(model: Any, settings: Mapping[str, Any]) -> GenerationPlan:
        config = deepcopy(model.generation_config)
        config.update(**settings)
        given = config.eos_token_id
        ends = tuple(given) if isinstance(given, list | tuple) else () if given is None else (int(given),)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
        start = start_of(config) if model.config.is_encoder_decoder else None
        least, least_new = config.min_length or 0, config.min_new_tokens or 0
        last = config.forced_eos_token_id
        return GenerationPlan(config.max_new_tokens, ends, pad, last, 0 if start is None else start, least, least_new)


def start_of(config: Any) -> int | None:
    """A decoder's first token, where a generation's configuration names it."""
    start: int | None = config.decoder_start_token_id
    return config.bos_token_id if start is None else start


class Session:
    """What a step of greedy generation leaves: the tokens so far, and which examples have ended.

    Args:
        model: the model.
        plan: what is asked for.
        examples: the batch's.
    """

    def __init__(self, model: Any, plan: GenerationPlan, examples: int) -> None:
        self.model, self.plan, self.examples = model, plan, examples
        self.answers = Answers.none(examples, plan.max_new_tokens, plan.ends, plan.pad, plan.last, model.device)
        self.backend: Backend = "torch"

    def decode_step(self) -> Tensor:
        """Write each example one more token; whether all have ended."""
        raise NotImplementedError

    def start(self) -> None:
        """Forget the last batch."""
        self.answers.count.zero_()
        self.answers.ended.zero_()
        self.answers.tokens.fill_(self.plan.pad)

    def tokens_of(self, examples: int) -> Tensor:
        """A copy of the first examples' tokens, `[examples, tokens of the longest]`, padding behind the others'."""
        longest = int(self.answers.count[:examples].max())
        return self.answers.tokens[:examples, :longest].clone()

    def take(self, logits: Tensor) -> Tensor:
        """Write each example that has not ended its likeliest token, of `[examples, vocabulary]`."""
        has_least = bool(self.plan.min_length or self.plan.min_new_tokens)
        take_likeliest(logits, self.answers, has_least=has_least, backend=self.backend)
        return self.answers.all_ended


@dataclass(frozen=True)
class Size:
    """Of a batch for the block.

    Args:
        examples: how many.
        total_tokens: all inputs together have no more tokens.
        max_seqlen: no input has more.
        mixed: whether each example has vectors of its own.
        layout: the vectors' sites.
    """

    examples: int
    total_tokens: int
    max_seqlen: int
    mixed: bool
    layout: Layout


class FusedSession(Session):
    """A model by the block, with one vector a site for all examples or one an example.

    Args:
        model: a model for which `fused.unsupported_reason` has nothing to say.
        plan: what is asked for.
        size: the batch's.
    """

    def __init__(self, model: Any, plan: GenerationPlan, size: Size) -> None:
        super().__init__(model, plan, size.examples)
        self.size, self.fused, device = size, FusedLoss(model, size.layout), model.device
        self.backend = self.fused.backend
        groups = size.examples if size.mixed else 1
        # All sites' vectors of an example beside each other: a batch's are one copy.
        self.flat = torch.ones(groups, size.layout.size, dtype=model.dtype, device=device)
        self.vectors = size.layout.split(self.flat[None])
        prompt = 0 if model.config.is_encoder_decoder else size.max_seqlen
        positions = round_up_to(prompt + plan.max_new_tokens, BUCKET)
        self.decoding = Decoding(self.fused, Room(size.examples, groups, positions, size.total_tokens, size.max_seqlen))
        self.prefilling = GraphedCallable(self.prefill, device, repeatable=True)
        self.stepping = GraphedCallable(self.decode_step, device)
        compile_kernels(self.decode_step, device)

    def hold(self, layout: Layout, flat: Tensor) -> None:
        """Take a batch's vectors, `[1 or examples, D]`; sites that it doesn't have get ones."""
        self.flat[: len(flat)].copy_(over(self.size.layout, layout, flat))

    def prefill(self, max_seqlen: int, uniform: bool, **tensors: Tensor) -> Tensor:
        """Read packed inputs and write each its first token; whether all have ended."""
        self.start()
        cu_seqlens = tensors["cu_seqlens"]
        self.answers.ended.copy_(cu_seqlens[1:] == cu_seqlens[:-1])  # an empty example writes nothing
        return self.take(self.decoding.read(Packed(tensors, max_seqlen, uniform), self.vectors, self.plan.start))

    def decode_step(self) -> Tensor:
        """See `Session`."""
        return self.take(self.decoding.step(self.answers.token.flatten(), self.vectors))


class CausalSession(Session):
    """A causal model whose positions are an argument, by its own forward over a cache that stays in place.

    Args:
        model: the model.
        plan: what is asked for.
        examples: the batch's.
        max_cache_len: see `cache_len`.
    """

    def __init__(self, model: Any, plan: GenerationPlan, examples: int, max_cache_len: int) -> None:
        super().__init__(model, plan, examples)
        self.hidden = torch.finfo(model.dtype).min
        self.mask = torch.full((examples, 1, 1, max_cache_len), self.hidden, dtype=model.dtype, device=model.device)
        self.position = torch.zeros_like(self.answers.token)
        self.written = torch.zeros(1, dtype=torch.long, device=model.device)
        self.cache = fixed_cache(max_cache_len, self.written)

    @staticmethod
    def cache_len(prompt: int, max_new_tokens: int) -> int:
        """The length that a session's cache needs for a prompt."""
        return round_up_to(round_up_to(prompt, BUCKET) + max_new_tokens, _CACHE_BUCKET)

    def fit(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """A batch filled up: with padding to a multiple of 16, and with copies of its first example."""
        missing = -input_ids.shape[1] % BUCKET
        filled = {}
        for name, tensor, filler in (("input_ids", input_ids, self.plan.pad), ("attention_mask", attention_mask, 0)):
            filled[name] = fill_up(nn.functional.pad(tensor, (missing, 0), value=filler), self.examples)
        return filled

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the prompts and write each its first token; whether all have ended."""
        self.start()
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Padding sees itself, because attention to nothing would be no number.
        seen = (place[:, None] > place) & (attention_mask != 0)[:, None, :] | (place[:, None] == place)
        mask = additive_mask(seen[:, None], self.model.dtype)
        self.mask.fill_(self.hidden)
        self.mask[..., : mask.shape[-1]].copy_(mask[:, :, -1:])
        logits = self._read(input_ids, mask, positions)
        self.written.fill_(input_ids.shape[1])
        self.position.copy_(positions[:, -1:])
        return self.take(logits)

    def decode_step(self) -> Tensor:
        """See `Session`."""
        self.position.add_(1)
        self.mask.index_fill_(3, self.written, 0)
        logits = self._read(self.answers.token, self.mask, self.position)
        self.written.add_(1)
        return self.take(logits)

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def over(wanted: Layout, layout: Layout, flat: Tensor) -> Tensor:
    """Vectors `[examples, D]` over all sites of another layout, with ones where they have none."""
    if layout == wanted:
        return flat
    wide = flat.new_ones(len(flat), wanted.size)
    held = dict(zip(wanted.sites, wanted.split(wide), strict=True))
    for site, vector in zip(layout.sites, layout.split(flat), strict=True):
        held[site].copy_(vector)
    return wide


class Watch:
    """What steps leave on a GPU, seen a few steps late so that neither side waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type == "cuda"
        self.pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def sees(self, left: Tensor) -> Tensor | None:
        """Note what this step leaves, and look at what an earlier one did; None in the first steps."""
        if not self.waits:
            return left
        copied = torch.empty(left.shape, dtype=left.dtype, device="cpu", pin_memory=True)
        copied.copy_(left, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(left.device))
        self.pending.append((copied, event))
        if len(self.pending) <= AHEAD:
            return None
        copied, event = self.pending.popleft()
        event.synchronize()
        return copied


def round_up_to(count: int, multiple: int) -> int:
    """The next multiple."""
    return count + -count % multiple

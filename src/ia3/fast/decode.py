"""Greedy generation of few launches: the prompt in one, then one step, recorded as a CUDA graph and replayed a token.

The tokens are those of `model.generate(do_sample=False, num_beams=1)`. Whatever a step needs stays in one place in
memory: the last tokens, the masks, the keys and values of all positions to come, and for a batch that mixes adapters
its vectors. So one graph serves every batch of a size, whichever adapters are in it.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from ia3.adapter import site_vectors
from ia3.fast import t5
from ia3.fast.capture import Captured, Standing
from ia3.fast.packing import IGNORED, Packed, Spans, pack, packable, round_up
from ia3.mixing import gather_flat, gather_rows
from ia3.rows import BASE, Rows, act_here, acting
from ia3.sites import Layout, Side
from ia3.state import find_attached
from ia3.swap import SavedModule, Swapped

# Prompts are filled up to a multiple of this, so that few graphs serve all lengths.
BUCKET = 16
# The length of an encoder's output is a power of two from this on, and that of a decoder's cache a multiple of it.
_ROOM = 64
# The host looks at a step's ends when so many more are under way: the GPU never waits for it.
_AHEAD = 2
# Sizes of batches that are kept ready; each has the keys and values of its whole length.
_KEPT = 4
# A batch is not filled up to more than so many times its examples.
_TOO_MANY = 8


def compile_generate(model: Any, **settings: Any) -> Generate:
    """Make a function that generates greedily as `model.generate(**settings)` would, fast where that can be done.

    Args:
        model: a T5, an mT5 or a causal model, with or without adapters, in evaluation mode on its device.
        settings: arguments of `generate` that are the same for all batches, `max_new_tokens` among them.

    Returns:
        The function: `tokens = generate(input_ids, attention_mask)`; `generate.path` says which way it goes and
        `generate.reason` why not the captured one.

    Example:
        >>> generate = compile_generate(model, max_new_tokens=16)
        >>> tokens = generate(input_ids, attention_mask, adapter_names=["weather", "sports"])
    """
    settings = {"do_sample": False, "num_beams": 1, **settings}
    reason = "there is no GPU" if model.device.type != "cuda" else why_not(model, **settings)
    return Decoder(model, **settings) if reason is None else _Plain(model, settings, reason)


class Generate:
    """Greedy generation; `compile_generate` makes it. One thread at a time may call it."""

    path: str
    reason: str | None = None

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        """Continue each prompt until its end token.

        Args:
            input_ids: `[batch, length]`, on any device; a causal model's are padded on the left.
            attention_mask: `[batch, length]`, 0 at padding.
            adapter_names: one adapter an example, `"__base__"` for none; the active ones where it is left out.

        Returns:
            What `model.generate` returns, `[batch, …]` on the model's device: the prompt or the decoder's start, the
            new tokens, and padding behind the ends.

        Raises:
            ValueError: what `gather_rows` raises, or another number of names than examples.
        """
        raise NotImplementedError


class _Plain(Generate):
    """The model's own `generate`."""

    path = "eager"

    def __init__(self, model: Any, settings: Mapping[str, Any], reason: str | None) -> None:
        self.model, self.settings, self.reason = model, settings, reason

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        names = {} if adapter_names is None else {"adapter_names": adapter_names}
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        tokens: Tensor = self.model.generate(**moved, **self.settings, **names)
        return tokens


def why_not(model: Any, **settings: Any) -> str | None:
    """Why this model's generation can't be computed here; None where it can.

    Args:
        model: any model.
        settings: arguments of `generate`.
    """
    if not isinstance(model, GenerationMixin):
        return f"a {type(model).__name__} generates nothing"
    reason = why_not_recorded(model) or _why_not_written(model)
    if reason is not None:
        return reason
    config = copy.deepcopy(model.generation_config)
    unknown = config.update(**settings)
    if unknown:
        return f"it knows nothing of {', '.join(sorted(unknown))}"
    if config.max_new_tokens is None:
        return "max_new_tokens is not given"
    if model.config.is_encoder_decoder and _start_of(config) is None:
        return "the configuration names no decoder_start_token_id"
    for name, value in config.to_diff_dict().items():
        if name not in _UNDERSTOOD and value not in _WITHOUT_EFFECT.get(name, (None,)):
            return f"{name} is {value!r}"
    return None


# What a greedy search doesn't look at, or is honoured here.
_UNDERSTOOD = {
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("max_new_tokens", "max_length", "min_length", "min_new_tokens"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("length_penalty", "early_stopping", "transformers_version", "_from_model_config", "cache_config"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "disable_compile", "compile_config"),
}
# Of the others, the values that change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "use_cache": (None, True),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "diversity_penalty": (None, 0.0),
    "guidance_scale": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "token_healing": (None, False),
    "is_assistant": (None, False),
    "low_memory": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "return_dict_in_generate": (None, False),
}


def why_not_recorded(model: Any) -> str | None:
    """Why a forward of this model can't be recorded with masks of one's own; None where it can."""
    kind = type(model).__name__
    if model.training:
        return "the model is in training mode"
    if {parameter.device for parameter in model.parameters()} != {model.device}:
        return "the model is spread over several devices"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not vouch that a {kind}'s forward is the same for all values"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {model.config._attn_implementation}, and masks are made for sdpa and eager"
    return None


def _why_not_written(model: Any) -> str | None:
    """Why generation is not written here for this model."""
    kind, config = type(model).__name__, model.config
    for name in ("generate", "prepare_inputs_for_generation"):
        owner = next(cls for cls in type(model).__mro__ if name in cls.__dict__ and not issubclass(cls, Swapped))
        if owner is not GenerationMixin:
            return f"a {kind} has a {name} of its own"
    if config.is_encoder_decoder and config.model_type not in _SEQ2SEQ:
        return f"of encoder-decoders it is written for T5 and mT5, and this is a {kind}"
    takes = inspect.signature(model.forward).parameters
    if not config.is_encoder_decoder and not {"position_ids", "logits_to_keep"} <= set(takes):
        return f"a {kind} takes no position_ids or no logits_to_keep"
    if getattr(config, "alibi", False):
        return f"the positions of this {kind} come from its mask"
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))
    if "dynamic" in rope or "longrope" in rope:
        return f"the positions of this {kind} depend on the longest of the batch"
    if any(type(layer) is not StaticLayer for layer in StaticCache(config=config, max_cache_len=BUCKET).layers):
        return f"not every layer of this {kind} attends to all positions"
    return None


_SEQ2SEQ = ("t5", "mt5")


def _start_of(config: Any) -> int | None:
    start: int | None = config.decoder_start_token_id
    return config.bos_token_id if start is None else start


@dataclass(frozen=True)
class _Plan:
    """What `generate` was asked for.

    Args:
        new: the most tokens.
        ends: the end tokens.
        pad: what stands behind them.
        start: the decoder's first token.
        least: the fewest tokens, the prompt or the decoder's start included.
        least_new: the fewest new ones.
    """

    new: int
    ends: tuple[int, ...]
    pad: int
    start: int
    least: int
    least_new: int

    @staticmethod
    def of(model: Any, settings: Mapping[str, Any]) -> _Plan:
        config = copy.deepcopy(model.generation_config)
        config.update(**settings)
        given = config.eos_token_id
        ends = tuple(given) if isinstance(given, list | tuple) else () if given is None else (int(given),)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
        start = _start_of(config) if model.config.is_encoder_decoder else None
        least, least_new = config.min_length or 0, config.min_new_tokens or 0
        return _Plan(config.max_new_tokens, ends, pad, 0 if start is None else start, least, least_new)


class Decoder(Generate):
    """Generation by recorded steps; on a CPU the same computation, which is called instead of replayed.

    Args:
        model: a model for which `why_not` has nothing to say.
        settings: arguments of `generate`.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model, self.plan, self.plain = model, _Plan.of(model, settings), _Plain(model, settings, None)
        self.standing = Standing(model)
        self.kind: type[_Session] = _Seq2Seq if model.config.is_encoder_decoder else _Causal
        self.ready: dict[tuple[int, int, frozenset[Any] | None], _Ready] = {}
        self.by_hand: dict[_Size, _ByHand] = {}
        self.reasons: dict[Layout, str | None] = {}
        self.path = "captured" if model.device.type == "cuda" else "static"

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None
    ) -> Tensor:
        if adapter_names is not None and len(adapter_names) != len(input_ids):
            raise ValueError(
                f"There are {len(adapter_names)} adapter_names for {len(input_ids)} examples: pass one an example."
            )
        if self._is_plain(input_ids, attention_mask):
            return self.plain(input_ids, attention_mask, adapter_names=adapter_names)
        if not self.standing.holds():
            self.ready.clear()
            self.by_hand.clear()
            self.reasons.clear()
            self.standing = Standing(self.model)
        flat = self._flat(adapter_names) if packable(attention_mask) else None
        if flat is not None:
            return self._write_by_hand(*flat, input_ids, attention_mask, mixed=adapter_names is not None)
        rows, length = self._size(*input_ids.shape)
        vectors = None
        if adapter_names is not None:
            vectors = gather_rows(self.model, [*adapter_names, *list(adapter_names[:1]) * (rows - len(input_ids))])
            if any(isinstance(site, SavedModule) for site in vectors.slices):  # which takes its examples apart
                return self.plain(input_ids, attention_mask, adapter_names=adapter_names)
        ready = self._ready_for(rows, length, vectors)
        written = self._write(ready, input_ids, attention_mask)
        tokens = ready.session.tokens[: len(input_ids), :written].clone()
        return torch.cat([self._head(input_ids), tokens[:, : self._longest(tokens)]], dim=1)

    @property
    def sessions(self) -> list[_Session]:
        """Those that are kept ready."""
        return [*(ready.session for ready in self.ready.values()), *self.by_hand.values()]

    def _flat(self, adapter_names: Sequence[str] | None) -> tuple[Layout, Tensor] | None:
        """The vectors of each example, or those of the adapter that acts, where T5's forward by hand may write."""
        state = find_attached(self.model)
        if self.kind is not _Seq2Seq or state is None:
            return None
        if adapter_names is not None:
            layout, flat = gather_flat(self.model, adapter_names)
        elif len(state.active) > 1 or not state.enabled or state.originals is not None:
            return None
        else:
            acting = [state.adapters[name] for name in state.active]
            layout = acting[0].layout if acting else Layout(())
            vectors = [vector for adapter in acting for _, vector in site_vectors(self.model, adapter)]
            flat = (layout.flatten(vectors) if vectors else torch.ones(0))[None]
        if layout not in self.reasons:
            self.reasons[layout] = t5.why_not(self.model, layout.sites)
        return (layout, flat) if self.reasons[layout] is None else None

    def _write_by_hand(
        self, layout: Layout, flat: Tensor, input_ids: Tensor, attention_mask: Tensor, *, mixed: bool
    ) -> Tensor:
        count = len(input_ids)
        nothing = torch.full((count, 1), IGNORED)
        packed = pack({"input_ids": input_ids, "attention_mask": attention_mask, "labels": nothing})
        key = self._fitting(count, round_up(packed, count, self.plan.pad), layout, mixed)
        packed = round_up(packed, key.rows, self.plan.pad)
        session = self._by_hand(key)
        session.hold(flat)
        written = self._until_ended(session, lambda: session.reading(**packed.tensors), session.going_on)
        tokens = session.tokens[:count, :written].clone()
        return torch.cat([self._head(input_ids), tokens[:, : self._longest(tokens)]], dim=1)

    def _fitting(self, count: int, packed: Packed, layout: Layout, mixed: bool) -> _Size:
        """The size of the smallest session that is kept and not many times too large, or else of a new one."""
        tokens = len(packed.tokens)
        fits = [
            size
            for size in self.by_hand
            if (size.longest, size.mixed, size.layout) == (packed.longest, mixed, layout)
            and count <= size.rows <= _TOO_MANY * count
            and size.most >= tokens
        ]
        new = _Size(_power_of_two(count), _power_of_two(tokens), packed.longest, mixed, layout)
        return min(fits, key=lambda size: (size.rows, size.most), default=new)

    def _by_hand(self, key: _Size) -> _ByHand:
        """The session for batches of a size, the latest used of those that are kept."""
        session = self.by_hand.pop(key, None)
        if session is None:
            while len(self.by_hand) >= _KEPT:
                del self.by_hand[next(iter(self.by_hand))]
            session = _ByHand(self.model, self.plan, key)
            self.standing = Standing(self.model, session.hand.baked)  # its weights were laid out anew
        self.by_hand[key] = session
        return session

    def _is_plain(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether a batch is one for the model's own `generate`."""
        if not len(ids) or self.model.training or act_here():  # rows that act are the model's to hear
            return True
        # Padded on the right, a prompt is not followed by what is written.
        return not self.model.config.is_encoder_decoder and not bool(mask[:, -1].all())

    def _size(self, count: int, prompt: int) -> tuple[int, int]:
        """The rows and the length of a batch's session: it is filled up to the rows of a larger one."""
        length = self.kind.room(prompt, self.plan.new)
        return min((key[0] for key in self.ready if key[0] >= count and key[1] == length), default=count), length

    def _ready_for(self, rows: int, length: int, vectors: Rows | None) -> _Ready:
        """The session for batches of a size, the latest used of those that are kept; the vectors are copied into it."""
        key = self._key(rows, length, vectors)
        found = self.ready.pop(key, None)
        if found is None:
            while len(self.ready) >= _KEPT:
                del self.ready[next(iter(self.ready))]
            session, device = self.kind(self.model, self.plan, rows, length), self.model.device
            held = None if vectors is None else _hold(vectors, self.model.dtype)
            found = _Ready(session, Captured(session.begin, device), Captured(session.go_on, device), held)
        self.ready[key] = found
        if found.vectors is not None and vectors is not None:
            _refill(found.vectors, vectors)
        return found

    def _key(self, rows: int, length: int, vectors: Rows | None) -> tuple[int, int, frozenset[Any] | None]:
        """Of a session with room for the vectors: one that holds more sites has ones there."""
        if vectors is None:
            return rows, length, None
        wanted = _places(vectors)
        fit = (key for key in self.ready if key[:2] == (rows, length) and key[2] is not None and wanted <= key[2])
        return next(fit, (rows, length, wanted))

    def _write(self, ready: _Ready, input_ids: Tensor, attention_mask: Tensor) -> int:
        """Begin and go on until every row has ended; the number of tokens a row."""
        session = ready.session
        batch = session.fit(input_ids, attention_mask)
        prompt = 1 if session.has_start else input_ids.shape[1]
        with nullcontext() if ready.vectors is None else acting(ready.vectors):
            return self._until_ended(session, lambda: ready.begin(**batch), ready.go_on, prompt)

    def _until_ended(
        self, session: _Session, begin: Callable[[], Tensor], go_on: Callable[[], Tensor], prompt: int = 1
    ) -> int:
        plan, watch = self.plan, _Watch(self.model.device)
        session.least.fill_(max(plan.least - prompt, plan.least_new))
        all_ended, written = begin(), 1
        while written < plan.new and not (plan.ends and watch.sees(all_ended)):
            all_ended, written = go_on(), written + 1
        return written

    def _head(self, input_ids: Tensor) -> Tensor:
        """What `generate` puts before the new tokens."""
        device = self.model.device
        if self.model.config.is_encoder_decoder:
            return torch.full((len(input_ids), 1), self.plan.start, device=device)
        return input_ids.to(device)

    def _longest(self, tokens: Tensor) -> int:
        """The tokens of the longest row, its end included."""
        if not self.plan.ends:
            return tokens.shape[1]
        is_end = torch.isin(tokens, torch.tensor(self.plan.ends, device=tokens.device))
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
        return int(lengths.max())


@dataclass(frozen=True)
class _Ready:
    """A session, its two computations, and the vectors that a mixed batch's are copied into."""

    session: _Session
    begin: Captured
    go_on: Captured
    vectors: Rows | None


class _Watch:
    """Whether every row has ended, seen a few steps late so that neither side waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type == "cuda"
        self.pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def sees(self, all_ended: Tensor) -> bool:
        """Note this step's flag, and look at that of an earlier one."""
        if not self.waits:
            return bool(all_ended)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(all_ended, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.pending.append((flag, event))
        if len(self.pending) <= _AHEAD:
            return False
        flag, event = self.pending.popleft()
        event.synchronize()
        return bool(flag)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one attention, at fixed places: a prompt's at the front, then one position a step.

    Args:
        length: the most positions.
        written: how many are there, `[1]`; None for a decoder's attention over the encoder, filled at once.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, length: int, written: Tensor | None) -> None:
        super().__init__()
        self.length, self.written = length, written

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.length, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is attended to: the prompt alone as long as there is no more, then all places, under a mask."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if count > 1 or self.written is None:
            self.keys[:, :, :count].copy_(key_states)
            self.values[:, :, :count].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.written, key_states)
        self.values.index_copy_(2, self.written, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return 0 if self.written is None else self.written[0]

    def get_max_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0


class _Session:
    """The tensors that stay in place while batches of one size come and go, and the computations over them.

    Args:
        model: the model.
        plan: what is asked for.
        rows: the batch's.
        length: see `room`.
    """

    has_start: bool

    def __init__(self, model: Any, plan: _Plan, rows: int, length: int) -> None:
        self.model, self.plan, self.rows, self.length = model, plan, rows, length
        whole: dict[str, Any] = {"dtype": torch.long, "device": model.device}
        self.token = torch.full((rows, 1), plan.pad, **whole)
        self.tokens = torch.full((rows, plan.new), plan.pad, **whole)
        self.ends = torch.tensor(plan.ends, **whole)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self.count, self.least, self.written = (torch.zeros(1, **whole) for _ in range(3))
        self.hidden = torch.finfo(model.dtype).min

    @staticmethod
    def room(prompt: int, new: int) -> int:
        """The length that a session needs for a prompt: the encoder's output's, or the cache's."""
        raise NotImplementedError

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Read the prompts and write each its first token; whether all have ended."""
        raise NotImplementedError

    def go_on(self) -> Tensor:
        """Write each row one more token; whether all have ended."""
        raise NotImplementedError

    def fit(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """A batch filled up: with padding to a multiple of 16, and with copies of its first row."""
        missing = -input_ids.shape[1] % BUCKET
        sides = (0, missing) if self.has_start else (missing, 0)
        filled = {}
        for name, tensor, filler in (("input_ids", input_ids, self.plan.pad), ("attention_mask", attention_mask, 0)):
            whole = nn.functional.pad(tensor, sides, value=filler)
            filled[name] = fill_up(whole, self.rows)
        return filled

    def hidden_mask(self, length: int, rows: int = 1) -> Tensor:
        """A mask that hides everything, `[rows, 1, 1, length]`."""
        return torch.full((rows, 1, 1, length), self.hidden, dtype=self.model.dtype, device=self.model.device)

    def start(self) -> None:
        for tensor in (self.count, self.written, self.ended):
            tensor.zero_()

    def take(self, logits: Tensor) -> Tensor:
        """Write each row its likeliest token, of `[rows, vocabulary]`, padding where it has ended."""
        plan = self.plan
        if plan.ends and (plan.least or plan.least_new):
            ends = logits[:, self.ends].masked_fill(self.count < self.least, -torch.inf)
            logits = logits.index_copy(1, self.ends, ends)
        token = logits.argmax(-1)
        if plan.ends:
            token = token.masked_fill(self.ended, plan.pad)
            self.ended.logical_or_((token[:, None] == self.ends).any(1))
        self.token.copy_(token[:, None])
        self.tokens.index_copy_(1, self.count, self.token)
        self.count.add_(1)
        return self.ended.all()


class _Seq2Seq(_Session):
    """T5 and mT5: the decoder's own cache grows, its attention over the encoder's output is computed once."""

    has_start = True

    def __init__(self, model: Any, plan: _Plan, rows: int, length: int) -> None:
        super().__init__(model, plan, rows, length)
        own = _round_up(plan.new, BUCKET)
        self.own, self.across = self.hidden_mask(own), self.hidden_mask(length, rows)
        self.cache = EncoderDecoderCache(_cache(own, self.written), _cache(length, None))
        nothing = torch.zeros(rows, 1, model.config.d_model, dtype=model.dtype, device=model.device)
        self.read_before = BaseModelOutput(last_hidden_state=nothing)

    @staticmethod
    def room(prompt: int, new: int) -> int:
        return max(_ROOM, 1 << (prompt - 1).bit_length())

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.start()
        self.token.fill_(self.plan.start)
        self.own.fill_(self.hidden)
        mask = as_scores(attention_mask[:, None, None] != 0, self.model.dtype)
        self.across.fill_(self.hidden)
        self.across[..., : mask.shape[-1]].copy_(mask)
        encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask)
        self.cache.is_updated.clear()  # so that keys and values of this output are made
        return self._decode(encoded, mask)

    def go_on(self) -> Tensor:
        return self._decode(self.read_before, self.across)

    def _decode(self, encoded: Any, across: Tensor) -> Tensor:
        self.own.index_fill_(3, self.written, 0)
        output = self.model(
            encoder_outputs=encoded,
            attention_mask=across,
            decoder_input_ids=self.token,
            decoder_attention_mask=self.own,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.written.add_(1)
        return self.take(output.logits[:, -1])


@dataclass(frozen=True)
class _Size:
    """Of a batch that T5's forward by hand writes.

    Args:
        rows: the examples.
        most: all inputs together have no more tokens.
        longest: no input has more.
        mixed: whether each example has vectors of its own.
        layout: the vectors' sites.
    """

    rows: int
    most: int
    longest: int
    mixed: bool
    layout: Layout


class _ByHand(_Session):
    """T5 and mT5 by hand, with one vector a site for all examples or one an example.

    Args:
        model: a model for which `t5.why_not` has nothing to say.
        plan: what is asked for.
        size: the batch's.
    """

    has_start = True

    def __init__(self, model: Any, plan: _Plan, size: _Size) -> None:
        rows, layout = size.rows, size.layout
        super().__init__(model, plan, rows, size.longest)
        device, config = model.device, model.config
        self.hand = t5.T5Loss(model, layout)
        self.layout, self.groups = layout, rows if size.mixed else 1
        inner, layers = config.num_heads * config.d_kv, len(self.hand.decoder)
        whole: dict[str, Any] = {"dtype": model.dtype, "device": device}
        # Each site's vectors next to each other, as a step reads them.
        self.vectors = [torch.ones(1, self.groups, width, **whole) for width in layout.widths]
        self.kv = torch.zeros(size.most, layers * 2 * inner, **whole)
        self.starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.caches = [torch.zeros(rows, _round_up(plan.new, BUCKET), 2 * inner, **whole) for _ in range(layers)]
        self.reading, self.going_on = Captured(self._begin, device, repeatable=True), Captured(self.go_on, device)

    def hold(self, flat: Tensor) -> None:
        """Take a batch's vectors, `[1 or examples, D]`."""
        if self.vectors:
            places = [place[0, : len(flat)] for place in self.vectors]
            torch._foreach_copy_(places, self.layout.split(flat))

    def _begin(self, tokens: Tensor, starts: Tensor, labels: Tensor) -> Tensor:
        """Read packed inputs and write each its first token; whether all have ended."""
        self.start()
        self.token.fill_(self.plan.start)
        self.starts.copy_(starts)
        self.ended.copy_(starts[1:] == starts[:-1])  # nobody's rows write nothing
        self.hand.read(Packed(tokens, starts, labels, self.length), self.vectors, self.groups, self.kv)
        return self.go_on()

    def go_on(self) -> Tensor:
        source = Spans(self.starts, self.length, len(self.kv), self.groups)
        token = self.token.flatten()
        logits = self.hand.write_one(token, self.written, self.kv, source, self.caches, self.vectors)
        self.written.add_(1)
        return self.take(logits)


class _Causal(_Session):
    """Causal models whose positions are an argument."""

    has_start = False

    def __init__(self, model: Any, plan: _Plan, rows: int, length: int) -> None:
        super().__init__(model, plan, rows, length)
        self.own = self.hidden_mask(length, rows)
        self.position = torch.zeros_like(self.token)
        self.cache = _cache(length, self.written)

    @staticmethod
    def room(prompt: int, new: int) -> int:
        return _round_up(_round_up(prompt, BUCKET) + new, _ROOM)

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.start()
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Padding sees itself, because attention to nothing would be no number.
        seen = (place[:, None] > place) & (attention_mask != 0)[:, None, :] | (place[:, None] == place)
        mask = as_scores(seen[:, None], self.model.dtype)
        self.own.fill_(self.hidden)
        self.own[..., : mask.shape[-1]].copy_(mask[:, :, -1:])
        logits = self._read(input_ids, mask, positions)
        self.written.fill_(input_ids.shape[1])
        self.position.copy_(positions[:, -1:])
        return self.take(logits)

    def go_on(self) -> Tensor:
        self.position.add_(1)
        self.own.index_fill_(3, self.written, 0)
        logits = self._read(self.token, self.own, self.position)
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


def _cache(length: int, written: Tensor | None) -> Any:
    """A cache whose layers are made as the model asks for them."""
    return Cache(layer_class_to_replicate=partial(_Layer, length, written))


def as_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, so that only the places are seen where this is true."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def fill_up(batch: Tensor, rows: int) -> Tensor:
    """A batch with copies of its first row behind it, `[rows, …]`."""
    missing = rows - len(batch)
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _round_up(count: int, multiple: int) -> int:
    return count + -count % multiple


def _places(rows: Rows) -> frozenset[tuple[int, Side]]:
    """Where the rows have vectors."""
    return frozenset((id(site), side) for site, sides in rows.slices.items() for side in sides)


def _hold(rows: Rows, dtype: torch.dtype) -> Rows:
    """Room for such rows, each site's vectors next to each other and in the activations' dtype."""
    slices = {
        site: {side: torch.empty(part.shape, dtype=dtype, device=part.device) for side, part in sides.items()}
        for site, sides in rows.slices.items()
    }
    return Rows((BASE,) * len(rows.names), slices)


def _refill(held: Rows, rows: Rows) -> None:
    """Copy a batch's vectors to where a session reads them; an absent vector is one."""
    places, vectors = [], []
    for site, sides in held.slices.items():
        for side, place in sides.items():
            vector = rows.slices[site].get(side)
            if vector is None:
                place.fill_(1)
            else:
                places.append(place)
                vectors.append(vector)
    if places:
        torch._foreach_copy_(places, vectors)

"""Greedy generation of few launches: the prompt in one, then one step, recorded as a CUDA graph and replayed a token.

The tokens are those of `model.generate(do_sample=False, num_beams=1)`. Whatever a step needs stays in one place in
memory: the last tokens, the masks, the keys and values of all positions to come, and for a batch that mixes adapters
its vectors. So one graph serves every batch of a size, whichever adapters are in it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import StaticCache, StaticLayer

from ia3.architectures import architecture_of, has_learned_positions
from ia3.experts import computes_in_a_loop
from ia3.fast import fused
from ia3.fast.batch import Packed, pack_prompts, packable, round_up
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare_decoding import decoding_difference
from ia3.fast.guard import Guard, copied, unsupported_modules
from ia3.fast.layers import expected_sites
from ia3.fast.ops.launch import next_power_of_2
from ia3.fast.sessions import (
    BUCKET,
    CausalSession,
    FusedSession,
    GenerationPlan,
    Session,
    Size,
    Watch,
    round_up_to,
    start_of,
)
from ia3.fast.surroundings import SayOnce, unusual_call
from ia3.mixing import acting_flat, gather_flat, gather_rows
from ia3.quantised import first_quantised
from ia3.rows import BASE, Rows, acting
from ia3.sites import Layout, Side, Site, logger
from ia3.swap import SavedModule, Swapped

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
    reason = "there is no GPU" if model.device.type != "cuda" else unsupported_reason(model, **settings)
    return Decoder(model, **settings) if reason is None else OwnGenerate(model, settings, reason)


class Generate:
    """Greedy generation; `compile_generate` makes it. One thread at a time may call it."""

    path: str
    reason: str | None = None

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue each prompt until its end token.

        Args:
            input_ids: `[batch, length]`, on any device; a causal model's are padded on the left.
            attention_mask: `[batch, length]`, 0 at padding.
            adapter_names: one adapter an example, `"__base__"` for none; the active ones where it is left out.
            max_new_tokens: write fewer new tokens than the settings say, as where the model's positions end before.

        Returns:
            What `model.generate` returns, `[batch, …]` on the model's device: the prompt or the decoder's start, the
            new tokens, and padding behind the ends.

        Raises:
            ValueError: what `gather_rows` raises, another number of names than examples, or more new tokens than the
                settings say, or none.
        """
        raise NotImplementedError


class OwnGenerate(Generate):
    """The model's own `generate`."""

    path = "eager"

    def __init__(self, model: Any, settings: Mapping[str, Any], reason: str | None) -> None:
        self.model, self.settings, self.reason = model, settings, reason

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        more: dict[str, Any] = {} if adapter_names is None else {"adapter_names": adapter_names}
        if max_new_tokens is not None:
            more["max_new_tokens"] = _within(self.settings.get("max_new_tokens"), max_new_tokens)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        moved = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        tokens: Tensor = self.model.generate(**moved, **{**self.settings, **more})
        return tokens


def _within(most: int | None, wanted: int) -> int:
    """How many new tokens a call wants, which are at most those of the settings."""
    if wanted < 1 or (most is not None and wanted > most):
        raise ValueError(f"max_new_tokens is {wanted}: a call may ask for 1 to {most}, which the settings say.")
    return wanted


def unsupported_reason(model: Any, **settings: Any) -> str | None:
    """Why this model's generation can't be computed here; None where it can.

    Args:
        model: any model.
        settings: arguments of `generate`.
    """
    if not isinstance(model, GenerationMixin):
        return f"a {type(model).__name__} generates nothing"
    reason = _state_unsupported_reason(model) or _unwritten(model)
    if reason is not None:
        return reason
    config = copy.deepcopy(model.generation_config)
    unknown = config.update(**settings)
    if unknown:
        return f"it knows nothing of {', '.join(sorted(unknown))}"
    if config.max_new_tokens is None:
        return "max_new_tokens is not given"
    if model.config.is_encoder_decoder and start_of(config) is None:
        return "the configuration names no decoder_start_token_id"
    if not isinstance(config.forced_eos_token_id, int | None):
        return f"forced_eos_token_id is {config.forced_eos_token_id!r}"
    for name, value in config.to_diff_dict().items():
        if name not in _UNDERSTOOD and value not in _WITHOUT_EFFECT.get(name, (None,)):
            return f"{name} is {value!r}"
    return None


# What a greedy search doesn't look at, or is honoured here.
_UNDERSTOOD = {
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("max_new_tokens", "max_length", "min_length", "min_new_tokens", "forced_eos_token_id"),
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


def _state_unsupported_reason(model: Any) -> str | None:
    """Why a model can't generate here as it stands; None where it can."""
    if model.training:
        return "the model is in training mode"
    if {parameter.device for parameter in model.parameters()} != {model.device}:
        return "the model is spread over several devices"
    if getattr(model, "hf_quantizer", None) is not None or first_quantised(model) is not None:
        return "its weights are quantised"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {model.config._attn_implementation}, and masks are made for sdpa and eager"
    return None


def capture_unsupported_reason(model: Any) -> str | None:
    """Why a forward of this model can't be recorded with masks of one's own; None where it can."""
    reason, kind = _state_unsupported_reason(model), type(model).__name__
    if reason is not None:
        return reason
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not vouch that a {kind}'s forward is the same for all values"
    looped = next((path for path, module in model.named_modules() if computes_in_a_loop(module)), None)
    if looped is not None:
        return f"the experts of {looped} are computed one after the other: set_experts_implementation('grouped_mm')"
    return None


def _unwritten(model: Any) -> str | None:
    """Why generation is not written here for this model."""
    reason = _block_unsupported_reason(model, ())
    for name in ("generate", "prepare_inputs_for_generation"):
        owner = next(cls for cls in type(model).__mro__ if name in cls.__dict__ and not issubclass(cls, Swapped))
        # Those of a family that is described are known.
        known = owner is GenerationMixin or (reason is None and owner.__module__.startswith("transformers."))
        if not known:
            return f"a {type(model).__name__} has a {name} of its own"
    return reason if reason is None or model.config.is_encoder_decoder else _forward_unsupported_reason(model)


def _block_unsupported_reason(model: Any, sites: Sequence[Site]) -> str | None:
    """Why the block doesn't write this model's tokens under vectors at these sites; None where it does."""
    architecture = architecture_of(model)
    if architecture is not None and architecture.mode == "encoder":
        return f"a {type(model).__name__} is described as an encoder"
    return fused.unsupported_reason(model, sites) or unsupported_modules(model)


def _forward_unsupported_reason(model: Any) -> str | None:
    """Why a causal model's own forward can't be called over a cache that stays in place; None where it can."""
    reason = capture_unsupported_reason(model)
    if reason is not None:
        return reason
    kind, config = type(model).__name__, model.config
    takes = inspect.signature(model.forward).parameters
    if not {"position_ids", "logits_to_keep"} <= set(takes):
        return f"a {kind} takes no position_ids or no logits_to_keep"
    if getattr(config, "alibi", False):
        return f"the positions of this {kind} come from its mask"
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))
    if "dynamic" in rope or "longrope" in rope:
        return f"the positions of this {kind} depend on the longest of the batch"
    if any(type(layer) is not StaticLayer for layer in StaticCache(config=config, max_cache_len=BUCKET).layers):
        return f"not every layer of this {kind} attends to all positions"
    return None


class Decoder(Generate):
    """Generation by recorded steps; on a CPU the same computation, which is called instead of replayed.

    Args:
        model: a model for which `unsupported_reason` has nothing to say.
        settings: arguments of `generate`.
    """

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model, self.settings, self.plan = model, settings, GenerationPlan.of(model, settings)
        self.own = OwnGenerate(model, settings, None)
        self.guard, self.defaults = Guard(model), copied(vars(model.generation_config))
        self.is_seq2seq: bool = model.config.is_encoder_decoder
        architecture = architecture_of(model)
        self.has_positions = architecture is not None and has_learned_positions(architecture)
        self.causal: dict[tuple[int, int, frozenset[Any] | None], _Ready] = {}
        self.fused: dict[Size, FusedSession] = {}
        self.reasons: dict[Layout, str | None] = {}
        self.compared: set[bool] = set()
        self.say = SayOnce("A generation: the model's own way")
        self.has_block = architecture is not None and architecture.mode != "encoder"
        self.has_forward = not self.is_seq2seq and _forward_unsupported_reason(model) is None
        self.path = self._fast_path

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, *, adapter_names: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        if adapter_names is not None and len(adapter_names) != len(input_ids):
            raise ValueError(
                f"There are {len(adapter_names)} adapter_names for {len(input_ids)} examples: pass one an example."
            )
        if max_new_tokens is not None:
            _within(self.plan.max_new_tokens, max_new_tokens)
        how: dict[str, Any] = {"adapter_names": adapter_names, "max_new_tokens": max_new_tokens}
        around = unusual_call(self.model)
        if around is not None:
            self.say(around)
        if around is not None or not self._takes(input_ids, attention_mask):
            return self.own(input_ids, attention_mask, **how)
        if not (self.guard.is_valid() and vars(self.model.generation_config) == self.defaults):
            self._begin_anew()
        tokens = None if self.reason is not None else self._by_block(input_ids, attention_mask, **how)
        if tokens is None and self.reason is None and self.has_forward:
            tokens = self._by_forward(input_ids, attention_mask, **how)
        if tokens is None:
            return self.own(input_ids, attention_mask, **how)
        return torch.cat([self._head(input_ids), tokens], dim=1)

    def _begin_anew(self) -> None:
        """Forget what was made of a model, or of a generation's configuration, that is another now."""
        for held in (self.causal, self.fused, self.reasons, self.compared):
            held.clear()
        self.guard, self.defaults = Guard(self.model), copied(vars(self.model.generation_config))
        self.reason, self.path = unsupported_reason(self.model, **self.settings), "eager"
        if self.reason is None:
            self.plan, self.path = GenerationPlan.of(self.model, self.settings), self._fast_path
        else:
            self.say(self.reason)

    @property
    def _fast_path(self) -> str:
        return "captured" if self.model.device.type == "cuda" else "static"

    @property
    def sessions(self) -> list[Session]:
        """Those that are kept ready."""
        return [*(ready.session for ready in self.causal.values()), *self.fused.values()]

    def _takes(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether a batch is one for sessions, and not for the model's own `generate`."""
        if not len(ids) or self.model.training:
            return False
        # Padded on the right, a causal model's prompt is not followed by what is written.
        return self.is_seq2seq or bool(mask[:, -1].all())

    # By the block

    def _by_block(
        self, input_ids: Tensor, mask: Tensor, adapter_names: Sequence[str] | None, max_new_tokens: int | None
    ) -> Tensor | None:
        """What the block writes, `[examples, …]`; None where it can't have these inputs or vectors."""
        found = self._flat(adapter_names) if self.has_block and packable(mask) else None
        if found is None:
            return None
        (layout, flat), count = found, len(input_ids)
        packed = pack_prompts(input_ids, mask, positions=self.has_positions, left_padded=not self.is_seq2seq)
        longest = packed.max_seqlen
        size = self._fitting(count, round_up(packed, count, self.plan.pad), layout, adapter_names is not None)
        packed = round_up(packed, size.examples, self.plan.pad)
        if not self.is_seq2seq:
            # A session has room for longer ones, which would be rotated and attended to for nothing.
            packed = replace(packed, max_seqlen=round_up_to(longest, BUCKET))
        session = self._session(size)
        if self._steps_aside(session, input_ids, mask, layout, flat):
            return None
        session.hold(layout, flat)
        self._until_ended(
            session,
            lambda: session.prefilling(*packed.fixed, **packed.tensors),
            session.stepping,
            prompt=1 if self.is_seq2seq else input_ids.shape[1],
            most=max_new_tokens,
        )
        return session.tokens_of(count)

    def _flat(self, adapter_names: Sequence[str] | None) -> tuple[Layout, Tensor] | None:
        """The vectors of each example, or those of the adapter that acts, where the block can have them."""
        if adapter_names is not None:
            layout, flat = _narrowed(self.model, *gather_flat(self.model, adapter_names))
        elif (acting := acting_flat(self.model)) is not None:
            layout, flat = acting
        else:
            return None
        if layout not in self.reasons:
            self.reasons[layout] = _block_unsupported_reason(self.model, layout.sites)
        return (layout, flat) if self.reasons[layout] is None else None

    def _fitting(self, count: int, packed: Packed, layout: Layout, mixed: bool) -> Size:
        """The size of the smallest session that is kept and not many times too large, or else of a new one."""
        wanted = set(layout.sites)
        fits = [
            size
            for size in self.fused
            if (size.max_seqlen, size.mixed) == (packed.max_seqlen, mixed)
            and (size.layout == layout or (mixed and wanted <= set(size.layout.sites)))
            and count <= size.examples <= _TOO_MANY * count
            and size.total_tokens >= packed.total_tokens
        ]
        examples, total = next_power_of_2(count), next_power_of_2(packed.total_tokens)
        if not self.is_seq2seq:  # what is kept of a prompt has room for the longest
            total = max(total, examples * packed.max_seqlen)
        new = Size(examples, total, packed.max_seqlen, mixed, layout)
        return min(fits, key=lambda size: (size.examples, size.total_tokens), default=new)

    def _session(self, size: Size) -> FusedSession:
        """The session for batches of a size, the latest used of those that are kept."""
        session = self.fused.pop(size, None)
        if session is None:
            while len(self.fused) >= _KEPT:
                del self.fused[next(iter(self.fused))]
            session = FusedSession(self.model, self.plan, size)
            if not self.guard.is_valid():
                self.causal.clear()  # they read the weights where these were
            self.guard = Guard(self.model, session.fused.folded)  # its weights were fused
        self.fused[size] = session
        return session

    def _steps_aside(self, session: FusedSession, ids: Tensor, mask: Tensor, layout: Layout, flat: Tensor) -> bool:
        """Whether the first batch, or the first that mixes adapters, shows that the model computes something else."""
        if session.size.mixed not in self.compared and bool(mask.any()):
            self.compared.add(session.size.mixed)
            self.reason = decoding_difference(session.fused, ids, mask, layout, flat, self.plan.start)
        if self.reason is not None:
            logger.warning("Answers are written by the model's own generate from now on: %s.", self.reason)
            self.path = "eager"
            self.fused.clear()
        return self.reason is not None

    # By the own forward of a causal model

    def _by_forward(
        self, input_ids: Tensor, attention_mask: Tensor, adapter_names: Sequence[str] | None,
        max_new_tokens: int | None,
    ) -> Tensor | None:  # fmt: skip
        """What the model's own forward writes; None where it takes its examples apart."""
        examples, length = self._room(*input_ids.shape)
        vectors = None
        if adapter_names is not None:
            names = [*adapter_names, *list(adapter_names[:1]) * (examples - len(input_ids))]
            vectors = gather_rows(self.model, names)
            if any(isinstance(site, SavedModule) for site in vectors.slices):
                return None
        ready = self._ready_for(examples, length, vectors)
        session, batch = ready.session, ready.session.fit(input_ids, attention_mask)
        with nullcontext() if ready.vectors is None else acting(ready.vectors):
            prompt, most = input_ids.shape[1], max_new_tokens
            self._until_ended(session, lambda: ready.prefill(**batch), ready.decode_step, prompt=prompt, most=most)
        return session.tokens_of(len(input_ids))

    def _room(self, count: int, prompt: int) -> tuple[int, int]:
        """The examples and the cache of a batch's session: it is filled up to the examples of a larger one."""
        length = CausalSession.cache_len(prompt, self.plan.max_new_tokens)
        larger = (key[0] for key in self.causal if key[0] >= count and key[1] == length)
        return min(larger, default=count), length

    def _ready_for(self, examples: int, length: int, vectors: Rows | None) -> _Ready:
        """The session for batches of a size, the latest used of those that are kept; the vectors are copied into it."""
        key = self._key(examples, length, vectors)
        found = self.causal.pop(key, None)
        if found is None:
            while len(self.causal) >= _KEPT:
                del self.causal[next(iter(self.causal))]
            session, device = CausalSession(self.model, self.plan, examples, length), self.model.device
            held = None if vectors is None else _hold(vectors, self.model.dtype)
            found = _Ready(
                session, GraphedCallable(session.prefill, device), GraphedCallable(session.decode_step, device), held
            )
        self.causal[key] = found
        if found.vectors is not None and vectors is not None:
            _refill(found.vectors, vectors)
        return found

    def _key(self, examples: int, length: int, vectors: Rows | None) -> tuple[int, int, frozenset[Any] | None]:
        """Of a session with room for the vectors: one that holds more sites has ones there."""
        if vectors is None:
            return examples, length, None
        wanted = _places(vectors)
        fit = (key for key in self.causal if key[:2] == (examples, length) and key[2] is not None and wanted <= key[2])
        return next(fit, (examples, length, wanted))

    # Both

    def _until_ended(
        self, session: Session, prefill: Callable[[], Tensor], decode_step: Callable[[], Tensor], prompt: int,
        most: int | None,
    ) -> None:  # fmt: skip
        """Go on until every example has ended, or has so many new tokens."""
        plan, watch = self.plan, Watch(self.model.device)
        most = plan.max_new_tokens if most is None else most
        session.answers.max_tokens.fill_(most)
        session.answers.min_tokens.fill_(max(plan.min_length - prompt, plan.min_new_tokens))
        all_ended, written = prefill(), 1
        while written < most and not (plan.ends and watch.sees(all_ended)):
            all_ended, written = decode_step(), written + 1

    def _head(self, input_ids: Tensor) -> Tensor:
        """What `generate` puts before the new tokens."""
        device = self.model.device
        if self.is_seq2seq:
            return torch.full((len(input_ids), 1), self.plan.start, device=device)
        return input_ids.to(device)


@dataclass(frozen=True)
class _Ready:
    """A causal session, its two computations, and the vectors that a mixed batch's are copied into."""

    session: CausalSession
    prefill: GraphedCallable
    decode_step: GraphedCallable
    vectors: Rows | None


def _narrowed(model: Any, layout: Layout, flat: Tensor) -> tuple[Layout, Tensor]:
    """A mixture's vectors `[examples, D]` over keys and values alone, if none changes a fused layer's queries.

    Which spares each token a product.
    """
    architecture = architecture_of(model)
    if architecture is None or not layout.sites or all(not stack.attention.channels for stack in architecture.stacks):
        return layout, flat
    expected = expected_sites(model, architecture)
    sites = [replace(site, intervals=expected.get((site.path, site.side))) for site in layout.sites]
    begins = accumulate(layout.widths, initial=0)
    taken = torch.cat([begin + site.channels() for begin, site in zip(begins, sites, strict=False)])
    rest = torch.ones(layout.size, dtype=torch.bool, device="cpu").index_fill(0, taken, False)
    if bool((flat[:, rest] != 1).any()):
        return layout, flat
    return Layout(tuple(sites)), flat[:, taken]


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

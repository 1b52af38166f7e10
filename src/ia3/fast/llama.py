"""Llama, Mistral and Qwen2 by hand: the loss of a batch over frozen weights that were laid out anew.

The formulas are the models' own (Touvron et al. 2023, arXiv:2302.13971), in an order that hardware likes: queries, keys
and values are one product, and so are both halves of the gate. The key's vector acts before the rotation (Su et al.
2021, arXiv:2104.09864), which mixes channels, so it can't move to the query as T5's does. Texts stand one after another
without padding, and the head runs only where a label follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ia3.fast import packing
from ia3.fast.guard import unsupported_attribute as unlike
from ia3.fast.guard import unsupported_modules as unheard
from ia3.fast.guard import unsupported_site as other_site
from ia3.fast.operations import (
    Vector,
    add_norm,
    causal_attention,
    gated,
    has_kernels,
    head_losses,
    rotary_heads,
    spread,
)
from ia3.fast.packing import IGNORED, Spans
from ia3.fast.products import Frozen, Product, product_of
from ia3.sites import Layout, Site
from ia3.storage import lay_out

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Positions turn by the same angles whatever the batch; of the others, longrope's and dynamic's depend on its length.
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


def why_not(model: Any, sites: Sequence[Site]) -> str | None:
    """Why this model's loss can't be computed here; None where it can.

    Args:
        model: any model.
        sites: the active adapter's.
    """
    if not any(base.__name__ in CLASSES for base in type(model).__mro__):
        return f"it is written for {', '.join(CLASSES)}, and this is a {type(model).__name__}"
    reason = _other_formula(model)
    if reason is not None:
        return reason
    expected = {site for at in _places(model) for site in at}
    other = other_site(sites, expected)
    if other is not None:
        return other
    taken = {(site.path, site.side) for site in sites}
    for down, up in ((at[2], at[3]) for at in _places(model)):
        if down in taken and up in taken:
            return f"both the output of {up[0]} and the input of {down[0]} are adapted"
    return unheard(model, CLASSES)


def _other_formula(model: Any) -> str | None:
    """What the configuration asks for that is not written here."""
    config, rotation = model.config, model.model.rotary_emb.rope_type
    windows = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in windows or (config.model_type == "mistral" and config.sliding_window is not None):
        return f"its attention slides, with a window of {config.sliding_window}"
    if rotation not in _FIXED_ROTATIONS:
        return f"its positions are {rotation!r}, and depend on the batch"
    if vars(model).get("_loss_function") is not None or vars(model).get("loss_type") not in (None, "ForCausalLM"):
        return "its loss is another"
    if len(model.model.layers) != config.num_hidden_layers:
        return f"it has {len(model.model.layers)} layers, and the configuration says {config.num_hidden_layers}"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    formula = {
        "attention_dropout": config.attention_dropout,
        "variance_epsilon": config.rms_norm_eps,
        "head_dim": dim,
        "num_key_value_groups": config.num_attention_heads // config.num_key_value_heads,
        "scaling": dim**-0.5,
    }
    return unlike(model, formula, config.hidden_act) or _half_biased(model)


def _half_biased(model: Any) -> str | None:
    """A bias where products that are one have some with a bias and some without, or the head's."""
    if model.lm_head.bias is not None:
        return "its head has a bias"
    for index, layer in enumerate(model.model.layers):
        attention, feed = layer.self_attn, layer.mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (feed.gate_proj, feed.up_proj)):
            if len({getattr(part, "bias", None) is None for part in parts}) > 1:
                return f"some of layer {index}'s products have a bias, and some have none"
    return None


_Place = tuple[str, str]


def _places(model: Any) -> list[tuple[_Place, _Place, _Place, _Place]]:
    """Where each layer's vectors may be: keys, values, and the intermediate in its two places, which are as good."""
    return [
        (
            (f"model.layers.{index}.self_attn.k_proj", "output"),
            (f"model.layers.{index}.self_attn.v_proj", "output"),
            (f"model.layers.{index}.mlp.down_proj", "input"),
            (f"model.layers.{index}.mlp.up_proj", "output"),
        )
        for index in range(model.config.num_hidden_layers)
    ]


@dataclass(frozen=True)
class PackedTexts:
    """A batch of texts without padding, and the labels among them.

    Args:
        tokens: of all texts, `[rows]`.
        starts: see `Spans`.
        places: the row behind which each label follows, `[labels]`, in rising order.
        labels: `[labels]`; -100 for one that fills up.
        longest: no text has more tokens.
        uniform: see `Spans`.
    """

    tokens: Tensor
    starts: Tensor
    places: Tensor
    labels: Tensor
    longest: int
    uniform: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "starts": self.starts, "places": self.places, "labels": self.labels}

    @property
    def examples(self) -> int:
        return len(self.starts) - 1

    def spans(self, groups: int) -> Spans:
        """Of the texts.

        Raises:
            ValueError: the examples can't be divided into these groups.
        """
        return Spans(self.starts, self.longest, len(self.tokens), groups, self.uniform)


def pack(batch: Mapping[str, Tensor]) -> PackedTexts:
    """Leave out the padding, and find the labels.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` `[batch, length]`, best on the CPU: where the labels are must
            be known here. As in transformers, position t predicts the label at t + 1.

    Raises:
        ValueError: as `packing.pack`; labels of another shape; a label that padding would predict.
    """
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    inputs = packing.pack(batch)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"] != 0
    if labels.shape != ids.shape:
        raise ValueError(
            f"The labels are {list(labels.shape)}; a causal model's are as its input_ids {list(ids.shape)}."
        )
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    astray = (following != IGNORED) & ~mask
    if bool(astray.any()):
        example, place = astray.nonzero()[0].tolist()
        raise ValueError(
            f"Padding would predict the label at [{example}, {place + 1}], since the attention_mask hides the token "
            f"before it: set labels to {IGNORED} on padding, and on the first token behind it."
        )
    of_rows = following[mask]
    places = (of_rows != IGNORED).nonzero().squeeze(1)
    return PackedTexts(inputs.tokens, inputs.starts, places, of_rows[places], inputs.longest, inputs.uniform)


def round_up(texts: PackedTexts, examples: int, filler: int) -> PackedTexts:
    """To one of few shapes, so that few graphs serve all batches: filled up with what is nobody's.

    Args:
        texts: a batch.
        examples: as many as the largest batch has.
        filler: a token.
    """
    without_labels = texts.labels.new_empty(texts.examples, 0)
    inputs = packing.round_up(
        packing.Packed(texts.tokens, texts.starts, without_labels, texts.longest), examples, filler
    )
    rows = len(inputs.tokens)
    # All rows, or a half, a quarter or an eighth of them.
    labels = next(count for shift in (3, 2, 1, 0) if (count := max(1, rows >> shift)) >= len(texts.labels))
    missing = (0, labels - len(texts.labels))
    return PackedTexts(
        inputs.tokens,
        inputs.starts,
        functional.pad(texts.places, missing),
        functional.pad(texts.labels, missing, value=IGNORED),
        inputs.longest,
        texts.uniform and inputs.longest * examples == len(texts.tokens) == rows,
    )


@dataclass(frozen=True)
class _Layer:
    """One layer's frozen weights, and the places of its vectors in the adapter's split."""

    attention_norm: Tensor
    qkv: Product
    attention_out: Product
    feed_norm: Tensor
    inner: Product  # the gate before the linear half
    out: Product
    k: int | None
    v: int | None
    ff: int | None


class LlamaLoss:
    """The losses of a batch as a function of the batch and a table of vectors.

    Args:
        model: one for which `why_not` has nothing to say.
        layout: the active adapter's.
        recompute: keep the residual stream alone for the backward, and compute what is inside a layer again.
        frozen: what the layers' frozen weights are multiplied in; the head's stay as they are.

    Raises:
        ValueError: recompute under attention dropout; widths that the products can't take.
    """

    def __init__(self, model: Any, layout: Layout, *, recompute: bool = False, frozen: Frozen | None = None) -> None:
        self.model, self.config, self.layout, self.recompute = model, model.config, layout, recompute
        self.frozen: Frozen | None = frozen
        if recompute and model.config.attention_dropout:
            raise ValueError("Attention dropout can't be computed again: set attention_dropout to 0, or not recompute.")
        self.act: Any = model.model.layers[0].mlp.act_fn
        self.copied: list[Tensor] = [model.model.rotary_emb.inv_freq]
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        place: dict[_Place, int] = {(site.path, site.side): index for index, site in enumerate(layout.sites)}
        self.layers = [
            self._layer(f"model.layers.{index}", place.get(k), place.get(v), place.get(down if down in place else up))
            for index, (k, v, down, up) in enumerate(_places(model))
        ]

    def __call__(self, texts: PackedTexts, table: Tensor) -> Tensor:
        """The mean loss of each group's label tokens, `[groups]`, 0 for a group without any.

        Args:
            texts: the batch, the examples of one group after those of another, equally many.
            table: a row of vectors a group, `[groups, D]`.

        Raises:
            ValueError: the examples can't be divided into the table's groups.
        """
        base = self.model.model
        spans, kernels = texts.spans(len(table)), has_kernels(base.embed_tokens.weight, self.config.hidden_act)
        run = _Run(self, table, spans, kernels)
        x, h = base.embed_tokens(texts.tokens), None
        for layer in self.layers:
            x, h = run.part(run.attend, x, h, layer)
            x, h = run.part(run.feed, x, h, layer)
        _, y = run.add_norm(x, h, base.norm.weight)
        losses = head_losses(y, self.model.lm_head.weight, texts.places, texts.labels, by_kernels=kernels)
        group = spans.group_of_row[texts.places]
        own = group == torch.arange(len(table), device=group.device)[:, None]
        counted = own & (texts.labels != IGNORED)
        return (losses * own).sum(1) / counted.sum(1).clamp(min=1)

    def angles_of(self, length: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines of the first positions, `[length, dim / 2]`, which the model's own module makes."""
        if length not in self.angles:
            weight = self.model.model.embed_tokens.weight
            positions = torch.arange(length, device=weight.device)[None]
            both = self.model.model.rotary_emb(weight, positions)
            cos, sin = (each[0].chunk(2, -1)[0].contiguous() for each in both)  # the second half is the first again
            self.angles[length] = (cos, sin)
        return self.angles[length]

    @property
    def baked(self) -> list[Tensor]:
        """The weights that are read once and not in each forward: a change of theirs is not heard."""
        return self.copied

    def _layer(self, path: str, k: int | None, v: int | None, ff: int | None) -> _Layer:
        layer = self.model.get_submodule(path)
        return _Layer(
            attention_norm=layer.input_layernorm.weight,
            qkv=self._join([f"{path}.self_attn.{part}_proj" for part in ("q", "k", "v")]),
            attention_out=self._alone(layer.self_attn.o_proj),
            feed_norm=layer.post_attention_layernorm.weight,
            inner=self._join([f"{path}.mlp.{part}_proj" for part in ("gate", "up")]),
            out=self._alone(layer.mlp.down_proj),
            k=k,
            v=v,
            ff=ff,
        )

    def _join(self, paths: list[str]) -> Product:
        (together,) = lay_out(self.model, [paths])
        modules: list[Any] = [self.model.get_submodule(path) for path in paths]
        if self.frozen is not None:
            self.copied.extend(module.weight for module in modules)
        if modules[0].bias is None:
            return product_of(together, frozen=self.frozen)
        self.copied.extend(module.bias for module in modules)
        return product_of(together, torch.cat([module.bias.detach() for module in modules]), frozen=self.frozen)

    def _alone(self, module: Any) -> Product:
        if self.frozen is not None:
            self.copied.append(module.weight)
        return product_of(module.weight, module.bias, frozen=self.frozen)


class _Run:
    """One forward: the vectors split by site, and what all layers share."""

    def __init__(self, loss: LlamaLoss, table: Tensor, spans: Spans, kernels: bool) -> None:
        config, self.spans, self.kernels = loss.config, spans, kernels
        self.recompute = loss.recompute and torch.is_grad_enabled()
        self.p: float = config.attention_dropout if loss.model.training else 0.0
        self.eps, self.act_name, self.act = config.rms_norm_eps, config.hidden_act, loss.act
        self.heads: tuple[int, int] = (config.num_attention_heads, config.num_key_value_heads)
        self.cos, self.sin = loss.angles_of(spans.longest)
        self.slices = loss.layout.split(spread(table, by_kernels=kernels))
        # Nothing but attention drops anything, so any seed will do.
        self.seed = spans.starts.new_zeros((), dtype=torch.int64) if kernels else None

    def at(self, place: int | None) -> Vector:
        return None if place is None else self.slices[place]

    def part(self, layer: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor]:
        """A layer's part, whose inside is kept for the backward or computed again."""
        if self.recompute:
            layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
        x, h = layer(*arguments)
        return x, h

    def add_norm(self, x: Tensor, h: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, h, weight, self.eps, 0.0, self.seed)

    def attend(self, x: Tensor, h: Tensor | None, layer: _Layer) -> tuple[Tensor, Tensor]:
        """The residual stream after the layer before, and what this layer's attention makes of it."""
        x, normed = self.add_norm(x, h, layer.attention_norm)
        q, k, v = rotary_heads(
            layer.qkv(normed), self.cos, self.sin, self.spans, self.at(layer.k), self.at(layer.v), *self.heads,
            by_kernels=self.kernels,
        )  # fmt: skip
        return x, layer.attention_out(causal_attention(q, k, v, self.spans, self.p))

    def feed(self, x: Tensor, h: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
        x, normed = self.add_norm(x, h, layer.feed_norm)
        found = gated(layer.inner(normed), self.at(layer.ff), self.spans, self.act_name, self.act, True, 0.0, self.seed)
        return x, layer.out(found)

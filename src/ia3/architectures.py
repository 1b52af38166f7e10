"""What a family of transformers is besides its projections: how it norms, where tokens stand, what is dropped.

The projections are found by structure, in the model; a description is what structure can't tell. Dimensions, biases,
epsilons, scales and windows are read from the model. Paths of a stack are from the model, those of its norms from a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import ProxyTypes, WeakKeyDictionary

from ia3.structure import FoundAttention, Intervals, find_blocks, layer_widths


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    Args:
        norm: before it; behind it and the residual sum in a post-norm block; None where there is none before it.
        qk_norm: of queries and keys, before the rotation.
        out_norm: of what it returns, before the residual sum.
        q, k, v: the projections, found; the same path three times where one makes all three.
        out: its output's projection, found.
        module: what holds its scale and its window, found.
        channels: of a projection that makes all three, those of keys and values.
    """

    norm: str | None = None
    qk_norm: tuple[str, str] | None = None
    out_norm: str | None = None
    q: str = ""
    k: str = ""
    v: str = ""
    out: str = ""
    module: str = ""
    channels: Intervals | None = None

    @property
    def fused(self) -> Literal["parts", "heads"] | None:
        """How one projection's channels are divided: `[q | k | v]` as `parts`, or so head by head as `heads`."""
        return None if self.channels is None else "parts" if len(self.channels) == 1 else "heads"


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of a block.

    Args:
        norm: as an attention's; None in a parallel block for the attention's normed input.
        out_norm: as an attention's.
        up: the matrix before the activation, found; of a gated one the gate's and the linear half's, or the one that
            makes both.
        down: the second matrix, found.
        gated: whether the activation of one half multiplies the other, found.
    """

    norm: str | None = None
    out_norm: str | None = None
    up: tuple[str, ...] = ()
    down: str = ""
    gated: bool = False


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one after another.

    Args:
        blocks: their list.
        attention: of each block to itself.
        feed_forward: of each block.
        cross: a decoder's attention over the encoder's output.
        embed: the token embedding.
        positions: a learned position embedding and its offset.
        embed_norm: of the embeddings.
        norm: behind the last block.
        causal: each token sees those up to itself.
        repeats: the configuration's name for how often the blocks are run through; None for once.
    """

    blocks: str
    attention: Attention
    feed_forward: FeedForward
    cross: Attention | None = None
    embed: str = ""
    positions: tuple[str, int] | None = None
    embed_norm: str | None = None
    norm: str | None = None
    causal: bool = True
    repeats: str | None = None


@dataclass(frozen=True)
class Dropouts:
    """The configuration's names for rates of dropout; None for none.

    Args:
        attention: on its weights.
        residual: on what a layer made, before the sum.
        attention_residual: `"residual"` where the attention's is the same, else its own; None where it drops nothing.
        activation: on the feed-forward's intermediate.
        embed: on the embeddings.
        final: on the last norm's output.
    """

    attention: str | None = None
    residual: str | None = None
    attention_residual: str | None = "residual"
    activation: str | None = None
    embed: str | None = None
    final: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Not described are interleaved rotations (Helium), layers without a rotation among others (SmolLM3) and norms with a
    weight a head: say these in `unsupported`, or leave the family out.

    Args:
        mode: what follows the blocks: `causal` a head where a label follows, `seq2seq` the same behind an encoder and a
            decoder, `encoder` the model's own head over the model's own embeddings.
        stacks: a decoder, an encoder and a decoder, or an encoder.
        heads: the configuration's name for the number of heads.
        activation: the configuration's name for the activation.
        dropouts: the configuration's names.
        post_norm: norms stand behind the residual sums.
        parallel: attention and feed-forward have the same input, and one sum.
        norm_offset: what is added to a norm's weight.
        rotary: the module that makes the angles of rotary positions.
        relative: the attention in a block that makes the bias of relative positions.
        scale: of the scores; None for what the attention's module says.
        logits_scale: from the configuration to the factor of the logits.
        front: the encoder's module, whose call the blocks answer.
        left_padded: positions are counted from the first token, not from the first column.
        logits_softcap: the configuration's name for the bound of the logits.
        unsupported: what a configuration asks for that is not described; None where there is nothing.
    """

    mode: Literal["causal", "seq2seq", "encoder"]
    stacks: tuple[Stack, ...]
    heads: str = "num_attention_heads"
    activation: str = "hidden_act"
    dropouts: Dropouts = field(default_factory=Dropouts)
    post_norm: bool = False
    parallel: bool = False
    norm_offset: float = 0.0
    rotary: str | None = None
    relative: str | None = None
    scale: float | None = None
    logits_scale: Callable[[Any], float] = lambda config: 1.0
    front: str = ""
    left_padded: bool = False
    logits_softcap: str | None = None
    unsupported: Callable[[Any], str | None] = lambda config: None


def has_learned_positions(architecture: Architecture) -> bool:
    """Whether a batch has to say where its tokens stand."""
    return architecture.stacks[0].positions is not None


_FILLED: WeakKeyDictionary[Any, Architecture] = WeakKeyDictionary()


def architecture_of(model: Any) -> Architecture | None:
    """The description of a model's family, with the projections that its blocks have; None where there is none."""
    config = getattr(model, "config", None)
    describe = _ARCHITECTURES.get(getattr(config, "model_type", ""))
    if describe is None:
        return None
    if isinstance(model, ProxyTypes):
        return _with_projections(describe(config), model)
    if model not in _FILLED:
        _FILLED[model] = _with_projections(describe(config), model)
    return _FILLED[model]


def _with_projections(architecture: Architecture, model: Any) -> Architecture:
    """The description with what the first block of each stack has; as it is where the model is built otherwise."""
    blocks = {block.path: block for block in find_blocks(model, ("all",))}
    stacks = []
    for stack in architecture.stacks:
        block = blocks.get(f"{stack.blocks}.0")
        if block is None or len(block.attentions) != 1 + (stack.cross is not None) or len(block.feed_forwards) != 1:
            return architecture
        own, *across = block.attentions
        (fed,) = block.feed_forwards
        up, down = [_inside(block.path, path) for path in fed.up], _inside(block.path, fed.down)
        gated = len(up) == 2 or _widths(model, fed.up[0])[1] == 2 * _widths(model, fed.down)[0]
        stacks.append(
            replace(
                stack,
                attention=_projected(stack.attention, own, block.path),
                cross=None if stack.cross is None else _projected(stack.cross, across[0], block.path),
                feed_forward=replace(stack.feed_forward, up=tuple(up), down=down, gated=gated),
            )
        )
    return replace(architecture, stacks=tuple(stacks))


def _projected(names: Attention, found: FoundAttention, block: str) -> Attention:
    made = found.keys_values
    k, v = (made[0], made[-1])
    return replace(
        names,
        q=_inside(block, found.query or k.path),
        k=_inside(block, k.path),
        v=_inside(block, v.path),
        out=_inside(block, found.out),
        module=_inside(block, found.path),
        channels=k.channels,
    )


def _widths(model: Any, path: str) -> tuple[int, int]:
    return layer_widths(model.get_submodule(path))  # type: ignore[return-value]


def _inside(block: str, path: str) -> str:
    return path[len(block) + 1 :]


def is_described(cls: type[Any]) -> bool:
    """Whether a class of models is one of a family that is described."""
    return getattr(getattr(cls, "config_class", None), "model_type", "") in _ARCHITECTURES


def names_in(part: Attention | FeedForward) -> list[str]:
    """The paths of an attention's or a feed-forward's modules in a block."""
    named = [part.norm, part.out_norm]
    if isinstance(part, FeedForward):
        return [name for name in (*named, *part.up, part.down) if name is not None]
    named += [part.q, part.k, part.v, part.out, part.module, *(part.qk_norm or ())]
    return [name for name in named if name is not None]


# Decoders with rotary positions.

_LLAMA = Architecture(
    mode="causal",
    stacks=(
        Stack(
            blocks="model.layers",
            embed="model.embed_tokens",
            attention=Attention("input_layernorm"),
            feed_forward=FeedForward("post_attention_layernorm"),
            norm="model.norm",
        ),
    ),
    rotary="model.rotary_emb",
    dropouts=Dropouts(attention="attention_dropout"),
)


def _changed(
    base: Architecture, *, attention: Any = (), feed_forward: Any = (), stack: Any = (), **more: Any
) -> Architecture:
    """An architecture of one stack, with parts of it changed."""
    (old,) = base.stacks
    new = replace(
        old,
        attention=replace(old.attention, **dict(attention)),
        feed_forward=replace(old.feed_forward, **dict(feed_forward)),
        **dict(stack),
    )
    return replace(base, stacks=(new,), **more)


_QK_NORM = {"qk_norm": ("self_attn.q_norm", "self_attn.k_norm")}
_QWEN3 = _changed(_LLAMA, attention=_QK_NORM)
_OLMO2 = _changed(
    _LLAMA,
    attention={**_QK_NORM, "norm": None, "out_norm": "post_attention_layernorm"},
    feed_forward={"norm": None, "out_norm": "post_feedforward_layernorm"},
)
_GEMMA = replace(_LLAMA, norm_offset=1.0)
_GEMMA2 = _changed(
    _GEMMA,
    attention={"out_norm": "post_attention_layernorm"},
    feed_forward={"norm": "pre_feedforward_layernorm", "out_norm": "post_feedforward_layernorm"},
    activation="hidden_activation",
    logits_softcap="final_logit_softcapping",
    unsupported=lambda config: (
        "attention sees both sides" if getattr(config, "use_bidirectional_attention", False) else None
    ),
)
_GEMMA3 = _changed(_GEMMA2, attention=_QK_NORM)
_PHI3 = replace(_LLAMA, dropouts=Dropouts("attention_dropout", residual="resid_pdrop"))
_STARCODER2 = replace(
    _LLAMA, dropouts=Dropouts("attention_dropout", residual="residual_dropout", embed="embedding_dropout")
)
_SEED_OSS = replace(_LLAMA, dropouts=Dropouts("attention_dropout", residual="residual_dropout"))
_PHI = _changed(
    _LLAMA,
    feed_forward={"norm": None},
    stack={"norm": "model.final_layernorm"},
    parallel=True,
    dropouts=Dropouts("attention_dropout", residual="resid_pdrop", embed="embd_pdrop"),
    unsupported=lambda config: "its queries and keys are normed by head" if config.qk_layernorm else None,
)


def _gpt_neox(config: Any) -> Architecture:
    stack = Stack(
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        attention=Attention("input_layernorm"),
        feed_forward=FeedForward("post_attention_layernorm"),
        norm="gpt_neox.final_layer_norm",
    )
    return Architecture(
        mode="causal",
        stacks=(stack,),
        rotary="gpt_neox.rotary_emb",
        parallel=config.use_parallel_residual,
        dropouts=Dropouts("attention_dropout", residual="hidden_dropout", embed="hidden_dropout"),
    )


# Decoders with learned positions.

_GPT2 = Architecture(
    mode="causal",
    stacks=(
        Stack(
            blocks="transformer.h",
            embed="transformer.wte",
            positions=("transformer.wpe", 0),
            attention=Attention("ln_1"),
            feed_forward=FeedForward("ln_2"),
            norm="transformer.ln_f",
        ),
    ),
    activation="activation_function",
    dropouts=Dropouts("attn_pdrop", residual="resid_pdrop", embed="embd_pdrop"),
    unsupported=lambda config: "it attends across" if config.add_cross_attention else None,
)


def _without_layerdrop(config: Any) -> str | None:
    drops = any(getattr(config, f"{part}layerdrop", 0) for part in ("", "encoder_", "decoder_"))
    return "it drops whole layers" if drops else None


def _opt(config: Any) -> Architecture:
    pre_norm = config.do_layer_norm_before
    stack = Stack(
        blocks="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        positions=("model.decoder.embed_positions", 2),
        attention=Attention("self_attn_layer_norm"),
        feed_forward=FeedForward("final_layer_norm"),
        norm="model.decoder.final_layer_norm" if pre_norm and not config._remove_final_layer_norm else None,
    )
    projects = config.word_embed_proj_dim != config.hidden_size
    return Architecture(
        mode="causal",
        stacks=(stack,),
        activation="activation_function",
        post_norm=not pre_norm,
        left_padded=True,
        dropouts=Dropouts("attention_dropout", residual="dropout"),
        unsupported=lambda config: "its embeddings are projected" if projects else _without_layerdrop(config),
    )


# Encoders with a decoder.


def _t5(config: Any, *, scales: str = "scale_decoder_outputs") -> Architecture:
    """T5 and its kin; `scales` is the configuration's name for whether the decoder's output is scaled."""

    def stack(name: str, *, cross: bool) -> Stack:
        last = 2 if cross else 1
        return Stack(
            blocks=f"{name}.block",
            embed=f"{name}.embed_tokens",
            attention=Attention("layer.0.layer_norm"),
            cross=Attention("layer.1.layer_norm") if cross else None,
            feed_forward=FeedForward(f"layer.{last}.layer_norm"),
            norm=f"{name}.final_layer_norm",
            causal=cross,
        )

    return Architecture(
        mode="seq2seq",
        stacks=(stack("encoder", cross=False), stack("decoder", cross=True)),
        heads="num_heads",
        activation="dense_act_fn",
        relative="layer.0.SelfAttention",
        scale=1.0,
        logits_scale=lambda config: config.d_model**-0.5 if getattr(config, scales, False) else 1.0,
        dropouts=Dropouts(
            "dropout_rate",
            residual="dropout_rate",
            activation="dropout_rate",
            embed="dropout_rate",
            final="dropout_rate",
        ),
    )


def _bart(*, post_norm: bool, embed_norm: bool, offset: int) -> Architecture:
    """BART and its kin: with norms behind the sums or before them, of the embeddings or not."""

    def stack(name: str, *, cross: bool) -> Stack:
        return Stack(
            blocks=f"model.{name}.layers",
            embed=f"model.{name}.embed_tokens",
            positions=(f"model.{name}.embed_positions", offset),
            embed_norm=f"model.{name}.layernorm_embedding" if embed_norm else None,
            attention=Attention("self_attn_layer_norm"),
            cross=Attention("encoder_attn_layer_norm") if cross else None,
            feed_forward=FeedForward("final_layer_norm"),
            norm=None if post_norm else f"model.{name}.layer_norm",
            causal=cross,
        )

    return Architecture(
        mode="seq2seq",
        stacks=(stack("encoder", cross=False), stack("decoder", cross=True)),
        heads="encoder_attention_heads",
        activation="activation_function",
        post_norm=post_norm,
        dropouts=Dropouts("attention_dropout", residual="dropout", activation="activation_dropout", embed="dropout"),
        unsupported=_without_layerdrop,
    )


# Encoders, below the model's own head.


def _bert(front: str, **more: Any) -> Architecture:
    stack = Stack(
        blocks=f"{front}.layer",
        attention=Attention("attention.output.LayerNorm"),
        feed_forward=FeedForward("output.LayerNorm"),
        causal=False,
    )
    return Architecture(
        mode="encoder",
        stacks=(stack,),
        front=front,
        post_norm=True,
        dropouts=Dropouts("attention_probs_dropout_prob", residual="hidden_dropout_prob"),
        unsupported=lambda config: "it is a decoder" if config.is_decoder else None,
        **more,
    )


_DISTILBERT = Architecture(
    mode="encoder",
    stacks=(
        Stack(
            blocks="distilbert.transformer.layer",
            attention=Attention("sa_layer_norm"),
            feed_forward=FeedForward("output_layer_norm"),
            causal=False,
        ),
    ),
    front="distilbert.transformer",
    heads="n_heads",
    activation="activation",
    post_norm=True,
    dropouts=Dropouts("attention_dropout", residual="dropout", attention_residual=None),
)


def _always(architecture: Architecture) -> Callable[[Any], Architecture]:
    return lambda config: architecture


_ARCHITECTURES: dict[str, Callable[[Any], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "ministral"), _always(_LLAMA)),
    "seed_oss": _always(_SEED_OSS),
    "qwen3": _always(_QWEN3),
    "olmo2": _always(_OLMO2),
    "gemma": _always(_GEMMA),
    "gemma2": _always(_GEMMA2),
    "gemma3_text": _always(_GEMMA3),
    "phi": _always(_PHI),
    "phi3": _always(_PHI3),
    "starcoder2": _always(_STARCODER2),
    "gpt_neox": _gpt_neox,
    "gpt2": _always(_GPT2),
    "opt": _opt,
    **dict.fromkeys(("t5", "mt5"), _t5),
    "umt5": partial(_t5, scales="tie_word_embeddings"),
    **dict.fromkeys(("bart", "plbart"), _always(_bart(post_norm=True, embed_norm=True, offset=2))),
    "mbart": _always(_bart(post_norm=False, embed_norm=True, offset=2)),
    **dict.fromkeys(("blenderbot", "pegasus"), _always(_bart(post_norm=False, embed_norm=False, offset=0))),
    "marian": _always(_bart(post_norm=True, embed_norm=False, offset=0)),
    "bert": _always(_bert("bert.encoder")),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _always(_bert("roberta.encoder"))),
    "electra": _always(_bert("electra.encoder")),
    "distilbert": _always(_DISTILBERT),
}

"""The fused loss: a batch's losses as a function of the batch and a table of vectors, for any described family."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ia3.architectures import Architecture, Stack, architecture_of, has_learned_positions
from ia3.fast import batch
from ia3.fast.batch import Packed
from ia3.fast.block import Inputs, Run
from ia3.fast.guard import own_forward
from ia3.fast.layers import Weights, missing_part, unexpected_site
from ia3.fast.linear import Precision, plain_linear
from ia3.fast.ops.backend import Backend, backend_for, with_partials
from ia3.fast.ops.cross_entropy import head_losses, token_losses
from ia3.fast.ops.dropout import dropout
from ia3.fast.own import Gather, answered, own_loss
from ia3.fast.positions import Positions
from ia3.fast.ragged import IGNORE_INDEX, Ragged
from ia3.quantised import first_quantised
from ia3.sites import Layout, Site

# Positions turn by the same angles whatever the batch; of the others, longrope's and dynamic's depend on its length.
_FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn", "proportional"}


def unsupported_reason(model: Any, sites: Sequence[Site]) -> str | None:
    """Why this model's loss can't be fused; None where it can.

    Args:
        model: any model.
        sites: the active adapter's.
    """
    architecture, config = architecture_of(model), getattr(model, "config", None)
    if architecture is None:
        return f"a {getattr(config, 'model_type', type(model).__name__)} is not described"
    reason = architecture.unsupported(config) or _quantised(model) or _other_head(model, architecture)
    if reason is not None:
        return reason
    return (
        missing_part(model, architecture)
        or _other_numbers(model, architecture)
        or unexpected_site(model, architecture, sites)
    )


def seq2seq_unsupported_reason(model: Any, sites: Sequence[Site]) -> str | None:
    """Why this model has no fused encoder and decoder; None where it has them."""
    architecture = architecture_of(model)
    if architecture is not None and architecture.mode != "seq2seq":
        return f"a {type(model).__name__} is no encoder-decoder"
    return unsupported_reason(model, sites)


def front_of(model: Any) -> str | None:
    """The path of the encoder whose blocks are fused below the model's own head; None where the head is fused too."""
    architecture = architecture_of(model)
    return None if architecture is None else architecture.front or None


def _quantised(model: Any) -> str | None:
    found = first_quantised(model)
    return None if found is None else f"the weight of {found[0]} is {found[1]}, and the products are of plain weights"


def _other_head(model: Any, architecture: Architecture) -> str | None:
    """Why what follows the blocks is another."""
    from transformers.models.auto import modeling_auto

    kind, names = type(model).__name__, {cls.__name__ for cls in type(model).__mro__}
    if architecture.mode == "encoder":
        return None if hasattr(model, architecture.front.split(".")[0]) else f"a {kind} has no head"
    mapping: Mapping[str, Any] = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if architecture.mode == "causal"
        else modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )
    expected = mapping.get(model.config.model_type)
    if expected not in names:
        return f"it is written for {expected}, and this is a {kind}"
    own = vars(model)
    if architecture.mode == "causal" and (
        own.get("_loss_function") is not None or own.get("loss_type") not in (None, "ForCausalLM")
    ):
        return "its loss is another"
    return None


def _other_numbers(model: Any, architecture: Architecture) -> str | None:
    """What of a model's numbers the block doesn't compute, and a comparison without dropout doesn't show."""
    if architecture.mode == "seq2seq" and model.dtype is torch.float16:
        return "its weights are float16, in which its own forward clamps what overflows"
    if architecture.rotary is not None:
        kinds = model.get_submodule(architecture.rotary).rope_type
        other = set(kinds.values() if isinstance(kinds, dict) else [kinds]) - _FIXED_ROTATIONS
        if other:
            return f"its positions are {other.pop()!r}, and depend on the batch"
    names = vars(architecture.dropouts).values()
    rates = {float(getattr(model.config, name) or 0) for name in names if name not in (None, "residual")}
    front = architecture.front
    for path, module in model.named_modules():
        if not path.startswith(front):
            continue
        own = vars(module)
        found = [module.p] if isinstance(module, nn.Dropout) else [own.get("dropout"), own.get("attention_dropout")]
        for rate in found:
            if isinstance(rate, float) and rate not in rates:
                return f"dropout of {path} is {rate}, and the configuration says {' or '.join(map(str, sorted(rates)))}"
    return None


@dataclass(frozen=True)
class Readers:
    """Answers that read one input together, those of an input next to each other, in the inputs' order.

    Args:
        before: how many answers the inputs before read, `[inputs + 1]`, int32.
        answers: all of them; what is more than `before` says fills up.
        most: no input has more.
    """

    before: Tensor
    answers: int
    most: int


class FusedLoss:
    """The losses of a batch as a function of the batch and a table of vectors.

    Args:
        model: one for which `unsupported_reason` has nothing to say; its weights are fused.
        layout: the active adapter's.
        recompute: keep the residual stream alone for the backward, and compute what is inside a layer again.
        frozen: what the blocks' frozen weights are multiplied in; the head's stay as they are.

    Attributes:
        folded: weights that were copied, so that a change in place would go unnoticed.
        drops: whether dropout drops anything in training.

    Raises:
        ValueError: recompute under attention dropout of rotary models; widths that the products can't take.
    """

    def __init__(self, model: Any, layout: Layout, *, recompute: bool = False, frozen: Precision | None = None) -> None:
        architecture = architecture_of(model)
        assert architecture is not None
        self.model, self.config, self.layout, self.recompute = model, model.config, layout, recompute
        self.architecture: Architecture = architecture
        self.weights = Weights(model, architecture, layout, frozen)
        self.positions = Positions(model, architecture)
        self.drops = True
        self.folded = [*self.positions.folded, *self.weights.folded]
        draws = self.weights.rate(architecture.dropouts.attention)
        if recompute and architecture.rotary is not None and draws:
            raise ValueError("Attention dropout can't be computed again: set attention_dropout to 0, or not recompute.")
        if recompute and architecture.parallel and self.weights.rate(architecture.dropouts.residual):
            raise ValueError("Dropout of parallel layers can't be computed again: set it to 0, or not recompute.")

    @property
    def classes(self) -> int:
        """What a label is one of: the words of a language head, or the classes of an encoder's own."""
        if self.architecture.mode == "encoder":
            return int(self.config.num_labels)
        return len(self.model.get_output_embeddings().weight)

    # Batches

    def pack(self, tensors: Mapping[str, Tensor]) -> Packed:
        """Leave out the padding.

        Raises:
            ValueError: a batch that only the model's own forward takes.
        """
        positions = has_learned_positions(self.architecture)
        if self.architecture.mode == "causal":
            return batch.pack_causal(tensors, positions=positions, left_padded=self.architecture.left_padded)
        if self.architecture.mode == "seq2seq":
            return batch.pack_seq2seq(tensors, positions=positions)
        return batch.pack_encoder(tensors)

    def round_up(self, packed: Packed, examples: int, parts: int = batch.PARTS) -> Packed:
        """To one of few shapes; `examples` as many as the largest batch has, `parts` as in `batch.round_up`."""
        return batch.round_up(packed, examples, getattr(self.config, "pad_token_id", None) or 0, parts)

    # The loss

    @property
    def backend(self) -> Backend:
        weight: Tensor = self.model.get_input_embeddings().weight
        return backend_for(weight, self.weights.activation)

    def __call__(self, packed: Packed, table: Tensor) -> Tensor:
        """The mean loss of each group's label tokens, `[groups]`, 0 for a group without any.

        Args:
            packed: the batch, the examples of one group after those of another, equally many.
            table: a row of vectors a group, `[groups, D]`; an encoder's has one.

        Raises:
            ValueError: the examples can't be divided into the table's groups.
        """
        ragged, run = packed.ragged(len(table)), self.run(self._split(table))
        compute = {"causal": self._causal, "seq2seq": self._seq2seq, "encoder": self._encoder}[self.architecture.mode]
        return compute(run, packed, ragged)

    def run(self, slices: Sequence[Tensor]) -> Run:
        """A forward with these vectors, one a site, `[partials, groups, width]`."""
        return Run(self.weights, self.positions, slices, self.backend, recompute=self.recompute, drops=self.drops)

    def _split(self, table: Tensor) -> tuple[Tensor, ...]:
        return self.layout.split(with_partials(table, self.backend))

    def _causal(self, run: Run, packed: Packed, ragged: Ragged) -> Tensor:
        (stack,), (blocks,) = self.architecture.stacks, self.weights.stacks
        x = self.embed(run, stack, packed["tokens"], packed.tensors.get("positions"))
        y = run.through(blocks, x, Inputs(ragged, ragged))
        head, at, labels = self.model.get_output_embeddings(), packed["label_at"], packed["labels"]
        scale = self.architecture.logits_scale(self.config)
        losses = head_losses(y, head.weight, head.bias, at, labels, run.backend, scale=scale, softcap=self._softcap)
        group = ragged.group_of_token[at]
        own = group == torch.arange(ragged.groups, device=group.device)[:, None]
        counted = own & (labels != IGNORE_INDEX)
        return (losses * own).sum(1) / counted.sum(1).clamp(min=1)

    @property
    def _softcap(self) -> float | None:
        name = self.architecture.logits_softcap
        found: float | None = None if name is None else getattr(self.config, name)
        return found

    def _seq2seq(self, run: Run, packed: Packed, source: Ragged) -> Tensor:
        labels = packed["labels"]
        target = Ragged.even(len(labels), labels.shape[1], source.groups, labels.device)
        kv = self.read_source(run, packed, source)
        logits = self._write(run, self.decoder_inputs(labels), Inputs(target, target, kv, source))
        losses = token_losses(logits, labels, run.backend).view(source.groups, -1)
        return losses.sum(1) / (labels != IGNORE_INDEX).view(source.groups, -1).sum(1).clamp(min=1)

    def _encoder(self, run: Run, packed: Packed, ragged: Ragged) -> Tensor:
        (blocks,) = self.weights.stacks

        def encode(hidden: Tensor) -> Tensor:
            token_at, slot_of = packed["token_at"], packed["slot_of"]
            x: Tensor = Gather.apply(hidden.flatten(0, 1), token_at, slot_of)  # type: ignore[no-untyped-call]
            y = run.through(blocks, x, Inputs(ragged, ragged))
            padded: Tensor = Gather.apply(y, slot_of, token_at)  # type: ignore[no-untyped-call]
            return padded.view_as(hidden)

        return own_loss(answered(self.model, self.architecture.front, encode), packed.tensors)[None]

    def encoded(self, x: Tensor, ragged: Ragged, table: Tensor) -> Tensor:
        """What an encoder's blocks make of its embeddings, both `[tokens, width]`.

        Args:
            x: what the model's own embeddings give the blocks.
            ragged: where the examples are.
            table: as in the loss.
        """
        (blocks,) = self.weights.stacks
        return self.run(self._split(table)).through(blocks, x, Inputs(ragged, ragged))

    def log_probabilities(
        self, packed: Packed, choices: Tensor, table: Tensor, readers: Readers | None = None
    ) -> Tensor:
        """The log-probability of each token of each choice after each input, `[answers, choices, length]`.

        The encoder runs once an input, and its keys and values serve all that reads it, whose tokens are more queries:
        the choices of an answer, and several answers with vectors of their own in the decoder.

        Args:
            packed: a seq2seq model's inputs; its labels only say how many there are.
            choices: `[choices, length]`, -100 after a choice's end.
            table: a row of vectors for all answers or for each; those that read one input have the same in the encoder.
            readers: None for one answer an input.
        """
        count, length = choices.shape
        if readers is None:
            of_inputs, answers = table, packed.examples
            together = Ragged.even(answers, count * length, len(table), choices.device)
        else:
            answers, size = readers.answers, count * length
            first = readers.before[:-1].clamp(max=answers - 1)
            of_inputs = table if len(table) == 1 else table.index_select(0, first)
            together = Ragged(readers.before * size, readers.most * size, answers * size)
        source, reading = packed.ragged(len(of_inputs)), self.run(self._split(of_inputs))
        kv, labels = self.read_source(reading, packed, source), choices.repeat(answers, 1)
        writing = reading if of_inputs is table else self.run(self._split(table))
        alone = Ragged.even(answers * count, length, len(table), choices.device)
        logits = self._write(writing, self.decoder_inputs(labels), Inputs(alone, together, kv, source))
        return -token_losses(logits, labels, writing.backend).view(answers, count, length)

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """What a decoder reads for labels `[rows, length]`, the same."""
        own, config = getattr(self.model, "prepare_decoder_input_ids_from_labels", None), self.config
        if own is None:
            module: Any = sys.modules[own_forward(self.model.__class__).__module__]
            own = partial(
                module.shift_tokens_right,
                pad_token_id=config.pad_token_id,
                decoder_start_token_id=config.decoder_start_token_id,
            )
        found: Tensor = own(labels)
        return found

    def embed(self, run: Run, stack: Stack, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """`[tokens]` to `[tokens, width]`."""
        x = self.model.get_submodule(stack.embed)(tokens)
        scale = getattr(self.model.get_submodule(stack.blocks.rpartition(".")[0]), "embed_scale", None)
        if scale is not None:
            x = x * scale
        if stack.positions is not None:
            assert positions is not None
            path, offset = stack.positions
            x = x + self.model.get_submodule(path).weight[positions + offset]
        if stack.embed_norm is not None:
            x = self.weights.norm(stack.embed_norm)(x)
        return dropout(x, run.rate(self.architecture.dropouts.embed))

    def read_source(self, run: Run, packed: Packed, source: Ragged) -> Tensor:
        """The keys and values of all attentions across, `[source tokens, layers · 2 · inner]`."""
        x = self.embed(run, self.architecture.stacks[0], packed["tokens"], packed.tensors.get("positions"))
        y = run.through(self.weights.stacks[0], x, Inputs(source, source))
        assert self.weights.cross_kv is not None
        return self.weights.cross_kv(dropout(y, run.rate(self.architecture.dropouts.final)))

    def _write(self, run: Run, ids: Tensor, inputs: Inputs) -> Tensor:
        """The logits of a decoder's tokens, `[tokens, vocabulary]`.

        Args:
            run: this forward.
            ids: `[rows, length]`.
            inputs: what they see.
        """
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).flatten()
        x = self.embed(run, self.architecture.stacks[1], ids.flatten(), positions)
        y = run.through(self.weights.stacks[1], x, inputs)
        return self.logits(dropout(y, run.rate(self.architecture.dropouts.final)))

    def logits(self, y: Tensor) -> Tensor:
        """Of what the last norm returns: `[tokens, width]` to `[tokens, vocabulary]`."""
        head, scale = self.model.get_output_embeddings(), self.architecture.logits_scale(self.config)
        logits = plain_linear(head.weight, head.bias)(y if scale == 1.0 else y * scale)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        bias = getattr(self.model, "final_logits_bias", None)
        return logits if bias is None else logits + bias

"""A fused loss as all of its users need it: batches packed, rounded up, captured, guarded and compared, in one place.

The training step, the forward of an own loop, the scores of answers and the steps of a sweep each add what is only
theirs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from ia3.adapter import vectors
from ia3.fast import fused
from ia3.fast.batch import Packed
from ia3.fast.capture import GraphedCallable
from ia3.fast.compare import Numbers, beginnings, difference, in_less_memory, surprising, telling_examples
from ia3.fast.guard import NOT_ALONE, Guard, own_forward, unsupported_modules
from ia3.fast.linear import Fp8Linear, Precision
from ia3.fast.ops.launch import start_compiling
from ia3.fast.ragged import IGNORE_INDEX
from ia3.sites import Layout
from ia3.state import Adapter, sole_active_adapter

# Of so many tokens attention's scores take much memory.
_LONG = 512


def unsupported_reason(model: Any) -> str | None:
    """Why a model in training has no fused loss; None where it has one.

    Args:
        model: one with adapters.
    """
    adapter = sole_active_adapter(model)
    if adapter is None:
        return NOT_ALONE
    reason = unsupported_at(model, adapter.layout)
    if reason is not None:
        return reason
    own, front = {id(vector) for vector in vectors(model, adapter)}, fused.front_of(model)
    for name, parameter in model.named_parameters():
        is_vector = id(parameter) in own
        if is_vector and not parameter.requires_grad:
            return f"{name} is not trained"
        # What stands around the blocks of an encoder is the model's own, and is trained as ever.
        if parameter.requires_grad and not is_vector and (front is None or name.startswith(f"{front}.")):
            return f"{name} is trained"
    return None


def unsupported_at(model: Any, layout: Layout) -> str | None:
    """Why there is no fused loss of a model with vectors at a layout's sites; None where there is one."""
    return fused.unsupported_reason(model, layout.sites) or unsupported_modules(model, fused.front_of(model) or "")


class GraphedLoss:
    """The fused loss of a model with one adapter, and its gradient; on a GPU captured once a shape and replayed.

    Args:
        model: one for which `unsupported_reason` has nothing to say; its weights are fused. It is not kept
            alive.
        adapter: None for the one that acts.
        others: what the loss trains besides the adapter's vectors.
        recompute: see `compile_step`.
        frozen: see `compile_step`.

    Attributes:
        guard: whether what is computed is still right.
        vectors: the adapter's, one a site.
        cuts: where they are in a flat `[D]`.
        lock: held while a graph, which has one place for its inputs, is filled, replayed and read.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter | None = None,
        *,
        others: Sequence[Parameter] = (),
        recompute: bool = False,
        frozen: Precision | None = None,
    ) -> None:
        adapter = adapter or sole_active_adapter(model)
        assert adapter is not None
        self.model: Any = weakref.proxy(model)
        self.device: torch.device = model.device
        self.fp8 = frozen == "fp8"
        self.layout, self.vectors, self.others = adapter.layout, vectors(model, adapter), tuple(others)
        self.cuts = Cuts([vector.shape for vector in self.vectors])
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in (*self.vectors, *self.others)]
        self.losses = fused.FusedLoss(self.model, self.layout, recompute=recompute, frozen=frozen)
        # Not a method, which would keep this alive in a circle until garbage is collected.
        self.compute: Callable[..., tuple[Tensor, ...]] = partial(
            _loss_and_gradients, self.losses, self.layout, self.vectors, self.others
        )
        self.guard = Guard(model, self.losses.folded)
        self.lock = threading.Lock()
        self.captures = self.device.type == "cuda"
        self.most_examples = 0
        self.compared: set[tuple[bool, bool]] = set()

    # Batches

    def pack(self, batch: Mapping[str, Tensor]) -> Packed:
        """A batch without its padding, on the CPU.

        Args:
            batch: what the model's forward takes, labels among it, best on the CPU; one transfer fetches it from a GPU.

        Raises:
            ValueError: what the loss doesn't take, `decoder_input_ids` that are not the labels moved by one among it.
        """
        batch = fetched(batch)
        if "input_ids" in batch:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        given = batch.pop("decoder_input_ids", None)
        if given is not None and not torch.equal(given, self.losses.decoder_inputs(batch["labels"])):
            raise ValueError(
                "The batch's decoder_input_ids are not its labels moved by one, which this step takes: leave them "
                "out, or train with the model's own forward."
            )
        return self.losses.pack(batch)

    def round_up(self, packed: Packed, examples: int) -> Packed:
        """A packed batch filled up to one of few shapes, where it is captured.

        Args:
            packed: from `pack`.
            examples: as many as the largest batch has.
        """
        return self.losses.round_up(packed, examples) if self.captures else packed

    # Computing

    def run(self, computation: GraphedCallable, packed: Packed) -> tuple[Tensor, ...]:
        """Copies of what a computation of a packed batch leaves.

        Args:
            computation: takes whether the model is in training, `packed.fixed` and the packed tensors, as `compute`
                does, and returns a tuple of tensors.
            packed: from `pack`.
        """
        with self.lock:
            packed = self._filled_up(computation, packed)
            found = computation(self.model.training, *packed.fixed, **packed.tensors)
            return tuple(tensor.clone() for tensor in found)

    def replay(self, computation: GraphedCallable, packed: Packed) -> tuple[Tensor, ...] | None:
        """As `run`, for one who looks at the guard afterwards, while a GPU computes.

        Only a recorded graph that reads memory where it was goes ahead: at worst its numbers are for nothing.

        Returns:
            None where the guard comes first.
        """
        if self._kind(packed) not in self.compared:
            return None
        with self.lock:
            packed = self._filled_up(computation, packed)
            fixed = (self.model.training, *packed.fixed)
            if not (computation.is_recorded(*fixed, **packed.tensors) and self.guard.is_in_place()):
                return None
            return tuple(tensor.clone() for tensor in computation(*fixed, **packed.tensors))

    def _filled_up(self, computation: GraphedCallable, packed: Packed) -> Packed:
        """To the shape of a graph, where there are any."""
        if not computation.captures:
            return packed
        self.most_examples = max(self.most_examples, packed.examples)
        return self.round_up(packed, self.most_examples)

    def graphed(self) -> GraphedCallable:
        """`compute`, captured: the loss, the vectors `[D]`, their gradient `[D]`, and those of what else is trained."""
        return GraphedCallable(self.compute, self.device, warm_up=self.compute)

    # Comparing

    def difference(self, batch: Mapping[str, Tensor], packed: Packed) -> str | None:
        """In what the loss of a kind of batch that comes for the first time is not the model's own; None if in nothing.

        Args:
            batch: as given to `pack`.
            packed: from `pack`.
        """
        kind = self._kind(packed)
        if kind in self.compared or (self.captures and torch.cuda.is_current_stream_capturing()):
            return None
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            batch = {name: tensor.clone() for name, tensor in fetched(batch).items() if name != "decoder_input_ids"}
            mask = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            examples = telling_examples(mask.sum(1), (batch["labels"] != IGNORE_INDEX).view(len(mask), -1).any(1))
            if not examples:
                return None
            reason = in_less_memory(partial(self._difference_of, batch), examples)
        self.compared.add(kind)
        return reason

    def _kind(self, packed: Packed) -> tuple[bool, bool]:
        """What is compared once."""
        return bool(self.model.training), bool(packed.uniform)

    def telling_part(self, batch: Mapping[str, Tensor], examples: Sequence[int]) -> dict[str, Tensor]:
        """What of a batch is compared: the beginnings of some examples, under other labels."""
        # Eight bits are multiplied where tokens are many; a window shows in what is longer.
        tokens = 2 * Fp8Linear.many_rows if self.fp8 else None
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        few = {name: tensor[list(examples)] for name, tensor in batch.items()}
        chosen = beginnings(few, tokens=tokens, window=window)
        return {**chosen, "labels": surprising(chosen["labels"], self.losses.classes)}

    def _difference_of(self, batch: Mapping[str, Tensor], examples: Sequence[int]) -> str | None:
        model: Any = self.guard.root()
        chosen = self.telling_part(batch, examples)
        packed = self.round_up(self.losses.pack(chosen), len(examples))
        tensors = {name: tensor.to(self.device) for name, tensor in packed.tensors.items()}
        compute = partial(self.compute, False, *packed.fixed, **tensors)
        with self.without_dropout():
            # While the model's own numbers are computed. The kernels are those of training.
            wait = start_compiling(compute, self.device)
            fused, own = partial(_fused_numbers, compute, wait), partial(self._own_numbers, model, chosen)
            return difference(model, fused, own, dtype=model.dtype, fp8=self.fp8)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """As a comparison needs it; of the model's own forward `compare.difference` takes it away."""
        self.losses.drops = False
        try:
            yield
        finally:
            self.losses.drops = True

    def _own_numbers(self, model: Any, batch: Mapping[str, Tensor], moved: float) -> Numbers:
        sent = {name: tensor.to(self.device) for name, tensor in batch.items()}
        copies = [moved_by(parameter.detach(), moved) for parameter in (*self.vectors, *self.others)]
        named = {f"model.{name}": copy for name, copy in zip(self.names, copies, strict=True)}
        with _few_kernels(self.device, batch["labels"].shape[-1], batch["attention_mask"].shape[-1]):
            loss = torch.func.functional_call(_OwnForward(model), named, (), {**sent, "return_dict": True}).loss
            gradients = torch.autograd.grad(loss, copies, materialize_grads=True)
        return loss, torch.cat([gradient.flatten() for gradient in gradients])


class Cuts:
    """Where tensors are in a flat one.

    Args:
        shapes: theirs, in their order.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.sizes = [shape.numel() for shape in shapes]
        # Columns, which vectors at outputs are, come out of one cut as they are.
        self.others = [None if shape[1:] == (1,) else shape for shape in shapes]

    def apart(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, each in its shape."""
        columns = flat[:, None].split_with_sizes(self.sizes)
        return [
            column if shape is None else column.view(shape) for column, shape in zip(columns, self.others, strict=True)
        ]


def _few_kernels(device: torch.device, *lengths: int) -> AbstractContextManager[object]:
    """With attention in plain products: to load PyTorch's fused kernels for it may take a GPU's host seconds, once.

    Long inputs need them for their memory.
    """
    if device.type != "cuda" or max(lengths) > _LONG:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def moved_by(tensor: Tensor, part: float) -> Tensor:
    """A leaf whose numbers are this part of themselves larger and smaller, in turns."""
    signs = torch.ones_like(tensor)
    signs.view(-1)[1::2] = -1
    return (tensor * (1 + part * signs)).requires_grad_()


class _OwnForward(nn.Module):
    """A model's own forward as a module's, so that parameters can be replaced for it alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return own_forward(type(self.model))(self.model, **kwargs)


def _fused_numbers(compute: Callable[[], tuple[Tensor, ...]], wait: Callable[[], None]) -> Numbers:
    """What `GraphedLoss.compute` leaves, once its kernels are compiled."""
    wait()
    loss, _, *gradients = compute()
    return loss, torch.cat([gradient.flatten() for gradient in gradients])


def _loss_and_gradients(
    losses: Callable[..., Tensor], layout: Layout, held: Sequence[Tensor], others: Sequence[Tensor], training: bool,
    *fixed: Any, **tensors: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss of a packed batch, the vectors `[D]`, their gradient `[D]`, and each other's.

    The mode is the model's own already; `training` only tells graphs apart.
    """
    flat = layout.flatten([vector.detach() for vector in held]).requires_grad_()
    loss = losses(Packed(tensors, *fixed), flat[None]).sum()
    gradients = torch.autograd.grad(loss, [flat, *others], materialize_grads=True)
    return loss.detach(), flat.detach(), *gradients


def trained_besides(model: nn.Module, held: Sequence[Tensor]) -> list[Parameter]:
    """What a model trains besides an adapter's vectors."""
    own = {id(vector) for vector in held}
    return [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]


def fetched(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's tensors on the CPU; whole numbers from a GPU come in one transfer, for which a host waits once."""
    away = {name: tensor for name, tensor in batch.items() if tensor.device.type != "cpu"}
    if len(away) < 2 or any(tensor.is_floating_point() for tensor in away.values()):
        return {name: tensor.cpu() for name, tensor in batch.items()}
    sizes = [tensor.numel() for tensor in away.values()]
    parts = torch.split(torch.cat([tensor.flatten().long() for tensor in away.values()]).cpu(), sizes)
    return {**batch, **{name: part.view(away[name].shape) for name, part in zip(away, parts, strict=True)}}

"""The hot path: two hooks that multiply an activation, and the vectors that they find on the module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ia3.layers import NoSingleTensorError, channel_dims, check_numbers, find_tensor, put_tensor, take_tensor
from ia3.rows import running
from ia3.sites import VECTORS, Side, Site


class SiteVectors(nn.Module):
    """The vectors of one module, one `Parameter` an adapter, named after it: `….k.ia3_l.default`.

    `input_vectors` and `output_vectors` are tuples of the active adapters' parameters. Switching adapters re-points
    them: a compiled graph takes the tensors as inputs and stays valid, which a look-up by name would not allow.
    The parameters themselves stay the truth, and outside of a compiler the hooks read them by name, so that
    whoever puts others in their place for a call (`torch.func.functional_call`, a replica, `torch.export`, which would
    make constants of the tuples) is heard.
    """

    input_vectors: tuple[nn.Parameter, ...]
    output_vectors: tuple[nn.Parameter, ...]
    channels: torch.Tensor | None

    def __init__(self, trailing_dims: int, module_path: str = "") -> None:
        super().__init__()
        self.module_path = module_path
        self.trailing_dims = trailing_dims  # dimensions of the activation after its channels: a convolution's
        self.sides: dict[str, Side] = {}
        self.active: tuple[str, ...] = ()
        self.input_vectors = self.output_vectors = ()
        self.register_buffer("channels", None, persistent=False)
        self.width = 0

    def add(self, adapter: str, site: Site, vector: torch.Tensor, device: torch.device) -> None:
        """Hold a vector of `site.trained_shape` for an adapter, frozen until it is activated.

        `device` is the module's, which that of a vector without memory is not.
        """
        if site.intervals is not None and self.channels is None:
            self.channels = site.channels().to("cpu" if device.type == "meta" else device)
            self.width = site.width
        self.sides[adapter] = site.side
        self.register_parameter(adapter, nn.Parameter(vector, requires_grad=False))

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._parameters

    def __getitem__(self, adapter: str) -> nn.Parameter:
        """An adapter's vector, as of PEFT's dictionary of that name."""
        return self._parameters[adapter]  # type: ignore[return-value]

    def keys(self) -> list[str]:
        """The adapters that have a vector here."""
        return list(self._parameters)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {vector.numel()} {self.sides[name]}s{', active' if name in self.active else ''}"
            for name, vector in self._parameters.items()
            if vector is not None
        )

    def remove(self, adapter: str) -> None:
        del self.sides[adapter], self._parameters[adapter]
        self.activate(name for name in self.active if name != adapter)

    def activate(self, adapters: Iterable[str]) -> None:
        """Make these adapters act, those that have a vector here."""
        self.active = tuple(name for name in adapters if name in self._parameters)
        self._point()

    def _point(self) -> None:
        for side in ("input", "output"):
            vectors = tuple(self._parameters[name] for name in self.active if self.sides[name] == side)
            self.__dict__[f"{side}_vectors"] = vectors

    def __setattr__(self, name: str, value: Any) -> None:
        # Sharding and `load_state_dict(assign=True)` set the attribute; FSDP2 does so before each forward.
        super().__setattr__(name, value)
        if name in self.__dict__.get("_parameters", ()):
            self._point()

    def _apply(self, fn: Any, recurse: bool = True) -> SiteVectors:
        channels = self.channels
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if channels is not None and self.channels is not None:
            self.channels = channels.to(self.channels.device)  # whatever the function makes of numbers
        self._point()
        return self

    def acting(self, side: Side, compiling: bool) -> Sequence[torch.Tensor]:
        """The active vectors of one side."""
        vectors = self.input_vectors if side == "input" else self.output_vectors
        if not vectors or (compiling and not torch.compiler.is_exporting()):
            return vectors
        held = self._parameters  # a replica holds its tensors as plain attributes
        return [
            held[name] if name in held else getattr(self, name)  # type: ignore[misc]
            for name in self.active
            if self.sides[name] == side
        ]

    def scale(self, vectors: Sequence[torch.Tensor], activation: torch.Tensor) -> torch.Tensor:
        """The activation `[…, width]` (channels first: `[width, …]`) times the vectors.

        Raises:
            TypeError: the activation is not of floating-point or complex numbers, or has other channels.
        """
        check_numbers(activation)
        product = self.product_of(vectors)
        dims: tuple[int, ...] = (-1,)
        if not torch._C._get_tracing_state():  # it would write the comparison of shapes down
            dims = channel_dims(activation.shape, product.numel(), spatial=self.trailing_dims)
        return activation * product.view(*dims, *(1,) * self.trailing_dims).to(activation.dtype)

    def product_of(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The product of the vectors over every channel."""
        product = self._full(vectors[0])
        for vector in vectors[1:]:
            product = product * self._full(vector)
        return product

    def _full(self, vector: torch.Tensor) -> torch.Tensor:
        """A vector over the trained channels of a fused projection, among ones."""
        if self.channels is None:
            return vector
        if vector.shape[0] != self.channels.shape[0]:  # it holds every channel, or belongs to the input
            return vector.view(-1)
        ones = vector.new_ones(self.width)
        return ones.index_copy(0, self.channels, vector.view(-1))


def scale_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[Any, ...] | None:
    """Forward pre-hook: multiply the module's input `[…, width]`, its first argument or the only tensor it is given.

    A tool that carries hooks over to another module registers it without keywords.

    Raises:
        TypeError: there is no such tensor, or it can't be multiplied.
    """
    site = vectors_of(module)
    multiply = _multiplication(site, "input")
    if multiply is None:
        return None
    try:
        if args and isinstance(args[0], torch.Tensor):
            scaled = (multiply(args[0]), *args[1:])
            return scaled if kwargs is None else (scaled, kwargs)
        named = kwargs or {}
        name = find_tensor(named)
        return args, {**named, name: multiply(named[name])}
    except TypeError as error:
        raise TypeError(_unscaled(module, "was called with", error)) from error


def scale_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: multiply the module's output `[…, width]`, or the only tensor of the tuple that it answers with.

    Raises:
        TypeError: there is no such tensor, or it can't be multiplied.
    """
    multiply = _multiplication(vectors_of(module), "output")
    if multiply is None:
        return None
    try:
        tensor, place = take_tensor(output)
        return put_tensor(output, place, multiply(tensor))
    except TypeError as error:
        raise TypeError(_unscaled(module, "answered with", error)) from error


def _multiplication(site: SiteVectors, side: Side) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What multiplies an activation at this side now; None where nothing does."""
    compiling = torch.compiler.is_compiling()
    rows = None if compiling else running(site)
    if rows is not None:
        return partial(rows.scale, site, side, channels_first=site.trailing_dims > 0) if rows.has(site, side) else None
    vectors = site.acting(side, compiling)
    return partial(site.scale, vectors) if vectors else None


def _unscaled(module: nn.Module, how: str, error: TypeError) -> str:
    """An activation's error, with the path of its layer."""
    at = f"{vectors_of(module).module_path} ({type(module).__name__})"
    fault = f"{at} {how} {error}" if isinstance(error, NoSingleTensorError) else f"{at}: {error}"
    return f"{fault}. Leave this layer to exclude_modules."


def vectors_of(module: nn.Module) -> SiteVectors:
    """The module's vectors.

    Raises:
        RuntimeError: a tool made the module of another, with its hooks and without its vectors.
    """
    site: Any = module._modules.get(VECTORS)
    if site is None:
        raise RuntimeError(
            f"This {type(module).__name__} was made of a layer that carries an adapter's vectors, and has its hooks "
            "alone: call the whole model, whose forward brings them along, before a part of it."
        )
    return site  # type: ignore[no-any-return]

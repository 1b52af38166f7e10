"""The hot path: two hooks that multiply an activation, and the vectors that they find on the module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

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

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.view = (-1,) + (1,) * dims
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
        """The product of the vectors, shaped and cast for the activation `[…, width]` (channels first: `[width, …]`).

        Raises:
            TypeError: the activation is not floating-point.
        """
        if not activation.is_floating_point():
            raise TypeError(
                f"ia3 multiplies floating-point activations; this layer's is {activation.dtype}. Load the model "
                "so that its activations stay floating, or exclude the layer with exclude_modules."
            )
        return self.product(vectors).view(self.view).to(activation.dtype)

    def product(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
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


def scale_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook: multiply the module's first positional argument `[…, width]`."""
    site = vectors_of(module)
    compiling = torch.compiler.is_compiling()
    rows = None if compiling else running(site)
    if rows is not None:
        scaled = rows.scale(site, "input", args[0], channels_first=len(site.view) > 1)
        return None if scaled is None else (scaled, *args[1:])
    vectors = site.acting("input", compiling)
    if not vectors:
        return None
    if not args:
        raise TypeError(
            f"{type(module).__name__} was called without a positional argument, so ia3 can't tell its input."
        )
    return (args[0] * site.scale(vectors, args[0]), *args[1:])


def scale_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    """Forward hook: multiply the module's output `[…, width]`."""
    site = vectors_of(module)
    compiling = torch.compiler.is_compiling()
    rows = None if compiling else running(site)
    if rows is not None:
        return rows.scale(site, "output", output, channels_first=len(site.view) > 1)
    vectors = site.acting("output", compiling)
    return output * site.scale(vectors, output) if vectors else None


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

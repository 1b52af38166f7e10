"""Giving an object a subclass of its own class, and taking it back.

An adapted model stays the object that it was: same class name, same keys, same `forward` signature. Its class
becomes a subclass of the old one and of a mixin that adds the adapter's methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ia3.rows import Rows, running, split_by_name

if TYPE_CHECKING:
    from torch.nn import Module as _Base  # what every swapped class also is
else:
    _Base = object


class Swapped(_Base):
    """Mixin of classes made by `swap`: pickles and copies as (old class, mixin, state)."""

    _ia3_old_class: type[nn.Module]
    _ia3_mixin: type[Swapped]

    @classmethod
    def members_over(cls, old: type[nn.Module]) -> dict[str, Any]:
        """What the swapped class has besides, which depends on the old one."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        if "_ia3_old_class" not in type(self).__dict__:
            return reduced  # another library swapped the class again: its business
        return (_new, (self._ia3_old_class, self._ia3_mixin), *reduced[2:])


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def swapped_class(old: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    """One class for each (old class, mixin), with the old one's name."""
    if (old, mixin) not in _CLASSES:
        namespace = {name: getattr(old, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace |= {"_ia3_old_class": old, "_ia3_mixin": mixin, **mixin.members_over(old)}
        _CLASSES[old, mixin] = type(old.__name__, (mixin, old), namespace)
    return _CLASSES[old, mixin]


def _new(old: type[nn.Module], mixin: type[Swapped]) -> nn.Module:
    return object.__new__(swapped_class(old, mixin))


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Change the module's class in place."""
    module.__class__ = swapped_class(type(module), mixin)


def swap_back(module: nn.Module, mixin: type[Swapped] | None = None) -> None:
    """Take a mixin, by default the last one, from the module's class, also where another was swapped in or a library
    made a subclass of the swapped one."""
    cls: Any = type(module)
    module.__class__ = _without(cls, mixin or cls._ia3_mixin)


def _without(cls: type[Any], mixin: type[Swapped]) -> type[Any]:
    if not issubclass(cls, mixin) or cls is mixin:
        return cls
    if "_ia3_old_class" not in cls.__dict__:
        bases = tuple(_without(base, mixin) for base in cls.__bases__)
        namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        return type(cls.__name__, bases, namespace)
    old: type[nn.Module] = cls.__dict__["_ia3_old_class"]
    return old if cls._ia3_mixin is mixin else swapped_class(_without(old, mixin), cls._ia3_mixin)


class SavedModule(Swapped):
    """A module trained in full: it runs the active adapter's copy of itself instead of itself.

    The copies are its children `modules_to_save.<adapter>`, so they move, shard and load with it; its own
    weights keep their keys and values. Of the adapters in a table it holds none: a batch brings them.
    """

    modules_to_save: nn.ModuleDict
    _ia3_active_copy: str | None
    _ia3_in_table: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = None if torch.compiler.is_compiling() else running(self)
        if rows is not None:
            return self._forward_by_rows(rows, *args, **kwargs)
        return self._forward_of(self._ia3_active_copy, *args, **kwargs)

    def _forward_of(self, copy: str | None, *args: Any, **kwargs: Any) -> Any:
        if copy is None:
            return super().forward(*args, **kwargs)
        chosen: Any = self.modules_to_save[copy]
        weight = next(self.parameters(recurse=True), None)
        its = next(chosen.parameters(), None)
        if weight is None or its is None or weight.dtype == its.dtype or torch.is_autocast_enabled(its.device.type):
            return chosen(*args, **kwargs)
        # A copy in fp32 inside a model of half precision.
        output = chosen(*_cast(args, weight.dtype, its.dtype), **_cast(kwargs, weight.dtype, its.dtype))
        return _cast(output, its.dtype, weight.dtype)

    @property
    def acting(self) -> nn.Module:
        """The active adapter's copy, or this module where there is none."""
        return self if self._ia3_active_copy is None else self.modules_to_save[self._ia3_active_copy]

    def _forward_by_rows(self, rows: Rows, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Each example through its own adapter's head or copy, or through this module where its adapter has none."""
        if not args or not isinstance(args[0], torch.Tensor) or len(args) > 1 or kwargs:
            raise ValueError(
                f"{type(self).__name__} takes more than one tensor, so a batch can't be split between the adapters' "
                "copies of it: run the adapters one after the other."
            )
        count = rows.rows_an_example(args[0])
        if self in rows.heads:
            return rows.heads[self](args[0].reshape(-1, count, *args[0].shape[1:]), training=self.training)
        output: Any = None
        for name, places in split_by_name(rows.names, count, args[0].device).items():
            copy = name if name in self.modules_to_save else None
            found = self._forward_of(copy, args[0][places])
            if output is None:
                output = found.new_zeros((args[0].shape[0], *found.shape[1:]))
            output = output.index_copy(0, places, found)
        whole: torch.Tensor = output
        return whole

    @staticmethod
    def wrap(module: nn.Module) -> SavedModule:
        """Make a module choose between itself and copies; harmless where it does already."""
        if isinstance(module, SavedModule):
            return module
        swap(module, SavedModule)
        wrapped: Any = module
        wrapped.modules_to_save = nn.ModuleDict()
        wrapped._ia3_active_copy = None
        wrapped._ia3_in_table = False
        assert isinstance(wrapped, SavedModule)
        return wrapped


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """The tensors of one precision in another, also within tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, dict):
        return type(value)({key: _cast(part, old, new) for key, part in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_cast(part, old, new) for part in value)
    return value

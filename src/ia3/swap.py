"""Giving an object a subclass of its own class, and taking it back.

An adapted model stays the object that it was: same class name, same keys, same `forward` signature. Its class
becomes a subclass of the old one and of a mixin that adds the adapter's methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.nn import Module as _Base  # what every swapped class also is
else:
    _Base = object


class Swapped(_Base):
    """Mixin of classes made by `swap`: pickles and copies as (old class, mixin, state)."""

    _ia3_old_class: type[nn.Module]
    _ia3_mixin: type[Swapped]

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
        namespace |= {"_ia3_old_class": old, "_ia3_mixin": mixin}
        _CLASSES[old, mixin] = type(old.__name__, (mixin, old), namespace)
    return _CLASSES[old, mixin]


def _new(old: type[nn.Module], mixin: type[Swapped]) -> nn.Module:
    return object.__new__(swapped_class(old, mixin))


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Change the module's class in place."""
    module.__class__ = swapped_class(type(module), mixin)


def swap_back(module: nn.Module) -> None:
    """Give the module its old class again, also where another library made a subclass of the swapped one."""
    cls = type(module)
    swapped = next(c for c in cls.__mro__ if "_ia3_old_class" in c.__dict__)
    old: type[nn.Module] = swapped.__dict__["_ia3_old_class"]
    if cls is swapped:
        module.__class__ = old
        return
    bases = tuple(old if base is swapped else base for base in cls.__bases__)
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, bases, namespace)


class SavedModule(Swapped):
    """A module trained in full: it runs the active adapter's copy of itself instead of itself.

    The copies are its children `modules_to_save.<adapter>`, so they move, shard and load with it; its own
    weights keep their keys and values.
    """

    modules_to_save: nn.ModuleDict
    _ia3_active_copy: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._ia3_active_copy is None:
            return super().forward(*args, **kwargs)
        return self.modules_to_save[self._ia3_active_copy](*args, **kwargs)

    @staticmethod
    def wrap(module: nn.Module) -> SavedModule:
        """Make a module choose between itself and copies; harmless where it does already."""
        if isinstance(module, SavedModule):
            return module
        swap(module, SavedModule)
        wrapped: Any = module
        wrapped.modules_to_save = nn.ModuleDict()
        wrapped._ia3_active_copy = None
        assert isinstance(wrapped, SavedModule)
        return wrapped

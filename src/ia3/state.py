"""What a model carries, in one place: its adapters, which of them act, and where all of it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from ia3.config import IA3Config
from ia3.errors import listed, shorten
from ia3.placement import Listener, Placement
from ia3.sites import Layout, Site
from ia3.stacked import Skeleton

_KEY = "_ia3"

Originals = dict[str, Tensor]
"""Parameter name to the value before merging, in CPU memory."""


@dataclass
class Adapter:
    """An adapter on a model: a name, a configuration, its sites, and the modules it trains in full."""

    name: str
    config: IA3Config
    layout: Layout
    saved: tuple[str, ...]


class Registry(Protocol):
    """More adapters of a model, registered by name instead of attached: an `AdapterTable`, for those below it."""

    layout: Layout
    """The union of the registered adapters' sites, whole ones."""
    capacity: int
    """The most adapters that one batch may use."""

    @property
    def skeletons(self) -> Mapping[str, Skeleton]:
        """The modules that any of the registered adapters trains in full, by path."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while a batch gathers its rows."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """Where a registered adapter has vectors; the lock must be held."""

    def gather(self, names: Sequence[str]) -> Tensor:
        """The rows of these names, a copy `[len(names), D]`; the lock must be held."""

    def gather_heads(self, names: Sequence[str]) -> dict[str, Mapping[str, Mapping[str, Tensor]]]:
        """By name what each of these adapters trains in full: tensors by path and name; the lock must be held."""

    def leave(self) -> None:
        """Forget all adapters and take the table off the model."""


@dataclass
class Attached:
    """What a model carries: its adapters, and which of them act.

    Args:
        adapters: by name.
        active: names of the adapters that act; the effect of several is their product.
        enabled: False inside `disable_adapter`.
        originals: the weights as they were before `merge_adapter`; None where nothing is merged.
        merged: names of the merged adapters.
        trained_before: names of the base parameters that required a gradient before attaching.
        input_gradients: whether attaching made the embeddings' output require a gradient.
        told_frozen: whether it was said that nothing of a model put in training mode trains.
        resting: names of the adapters' parameters that required a gradient before the adapters were disabled.
        table: more adapters, registered instead of attached; None where there are none.
        placement: where all that was put on the model is.
        heard: (adapter, whether in training), of which a forward was listened to.
        listener: the forward that is being listened to.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    originals: Originals | None = None
    merged: tuple[str, ...] = ()
    trained_before: tuple[str, ...] = ()
    input_gradients: bool = False
    told_frozen: bool = False
    resting: tuple[str, ...] = ()
    table: Registry | None = None
    placement: Placement = field(default_factory=Placement)
    heard: set[tuple[str, bool]] = field(default_factory=set)
    listener: Listener | None = None

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that act beside the weights: none while they are disabled or merged into these."""
        return self.active if self.enabled and self.originals is None else ()


def find_attached(model: nn.Module) -> Attached | None:
    """What the model carries, as it was left; None where it carries no adapter and no table."""
    found: Attached | None = model.__dict__.get(_KEY)
    return found


def attached(model: nn.Module) -> Attached:
    """What the model carries, found again where a tool replaced modules.

    Raises:
        ValueError: it carries no adapter.
    """
    found = find_attached(model)
    if found is None:
        raise ValueError(
            f"This {type(model).__name__} carries no adapter: call get_peft_model(model, config) or "
            "PeftModel.from_pretrained(model, path) first."
        )
    found.placement.settle(model)
    return found


def carry(model: nn.Module, state: Attached) -> None:
    """Let the model carry this."""
    model.__dict__[_KEY] = state


def carry_nothing(model: nn.Module) -> None:
    """Leave no trace of it."""
    del model.__dict__[_KEY]


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        ValueError: there is none.
    """
    adapters = attached(model).adapters
    if name not in adapters:
        raise ValueError(f"There is no adapter {shorten(name)} here; this model has [{listed(sorted(adapters), 10)}].")
    return adapters[name]


def sole_active_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that acts, where it is one alone and nothing is merged."""
    state = find_attached(model)
    acting = () if state is None else state.acting
    return state.adapters[acting[0]] if state is not None and len(acting) == 1 else None


class Configurations(dict[str, IA3Config]):
    """The adapters' configurations by name. One that is put in another's place is the adapter's from then on."""

    def __init__(self, state: Attached | None) -> None:
        self._adapters = {} if state is None else state.adapters
        super().__init__({name: adapter.config for name, adapter in self._adapters.items()})

    def __setitem__(self, name: str, config: IA3Config) -> None:
        if name not in self._adapters:
            raise ValueError(f"There is no adapter {name!r} here: add_adapter({name!r}, config) makes one.")
        self._adapters[name].config = config
        super().__setitem__(name, config)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("peft_config follows the adapters: call add_adapter(name, config) or delete_adapter(name).")

    __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

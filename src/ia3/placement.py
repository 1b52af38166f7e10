"""Where vectors and trained copies are on a model: put there, found again where a tool replaced modules, and listened
for, so that a vector that nothing reads is no secret.

A tool that quantises, wraps or prunes a model replaces modules, and what hung on the old ones would be gone. So the
model's own record holds what was put where, and looks before each forward whether it still is there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ia3.hooks import SiteVectors, scale_input, scale_output
from ia3.routed import RoutedExperts, hold_experts
from ia3.sites import SAVED_COPIES, VECTORS, Site, logger
from ia3.structure import layer_widths
from ia3.swap import SavedModule, swap_back

_TOKENS = itertools.count()
# Modules that only hold others: nobody calls them.
_HOLDERS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Place:
    """What was put on a module.

    Args:
        path: the module's.
        module: the module that stands there; for a trained copy the copy itself.
        held: the vectors of a site, or the copies of a module trained in full; None for a copy itself.
        widths: the channels of a site's layer, which another in its place must have, too.
    """

    path: str
    module: nn.Module
    held: SiteVectors | nn.ModuleDict | None
    widths: tuple[int | None, int] | None = None


@dataclass(frozen=True)
class _Links:
    """Which child a parent has by a name, in lists of equal length; the model's dictionary is held, not the model."""

    parents: list[dict[str, nn.Module | None]]
    names: list[str]
    children: list[nn.Module]

    def hold(self) -> bool:
        """Whether all are as they were: a pass in C, since every forward looks."""
        return list(map(dict.get, self.parents, self.names)) == self.children


@dataclass
class Placement:
    """What was put on a model.

    Args:
        places: sites, modules trained in full and their copies, by the path of what they hold.
        links: from the root down to every place; None until it is looked at.
        lost: places whose module was replaced by one that can't take its place, and why.
        lock: held while places change and while they are looked for.
        token: by which the model is told from others; a copy has its own.
    """

    places: dict[str, Place] = field(default_factory=dict)
    links: _Links | None = None
    lost: dict[str, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)
    token: str = field(default_factory=lambda: str(next(_TOKENS)))

    def __reduce__(self) -> tuple[type[Placement], tuple[dict[str, Place]]]:
        """A copy looks for its own links."""
        return Placement, (self.places,)

    # Putting there and taking away

    def container(self, path: str) -> SiteVectors:
        """The vectors at a site."""
        held = self.places[_vectors(path)].held
        assert isinstance(held, SiteVectors)
        return held

    def site_module(self, path: str) -> nn.Module:
        """The module at a site."""
        return self.places[_vectors(path)].module

    def saved_module(self, path: str) -> SavedModule:
        """A module trained in full."""
        module = self.places[_copies(path)].module
        assert isinstance(module, SavedModule)
        return module

    def copies(self, path: str) -> nn.ModuleDict:
        """The copies of a module trained in full."""
        held = self.places[_copies(path)].held
        assert isinstance(held, nn.ModuleDict)
        return held

    def hold_site(self, model: nn.Module, site: Site) -> SiteVectors:
        """The container of a site's module and its hook, made where they are missing."""
        with self.lock:
            if _vectors(site.path) not in self.places:
                module = model.get_submodule(site.path)
                held = SiteVectors(len(site.shape) - 2, site.path)
                module.add_module(VECTORS, held)
                self._add(Place(site.path, module, held, layer_widths(module)), _vectors(site.path))
            _hook(self.site_module(site.path), {site.side})
            return self.container(site.path)

    def release_site(self, path: str) -> None:
        """Take away the hooks that a site no longer needs, and the container where it holds nothing."""
        with self.lock:
            module, container = self.site_module(path), self.container(path)
            drop_idle_hooks(module)
            if not container.sides:
                module._modules.pop(VECTORS, None)
                self._forget(_vectors(path))

    def hold_copy(self, model: nn.Module, path: str, name: str, copy: nn.Module) -> None:
        """Let a module choose between itself and a copy."""
        with self.lock:
            wrapped = SavedModule.wrap(model.get_submodule(path))
            wrapped.modules_to_save[name] = copy
            self._add(Place(path, wrapped, wrapped.modules_to_save), _copies(path))
            self._add(Place(path, copy, None), f"{_copies(path)}.{name}")

    def release_copy(self, path: str, name: str) -> None:
        """Take a copy away; the last one gives the module its class back."""
        with self.lock:
            module, copies = self.saved_module(path), self.copies(path)
            del copies[name]
            self._forget(f"{_copies(path)}.{name}")
            if not len(copies):
                if not module._ia3_in_table:
                    unwrap(module)
                self._forget(_copies(path))

    def hold_head(self, model: nn.Module, path: str) -> SavedModule:
        """Let a module run the heads that a table's adapters bring, until `release_head`."""
        with self.lock:
            module = SavedModule.wrap(model.get_submodule(path))
            module._ia3_in_table = True
            return module

    def release_head(self, model: nn.Module, path: str) -> None:
        """Let a table's adapters bring no heads any more; without copies the module gets its class back."""
        with self.lock:
            module = model.get_submodule(path)
            assert isinstance(module, SavedModule)
            module._ia3_in_table = False
            if not len(module.modules_to_save):
                unwrap(module)

    def _add(self, place: Place, key: str) -> None:
        self.places[key] = place
        self.links = None

    def _forget(self, key: str) -> None:
        del self.places[key]
        self.lost.pop(key, None)
        self.links = None

    # Looking

    def settle(self, model: nn.Module) -> None:
        """Find again what a tool that replaced modules took from its place; what can't be found is in `lost`."""
        links = self.links  # another thread may forget them meanwhile
        if links is not None and not self.lost and links.hold():
            return
        with self.lock:
            self.lost.clear()
            moved = [key for key in sorted(self.places, key=lambda key: key.count(".")) if self._find_again(model, key)]
            self.links = _links(model, [place.module for key, place in self.places.items() if key not in self.lost])
            kinds = sorted({type(self.places[key].module).__name__ for key in moved})
        if moved:
            logger.warning(
                "%d modules that carry vectors or were trained in full were replaced (such as %s, by %s): what was "
                "trained came along.",
                len(moved),
                self.places[moved[0]].path,
                " and ".join(kinds),
            )

    def _find_again(self, model: nn.Module, key: str) -> bool:
        """Whether the module had to be found again, and was."""
        place = self.places[key]
        try:
            now = model.get_submodule(key if place.held is None else place.path)
        except AttributeError:
            self.lost[key] = "it is gone"
            return False
        if any(module is place.module for module in now.modules()):  # wrapped, if at all
            return False
        if place.held is None:
            # A copy trained in full is not the base's, so what changes the base leaves it as it is.
            parent, _, name = key.rpartition(".")
            model.get_submodule(parent)._modules[name] = place.module
        elif isinstance(place.held, nn.ModuleDict):
            _move_copies(place, now)
        elif place.widths != layer_widths(now):
            self.lost[key] = f"a {type(now).__name__} with other channels stands there"
            return False
        else:
            _move_vectors(place, now)
        return True

    def expect_all(self) -> None:
        """Refuse to go on without what was put on the model.

        Raises:
            RuntimeError: a module was replaced by one that can't take its place.
        """
        if not self.lost:
            return
        key, why = next(iter(self.lost.items()))
        path = self.places[key].path
        raise RuntimeError(
            f"{len(self.lost)} modules that carry an adapter's vectors were replaced or removed after it was attached "
            f"(such as {path}: {why}), so the model would run without them. Nothing is lost: save_pretrained(folder) "
            "writes what was trained. Change the base model first and attach the adapter then, or put the modules back."
        )


def _vectors(path: str) -> str:
    return f"{path}.{VECTORS}"


def _copies(path: str) -> str:
    return f"{path}.{SAVED_COPIES}"


def _links(model: nn.Module, modules: Iterable[nn.Module]) -> _Links:
    """Each module's links up to the model, each once."""
    above = _parents(model)
    links = _Links([], [], [])
    seen: set[nn.Module] = {model}
    for module in modules:
        while module not in seen and module in above:
            seen.add(module)
            parent, name = above[module]
            links.parents.append(parent._modules)
            links.names.append(name)
            links.children.append(module)
            module = parent
    return links


def _parents(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """The first parent of each module below a model, and the module's name there."""
    above: dict[nn.Module, tuple[nn.Module, str]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                above.setdefault(child, (parent, name))
    return above


def _move_vectors(place: Place, now: nn.Module) -> None:
    """Take a site's vectors to the module that stands there now; a copy of the old one brings its own."""
    old, held = place.module, place.held
    assert isinstance(held, SiteVectors)
    own = now._modules.get(VECTORS)
    if isinstance(own, SiteVectors) and own.sides == held.sides:
        place.held = held = own
    else:
        now.add_module(VECTORS, held)
    old._modules.pop(VECTORS, None)
    drop_idle_hooks(old)
    _hook(now, set(held.sides.values()))
    place.module = now


def _move_copies(place: Place, now: nn.Module) -> None:
    """Let the module that stands there now choose between itself and the copies."""
    old, copies = place.module, place.held
    assert isinstance(old, SavedModule)
    assert isinstance(copies, nn.ModuleDict)
    is_copied = isinstance(now, SavedModule) and set(now.modules_to_save) == set(copies)
    wrapped = SavedModule.wrap(now)
    if is_copied:
        place.held = wrapped.modules_to_save
    else:
        wrapped.modules_to_save = copies
    wrapped._ia3_active_copy = old._ia3_active_copy
    place.module = wrapped


def _hook(module: nn.Module, sides: Iterable[str]) -> None:
    """The hooks of these sides on a module, each once; experts have another way to their vectors."""
    if hold_experts(module):
        return
    if "input" in sides and scale_input not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(scale_input, with_kwargs=True)
    if "output" in sides and scale_output not in module._forward_hooks.values():
        module.register_forward_hook(scale_output)


def drop_idle_hooks(module: nn.Module) -> None:
    """Remove the hooks of sides that no vector of the module needs."""
    container = module._modules.get(VECTORS)
    sides = set(container.sides.values()) if isinstance(container, SiteVectors) else set()
    if isinstance(module, RoutedExperts) and not sides:
        RoutedExperts.unwrap(module)
    for side, hooks, ours in (
        ("input", module._forward_pre_hooks, scale_input),
        ("output", module._forward_hooks, scale_output),
    ):
        for key in [key for key, hook in hooks.items() if hook is ours and side not in sides]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def unwrap(module: nn.Module) -> None:
    """Give a module that was trained in full its class back, without its copies."""
    module._modules.pop(SAVED_COPIES, None)
    del module._ia3_active_copy, module._ia3_in_table
    swap_back(module, SavedModule)


class Listener:
    """Hears which modules one forward calls, in the thread that began it.

    Args:
        model: the model.
        modules: those to listen for, by path.
        training: whether the forward is one of training.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], *, training: bool) -> None:
        self.training, self.thread = training, threading.get_ident()
        self.above = {child: parent for child, (parent, _) in _parents(model).items()}
        self.modules = {path: module for path, module in modules.items() if module in self.above}
        self.called: set[nn.Module] = {model}
        wanted = {*self.modules.values(), *(self._around(module) for module in self.modules.values())}
        self.handles = [module.register_forward_pre_hook(self._note) for module in wanted - {model}]

    def _note(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread:
            self.called.add(module)

    def _around(self, module: nn.Module) -> nn.Module:
        """The nearest module around another that can be called."""
        parent = self.above[module]
        while isinstance(parent, _HOLDERS) and parent in self.above:
            parent = self.above[parent]
        return parent

    def end(self) -> tuple[list[str], list[str]]:
        """Stop listening.

        Returns:
            Paths of modules that were not called although the module around them was, and of those around which
            nothing was called.
        """
        for handle in self.handles:
            handle.remove()
        # Of a list of modules one may be chosen, an expert for example.
        chosen = {self.above[module] for module in self.modules.values() if module in self.called}
        silent = {
            path: module
            for path, module in self.modules.items()
            if module not in self.called
            and not (isinstance(self.above[module], _HOLDERS) and self.above[module] in chosen)
        }
        unread = [path for path, module in silent.items() if self._around(module) in self.called]
        return unread, [path for path in silent if path not in unread]

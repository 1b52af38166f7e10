"""Adapters on a model: putting their vectors on its modules, choosing which act, taking them away."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ia3.config import IA3Config
from ia3.hooks import SiteVectors
from ia3.placement import Listener, Placement, drop_idle_hooks, unwrap
from ia3.rows import BASE, Rows
from ia3.sites import SAVED_COPIES, VECTORS, Layout, Side, Site, find_sites, is_inside, logger
from ia3.swap import SavedModule

if TYPE_CHECKING:
    from ia3.merging import Originals
    from ia3.table import AdapterTable

_HALF = (torch.float16, torch.bfloat16)
# How many known names an error lists in full.
_FEW = 8


@dataclass
class Adapter:
    """An adapter on a model: a name, a configuration, its sites, and the modules it trains in full."""

    name: str
    config: IA3Config
    layout: Layout
    saved: tuple[str, ...]


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
    table: AdapterTable | None = None
    placement: Placement = field(default_factory=Placement)
    heard: set[tuple[str, bool]] = field(default_factory=set)
    listener: Listener | None = None


def attached(model: nn.Module) -> Attached:
    """What the model carries, found again where a tool replaced modules.

    Raises:
        ValueError: it carries no adapter.
    """
    found: Attached | None = model.__dict__.get("_ia3")
    if found is None:
        raise ValueError(
            f"This {type(model).__name__} carries no adapter: call get_peft_model(model, config) or "
            "PeftModel.from_pretrained(model, path) first."
        )
    found.placement.settle(model)
    return found


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        ValueError: there is none.
    """
    adapters = attached(model).adapters
    if name not in adapters:
        raise ValueError(f"There is no adapter {name!r} here; this model has {sorted(adapters)}.")
    return adapters[name]


def acting_alone(model: nn.Module) -> Adapter | None:
    """The adapter that acts, where it is one alone and nothing is merged."""
    state: Attached | None = model.__dict__.get("_ia3")
    if state is None or len(state.active) != 1 or not state.enabled or state.originals is not None:
        return None
    return state.adapters[state.active[0]]


def site_vectors(model: nn.Module, adapter: Adapter) -> Iterator[tuple[Site, nn.Parameter]]:
    """The adapter's sites in the layout's order, each with its parameter of `site.trained_shape`."""
    placement = attached(model).placement
    for site in adapter.layout.sites:
        yield site, placement.container(site.path).get_parameter(adapter.name)


def vectors(model: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """The adapter's parameters, one a site, in the layout's order."""
    return [vector for _, vector in site_vectors(model, adapter)]


def saved_copies(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """The adapter's copies of the modules it trains in full, with the modules' paths."""
    placement = attached(model).placement
    for path in adapter.saved:
        yield path, placement.copies(path)[adapter.name]


def parameters(model: nn.Module, adapter: Adapter) -> Iterator[nn.Parameter]:
    """All that the adapter trains."""
    yield from vectors(model, adapter)
    for _, copy in saved_copies(model, adapter):
        yield from copy.parameters()


def attach(
    model: nn.Module,
    config: IA3Config,
    name: str,
    *,
    half_to_fp32: bool = True,
    on_meta: bool = False,
    loading: bool = False,
) -> Adapter:
    """Put an adapter on the model, inactive and frozen; the first one freezes the base.

    Args:
        model: the base, changed in place: each site's module gets its vector and a hook.
        config: copied, with its defaults filled in.
        name: the adapter's name.
        half_to_fp32: hold the vectors of a half-precision layer in fp32 (always so where the weights are not
            floating-point), and the copies of half-precision modules that are trained in full.
        on_meta: make vectors without memory, to be assigned by loading.
        loading: see `find_sites`.

    Raises:
        ValueError: a bad or taken name, or what `find_sites` raises; the model is then unchanged.
    """
    state = model.__dict__.get("_ia3") or Attached()
    _check_name(name, state)
    found = find_sites(model, config, loading=loading)
    for site in found.layout.sites:
        _check_free(model.get_submodule(site.path), site, state)
    copies = {path: _copy_for_itself(model.get_submodule(path)) for path in found.saved}
    if not state.adapters:
        _freeze_base(model, state)
    adapter = Adapter(name, found.config, found.layout, found.saved)
    for site in found.layout.sites:
        module = model.get_submodule(site.path)
        dtype, device = _kind_of_vector(module, half_to_fp32)
        if loading and device.type == "meta":
            device = torch.device("cpu")  # the base gets its memory later; the numbers that come need some now
        make = torch.ones if found.config.init_ia3_weights else torch.randn
        vector = make(site.trained_shape, dtype=dtype, device="meta" if on_meta else device)
        state.placement.hold_site(model, site).add(name, site, vector, device)
    for path, copy in copies.items():
        if half_to_fp32:
            _half_to_fp32(copy)
        state.placement.hold_copy(model, path, name, copy)
    state.adapters[name] = adapter
    model.__dict__["_ia3"] = state
    _watch(model)
    if found.note:
        kind = model.config.model_type  # type: ignore[union-attr]
        logger.warning("ia3's default for %s follows the paper (k, v, feed-forward); %s.", kind, found.note)
    return adapter


def _half_to_fp32(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def detach(model: nn.Module, name: str, *, stay: bool = False) -> None:
    """Remove an adapter; the last one leaves no trace on the modules and gives back their `requires_grad`.

    Args:
        model: the model.
        name: the adapter's name.
        stay: the model goes on as one for adapters, frozen, also without any.
    """
    state = attached(model)
    adapter = get_adapter(model, name)
    activate(model, [other for other in state.active if other != name], trainable=None)
    for site in adapter.layout.sites:
        state.placement.container(site.path).remove(name)
        state.placement.release_site(site.path)
    for path in adapter.saved:
        state.placement.release_copy(path, name)
    del state.adapters[name]
    state.heard -= {(name, False), (name, True)}
    if not state.adapters and not stay:
        release(model)


def release(model: nn.Module) -> None:
    """Give a model without adapters the `requires_grad` of its weights back."""
    state = attached(model)
    for parameter in state.trained_before:
        model.get_parameter(parameter).requires_grad_(True)
    state.trained_before = ()
    _forget_if_empty(model, state)


def activate(model: nn.Module, names: Iterable[str], *, trainable: bool | None) -> None:
    """Choose the adapters that act.

    Args:
        model: the model.
        names: adapters that it has.
        trainable: whether they require a gradient (all others don't); None leaves that as it is.

    Raises:
        ValueError: an unknown adapter, or adapters that can't act together (see `check_choice`).
    """
    state = attached(model)
    chosen = [get_adapter(model, name) for name in names]
    check_choice(chosen)
    before = [state.adapters[name] for name in state.active]
    if trainable is not None:
        state.resting = ()  # which train is chosen anew
        for adapter in before:
            require_grad(model, adapter, False)
        for adapter in chosen:
            require_grad(model, adapter, trainable)
    state.active = tuple(adapter.name for adapter in chosen)
    _point(model, [*before, *chosen])


def check_choice(chosen: list[Adapter]) -> None:
    """Refuse adapters that can't act together.

    Raises:
        ValueError: one named twice; two that train the same module in full, of which only one copy can act; one
            with a vector in a module that another trains in full, whose copy has no such vector.
    """
    names = [adapter.name for adapter in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"{names} names an adapter twice.")
    paths = [path for adapter in chosen for path in adapter.saved]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"Adapters {names} each train {twice} in full: use one of them at a time.")
    hidden = hidden_sites(chosen)
    if hidden:
        raise ValueError(
            f"Of the adapters {names} one has vectors in {hidden[:3]}, which another trains in full: use one of them "
            "at a time."
        )


def hidden_sites(chosen: list[Adapter]) -> list[str]:
    """Paths where one adapter has a vector and another's copy, which has no such vector, runs instead."""
    saved = [path for adapter in chosen for path in adapter.saved]
    sites = {site.path for adapter in chosen for site in adapter.layout.sites} if saved else set()
    return sorted(site for site in sites if any(is_inside(site, path) for path in saved))


def repoint(model: nn.Module) -> None:
    """Let the hooks follow `enabled` and `originals`."""
    state = attached(model)
    _point(model, [state.adapters[name] for name in state.active])


def require_grad(model: nn.Module, adapter: Adapter, required: bool) -> None:
    """Freeze or thaw an adapter."""
    for parameter in parameters(model, adapter):
        parameter.requires_grad_(required)


def rest(model: nn.Module) -> None:
    """Disable the adapters, which then require no gradient."""
    state = attached(model)
    if state.enabled:
        held = {id(parameter) for adapter in state.adapters.values() for parameter in parameters(model, adapter)}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in held]
        for _, parameter in trained:
            parameter.requires_grad_(False)
        state.resting = tuple(name for name, _ in trained)
    state.enabled = False
    repoint(model)


def wake(model: nn.Module) -> None:
    """Enable the adapters, which require a gradient as before `rest`."""
    state = attached(model)
    resting, state.resting = state.resting, ()
    if resting:
        held = dict(model.named_parameters())
        for name in resting:
            if name in held:  # its adapter may have been deleted
                held[name].requires_grad_(True)
    state.enabled = True
    repoint(model)


def keep_every_channel(model: nn.Module, adapter: Adapter) -> None:
    """Let the adapter hold the whole width of its fused projections, queries included."""
    sites = []
    for site in adapter.layout.sites:
        if site.intervals is not None:
            container = attached(model).placement.container(site.path)
            old = container.get_parameter(adapter.name)
            vector = nn.Parameter(site.widen(old.detach()), requires_grad=old.requires_grad)
            setattr(container, adapter.name, vector)
        sites.append(_whole(site))
    adapter.layout = Layout(tuple(sites))


def _point(model: nn.Module, changed: list[Adapter]) -> None:
    state = attached(model)
    acting = state.active if state.enabled else ()
    multiplying = acting if state.originals is None else ()
    for path in {site.path: None for adapter in changed for site in adapter.layout.sites}:
        state.placement.container(path).activate(multiplying)
    for path in {path: None for adapter in changed for path in adapter.saved}:
        module = state.placement.saved_module(path)
        module._ia3_active_copy = next((name for name in acting if name in module.modules_to_save), None)


def _check_name(name: str, state: Attached) -> None:
    # It becomes the name of a parameter, of a module in a ModuleDict and of a folder.
    taken = (SiteVectors(0), nn.ModuleDict())
    if not isinstance(name, str) or not name or set(name) & set("./\\") or name == BASE:
        raise ValueError(
            f"{name!r} can't name an adapter: expected a non-empty string without dots and slashes, not {BASE!r}."
        )
    if any(hasattr(module, name) for module in taken):
        raise ValueError(f"{name!r} can't name an adapter: torch modules have an attribute of that name.")
    if name in state.adapters:
        raise ValueError(
            f"The model already carries an adapter {name!r}: choose another name, delete_adapter({name!r}), or "
            "unload() to get the bare base back."
        )
    if state.table is not None and name in state.table:
        raise ValueError(
            f"The model's AdapterTable has an adapter {name!r}: choose another name, or drop({name!r}) first."
        )


def _check_free(module: nn.Module, site: Site, state: Attached) -> None:
    taken = getattr(module, VECTORS, None)
    if taken is not None and not isinstance(taken, SiteVectors):
        raise ValueError(
            f"{site.path} already has an attribute {VECTORS!r} of another library: unload that adapter first."
        )
    others = sorted(set(taken._parameters) - set(state.adapters)) if isinstance(taken, SiteVectors) else ()
    if others:
        raise ValueError(
            f"{site.path} carries {others} already, attached to the model around or inside this one: add to that one "
            "with add_adapter, or unload() it first."
        )


def _freeze_base(model: nn.Module, state: Attached) -> None:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _, parameter in trained:
        parameter.requires_grad_(False)
    state.trained_before = (*state.trained_before, *(name for name, _ in trained))


def _kind_of_vector(module: nn.Module, half_to_fp32: bool) -> tuple[torch.dtype, torch.device]:
    """A vector's precision and device, by what its module holds: fp32 unless that is a wider or allowed one."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = getattr(module, "weight", None)
    first = weight if isinstance(weight, torch.Tensor) else held[0] if held else torch.empty(0)
    keep = {torch.float32, torch.float64} | (set() if half_to_fp32 else set(_HALF))
    # An offloaded weight is on no device until accelerate brings it to the one where it runs.
    device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or first.device)
    return first.dtype if first.dtype in keep else torch.float32, device


def _copy_for_itself(module: nn.Module) -> nn.Module:
    """A frozen copy of the module as the base has it, without what adapters put there."""
    copies = module._modules.pop(SAVED_COPIES, None) if isinstance(module, SavedModule) else None
    try:
        copy = deepcopy(module)
    finally:
        if copies is not None:
            module._modules[SAVED_COPIES] = copies
    for part in list(copy.modules()):
        part._modules.pop(VECTORS, None)
        drop_idle_hooks(part)
        if isinstance(part, SavedModule):
            unwrap(part)
    return copy.requires_grad_(False)


def attach_combined(model: nn.Module, name: str, sources: list[Adapter], values: dict[Site, torch.Tensor]) -> None:
    """Attach a new adapter with these values, inactive and frozen, where any of the sources has a site.

    Args:
        model: the model.
        name: the new adapter's name.
        sources: the adapters that it is made of.
        values: full vectors by whole site.

    Raises:
        ValueError: a taken name, sources that use both sides of one module, train one module in full twice, or
            have vectors in a module that another trains in full.
    """
    sides: dict[str, set[str]] = {}
    for site in values:
        sides.setdefault(site.path, set()).add(site.side)
    both = sorted(path for path, used in sides.items() if len(used) > 1)
    if both:
        raise ValueError(
            f"The adapters multiply both the input and the output of {both[:3]}; one adapter holds one vector a "
            "module. Combine adapters with the same feedforward_modules."
        )
    with_copies = [source for source in sources if source.saved]
    if len(with_copies) > 1:
        raise ValueError(
            f"{[source.name for source in with_copies]} all train modules in full, which have no combination: "
            "combine adapters of which at most one does."
        )
    hidden = hidden_sites(sources)
    if hidden:
        raise ValueError(
            f"One adapter has vectors in {hidden[:3]}, which is trained in full by {with_copies[0].name!r}: the two "
            "have no combination."
        )
    config = deepcopy((with_copies or sources)[0].config)
    config.exclude_modules = None
    # Patterns, because a path listed as a name would also match longer paths that end with it.
    config.target_modules = "|".join(re.escape(path) for path in sides)
    inputs = [path for path, used in sides.items() if used == {"input"}]
    config.feedforward_modules = "|".join(re.escape(path) for path in inputs) or set()
    config.inference_mode = False
    adapter = attach(model, config, name, loading=True)
    if any(not site.fits(values[_whole(site)]) for site in adapter.layout.sites):
        keep_every_channel(model, adapter)
    with torch.no_grad():
        for site, vector in site_vectors(model, adapter):
            vector.copy_(site.narrow(values[_whole(site)]))
        for source in with_copies:
            for (_, copy), (_, trained) in zip(saved_copies(model, adapter), saved_copies(model, source), strict=True):
                copy.load_state_dict(trained.state_dict())


@torch.no_grad()
def copy_values(model: nn.Module, source: Adapter, target: Adapter) -> None:
    """Give an adapter the values of another with the same configuration, its modules trained in full too."""
    if any(old.intervals != new.intervals for old, new in zip(source.layout.sites, target.layout.sites, strict=True)):
        keep_every_channel(model, target)
    for old, new in zip(parameters(model, source), parameters(model, target), strict=True):
        new.copy_(old)


def hold_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Put hooks where a table's adapters have vectors, without any vector of their own.

    Raises:
        ValueError: another library's vectors are there; the model is then unchanged.
    """
    sites, state = list(sites), attached(model)
    for site in sites:
        _check_free(model.get_submodule(site.path), site, state)
    for site in sites:
        state.placement.hold_site(model, site).sides[_table_holds(site.side)] = site.side
    _watch(model)


def release_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Take a table off the model: its hooks, where no attached adapter needs them."""
    state = attached(model)
    for site in sites:
        state.placement.container(site.path).sides.pop(_table_holds(site.side))
    for path in dict.fromkeys(site.path for site in sites):
        state.placement.release_site(path)
    state.table = None
    _forget_if_empty(model, state)


def _table_holds(side: Side) -> str:
    """What stands for a table among a site's adapters: no adapter's name has a dot."""
    return f"table.{side}"


def _forget_if_empty(model: nn.Module, state: Attached) -> None:
    if not state.adapters and state.table is None:
        _unwatch(model)
        del model._ia3


def device_at(model: nn.Module, site: Site) -> torch.device:
    """Where a vector of this site belongs."""
    return _kind_of_vector(attached(model).placement.site_module(site.path), True)[1]


def gather_rows(model: nn.Module, names: Sequence[str] | Sequence[Sequence[str]]) -> Rows:
    """The vectors of a batch whose examples use these adapters: gathered once from one table, then split by site.

    Args:
        model: the model with its adapters, attached or in its `AdapterTable`; which are active doesn't matter.
        names: one an example, `"__base__"` for none; or `[batch][length]`, one a token, for rows that pack several
            examples.

    Raises:
        ValueError: unknown names, merged or disabled adapters, a module that one adapter trains in full and another
            has vectors in, more adapters of the table than it has room for; and for names a token modules trained in
            full and convolutions.
    """
    state = attached(model)
    packed = any(not isinstance(name, str) for name in names)
    each = [name for item in names for name in ([item] if isinstance(item, str) else item)]
    distinct = list(dict.fromkeys(each))
    _check_known(state, distinct)  # outside of the lock, because looking for near names takes its time
    with state.table.lock if state.table is not None else nullcontext():
        _check_mixture(state, distinct, packed)
        layout, flat = _rows_over(model, state, distinct if packed else each)
        if not packed:
            return make_rows(model, each, layout, flat)
        if any(len(site.shape) > 2 for site in layout.sites):
            raise ValueError("adapter_names a token can't reach a convolution, which mixes neighbouring tokens.")
        number = {name: index for index, name in enumerate(distinct)}
        places = torch.tensor([[number[name] for name in row] for row in names], device=flat.device)
        return make_rows(model, distinct, layout, flat, places)


def gather_flat(model: nn.Module, names: Sequence[str]) -> tuple[Layout, torch.Tensor]:
    """The same vectors as `gather_rows`, one name an example, not split: the sites and `[examples, D]`.

    Raises:
        ValueError: what `gather_rows` raises for names an example.
    """
    state = attached(model)
    distinct = list(dict.fromkeys(names))
    _check_known(state, distinct)
    with state.table.lock if state.table is not None else nullcontext():
        _check_mixture(state, distinct, packed=False)
        return _rows_over(model, state, names)


def make_rows(
    model: nn.Module, names: Sequence[str], layout: Layout, flat: torch.Tensor, places: torch.Tensor | None = None
) -> Rows:
    """Rows of vectors, split by site.

    Args:
        model: the model.
        names: the adapter of each row of `flat`.
        layout: the flat rows' sites, whole ones.
        flat: `[rows, D]`.
        places: see `Rows`.
    """
    placement = attached(model).placement
    slices: dict[nn.Module, dict[Side, torch.Tensor]] = {}
    for place in list(placement.places.values()):
        if place.held is not None:
            slices[place.held if isinstance(place.held, SiteVectors) else place.module] = {}
    for site, part in zip(layout.sites, layout.split(flat), strict=True):
        slices[placement.container(site.path)][site.side] = part
    return Rows(tuple(names), slices, places)


def unknown_names(unknown: Sequence[str], known: Iterable[str]) -> ValueError:
    """The error for names that are not known: it lists these in full where they are few, else the nearest."""
    known = sorted(known)
    if len(known) <= _FEW:
        return ValueError(f"Unknown adapter_names {unknown}: this model has {known}, and {BASE!r} for none.")
    near = list(dict.fromkeys(n for name in unknown[:3] for n in difflib.get_close_matches(str(name), known, n=3)))
    return ValueError(
        f"Unknown adapter_names {unknown[:_FEW]}: this model has {len(known)} adapters"
        f"{f', the nearest {near}' if near else f', such as {known[:3]}'}; {BASE!r} is for none."
    )


def _check_known(state: Attached, distinct: Sequence[str]) -> None:
    registered = state.table if state.table is not None else ()
    unknown = [name for name in distinct if name not in state.adapters and name not in registered and name != BASE]
    if unknown:
        raise unknown_names(sorted(unknown, key=str), [*state.adapters, *registered])


def _check_mixture(state: Attached, distinct: Sequence[str], packed: bool) -> None:
    _check_known(state, distinct)
    if not state.enabled or state.originals is not None:
        raise ValueError("The adapters are disabled or merged: enable or unmerge them before a batch that mixes them.")
    saved = {path for adapter in state.adapters.values() for path in adapter.saved}
    if not saved:
        return
    if packed:
        raise ValueError(
            f"adapter_names a token can't choose between copies of {min(saved)}, which an adapter of this model trains "
            "in full: pass one name an example, one example a row."
        )
    sites = {site.path for name in distinct if name in state.adapters for site in state.adapters[name].layout.sites}
    if state.table is not None and any(name in state.table for name in distinct):
        sites |= {site.path for site in state.table.layout.sites}
    hidden = sorted(site for site in sites if any(is_inside(site, path) for path in saved))
    if hidden and len(distinct) > 1:
        raise ValueError(
            f"One adapter trains {hidden[0]} in full and another has vectors there: they can't share a batch."
        )


def _rows_over(model: nn.Module, state: Attached, names: Sequence[str]) -> tuple[Layout, torch.Tensor]:
    """One row a name, `[len(names), D]`, and the sites that it is over; an absent vector is one."""
    distinct = list(dict.fromkeys(names))
    chosen = [state.adapters[name] for name in distinct if name in state.adapters]
    registered = [name for name in distinct if name not in state.adapters and name != BASE]
    if registered and not chosen:
        assert state.table is not None
        return state.table.layout, state.table.gather(names)
    held = {a.name: {_whole(s): s.widen(vector) for s, vector in site_vectors(model, a)} for a in chosen}
    if registered:
        assert state.table is not None
        sites = state.table.layout
        for name, row in zip(registered, state.table.gather(registered), strict=True):
            held[name] = dict(zip(sites.sites, sites.split(row), strict=True))
    layout = Layout(tuple(dict.fromkeys(site for vectors in held.values() for site in vectors)))
    if not layout.sites:
        return layout, torch.ones(len(names), 0)
    like = next(iter(next(iter(held.values())).values()))
    table = torch.stack([_table_row(held.get(name, {}), layout, like) for name in distinct])
    number = {name: index for index, name in enumerate(distinct)}
    return layout, table[torch.tensor([number[name] for name in names], device=table.device)]


def _table_row(vectors: dict[Site, torch.Tensor], layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """One adapter over all sites of a table, `[D]`; an absent vector is one."""
    return layout.flatten(
        [
            vectors[site].to(like) if site in vectors else torch.ones(site.shape, dtype=like.dtype, device=like.device)
            for site in layout.sites
        ]
    )


def whole_vectors(model: nn.Module, adapter: Adapter) -> dict[Site, torch.Tensor]:
    """The adapter's vectors over every channel, by whole site."""
    return {_whole(site): site.widen(vector.detach()) for site, vector in site_vectors(model, adapter)}


def _whole(site: Site) -> Site:
    return Site(site.path, site.side, site.shape)


# Watching forwards: whether all is in its place, and whether anything reads it


def _watch(model: nn.Module) -> None:
    _MODELS[model.__dict__["_ia3"].placement.token] = model
    if keep_in_place not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(keep_in_place)
        model.register_forward_hook(stop_listening, always_call=True)


def _unwatch(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is keep_in_place]:
        del model._forward_pre_hooks[key]
    for key in [key for key, hook in model._forward_hooks.items() if hook is stop_listening]:
        del model._forward_hooks[key], model._forward_hooks_always_called[key]


def keep_in_place(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: find again what a tool replaced, and listen to the first forwards.

    Raises:
        RuntimeError: a module that carries a vector was replaced by one that can't.
    """
    if getattr(model, "_is_replica", False):
        return
    _settle(model)
    # A forward that computes its loss without the modules listens where it calls them after all.
    if not (hasattr(type(model).forward, LISTENS) and _is_training(model)):
        listen(model)


def _settle(model: nn.Module) -> None:
    placement: Placement = model.__dict__["_ia3"].placement
    if torch.compiler.is_compiling():
        _settle_compiled(placement.token)
        return
    if placement.token not in _MODELS:  # a copy's
        _MODELS[placement.token] = model
    _find_all(model)


def _find_all(model: nn.Module) -> None:
    placement: Placement = model.__dict__["_ia3"].placement
    placement.settle(model)
    placement.expect_all()


# A compiler evaluates a function of constants once, before it looks at the modules; a model is no constant to it.
_MODELS: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def _settle_compiled(token: str) -> None:
    model = _MODELS.get(token)
    if model is not None:
        _find_all(model)


# What torch.compiler.assume_constant_result sets, which would import the whole compiler: a second and a half.
_settle_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


LISTENS = "_ia3_listens"
"""The attribute of a forward that listens itself in training."""


def listen(model: nn.Module) -> None:
    """Hear which modules a forward calls, if that is not known of its adapters; `stop_listening` ends it."""
    if torch.compiler.is_compiling():
        return
    state: Attached | None = model.__dict__.get("_ia3")
    if state is None or state.listener is not None or not state.enabled or state.originals is not None:
        return
    training = _is_training(model)
    due = [name for name in state.active if not {(name, True), (name, training)} & state.heard]
    # Hooks that come and go would compile a part that is compiled again.
    if due and not any(_is_compiled(module) for module in model.modules()):
        adapters = [state.adapters[name] for name in due]
        placement = state.placement
        modules = {site.path: placement.site_module(site.path) for each in adapters for site in each.layout.sites}
        modules |= {path: placement.saved_module(path) for each in adapters for path in each.saved}
        state.listener = Listener(model, modules, training=training)


def stop_listening(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root: what nothing read is an error in training, and otherwise said.

    Raises:
        RuntimeError: a vector acts that the model doesn't read, though it called the module around its own.
    """
    state: Attached | None = model.__dict__.get("_ia3")
    listener = None if state is None else state.listener
    if state is None or listener is None or listener.thread != threading.get_ident():
        return
    state.listener = None
    unread, uncalled = listener.end()
    if output is None:  # the forward was left by an exception
        return
    sites = {site.path for name in state.active for site in state.adapters[name].layout.sites}
    vectors_unread = [path for path in unread if path in sites]
    if vectors_unread and listener.training:
        raise RuntimeError(_unread(model, vectors_unread))
    state.heard |= {(name, listener.training) for name in state.active}
    if unread:
        logger.warning(_unread(model, unread))
    if uncalled and listener.training:
        logger.warning(
            "%d adapted modules were not called in the first training step (such as %s), nor was anything around "
            "them: they learn only from batches that reach them.",
            len(uncalled),
            uncalled[0],
        )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _is_training(model: nn.Module) -> bool:
    return model.training and torch.is_grad_enabled()


def _unread(model: nn.Module, paths: Sequence[str]) -> str:
    kinds = sorted({type(model.get_submodule(path.rpartition(".")[0])).__name__ for path in paths})
    return (
        f"{len(paths)} modules that an adapter adapts were not called (such as {paths[0]}), although the "
        f"{' and '.join(kinds)} around them ran: it reads their weights itself, so what the adapter holds there does "
        "nothing. Leave them out (exclude_modules, modules_to_save), or switch off what reads the weights in the "
        "model's configuration."
    )

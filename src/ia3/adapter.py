"""Adapters on a model: putting their vectors on its modules, choosing which act, taking them away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import nn

from ia3.config import IA3Config
from ia3.hooks import SiteVectors
from ia3.layers import is_inside
from ia3.listening import unwatch, watch
from ia3.placement import drop_idle_hooks, unwrap
from ia3.quantised import first_quantised
from ia3.rows import BASE
from ia3.sites import SAVED_COPIES, VECTORS, Layout, Side, Site, find_sites, logger
from ia3.stacked import Skeleton
from ia3.state import Adapter, Attached, attached, carry, carry_nothing, find_attached, get_adapter
from ia3.swap import SavedModule

_HALF = (torch.float16, torch.bfloat16)


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
    state = find_attached(model) or Attached()
    _check_name(name, state)
    found = find_sites(model, config, loading=loading)
    for site in found.layout.sites:
        _check_free(model.get_submodule(site.path), site, state)
    for path in found.saved:
        _check_trainable_in_full(model.get_submodule(path), path)
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
    carry(model, state)
    watch(model)
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


def hidden_sites(chosen: Sequence[Adapter]) -> list[str]:
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
        state.resting = tuple(name for name, _ in trained)
        for _, parameter in trained:
            parameter.requires_grad_(False)
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
    placement = attached(model).placement
    wide = {
        site.path: nn.Parameter(site.widen(vector.detach()), requires_grad=vector.requires_grad)
        for site, vector in site_vectors(model, adapter)
        if site.intervals is not None
    }
    for path, vector in wide.items():
        setattr(placement.container(path), adapter.name, vector)
    adapter.layout = Layout(tuple(site.whole for site in adapter.layout.sites))


def _point(model: nn.Module, changed: list[Adapter]) -> None:
    state = attached(model)
    enabled = state.active if state.enabled else ()  # merging concerns vectors alone
    for path in {site.path: None for adapter in changed for site in adapter.layout.sites}:
        state.placement.container(path).activate(state.acting)
    for path in {path: None for adapter in changed for path in adapter.saved}:
        module = state.placement.saved_module(path)
        module._ia3_active_copy = next((name for name in enabled if name in module.modules_to_save), None)


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


def _check_trainable_in_full(module: nn.Module, path: str) -> None:
    held = first_quantised(module)
    if held is not None:
        inside, kind = held
        whole = f"{path}.{inside}".rstrip(".")
        raise ValueError(
            f"modules_to_save: {path} can't be trained in full, since the weight of {whole} is {kind}. Load the base "
            f"with it left out of the quantisation (llm_int8_skip_modules=[{path!r}] for bitsandbytes), or leave it "
            "out of modules_to_save."
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


def plan_combination(sources: Sequence[Adapter], sites: Iterable[Site]) -> IA3Config:
    """The configuration of a combination.

    Args:
        sources: the adapters that it is made of.
        sites: whole ones, where any of them has a vector.

    Raises:
        ValueError: sources that use both sides of one module, train modules in full twice, or have vectors in a
            module that another trains in full.
    """
    sides: dict[str, set[str]] = {}
    for site in sites:
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
    return config


def attach_combined(model: nn.Module, name: str, sources: list[Adapter], values: dict[Site, torch.Tensor]) -> None:
    """Attach a new adapter with these values, inactive and frozen, where any of the sources has a site.

    Args:
        model: the model.
        name: the new adapter's name.
        sources: the adapters that it is made of.
        values: full vectors by whole site.

    Raises:
        ValueError: a taken name, or what `plan_combination` raises.
    """
    config = plan_combination(sources, values)
    config.inference_mode = False
    adapter = attach(model, config, name, loading=True)
    if any(not site.fits(values[site.whole]) for site in adapter.layout.sites):
        keep_every_channel(model, adapter)
    with torch.no_grad():
        for site, vector in site_vectors(model, adapter):
            vector.copy_(site.narrow(values[site.whole]))
        for source in (source for source in sources if source.saved):
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
    watch(model)


def release_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Take a table off the model: its hooks, where no attached adapter needs them."""
    state = attached(model)
    for site in sites:
        state.placement.container(site.path).sides.pop(_table_holds(site.side))
    for path in dict.fromkeys(site.path for site in sites):
        state.placement.release_site(path)
    state.table = None
    _forget_if_empty(model, state)


def hold_heads(model: nn.Module, paths: Iterable[str]) -> dict[str, Skeleton]:
    """Let modules run the heads of a table's adapters, without any copy of their own; by path."""
    placement = attached(model).placement
    skeletons = {path: Skeleton(_copy_for_itself(model.get_submodule(path))) for path in paths}
    for path in skeletons:
        placement.hold_head(model, path)
    return skeletons


def release_heads(model: nn.Module, paths: Iterable[str]) -> None:
    """Take a table's heads off the model."""
    for path in paths:
        attached(model).placement.release_head(model, path)


def _table_holds(side: Side) -> str:
    """What stands for a table among a site's adapters: no adapter's name has a dot."""
    return f"table.{side}"


def _forget_if_empty(model: nn.Module, state: Attached) -> None:
    if not state.adapters and state.table is None:
        unwatch(model)
        carry_nothing(model)


def device_at(model: nn.Module, site: Site) -> torch.device:
    """Where a vector of this site belongs."""
    return _kind_of_vector(attached(model).placement.site_module(site.path), True)[1]


def whole_vectors(model: nn.Module, adapter: Adapter) -> dict[Site, torch.Tensor]:
    """The adapter's vectors over every channel, by whole site."""
    return {site.whole: site.widen(vector.detach()) for site, vector in site_vectors(model, adapter)}

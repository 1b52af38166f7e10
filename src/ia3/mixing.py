"""Batches that mix adapters: names to rows of vectors, and the rows that act while a forward runs.

A call names one adapter an example, or one a token. Their vectors become a table over the union of their sites, absent
= 1; the examples' rows are gathered from it once and split once, and act in the call's thread until it ends.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ia3.adapter import site_vectors
from ia3.checkpoint import is_adapters
from ia3.hooks import SiteVectors
from ia3.layers import is_inside
from ia3.rows import BASE, Flat, Rows, act_here, acting, holding
from ia3.sites import Layout, Side, Site
from ia3.stacked import StackedHead, stack_by_shape
from ia3.state import Attached, attached, find_attached
from ia3.swap import Swapped

# How many known names an error lists in full.
_FEW = 8


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
        _check_tokens_stay(model, layout)
        if not packed:
            heads, own = _heads_over(model, state, each), tuple(_own_sites(state, name) for name in each)
            return make_rows(model, each, layout, flat, heads=heads, own=own)
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


def acting_flat(model: nn.Module) -> tuple[Layout, torch.Tensor] | None:
    """The vectors of the adapter that acts, `[1, D]`; no sites where none does, None where several do."""
    state = find_attached(model)
    acting = () if state is None else state.acting
    if state is None or not acting:
        return Layout(()), torch.ones(1, 0, device=next(model.parameters()).device)
    if len(acting) > 1:
        return None
    adapter = state.adapters[acting[0]]
    return adapter.layout, adapter.layout.flatten([vector for _, vector in site_vectors(model, adapter)])[None]


def own_sites(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Site, ...]]:
    """Where each of these adapters has vectors, attached or in the table; nowhere for others."""
    state = attached(model)
    with state.table.lock if state.table is not None else nullcontext():
        return {name: _own_sites(state, name) for name in names}


def _own_sites(state: Attached, name: str) -> tuple[Site, ...]:
    if name in state.adapters:
        return state.adapters[name].layout.sites
    return () if state.table is None or name not in state.table else state.table.sites_of(name)


def make_rows(
    model: nn.Module,
    names: Sequence[str],
    layout: Layout,
    flat: torch.Tensor,
    places: torch.Tensor | None = None,
    heads: Mapping[nn.Module, StackedHead] | None = None,
    own: tuple[tuple[Site, ...], ...] | None = None,
) -> Rows:
    """Rows of vectors, split by site.

    Args:
        model: the model.
        names: the adapter of each row of `flat`.
        layout: the flat rows' sites, whole ones.
        flat: `[rows, D]`.
        places: see `Rows`.
        heads: see `Rows`.
        own: see `Flat`; None where the flat rows aren't asked for.
    """
    placement = attached(model).placement
    heads = heads or {}
    slices: dict[nn.Module, dict[Side, torch.Tensor]] = {}
    for place in list(placement.places.values()):
        if place.held is not None:
            slices[place.held if isinstance(place.held, SiteVectors) else place.module] = {}
    for site, part in zip(layout.sites, layout.split(flat), strict=True):
        slices[placement.container(site.path)][site.side] = part
    slices |= {module: {} for module in heads}
    return Rows(tuple(names), slices, places, heads, None if own is None else Flat(layout, flat, own))


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
    sites = {site.path for name in distinct if name in state.adapters for site in state.adapters[name].layout.sites}
    if state.table is not None and any(name in state.table for name in distinct):
        saved |= state.table.skeletons.keys()
        sites |= {site.path for site in state.table.layout.sites}
    if not saved:
        return
    if packed:
        raise ValueError(
            f"adapter_names a token can't choose between copies of {min(saved)}, which an adapter of this model trains "
            "in full: pass one name an example, one example a row."
        )
    hidden = sorted(site for site in sites if any(is_inside(site, path) for path in saved))
    if hidden and len(distinct) > 1:
        raise ValueError(
            f"One adapter trains {hidden[0]} in full and another has vectors there: they can't share a batch."
        )


def _check_tokens_stay(model: nn.Module, layout: Layout) -> None:
    """Refuse vectors in experts that are modules of a list: each gets some of the tokens, and isn't told whose."""
    for site in layout.sites:
        parts = site.path.split(".")
        for depth in (depth for depth, part in enumerate(parts[:-1], 1) if "experts" in part):
            holder = ".".join(parts[:depth])
            if isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict):
                raise ValueError(
                    f"adapter_names can't reach {site.path}: {holder} gives each of its experts some of the batch's "
                    "tokens, which are not told apart. Run the adapters one after the other."
                )


def _rows_over(model: nn.Module, state: Attached, names: Sequence[str]) -> tuple[Layout, torch.Tensor]:
    """One row a name, `[len(names), D]`, and the sites that it is over; an absent vector is one."""
    distinct = list(dict.fromkeys(names))
    chosen = [state.adapters[name] for name in distinct if name in state.adapters]
    registered = [name for name in distinct if name not in state.adapters and name != BASE]
    if registered and not chosen:
        assert state.table is not None
        return state.table.layout, state.table.gather(names)
    held = {a.name: {s.whole: s.widen(vector) for s, vector in site_vectors(model, a)} for a in chosen}
    if registered:
        assert state.table is not None
        sites = state.table.layout
        for name, row in zip(registered, state.table.gather(registered), strict=True):
            held[name] = dict(zip(sites.sites, sites.split(row), strict=True))
    layout = Layout(tuple(dict.fromkeys(site for vectors in held.values() for site in vectors)))
    if not layout.sites:
        return layout, torch.ones(len(names), 0, device=next(model.parameters()).device)
    like = next(iter(next(iter(held.values())).values()))
    table = torch.stack([_table_row(held.get(name, {}), layout, like) for name in distinct])
    number = {name: index for index, name in enumerate(distinct)}
    return layout, table[torch.tensor([number[name] for name in names], device=table.device)]


def _heads_over(model: nn.Module, state: Attached, names: Sequence[str]) -> dict[nn.Module, StackedHead]:
    """The heads of a batch's examples, by the modules that adapters of the table train in full.

    An example of an attached adapter has that adapter's copy, and one of an adapter without such a head the base's.
    """
    registered = [name for name in dict.fromkeys(names) if name not in state.adapters and name != BASE]
    if not registered or state.table is None or not state.table.skeletons:
        return {}
    held = state.table.gather_heads(registered)
    found: dict[nn.Module, StackedHead] = {}
    for path in dict.fromkeys(path for heads in held.values() for path in heads):
        module = state.placement.hold_head(model, path)
        copies = {name: module.modules_to_save[name] for name in names if name in module.modules_to_save}
        own = {
            name: held[name][path] if path in held.get(name, {}) else _tensors(copies.get(name, module))
            for name in dict.fromkeys(names)
        }
        stacks = stack_by_shape([own[name] for name in names])
        found[module] = StackedHead(state.table.skeletons[path], stacks)
    return found


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors that a file of it has, with their gradients, without those of copies of it."""
    return {name: each for name, each in module.state_dict(keep_vars=True).items() if not is_adapters(name)}


def _table_row(vectors: dict[Site, torch.Tensor], layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """One adapter over all sites of a table, `[D]`; an absent vector is one."""
    return layout.flatten(
        [
            vectors[site].to(like) if site in vectors else torch.ones(site.shape, dtype=like.dtype, device=like.device)
            for site in layout.sites
        ]
    )


# The names that a call is given


class Mixing(Swapped):
    """The calls of an adapted model, which take `adapter_names`; the base's own arguments don't know them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self._run(args, kwargs)
        if torch.compiler.is_compiling() or self._compiled_call_impl is not None:
            raise ValueError(
                "A batch that mixes adapters runs without torch.compile: call the model that isn't compiled."
            )
        with acting(rows_of(self, names, args, kwargs)):
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base's call; where rows act, it is known how many tokens its batch has."""
        if torch.compiler.is_compiling() or not act_here():
            return super().__call__(*args, **kwargs)
        with holding(_token_counts(args, kwargs)):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with `adapter_names`, one an example, for a batch that mixes adapters.

        Raises:
            ValueError: unknown names, another number of them than examples, or names a token.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        if any(name is None for name in names):
            raise ValueError(f"adapter_names[{list(names).index(None)}] is None: pass {BASE!r} for no adapter.")
        if any(not isinstance(name, str) for name in names):
            raise ValueError(
                "generate continues one example a row, so it takes one name a row, not one a token: unpack the "
                "examples, and pass adapter_names as a list of names."
            )
        with acting(rows_of(self, names, args, kwargs)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


# Where a model's batch shows how many examples it has, besides its `main_input_name`; failing these any tensor does.
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def rows_of(
    model: nn.Module, names: Sequence[str] | Sequence[Sequence[str]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Rows:
    """The rows of a call.

    Raises:
        ValueError: another number of names than examples or tokens, names a token where they can't work, gradient
            checkpointing, or what `gather_rows` raises.
    """
    own: str = getattr(model, "main_input_name", None) or _INPUTS[0]
    held = (*args, *(kwargs.get(name) for name in (own, *_INPUTS)), *kwargs.values())
    tensors = [value for value in held if isinstance(value, torch.Tensor) and value.dim()]
    if isinstance(names, str) or not tensors or len(tensors[0]) != len(names):
        count = len(tensors[0]) if tensors else "no"
        raise ValueError(
            f"adapter_names is {reprlib.repr(names)} for {count} examples: pass a list with one name an example."
        )
    if any(not isinstance(name, str) for name in names):
        _check_packed(model, names, tensors[0])
    if torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    ):
        raise ValueError(
            "A batch that mixes adapters can't be trained with gradient checkpointing, whose second forward knows "
            "nothing of adapter_names: gradient_checkpointing_disable() first."
        )
    return gather_rows(model, names)


def _token_counts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """How many tokens the inputs of a forward have in all; nothing where they aren't seen."""
    held = [*args, *(kwargs.get(name) for name in _INPUTS)]
    return frozenset(
        value.shape[0] * value.shape[1] for value in held if isinstance(value, torch.Tensor) and value.dim() > 1
    )


def _check_packed(model: nn.Module, names: Sequence[Any], batch: torch.Tensor) -> None:
    """Refuse names a token that are not `[batch][length]`, or a model that they can't work for."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "An encoder-decoder model takes one name an example, not one a token: its decoder's tokens are others than "
            "its encoder's. Pass one example a row."
        )
    if batch.dim() not in (2, 3):
        raise ValueError(f"adapter_names a token need a batch of tokens, not one of shape {tuple(batch.shape)}.")
    for place, row in enumerate(names):
        is_list = isinstance(row, list | tuple)
        if not is_list or len(row) != batch.shape[1]:
            got = f"{len(row)} names" if is_list else repr(row)
            raise ValueError(
                f"adapter_names[{place}] is {got} for {batch.shape[1]} tokens: pass one name a token in every row, "
                "padding included, or one name a row in all."
            )

"""How the vectors of experts enter the forward of their module: one multiplies each pair of a token and an expert.

transformers computes experts by one of several functions. Its batched and grouped ways call the gate once, for all
pairs in an order that follows from the router's choice; there the gate's product is multiplied. Whatever else computes
them (the module's own loop over the experts, or code of a module outside of that interface) is given stand-ins for the
second matrices, which multiply what is multiplied by them. Either way no scaled matrix is ever made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ia3.experts import SECOND, Experts, ScaledWeight, find_experts, way_of
from ia3.hooks import SiteVectors, vectors_of
from ia3.rows import Rows, running
from ia3.swap import Swapped, swap, swap_back

# The ways that call the gate once for all pairs.
_AT_ONCE = ("batched_mm", "grouped_mm")


@dataclass
class _Acting:
    """The vectors that act in one call of an experts module.

    Args:
        module: the module.
        table: `[experts, width]`, or `[rows, experts, width]` for a batch that mixes adapters.
        way: the function that computes, if it is one that calls the gate once; else None.
        chosen: the experts of each token, `[tokens, k]`, for such a function.
        rows: which rows of the table the batch's examples use.
        used: whether the gate was called.
    """

    module: nn.Module
    table: Tensor
    way: str | None = None
    chosen: Tensor | None = None
    rows: Rows | None = None
    used: bool = False

    def gated(self, product: Tensor) -> Tensor:
        """The gate's product of all pairs, `[pairs, width]`, times their vectors.

        Raises:
            RuntimeError: it was multiplied already, or is not that of all pairs.
        """
        assert self.chosen is not None
        experts = self.chosen.reshape(-1)
        if self.used or product.shape != (len(experts), self.table.shape[-1]):
            raise RuntimeError(
                f"{type(self.module).__name__} computes its gate in parts, which ia3 can't follow: call "
                "model.set_experts_implementation('eager')."
            )
        self.used = True
        order = torch.sort(experts).indices if self.way == "grouped_mm" else None
        experts = experts if order is None else experts[order]
        if self.rows is not None:
            pairs = torch.arange(len(experts), device=experts.device) if order is None else order
            tokens = self.rows.of_tokens(len(self.chosen), experts.device)[pairs // self.chosen.shape[-1]]
            return product * self._table()[tokens, experts.clamp(max=self._last)].to(product.dtype)
        return product * self._table()[experts.clamp(max=self._last)].to(product.dtype)

    @property
    def _last(self) -> int:
        return self._table().shape[-2] - 1

    def _table(self) -> Tensor:
        """The table, with ones for what expert parallelism sends to nobody: its numbers are whatever there is."""
        if not getattr(self.module, "_is_expert_parallel", False):
            return self.table
        return nn.functional.pad(self.table, (0, 0, 0, 1), value=1.0)

    def stand_in(self, weight: Tensor) -> ScaledWeight:
        """What stands for the second matrices."""
        table, rows = self.table, self.rows
        if rows is None:
            return ScaledWeight(weight, lambda _: table[:, None], lambda expert: table[expert])
        return ScaledWeight(weight, lambda tokens: table[rows.of_tokens(tokens, table.device)].transpose(0, 1))


class _Running(threading.local):
    """The experts module that is computing in a thread, and the last whose forward was reached."""

    acting: _Acting | None = None
    reached: nn.Module | None = None


_running = _Running()


class RoutedExperts(Swapped):
    """An experts module with vectors. Its matrices keep their names, keys and values."""

    _ia3_experts: Experts

    @classmethod
    def members_over(cls, old: type[nn.Module]) -> dict[str, Any]:
        """The gate of a class that has one, multiplied where a function calls it for all pairs."""
        gate: Any = getattr(old, "_apply_gate", None)
        if gate is None:
            return {}

        def _apply_gate(self: RoutedExperts, gate_up: Tensor) -> Tensor:
            acting, product = _acting_in(self), gate(self, gate_up)
            return product if acting is None or acting.way is None else acting.gated(product)

        return {"_apply_gate": _apply_gate}

    @staticmethod
    def wrap(module: nn.Module, experts: Experts) -> None:
        """Let an experts module multiply by its vectors; harmless where it does already."""
        if not isinstance(module, RoutedExperts):
            former = type(module)
            swap(module, RoutedExperts)
            _lead_on(module, former)
        module.__dict__["_ia3_experts"] = experts

    @staticmethod
    def unwrap(module: nn.Module) -> None:
        """Give it its class back."""
        del module.__dict__["_ia3_experts"]
        former = type(module)
        swap_back(module, RoutedExperts)
        _lead_on(module, former)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A module trained in full by the adapter that acts has no vectors that do.
        if torch.compiler.is_compiling() or self._compiled_call_impl or not self._acts():
            return super().__call__(*args, **kwargs)
        _running.reached = None
        output = super().__call__(*args, **kwargs)
        if not _was_reached(self):
            raise RuntimeError(
                f"The forward of this {type(self).__name__} was replaced before the adapter was attached, which would "
                "do nothing: attach it first."
            )
        return output

    def _acts(self) -> bool:
        """Whether vectors act in a call of the module now."""
        site = vectors_of(self)
        rows = running(site)
        return bool(site.acting("input", False)) if rows is None else "input" in rows.slices[site]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _running.reached = self
        site = vectors_of(self)
        rows = None if compiling else running(site)
        if rows is not None:
            return self._by_rows(rows, site, args, kwargs)
        vectors = site.acting("input", compiling)
        if not vectors:
            return super().forward(*args, **kwargs)
        return self._with(site.product_of(vectors), None, args, kwargs)

    def _with(self, table: Tensor, rows: Rows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output while these vectors act, `[experts, width]` or `[rows, experts, width]`."""
        way = self._way()
        chosen = None if way is None else args[1] if len(args) > 1 else kwargs["top_k_index"]
        acting = _Acting(self, table, way, chosen, rows)
        former, _running.acting = _running.acting, acting
        try:
            output = super().forward(*args, **kwargs)
        finally:
            _running.acting = former
        if way is not None and not acting.used:
            raise RuntimeError(
                f"The {way} of {type(self).__name__} doesn't call its gate, so its adapter would do nothing: call "
                "model.set_experts_implementation('eager')."
            )
        return output

    def _by_rows(self, rows: Rows, site: SiteVectors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output where each token's experts have its example's vectors."""
        table = rows.slices[site].get("input")
        if table is None:
            return super().forward(*args, **kwargs)
        table = table.view(-1, self._ia3_experts.count, self._ia3_experts.width)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        is_routed = len(given) == 3 and given[0].shape[:1] == given[1].shape[:1] and not given[1].is_floating_point()
        if self._way() is not None or not is_routed:
            return self._with(table, rows, args, kwargs)
        # A loop over the experts takes their tokens in an order of its own: one adapter's tokens at a time.
        output, of_tokens = torch.zeros_like(given[0]), rows.of_tokens(len(given[0]), given[0].device)
        for alike in rows.alike():
            places = torch.isin(of_tokens, torch.tensor(alike, device=of_tokens.device)).nonzero().squeeze(-1)
            if len(places):
                its = [value[places] if isinstance(value, Tensor) else value for value in args]
                also = {key: value[places] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
                output = output.index_copy(0, places, self._with(table[alike[0]], None, tuple(its), also))
        return output

    def _way(self) -> str | None:
        """The function that computes this module, if it is one that calls the gate once."""
        way = way_of(self)
        return way if way in _AT_ONCE else None

    # What the forward reads

    @property
    def down_proj(self) -> Any:
        return self._second(SECOND)

    @property
    def weight(self) -> Any:
        return self._second("weight")

    def _second(self, name: str) -> Any:
        weight = self._parameters[name] if name in self._parameters else self.__dict__.get(name)
        if weight is None:
            raise AttributeError(name)
        acting = _acting_in(self)
        if acting is None or acting.way is not None or name != self._ia3_experts.second:
            return weight
        if len(weight) != self._ia3_experts.count:
            raise RuntimeError(
                f"This {type(self).__name__} has {len(weight)} experts here, and vectors of {self._ia3_experts.count}: "
                "experts that are split over processes can't be adapted."
            )
        return acting.stand_in(weight)

    @property
    def act_fn(self) -> Any:
        function = self._modules.get("act_fn", self.__dict__.get("act_fn"))
        if function is None:
            raise AttributeError("act_fn")
        acting = _acting_in(self)
        if acting is None or acting.way is None or getattr(self, "has_gate", True):
            return function
        return lambda product: acting.gated(function(product))


def hold_experts(module: nn.Module) -> bool:
    """Let a module multiply by its vectors if it is an experts module, and say whether it is."""
    experts = find_experts(module)
    if experts is None:
        return False
    RoutedExperts.wrap(module, experts)
    return True


def _lead_on(module: nn.Module, former: type[nn.Module]) -> None:
    """Let the forward that accelerate put before the class's own lead to that of the class which the module has now."""
    held = module.__dict__.get("_old_forward")
    if getattr(held, "__func__", None) is former.forward:
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def _was_reached(module: nn.Module) -> bool:
    return _running.reached is module


def _acting_in(module: nn.Module) -> _Acting | None:
    acting = _running.acting
    return acting if acting is not None and acting.module is module else None

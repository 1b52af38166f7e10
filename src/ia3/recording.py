"""One forward of a model, watched: what projections make is cut from the graph; products and softmaxes are kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ia3.structure import Intervals


@dataclass
class Cut:
    """One call of a projection, or of an embedding: its output as a leaf of the graph, and what went in."""

    path: str
    leaf: torch.Tensor
    entered: torch.Tensor
    dim: int
    projects: bool = True

    @property
    def width(self) -> int:
        return self.leaf.shape[self.dim]


@dataclass
class Attended:
    path: str
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


_SOFTMAX = {torch.softmax, torch.Tensor.softmax, functional.softmax, torch.special.softmax}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
_MATMUL |= {torch.mm, torch.Tensor.mm}
_BATCHED = {torch.baddbmm, torch.Tensor.baddbmm}
_ADDED = _BATCHED | {torch.addmm, torch.Tensor.addmm}
_CONVOLUTION = {functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


class Recorder(TorchFunctionMode):
    """Watches one forward: cuts what projections make, keeps products, softmaxes and attentions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cuts: list[Cut] = []
        self.products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.softmaxes: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        self.attended: list[Attended] = []
        # Attentions of torch's own function: the module around it, and what makes keys, values and queries.
        self.within: list[tuple[str, dict[str, Intervals], dict[str, Intervals], dict[str, Intervals]]] = []
        self.within_widths: dict[str, int] = {}
        self.running: list[str] = []
        self.inside = 0  # projections that are running: their own products are not cut once more
        # What was computed of parameters alone, by identity: the tensor (kept, so that its identity stays its own)
        # and the parameter's path.
        self.weights: dict[int, tuple[torch.Tensor, str]] = {}
        for path, parameter in model.named_parameters():
            self.weights[id(parameter)] = (parameter, path)

    # The modules

    def watch(self, hooks: ExitStack) -> None:
        for path, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._entering(path, module))
            after = module.register_forward_hook(self._leaving(path, module), with_kwargs=True, always_call=False)
            hooks.callback(before.remove)
            hooks.callback(after.remove)

    def _entering(self, path: str, module: nn.Module) -> Callable[..., None]:
        projects = _projects(module)

        def enter(*_: Any) -> None:
            self.running.append(path)
            self.inside += projects

        return enter

    def _leaving(self, path: str, module: nn.Module) -> Callable[..., Any]:
        projects = _projects(module)

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            while self.running and self.running.pop() != path:
                pass
            self.inside -= projects
            entered = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if projects and entered is not None and isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
                return (self._cut(path, output[0], entered, _channel_dim(module, output[0])), *output[1:])
            if not isinstance(output, torch.Tensor) or entered is None:
                return None
            if isinstance(module, nn.Embedding):
                return self._cut(path, output, entered, -1, projects=False)
            if not projects:
                return None
            return self._cut(path, output, entered, _channel_dim(module, output))

        return leave

    def _cut(
        self, path: str, output: torch.Tensor, entered: torch.Tensor, dim: int, projects: bool = True
    ) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        leaf = output.detach().requires_grad_()
        self.cuts.append(Cut(path, leaf, entered, dim, projects))
        return leaf.clone()  # no leaf, so that what follows may be computed in place

    # The functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        output = func(*args, **kwargs)
        if not isinstance(output, torch.Tensor):
            self._derive(output, args, kwargs)
            return output
        if func is functional.scaled_dot_product_attention:
            queries, keys, values = (_argument(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
            self.attended.append(Attended(self._around(), queries, keys, values))
        elif func in _SOFTMAX:
            self.softmaxes.append((_argument(args, kwargs, 0, "input"), output, self._around()))
        elif func is functional.linear or func in _CONVOLUTION:
            return self._projected(output, args[0], [args[1] if len(args) > 1 else kwargs.get("weight")], func)
        elif func is torch.einsum:
            operands = [item for item in args[1:] if isinstance(item, torch.Tensor)]
            operands = operands or [item for item in args[1] if isinstance(item, torch.Tensor)]
            if len(operands) == 2:
                return self._multiplied(output, *self._as_written(args[0], operands))
        elif func in _MATMUL:
            return self._multiplied(output, args[0], args[1] if len(args) > 1 else next(iter(kwargs.values())))
        elif func in _ADDED:
            names = ("batch1", "batch2") if func in _BATCHED else ("mat1", "mat2")
            left, right = (_argument(args, kwargs, place + 1, name) for place, name in enumerate(names))
            return self._multiplied(output, left, right)
        if func is not functional.embedding:  # an activation, although it is made of a parameter alone
            self._derive(output, args, kwargs)
        return output

    def _around(self) -> str:
        return self.running[-1] if self.running else ""

    def _owner(self, tensor: Any) -> str | None:
        """The path of the parameter that a tensor is, or was computed of alone."""
        if not isinstance(tensor, torch.Tensor):
            return None
        known = self.weights.get(id(tensor))
        return known[1] if known is not None and known[0] is tensor else None

    def _derive(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = [x for x in _tensors((args, kwargs)) if x.is_floating_point()]
        owners = [self._owner(x) for x in used]
        if used and all(owners) and not any(self._is_cut(x) for x in used):
            for made in _tensors(output):
                self.weights[id(made)] = (made, owners[0] or "")

    def _is_cut(self, tensor: torch.Tensor) -> bool:
        return tensor.requires_grad

    def _as_written(self, equation: Any, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """An einsum's operands, last the one that brings the last axis of what it makes."""
        if not isinstance(equation, str) or "->" not in equation:
            return operands
        left, right = equation.replace(" ", "").split("->")
        first, second = left.split(",")
        if right and right[-1] in first and right[-1] not in second:
            return operands[::-1]
        return operands

    def _multiplied(self, output: torch.Tensor, left: Any, right: Any) -> torch.Tensor:
        for weight, entered in ((right, left), (left, right)):
            if self._owner(weight) is not None:
                return self._projected(output, entered, [weight], torch.matmul)
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and output.requires_grad:
            self.products.append((output, left, right))
        return output

    def _projected(self, output: torch.Tensor, entered: Any, weights: list[Any], func: Any) -> torch.Tensor:
        """What a bare parameter made of an activation is cut as a projection of the parameter's name."""
        owner = next((path for weight in weights if (path := self._owner(weight)) is not None), None)
        if self._owner(entered) is not None and owner is not None:
            self._derive(output, (entered, *weights), {})
            return output
        if self.inside or owner is None or not isinstance(entered, torch.Tensor):
            return output
        if func in _CONVOLUTION and _is_depthwise_weight(weights[0]):
            return output
        return self._cut(owner, output, entered, 1 if func in _CONVOLUTION else -1)

    def _multi_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's own attention makes everything inside of one function; its parameters say which channels."""
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        width = given["embed_dim_to_check"]
        made: list[dict[str, Intervals]] = []
        for place, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            apart = self._owner(given.get(name))
            together = self._owner(given["in_proj_weight"])
            if apart is not None:
                made.append({apart: ((0, width),)})
            elif together is not None:
                made.append({together: ((place * width, (place + 1) * width),)})
        if len(made) == 3:
            queries, keys, values = made
            self.within.append((self._around(), keys, values, queries))
            for path, intervals in (item for part in made for item in part.items()):
                self.within_widths[path] = max(self.within_widths.get(path, 0), intervals[-1][1])
        output = func(*args, **kwargs)
        owner = self._owner(given["out_proj_weight"]) or self._around()
        return (self._cut(owner.removesuffix(".weight"), output[0], given["query"], -1), *output[1:])


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _is_depthwise_weight(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() > 2 and weight.shape[1] == 1 and weight.shape[0] > 1


def _projects(module: nn.Module) -> bool:
    """Whether a module mixes channels by a matrix of its own; a depthwise convolution scales each by itself."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or any(True for _ in module.children()):
        return False
    if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
        return hasattr(module, "in_features") and hasattr(module, "out_features")
    return not (isinstance(module, nn.modules.conv._ConvNd) and _is_depthwise_weight(weight))


def _channel_dim(module: nn.Module, output: torch.Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return output.dim() - 1 - len(module.kernel_size)
    return output.dim() - 1

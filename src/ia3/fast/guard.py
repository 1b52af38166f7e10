"""When a model's loss may be fused: what it leaves out at a model as it stands, and what changes afterwards.

A fused loss reads a model's weights and calls none of its modules. Hooks with side effects, forwards from elsewhere,
gradients of other parameters and checkpointing are found here by looking (`unsupported_modules`); whether the numbers
are the model's own is found by comparing them (`compare.py`); and `Guard` notices what changes after that.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from ia3.hooks import SiteVectors
from ia3.sites import VECTORS
from ia3.state import find_attached
from ia3.swap import SavedModule

NOT_ALONE = "exactly one adapter must act, and none be merged"
# Where an adapted model's forward keeps the class that it stands before.
OLD_CLASS = "_ia3_old_class"
# Where a module keeps those that a forward and its backward call.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_HOOKS = (
    *("scale_input", "scale_output", "keep_in_place", "stop_listening"),
    *("_take_adapter_names", "_forget_adapter_names"),
)


def unsupported_modules(model: Any, front: str = "") -> str | None:
    """The first thing that a fused loss over the model's weights would leave out; None where there is none.

    Args:
        model: any model.
        front: the path of the module whose inside is fused; the others run as ever, of which those around it are not
            called as modules.
    """
    written = next((base for base in type(model).__mro__ if _is_written(base)), None)
    if written is None or own_forward(type(model)) is not vars(written)["forward"]:
        return f"a {type(model).__name__} has a forward of its own"
    inside = [(path, module) for path, module in model.named_modules() if _is_inside(path, front)]
    around = [(path, model.get_submodule(path)) for path in _paths_around(front)]
    home = written.__module__
    other = next(((path, module) for path, module in (*around, *inside) if not _is_known(type(module), home)), None)
    if other is not None:
        return f"{other[0] or 'the model'} is a {type(other[1]).__name__} with a forward from elsewhere"
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if _is_frozen_inside(name, front)}
    if len(dtypes) > 1:
        return f"its weights are of several kinds: {', '.join(sorted(map(str, dtypes)))}"
    return next((reason for path, module in (*around, *inside) if (reason := _of(path, module))), None)


def _is_inside(path: str, front: str) -> bool:
    return not front or path == front or path.startswith(f"{front}.")


def _paths_around(front: str) -> list[str]:
    """The model's own path and those down to a module, without its own."""
    parts = front.split(".") if front else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def _is_frozen_inside(name: str, front: str) -> bool:
    return _is_inside(name, front) and f".{VECTORS}." not in name


def own_forward(cls: type[nn.Module]) -> Any:
    """The class's forward before an adapted model's stood before it."""
    old = getattr(cls.forward, OLD_CLASS, None)
    return cls.forward if old is None else old.forward


def _is_written(base: type) -> bool:
    """Whether a class has a forward of transformers."""
    own = "forward" in vars(base) and not hasattr(vars(base)["forward"], OLD_CLASS)
    return own and base.__module__.startswith("transformers.")


def _is_known(cls: type[nn.Module], home: str) -> bool:
    """Whether a module's class and its forward are torch's, this package's, or those beside the model's class."""
    homes = ("torch.nn.modules.", "transformers.activations", "transformers.pytorch_utils", "ia3.", home)
    if not f"{cls.__module__}.".startswith(homes):
        return False
    code = getattr(own_forward(cls), "__code__", None)
    # A class that was patched has a forward from another file, whatever module it names.
    return code is not None and code.co_filename.startswith(_sources())


@cache
def _sources() -> tuple[str, ...]:
    """The folders of the packages whose forwards are known."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "transformers", "ia3")]
    return tuple(f"{folder}{os.sep}" for spec in specs if spec for folder in spec.submodule_search_locations or ())


def _of(path: str, module: nn.Module) -> str | None:
    names = [getattr(hook, "__name__", type(hook).__name__) for kind in HOOKS for hook in vars(module)[kind].values()]
    other = next((name for name in names if name not in _OWN_HOOKS), None)
    if other is not None:
        return f"{path or 'the model'} carries another's hook, {other}"
    if "forward" in module.__dict__:
        return f"the forward of {path or 'the model'} was replaced"
    if hasattr(module, "parametrizations"):
        return f"{path} is parametrised"
    if isinstance(module, SavedModule):
        return f"{path} is trained in full"
    if getattr(module, "gradient_checkpointing", False):
        return f"{path or 'the model'} checkpoints its gradients: compile_step(…, recompute=True) saves memory, too"
    if not isinstance(module, nn.Linear):
        return None
    kind = type(module.weight).__name__
    return None if kind == "Parameter" else f"the weight of {path} is a {kind}"


# What every module has.
_BASE = frozenset(vars(nn.Module()))
_CONTENTS = ("_parameters", "_buffers", "_modules")


class Guard:
    """Whether a model still is what it was when a loss was fused, or a computation captured.

    Watched are its modules, their classes and those classes' functions, the functions beside the classes and the
    attention that the configuration names; hooks, configurations, rates of dropout and other settings; where its
    tensors are, of which kind, and which are trained; and which adapters act. A frozen weight that changes in place
    is no change, since it is read where it is.

    A look is a pass in C over lists that are made once, for a call of an own loop waits for it. That a hook came to a
    module without any shows by the number of hooks that were ever registered; not noticed are a hook that is put into a
    module's dictionary without being registered, and a dictionary of a module that is replaced by a filled one.

    Args:
        model: any model, with adapters or without; it is not kept alive.
        folded: tensors of it that were read once; not even a change in place goes unnoticed.
    """

    def __init__(self, model: nn.Module, folded: Sequence[Tensor] = ()) -> None:
        self.root, self.folded = weakref.ref(model), folded
        every = list(model.modules())
        self.modules = [module for module in every[1:] if not isinstance(module, SiteVectors)]
        self.attributes = [vars(module) for module in self.modules]
        # A dictionary that is empty costs less to look at than one that isn't.
        held = [vars(module)[name] for module in every for name in _CONTENTS]
        hooks = [(each, name, each[name]) for each in (vars(model), *self.attributes) for name in HOOKS]
        self.hooked = [entry for entry in hooks if entry[2]]
        self.hooked_at = tuple(zip(*((each, name) for each, name, _ in self.hooked), strict=True)) or ((), ())
        self.hook_places = [id(held) for *_, held in self.hooked]
        self.unhooked = [entry for entry in hooks if not entry[2]]
        self.empty = [each for each in held if not each]
        self.filled = [each for each in held if each] + [each for *_, each in self.hooked]
        self.contents = [dict(each) for each in self.filled]
        self.tensors = [value for each in held for value in each.values() if isinstance(value, Tensor)]
        # Equal is not the same, of which tensors with one number can't be told from others in another way.
        self.single = [
            (each, name, value)
            for each in held
            for name, value in each.items()
            if isinstance(value, Tensor) and value.numel() < 2
        ]
        self.frozen = [tensor for tensor in self.tensors if not tensor.requires_grad]
        self.trained = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.dropping = [vars(module) for module in every if dropout_rates(module)]
        self.settings = _settings(self.modules)
        self.namespaces = _namespaces(every)
        self.registered = _registered(model)
        self.kinds = list(dict.fromkeys(map(type, every)))
        self.sizes, self.handles = list(map(len, self.attributes)), RemovableHandle.next_id
        self.shadows = list(map(_shadows, self.modules))
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.snapshot = self._snapshot(model)
        self.configs = [(config, copied(vars(config))) for config in _configs(every)]

    def is_valid(self) -> bool:
        """Whether what was computed then would be right now."""
        return self.is_in_place() and self.is_as_it_was()

    def is_as_it_was(self) -> bool:
        """Whether all but the places of tensors is."""
        model = self.root()
        if model is None:
            return False
        try:
            return (
                not any(self.empty)
                and self.filled == self.contents
                and self._has_its_hooks()
                and all(each.get(name) is tensor for each, name, tensor in self.single)
                and self._has_its_functions()
                and self._has_its_configs()
                and self._snapshot(model) == self.snapshot
            )
        # Tensors that can't be compared are others; a setting is gone; one of another kind has no place in memory.
        except (AttributeError, KeyError, RuntimeError, TypeError):
            return False

    def is_in_place(self) -> bool:
        """Whether the tensors are where they were in memory, which is little of what makes a computation right."""
        try:
            return list(map(Tensor.data_ptr, self.tensors)) == self.places
        except RuntimeError:  # one of another kind has no place in memory
            return False

    @property
    def in_one_mode(self) -> bool:
        """Whether all that drops is in the model's own mode."""
        model = self.root()
        return model is not None and set(map(itemgetter("training"), self.dropping)) <= {model.training}

    def _has_its_hooks(self) -> bool:
        """Whether the dictionaries of hooks are those that were there, and no hook came to a module without any."""
        if list(map(id, map(dict.get, *self.hooked_at))) != self.hook_places:
            return False
        if self.handles != RemovableHandle.next_id:  # a hook was registered somewhere
            if not all(each[name] is hooks and not hooks for each, name, hooks in self.unhooked):
                return False
            self.handles = RemovableHandle.next_id
        return True

    def _has_its_configs(self) -> bool:
        """Whether no configuration changed; a classifier's own forward notes its kind of problem when first called."""
        for config, before in self.configs:
            if vars(config) != before:
                if before.get("problem_type", "") is not None:
                    return False
                before["problem_type"] = vars(config).get("problem_type")
                if vars(config) != before:
                    return False
        return True

    def _has_its_functions(self) -> bool:
        """Whether no module got a function that stands before its class's."""
        sizes = list(map(len, self.attributes))
        if sizes != self.sizes:
            if list(map(_shadows, self.modules)) != self.shadows:
                return False
            self.sizes = sizes
        return True

    def _snapshot(self, model: nn.Module) -> list[Any]:
        return [
            type(model),
            list(map(type, self.modules)),
            list(map(type, self.tensors)),
            any(map(attrgetter("requires_grad"), self.frozen)),
            all(map(attrgetter("requires_grad"), self.trained)),
            [version_of(tensor) for tensor in self.folded],
            [list(map(of, modules)) for of, modules in self.settings],
            [of(namespace) for of, namespace in self.namespaces],
            [mapping.get(name) for mapping, name in self.registered],
            [(own_forward(kind), len(vars(kind))) for kind in self.kinds],
            [vars(model).get(name) for name in ("config", "forward", "_loss_function", "loss_type")],
            _acting(model),
        ]


def dropout_rates(module: nn.Module) -> list[str]:
    """The names of a module's attributes that are rates of dropout."""
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]


def _settings(modules: Iterable[nn.Module]) -> list[tuple[Callable[[Any], Any], list[dict[str, Any]]]]:
    """What modules compute with besides tensors and modules: how it is read, and where, by modules of equal names."""
    named = ((_setting_names(module), vars(module)) for module in modules)
    found = sorted(((names, held) for names, held in named if names), key=itemgetter(0))
    groups = groupby(found, key=itemgetter(0))
    return [(itemgetter(*names), [held for _, held in members]) for names, members in groups]


def _setting_names(module: nn.Module) -> tuple[str, ...]:
    """Of torch's own layers the numbers like rates and epsilons alone: the others are the shapes of their weights."""
    kinds: Any = float if type(module).__module__.startswith("torch.") else (bool, int, float, str, FunctionType)
    chosen = [
        name
        for name, value in vars(module).items()
        if name not in _BASE and not _is_a_note(name) and (isinstance(value, kinds) or name == "config")
    ]
    if "gradient_checkpointing" in vars(module):
        chosen.append("gradient_checkpointing")
    return tuple(sorted(set(chosen)))


def _is_a_note(name: str) -> bool:
    """Whether an attribute says what was done with a module, not what it computes."""
    return "cached" in name or name in ("_is_hf_initialized", "name_or_path")


def _namespaces(modules: Iterable[nn.Module]) -> list[tuple[Callable[[Any], Any], Mapping[str, Any]]]:
    """The functions and classes that transformers' classes find beside them, those of the classes, and torch's."""
    homes = {sys.modules[kind.__module__] for kind in map(type, modules) if kind.__module__.startswith("transformers.")}
    beside = [vars(home) for home in sorted(homes, key=attrgetter("__name__"))]
    classes = [vars(kind) for kind in dict.fromkeys(map(type, modules)) if kind.__module__.startswith("transformers.")]
    found = [(_functions(each), each) for each in (vars(functional), *beside, *classes)]
    return [(itemgetter(*names), each) for names, each in found if names]


def _functions(namespace: Mapping[str, Any]) -> list[str]:
    kinds = (FunctionType, staticmethod, classmethod, property, type)
    return [name for name, value in namespace.items() if isinstance(value, kinds) or callable(value)]


def _registered(model: Any) -> list[tuple[Any, str]]:
    """Where the attention that a configuration names, and its mask, are looked up."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    masks: Any = sys.modules.get("transformers.masking_utils")
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    tables = (
        getattr(library, "ALL_ATTENTION_FUNCTIONS", None),
        getattr(masks, "ALL_MASK_ATTENTION_FUNCTIONS", None),
    )
    return [(table, name) for table in tables if table is not None and isinstance(name, str)]


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    held = [vars(module).get("config") for module in modules]
    return list({id(config): config for config in held if hasattr(config, "__dict__")}.values())


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values, with copies of what may change in place, to see by `==` whether one has changed."""
    return {name: copy.deepcopy(each) if isinstance(each, dict | list) else each for name, each in values.items()}


def _shadows(module: nn.Module) -> frozenset[str]:
    """The attributes of a module that stand before functions of its class."""
    kind = type(module)
    return frozenset(name for name in vars(module) if name not in _BASE and callable(getattr(kind, name, None)))


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; nobody counts that of an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def _acting(model: nn.Module) -> tuple[Any, ...]:
    """The adapters that act, themselves and not their names, which others may get."""
    state = find_attached(model)
    if state is None:
        return ()
    return (state.enabled, state.merged, *(_Same(state.adapters[name]) for name in state.active))


class _Same:
    """Equal to what holds the very same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)

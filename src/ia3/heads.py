"""Parts of a model that its checkpoint lacks: an adapter trains them in full and holds them, or it is said.

`from_pretrained` draws what the file lacks, or has in another size, anew with each loading. transformers marks the
parameters that it filled from a file and those tied to them; the others are the drawn ones. A model without any mark
was made from a configuration, or copied: nothing is known about it then, nor about parameters that are offloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ia3.checkpoint import embeddings, saved_vocabulary
from ia3.config import IA3Config, TaskType
from ia3.layers import is_inside
from ia3.sites import SAVED_COPIES, VECTORS, logger, matches_name, matching
from ia3.tensors import plain_tensors

# Tasks with a head, and the names that PEFT's file of such a task holds in full, whatever its configuration says.
_HEADS = {
    TaskType.SEQ_CLS: ("classification_head", "classifier", "pre_classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# What a saved configuration excludes besides what its user did.
_EXCLUDED_BY_DEFAULT = re.compile(r"(.*\.)?(cross)?attention\.output\.dense")
# What transformers sets on a parameter that it filled from a file.
_FILLED = "_is_hf_initialized"


@dataclass(frozen=True)
class Lacking:
    """What a checkpoint lacked of a model.

    Args:
        modules: the outermost modules to train in full, by path.
        rest: names of parameters that are left: those of the base's own layers and embeddings, those that stand in no
            module of their own, and those of a model without a head, whose pooler often nobody reads.
    """

    modules: tuple[str, ...]
    rest: tuple[str, ...]


def with_head(model: nn.Module, config: IA3Config) -> None:
    """Add the heads that the configuration's task implies, as PEFT does, to the modules trained in full."""
    names = _HEADS.get(config.task_type, ())  # type: ignore[call-overload]
    ends = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    _train_in_full(config, [name for name in names if name in ends])


def with_whole_head(model: nn.Module, config: IA3Config) -> list[str]:
    """For a new adapter: add all that it must train in full to be loaded again.

    That is what `with_head` adds, what the checkpoint lacked, and for a task with a head what stands outside of the
    base model; without what `exclude_modules` names.

    Args:
        model: the base, with other adapters or without.
        config: changed in place.

    Returns:
        What to tell the user once the adapter is attached: what was added, and what no adapter can hold.
    """
    with_head(model, config)
    lacking = find_lacking(model, config)
    _train_in_full(config, lacking.modules)
    told = []
    if lacking.modules:
        told.append(
            f"Trained in full and saved beside the vectors: {', '.join(lacking.modules)}, which the checkpoint lacks "
            "or which belong to the head. To leave some as they are, name them in exclude_modules."
        )
    if lacking.rest:
        told.append(
            f"The checkpoint lacks {_few(lacking.rest)} of this {type(model).__name__}, newly drawn, which will stay "
            "as drawn and won't be saved: save the base by save_pretrained and begin with the saved one, or name a "
            "module around them in modules_to_save."
        )
    return told


def head_parts(model: nn.Module) -> list[str]:
    """Paths of the modules that a new adapter trains in full, where the model is one with a head."""
    return list(find_lacking(model, IA3Config(task_type=TaskType.SEQ_CLS)).modules)


def check_brought(model: nn.Module, config: IA3Config, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse an adapter that lacks what its base has newly drawn, since its answers would differ with each loading.

    Parameters that are drawn as equal numbers, as norms and biases are, don't differ. What `find_lacking` leaves
    outside of the base's layers, and a model that transformers didn't make, gets a warning instead.

    Args:
        model: the base.
        config: the adapter's; what it names in `exclude_modules` may be missing.
        tensors: of the adapter's file.
        name: the adapter's name, which the keys may have.

    Raises:
        ValueError: what is missing, by name.
    """
    drawn = _drawn(model)
    if not drawn:
        return
    brought = {id(drawn[key]) for key in plain_tensors(tensors, name) if key in drawn}
    excluded = _excluded(drawn, config)
    missing = [
        key
        for key, parameter in _once(drawn)
        if id(parameter) not in brought and _is_random(parameter) and key not in excluded
    ]
    if not missing:
        return
    where = getattr(model, "name_or_path", "") or type(model).__name__
    in_layers = _in_layers(model)
    loose = {key for key in _divide(model, drawn, ())[1] if key not in in_layers}
    if not hasattr(model, "base_model_prefix") or set(missing) <= loose:
        logger.warning(
            "The base model %s lacks %s, newly drawn with each loading, and the adapter doesn't hold them: answers "
            "that depend on them differ from one loading to the next.",
            where,
            _few(missing),
        )
        return
    raise ValueError(
        f"The base model {where} lacks {len(missing)} tensors that the adapter doesn't bring, or has them in another "
        f"size; they were newly drawn ({_few(missing)}). Is it the base that the adapter was made for? Load one that "
        "holds them, or where their values don't matter name them in exclude_modules of the adapter's configuration."
    )


def find_lacking(model: nn.Module, config: IA3Config) -> Lacking:
    """What a new adapter of this configuration should hold besides the modules that it names itself."""
    drawn = _drawn(model)
    wanted = {**drawn, **(_outside(model) if config.task_type in _HEADS else {})}
    if not wanted:
        return Lacking((), ())
    saved = frozenset(config.modules_to_save or ())
    named = [path for path, _ in _modules(model) if matches_name(path, saved)]
    modules, rest = _divide(model, wanted, named)
    excluded = _excluded((*modules, *rest), config)
    drawn_ids = {id(parameter) for parameter in drawn.values()}
    return Lacking(
        tuple(path for path in modules if path not in excluded),
        tuple(
            key
            for key in rest
            if id(wanted[key]) in drawn_ids and not any(is_inside(key, path) for path in named) and key not in excluded
        ),
    )


def _train_in_full(config: IA3Config, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *names})


def _modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The base's modules with each of their paths, without what adapters put there."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name not in (VECTORS, SAVED_COPIES):
            yield from _modules(child, f"{path}.{name}" if path else name)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters, tied ones under each of their names."""
    for path, module in _modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def _drawn(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that no file filled; none where the model has no mark of a file at all."""
    parameters = dict(_parameters(model))
    drawn = {name: p for name, p in parameters.items() if not getattr(p, _FILLED, False)}
    if len(drawn) == len(parameters):
        return {}
    # Offloading and quantising put new parameters in the place of those that were filled.
    drawn = {
        name: p for name, p in drawn.items() if type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta
    }
    if drawn and saved_vocabulary(model) != _vocabulary(model):
        # Resizing does so too; saving knows about it.
        resized = [path for path, _ in embeddings(model)]
        drawn = {name: p for name, p in drawn.items() if not any(is_inside(name, path) for path in resized)}
    return drawn


def _vocabulary(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _base_path(model: nn.Module) -> str:
    """Where the base stands in a model with a head; empty where that can't be told."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _outside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside of the base that aren't tied to its own."""
    base = _base_path(model)
    if not base:
        return {}
    parameters = dict(_parameters(model))
    own = {id(parameter) for name, parameter in parameters.items() if is_inside(name, base)}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) not in own}


def _divide(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], named: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The outermost modules that hold wanted parameters alone, and the parameters that are in none.

    Args:
        model: the base.
        wanted: parameters by name, tied ones under each of their names.
        named: paths of modules that are trained in full anyway: no module around them is taken, and none in them.
    """
    named = set(named)
    closed = {prefix for path in named for prefix in _around(path)} | _in_layers(model)
    closed |= {prefix for name, _ in _parameters(model) if name not in wanted for prefix in _around(name)}
    modules = {} if _has_no_head(model) else dict(model.named_modules())
    found: dict[str, None] = {}
    placed: set[int] = set()
    for name, parameter in wanted.items():
        if any(is_inside(name, path) for path in named):
            placed.add(id(parameter))
            continue
        for prefix in _around(name):
            if prefix in modules and prefix not in closed and _is_called(modules[prefix]):
                found[prefix] = None
                placed.add(id(parameter))
                break
    rest = tuple(name for name, parameter in _once(wanted) if id(parameter) not in placed)
    return tuple(found), rest


def _around(name: str) -> list[str]:
    """The paths of the modules around a module or parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _is_called(module: nn.Module) -> bool:
    """Whether a module is more than a list of others."""
    return type(module).forward is not nn.Module.forward


def _in_layers(model: nn.Module) -> set[str]:
    """The paths of the base's numbered layers and of the embeddings, of all around them and all in them."""
    base = _base_path(model)
    places = [path for path, _ in embeddings(model)]
    found: set[str] = set()
    for name, _ in _parameters(model):
        in_the_base = not base or is_inside(name, base)
        if (in_the_base and any(part.isdigit() for part in name.split("."))) or any(
            is_inside(name, place) for place in places
        ):
            found |= {name, *_around(name)}
    return found


def _has_no_head(model: Any) -> bool:
    """Whether a model is one of transformers' bare ones, whose output are hidden states, or none of transformers'."""
    if not hasattr(model, "base_model_prefix"):
        return True
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES.get(getattr(getattr(model, "config", None), "model_type", None), ())
    return type(model).__name__ in ((names,) if isinstance(names, str) else names)


def _excluded(paths: Iterable[str], config: IA3Config) -> set[str]:
    """Those of the paths, of modules and parameters, that `exclude_modules` means or a module around them."""
    names = config.exclude_modules
    if not isinstance(names, str):
        names = {name for name in names or () if not _EXCLUDED_BY_DEFAULT.fullmatch(name)}
    around = {path: (path, *_around(path)) for path in paths}
    meant = matching(names, {each for these in around.values() for each in these}, "exclude_modules")
    return {path for path, these in around.items() if not meant.isdisjoint(these)}


def _is_random(parameter: nn.Parameter) -> bool:
    values = parameter.detach()
    return not values.numel() or bool((values != values.reshape(-1)[0]).any())


def _once(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter under the first of its names."""
    seen: set[int] = set()
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _few(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown

"""Watching a model's forwards: whether all that was put on it is in its place, and whether anything reads it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ia3.placement import Listener, Placement
from ia3.quantised import layer_without_backward
from ia3.sites import logger
from ia3.state import find_attached

LISTENS = "_ia3_listens"
"""The attribute of a forward that listens itself in training."""

# A compiler evaluates a function of constants once, before it looks at the modules; a model is no constant to it.
_MODELS: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def watch(model: nn.Module) -> None:
    """Put the hooks on a model that begins to carry something, each once."""
    _MODELS[_placement(model).token] = model
    if keep_in_place not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(keep_in_place)
        model.register_forward_hook(stop_listening, always_call=True, with_kwargs=True)


def unwatch(model: nn.Module) -> None:
    """Take them away."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is keep_in_place]:
        del model._forward_pre_hooks[key]
    for key in [key for key, hook in model._forward_hooks.items() if hook is stop_listening]:
        for held in (model._forward_hooks, model._forward_hooks_always_called, model._forward_hooks_with_kwargs):
            del held[key]


def keep_in_place(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: find again what a tool replaced, and listen to the first forwards.

    Raises:
        RuntimeError: a module that carries a vector was replaced by one that can't.
    """
    if getattr(model, "_is_replica", False):
        return
    _settle(model)
    _forget_interrupted(model)
    # A forward that computes its loss without the modules listens where it calls them after all.
    if not (hasattr(type(model).forward, LISTENS) and _is_training(model)):
        listen(model)


def _settle(model: nn.Module) -> None:
    placement = _placement(model)
    if torch.compiler.is_compiling():
        _settle_compiled(placement.token)
        return
    if placement.token not in _MODELS:  # a copy's
        _MODELS[placement.token] = model
    _find_all(model)


def _find_all(model: nn.Module) -> None:
    placement = _placement(model)
    placement.settle(model)
    placement.expect_all()


def _settle_compiled(token: str) -> None:
    model = _MODELS.get(token)
    if model is not None:
        _find_all(model)


# What torch.compiler.assume_constant_result sets, which would import the whole compiler: a second and a half.
_settle_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def listen(model: nn.Module) -> None:
    """Hear which modules a forward calls, if that is not known of its adapters; `stop_listening` ends it.

    Raises:
        RuntimeError: it would train through layers that pass no gradient on.
    """
    if torch.compiler.is_compiling():
        return
    state = find_attached(model)
    if state is None or state.listener is not None:
        return
    training = _is_training(model)
    due = [name for name in state.acting if not {(name, True), (name, training)} & state.heard]
    # Hooks that come and go would compile a part that is compiled again.
    if due and not any(_is_compiled(module) for module in model.modules()):
        adapters = [state.adapters[name] for name in due]
        if training:
            _expect_backward(model)
        placement = state.placement
        modules = {site.path: placement.site_module(site.path) for each in adapters for site in each.layout.sites}
        modules |= {path: placement.saved_module(path) for each in adapters for path in each.saved}
        state.listener = Listener(model, modules, training=training)


def _expect_backward(model: nn.Module) -> None:
    """Refuse to train through layers that pass no gradient on, as some do without a word.

    Raises:
        RuntimeError: there is one.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    found = layer_without_backward(model)
    if found is not None:
        path, kind = found
        raise RuntimeError(
            f"{path} holds its weight as {kind} and passes no gradient on, so the vectors before it would learn "
            "nothing, in silence: layers that quantise their inputs, too, mostly have no backward. Train over a base "
            "with quantised weights alone (int8 or nf4 of bitsandbytes, torchao's weight-only kinds); for answers "
            "call model.eval(), or run the model under torch.no_grad()."
        )


def _forget_interrupted(model: nn.Module) -> None:
    """End the listening of a forward that was left by Ctrl-C, after which torch calls no hooks."""
    if torch.compiler.is_compiling():
        return
    state = find_attached(model)
    listener = None if state is None else state.listener
    if state is not None and listener is not None and listener.thread == threading.get_ident():
        state.listener = None
        listener.end()


def stop_listening(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the root: what nothing read is an error in training, and otherwise said.

    Raises:
        RuntimeError: a vector acts that the model doesn't read, though it called the module around its own.
    """
    state = find_attached(model)
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
    if kwargs.get("encoder_outputs") is not None:  # the encoder was called before
        encoder = {*model.get_encoder().modules()}  # type: ignore[operator]
        uncalled = [path for path in uncalled if model.get_submodule(path) not in encoder]
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


def _placement(model: nn.Module) -> Placement:
    state = find_attached(model)
    assert state is not None
    return state.placement

"""What stands around a call of a model and leads to its own forward, whatever the model is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from ia3.rows import act_here
from ia3.sites import logger

INSTEAD_OF_AUTOCAST = "load the model in half precision (dtype=torch.bfloat16)"


class SayOnce:
    """Says each reason for a model's own way in the log, the first time that it comes.

    Args:
        what: is computed that way.
    """

    def __init__(self, what: str) -> None:
        self.what, self.said = what, set[str]()

    def __call__(self, reason: str) -> None:
        """Say it, if it wasn't said."""
        if reason not in self.said:
            self.said.add(reason)
            logger.info("%s, since %s", self.what, reason)


def unusual_call(model: Any) -> str | None:
    """Why the model's own forward must run as things stand around a call; None where it need not."""
    return "it is called inside a batch that mixes adapters" if act_here() else unusual_surroundings(model)


def unusual_surroundings(model: Any) -> str | None:
    """The same of a call that hears the rows of vectors that act."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks are registered for all modules"
    # A replica of DataParallel shares its original's attributes, and has no parameters.
    if getattr(model, "_is_replica", False):
        return "it is a replica of DataParallel"
    # torch.func's tensors can't be asked where they are.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it"
    device = model.device
    if is_autocast_on(device):
        return f"autocast is on: {INSTEAD_OF_AUTOCAST} instead"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "it is being captured"
    return None


def is_autocast_on(device: torch.device) -> bool:
    """Whether a model's own forward would compute in another precision than its weights'."""
    return torch.is_autocast_enabled(device.type)

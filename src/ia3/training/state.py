"""What a training goes on from, and what besides its recipe decides its numbers."""

from __future__ import annotations

import hashlib
import io
import pickle
import platform
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ia3.files import write_atomically
from ia3.runs.recipe import Recipe
from ia3.runs.run import Evaluation, TrainerState
from ia3.training.plan import RunPlan
from ia3.training.processes import ALONE, Processes


def describe_environment(recipe: Recipe, plan: RunPlan, processes: Processes = ALONE) -> dict[str, Any]:
    """What decides a run's numbers: its recipe, versions, hardware, seed, digests of data and base model."""
    model = plan.learner.model
    device = model.device
    return {
        "base_model": {"sha256_of_samples": _fingerprint(model)},
        "data": {
            name: {"rows": len(each), "sha256": each.digest(), "source": each.source}
            for name, each in (("test", plan.test), ("train", plan.training))
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "processes": processes.count,
        "recipe": recipe.content(),
        "seed": recipe.seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "accelerate": version("accelerate"),
            "ia3": version("ia3"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def _fingerprint(model: Any) -> str:
    """A digest of names, shapes and some numbers of each frozen tensor: other weights show, and it takes no time."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // 8)].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {numbers.tolist()}".encode())
    return digest.hexdigest()


def save_state(
    path: Path,
    progress: TrainerState,
    trainable: Mapping[str, Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    processes: Processes = ALONE,
) -> None:
    """Write all that the next step depends on, atomically; a pickle without code, read by `load_state`.

    Of several processes the first writes, with the random states of all.
    """
    random_states = processes.gather(_random_state(processes))
    if not processes.is_first:
        return
    kept = {progress.best, len(progress.evaluations) - 1}  # the predictions that are asked for later
    evaluations = [
        asdict(each if index in kept else replace(each, predictions=[]))
        for index, each in enumerate(progress.evaluations)
    ]
    content = {
        "optimizer": optimizer.state_dict(),
        "parameters": {name: parameter.detach() for name, parameter in trainable.items()},
        "progress": {**vars(progress), "evaluations": evaluations},
        "random": random_states,
        "schedule": schedule.state_dict(),
    }
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(path, file.getvalue())


def load_state(
    path: Path,
    trainable: Mapping[str, Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    processes: Processes = ALONE,
) -> TrainerState:
    """Put back what `save_state` wrote, the random state too; a ValueError for a damaged file or another model's.

    Another number of processes than wrote it goes on with the random states that fresh ones have.
    """
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
        progress = dict(content["progress"])
        evaluations = [Evaluation(**each) for each in progress.pop("evaluations")]
        random_states = list(content["random"])
    except (EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no whole state of a training ({error}): begin the training anew.") from error
    saved: dict[str, Tensor] = content["parameters"]
    if {name: each.shape for name, each in saved.items()} != {name: each.shape for name, each in trainable.items()}:
        raise ValueError(
            f"{path} holds {len(saved)} trained tensors that are not those of this model, which has "
            f"{len(trainable)}: go on with the base model and the targets that the run began with."
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    if len(random_states) == processes.count:
        _restore_random_state(random_states[processes.rank], processes)
    return TrainerState(**progress, evaluations=evaluations)


def _random_state(processes: Processes) -> dict[str, Any]:
    """Of several processes each has a GPU of its own, and leaves the others alone."""
    cuda: list[Tensor] = []
    if torch.cuda.is_available():
        cuda = torch.cuda.get_rng_state_all() if processes.alone else [torch.cuda.get_rng_state()]
    return {"cuda": cuda, "python": random.getstate(), "torch": torch.get_rng_state()}


def _restore_random_state(state: Mapping[str, Any], processes: Processes) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available():
        if processes.alone:
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            torch.cuda.set_rng_state(state["cuda"][0])

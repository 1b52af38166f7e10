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
from ia3.runs.run import Evaluation, TrainerState
from ia3.tasks.examples import Examples


def describe_environment(training: Examples, test: Examples, model: Any, seed: int) -> dict[str, Any]:
    """What besides the recipe decides a run's numbers: versions, hardware, seed, digests of data and base model."""
    device = model.device
    return {
        "base_model": {"sha256_of_samples": _fingerprint(model)},
        "data": {name: _describe_data(each) for name, each in (("test", test), ("train", training))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "seed": seed,
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


def _describe_data(examples: Examples) -> dict[str, Any]:
    return {"rows": len(examples), "sha256": examples.digest(), "source": examples.source}


def save_state(
    path: Path, progress: TrainerState, trainable: Mapping[str, Parameter], optimizer: Optimizer, schedule: LRScheduler
) -> None:
    """Write all that the next step depends on, atomically; a pickle without code, read by `load_state`."""
    evaluations = [asdict(each) for each in _without_old_predictions(progress)]
    content = {
        "optimizer": optimizer.state_dict(),
        "parameters": {name: parameter.detach() for name, parameter in trainable.items()},
        "progress": {**vars(progress), "evaluations": evaluations},
        "random": _random_state(),
        "schedule": schedule.state_dict(),
    }
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(path, file.getvalue())


def load_state(
    path: Path, trainable: Mapping[str, Parameter], optimizer: Optimizer, schedule: LRScheduler
) -> TrainerState:
    """Put back what `save_state` wrote, the random state too.

    Raises:
        ValueError: a damaged file, or one of another model or other settings.
    """
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
        progress = dict(content["progress"])
        evaluations = [Evaluation(**each) for each in progress.pop("evaluations")]
    except (EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no whole state of a training ({error}): begin the training anew.") from error
    _restore_parameters(content["parameters"], trainable, path)
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    _restore_random_state(content["random"])
    return TrainerState(**progress, evaluations=evaluations)


@torch.no_grad()
def _restore_parameters(saved: Mapping[str, Tensor], trainable: Mapping[str, Parameter], path: Path) -> None:
    shapes = {name: tensor.shape for name, tensor in saved.items()}
    if shapes != {name: parameter.shape for name, parameter in trainable.items()}:
        raise ValueError(
            f"{path} holds {len(saved)} trained tensors that are not those of this model, which has "
            f"{len(trainable)}: go on with the base model and the targets that the run began with."
        )
    for name, parameter in trainable.items():
        parameter.copy_(saved[name])


def _without_old_predictions(progress: TrainerState) -> list[Evaluation]:
    """The evaluations, with predictions of the best and the last alone, which are all that is asked for later."""
    kept = {progress.best, len(progress.evaluations) - 1}
    return [each if index in kept else replace(each, predictions=[]) for index, each in enumerate(progress.evaluations)]


def _random_state() -> dict[str, Any]:
    return {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

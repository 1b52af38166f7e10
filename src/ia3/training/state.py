"""What a training goes on from, and what besides its recipe decides its numbers."""

from __future__ import annotations

import hashlib
import io
import platform
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import InstanceOf, TypeAdapter
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import TypedDict

from ia3.files import write_atomically
from ia3.inference.processes import ALONE, Processes
from ia3.runs.recipe import Recipe
from ia3.runs.run import Evaluation, TrainerState
from ia3.training.plan import RunPlan
from ia3.weights import Tensors


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


@dataclass(frozen=True)
class SavedTraining:
    """What the state of a training holds: all that the next step depends on, and the best adapter so far.

    Args:
        parameters: the trained tensors by name.
        best: those of the best evaluation, on the CPU; empty while there is none.
        optimizer: its state.
        schedule: its state.
        progress: how far it has come.
        random: of a training that draws, the generators' states, of each process.
    """

    parameters: dict[str, InstanceOf[Tensor]]
    best: dict[str, InstanceOf[Tensor]]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    progress: TrainerState
    random: list[RandomState]


class RandomState(TypedDict):
    """The states of Python's and of torch's generators."""

    cuda: list[InstanceOf[Tensor]]
    python: tuple[int, tuple[int, ...], float | None]
    torch: InstanceOf[Tensor]


SavedT = TypeVar("SavedT")
# A state's file begins with this line, whose digest is that of all that follows.
_HEAD = re.compile(rb"ia3 state 1 ([0-9a-f]{64})\n")


def write_state(path: Path, state: Any) -> None:
    """Write a dataclass of tensors and plain values, atomically, its digest in front; a pickle without code."""
    file = io.BytesIO()
    torch.save({each.name: getattr(state, each.name) for each in fields(state)}, file)
    content = file.getvalue()
    write_atomically(path, b"ia3 state 1 %s\n" % hashlib.sha256(content).hexdigest().encode() + content)


def read_state(path: Path, kind: type[SavedT]) -> SavedT:
    """Read what `write_state` wrote of a dataclass.

    Raises:
        ValueError: the file is damaged, or holds something else; it names the file.
    """
    try:
        content = path.read_bytes()
        head = _HEAD.match(content)
        if head is None:
            raise ValueError("it does not begin as one")
        content = content[head.end() :]
        if hashlib.sha256(content).hexdigest().encode() != head[1]:
            raise ValueError("its digest is another: some of its bits are not as they were written, or are missing")
        found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        # It only checks: what it makes of the values, such as floats of whole numbers, would be other numbers.
        TypeAdapter(kind).validate_python(found)
        return kind(**found)
    except Exception as error:  # damaged bytes make torch.load raise almost anything
        what = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is no whole state of a training ({what.splitlines()[0][:200]}): put back a copy of it, or remove "
            "it and begin the training anew."
        ) from error


def plain_progress(progress: TrainerState) -> dict[str, Any]:
    """The progress as a state holds it, with the predictions that are asked for later alone."""
    kept = {progress.best, len(progress.evaluations) - 1}
    evaluations = [
        asdict(each if index in kept else replace(each, predictions=[]))
        for index, each in enumerate(progress.evaluations)
    ]
    return {**vars(progress), "evaluations": evaluations}


def progress_of(plain: Any) -> TrainerState:
    """The progress of a state that was read, which `read_state` has checked."""
    return TrainerState(**{**plain, "evaluations": [Evaluation(**each) for each in plain["evaluations"]]})


def save_state(
    path: Path,
    progress: TrainerState,
    trainable: Mapping[str, Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    best: Mapping[str, Tensor],
    draws: bool = True,
    processes: Processes = ALONE,
) -> None:
    """Write all that the next step depends on, atomically, in the first process; see `SavedTraining`."""
    random = processes.gather(random_state()) if draws else []
    if not processes.is_first:
        return
    plain: Any = plain_progress(progress)
    parameters = {name: parameter.detach() for name, parameter in trainable.items()}
    write_state(
        path, SavedTraining(parameters, dict(best), optimizer.state_dict(), schedule.state_dict(), plain, random)
    )


def load_state(
    path: Path,
    trainable: Mapping[str, Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    processes: Processes = ALONE,
) -> tuple[TrainerState, Tensors]:
    """Put back what `save_state` wrote, the random state too, unless another number of processes wrote it.

    Returns:
        The progress, and the best adapter's tensors.

    Raises:
        ValueError: a damaged file or another model's; it names the file, and nothing has changed.
    """
    saved = read_state(path, SavedTraining)
    shapes = {name: each.shape for name, each in trainable.items()}
    for tensors in (saved.parameters, saved.best or saved.parameters):
        if {name: each.shape for name, each in tensors.items()} != shapes:
            raise ValueError(
                f"{path} holds {len(tensors)} trained tensors that are not those of this model, which has "
                f"{len(trainable)}: go on with the base model and the targets that the run began with."
            )
    try:
        optimizer.load_state_dict(saved.optimizer)
        schedule.load_state_dict(saved.schedule)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds the state of another optimizer ({error}): go on by the run's recipe."
        ) from error
    put_back(saved.parameters, trainable)
    if len(saved.random) == processes.count:
        restore_random_state(saved.random[processes.rank])
    return progress_of(saved.progress), saved.best


def put_back(tensors: Mapping[str, Tensor], trainable: Mapping[str, Parameter]) -> None:
    """Copy tensors into the parameters of their names."""
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])


def copies_of(trainable: Mapping[str, Tensor]) -> Tensors:
    """Copies on the CPU, which stay as they are while training goes on."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable.items()}


def random_state() -> RandomState:
    """The generators' states; of GPUs that of the process's own."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    python: Any = random.getstate()
    return {"cuda": cuda, "python": python, "torch": torch.get_rng_state()}


def restore_random_state(state: RandomState) -> None:
    """Go on drawing where `random_state` was asked."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])

"""Training and predicting on a Ray cluster: Ray places the processes and replaces those that are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ia3.config import PeftConfig
from ia3.data.questions import Questions
from ia3.data.records import Records
from ia3.inference.answering import Answerer
from ia3.inference.labelling import Overrides, load_labeller
from ia3.runs.recipe import make_recipe
from ia3.runs.run import RESULT_NAME, STATE_NAME
from ia3.runs.schemas import FinishedResult, read_written
from ia3.training.resuming import resume
from ia3.training.train import train as train_here

try:
    import pyarrow as pa  # type: ignore[import-untyped]
    import ray.data
    import ray.train
    from ray.train.torch import TorchTrainer
except ImportError as error:
    raise ImportError("ia3.on_ray runs on Ray, and it is not all installed: pip install 'ia3[ray]'.") from error

# Rows that a worker is handed at once.
_ROWS_AT_ONCE = 1024
# After so many lost workers something is wrong that another start won't mend.
_FAILURES = 3


def train(
    model: str | Path,
    data: str | Path,
    *,
    output: str | Path,
    workers: int = 2,
    use_gpu: bool = False,
    failures: int = _FAILURES,
    trust_remote_code: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Fine-tune over the processes of a Ray cluster: `ia3.train` in each, data-parallel, the batch divided over them.

    When a worker is lost, Ray starts all of them again, on what is left of the cluster or what joined it, and they go
    on from the last `state.pt`: that of the last evaluation, or one at most five minutes old.

    Args:
        model: the base model, as `ia3.train` takes it; every machine must find it under this name.
        data: a file or a data set on the hub, likewise.
        output: the run's folder, on a file system that all machines share. A run that is unfinished there is gone on
            with.
        workers: how many processes.
        use_gpu: give each process a GPU.
        failures: how many times to start again before it is an error.
        trust_remote_code: run code that comes with the model.
        recipe: further fields of `ia3.train`.

    Returns:
        The run's figures, as its `result.json` has them.

    Raises:
        ValueError: what `ia3.train` raises of the recipe alone, before anything is started.
        ray.train.TrainingFailedError: what the processes raised.

    Example:
        >>> from ia3.on_ray import train
        >>> train("google/flan-t5-small", "/shared/reviews.csv", output="/shared/runs/reviews", workers=4)["accuracy"]
    """
    folder = Path(output).absolute()
    config = {**recipe, "data": str(data), "model": str(model), "output": str(folder)}
    make_recipe({**config, "output": folder})
    TorchTrainer(
        _train_in_worker,
        train_loop_config={"recipe": config, "trusted": trust_remote_code},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent / ".ray"),
            failure_config=ray.train.FailureConfig(max_failures=failures),
        ),
    ).fit()
    _, result = read_written(folder / RESULT_NAME, FinishedResult)
    del result["predictions"]
    return result


def _train_in_worker(config: dict[str, Any]) -> None:
    """What each process does, also when it is started again."""
    recipe, trusted = config["recipe"], config["trusted"]
    folder = Path(recipe["output"])
    if (folder / STATE_NAME).is_file():
        resume(folder, trust_remote_code=trusted)
    elif not (folder / RESULT_NAME).is_file():
        train_here(**{**recipe, "output": folder}, trust_remote_code=trusted)


def predict(
    adapter: str | Path,
    rows: ray.data.Dataset,
    *,
    workers: int = 2,
    use_gpu: bool = False,
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> ray.data.Dataset:
    """Answer the rows of a Ray data set: those of `ia3 predict --file`, on a cluster.

    Args:
        adapter: a folder that all machines share, or a hub repository.
        rows: with the columns that the adapter's task reads.
        workers: how many processes, each with the base model and the adapter. A lost one is replaced, and its rows are
            answered again.
        use_gpu: give each process a GPU.
        batch_size: rows at once.
        trust_remote_code: run code that comes with the base, which the adapter names.

    Returns:
        The rows, each with its `prediction`, and where labels are ranked its `probability`; None in rows without text.
        Nothing is computed before the data set is read or written, and rows come in no certain order.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: its configuration can't be read.

    Example:
        >>> rows = ray.data.read_parquet("/shared/reviews")
        >>> predict("/shared/runs/reviews/adapter", rows).write_parquet("/shared/answers")
    """
    PeftConfig.from_pretrained(adapter)  # what isn't there shows here, and not on a worker
    return rows.map_batches(
        _Predictor,
        batch_format="pyarrow",
        batch_size=_ROWS_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_args=(str(adapter), batch_size, trust_remote_code),
        num_gpus=1 if use_gpu else 0,
    )


class _Predictor:
    """A process of `predict`: an adapter on its base model, asked for a table at a time."""

    def __init__(self, adapter: str, batch_size: int, trusted: bool) -> None:
        labeller = load_labeller(adapter, Overrides(), trust_remote_code=trusted)
        self.task = labeller.task
        self.answerer = Answerer(labeller.model, labeller.tokenizer, labeller.task, batch_size=batch_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = tuple((f"row {number}", row) for number, row in enumerate(table.to_pylist()))
        questions = Questions(Records("the data set", tuple(table.column_names), rows), lambda place: self.task)
        examples = [questions[place] for place in range(len(rows))]
        filled = [place for place, example in enumerate(examples) if example.text]
        found = dict(zip(filled, self.answerer([examples[place] for place in filled]), strict=True))
        answers = [found.get(place) for place in range(len(rows))]
        labels = [None if answer is None else answer.label for answer in answers]
        shares = [None if answer is None else answer.probability for answer in answers]
        table = table.append_column("prediction", pa.array(labels, pa.string()))
        return table.append_column("probability", pa.array(shares, pa.float64()))

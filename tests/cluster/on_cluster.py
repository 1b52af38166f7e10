"""A local Ray cluster of two workers, of which one is killed: training goes on, and prediction answers every row.

Not collected by `make test`, since Ray is a quarter of a gigabyte: `make test-ray`.
"""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch

import ia3
import tiny_seq2seq
from ia3 import on_ray
from ia3.inference.answering import Answerer
from ia3.inference.loading import load_adapter
from ia3.tasks.examples import Example
from ia3.tasks.task import load_task
from ia3.tensors import load_peft_weights

RECIPE = {"batch_size": 8, "evaluate_every": 10, "learning_rate": 0.05, "steps": 120}
ROWS = 5_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    names = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "TOKENIZERS_PARALLELISM")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(90):
            label = tiny_seq2seq.LABELS[number % len(tiny_seq2seq.LABELS)]
            writer.writerow([f"{label} {'and so ' * (number % 5)}{number}", label])
    return path


def workers(title: str) -> list[psutil.Process]:
    """The processes of this cluster's actors of a class."""
    return [each for each in psutil.process_iter(["cmdline"]) if title in " ".join(each.info["cmdline"] or ())]


def kill_one(title: str) -> None:
    workers(title)[-1].send_signal(signal.SIGKILL)


def kill_one_when(title: str, there: Path) -> threading.Thread:
    """Kill one of the actors of a class once there is a file, and see that others follow."""

    def wait_and_kill() -> None:
        while not there.is_file():
            time.sleep(0.05)
        former = {each.pid for each in workers(title)}
        kill_one(title)
        while not {each.pid for each in workers(title)} - former:
            time.sleep(0.05)

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


def test_a_lost_worker_is_replaced_and_training_goes_on(cluster: None, base: Path, data: Path, tmp_path: Path) -> None:
    alone = ia3.train(str(base), str(data), output=tmp_path / "alone", **RECIPE)
    killer = kill_one_when("RayTrainWorker", tmp_path / "run" / "state.pt")
    figures = on_ray.train(base, data, output=tmp_path / "run", workers=2, **RECIPE)
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert figures["steps"] == 120
    assert figures["accuracy"] == alone.final.accuracy
    found, right = (load_peft_weights(each / "adapter") for each in (tmp_path / "run", alone.output_dir))
    assert found.keys() == right.keys()
    for name, vector in right.items():
        torch.testing.assert_close(found[name], vector, atol=1e-4, rtol=1e-4)


def test_a_recipe_is_refused_before_anything_starts(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        on_ray.train(base, data, output=tmp_path / "run", batch_size=0)


def test_each_row_is_answered_once_though_a_worker_is_lost(
    cluster: None, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter = ia3.train(str(base), str(data), output=tmp_path / "run", **{**RECIPE, "steps": 10}).adapter_dir
    texts = [f"{tiny_seq2seq.LABELS[number % 3]} {number}" if number % 10 else "" for number in range(ROWS)]
    rows = ray.data.from_items([{"number": number, "text": text} for number, text in enumerate(texts)])
    found: dict[int, str | None] = {}
    killed = 0
    for row in on_ray.predict(adapter, rows).iter_rows():
        assert row["number"] not in found
        found[row["number"]] = row["prediction"]
        if not killed:
            killed = len(workers("_Predictor"))
            kill_one("_Predictor")
    assert killed == 2
    assert found.keys() == set(range(ROWS))
    model, tokenizer = load_adapter(adapter)
    answerer = Answerer(model, tokenizer, load_task(adapter))
    examples = [Example(text, "") for text in texts[:200] if text]
    right = iter([each.label for each in answerer(examples)])
    assert [found[number] for number in range(200)] == [next(right) if t else None for t in texts[:200]]

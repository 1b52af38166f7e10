from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import ia3.training.together
import tiny_causal
import tiny_seq2seq
from fitted import fit
from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.fast.sweep import MixedLosses
from ia3.inference.rank import rank
from ia3.runs.comparison import read_runs
from ia3.runs.grid import combinations
from ia3.runs.run import Run
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples
from ia3.tasks.task import Task, TaskKind, load_task
from ia3.tasks.template import Template
from ia3.training.learner import Learner
from ia3.training.learners.instructions import Instructions
from ia3.training.learners.words import Words
from ia3.training.plan import RunPlan
from ia3.training.sweep import names_of, ranking_table, sweep
from ia3.training.together import Together
from ia3.training.train import train

TOKENIZER = tiny_seq2seq.tokenizer()
QUIET = Console(quiet=True)
TASK = Task(
    template=Template.of_column("text"), labels=("negative", "neutral", "positive"), max_length=128, max_new_tokens=5
)
COMMON = TrainSettings(steps=100, evaluate_every=20, dropout=False, evaluation_batch_size=7)
Make = Callable[[TrainSettings], Learner[Any]]


def seq2seq() -> Any:
    return get_peft_model(tiny_seq2seq.base().double(), IA3Config(task_type="SEQ_2_SEQ_LM"))


def run_together(
    learners: Sequence[Learner[Any]], training: Sequence[Examples], test: Examples, folder: Path
) -> Together:
    together = Together([RunPlan(learner, each, test) for learner, each in zip(learners, training, strict=True)])
    together.run([folder / f"run-{number}" for number in range(len(learners))], QUIET)
    return together


def expect_the_same(run: Run, alone: Run, tolerance: float = 1e-8) -> None:
    """Losses, rates, evaluations and both adapters of two runs."""
    assert run.losses == pytest.approx(alone.losses, rel=0, abs=tolerance)
    rates = [[record["learning_rate"] for record in each.progress.steps] for each in (run, alone)]
    assert rates[0] == rates[1]
    assert [each.step for each in run.evaluations] == [each.step for each in alone.evaluations]
    for mine, other in zip(run.evaluations, alone.evaluations, strict=True):
        assert mine.predictions == other.predictions
        assert mine.loss == pytest.approx(other.loss, rel=0, abs=tolerance)
        assert mine.macro_f1 == other.macro_f1
    assert run.progress.best == alone.progress.best
    assert run.progress.stopped_early == alone.progress.stopped_early
    for mine, other in ((run.adapter_dir, alone.adapter_dir), (run.best_dir, alone.best_dir)):
        tensors = load_file(mine / "adapter_model.safetensors")
        torch.testing.assert_close(tensors, load_file(other / "adapter_model.safetensors"), rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", ["by hand", "mixed"])
def test_each_run_is_as_if_it_were_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "mixed":

        def make(model: Any, adapter: Any, token_losses: Any) -> tuple[MixedLosses, str]:
            return MixedLosses(model, adapter.layout, token_losses), "the test says so"

        monkeypatch.setattr(ia3.training.together, "group_losses", make)
    few, many, test = tiny_seq2seq.examples(13), tiny_seq2seq.examples(60), tiny_seq2seq.examples(12, 60)
    other = dict(zip(tiny_seq2seq.LABELS, ("neutral", "positive", "negative"), strict=True))
    wrong = replace(few, rows=tuple(replace(row, label=other[row.label]) for row in few))
    runs = [
        (replace(COMMON, learning_rate=0.05), many),
        (replace(COMMON, learning_rate=0.05, seed=1, warmup_steps=10, weight_decay=0.1), many),
        (replace(COMMON, learning_rate=0.3, max_gradient_norm=0.5, batch_size=5), many),
        (replace(COMMON, learning_rate=0.2, steps=30, evaluate_every=7, gradient_accumulation=2), few),
        (replace(COMMON, learning_rate=0.3, patience=1, balance=True, best_by="loss"), wrong),
    ]
    model = seq2seq()
    learners = [Words(model, TOKENIZER, TASK, settings) for settings, _ in runs]
    together = run_together(learners, [examples for _, examples in runs], test, tmp_path / "together")
    assert together.failures == {}
    assert (together.reason is None) == (way == "by hand")
    for number, (settings, examples) in enumerate(runs):
        learner = Words(seq2seq(), TOKENIZER, TASK, settings)
        alone = fit(learner, examples, test, tmp_path / f"alone-{number}")
        expect_the_same(together.runs[number], alone)
        lines = (together.folders[number] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [
            json.loads(line)["step"] for line in (alone.output_dir / "metrics.jsonl").read_text().splitlines()
        ]
    assert [len(together.runs[number].losses) for number in range(4)] == [100, 100, 100, 30]
    assert together.runs[4].progress.stopped_early
    assert len(together.runs[4].losses) < 100
    assert together.runs[2].losses[-1] < 0.5 * together.runs[2].losses[0]


def test_labels_by_rank_and_free_text(tmp_path: Path) -> None:
    examples, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(9, 60)
    by_rank = replace(COMMON, steps=20, evaluate_every=10, answer_by="rank", learning_rate=0.1)
    for task, settings in ((TASK, by_rank), (replace(TASK, kind=TaskKind.GENERATION, labels=()), by_rank)):
        settings = settings if task.labels else replace(settings, answer_by="generation")
        each = [replace(settings, seed=seed) for seed in (0, 1)]
        model, folder = seq2seq(), tmp_path / task.kind
        together = run_together([Words(model, TOKENIZER, task, one) for one in each], [examples] * 2, test, folder)
        for number, one in enumerate(each):
            learner = Words(seq2seq(), TOKENIZER, task, one)
            expect_the_same(
                together.runs[number],
                fit(learner, examples, test, folder / f"alone-{number}"),
            )


def test_instructions(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    tokenizer = tiny_causal.tokenizer()
    task = Task(kind=TaskKind.INSTRUCTIONS, template=Template.of_column("text"), max_length=40, max_new_tokens=6)
    rows = tuple(tiny_causal.examples(20))
    training = Examples(rows[:15], (), "questions", 0, 0, kind=TaskKind.INSTRUCTIONS)
    test = replace(training, rows=rows[15:])

    def learner(model: Any, settings: TrainSettings) -> Instructions:
        return Instructions(model, tokenizer, task, settings)

    def model() -> Any:
        base = tiny("llama", dtype=torch.float64, max_position_embeddings=64)
        return get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))

    settings = replace(COMMON, steps=20, evaluate_every=10, batch_size=4)
    each = [replace(settings, learning_rate=rate) for rate in (0.01, 0.1)]
    shared = model()
    together = run_together([learner(shared, one) for one in each], [training] * 2, test, tmp_path)
    for number, one in enumerate(each):
        alone = fit(learner(model(), one), training, test, tmp_path / f"alone-{number}")
        expect_the_same(together.runs[number], alone, tolerance=1e-6)  # the angles of the base are fp32


def test_a_run_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    examples, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(6, 60)
    common = replace(COMMON, steps=12, group_by_length=False)  # padding of the others is where its numbers are
    each = [replace(common, learning_rate=rate) for rate in (0.05, 1e200, 0.1)]
    model = seq2seq()
    together = run_together([Words(model, TOKENIZER, TASK, one) for one in each], [examples] * 3, test, tmp_path)
    assert sorted(together.runs) == [0, 2]
    assert "at step" in together.failures[1]
    assert "Lower the learning rate (it is 1e+200)" in together.failures[1]
    assert not (together.folders[1] / "result.json").exists()
    for number in (0, 2):
        learner = Words(seq2seq(), TOKENIZER, TASK, each[number])
        alone = fit(learner, examples, test, tmp_path / f"alone-{number}")
        expect_the_same(together.runs[number], alone)


def test_evaluations_are_without_dropout(tmp_path: Path) -> None:
    examples, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(12, 60)
    settings = replace(COMMON, steps=8, evaluate_every=4, dropout=True)
    each = [replace(settings, learning_rate=rate) for rate in (0.05, 0.1)]
    model = seq2seq()
    together = run_together([Words(model, TOKENIZER, TASK, one) for one in each], [examples] * 2, test, tmp_path)
    for run in together.runs.values():
        saved = PeftModel.from_pretrained(tiny_seq2seq.base().double(), run.adapter_dir)
        learner = Words(saved, TOKENIZER, TASK, settings)
        again = learner.measure(learner.tokenise(test), lambda rows: None)
        assert run.final.loss == pytest.approx(again.loss, rel=1e-9)
        assert run.final.predictions == again.predictions
    assert together.runs[0].losses[0] != pytest.approx(together.runs[1].losses[0], rel=1e-6)


def test_short_groups_are_filled_up_with_what_is_not_learned() -> None:
    examples = tiny_seq2seq.examples(10)
    learner = Words(seq2seq(), TOKENIZER, TASK, COMMON)
    together = Together([RunPlan(learner, examples, examples)] * 2)
    rows = learner.tokenise(examples)
    batch = together._batch([rows[:1], rows[2:5]])
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, False, True, True, True]
    assert batch["attention_mask"].any(1).all()


# The whole command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seq2seq.write_csv(tmp_path_factory.mktemp("data") / "sentences.csv", 48)


OPTIONS: dict[str, Any] = {"epochs": 2, "dropout": False, "test_size": 0.25, "console": QUIET}


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("sweeps") / "one"
    return sweep(base, data, over={"learning_rate": [0.1, 0.001], "seed": [0, 1]}, output=output, **OPTIONS)


def test_the_runs_are_ranked_and_those_of_train(finished: Any, base: Path, data: Path, tmp_path: Path) -> None:
    assert [run.settings.learning_rate for run in finished.runs[:2]] == [0.1, 0.1]
    marks = [(-run.best.accuracy, run.best.loss) for run in finished.runs]
    assert marks == sorted(marks)
    assert len(finished.runs) == 4
    assert finished.failed == []
    for run, given in zip(finished.runs, finished.settings, strict=True):
        assert given == {"learning_rate": run.settings.learning_rate, "seed": run.settings.seed}
        name = run.output_dir.name
        assert name == f"learning_rate-{given['learning_rate']}-seed-{given['seed']}"
        alone = train(base, data, output=tmp_path / name, **OPTIONS, **given)
        expect_the_same(run, alone, tolerance=1e-4)
        recipes = [(each.output_dir / "recipe.yaml").read_text() for each in (run, alone)]
        assert recipes[0] == recipes[1]


def test_the_folder_of_a_sweep(finished: Any) -> None:
    folder = finished.output_dir
    assert {path.name for path in folder.iterdir()} == {
        "best",
        "SHA256SUMS",
        "sweep.json",
        "sweep.png",
        "sweep.yaml",
        *(run.output_dir.name for run in finished.runs),
    }
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(finished.summary()))
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    records = read_runs([folder])
    assert {record.folder for record in records} == {run.output_dir for run in finished.runs}
    assert all(record.finished for record in records)


def test_the_best_adapter_answers_as_its_evaluation_did(finished: Any) -> None:
    task = load_task(finished.best_dir)
    assert task is not None
    assert task.labels == ("negative", "neutral", "positive")
    model = PeftModel.from_pretrained(tiny_seq2seq.base(), finished.best_dir).eval()
    answers = rank(model, TOKENIZER, finished.best.shown, task.labels, max_length=task.max_length)
    assert [each.label for each in answers] == finished.best.best.predictions
    card = (finished.best_dir / "README.md").read_text()
    assert "held-out loss" in card


def test_the_table_shows_what_differs(finished: Any) -> None:
    console = Console(width=120, file=StringIO())
    console.print(ranking_table(finished))
    lines = console.file.getvalue().splitlines()
    assert lines[0].split()[:3] == ["learning_rate", "seed", "accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["0.1", "0.1", "0.001", "0.001"]


def test_data_sets_with_labels_of_their_own(base: Path, tmp_path: Path) -> None:
    whole = tiny_seq2seq.examples(48)
    two = replace(
        whole,
        rows=tuple(row for row in whole if row.label != "neutral"),
        labels=("negative", "positive"),
    )
    found = sweep(base, over={"data": [whole, two]}, output=tmp_path / "both", learning_rate=0.1, **OPTIONS)
    by_name = {run.output_dir.name: run for run in found.runs}
    assert by_name["run-1"].labels == ("negative", "neutral", "positive")
    assert by_name["run-2"].labels == ("negative", "positive")
    for name, examples in (("run-1", whole), ("run-2", two)):
        alone = train(base, examples, output=tmp_path / name, learning_rate=0.1, **OPTIONS)
        expect_the_same(by_name[name], alone, tolerance=1e-4)


def test_where_every_run_diverges_there_is_no_sweep(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"None of the 2 runs came to an end.*at step \d.*1e\+38"):
        sweep(base, data, over={"learning_rate": [1e38, 2e38]}, output=tmp_path / "none", **OPTIONS)
    assert not (tmp_path / "none" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"learning_rate": 0.1}, r"'learning_rate' is 0.1: expected a list of the values to try"),
        ({"template": "{text}"}, r"'template' is '\{text\}': expected a list"),
        ({"seed": []}, r"'seed' is \[\]: expected a list"),
        ({"precision": ["fp32", "bf16"]}, r"can't differ in precision: .* They can in learning_rate, warmup_steps"),
        ({"lerning_rate": [0.1]}, r"no setting 'lerning_rate'\. Did you mean learning_rate\?"),
        ({}, "over is empty"),
        ([], "over is empty"),
        ({"seed": [1, 1]}, r"over holds \{'seed': 1\} more than once"),
        ({"seed": ["one"]}, "`seed` is 'one'"),
        ({"data": ["a.csv"]}, "data is given for all runs and in over: give it once"),
        ({"steps": [10]}, "both `epochs` and `steps`"),
        ({"warmup_steps": [0, 1000]}, "`warmup_steps` is 1000 and the training has"),
    ],
)
def test_what_cannot_be_swept_over(base: Path, data: Path, tmp_path: Path, over: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sweep(base, data, over=over, output=tmp_path / "none", **OPTIONS)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"task": TaskKind.SEQUENCE_CLASSIFICATION}, "trains a head in full, too"),
        ({"optimizer": "adafactor"}, "takes no `optimizer='adafactor'`"),
        ({"objective": "t-few"}, "takes no `objective='t-few'`"),
        ({"recipe": "t-few"}, "takes no `optimizer='adafactor'`"),
        ({"trackers": ("tensorboard",)}, "takes no `trackers="),
        ({"task": TaskKind.INSTRUCTIONS, "packing": True}, "takes no `packing=True`"),
    ],
)
def test_what_a_sweep_does_not_do(base: Path, data: Path, tmp_path: Path, given: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sweep(base, data, output=tmp_path / "none", **{**OPTIONS, **given})
    assert not (tmp_path / "none").exists()


def test_a_former_sweep_is_not_replaced(finished: Any, base: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="holds a sweep already: name another output"):
        sweep(base, data, output=finished.output_dir, **OPTIONS)
    with pytest.raises(ValueError, match="holds a run already"):
        sweep(base, data, output=finished.best.output_dir, **OPTIONS)


def test_combinations() -> None:
    assert combinations({"seed": [0, 1], "epochs": (2,)}) == [{"seed": 0, "epochs": 2}, {"seed": 1, "epochs": 2}]
    assert combinations([{"seed": 0}, {"epochs": 2}]) == [{"seed": 0}, {"epochs": 2}]


def test_names_say_what_differs() -> None:
    assert names_of([{"seed": 0, "epochs": 2}, {"seed": 1, "epochs": 2}]) == ["seed-0", "seed-1"]
    assert names_of([{"seed": 0}]) == ["seed-0"]
    long = [{"template": "Review: {text} Sentiment?"}, {"template": "{text} This is"}]
    assert names_of(long) == ["template-1", "template-2"]
    assert names_of([{"data": "sentences"}, {"data": "sentences"}]) == ["run-1", "run-2"]


def test_each_run_draws_its_own_examples(base: Path, data: Path, tmp_path: Path) -> None:
    found = sweep(base, data, over={"limit": [6, 12], "seed": [0, 1]}, output=tmp_path / "some", **OPTIONS)
    assert sorted(run.train_examples for run in found.runs) == [6, 6, 12, 12]
    assert all(run.shown == found.best.shown for run in found.runs)
    environments = [json.loads((run.output_dir / "environment.json").read_text()) for run in found.runs]
    assert len({each["data"]["train"]["sha256"] for each in environments}) == 4
    assert {each["seed"] for each in environments} == {0, 1}


@pytest.mark.parametrize(
    ("best", "others", "failed", "says"),
    [
        (0.1, [0.01, 0.05], [], r"rate, 0\.1, is the highest that was tried: try 0\.2 and 0\.4, too"),
        (0.01, [0.1], [], r"rate, 0\.01, is the lowest that was tried: try 0\.005 and 0\.0025, too"),
        (0.05, [0.01, 0.1], [], None),
        (0.1, [0.01], [1.0], None),  # a higher one diverged
        (0.1, [0.1], [], None),
    ],
)
def test_the_best_rate_at_the_edge_is_said(
    finished: Any, best: float, others: list[float], failed: list[float], says: str | None
) -> None:
    one = finished.best
    flat = [replace(one.evaluations[-1], correct=150, total=200, step=each.step) for each in one.evaluations]
    run = replace(one, progress=replace(one.progress, evaluations=flat))
    found = replace(
        finished,
        runs=[run] * (1 + len(others)),
        settings=[{"learning_rate": rate} for rate in (best, *others)],
        failed=[({"learning_rate": rate}, "diverged") for rate in failed],
    )
    assert found.summary()["advice"] == found.advice
    assert found.advice is None if says is None else re.search(says, found.advice)
    right = replace(flat[-1], correct=200)
    perfect = replace(run, progress=replace(one.progress, evaluations=[*flat[:-1], right]))
    assert replace(found, runs=[perfect] * len(found.runs)).advice is None

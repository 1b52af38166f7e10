"""A whole training from a recipe: data, model and settings in, a run folder with an adapter out."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from rich.console import Console

from ia3.config import IA3Config
from ia3.files import write_atomically
from ia3.inference.classify import head_modules
from ia3.inference.loading import DTYPES, default_kind, load_base, load_config, load_tokenizer
from ia3.peft_model import get_peft_model
from ia3.runs.recipe import IN_MEMORY, Recipe, make_recipe, override, read_recipe, without_a_heads_way
from ia3.runs.report import PICTURE_NAME, REPORT_NAME, complete_cards, draw_report, write_report
from ia3.runs.run import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    ENVIRONMENT_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    RESULT_NAME,
    STATE_NAME,
    Run,
    check_output,
    write_json,
)
from ia3.runs.settings import TrainSettings
from ia3.tasks.examples import Examples
from ia3.tasks.task import TASK_NAME, Task, TaskKind
from ia3.tasks.template import Template
from ia3.training.collate import count_truncated, measure_labels
from ia3.training.data import read_data
from ia3.training.learners.instructions import Instructions, count_cut
from ia3.training.learners.making import make_learner, settings_of
from ia3.training.loop import RunPlan, Training, check_examples
from ia3.training.state import describe_environment


def train(model: str | Path, data: str | Path | Examples, *, console: Console | None = None, **recipe: Any) -> Run:
    """Fine-tune a model on examples: what `ia3 train` does, with the same defaults.

    Args:
        model: the base model: a hub name, a folder or a bundled model.
        data: a file, a data set on the hub, or examples.
        console: where the progress goes; standard error by default.
        recipe: the fields of `Recipe` and of `TrainSettings`, such as `epochs=3`; or `recipe="t-few"`, or a
            YAML file, which the other fields override.

    Returns:
        The run; its adapter is in `run.adapter_dir`.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: an unknown or wrong field of the recipe, data that can't be trained on.
        Interrupted: Ctrl-C or SIGTERM; `resume` goes on.

    Example:
        >>> run = ia3.train("google/flan-t5-small", "reviews.csv", epochs=3)
        >>> run.final.accuracy
    """
    content, source = recipe_content({**recipe, "model": model, "data": data})
    return run_recipe(make_recipe(content, source), console or Console(stderr=True))


def recipe_content(given: Mapping[str, Any]) -> tuple[dict[str, Any], str | Path | None]:
    """What `make_recipe` takes, from the keywords of `train`: those of the recipe named `recipe` among them.

    Returns:
        The content, and the name of the recipe that it is over.
    """
    own = dict(given)
    name = own.pop("recipe", None)
    for key in ("data", "model", "template", "test_data"):
        if isinstance(own.get(key), Path):
            own[key] = str(own[key])
    return override({} if name is None else read_recipe(name), own), name


def resume(
    folder: str | Path,
    *,
    data: Examples | None = None,
    test_data: Examples | None = None,
    console: Console | None = None,
) -> Run:
    """Go on with an interrupted run, to the numbers that it would have had.

    Args:
        folder: the run's folder.
        data: the training data, where the run was given them in memory.
        test_data: the held-out data, likewise.
        console: where the progress goes; standard error by default.

    Raises:
        FileNotFoundError: no run in the folder.
        ValueError: nothing to go on with, or data that are not those of the run.
    """
    folder = Path(folder)
    if not (folder / RECIPE_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no run, since it has no {RECIPE_NAME}: name a run's folder.")
    if not (folder / STATE_NAME).is_file():
        begun = "its training is complete" if (folder / RESULT_NAME).is_file() else "it ended before its first save"
        raise ValueError(f"There is nothing in {folder} to go on from: {begun}. Begin anew by `ia3 train`.")
    content = _as_begun(read_recipe(folder / RECIPE_NAME))
    for name, given in (("data", data), ("test_data", test_data)):
        if given is not None:
            content[name] = given
        elif str(content.get(name, "")).startswith(IN_MEMORY):
            raise ValueError(f"The run in {folder} had its {name} in memory: give them again, ia3.resume(…, {name}=…).")
    recipe = replace(make_recipe(content, folder / RECIPE_NAME), output=folder)
    return run_recipe(recipe, console or Console(stderr=True), resuming=True)


def _as_begun(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content for the way that its run began.

    Before recipes knew merge_labels, labels stayed apart and a named column was read alone.
    """
    if "merge_labels" in content:
        return dict(content)
    column = Template.of_column(content.get("text_column", "text"))
    own = {name: value for name, value in content.items() if name != "text_column"}
    return {"merge_labels": False, "template": column.pattern} | own


def run_recipe(recipe: Recipe, console: Console, *, resuming: bool = False) -> Run:
    """Read the data, load the model, attach an adapter, train, and leave a whole run folder.

    Args:
        recipe: a checked recipe.
        console: where the progress goes, and what is odd about the data.
        resuming: go on with the run in the recipe's folder.

    Raises:
        FileNotFoundError, ValueError: as `train`.
        Interrupted: as `train`.
    """
    given = recipe  # whose task may have been left to the model
    kind = recipe.task or default_kind(load_config(recipe.model), recipe.model)
    recipe = replace(recipe, task=kind, settings=settings_of(recipe.settings, kind))
    if recipe.system is not None and kind is not TaskKind.INSTRUCTIONS:
        raise ValueError(f"A system message is for {TaskKind.INSTRUCTIONS}, and this task is {kind}: leave it out.")
    with folder_of(recipe) as output:
        if not resuming:
            _refuse_unfinished(output)
        training, test = read_data(given, kind, console, resuming=resuming)
        check_examples(kind, training, test)
        with console.status(f"Loading {recipe.model}"):
            tokenizer = load_tokenizer(recipe.model)
            task = make_task(recipe, kind, training, test, tokenizer)
            learner = make_learner(load_adapted(recipe, kind, task.labels), tokenizer, task, recipe.settings)
        environment = describe_environment(training, test, learner.model, recipe.settings.seed)
        environment["recipe"] = recipe.content()
        if resuming:
            _check_environment(output, environment, console)
        prepared = Training(learner, training, test, output, resume=resuming)
        if not resuming:
            begin_folder(output, recipe, environment)
    prepared.advice = _how_to_resume(recipe, output)
    warn_of_truncation(prepared.plan, [*training.texts, *test.texts], console)
    console.print(prepared.describe_path(), highlight=False)
    run = prepared.run(console)
    title = f"{Path(recipe.model).name} on {Path(recipe.source).name}"
    draw_report(run, learner.model, output / PICTURE_NAME, title=title)
    write_report(run, title)
    complete_cards(run, recipe.source, named=isinstance(recipe.data, str))
    (output / STATE_NAME).unlink(missing_ok=True)
    return run


@contextmanager
def folder_of(recipe: Recipe) -> Iterator[Path]:
    """The run's folder; one that is made here is taken away again where the run can't begin."""
    if recipe.output is not None:
        check_output(recipe.output)
        yield recipe.output
        return
    check_output(Path("runs"))
    folder = _claim_folder(recipe.source)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # not empty
            folder.rmdir()
        raise


def _claim_folder(source: str) -> Path:
    """A folder of its own, whoever else begins a run in the same second."""
    wanted = new_folder(source)
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always a next number")


def begun(recipe: Recipe) -> bool:
    """Whether the recipe's folder holds an unfinished run, which is then this recipe's, or `resume` refuses it."""
    return recipe.output is not None and (recipe.output / STATE_NAME).is_file()


def finished_result(recipe: Recipe) -> dict[str, Any] | None:
    """The figures of the finished run in the recipe's folder; None where there is none.

    Raises:
        ValueError: it is another recipe's.
    """
    folder = recipe.output
    if folder is None or begun(recipe) or not (folder / RESULT_NAME).is_file():
        return None
    former = make_recipe(read_recipe(folder / RECIPE_NAME), folder / RECIPE_NAME)
    if former.task is not None:  # which the folder's recipe names, with what follows from it
        recipe = replace(recipe, settings=settings_of(recipe.settings, former.task))
    if replace(former, task=None).content() != replace(recipe, task=None).content():
        raise ValueError(f"{folder} holds the run of another recipe: name another output, or remove it.")
    result: dict[str, Any] = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    del result["predictions"]
    return result


def _how_to_resume(recipe: Recipe, output: Path) -> str:
    given = [name for name in ("data", "test_data") if isinstance(getattr(recipe, name), Examples)]
    if given:
        return f"ia3.resume({str(output)!r}, {', '.join(f'{name}=…' for name in given)})"
    return f"ia3 train --resume {output}"


def make_task(recipe: Recipe, kind: TaskKind, training: Examples, test: Examples, tokenizer: Any) -> Task:
    """What the recipe's adapter learns to do.

    Raises:
        ValueError: labels that can't be learned.
    """
    labels = _labels(kind, training, test)
    answers = labels or [row.label for row in training]
    template, label_column = _wording(recipe, training)
    return Task(
        kind=kind,
        template=template,
        labels=labels,
        max_length=recipe.settings.max_length,
        max_new_tokens=_longest_answer(kind, answers, tokenizer, recipe.settings),
        base_model=recipe.model,
        label_column=label_column,
        system=recipe.system,
        precision=recipe.settings.precision,
    )


def _wording(recipe: Recipe, training: Examples) -> tuple[Template, str]:
    """What is read of a record, and the column of its answer: as the examples were read, unless the recipe says."""
    says = isinstance(recipe.data, Examples) and (recipe.template is not None or recipe.text_column != "text")
    if training.reading is None or says:
        return recipe.wording, recipe.label_column
    return training.reading.template, training.reading.label_column


def load_adapted(recipe: Recipe, kind: TaskKind, labels: tuple[str, ...]) -> Any:
    """The base model with a new adapter."""
    settings = recipe.settings
    base = load_base(recipe.model, kind, labels=labels, dtype=DTYPES[settings.precision], seed=settings.seed)
    config = IA3Config(
        task_type=kind.task_type,
        target_modules=recipe.target_modules,
        feedforward_modules=recipe.feedforward_modules,
        modules_to_save=None if kind.writes else head_modules(base),
    )
    return get_peft_model(base, config)


# What a chat template puts after an answer, and what the answer's first blank may cost.
_ROOM_FOR_THE_END = 8
# How many tokens a text is gone on with where nothing else is asked for.
_CONTINUATION = 128


def _longest_answer(kind: TaskKind, answers: Iterable[str], tokenizer: Any, settings: TrainSettings) -> int | None:
    """The most tokens that an answer takes, its end token included."""
    if not kind.writes:
        return None
    if not kind.has_answers:
        return _CONTINUATION
    if kind is TaskKind.INSTRUCTIONS:
        return _ROOM_FOR_THE_END + max(
            len(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        )
    words = kind is TaskKind.LABEL_WORDS
    distinct = list(dict.fromkeys(answers))
    lengths = measure_labels(distinct, tokenizer, max_label_length=settings.max_label_length, as_words=words)
    return max(lengths.values())


def _refuse_unfinished(output: Path) -> None:
    if (output / STATE_NAME).is_file() and not (output / RESULT_NAME).is_file():
        raise ValueError(
            f"{output} holds an unfinished run: go on with it by `ia3 train --resume {output}`, or name another output."
        )


def begin_folder(output: Path, recipe: Recipe, environment: Mapping[str, Any]) -> None:
    """The folder with recipe and environment, and nothing of an earlier, finished run."""
    for name in (STATE_NAME, RESULT_NAME, METRICS_NAME, REPORT_NAME, PICTURE_NAME):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER_FOLDER, BEST_FOLDER):
        if (output / name / TASK_NAME).is_file():  # an adapter that a run left
            shutil.rmtree(output / name)
    text = yaml.safe_dump(recipe.content(), allow_unicode=True, sort_keys=True)
    write_atomically(output / RECIPE_NAME, text.encode())
    write_json(output / ENVIRONMENT_NAME, environment)


def _check_environment(output: Path, environment: Mapping[str, Any], console: Console) -> None:
    """Refuse other data; say what else differs from when the run began."""
    began = json.loads((output / ENVIRONMENT_NAME).read_text(encoding="utf-8"))
    began["recipe"] = without_a_heads_way(_as_begun(began["recipe"]))
    keys = {*environment["recipe"], *began["recipe"]} - {"data", "test_data"}  # they have digests
    changed = sorted(key for key in keys if environment["recipe"].get(key) != began["recipe"].get(key))
    if changed:
        raise ValueError(
            f"{output / RECIPE_NAME} says other {', '.join(changed)} than when the run began: put them back, or begin "
            "another run."
        )
    if environment["base_model"] != began["base_model"]:
        raise ValueError(
            f"The weights of {environment['recipe']['model']} are not those that the run in {output} began with: put "
            "them back, or begin another run."
        )
    for name, data in environment["data"].items():
        if data["sha256"] != began["data"][name]["sha256"]:
            raise ValueError(
                f"The {name} data are not those that the run in {output} began with ({data['rows']:,} rows now, "
                f"{began['data'][name]['rows']:,} then): put {began['data'][name]['source']} back as it was."
            )
    others = [name for name in ("device", "threads", "versions") if environment[name] != began[name]]
    if others:
        console.print(f"Other {', '.join(others)} than when the run began: its numbers may differ.", style="yellow")


def _labels(kind: TaskKind, training: Examples, test: Examples) -> tuple[str, ...]:
    """The labels that training shows, in their source's order; of tags those that only the held-out texts show too."""
    if not kind.has_labels:
        return ()
    if kind is TaskKind.TOKEN_CLASSIFICATION:
        return tuple(dict.fromkeys([*training.labels, *test.labels]))
    occurring = {row.label for row in training}
    found = tuple(label for label in training.labels if label in occurring)
    if len(found) < 2:
        raise ValueError(
            f"All {len(training):,} training examples of {training.source} have the label {found[0]!r}, so there is "
            "nothing to tell apart: give examples of at least two labels."
        )
    return found


def warn_of_truncation(plan: RunPlan, texts: list[str], console: Console) -> None:
    """Say how many texts are cut."""
    learner = plan.learner
    if isinstance(learner, Instructions):
        cut = count_cut([*plan.rows, *plan.test_rows])
    else:
        cut = count_truncated(texts, learner.tokenizer, learner.task.max_length)
    if cut:
        console.print(f"{cut:,} texts are longer than {learner.task.max_length} tokens and are cut (--max-length).")


def new_folder(source: str) -> Path:
    """A folder in `runs/` named after the data and the time."""
    name = re.sub(r"\W+", "-", Path(source).stem).strip("-") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

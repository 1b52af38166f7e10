from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.main import get_command

import tiny_seq2seq
from ia3.bundled import TITLER
from ia3.cli.main import app
from ia3.errors import NoMatchingPeftModuleError, SettingError
from ia3.runs.grid import NOT_SWEPT
from ia3.runs.recipe import RECIPES, Recipe, make_recipe, naming_its_recipe, override, read_recipe, resolve
from ia3.runs.settings import TrainSettings, fields_of
from ia3.tasks.examples import Example, Examples
from ia3.tasks.task import TaskKind, load_task
from ia3.tasks.template import Template
from ia3.tensors import load_peft_weights
from ia3.training.loop import Interrupted
from ia3.training.resuming import resume
from ia3.training.train import finished_result, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_seq2seq.save_base(tmp_path_factory.mktemp("models") / "tiny-base"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    file: Any = console.file
    return file.getvalue()


def test_the_python_twin_leaves_an_adapter_with_its_task(base: str, tmp_path: Path) -> None:
    data = tiny_seq2seq.write_csv(tmp_path / "sentences.csv")
    run = train(base, data, output=tmp_path / "run", epochs=1, max_length=32, template="very {text}", console=quiet())
    chosen = {"learning_rate": 0.04, "dropout": False}
    assert run.settings == TrainSettings(epochs=1, max_length=32, answer_by="rank", **chosen)
    assert all(text.startswith("very ") for text in run.shown)
    task = load_task(run.adapter_dir)
    assert task is not None
    assert (task.template, task.labels, task.base_model) == (Template("very {text}"), tiny_seq2seq.LABELS, base)
    assert (task.max_length, task.max_new_tokens) == (32, 2)
    assert (tmp_path / "run" / "report.png").is_file()


def test_examples_in_memory(base: str, tmp_path: Path) -> None:
    console = quiet()
    run = train(
        base,
        tiny_seq2seq.examples(30),
        test_data=tiny_seq2seq.examples(6),
        template="very {text}",
        output=tmp_path / "run",
        epochs=1,
        limit=9,
        max_length=3,
        target_modules=["k", "wo"],
        feedforward_modules=["wo"],
        console=console,
    )
    assert (run.train_examples, run.final.total) == (9, 6)
    assert run.shown == [f"very {text}" for text in tiny_seq2seq.examples(6).texts]
    assert "held-out texts also occur in training" in printed(console)
    assert "texts are longer than 3 tokens and are cut" in printed(console)
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k", "wo"]
    with pytest.raises(ValueError, match=r"reads the columns \['a', 'b'\], and examples in memory have one"):
        train(base, tiny_seq2seq.examples(30), template="{a} {b}", console=quiet())


def test_the_task_holds_the_labels_that_training_shows(base: str, tmp_path: Path) -> None:
    rows = tuple(
        replace(row, label=row.label.replace("positive", "very positive")) for row in tiny_seq2seq.examples(30)
    )
    labels = ("very positive", "unheard of", "neutral", "negative")
    data = replace(tiny_seq2seq.examples(30), rows=rows, labels=labels)
    task = load_task(train(base, data, output=tmp_path / "run", epochs=1, console=quiet()).adapter_dir)
    assert task is not None
    assert task.labels == ("very positive", "neutral", "negative")
    assert task.max_new_tokens == 3


def test_without_an_output_the_folder_is_new(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(base, tiny_seq2seq.examples(12), epochs=1, console=quiet())
    assert run.output_dir.parent == Path("runs")
    assert run.output_dir.name.startswith("sentences-")


def test_every_setting_is_a_key_and_has_its_default() -> None:
    recipe = make_recipe({"model": "m", "data": "d"})
    assert recipe == Recipe(model="m", data="d")
    assert recipe.settings == TrainSettings()
    chosen = resolve(recipe, TaskKind.LABEL_WORDS, 100, 3).settings
    assert chosen == replace(TrainSettings(), learning_rate=0.04, dropout=False)
    for field in fields(TrainSettings):
        value = getattr(recipe, field.name)
        assert make_recipe({"model": "m", "data": "d", field.name: value}) == recipe


def test_a_template_that_shows_nothing_is_said_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\ntemplate: words\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: The template 'words' shows no column"):
        make_recipe({"recipe": path})


def test_target_modules_that_match_nothing_are_said_with_the_recipes_file(base: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("target_modules: [nothing]\n")
    asked = {"data": tiny_seq2seq.examples(12), "console": quiet(), "output": tmp_path / "run"}
    with pytest.raises(NoMatchingPeftModuleError, match=r"nothing.*recipe\.yaml has `target_modules`: give"):
        train(base, recipe=path, **asked)
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        train(base, recipe=path, target_modules=["none"], **asked)
    assert "recipe.yaml" not in str(caught.value)


def test_values_as_yaml_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\nlearning_rate: 3e-3\ndropout: no\noutput: here\ntarget_modules: [k, v]\n")
    recipe = make_recipe({"recipe": path})
    assert recipe.settings == TrainSettings(learning_rate=3e-3, dropout=False)
    assert (recipe.output, recipe.target_modules) == (Path("here"), ["k", "v"])


def test_all_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"`epochs` is 'y': expected a whole number\.; `test_size` is 'x'"):
        make_recipe({"model": "m", "data": "d", "test_size": "x", "epochs": "y"})


def test_a_missing_key() -> None:
    with pytest.raises(ValueError, match="There is no `data`: give it, or name it in a recipe"):
        make_recipe({"model": "m"})


def test_an_unknown_keyword(base: str) -> None:
    with pytest.raises(ValueError, match=r"There is no setting 'learning_rat'\. Did you mean `learning_rate`\?"):
        train(base, "d", learning_rat=1)


def test_the_help_shows_each_setting_with_its_default() -> None:
    group: Any = get_command(app)
    for name, without in (("train", set()), ("sweep", {*NOT_SWEPT})):
        shown = {option.name: option for option in group.commands[name].made.params}
        for setting, field in fields_of(Recipe).items():
            if setting in without:
                assert setting not in shown
                continue
            option = shown[setting]
            assert f"--{setting.replace('_', '-')}" in option.opts
            assert option.help
            if field.default not in (None, ()) and not field.is_required():
                value = field.default
                text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
                assert option.show_default in (text, text.removesuffix(".0"))


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Send SIGINT during an optimizer's given step."""
    steps = 0
    original = torch.optim.AdamW.step

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counted)
        yield


def test_an_interrupted_run_goes_on_from_its_folder(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    more: dict[str, Any] = {"template": "very {text}", "epochs": 2, "batch_size": 4, "console": quiet()}
    whole = train(base, data, output=tmp_path / "whole", **more)
    with interrupted_at(3), pytest.raises(Interrupted, match=r"step 3 of 14\. Go on: ia3 train --resume"):
        train(base, data, output=tmp_path / "parts", **more)
    assert load_task(tmp_path / "parts" / "adapter") == load_task(whole.adapter_dir)
    with pytest.raises(ValueError, match="holds an unfinished run: go on with it by `ia3 train --resume"):
        train(base, data, output=tmp_path / "parts", **more)
    resumed = resume(tmp_path / "parts", console=quiet())
    assert resumed.losses == whole.losses
    assert {path.name for path in (tmp_path / "parts").iterdir()} == FILES
    own, others = (load_peft_weights(run.adapter_dir) for run in (resumed, whole))
    assert all(torch.equal(own[name], others[name]) for name in others)
    with pytest.raises(ValueError, match=r"nothing in .* to go on from: its training is complete"):
        resume(tmp_path / "parts")


FILES = {
    "SHA256SUMS",
    "adapter",
    "best",
    "environment.json",
    "metrics.jsonl",
    "recipe.yaml",
    "report.md",
    "report.png",
    "result.json",
}


def test_a_run_on_examples_in_memory_is_given_them_again(base: str, tmp_path: Path) -> None:
    data, test = tiny_seq2seq.examples(30), tiny_seq2seq.examples(6, 30)
    with interrupted_at(3), pytest.raises(Interrupted):
        train(base, data, test_data=test, output=tmp_path / "run", epochs=1, console=quiet())
    with pytest.raises(ValueError, match=r"had its data in memory: give them again, ia3.resume\(…, data=…\)"):
        resume(tmp_path / "run")
    with pytest.raises(ValueError, match=r"The test data are not those .* \(5 rows now, 6 then\)"):
        resume(tmp_path / "run", data=data, test_data=test[:5], console=quiet())
    assert resume(tmp_path / "run", data=data, test_data=test, console=quiet()).final.total == 6


def test_another_environment_is_told(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    with interrupted_at(3), pytest.raises(Interrupted):
        train(base, data, output=tmp_path / "run", console=quiet())
    path = tmp_path / "run" / "environment.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "threads": 99}))
    console = quiet()
    with pytest.raises(ValueError, match=r"environment\.json is not what its training left.*remove .*SHA256SUMS"):
        resume(tmp_path / "run", console=console)
    (tmp_path / "run" / "SHA256SUMS").unlink()
    resume(tmp_path / "run", console=console)
    assert "Other threads than when the run began: its numbers may differ." in printed(console)


def test_an_old_run_goes_on_by_the_way_that_it_was_measured(base: str, tmp_path: Path) -> None:
    """Every recipe named generation once, and no task file said how it is answered."""
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    whole = train(base, data, output=tmp_path / "whole", answer_by="generation", console=quiet())
    with interrupted_at(3), pytest.raises(Interrupted):
        train(base, data, output=tmp_path / "run", answer_by="generation", console=quiet())
    assert "answer_by: generation" in (tmp_path / "run" / "recipe.yaml").read_text()
    run = resume(tmp_path / "run", console=quiet())
    assert run.task.method == "written answers, exact match"
    assert [each.predictions for each in run.evaluations[-1:]] == [whole.final.predictions]
    assert [each.scores for each in run.evaluations] == [each.scores for each in whole.evaluations]
    assert finished_result(make_recipe({"model": base, "data": data, "answer_by": "generation"})) is None
    for way in (None, "rank"):
        with pytest.raises(ValueError, match="holds the run of another recipe"):
            finished_result(
                make_recipe({"model": base, "data": data, "answer_by": way, "output": str(tmp_path / "run")})
            )


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run, since it has no recipe\.yaml"):
        resume(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    with pytest.raises(ValueError, match=r"nothing in .* to go on from: it has no environment\.json"):
        resume(tmp_path)


def test_a_run_can_be_done_again_from_its_recipe(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    first = train(base, data, output=tmp_path / "first", epochs=1, limit=12, seed=7, console=quiet())
    recipe = make_recipe(read_recipe(tmp_path / "first" / "recipe.yaml"))
    assert recipe.settings == first.settings
    again = train(base, data, recipe=tmp_path / "first" / "recipe.yaml", output=tmp_path / "again", console=quiet())
    assert again.losses == first.losses
    environment = json.loads((tmp_path / "again" / "environment.json").read_text())
    assert environment == json.loads((tmp_path / "first" / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["data"]["train"]["rows"] == 12


def test_the_recipe_of_tfew(base: str, tmp_path: Path) -> None:
    recipe = make_recipe({"recipe": "t-few", "model": "m", "data": "d"})
    settings = recipe.settings
    assert (settings.steps, settings.warmup_steps, settings.batch_size) == (1000, 60, 8)
    assert (settings.optimizer, settings.learning_rate, settings.objective) == ("adafactor", 3e-3, "t-few")
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    run = train(base, data, recipe="t-few", steps=3, warmup_steps=1, output=tmp_path / "run", console=quiet())
    assert len(run.losses) == 3
    assert run.settings.answer_by == "rank"
    assert all(answer in run.labels for answer in run.final.predictions)
    assert list(RECIPES) == ["all-linear", "peft", "t-few"]


def test_the_recipe_of_all_linear_layers(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    run = train(base, data, recipe="all-linear", steps=2, output=tmp_path / "run", console=quiet())
    assert run.settings.learning_rate == 2e-2
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    layers = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert layers >= {"q", "k", "v", "o", "wo"}
    assert "lm_head" not in layers
    slower = make_recipe({"recipe": "all-linear", "model": "m", "data": "d", "learning_rate": 3e-3})
    assert (slower.settings.learning_rate, slower.target_modules) == (3e-3, "all-linear")
    with pytest.raises(ValueError, match="which the recipe all-linear has: leave one of them out"):
        make_recipe({"recipe": "all-linear", "model": "m", "data": "d", "towers": "decoder"})
    with pytest.raises(ValueError, match="`target_modules` and the recipe all-linear, which is nothing but those"):
        make_recipe({"recipe": "all-linear", "model": "m", "data": "d", "target_modules": ["k"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 60}, r"`warmup_steps` is 60 .* fewer\. The recipe t-few has `warmup_steps`: give others beside it"),
        ({"steps": 60, "warmup_steps": 70}, r"`warmup_steps` is 70 and the training has 60 steps: expected fewer\.$"),
        ({"epochs": 0}, r"`epochs` is 0: expected a positive number\.$"),  # which no recipe has
    ],
)
def test_a_setting_that_nobody_gave_is_the_recipes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe({"recipe": "t-few", "model": "m", "data": "d", **given})


def test_a_recipe_for_another_kind_of_task_is_named() -> None:
    content = {"recipe": "t-few"}
    with (
        pytest.raises(SettingError, match=r"objective='t-few'.*\. The recipe t-few has `objective`: give others"),
        naming_its_recipe(content),
    ):
        raise SettingError(
            "The setting `objective='t-few'` is for label-words, and this task is another: leave it out."
        )


@pytest.mark.parametrize("name", ["T-Few", "t_few", "tfew"])
def test_a_recipe_that_was_nearly_named_is_asked_for(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no recipe {name}, did you mean t-few?"):
        read_recipe(name)
    with pytest.raises(FileNotFoundError, match=r"There is no recipe other: Expected a YAML file .*all-linear, peft"):
        read_recipe("other")


def test_the_cards_tell_data_and_figures(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    run = train(base, data, output=tmp_path / "run", epochs=2, console=quiet())
    for folder, evaluation in ((run.adapter_dir, run.final), (run.best_dir, run.best)):
        card = (folder / "README.md").read_text()
        assert f"| accuracy | {evaluation.accuracy:.1%} of 3 (95 % interval" in card
        assert "| data | sentences.csv |" in card
        assert "| labels | `negative`, `neutral`, `positive` |" in card
        assert f"27 examples, {evaluation.step} steps of 8" in card
        assert str(tmp_path) not in card


def test_the_report(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    run = train(base, data, output=tmp_path / "run", epochs=1, console=quiet())
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.startswith("# tiny-base on sentences.csv\n")
    assert f"| accuracy | {run.final.accuracy:.1%} of 3 held out" in report
    assert "](report.png)" in report
    answers = zip(run.shown, run.references, run.final.predictions, strict=True)
    wrong = [text for text, right, found in answers if right != found]
    assert f"## Wrong answers: {len(wrong)} of {len(wrong)}" in report
    assert all(f"| {text} |" in report for text in wrong)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"packing": True}, "`packing` is for instructions and language-modelling, and this task is label-words"),
        ({"task": "generation", "balance": True}, "`balance` is for label-words and sequence-classification"),
        ({"task": "generation", "objective": "t-few"}, "`objective='t-few'` is for label-words"),
        ({"task": "generation", "answer_by": "rank"}, "`answer_by='rank'` is for label-words"),
        ({"task": "instructions", "answer_by": "rank"}, "`answer_by='rank'` is for label-words"),
        ({"task": "sequence-classification", "answer_by": "generation"}, "`answer_by='generation'` is for"),
        ({"task": "generation", "best_by": "macro_f1"}, "`best_by='macro_f1'` is for"),
    ],
)
def test_settings_without_a_use_are_refused(base: str, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(base, tiny_seq2seq.examples(12), console=quiet(), **setting)


def test_examples_of_another_kind_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match="are for label-words, and the task is generation"):
        train(base, tiny_seq2seq.examples(12), task="generation", console=quiet())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 4}, r"says other batch_size than when the run began"),
        ({"optimizer": "adafactor", "learning_rate": 0.5}, r"says other learning_rate, optimizer than"),
    ],
)
def test_another_recipe_is_not_gone_on_with(base: str, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    with interrupted_at(3), pytest.raises(Interrupted):
        train(base, data, output=tmp_path / "run", console=quiet())
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        resume(tmp_path / "run", console=quiet())


def test_another_base_model_is_not_gone_on_with(tmp_path: Path) -> None:
    base = tiny_seq2seq.save_base(tmp_path / "base")
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv"))
    with interrupted_at(3), pytest.raises(Interrupted):
        train(base, data, output=tmp_path / "run", console=quiet())
    other = tiny_seq2seq.base()
    with torch.no_grad():
        other.encoder.block[1].layer[0].SelfAttention.q.weight.mul_(0.5)
    other.save_pretrained(base)
    with pytest.raises(ValueError, match=r"The weights of .* are not those that the run in"):
        resume(tmp_path / "run", console=quiet())


def test_runs_of_one_second_have_folders_of_their_own(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ia3.runs.run.time.strftime", lambda form: "now")
    runs = [train(base, tiny_seq2seq.examples(12), epochs=1, console=quiet()) for _ in range(3)]
    assert [run.output_dir.name for run in runs] == ["sentences-now", "sentences-now-2", "sentences-now-3"]
    with pytest.raises(ValueError, match="A system message is for instructions, and this task is label-words"):
        train(base, tiny_seq2seq.examples(12), system="be brief", console=quiet())
    with pytest.raises(ValueError, match="holds no examples to evaluate on"):
        train(base, tiny_seq2seq.examples(12)[:3], test_data=tiny_seq2seq.examples(12)[:0], console=quiet())
    assert len(list(Path("runs").iterdir())) == 3


def test_what_is_held_out_does_not_depend_on_the_runs_seed(base: str, tmp_path: Path) -> None:
    data = str(tiny_seq2seq.write_csv(tmp_path / "sentences.csv", 60))
    how: dict[str, Any] = {"epochs": 1, "limit": 12, "console": quiet()}
    runs = [train(base, data, output=tmp_path / str(seed), seed=seed, **how) for seed in (1, 2)]
    assert runs[0].shown == runs[1].shown
    other = train(base, data, output=tmp_path / "split", split_seed=7, test_limit=2, **how)
    assert other.final.total == 2
    assert not set(other.shown) <= set(runs[0].shown)


def test_a_limit_leaves_no_label_out(base: str, tmp_path: Path) -> None:
    rows = [Example(f"the share falls {'very ' * (index % 9)}", "negative") for index in range(80)]
    rows += [Example("a company rises", "positive"), Example("a company rises today", "positive")]
    data = Examples(tuple(rows), ("negative", "positive"), "sentences", 0, 0)
    for seed in range(4):
        run = train(
            *(base, data),
            **{"test_data": data, "limit": 3, "seed": seed, "epochs": 1, "test_limit": 3, "console": quiet()},
            output=tmp_path / str(seed),
        )
        assert run.labels == ("negative", "positive")
        assert run.train_examples == 3


def test_values_over_a_recipe() -> None:
    tfew = read_recipe("t-few")
    assert make_recipe(override(tfew, {"epochs": 2, "model": "m", "data": "d"})).settings.steps is None
    worded = {"template": "x {text}", "model": "m", "data": "d"}
    assert make_recipe(override(worded, {"text_column": "body"})).template is None
    with pytest.raises(ValueError, match="both `epochs` and `steps`"):
        make_recipe({"model": "m", "data": "d", "epochs": 1, "steps": 3})
    with pytest.raises(ValueError, match=r"`test_size=0\.5` has no use"):
        make_recipe({"model": "m", "data": "d", "test_data": "t", "test_size": 0.5})
    with pytest.raises(ValueError, match="`test_limit` is 0: expected a positive number"):
        make_recipe({"model": "m", "data": "d", "test_limit": 0})


def test_after_divergence_the_folder_is_free(base: str, tmp_path: Path) -> None:
    data = tiny_seq2seq.examples(30)
    with pytest.raises(FloatingPointError):
        train(base, data, output=tmp_path / "run", learning_rate=3e37, console=quiet())
    assert train(base, data, output=tmp_path / "run", epochs=1, console=quiet()).final.total == 3


def test_heads_are_not_trained_in_bf16(base: str) -> None:
    message = "`precision='bf16'` is for label-words and generation and language-modelling and instructions"
    with pytest.raises(ValueError, match=message):
        train(base, tiny_seq2seq.examples(12), task="sequence-classification", precision="bf16", console=quiet())


def spelled(count: int) -> list[Example]:
    return [Example(f"profit {n}", ("rise", "Rise", "fall")[n % 3]) for n in range(count)]


@pytest.mark.parametrize("merge", [True, False])
def test_a_run_goes_on_with_the_labels_that_it_merged_or_not(tmp_path: Path, merge: bool) -> None:
    data = tmp_path / "profits.csv"
    data.write_text("text,label\n" + "".join(f"{row.text},{row.label}\n" for row in spelled(30)))
    more: dict[str, Any] = {"steps": 3, "evaluate_every": 3, "merge_labels": merge, "console": quiet()}
    with interrupted_at(1), pytest.raises(Interrupted):
        train(TITLER, data, output=tmp_path / "run", **more)
    run = resume(tmp_path / "run", console=quiet())
    assert run.task.labels == (("fall", "rise") if merge else ("Rise", "fall", "rise"))
    assert len(run.losses) == 3

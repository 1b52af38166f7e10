"""The documentation says what is so: its Python runs, its commands exist, its tables are those of the files.

A page's Python blocks run in order as one script, in a folder of their own. The bundled model's place in the cache
holds a tiny model meanwhile, and the bundled tweets are few, so that the pages run in seconds as they are written.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ia3.runs.look
from builders import CAUSAL, SEQ2SEQ, gpt2, randomise, seq2seq_batch, t5
from ia3 import IA3Config, PeftConfig, PeftModel, find_sites, get_peft_model
from ia3.bundled import _FOLDER
from ia3.cache import seal
from ia3.runs.defaults import least_steps  # as it is for users, before other tests train less
from ia3.tasks.examples import Examples
from tiny_seq2seq import examples, save_base

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ON_THE_HUB = "hub.md"  # runs in tests/test_hub.py, where there is a hub
ELSEWHERE = {ON_THE_HUB, "ray.md"}  # tests/cluster has the like of the other's
NEEDS = {"quantised.md": "bitsandbytes"}  # what a page shows and not every machine has
LANGUAGES = {"python", "bash", "text", "yaml", "json"}
RESULTS = ROOT / "benchmarks" / "results"
SEARCHED_FOR = [
    ("Excel", "first-steps.md"),
    ("CSV", "first-steps.md"),
    ("export", "export.md"),
    ("ONNX", "export.md"),
    ("GGUF", "export.md"),
    ("Ollama", "export.md"),
    ("CTranslate2", "export.md"),
    ("GPU", "speed.md"),
    ("install", "index.md"),
]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's call


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title, its content and the line where it stands."""

    language: str
    title: str
    content: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(match[1], match[2] or "", match[3], text.count("\n", 0, match.start()) + 2)
        for match in re.finditer(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    ]


def all_blocks(language: str) -> list[Any]:
    return [
        pytest.param(block.content, id=f"{page}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.language == language
    ]


def run_page(page: str) -> None:
    """Run a page's Python blocks in order, and compare what they print with the blocks titled "Output"."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.content, str(DOCS / page), "exec")
            with redirect_stdout(io.StringIO()) as output:
                exec(code, names)
            printed = output.getvalue()
        elif block.title == "Output":
            assert printed == block.content, f"{page}, line {block.line}"


def take_a_few(load: Callable[..., Examples], *args: Any, **kwargs: Any) -> Examples:
    whole = load(*args, **kwargs)
    return replace(whole, rows=whole.rows[:40])


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the bundled model is a tiny one."""
    cache = tmp_path_factory.mktemp("cache")
    folder = save_base(cache / _FOLDER)
    seal(folder)
    return cache


@pytest.fixture
def small_world(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IA3_CACHE", str(tiny_cache))
    monkeypatch.setattr(ia3.runs.look, "load_examples", partial(take_a_few, ia3.runs.look.load_examples))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p not in ELSEWHERE and any(b.language == "python" for b in blocks(p))]
)
@pytest.mark.usefixtures("small_world")
def test_the_python_runs(page: str) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    run_page(page)


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES or page == "design.md", f"{page}, line {block.line}"


# Commands


def lines_of(script: str) -> list[list[str]]:
    """The commands of a block, without comments and what is set for them alone."""
    joined = re.sub(r"^([A-Z_]+=\S* +)+", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check_ia3(words: list[str]) -> None:
    import typer

    from ia3.cli.main import app

    group: Any = typer.main.get_command(app)
    if not words or words[0].startswith("-"):
        known = {name for parameter in group.params for name in parameter.opts} | {"--help"}
        assert set(words) <= known, words
        return
    command = group.commands[words[0]]
    command = getattr(command, "made", command)  # train and sweep are made when they are called
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    assert {word for word in words[1:] if word.startswith("--")} <= known | {"--help"}, words


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= {*targets, "docs"}


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        if word == "./plugins/vllm" or word.startswith("opentelemetry-"):
            continue
        match = re.fullmatch(r"(?:\.|ia3)(?:\[([\w,-]+)\])?", word)
        assert match, word
        assert set((match[1] or "train").split(",")) <= set(extras)


def check_python(words: list[str]) -> None:
    script = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("-") or f'"{word}"' in script, word


def check_hf(words: list[str]) -> None:
    assert words == ["auth", "login"]


def check_vllm(words: list[str]) -> None:
    assert words[0] == "serve"  # its flags are vLLM's, which the plugin's own tests have


def check_curl(words: list[str]) -> None:
    json.loads(words[words.index("-d") + 1])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    check_launched(get_args_parser().parse_args(words))


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    check_launched(launch_command_parser().parse_args(words[1:]))


def check_launched(asked: argparse.Namespace) -> None:
    assert (asked.module, asked.training_script) == (True, "ia3")
    check_ia3(asked.training_script_args)


def check_serve(words: list[str]) -> None:
    """Ray's command, which may not be installed here."""
    app, *given = words[1:]
    source = ast.parse((ROOT / "src" / app.partition(":")[0].replace(".", "/")).with_suffix(".py").read_text())
    (fields,) = (each for each in source.body if isinstance(each, ast.ClassDef) and each.name == "Arguments")
    known = {each.target.id for each in fields.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
    assert words[0] == "run"
    assert {word.partition("=")[0] for word in given} <= known


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "ia3": check_ia3,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "hf": check_hf,
    "vllm": check_vllm,
    "curl": check_curl,
    "opentelemetry-instrument": lambda words: CHECKS[words[0]](words[1:]),
    "serve": check_serve,
}


def test_the_files_for_clusters_start_what_there_is() -> None:
    job = [each for each in yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text()) if each][-1]
    [pod] = job["spec"]["template"]["spec"]["containers"]
    for script in ((ROOT / "examples" / "slurm.sh").read_text(), pod["args"][0]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        for work in re.findall(r'(?:WORK=\(|work=")(.*)[")]', script):
            check_ia3(shlex.split(work))
        launch = re.search(r"torchrun .*", script.replace("\\\n", " "))
        assert launch is not None
        command = re.sub(r'\$work|"\$\{WORK\[@\]\}"', "train", launch[0])
        check_torchrun(shlex.split(re.sub(r'"\$[^"]*"', "1", command))[1:])


@pytest.mark.parametrize("script", all_blocks("bash"))
def test_commands_and_flags_exist(script: str) -> None:
    for program, *words in lines_of(script):
        pipe = words.index("|") if "|" in words else len(words)
        CHECKS[program](words[:pipe])


def needs_more_than_a_folder(words: list[str]) -> bool:
    return words[0] != "ia3" or words[1] in ("push", "quickstart", "serve") or "bigscience/mt0-large" in words


@pytest.mark.parametrize("page", ["first-steps.md", "command-line.md"])
@pytest.mark.usefixtures("small_world")
def test_the_commands_run_in_order(page: str) -> None:
    from typer.testing import CliRunner

    from ia3.cli.main import app

    for name, count in (("reviews.csv", 30), ("test.csv", 6), ("more.csv", 6)):
        rows = [f"{row.text},{row.label}" for row in examples(count)]
        Path(name).write_text("\n".join(["text,label", *rows]) + "\n")
    Path("tickets.csv").write_text("customer,text\nreviews,the share falls\nreviews/best,the share rises\n")
    for block in blocks(page):
        if block.language == "yaml":
            Path("recipe.yaml").write_text(block.content)
        for words in lines_of(block.content) if block.language == "bash" else ():
            if not needs_more_than_a_folder(words):
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{page}: {words}: {result.output}"
    assert Path("labelled.csv").is_file()


@pytest.mark.parametrize("content", all_blocks("yaml"))
def test_recipes_are_recipes(content: str) -> None:
    from ia3.runs.recipe import make_recipe

    make_recipe(yaml.safe_load(content))


# Tables


def table_after(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its own."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    rows = re.search(r"^\|.*\|\n\|[-| :]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_the_defaults_are_those_of_the_page_and_measured() -> None:
    from ia3.runs.defaults import default_settings
    from ia3.tasks.task import TaskKind

    def written(kind: TaskKind, labels: int) -> list[str]:
        many, least = default_settings(kind, 100_000, labels, 8), least_steps(kind, labels)
        return [f"{many['learning_rate']:g}", str(many["epochs"]), f"{least} steps"]

    kinds = ((TaskKind.LABEL_WORDS, 2), (TaskKind.SEQUENCE_CLASSIFICATION, 19), (TaskKind.SEQUENCE_CLASSIFICATION, 20))
    kinds = (*kinds, (TaskKind.INSTRUCTIONS, 0))
    text = (DOCS / "learning-rate.md").read_text()
    rules = [
        [cell.split(",")[0] for cell in row[1:]]
        for row in table_after("learning-rate.md", "What is taken where nothing is said")
    ]
    assert rules == [written(*kind) for kind in kinds]
    rates = [default_settings(kind, 9, labels, 8, all_linear=True)["learning_rate"] for kind, labels in kinds]
    assert [f"{rate:g}" for rate in rates[2:]] == [rule[0] for rule in rules[2:]]
    assert f"the first two rates are half as high, {rates[0]:g} and {rates[1]:g}:" in text
    assert least_steps(TaskKind.LABEL_WORDS, 100) == 1300

    cells = re.findall(r"^\| (?:T5|MiniLM|SmolLM2), (.*?) \|$", text, re.MULTILINE)
    judged = json.loads((RESULTS / "defaults.json").read_text())["judged"]["default_settings"]
    assert len(cells) == len(judged)
    for row, found in zip(cells, judged, strict=True):
        data, *rest = row.split(" | ")
        rates = [found["rates"].get(rate, "") for rate in ("0.001", "0.003", "0.008", "0.02", "0.04", "0.08", "0.16")]
        figures = [*rates, found["steps"], found["default"], found["best"], found["former"]]
        assert (found["case"].split(", ", 1)[1], [cell.strip() for cell in rest]) == (data, [str(f) for f in figures])


@pytest.mark.parametrize("heading", ["With dropout", "Without dropout", "Larger batches"])
def test_the_rates_are_measured(heading: str) -> None:
    rows = table_after("learning-rate.md", heading)
    assert len(rows) >= 4
    lines = (RESULTS / "quickstart_search.txt").read_text().splitlines()
    measured = {tuple(line.replace("|", " ").split()) for line in lines if line and line[0].isdigit()}
    dropout = "none" if heading == "Without dropout" else "dropout"
    for rate, batch, *accuracies in rows:
        accuracies = [a for a in accuracies if a]
        assert [
            line
            for line in measured
            if float(line[0]) == float(rate)
            and line[1] == batch
            and line[2:7] == ("3000", str(len(accuracies)), "grouped", dropout, "0")
            and line[7] == "''"
            and list(line[-len(accuracies) :]) == accuracies
        ], (rate, batch)


def test_the_steps_are_measured() -> None:
    rows = json.loads((RESULTS / "train_step.json").read_text())["rows"]
    names = {
        "PEFT captured": "PEFT, captured whole by hand",
        "PEFT compiled": "PEFT, its blocks compiled",
        "PEFT guide": "PEFT's guide, as it is written",
        "PEFT guide, import changed": "the guide's loop, import changed",
        "frozen base": "the frozen base and one vector",
        "ia3 compile_step": "ia3, `compile_step`",
        "ia3 compile_step, recompute": "ia3, with `recompute=True`",
        "ia3 compile_step, fp8": 'ia3, with `frozen="fp8"`',
    }
    found = {(row["name"], row["batch"], row["length"], row["dtype"]): row for row in rows}
    measured = {
        (names[name], f"{batch} × {length or 'as long as they are'}", dtype): [
            f"{row['ms']:.1f}",
            f"{row['busy_ms']:.1f}",
            f"{row['kernels']:,}",
            f"{row['peak_mib']:,.0f}",
        ]
        for (name, batch, length, dtype), row in found.items()
    }
    table = table_after("speed.md", "A training step")
    assert {tuple(row[:3]): row[3:] for row in table} == measured
    text, readme = (DOCS / "speed.md").read_text(), (ROOT / "README.md").read_text()
    half = "bfloat16"
    for batch in (8, 64):
        ours, peft = (found[name, batch, 128, half]["ms"] for name in ("ia3 compile_step", "PEFT captured"))
        assert f"{ours / peft:.2f}" in text
        assert f"{ours / peft:.2f}" in readme
    in_fp8 = found["ia3 compile_step, fp8", 64, 128, half]["ms"]
    assert f"{in_fp8 / found['PEFT captured', 64, 128, half]['ms']:.2f} in eight bits" in text
    assert f"{in_fp8:.1f} in" in readme
    first, *further = [row["setup_s"] for row in rows if row["name"].startswith("ia3") and row["dtype"] == half]
    assert f"took {first:.1f} s with an empty cache" in text
    assert f"further ones of bf16 {min(further):.1f} to {max(further):.1f} s" in text
    loop = json.loads((RESULTS / "own_loop.json").read_text())["rows"]
    assert [f"{loop[name]['ms']:.1f}" for name in ("own loop", "own loop, reads its loss", "compile_step")] == [
        *re.findall(
            r"takes ([\d.]+) ms a step, and ([\d.]+) where it reads.*?takes ([\d.]+) in", " ".join(text.split())
        )[0]
    ]
    assert f"{loop['own loop']['ms']:.1f} ms" in readme
    guide = found["PEFT guide", 8, 128, "float32"]["ms"]
    assert f"takes {guide / found['ia3 compile_step', 8, None, half]['ms']:.0f} times as long as" in text
    assert f"takes {guide / found['ia3 compile_step', 8, None, half]['ms']:.0f} times as long as" in readme
    changed = found["PEFT guide, import changed", 8, None, "float32"]["ms"]
    assert f"it takes {changed:.1f}, where PEFT padded to 128 takes {guide:.0f}." in readme


def test_the_kernels_are_measured() -> None:
    found = json.loads((RESULTS / "kernels.json").read_text())
    text = (DOCS / "speed.md").read_text()
    assert f"({found['of_the_card']['copy_bytes_per_s'] / 1e12:.2f} TB/s" in text
    assert f"({found['of_the_card']['product_flop_per_s'] / 1e12:.0f} TFLOP/s)" in text
    names = {
        "T5's attention, 64 × 128": "attention 64 x 128",
        "8 × 128": "attention 8 x 128",
        "8 × as long as they are": "attention 8 x PhraseBank",
        "8 × 512": "attention 8 x 512",
        "across, 64 × 4 queries of 128": "attention across 64 x 4 / 128",
        "gate with its vector, 8,192 × 2,816": "gate 8,192 x 2,816",
        "norm and sum, 8,192 × 1,024": "norm and sum 8,192 x 1,024",
        "norm and sum, 24 × 1,024": "norm and sum 24 x 1,024",
        "rotation, 4 × 512 (3B)": "rotation 4 x 512 (3B)",
        "rounding to fp8, 8,192 × 5,632": "rounding to fp8 8192 x 5632",
        "decoding, 256 with 48 before (8B)": "decoding, 256, 48 before (8B)",
        "decoding across, 256 × 32": "decoding across, 256 x 32",
        "the likeliest of 250,112 words for 256": "likeliest token of 256 x 250,112",
    }

    def figures(kernel: str) -> list[str]:
        each = found["kernels"][kernel]
        return [f"{each['us']:.1f}", f"{each['floor_us']:.1f}"]

    table = {row[0]: row[1:] for row in table_after("speed.md", "Each kernel and its floor")}
    assert set(table) == set(names)
    for label, name in names.items():
        ways = [figures(f"{name}, {way}") for way in ("forward", "backward") if f"{name}, {way}" in found["kernels"]]
        assert table[label] == [*(ways[0] if ways else figures(name)), *(ways[1] if ways else ["", ""])]


def test_the_servers_figures_are_measured() -> None:
    text, readme = " ".join((DOCS / "serve.md").read_text().split()), (ROOT / "README.md").read_text()
    parts = json.loads((RESULTS / "serve_gpu.json").read_text())["rows"]
    words = next(row for row in parts if row.get("part") == "words" and "ratio" in row)
    beside = next(row for row in parts if row.get("part") == "decoder-side" and "times_one" in row)
    assert f"{words['mixed_tokens_per_s']:,} tokens a second, {words['ratio']:.2f} of" in text
    assert f"groups of four requests, {words['peft_tokens_per_s']}." in text
    assert f"{words['ratio']:.2f} of the base's tokens a second, {words['times_peft']:.0f} times" in readme
    assert f"takes {beside['times_one']:.1f} times as long as under one ({beside['all_ms']:.0f} ms" in text
    ratios = [
        next(row["ratio"] for row in parts if (row.get("part"), row.get("how")) == (part, how) and "ratio" in row)
        for how in ("in process", "over HTTP")
        for part in ("labels-mt0", "labels-encoder")
    ]
    assert "is {:.2f} and {:.2f} in process, and {:.2f} and {:.2f} over HTTP".format(*ratios) in text
    alike = {row["name"]: row for row in json.loads((RESULTS / "invariance.json").read_text())["rows"]}
    assert f"all {alike['slots, invariant']['equal']} were written token for token alike" in text
    assert f"and {alike['slots']['equal']} without" in text
    speed = alike["slots, invariant"]["tokens_per_s"] / alike["slots"]["tokens_per_s"]
    assert f"came at {speed:.2f} of the speed" in text
    clients = json.loads((RESULTS / "serve_clients.json").read_text())
    rates = [f"{clients['servers'][name]['requests_per_s']:.1f}" for name in ("ia3 serve", "lock", "peft")]
    assert "{} answers a second, where a lock around one request at a time gives {}, and".format(*rates) in text
    assert f"around PEFT {rates[2]};" in text
    assert f"came {clients['first_answer_s']:.1f} s after" in text


def test_the_gpus_other_tables_are_measured() -> None:
    llama = json.loads((RESULTS / "llama_step.json").read_text())["rows"]
    assert table_after("speed.md", "A Llama's step") == [
        [row["name"], f"{row['ms']:.1f}", f"{row['busy_ms']:.1f}", f"{row['kernels']:,}", f"{row['peak_mib']:,.0f}"]
        for row in llama
        if row["lengths"] == [512] * 4
    ]
    text, readme = (DOCS / "speed.md").read_text(), (ROOT / "README.md").read_text()
    long = next(row for row in llama if row["lengths"] == [4096] * 2)
    words = f"take {long['ms']:.1f} ms, {long['tokens_per_s']:,.0f} tokens a second, with a peak of"
    assert f"{words} {long['peak_mib']:,.0f} MiB" in " ".join(text.split())
    assert f"ready after {long['setup_s']:.0f} s" in text
    later = json.loads((RESULTS / "many_adapters_h200.json").read_text())["rows"]
    columns = []
    for shape in ("mt0-large", "llama-3-8b"):
        rows = {row["name"]: row for row in reversed(later) if row["shape"] == shape}  # the first of equal names
        base = f"{rows['base']['tokens_per_s']:,.0f}"
        assert base in readme
        ratios = [rows[f"ia3, {count} adapters, 256 registered"]["ratio"] for count in (1, 64, 256)]
        assert f"at {ratios[-1]:.2f} of" in readme
        columns.append([base, *(f"{ratio:.3f}" for ratio in ratios)])
    names = ["the bare base", "1 adapter", "64 adapters", "256 adapters"]
    assert table_after("speed.md", "Many adapters in a batch") == [
        list(row) for row in zip(names, *columns, strict=True)
    ]
    many = json.loads((RESULTS / "many_adapters.json").read_text())["rows"]
    before = next(row for row in many if (row["shape"], row["name"]) == ("mt0-large", "base"))
    assert f"wrote {before['tokens_per_s']:,.0f} tokens/s fused" in text
    predict = {row["name"]: row for row in json.loads((RESULTS / "predict.json").read_text())["rows"]}
    cells = [row[1] for row in table_after("speed.md", "Labels and answers")]
    assert cells == [
        f"{predict['PEFT 10 tokens, padded to 128']['s']:.1f}",
        f"{predict['ia3 labels ranked, captured']['s']:.2f}",
        f"{predict['ia3 10 tokens generated, captured']['s']:.2f}",
    ]
    together, alone, guide, many_together, many_alone, _ = json.loads((RESULTS / "sweep_step.json").read_text())["rows"]
    text = (DOCS / "speed.md").read_text()
    shares = [one["ms"] / other["ms"] for one, other in ((together, alone), (many_together, many_alone))]
    for words in (f"{together['ms']:.1f} ms a step of all", f"({shares[0]:.2f} of it)", f"({shares[1]:.2f}\nof it)"):
        assert words in text
    assert f"({guide['ms'] / together['ms']:.0f} times as long)" in text
    assert "take {:.2f} of the time of one after the other, sixty-four {:.2f}".format(*shares) in readme
    whole = json.loads((RESULTS / "guide_gpu.json").read_text())["rows"]
    factors = [whole[name]["times_faster"] for name in ("ia3, cold", "ia3, warm")]
    assert f"{factors[0]:.1f} and {factors[1]:.1f} times as long" in text
    assert f"by `ia3 train`: {factors[0]:.1f} times as fast" in readme
    assert f"{factors[1]:.1f} times from then on" in readme
    assert f"({whole['import changed']['times_faster']:.1f} times as fast)" in text
    train = whole["ia3, warm"]
    assert f"takes {whole['one line, warm']['s']:.1f} s without\nevaluations" in text
    assert f"`ia3 train` {train['s'] - train['evaluations_s']:.1f} s without its own" in text
    ours = json.loads((RESULTS / "predict_ours.json").read_text())["rows"][1]
    assert f"in {ours['labels_that_differ']} of 2,264 labels" in text
    assert ours["largest_margin_of_a_label_that_differs"] < 0.09


METHODS = {
    "as it is": "frozen",
    "head alone": "head",
    "(IA)³": "ia3",
    "(IA)³, every linear layer": "ia3-linear",
    "(IA)³, both sides of each": "ia3-both",
    "(IA)³, T-Few's losses": "t-few",
    "biases and norms": "bitfit",
    "LoRA, rank 16": "lora",
    "all weights": "full",
}
BASES = {"MiniLM": "minilm", "T5": "titler", "SmolLM2": "smollm2"}
SETS = {
    "PhraseBank": "phrasebank",
    "tweets": "tweets",
    "BANKING77": "banking77",
    "CLINC150": "clinc150",
    "RAFT": "raft",
    "orders": "orders",
}


def records_of(name: str) -> list[dict]:
    """The lines of a results' file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def evidence() -> tuple[dict, str]:
    """By base, data and method what was measured, and the page's words."""
    rows = json.loads((RESULTS / "evidence.json").read_text())["rows"]
    found = {(row["base"], row["data"], row["method"]): row for row in rows}
    return found, " ".join((DOCS / "choosing.md").read_text().split())


def interval(points: list[float]) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * each for each in points))


def test_the_methods_are_measured() -> None:
    found, _ = evidence()
    of_base = {
        "A classifier on a sentence encoder": "minilm",
        "Label words by a T5": "titler",
        "Labels and orders by a decoder": "smollm2",
    }
    for heading, base in of_base.items():
        columns = [name for name in SETS.values() if (base, name, "ia3") in found]
        table = table_after("choosing.md", heading)
        assert {METHODS[row[0]] for row in table} == {method for one, _, method in found if one == base}
        for name, count, *accuracies in table:
            own = [found.get((base, column, METHODS[name])) for column in columns]
            assert accuracies == ["–" if row is None else f"{100 * row['accuracy']:.1f}" for row in own]
            # RAFT's folds are five as it is, too.
            assert {row["seeds"] for row in own if row} <= ({1, 5} if name == "as it is" else {5})
            head = found[base, columns[0], "head"]["trained"] if base == "minilm" else 0
            assert count == f"{own[0]['trained'] - head:,}"


def test_the_differences_of_methods_are_measured() -> None:
    found, text = evidence()
    by_row = {}
    for name, *differences in table_after("choosing.md", "By how much"):
        base, data = (of[part] for of, part in zip((BASES, SETS), name.split(", "), strict=True))
        cells = [
            found.get((base, data, method), {}).get("against", {}).get(other)
            for other in ("lora", "full")
            for method in ("ia3", "ia3-linear")
        ]
        assert differences == ["–" if points is None else interval(points) for points in cells]
        by_row[base, data] = cells
    assert {*by_row} == {(base, data) for base, data, _ in found}
    beside = {place: cells[0][0] for place, cells in by_row.items()}
    within = {data for (_, data), points in beside.items() if points >= -0.01}
    assert within == {"phrasebank", "banking77", "clinc150", "raft"}
    assert min(points for (_, data), points in beside.items() if data == "phrasebank") >= -0.01
    short = sorted(-100 * points for (_, data), points in beside.items() if data == "tweets")
    assert f"On the tweets it is {short[0]:.1f} to {short[-1]:.1f} points short with each of three bases" in text
    assert f"must write a form's line {-100 * beside['smollm2', 'orders']:.1f}." in text
    t_few = found["titler", "raft", "t-few"]["against"]
    told = (-100 * beside["titler", "raft"], 100 * t_few["lora"][0])
    low, high = (100 * each for each in t_few["lora"][1:])
    words = "With a T5 it is {:.1f} points short on RAFT, and {:.1f} ahead ({:+.1f} to {:+.1f})"
    assert words.format(*told, low, high) in text
    assert beside["minilm", "raft"] >= -0.01
    here, low, high = (100 * each for each in t_few["ia3"])
    assert f"minus off are **{here:+.1f} points** ({low:+.1f} to {high:+.1f})" in text
    assert f"gain [{here:.1f} points](choosing.md" in " ".join((DOCS / "training.md").read_text().split())
    others = [found["titler", data, "t-few"]["against"]["ia3"] for data in ("phrasebank", "tweets")]
    assert (
        "{:+.1f} on PhraseBank, {:+.1f} on tweets, neither of which".format(*(100 * each[0] for each in others)) in text
    )
    assert all(low < 0 < high for _, low, high in others)
    assert f"at 0.003 RAFT has {100 * found['titler', 'raft', 't-few']['by_rate']['0.003']:.1f} with them" in text
    linear = [cells[1][0] for cells in by_row.values() if cells[1] is not None]
    assert (sum(points >= -0.01 for points in linear), len(linear)) == (8, 11)
    behind = sorted(-100 * cells[2][0] for (_, data), cells in by_row.items() if data == "tweets")
    ahead = -100 * by_row["smollm2", "orders"][2][0]
    words = f"have {behind[1]:.1f} to {behind[-1]:.1f} points over (IA)³ on the tweets with the T5 and the decoder"
    assert f"All weights {words}, {ahead:.1f} on the form's lines, and next to nothing" in text
    assert behind[0] == -100 * by_row["minilm", "tweets"][2][0]
    assert all(abs(by_row["minilm", data][2][0]) < 0.005 for data in ("banking77", "clinc150"))
    tweets = [100 * found[base, "tweets", "ia3"]["accuracy"] for base in ("minilm", "smollm2", "titler")]
    words = "with (IA)³ MiniLM has {:.1f} on the tweets, the decoder, six times its size, {:.1f}, the T5 {:.1f}"
    assert words.format(*tweets) in text
    assert f"Of the tweets {100 * found['titler', 'tweets', 'frozen']['accuracy']:.1f} % are neutral" in text


def test_what_both_sides_of_a_layer_gain_is_measured() -> None:
    found, text = evidence()
    both = {place[:2]: row for place, row in found.items() if place[2] == "ia3-both"}
    beside = {place: [100 * each for each in row["against"]["ia3-linear"]] for place, row in both.items()}
    orders, raft = beside.pop(("smollm2", "orders")), beside.pop(("titler", "raft"))
    lost, _, _ = beside.pop(("minilm", "phrasebank"))
    at_one = [100 * found["titler", "raft", method]["by_rate"]["0.03"] for method in ("ia3-both", "ia3-linear")]
    assert (
        "of which 3 are the choice of the rate: at 0.03 for all tasks it is {:.1f} beside {:.1f}".format(*at_one)
        in text
    )
    assert round(raft[0] - (at_one[0] - at_one[1])) == 3
    assert "{:.1f} points ({:+.1f} to {:+.1f}) over one on orders".format(*orders) in text
    assert "{:.1f} ({:+.1f} to {:+.1f}) on the T5's RAFT".format(*raft) in text
    assert f"PhraseBank they have {-lost:.1f} less, and on the other eight rows the two are within a point" in text
    assert (len(beside), max(abs(each) for each, _, _ in beside.values()) < 1) == (8, True)
    accuracies = [
        100 * found[place]["accuracy"]
        for base, data, other in (("smollm2", "orders", "lora"), ("titler", "raft", "t-few"))
        for place in ((base, data, other), (base, data, "ia3-both"))
    ]
    words = "LoRA's has {:.1f} for their {:.1f} on orders, T-Few's losses {:.1f} for their {:.1f} on RAFT"
    assert words.format(*accuracies) in text


def test_how_small_the_adapters_are_is_measured() -> None:
    found, text = evidence()
    shares, kilobytes = [], []
    for base in BASES.values():
        head = found[base, "phrasebank", "head"]["trained"] if base == "minilm" else 0
        own = {method: found[base, "phrasebank", method]["trained"] - head for method in ("ia3", "lora")}
        shares.append(own["lora"] / own["ia3"])
        kilobytes.append(found[base, "phrasebank", "ia3"]["costs"]["stored_bytes"] / 1000)
    assert f"with a {min(shares):.0f}th to an {max(shares):.0f}th of its numbers" in text
    assert f"these three bases is {min(kilobytes):.0f} to {max(kilobytes):.0f} KB" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"on four of six data sets, with a {min(shares):.0f}th to an {max(shares):.0f}th of its numbers" in readme


def test_the_rates_of_methods_are_measured() -> None:
    found, text = evidence()
    large = ("phrasebank", "tweets", "banking77", "clinc150")
    assert {found["minilm", data, "ia3-linear"]["rates"][0] for data in large} == {1e-2}
    assert {*found["minilm", "raft", "ia3-linear"]["rates"]} == {3e-3}
    of_t5 = [found["titler", data, "ia3-linear"] for data in ("phrasebank", "tweets")]
    assert [row["rates"] for row in of_t5] == [[3e-2], [3e-2]]
    assert {round(100 * (row["by_rate"]["0.03"] - row["by_rate"]["0.01"])) for row in of_t5} == {2, 3}
    of_smollm2 = {data: found["smollm2", data, "ia3"] for data in ("phrasebank", "tweets", "orders")}
    assert [row["rates"] for row in of_smollm2.values()] == [[3e-2], [3e-2], [3e-3]]
    assert {found["smollm2", data, "ia3-linear"]["rates"][0] for data in of_smollm2} == {1e-2}
    assert {*found["titler", "raft", "ia3"]["rates"]} == {1e-2, 3e-2}
    assert {*found["titler", "raft", "t-few"]["rates"]} == {3e-2, 1e-1}
    lost = {method: [] for method in ("ia3", "lora")}
    for method, points in lost.items():
        for data in large:
            row = found["minilm", data, method]
            by_rate = {float(rate): accuracy for rate, accuracy in row["by_rate"].items()}
            (best,) = row["rates"]
            points.append(100 * (by_rate[best] - by_rate[min(by_rate, key=lambda rate: abs(rate - 10 * best))]))
    linear = [
        {float(rate): 100 * accuracy for rate, accuracy in found["minilm", data, "ia3-linear"]["by_rate"].items()}
        for data in large
    ]
    points = [max(by_rate.values()) - by_rate[0.1] for by_rate in linear]
    assert f"At 0.1 it loses {min(points):.0f} to {max(points):.0f} points" in text
    ranges = [f"{min(points):.0f} to {max(points):.0f}" for points in (lost["ia3"], points, lost["lora"])]
    assert "costs it {} points, every linear layer {}, LoRA {}.".format(*ranges) in text
    ia3, lora = (found["smollm2", "orders", method] for method in ("ia3", "lora"))
    assert (ia3["rates"], ia3["by_rate"]["0.001"], lora["rates"]) == ([3e-3], 0.0, [1e-3])
    assert lora["by_rate"]["0.0003"] >= lora["by_rate"]["0.001"]


def test_what_one_seed_has_on_orders_is_measured() -> None:
    _, text = evidence()
    records = records_of("evidence.jsonl")

    def of(method: str, rate: float) -> list[float]:
        wanted = {"kind": "run", "base": "smollm2", "data": "orders", "method": method, "seed": 0, "rate": rate}
        (run,) = [record for record in records if wanted.items() <= record.items()]
        return [100 * run[f"{part}_accuracy"] for part in ("validation", "test")]

    words = "is 0.003, with {:.1f} % there and {:.1f} on the test rows by the first seed; at 0.01 that seed has"
    assert f"{words} {{:.1f}} and {{:.1f}}".format(*of("ia3", 3e-3), *of("ia3", 1e-2)) in text
    words = "Every linear layer's is 0.01, with {:.1f} and {:.1f}; at 0.003 it has {:.1f} and {:.1f}"
    assert words.format(*of("ia3-linear", 1e-2), *of("ia3-linear", 3e-3)) in text


def test_how_noisy_the_choice_of_a_rate_by_few_rows_is_is_measured() -> None:
    found, text = evidence()
    row = found["titler", "raft", "ia3-linear"]
    told = [100 * each for each in (row["by_rate"]["0.03"], row["by_rate"]["0.1"], row["accuracy"])]
    words = "has {:.1f} and {:.1f} over all tasks at 0.03 and at 0.1, and {:.1f} where each task takes"
    assert words.format(*told) in text


def test_what_a_step_of_each_method_costs_is_measured() -> None:
    found, text = evidence()
    for name, *cells in table_after("choosing.md", "What a step costs"):
        costs = [found.get((base, "phrasebank", METHODS[name]), {}).get("costs", {}) for base in BASES.values()]
        told = [(each.get("captured_ms"), each.get("peak_bytes")) for each in costs]
        expected = [
            "–" if number is None else f"{number:.1f}" if place == 0 else f"{number / 1e9:.2f}"
            for pair in told
            for place, number in enumerate(pair)
        ]
        assert cells == expected
    compiled = [found[base, "phrasebank", "ia3"]["costs"]["compile_step_ms"] for base in ("titler", "smollm2")]
    assert "takes {:.1f} ms on the T5 and {:.1f} on SmolLM2".format(*compiled) in text
    memory = {
        (base, method): found[base, "phrasebank", method]["costs"]["peak_bytes"]
        for base in BASES.values()
        for method in ("ia3", "ia3-linear", "lora", "full")
    }
    less = [1 - memory[base, "ia3"] / memory[base, "full"] for base in ("titler", "smollm2")]
    assert {round(3 * share) for share in less} == {1}
    less = [100 - 100 * memory[base, "ia3"] / memory[base, "lora"] for base in BASES.values()]
    more = [100 * memory[base, "ia3-linear"] / memory[base, "lora"] - 100 for base in BASES.values()]
    ranges = [f"{min(each):.0f} to {max(each):.0f} %" for each in (less, more)]
    assert "and {} less than LoRA; every linear layer takes {} more than LoRA".format(*ranges) in text
    longer = [
        found[base, "phrasebank", "ia3-both"]["costs"]["captured_ms"]
        / found[base, "phrasebank", "ia3-linear"]["costs"]["captured_ms"]
        for base in BASES.values()
    ]
    assert [round(share, 1) for share in (min(longer), max(longer))] == [1.2, 1.3]  # a fifth to three tenths


def test_what_the_recipe_reaches_is_measured() -> None:
    runs = records_of("recipes.jsonl")
    rows = table_after("choosing.md", "The recipe")
    for name, count, *means in rows:
        base, data = (of[part] for of, part in zip((BASES, SETS), name.split(", "), strict=True))
        for settings, told in zip(({}, {"recipe": "all-linear"}, {"objective": "t-few"}), means, strict=True):
            wanted = {"base": base, "settings": settings}
            found = [
                run["accuracy"]
                for run in runs
                if wanted.items() <= run.items() and run["data"].partition("/")[0] == data
            ]
            if told == "–":
                assert not found
            else:
                assert (count, told) == (str(len(found)), f"{100 * sum(found) / len(found):.1f}")
    assert len(rows) == len({(run["base"], run["data"].partition("/")[0]) for run in runs})
    measured, text = evidence()
    of_raft = {
        objective: {
            run["digest"]: run["accuracy"]
            for run in runs
            if run["data"].startswith("raft/") and run["settings"] == settings
        }
        for objective, settings in (("lm", {}), ("t-few", {"objective": "t-few"}))
    }
    gains = [100 * (of_raft["t-few"][fold] - of_raft["lm"][fold]) for fold in of_raft["lm"]]
    gain, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    assert f"six times as many, they are [{gain:+.1f}](#the-recipe)" in text
    assert gain < 2 * error  # "less than its folds can tell"
    steps = {run["steps"] for run in runs if run["data"].startswith("raft/")}
    assert steps == {500}
    full = measured["titler", "tweets", "full"]
    own = {"base": "titler", "data": "tweets", "settings": {}}
    own = [run for run in runs if own.items() <= run.items()]
    # "has what all weights have with 500 larger ones"
    assert abs(statistics.mean(run["accuracy"] for run in own) - full["accuracy"]) < 5e-4
    assert {run["steps"] for run in own} == {1500}
    lines = [
        line.split() for line in (RESULTS / "quickstart_search.txt").read_text().splitlines() if line[:1].isdigit()
    ]
    own = [line[-1] for line in lines if line[:7] == ["0.02", "8", "3000", "2", "grouped", "none", "0"]]
    linear = [line[-2] for line in lines if line[-1] == "all-linear" and line[5] == "none"]
    assert f"has {min(linear)} to {max(linear)} % of 600 at rates from 0.01 to 0.03" in text
    assert f"(IA)³ {own[0]} and {own[1]} at 0.02" in text


def test_what_a_sweep_chose_is_measured() -> None:
    _, text = evidence()
    sweeps = json.loads((RESULTS / "evidence.json").read_text())["sweeps"]
    swept = {(each["part"], each["base"], each["data"]): each for each in sweeps}
    assert len(swept) == 10
    other = swept.pop(("sweep", "titler", "phrasebank"))
    own = swept.pop(("sweep-own", "smollm2", "tweets"))
    assert all(each["sweep_rate"] == each["grid_rate"] for each in swept.values())
    asked = [("titler", "tweets"), ("smollm2", "phrasebank"), ("smollm2", "tweets"), ("smollm2", "orders")]
    rates = [swept["sweep", base, data]["sweep_rate"] for base, data in asked]
    words = "the T5's tweets ({:g}), SmolLM2's PhraseBank ({:g}), tweets ({:g}) and orders ({:g})"
    assert words.format(*rates) in text
    here, low, high = (100 * each for each in other["difference"])
    words = f"PhraseBank {other['sweep_rate']:g} for {other['grid_rate']:g}, which has {here:.1f} points more"
    assert f"{words} ({low:+.1f} to {high:+.1f})" in text
    here, low, high = (100 * each for each in own["difference"])
    costs = f"which costs those runs {-here:.1f} points ({low:+.1f} to {high:+.1f}); by one seed"
    assert f"On SmolLM2's tweets it then took {own['sweep_rate']:g}, {costs}" in text
    of_seed = {"kind": "run", "base": "smollm2", "data": "tweets", "method": "ia3", "seed": 0}
    (both,) = {
        run["validation_accuracy"]
        for run in records_of("evidence.jsonl")
        if of_seed.items() <= run.items() and run["rate"] in (own["sweep_rate"], own["grid_rate"])
    }
    assert f"both rates had {100 * both:.1f} % of the validation rows" in text


def test_the_rows_and_steps_of_the_table_are_the_scripts() -> None:
    found: dict[str, list] = {}
    for run in records_of("evidence.jsonl"):
        if run["kind"] == "run":
            data = run["data"].partition("/")[0]
            rows = tuple(run[f"{part}_rows"] for part in ("train", "validation", "test"))
            found.setdefault(data, []).append((rows, run["base"], run["steps"], run["batch_size"]))
    table = table_after("choosing.md", "How it was measured")
    assert [SETS[name.partition(",")[0]] for name, *_ in table] == list(found)
    for (name, rows, steps), runs in zip(table, found.values(), strict=True):
        ((train, validation, test),) = {each for each, *_ in runs}
        assert rows.removesuffix(", five times") == f"{train:,}, {validation:,}, {test:,}"
        (most,) = {(count, size) for _, base, count, size in runs if base != "smollm2" or name == "orders"}
        (decoders,) = {count for _, base, count, _ in runs if base == "smollm2"} or {most[0]}
        assert steps == "{} of {}".format(*most) + ("" if decoders == most[0] else f", SmolLM2 {decoders}")


def test_what_vectors_at_every_linear_layer_cost_is_measured() -> None:
    rows = json.loads((RESULTS / "train_step_all_linear.json").read_text())["rows"]
    found = {(row["name"], row["batch"], row["length"], row["dtype"]): row for row in rows}
    text = " ".join((DOCS / "speed.md").read_text().split())
    told = [
        (found[f"ia3 compile_step{more}", batch, 128, "bfloat16"]["ms"])
        for batch in (8, 64)
        for more in (", all-linear", "")
    ]
    assert "{:.1f} ms for {:.1f} at 8 × 128 and {:.1f} for {:.1f} at 64 × 128".format(*told) in text


def test_the_few_shot_table_is_measured() -> None:
    from ia3.runs.comparison import quartiles_of

    runs = json.loads((RESULTS / "few_shot.json").read_text())["runs"]
    expected = []
    for count in (16, 32, 64):
        found = [
            quartiles_of([run["accuracy"] for run in runs if (run["examples"], run["objective"]) == (count, objective)])
            for objective in ("lm", "t-few")
        ]
        cells = [f"{100 * s.median:.1f} ({100 * s.lower:.1f} to {100 * s.upper:.1f})" for s in found]
        expected.append([str(count), *cells])
    assert len(runs) == 30
    assert table_after("training.md", "T-Few") == expected


def test_the_accuracies_of_other_tasks_are_measured() -> None:
    text = " ".join((DOCS / "training.md").read_text().split())
    classified = (RESULTS / "classify_minilm.txt").read_text()
    for name in ("frozen encoder, mean of its tokens, head", "(IA)³, pooler and head"):
        (accuracy,) = re.findall(r"accuracy ([\d.]+)%", classified.split(f"\n{name}\n")[1].split("\n(IA)")[0])[:1]
        assert f"{accuracy} %" in text
    told = (RESULTS / "instruct_smollm2.txt").read_text()
    for when in ("before", "after"):
        (correct, total) = re.findall(rf"^{when}: (\d+) of (\d+)", told, re.MULTILINE)[0]
        assert f"{correct} of {total}" in text


def test_the_guides_accuracies_are_measured() -> None:
    means = {}
    runs = json.loads((RESULTS / "phrasebank_accuracy.json").read_text())["runs"]
    last = {(run["library"], str(run["seed"])): f"{run['accuracies'][-1]:.1%}".replace("%", " %") for run in runs}
    for seed, ours, theirs in table_after("guide.md", "Evaluation"):
        assert (ours, theirs) == (last["ia3", seed], last["peft", seed])
    for library in ("ia3", "ia3 fp8", "peft"):
        accuracies = [run["accuracies"][-1] for run in runs if run["library"] == library]
        means[library] = f"{100 * sum(accuracies) / len(accuracies):.1f} %"
    readme = (ROOT / "README.md").read_text()
    assert f"{means['peft']} | {means['ia3']}, one sentence of 681 less; {means['ia3 fp8']} in fp8" in readme
    assert means["ia3"] == means["ia3 fp8"]
    assert f"{means['ia3']} over three seeds, with and without" in " ".join((DOCS / "speed.md").read_text().split())


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api-attaching" / "index.html").read_text(encoding="utf-8")
    assert 'id="ia3.peft_model.PeftModel.push_to_hub"' in page


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"[\w-]+\.md", text)) == PAGES


def test_every_page_is_reached_from_the_home_page() -> None:
    reached, left = set(), ["index.md"]
    while left:
        page = left.pop()
        reached.add(page)
        linked = re.findall(r"\]\(([\w-]+\.md)", (DOCS / page).read_text(encoding="utf-8"))
        left += set(linked) - reached
    direct = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert sorted(reached) == PAGES
    assert set(PAGES) - direct == {"index.md", *(page for page in PAGES if page.startswith("api-"))}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("api-")])
def test_the_imports_of_an_api_page_are_what_it_describes(page: str) -> None:
    (imports,) = (block.content for block in blocks(page) if block.language == "python")
    names: dict[str, Any] = {}
    exec(imports, names)
    described = re.findall(r"^::: ([\w.]+)\.(\w+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in names if name != "__builtins__"} == {name for _, name in described}
    assert all(getattr(import_module(module), name) is names[name] for module, name in described)


@pytest.mark.parametrize(("word", "page"), SEARCHED_FOR)
def test_a_word_that_is_searched_for_stands_on_its_page(word: str, page: str) -> None:
    assert re.search(rf"\b{word}\b", (DOCS / page).read_text(encoding="utf-8"), re.IGNORECASE)


def test_what_is_wide_scrolls_in_its_own_box() -> None:
    rules = (DOCS / "narrow.css").read_text()
    assert "extra_css: [narrow.css]" in (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"\.formula,[^{]*\.md-typeset__scrollwrap \{\s*overflow-x: auto;", rules)
    for page in PAGES:
        for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
            assert "<math display" not in line or line.startswith('<div class="formula">'), f"{page}: {line[:60]}"


@pytest.mark.parametrize(
    ("page", "said", "file", "measured"),
    [
        ("first-steps.md", "all of them took 392 s", "quickstart.txt", "training 392 s, 900 steps"),
        ("first-steps.md", "gave 81.3 % (76.5 to 85.3)", "quickstart.txt", "81.3% of 300 held out (95 % interval 76.5"),
        ("first-steps.md", "78.0 % (95 % interval 73.0 to 82.3)", "quickstart_sizes.txt", "78.0% 73.0% to 82.3% 0.298"),
        ("first-steps.md", "trains for 195 s", "quickstart_sizes.txt", "450 195 26"),
        ("guide.md", "this one took 256 ms", "cpu_step.json", '"median_ms": 255.8'),
        ("guide.md", "padded to 128, took 742 ms", "cpu_step.json", '"median_ms": 742.'),
        ("guide.md", "gave 73.0 %", "quickstart_search.txt", "mixed dropout 0 '' | 0.359 161 | 0.362 73.0"),
        ("learning-rate.md", "gave 82.7", "quickstart_search.txt", "0.254 80.0 82.7"),
        ("learning-rate.md", "80.0 and", "quickstart_search.txt", "0.268 79.7 80.0"),
        ("learning-rate.md", "80.0 % of the 300", "quickstart_search.txt", "0.262 79.0 80.0"),
    ],
)
def test_a_number_in_a_sentence_is_measured(page: str, said: str, file: str, measured: str) -> None:
    assert said in " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert measured in " ".join((RESULTS / file).read_text().split())


def test_the_cost_of_adapters_in_vllm_is_measured() -> None:
    measured = json.loads((RESULTS / "vllm_overhead.json").read_text())
    order = ("ia3", "base_beside_ia3", "lora_r8", "base_beside_lora")
    expected = [
        [f"{measured[kind][row]['ratio_to_no_adapters']:.2f} ×" for kind in ("seconds", "of_a_processor")]
        for row in order
    ]
    assert [row[1:] for row in table_after("serving-vllm.md", "What was run")] == expected


# What the page on migrating says of PEFT


def theirs(base: Any = None, **config: Any) -> Any:
    import peft

    model = peft.get_peft_model(base or t5(), peft.IA3Config(**{**SEQ2SEQ, **config}))
    randomise(model)
    return model.eval()


def first_key(model: Any) -> Any:
    return model.base_model.model.encoder.block[0].layer[0].SelfAttention.k


def reloaded(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> tuple[list[str], str]:
    """What PEFT warns of, and what ours refuses, for a file of PEFT's that was changed."""
    import peft

    theirs().save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(t5(), folder)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the caller looks at it)
        PeftModel.from_pretrained(t5(), folder)
    return [str(w.message) for w in caught if "adapter key" in str(w.message)], str(refused.value)


def test_files_that_peft_takes(tmp_path: Path) -> None:
    key = "base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l"
    warned, refused = reloaded(tmp_path, lambda tensors: tensors[key].fill_(float("nan")))
    assert not warned
    assert "NaN" in refused
    warned, refused = reloaded(tmp_path, lambda tensors: tensors.update({key.replace(".k.", ".q."): torch.ones(16, 1)}))
    assert not warned
    assert "1 unknown" in refused
    warned, refused = reloaded(tmp_path, lambda tensors: tensors.pop(key))
    assert "missing adapter keys" in warned[0]
    assert "1 missing" in refused


def test_a_field_that_peft_drops(tmp_path: Path) -> None:
    import peft

    theirs().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"twice": True}))
    with pytest.warns(UserWarning, match="twice"):
        peft.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="twice"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"target_modules": ["k", "vv"], "feedforward_modules": []}, []),
        ({"modules_to_save": ["vv"]}, []),
        ({"target_modules": ["k"], "feedforward_modules": [], "exclude_modules": ["vv"]}, ["exclude_modules"]),
    ],
)
def test_names_that_match_nothing(config: dict[str, Any], warned: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs(**config)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert len(said) == len(warned)
    assert all(word in message for word, message in zip(warned, said, strict=True))
    with pytest.raises(ValueError, match="'vv' matches no module"):
        get_peft_model(t5(), IA3Config(**SEQ2SEQ, **config))


def test_adapter_names_are_ignored() -> None:
    model, batch = theirs(), seq2seq_batch()
    assert torch.equal(model(**batch, adapter_names=["nonsense"] * 3).logits, model(**batch).logits)


def test_a_feedforward_name_matches_without_a_dot() -> None:
    config = {"target_modules": ["o", "wo"], "feedforward_modules": ["o"]}
    assert theirs(**config).base_model.model.encoder.block[0].layer[1].DenseReluDense.wo.is_feedforward
    sites = find_sites(t5(), IA3Config(**SEQ2SEQ, **config)).layout.sites
    assert {site.side for site in sites if site.path.endswith(".wo")} == {"output"}


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_unmerging_loses_what_a_zero_multiplied() -> None:
    model = theirs()
    layer = first_key(model)
    layer.ia3_l["default"].data[0] = 0
    model.merge_adapter()
    model.unmerge_adapter()
    assert not layer.base_layer.weight[0].any()


@pytest.mark.parametrize("safe", [True, False])
def test_a_safe_merge_stops_half_way_and_another_merges_nan(safe: bool) -> None:
    import peft

    model = theirs()
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.ia3.IA3Layer)]
    layers[5].ia3_l["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN") if safe else nullcontext():
        model.merge_adapter(safe_merge=safe)
    assert sum(layer.merged for layer in layers) == (5 if safe else len(layers))


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_disabling_unmerges_for_good() -> None:
    model = theirs()
    model.merge_adapter()
    with model.disable_adapter():
        model(**seq2seq_batch())
    assert not first_key(model).merged


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merging_a_tied_head_scales_the_embedding() -> None:
    base = t5(tie_word_embeddings=True)
    before = base.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = theirs(base, target_modules=["lm_head"], feedforward_modules=[])
    model.merge_adapter()
    assert not torch.equal(base.get_input_embeddings().weight, before)


def test_a_combination_is_a_sum_and_absent_counts_as_zero() -> None:
    import peft

    model = theirs()
    model.add_adapter("k", peft.IA3Config(**SEQ2SEQ, target_modules=["k"], feedforward_modules=[]))
    model.base_model.add_weighted_adapter(["default", "k"], [1, 1], "sum")
    attention = model.base_model.model.encoder.block[0].layer[0].SelfAttention
    assert torch.equal(attention.k.ia3_l["sum"], attention.k.ia3_l["default"] + 1)
    assert torch.equal(attention.v.ia3_l["sum"], attention.v.ia3_l["default"])
    model.base_model.add_weighted_adapter(["k"], [5], "sum")  # the name is taken
    assert not torch.equal(attention.k.ia3_l["sum"], 5 * attention.k.ia3_l["k"])


def test_a_list_of_adapters_and_the_callers_configuration() -> None:
    import peft

    with pytest.raises(TypeError):
        theirs().set_adapter(["default"])
    config = peft.IA3Config(**CAUSAL)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        peft.get_peft_model(gpt2(), config)
    assert config.fan_in_fan_out


def test_saving_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a, **k: asked.append(a))
    base = t5()
    base.name_or_path = "me/base"
    with pytest.warns(UserWarning, match="Could not find a config file in me/base"):
        theirs(base).save_pretrained(tmp_path)
    assert asked == [("me/base", "config.json")]


def test_the_defaults_of_peft() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

    rows = table_after("from-peft.md", "Where the vectors go")

    def kinds(said: str) -> set[str]:
        (named,) = [row[0] for row in rows if row[1:3] == [*said.split(" → ")]]
        return set(re.findall(r"`([\w-]+)`", named))

    for said, wrong in (
        ("queries and values → keys and values", ["q_proj", "v_proj"]),
        ("queries and keys → keys and values", ["q_proj", "k_proj"]),
    ):
        assert kinds(said) == {kind for kind, names in DEFAULTS.items() if names[:2] == wrong}
    fused = kinds("the whole fused projection, queries too → its channels of keys and values")
    old = {"RefinedWeb", "RefinedWebModel"}  # Falcon's former names, which transformers has no more
    assert (
        fused
        == {kind for kind, names in DEFAULTS.items() if names[0] in ("c_attn", "query_key_value", "in_proj")} - old
    )

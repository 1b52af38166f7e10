"""Hostile input at every door of the library, each in a process of its own, and what came of it.

A generator (`weights.py`, `files.py`) names attacks: a kind, a name, a function that writes the hostile files, and the
doors they are for. `run` tries each door in a forked child: with a `y` on standard input, for some seconds, with some
memory, beside a file that only hostile code writes.

    python tests/attack/harness.py            every attack at every door, and a table by kind
    python tests/attack/harness.py zip pipe   those whose kind or name has one of the words
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

GENERATORS = ("weights", "bases", "files")
"""Modules of this folder with a function `attacks()`."""
SECONDS = 20.0
"""That a door may compute for."""
MOST_BYTES = 2 << 30
LONGEST_MESSAGE = 3000

FINE, REFUSED = "fine", "refused"
BAD = ("unnamed", "traceback", "hang", "memory", "ran", "outside")
"""What may not come of an attack: a message that names no file, a traceback, and so on."""
_LOOKS = 500  # in a row, each 0.01 s after the last
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


@dataclass(frozen=True)
class Ground:
    """What is honest: a tiny base, an adapter of it, labelled text."""

    root: Path
    base: Path
    adapter: Path
    data: Path


@dataclass(frozen=True)
class Attack:
    """Hostile files.

    Args:
        kind: the table's row.
        name: unique in its kind.
        build: writes the files into an empty folder; `CANARY` is the name of a file beside that folder which only
            hostile code writes.
        doors: names in `DOORS`.
        may_pass: what is written may also be taken, if it does no harm.
    """

    kind: str
    name: str
    build: Callable[[Path, Ground], None]
    doors: tuple[str, ...]
    may_pass: bool = True


CANARY = "canary"


@dataclass(frozen=True)
class Outcome:
    """What came of an attack at a door."""

    attack: Attack
    door: str
    verdict: str
    seconds: float
    megabytes: int
    said: str


Door = Callable[[Path, Ground], Any]
DOORS: dict[str, Door] = {}


def door(function: Door) -> Door:
    """Make a function of a hostile folder a door, under its own name."""
    DOORS[function.__name__] = function
    return function


def honest_ground(root: Path) -> Ground:
    """Make the honest files."""
    import tiny_seq2seq
    from ia3.tasks.task import Task, TaskKind, save_task
    from ia3.tasks.template import Template

    base = tiny_seq2seq.save_base(root / "base")
    model = tiny_seq2seq.adapted()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(root / "adapter")
    task = Task(
        kind=TaskKind.LABEL_WORDS,
        template=Template.of_column("text"),
        labels=tiny_seq2seq.LABELS,
        max_length=32,
        max_new_tokens=4,
        base_model=str(base),
    )
    save_task(root / "adapter", task)
    return Ground(root, base, root / "adapter", tiny_seq2seq.write_csv(root / "data.csv", 12))


def command(*arguments: Any) -> None:
    """Run `ia3 …`, with a `y` on standard input."""
    from typer.testing import CliRunner

    from ia3.cli import main

    result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, [str(each) for each in arguments], input="y\n" * 20)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception if isinstance(result.exception, MemoryError) else CommandError(result.exception)
    if result.exit_code:
        raise ValueError(result.stderr.replace("│", " "))


class CommandError(Exception):
    """A command that ended in a traceback."""


# Doors of adapters


def _model() -> Any:
    import tiny_seq2seq

    return tiny_seq2seq.base()


@door
def from_pretrained(folder: Path, ground: Ground) -> None:
    from ia3 import PeftModel

    PeftModel.from_pretrained(_model(), folder)


@door
def auto_model(folder: Path, ground: Ground) -> None:
    from ia3 import AutoPeftModelForSeq2SeqLM

    AutoPeftModelForSeq2SeqLM.from_pretrained(folder)


@door
def auto_any(folder: Path, ground: Ground) -> None:
    from ia3 import AutoPeftModel

    AutoPeftModel.from_pretrained(folder)


@door
def load_adapter(folder: Path, ground: Ground) -> None:
    from ia3 import PeftModel

    model = PeftModel.from_pretrained(_model(), ground.adapter)
    model.load_adapter(folder, "other")


@door
def load_peft_weights(folder: Path, ground: Ground) -> None:
    from ia3 import load_peft_weights

    load_peft_weights(folder)


@door
def register(folder: Path, ground: Ground) -> None:
    from ia3 import AdapterTable

    AdapterTable(_model()).register("hostile", folder)


@door
def read_vectors(folder: Path, ground: Ground) -> None:
    from ia3.table import read_vectors

    read_vectors(_model(), folder)


@door
def hotswap(folder: Path, ground: Ground) -> None:
    from ia3 import PeftModel
    from ia3.hotswap import hotswap_adapter

    hotswap_adapter(PeftModel.from_pretrained(_model(), ground.adapter), folder, "default")


@door
def adapterhub(folder: Path, ground: Ground) -> None:
    from ia3.convert import load_adapterhub

    load_adapterhub(_model(), folder)


@door
def tfew(folder: Path, ground: Ground) -> None:
    from ia3.convert import load_tfew

    for file in folder.iterdir():
        load_tfew(_model(), file)


@door
def inspect(folder: Path, ground: Ground) -> None:
    command("inspect", folder)


@door
def compare(folder: Path, ground: Ground) -> None:
    command("compare", ground.adapter, folder)


@door
def combine(folder: Path, ground: Ground) -> None:
    command("combine", ground.adapter, folder, "--output", "combined")


@door
def merge(folder: Path, ground: Ground) -> None:
    command("merge", folder, "merged")


@door
def predict(folder: Path, ground: Ground) -> None:
    command("predict", folder, "the share rises")


@door
def evaluate(folder: Path, ground: Ground) -> None:
    command("evaluate", folder, "--data", ground.data)


# Doors of bases


@door
def train(folder: Path, ground: Ground) -> None:
    command("train", folder, ground.data, "--task", "label-words", "--steps", 1, "--output", "run")


@door
def train_in_python(folder: Path, ground: Ground) -> None:
    import ia3

    ia3.train(model=str(folder), data=str(ground.data), task="label-words", steps=1, output="run")


@door
def sweep(folder: Path, ground: Ground) -> None:
    flags = ("--task", "label-words", "--steps", 1, "--over", "learning_rate=0.01,0.02", "--output", "swept")
    command("sweep", folder, ground.data, *flags)


@door
def targets(folder: Path, ground: Ground) -> None:
    command("targets", folder)


@door
def predict_on(folder: Path, ground: Ground) -> None:
    """By an honest adapter whose base is the hostile folder."""
    command("predict", _adapter_on(folder, ground), "the share rises")


@door
def merge_on(folder: Path, ground: Ground) -> None:
    command("merge", _adapter_on(folder, ground), "merged")


@door
def auto_model_on(folder: Path, ground: Ground) -> None:
    from ia3 import AutoPeftModelForSeq2SeqLM

    AutoPeftModelForSeq2SeqLM.from_pretrained(_adapter_on(folder, ground))


def _adapter_on(folder: Path, ground: Ground) -> Path:
    copy = Path("adapter-of-it")
    shutil.copytree(ground.adapter, copy)
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
    return copy


ADAPTER_DOORS = (
    *("from_pretrained", "auto_model", "load_adapter", "load_peft_weights", "register", "read_vectors", "hotswap"),
    *("inspect", "compare", "combine", "merge", "predict", "evaluate"),
)
BASE_DOORS = ("train", "train_in_python", "sweep", "targets", "predict_on", "merge_on", "auto_model_on")


# Running


def run(attack: Attack, ground: Ground, doors: Collection[str] | None = None) -> Iterator[Outcome]:
    """Build an attack and try its doors, each in a forked child; only some of them where `doors` names these."""
    with tempfile.TemporaryDirectory(dir=ground.root.parent, prefix="attack-") as place:
        hostile = Path(place, "hostile")
        hostile.mkdir()
        _build(attack, hostile, ground)
        for name in attack.doors:
            if doors is None or name in doors:
                yield _try(attack, name, Path(place), ground)


def _try(attack: Attack, name: str, sandbox: Path, ground: Ground) -> Outcome:
    hostile, work = sandbox / "hostile", sandbox / "work"
    work.mkdir()
    before = _seen(ground.root) | _seen(hostile)
    begun = time.monotonic()
    child = os.fork()
    if not child:
        _be_child(DOORS[name], hostile, work, ground)
    status, used = _wait(child)
    seconds = time.monotonic() - begun
    verdict, said = _judge(attack, sandbox, status)
    if used.ru_maxrss << 10 > MOST_BYTES:
        verdict = "memory"
    if _seen(ground.root) | _seen(hostile) != before or {each.name for each in sandbox.iterdir()} - _OWN:
        verdict = "outside"
    if (sandbox / CANARY).exists():
        verdict = "ran"
    shutil.rmtree(work)
    for made in ("result", "log", CANARY):
        (sandbox / made).unlink(missing_ok=True)
    return Outcome(attack, name, verdict, seconds, used.ru_maxrss >> 10, said)


_OWN = {"hostile", "work", "result", "log", CANARY}


def _build(attack: Attack, hostile: Path, ground: Ground) -> None:
    """Write the hostile files in a process of its own, whose memory goes with it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            attack.build(hostile, ground)
            code = 0
        except BaseException:  # a child ends by its code alone
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{attack.kind}/{attack.name} could not be built")


def _be_child(call: Door, hostile: Path, work: Path, ground: Ground) -> None:
    """Try the door, write down what it said, and end."""
    code = 1
    try:
        os.chdir(work)
        log = os.open(work.parent / "log", os.O_CREAT | os.O_WRONLY)
        asked = os.memfd_create("asked")
        os.write(asked, b"y\n" * 100)
        os.lseek(asked, 0, os.SEEK_SET)
        for number, file in ((0, asked), (1, log), (2, log)):
            os.dup2(file, number)
        limit = _virtual_memory() + 2 * MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            call(hostile, ground)
            verdict, said = FINE, ""
        except _USER_ERRORS as error:
            verdict, said = REFUSED, str(error)
        except MemoryError as error:
            verdict, said = "memory", repr(error)
        except BaseException as error:  # whatever it is, it is the verdict
            error = error.args[0] if isinstance(error, CommandError) else error
            verdict, said = "traceback", "".join(traceback.format_exception(error)[-3:])
        (work.parent / "result").write_text(json.dumps([verdict, said[:20_000]]))
        code = 0
    finally:
        os._exit(code)


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _wait(child: int) -> tuple[int | None, resource.struct_rusage]:
    """The child's end and what it used; None where it had to be ended, since it computed too long or nothing at all.

    On a busy machine it may take longer by the clock: what counts is at how many looks in a row it hadn't got on.
    """
    used, still = 0.0, 0
    while used < SECONDS and still < _LOOKS:
        time.sleep(0.01)
        now = _computed(child)
        used, still = now, 0 if now > used else still + 1
        ended, status, resources = os.wait4(child, os.WNOHANG)
        if ended:
            return status, resources
    os.kill(child, signal.SIGKILL)
    return None, os.wait4(child, 0)[2]


def _computed(child: int) -> float:
    """The seconds that a process has computed for."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _judge(attack: Attack, sandbox: Path, status: int | None) -> tuple[str, str]:
    if status is None:
        return "hang", ""
    if not (sandbox / "result").exists():
        return "traceback", f"the process ended with {status}"
    verdict, said = json.loads((sandbox / "result").read_text())
    if verdict == REFUSED:
        names = ("hostile", "adapter-of-it", *(each.name for each in (sandbox / "hostile").iterdir()))
        together = "".join(said.split())
        if len(said) > LONGEST_MESSAGE or not any("".join(name.split()) in together for name in names):
            verdict = "unnamed"
    if verdict == FINE and not attack.may_pass:
        verdict = "unnamed"
    return verdict, said


def _seen(folder: Path) -> set[tuple[str, int, int]]:
    """What is in a folder, to see whether something was written there."""
    found = set()
    for path in folder.rglob("*"):
        status = path.lstat()
        found.add((str(path), status.st_size, status.st_mtime_ns))
    return found


def every_attack() -> Iterator[Attack]:
    """The attacks of all generators that there are."""
    for name in GENERATORS:
        if (HERE / f"{name}.py").is_file():
            yield from importlib.import_module(name).attacks()


def prepare(root: Path) -> Ground:
    """Make the honest files, and try each door with them here, so that children find all of it imported."""
    import torch

    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    ground = honest_ground(root)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place, Path(os.devnull).open("w") as quiet, redirect_stderr(quiet):
        os.chdir(place)
        try:
            for name in ADAPTER_DOORS:
                DOORS[name](ground.adapter, ground)
            for name in BASE_DOORS:
                shutil.rmtree("adapter-of-it", ignore_errors=True)
                shutil.rmtree("run", ignore_errors=True)
                shutil.rmtree("merged", ignore_errors=True)
                DOORS[name](ground.base, ground)
        finally:
            os.chdir(here)
    return ground


def print_table(outcomes: list[Outcome]) -> None:
    """Counts by kind, and what may not be."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for each in outcomes:
        by_kind[each.attack.kind][each.verdict] += 1
    columns = (FINE, REFUSED, *BAD)
    print(f"{'kind':28}" + "".join(f"{name:>10}" for name in ("calls", *columns)))
    for kind, counts in sorted(by_kind.items()):
        print(
            f"{kind:28}" + "".join(f"{number:>10}" for number in (counts.total(), *(counts[each] for each in columns)))
        )
    total = Counter(each.verdict for each in outcomes)
    inputs = len({(each.attack.kind, each.attack.name) for each in outcomes})
    print(f"{inputs} inputs" + " " * 18 + "".join(f"{total[name]:>10}" for name in columns))


def main(words: list[str]) -> int:
    """Run all attacks, or those of some words; the exit code tells whether any did harm."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="ia3-attack-") as place:
        ground = prepare(Path(place) / "ground")
        for attack in every_attack():
            if words and not any(word in f"{attack.kind} {attack.name}" for word in words):
                continue
            for outcome in run(attack, ground):
                outcomes.append(outcome)
                name = outcome.door
                if outcome.verdict in BAD or words:
                    said = " ".join(outcome.said.split())
                    said = said if len(said) < 500 else f"{said[:100]} … {said[-400:]}"
                    how = f"{outcome.seconds:.1f} s, {outcome.megabytes:,} MB"
                    print(
                        f"{outcome.verdict.upper()} {attack.kind}/{attack.name} at {name} ({how}): {said}", flush=True
                    )
    print_table(outcomes)
    return int(any(each.verdict in BAD for each in outcomes))


if __name__ == "__main__":
    import harness  # where the generators' doors are, which know this file by its name

    sys.exit(harness.main(sys.argv[1:]))

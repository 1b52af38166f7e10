"""Which adapters are served under which names: a folder that is watched, and what is loaded, unloaded and aliased.

An adapter is its content. Files that are replaced are another version with a row of its own in the table; requests
hold the version that they came for, and one that nobody holds leaves the table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ia3.config import CONFIG_NAME, TaskType
from ia3.errors import fit_screen, listed, shorten
from ia3.inference.loading import DTYPES
from ia3.inference.many import adapters_below
from ia3.inference.predict import most_positions
from ia3.inference.rank import decode_alone
from ia3.mixing import own_sites
from ia3.rows import BASE
from ia3.runs.run import ADAPTER_FOLDER, BEST_FOLDER, RECIPE_NAME
from ia3.runs.sums import expect_adapter_unchanged
from ia3.serving.requests import Refused, Served, UnknownModel
from ia3.sites import Site
from ia3.table import AdapterTable
from ia3.tasks.task import TASK_NAME, Task, TaskKind, load_task
from ia3.tasks.template import Template
from ia3.tensors import SAFETENSORS_NAME

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_KINDS: dict[Any, str] = {
    TaskType.SEQ_2_SEQ_LM: "a seq2seq model",
    TaskType.CAUSAL_LM: "a causal model",
    TaskType.SEQ_CLS: "an encoder with heads for classes of texts",
}
_FILES = (CONFIG_NAME, SAFETENSORS_NAME, TASK_NAME)
_HIDDEN = "the base, or an alias, has that name and answers by it: rename the folder, or unload the alias."
# What the base answers where it is asked itself.
_BASE_LENGTH, _BASE_NEW_TOKENS = 512, 128

# A look at very many adapters takes its time, and is followed by so many times as much without.
_REST = 20
# Seconds until files are read again that could not be for a reason that may pass.
_PASSES_S = 10.0

# Of each of an adapter's files, what changes with its content; None where there is no adapter.
Signature = tuple[tuple[int, int, int] | None, ...]


class Contents(Protocol):
    """Where the contents of adapters are put, each under a name of its own; an `AdapterTable` is one."""

    capacity: int

    @property
    def resident(self) -> int:
        """How many contents the device holds."""
        ...

    def register(self, name: str, path: str | Path) -> str:
        """Read an adapter that fits the base, and hold it; its digest."""
        ...

    def drop(self, name: str) -> None:
        """Hold it no more. It returns at once."""
        ...

    def close(self) -> None:
        """Hold nothing any more."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def __len__(self) -> int: ...


@dataclass(eq=False)
class Version:
    """One content of an adapter.

    Args:
        row: its name in the table.
        digest: the sha256 of its vectors and task; None for the base.
        task: what it answers, and how.
        column: what the task's template calls a request's text.
        encodes: whether its vectors act where texts are encoded, and not in a decoder alone.
        holders: how many names, aliases and requests need it.
    """

    row: str
    digest: str | None
    task: Task
    column: str
    encodes: bool = True
    holders: int = 0

    def render(self, text: str) -> str:
        """What the model reads for a request's text."""
        return self.task.template.render({self.column: text}, "the request")


class Held(NamedTuple):
    """A version under the name that it was asked for by."""

    name: str
    version: Version


@dataclass(eq=False)
class _Place:
    """A folder that holds an adapter, and what was made of it.

    Args:
        seen: how its files were at the last look.
        taken: how they were when they were read last.
        version: what is served of it; None where nothing could be read so far.
        why: why the files that were read last can't be served.
        again: the moment on `time.monotonic()` from which on they are read again, though they are the same.
    """

    seen: Signature | None = ()
    taken: Signature | None = ()
    version: Version | None = None
    why: str | None = None
    again: float = math.inf


class Registry:
    """The adapters below a folder, by name, and their contents in a table. Any thread may call any method.

    Args:
        model: the base model, bare. It carries the table until `close`.
        folder: what holds the folders of adapters; nothing outside of it is read.
        base: the name under which the base itself is asked, and which may stand before an adapter's: `base:adapter`.
        table: where contents are put, closed with the registry; an `AdapterTable` of the model where left out.
        capacity: the most adapters that one batch may use of that one.

    Raises:
        ValueError: no such folder, one that is itself an adapter, a model that answers nothing, or what `AdapterTable`
            raises. An adapter that can't be served is no error: `refused` says why.
    """

    def __init__(
        self, model: Any, folder: str | Path, *, base: str, table: Contents | None = None, capacity: int = 256
    ) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}: expected one that holds a folder for each adapter.")
        self._kind = _kind_of(model)
        self.folder = Path(os.path.realpath(folder))
        adapters_below(self.folder)
        self.model, self.base = model, base
        self.table: Contents = AdapterTable(model, capacity=capacity) if table is None else table
        self._base = Version(BASE, None, _task_of_base(model), "text", holders=1)
        # Held while files are read, so one at a time; and while names change, which takes no time.
        self._reading, self._lock = threading.RLock(), threading.RLock()
        self._names: dict[str, Path] = {}
        self._places: dict[Path, _Place] = {}
        self._versions: dict[str, Version] = {}
        self._aliases: dict[str, Held] = {}
        self._loaded: dict[str, Path] = {}
        self._unloaded: set[str] = set()
        self._encoding: dict[tuple[Site, ...], bool] = {}
        self._reads = 0  # how often an adapter's files were read
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self.refresh(at_once=True)

    # Who is asked

    def hold(self, model: str) -> Held:
        """What a client means by a name at this moment; it stays in the table until `release`.

        Raises:
            UnknownModel: nothing has that name.
        """
        with self._lock:
            held = self._named(model)
            if held is None:
                raise UnknownModel(
                    f"There is no model {shorten(model)}: expected an adapter, an alias, or the base {self.base!r}."
                )
            held.version.holders += 1
            return held

    def release(self, version: Version) -> None:
        """Need a version no more; without any holder it leaves the table."""
        with self._lock:
            version.holders -= 1
            if not version.holders and version.digest is not None:
                del self._versions[version.digest]
                if version.row in self.table:  # else it was closed
                    self.table.drop(version.row)

    def _named(self, model: str) -> Held | None:
        return self._find(model) or self._find(model.removeprefix(f"{self.base}:"))

    def _find(self, name: str) -> Held | None:
        if name == self.base:
            return Held(name, self._base)
        if name in self._aliases:
            return self._aliases[name]
        version = self._places[self._names[name]].version if name in self._names else None
        return None if version is None else Held(name, version)

    def models(self) -> list[Served]:
        """All that can be asked, the base first; an alias of a version that no name has any more stands for itself."""
        with self._lock:
            named = (self._find(name) for name in sorted(self._names) if not self._is_hidden(name))
            held = [Held(self.base, self._base), *(each for each in named if each is not None)]
            alone = [Held(name, each.version) for name, each in self._aliases.items() if not self._is_current(each)]
            aliases = self._aliases_of()
            return [_served(each, self.base, aliases.get(each, ())) for each in held + alone]

    def find(self, name: str) -> Served | None:
        """What a client means by a name, as in `models`; None where nothing has it."""
        with self._lock:
            held = self._named(name)
            if held is None:
                return None
            if not self._is_current(held):
                held = Held(name.removeprefix(f"{self.base}:"), held.version)
            return self._served(held)

    def __len__(self) -> int:
        """How many names of adapters are served."""
        with self._lock:
            return sum(self._places[path].version is not None for path in self._names.values())

    def stats(self) -> dict[str, float]:
        """How many names of adapters are served and refused, contents of these in memory, and on the device."""
        with self._lock:
            counts = {"adapters": len(self), "refused": len(self.refused())}
            return {**counts, "versions": len(self.table), "resident": self.table.resident}

    def refused(self) -> dict[str, str]:
        """Why the adapters of these names are not served, or still with what they were before."""
        with self._lock:
            every = (
                (name, _HIDDEN if self._is_hidden(name) else self._places[path].why)
                for name, path in self._names.items()
            )
            return dict(sorted((name, why) for name, why in every if why is not None))

    def _is_hidden(self, name: str) -> bool:
        """Whether the base, or an alias that was there before, answers by the name of a folder."""
        return name == self.base or name in self._aliases

    def _is_current(self, held: Held) -> bool:
        """Whether a version is still its name's, as far as anybody is told of that name."""
        if held.version is self._base:
            return True
        path = None if self._is_hidden(held.name) else self._names.get(held.name)
        return path is not None and self._places[path].version is held.version

    def _aliases_of(self) -> dict[Held, tuple[str, ...]]:
        found: dict[Held, tuple[str, ...]] = {}
        for alias, held in sorted(self._aliases.items()):
            found[held] = (*found.get(held, ()), alias)
        return found

    def _served(self, held: Held) -> Served:
        return _served(held, self.base, self._aliases_of().get(held, ()))

    # What changes it

    def load(self, name: str, path: str) -> Served:
        """Serve the adapter at a path below the folder under a name, in the place of what had that name.

        Raises:
            Refused: a name, path or adapter that can't be taken; nothing has changed then.
        """
        self._expect_name(name)
        if name in self._aliases:
            raise Refused(f"{name!r} is an alias: choose another name, or unload the alias first.")
        with self._reading:
            folder = self._inside(path)
            seen = _signature(folder)
            version = self._read(folder, seen)
            with self._lock:
                self._loaded[name] = self._names[name] = folder
                self._unloaded.discard(name)
                self._put(self._places.setdefault(folder, _Place()), seen, version)
                self._forget_unnamed()
                return self._served(Held(name, version))

    def unload(self, name: str) -> None:
        """Serve an adapter, or an alias, no more. What is found in the folder stays unloaded until it is loaded.

        Raises:
            UnknownModel: there is none.
        """
        with self._reading, self._lock:
            if name in self._aliases:
                self.release(self._aliases.pop(name).version)
                return
            if name not in self._names:
                raise UnknownModel(f"There is no adapter and no alias {shorten(name)} to unload.")
            del self._names[name]
            self._loaded.pop(name, None)
            self._unloaded.add(name)
            self._forget_unnamed()

    def alias(self, alias: str, name: str) -> Served:
        """Let an alias mean the version that a name has at this moment, until it is moved.

        Raises:
            UnknownModel: there is no such model.
            Refused: a name that can't be an alias.
        """
        self._expect_name(alias)
        with self._lock:
            if alias in self._names and alias not in self._aliases:
                raise Refused(f"{alias!r} is an adapter's own name: choose another alias.")
            held = self.hold(name)
            former, self._aliases[alias] = self._aliases.get(alias), held
            if former is not None:
                self.release(former.version)
            return self._served(held)

    def refresh(self, *, at_once: bool = False) -> None:
        """Look through the folder: read what changed, forget what is gone.

        Args:
            at_once: don't wait until files are as they were at the last look. Of an adapter that is being copied, one
                file may be new and the others old.

        Raises:
            ValueError: the folder is itself an adapter now.
        """
        with self._reading:
            found = {name: path for name, path in _named_below(self.folder).items() if self._may_be_named(name)}
            names = {**self._names, **found, **self._loaded}
            there = {path for path in dict.fromkeys(names.values()) if self._look(path, at_once=at_once)}
            with self._lock:
                for name in names.keys() - self._names.keys():
                    if self._is_hidden(name):
                        _logger.warning("The adapter in %s is not served by its name: %s", shorten(name), _HIDDEN)
                self._names = {name: path for name, path in names.items() if path in there}
                self._loaded = {name: path for name, path in self._loaded.items() if path in there}
                self._forget_unnamed()

    def watch(self, every_s: float = 1.0) -> None:
        """Let a thread refresh so often, or less where it takes long, until `close`."""
        self._watcher = threading.Thread(target=self._watch, args=(every_s,), name="ia3-adapters", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Forget all adapters and give the model back. No request may be under way."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._reading, self._lock:
            self.table.close()

    def _watch(self, every_s: float) -> None:
        took = 0.0
        while not self._closed.wait(max(every_s, _REST * took)):
            start, reads = time.monotonic(), self._reads
            try:
                self.refresh()
            except Exception:  # whatever it is, it may be gone at the next look
                _logger.exception("The folder of adapters could not be looked through.")
            # Where something was read, more may have come meanwhile.
            took = time.monotonic() - start if self._reads == reads else 0.0

    # Inside

    def _may_be_named(self, name: str) -> bool:
        """Whether a folder's name is one that goes into answers, and was not unloaded."""
        return name.isprintable() and name not in self._unloaded

    def _expect_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise Refused(
                f"{shorten(name)} can't be a name: expected up to 128 letters, digits, '.', '_', '-' and '/', of which "
                "the first is a letter or a digit."
            )
        if name == self.base:
            raise Refused(f"{name!r} is the base's own name: choose another.")

    def _look(self, path: Path, *, at_once: bool) -> bool:
        """Read an adapter if it changed; whether it is there."""
        with self._lock:
            place = self._places.setdefault(path, _Place())
        seen = _signature(path)
        settled, place.seen = at_once or seen == place.seen, seen
        if not settled or (seen == place.taken and time.monotonic() < place.again):
            return True
        if seen is None:
            return False
        try:
            version = self._read(path, seen)
        except Refused as error:
            if error.message != place.why or seen != place.taken:
                _logger.warning("%s", error.message)
            place.taken, place.why = seen, error.message
            place.again = time.monotonic() + _PASSES_S if _may_pass(error.__cause__) else math.inf
        else:
            self._put(place, seen, version)
        return True

    def _put(self, place: _Place, seen: Signature | None, version: Version) -> None:
        """Serve a version that is held at a place from now on."""
        with self._lock:
            former, place.version = place.version, version
            place.seen = place.taken = seen
            place.why, place.again = None, math.inf
            if former is not None:
                self.release(former)

    def _forget_unnamed(self) -> None:
        for path in self._places.keys() - {*self._names.values()}:
            version = self._places.pop(path).version
            if version is not None:
                self.release(version)

    def _read(self, path: Path, seen: Signature | None) -> Version:
        """Read an adapter's files, which were so; its version is held.

        Raises:
            Refused: they can't be served.
        """
        self._reads += 1
        with self._refusing(path):
            self._expect_files_inside(path)
            expect_adapter_unchanged(path)
            task = load_task(path)
            column = self._expect_answerable(task)
            assert task is not None
            row = f"version {self._reads}"
            content = self.table.register(row, path)
            self._expect_labels(row, task)
        digest = hashlib.sha256(f"{content} {json.dumps(asdict(task), sort_keys=True)}".encode()).hexdigest()
        with self._lock:
            version = self._versions.get(digest)
            if version is not None:
                self.table.drop(row)
            else:
                version = self._versions[digest] = Version(row, digest, task, column, self._encodes(row))
            version.holders += 1
        if _signature(path) != seen:
            self.release(version)
            raise Refused(f"The adapter in {self._shown(path)} was changed while it was read: see that it is whole.")
        return version

    @contextmanager
    def _refusing(self, path: Path) -> Iterator[None]:
        """Whatever is wrong with an adapter is one refusal, in words that don't say where the folder is."""
        try:
            yield
        except Exception as error:  # files of anybody's fail in any way
            why = fit_screen(str(error).replace(f"{self.folder}{os.sep}", "") or type(error).__name__)
            raise Refused(f"The adapter in {self._shown(path)} can't be served: {why}") from error

    def _shown(self, path: Path) -> str:
        return shorten(path.relative_to(self.folder).as_posix())

    def _inside(self, path: str) -> Path:
        """The folder at a path that a client named.

        Raises:
            Refused: it leads out of the adapters' folder, or is none.
        """
        try:
            found = Path(os.path.realpath(self.folder / path))
            if not (found / CONFIG_NAME).is_file() and (found / ADAPTER_FOLDER).is_dir():  # a run's folder
                found = Path(os.path.realpath(found / ADAPTER_FOLDER))
            is_there = self.folder in found.parents and found.is_dir()
        except (OSError, ValueError):  # too long, or a zero in it
            is_there = False
        if not is_there:
            raise Refused(f"{shorten(path)} is no folder below the folder of adapters: expected one that is.")
        return found

    def _expect_files_inside(self, path: Path) -> None:
        """Refuse links that lead out of the folder, and vectors in a pickle."""
        for file in (path, *(path / name for name in _FILES)):
            if not Path(os.path.realpath(file)).is_relative_to(self.folder):
                raise ValueError(f"{file.name} is a link that leads out of the folder of adapters: copy what it means.")
        if not (path / SAFETENSORS_NAME).is_file():
            raise ValueError(f"it has no {SAFETENSORS_NAME}: save it with `save_pretrained`.")

    def _expect_answerable(self, task: Task | None) -> str:
        """Refuse a task that this model can't answer; else what its template calls the text."""
        if task is None:
            raise ValueError(f"it has no {TASK_NAME}, which says how it is asked: write one with `save_task`.")
        if task.kind.task_type is not self._kind:
            raise ValueError(f"its task is {task.kind}, which {_KINDS[self._kind]} doesn't answer.")
        if task.precision is not None and DTYPES[task.precision] is not self.model.dtype:
            _logger.warning("An adapter was trained on a base in %s; this one is %s.", task.precision, self.model.dtype)
        required, fields = task.template.required, task.template.fields
        if len(required) > 1 or (not required and len(fields) > 1):
            raise ValueError(f"its template reads the columns {listed(fields)}, and a request has one text.")
        return (required or fields)[0]

    def _encodes(self, row: str) -> bool:
        """Whether an adapter's vectors act where texts are encoded: in all but an encoder-decoder's decoder."""
        if self._kind is not TaskType.SEQ_2_SEQ_LM:
            return True
        sites = own_sites(self.model, [row])[row]
        if sites not in self._encoding:
            self._encoding[sites] = not decode_alone(self.model, sites)
        return self._encoding[sites]

    def _expect_labels(self, row: str, task: Task) -> None:
        """Refuse a head that chooses from other classes than its task says; it leaves the table again."""
        if task.kind.writes:
            return
        assert isinstance(self.table, AdapterTable)
        count = self.table.classes(row) or self.model.config.num_labels
        if count == len(task.labels):
            return
        self.table.drop(row)
        raise ValueError(f"its head chooses from {count} classes, and its task has {len(task.labels)} labels.")


def _named_below(folder: Path) -> dict[str, Path]:
    """The adapters below a folder, each by one name: a run's by the run's, and the best of its steps by none."""
    found = adapters_below(folder)
    return {
        name: path
        for name, path in found.items()
        if found.get(name.rpartition("/")[0]) != path
        and not (path.name == BEST_FOLDER and (path.parent / RECIPE_NAME).is_file())
    }


def _served(held: Held, base: str, aliases: tuple[str, ...]) -> Served:
    name, version = held
    if version.digest is None:
        return Served(name, None, None, aliases)
    return Served(name, version.digest, base, aliases, version.task.kind.value, version.task.labels)


def _may_pass(error: BaseException | None) -> bool:
    """Whether what an adapter could not be read for is of the machine and the moment, not of the adapter."""
    if isinstance(error, FileNotFoundError):
        return False
    return isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)


def _signature(path: Path) -> Signature | None:
    """What changes with the content of an adapter's files; None where there is no adapter."""
    found: list[tuple[int, int, int] | None] = []
    for name in _FILES:
        try:
            status = (path / name).stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append(None)
    return None if found[0] is None else tuple(found)


def _kind_of(model: Any) -> TaskType:
    """What tasks a model answers.

    Raises:
        ValueError: none.
    """
    if isinstance(model, GenerationMixin):
        return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    if type(model).__name__ not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        raise ValueError(
            f"A {type(model).__name__} answers nothing: expected a seq2seq or a causal model, or one with a head for "
            "classes of texts."
        )
    return TaskType.SEQ_CLS


def _task_of_base(model: Any) -> Task:
    """The base writes, as a chat where its tokenizer has a template for one; an encoder's chooses from nothing."""
    template = Template.of_column("text")
    if not isinstance(model, GenerationMixin):
        length = min(_BASE_LENGTH, most_positions(model) or _BASE_LENGTH)
        return Task(kind=TaskKind.SEQUENCE_CLASSIFICATION, template=template, max_length=length)
    kind = TaskKind.GENERATION if model.config.is_encoder_decoder else TaskKind.INSTRUCTIONS
    return Task(kind=kind, template=template, max_length=_BASE_LENGTH, max_new_tokens=_BASE_NEW_TOKENS)

"""Models that were converted once and are kept on disk: whole folders, told from damaged ones by their digests."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ia3.documents import read_json
from ia3.files import give_usual_rights

_logger = logging.getLogger(__name__)

# In each folder: its files by name, each with its SHA-256.
_CONTENTS = "contents.json"

# By name, where the cache can't be written.
_TEMPORARY: dict[str, Path] = {}


def cache_root() -> Path:
    """The folder of the cache: `IA3_CACHE`, or `ia3` in the user's cache folder.

    Raises:
        OSError: the user has no home folder.
    """
    own = os.environ.get("IA3_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ia3"
    except RuntimeError as error:
        raise OSError(f"{error} Set IA3_CACHE to a folder.") from error


def cached(name: str, write: Callable[[Path], None]) -> Path | None:
    """A folder of the cache, written first if it is not there whole.

    One process writes while others wait for it. A folder gets its name when it is whole; one that lacks a file, or
    whose files are no longer those that were written, is made anew.

    Args:
        name: the folder's name, one for each content.
        write: fills an empty folder.

    Returns:
        The folder, or None where it can't be written, which is said once.
    """
    try:
        folder = cache_root() / name
        if not _is_whole(folder):
            _install(folder, write)
    except OSError as error:
        _say_unwritable(os.environ.get("IA3_CACHE"), str(error))
        return None
    return folder


def temporary(name: str, write: Callable[[Path], None]) -> Path:
    """A folder that lasts as long as this process, written by its first call: for where there is no cache."""
    if name not in _TEMPORARY:
        folder = Path(tempfile.mkdtemp(prefix="ia3-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        write(folder)
        _TEMPORARY[name] = folder
    return _TEMPORARY[name]


def digest(path: Path) -> str:
    """The SHA-256 of a file, computed again when the file is another or was touched."""
    found = path.stat()
    return _digest(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write down what a folder holds, by which it is known to be whole from then on."""
    contents = {path.name: digest(path) for path in sorted(folder.iterdir())}
    (folder / _CONTENTS).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    try:
        contents = read_json(folder / _CONTENTS)
        return all(digest(folder / name) == expected for name, expected in contents.items())
    except (OSError, ValueError):
        return False


def _install(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then rename it: whole or not at all."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{folder.name}.lock"):
        if _is_whole(folder):  # another process was faster
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        _remove(unfinished)  # of a process that was killed
        try:
            unfinished.mkdir()
            _fill(unfinished, write)
            _remove(folder)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    try:
        write(folder)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error
    seal(folder)
    give_usual_rights(folder)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@functools.cache
def _say_unwritable(own: str | None, reason: str) -> None:
    _logger.warning(
        "The cache folder (IA3_CACHE%s) cannot be written, so what is converted will be converted again next time: %s",
        "" if own is None else f"={own}",
        reason,
    )

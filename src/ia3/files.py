"""Files on disk and on the hub: atomic writes, and reads that fall back to the hub."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ia3.errors import shorten

# What `huggingface_hub.hf_hub_download` takes besides the repository and the file.
HUB_ARGUMENTS = frozenset(
    {
        *("cache_dir", "force_download", "library_name", "library_version", "local_dir", "local_files_only"),
        *("proxies", "repo_type", "revision", "subfolder", "token", "user_agent"),
    }
)

BUNDLED = "bundled:"
"""How the names of models begin that come with a package instead of a hub."""

# How many bytes are read at once.
_PIECE = 1 << 20

_LONGEST_PATH = 4096

_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file, read without waiting and without more memory than was meant for it.

    Args:
        path: a file, or a link to one.
        limit: the most bytes that such a file may have.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it may not be read.
        ValueError: a folder, a pipe, a socket, a device, links in a circle, or more than `limit` bytes.
    """
    content = bytearray()
    with open_file(path, limit) as file, named_errors(path):
        # In pieces, for a file may grow meanwhile, and those of /proc say that they are empty.
        while piece := file.read(min(_PIECE, limit + 1 - len(content))):
            content += piece
    if len(content) > limit:
        raise _too_large(path, f"more than {limit:,}", limit)
    return bytes(content)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Let an error in reading an open file name it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_file(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of at most `limit` bytes for reading; see `read_file` for what is raised."""
    try:
        _check_regular(path, path.stat().st_mode)  # before it is opened, which some devices take for an order
        # A pipe put here since then would let `open` wait for its other end.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a link that leads back to itself: expected a file.") from error
        raise
    file = os.fdopen(number, "rb", buffering=0)
    try:
        status = os.fstat(number)
        _check_regular(path, status.st_mode)
        if status.st_size > limit:
            raise _too_large(path, f"{status.st_size:,}", limit)
    except BaseException:  # nobody else would close it
        file.close()
        raise
    return file


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "folder",
            stat.S_IFIFO: "pipe",
            stat.S_IFSOCK: "socket",
            stat.S_IFCHR: "device",
            stat.S_IFBLK: "device",
        }
        raise ValueError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'special file')}: expected a file.")


def _too_large(path: Path, size: str, limit: int) -> ValueError:
    return ValueError(f"{path} has {size} bytes, and such a file has {limit:,} at most: it is damaged, or another.")


# Temporary names: of what, by which process and thread.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-\d+")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, flush it to disk and rename it to `path`, which is on disk then.

    Raises:
        OSError: it can't be written, as on a full disk; it names the file, and what stood there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_written(path), replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, through: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write into, which is flushed to disk and renamed to `path` at the end; it goes if anything is raised.

    Args:
        path: what it becomes.
        through: its name until then, on the same disk; a temporary one beside `path` by default.
    """
    temporary = through or path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    file = temporary.open("xb" if through is None else "wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # nothing half written stays, an interrupt's neither
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Bring a folder's names to disk, so that a file that was renamed is there after a loss of power, too."""
    if os.name == "nt":  # which has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that flush no folders
            raise
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Write a line at the end of a file; an OSError names the file, whose end may be half a line then."""
    with naming_written(path), path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@contextmanager
def naming_written(path: Path) -> Iterator[None]:
    """Say which file could not be written, and what to do.

    Raises:
        OSError: instead of the system's, of the same class and number.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "see that it can be written")
        named = type(error)(f"{path} could not be written ({why}): {remedy}.")
        named.errno = error.errno
        raise named from error


_FULL = "make room on its disk"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "make room, since your share of its disk is used up",
    errno.EFBIG: "files may not be that large here, see `ulimit -f`",
    errno.EIO: "its disk fails, so take another one",
    errno.EROFS: "its disk can only be read, so take another one",
    errno.EISDIR: "a folder has its name, so move that elsewhere",
    errno.EACCES: "give yourself the right to write there",
    errno.EPERM: "give yourself the right to write there",
}


def remove_temporaries(folder: Path, own: Collection[str] = ()) -> None:
    """Remove what killed processes left half written in a folder, not below it.

    Args:
        folder: where to look.
        own: names of files that nobody else can be writing; of others the process must be gone.
    """
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and path.is_file() and (found["name"] in own or not _is_running(int(found["pid"]))):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where asking ends the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another's
        return True
    return True


def give_usual_rights(folder: Path) -> None:
    """Give a new folder and its files the rights that others made here get: those that the umask leaves.

    `tempfile` and safetensors write for their owner alone, so that nobody else could load what is shared.
    """
    probe = folder / f".rights.{os.getpid()}-{threading.get_ident()}"  # asking for the umask would change it
    probe.mkdir()
    try:
        for_folders = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.rmdir()
    for directory, _, names in os.walk(folder):
        for name in names:
            Path(directory, name).chmod(for_folders & 0o666)
        Path(directory).chmod(for_folders)


def fetch(
    source: str | Path, filename: str, *, subfolder: str | None = None, optional: bool = False, **hub: Any
) -> Path | None:
    """The path of `filename` in the directory `source`, or in the hub repository of that name.

    Args:
        source: a directory, or a hub repository where no such directory exists.
        filename: the file's name.
        subfolder: a folder inside `source`.
        optional: take a file that the cache lacks for missing where the hub can't be asked.
        hub: arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        A local path, or None where the directory or repository has no such file.

    Raises:
        FileNotFoundError: `source` is neither a directory nor a repository that can be reached.
        TypeError: an argument that the hub doesn't know, also where `source` is a directory.
    """
    unknown = sorted(set(hub) - HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"Unknown arguments {unknown}: expected some of {sorted(HUB_ARGUMENTS)}.")
    expect_path(source, "folder")
    directory = Path(source)
    if directory.is_dir():
        path = directory / (subfolder or "") / filename
        return path if path.is_file() else None
    return _fetch_from_hub(str(source), filename, subfolder, optional, **hub)


def _fetch_from_hub(repository: str, filename: str, subfolder: str | None, optional: bool, **hub: Any) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, filename, subfolder=subfolder, **hub))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repository} is neither a directory nor the name of a hub repository that you may read."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {hub.get('revision')!r}.") from error
    except EntryNotFoundError as error:
        if type(error).__name__ == "LocalEntryNotFoundError" and not optional:
            raise FileNotFoundError(
                f"{repository} is not a directory, and the hub could not be reached for {filename}: {error}"
            ) from error
        return None


def expect_path(name: str | Path, what: str) -> None:
    """Refuse a name that no file, folder or repository has, of which the system's own error would say it all again.

    Raises:
        FileNotFoundError: it is too long.
    """
    if len(str(name)) > _LONGEST_PATH:
        raise FileNotFoundError(
            f"There is no {what} {shorten(str(name))} of {len(str(name)):,} characters: expected a path, or a name on "
            "the hub."
        )


def expect_folder_or_hub(name: str, what: str, holds: str) -> None:
    """Refuse a name that can neither be a folder's nor a hub repository's.

    Args:
        name: the name.
        what: what it is of, for the error.
        holds: the file that makes a folder one.

    Raises:
        FileNotFoundError: there is no such folder, or it holds something else.
    """
    expect_path(name, what)
    path = Path(name)
    if path.is_file() or (path / holds).is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f"No {holds} in {name}: the folder holds no {what}.")
    near = nearest_beside(path, lambda each: (each / holds).is_file())
    if near or not (_ON_THE_HUB.fullmatch(name) or name.endswith(".gguf")):
        meant = f"Did you mean {near}?" if near else "Expected a folder, or a hub repository."
        raise FileNotFoundError(f"There is no {what} {shorten(name)}. {meant}")


def nearest_beside(path: Path, fits: Callable[[Path], bool]) -> Path | None:
    """What may have been meant by a path that isn't there: the nearest name in its folder, of those that fit."""
    beside = [each.name for each in path.parent.iterdir() if fits(each)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return path.with_name(near[0]) if near else None

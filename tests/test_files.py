"""Atomic writes, and reads that fall back to the hub."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from ia3.files import append_line, fetch, read_file, remove_temporaries, write_atomically


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_interruption_leaves_no_temporary(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []


def test_content_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "deep" / "file", []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((path.exists(), os.fstat(handle).st_size)))
    write_atomically(path, b"12345")
    assert seen[0] == (False, 5)
    assert [there for there, _ in seen] == [False, True]  # then its folder, which holds the name
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "make room on its disk"),
        (errno.EDQUOT, "your share of its disk is used up"),
        (errno.EIO, "its disk fails"),
    ],
)
@pytest.mark.parametrize("write", [lambda path: write_atomically(path, b"new"), lambda path: append_line(path, "new")])
def test_what_could_not_be_written_is_said(tmp_path, monkeypatch, number, says, write):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=rf"file\.bin could not be written \({os.strerror(number)}\): .*{says}") as caught:
        write(path)
    monkeypatch.undo()
    assert caught.value.errno == number
    assert path.read_bytes() == b"old"


def test_a_folder_in_the_place_of_a_file_is_said(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"file could not be written .*: a folder has its name, so move"):
        write_atomically(tmp_path / "file", b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_temporaries_of_the_dead_alone_are_removed(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, alive = int(gone.stdout), os.getpid()
    names = {f".a.{dead}-1", f".a.{alive}-1", f".own.{alive}-1", ".a.b-1", "a", f"a.{dead}-1"}
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f".folder.{dead}-1").mkdir()
    remove_temporaries(tmp_path, own={"own"})
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {f".a.{alive}-1", ".a.b-1", "a", f"a.{dead}-1", f".folder.{dead}-1"}


def test_rights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_fetch_from_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("x")
    assert fetch(tmp_path, "a", subfolder="sub") == tmp_path / "sub" / "a"
    assert fetch(str(tmp_path), "a") is None
    assert fetch(tmp_path, "sub") is None


def _answer(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_fetch_passes_its_arguments_to_the_hub(monkeypatch, tmp_path):
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(tmp_path / "a")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("some/repo", "a", subfolder="s", revision="r", token="t") == tmp_path / "a"
    assert calls == [(("some/repo", "a"), {"subfolder": "s", "revision": "r", "token": "t"})]


def _http_error(kind):
    return kind.__new__(kind, "404")  # made without the response that its constructor wants


@pytest.mark.parametrize("error", [EntryNotFoundError("404"), _http_error(RemoteEntryNotFoundError)])
def test_a_repository_without_the_file_has_none(monkeypatch, error):
    _answer(monkeypatch, error)
    assert fetch("some/repo", "a") is None


def test_an_unreachable_hub_is_said(monkeypatch):
    _answer(monkeypatch, LocalEntryNotFoundError("offline mode"))
    with pytest.raises(FileNotFoundError, match=r"some/repo is not a directory.*could not be reached for a.*offline"):
        fetch("some/repo", "a")


def test_offline_for_real():
    with pytest.raises(FileNotFoundError, match="nobody/nothing is not a directory"):
        fetch("nobody/nothing", "adapter_config.json")


def test_what_is_no_repository_name_is_said(monkeypatch):
    _answer(monkeypatch, HFValidationError("bad"))
    with pytest.raises(FileNotFoundError, match="neither a directory nor the name"):
        fetch("a/b/c/d", "a")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="neither a directory nor the name"):
        fetch("/no/such/directory", "a")


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_an_unknown_or_closed_repository_is_said(monkeypatch, kind):
    _answer(monkeypatch, _http_error(kind))
    with pytest.raises(FileNotFoundError, match=r"some/repo is neither .* that you may read"):
        fetch("some/repo", "a")


def test_an_optional_file_that_the_cache_lacks_is_missing_offline(monkeypatch):
    _answer(monkeypatch, LocalEntryNotFoundError("offline mode"))
    assert fetch("some/repo", "a", optional=True) is None


def test_an_unknown_argument_is_refused_also_for_a_directory(tmp_path):
    with pytest.raises(TypeError, match=r"Unknown arguments \['nonsense'\]"):
        fetch(tmp_path, "a", nonsense=1)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", 5) == read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match=r"file has 5 bytes, and such a file has 4 at most"):
        read_file(tmp_path / "file", 4)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_file(tmp_path / "missing", 4)


def test_a_file_that_says_less_than_it_holds_is_not_read_beyond_the_limit(tmp_path):
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc here")
    assert read_file(Path("/proc/self/status"), 1 << 20)
    with pytest.raises(ValueError, match="more than 8 bytes"):
        read_file(Path("/proc/self/status"), 8)


def test_an_error_in_reading_names_the_file():
    if not Path("/proc/self/mem").is_file():
        pytest.skip("no /proc here")
    with pytest.raises(OSError, match="/proc/self/mem"):
        read_file(Path("/proc/self/mem"), 10)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link that leads back to itself"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("thing")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    with pytest.raises(ValueError, match=f"thing is a {kind}: expected a file"):
        read_file(path, 10)

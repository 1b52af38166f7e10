"""Converted models on disk: whole folders or none, whoever writes, whatever became of them."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ia3 import cache
from ia3.cache import cache_root, cached, digest


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IA3_CACHE", str(tmp_path / "new" / "cache"))
    cache._say_unwritable.cache_clear()
    return tmp_path / "new" / "cache"


def fill(folder: Path) -> None:
    (folder / "a").write_text("new")
    (folder / "b").write_text("too")


def fail(folder: Path) -> None:
    raise AssertionError("there is nothing to write")


class TestRoot:
    def test_own_variable(self, root: Path) -> None:
        assert cache_root() == root

    def test_xdg(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("IA3_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_root() == tmp_path / "ia3"

    def test_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("IA3_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_root() == tmp_path / ".cache" / "ia3"

    def test_a_user_without_a_home_has_no_cache(self, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        def homeless(path: Path) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("IA3_CACHE")
        monkeypatch.setattr(Path, "expanduser", homeless)
        assert cached("model", fill) is None
        assert "Set IA3_CACHE to a folder" in caplog.text


def test_a_folder_is_written_once(root: Path) -> None:
    folder = cached("model", fill)
    assert folder == root / "model" == cached("model", fail)
    assert {path.name for path in root.iterdir()} == {"model", ".locks"}


def lose(folder: Path) -> None:
    (folder / "a").unlink()


def cut(folder: Path) -> None:
    (folder / "a").write_text("ne")


def turn_a_bit(folder: Path) -> None:
    """With size and time as they were."""
    before = (folder / "a").stat()
    (folder / "a").write_text("nev")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))


def lose_the_list(folder: Path) -> None:
    (folder / cache._CONTENTS).unlink()


def spoil_the_list(folder: Path) -> None:
    (folder / cache._CONTENTS).write_text("[1")


def list_something_else(folder: Path) -> None:
    (folder / cache._CONTENTS).write_text("[]")


@pytest.mark.parametrize("damage", [lose, cut, turn_a_bit, lose_the_list, spoil_the_list, list_something_else])
def test_a_damaged_folder_is_made_anew(damage, root: Path) -> None:
    folder = cached("model", fill)
    damage(folder)
    cached("model", fill)
    assert [(folder / name).read_text() for name in "ab"] == ["new", "too"]
    cached("model", fail)


def test_what_a_killed_process_left_is_no_model_and_goes(root: Path) -> None:
    (root / ".model.unfinished").mkdir(parents=True)
    (root / ".model.unfinished" / "a").write_text("ha")
    assert cached("model", fill) == root / "model"
    assert {path.name for path in root.iterdir()} == {"model", ".locks"}


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_what_stops_the_writing_leaves_nothing(error: BaseException, root: Path) -> None:
    def stop(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(type(error)):
        cached("model", stop)
    assert {path.name for path in root.iterdir()} == {".locks"}


def test_threads_write_once(root: Path) -> None:
    written = []

    def slowly(folder: Path) -> None:
        written.append(folder)
        time.sleep(0.2)
        fill(folder)

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: cached("model", slowly), range(3))) == {root / "model"}
    assert len(written) == 1


WRITER = """
import sys, time
from ia3.cache import cached
def write(folder):
    print("wrote", flush=True)
    (folder / "a").write_text("x" * 1000)
    time.sleep(0.5)
print((cached("model", write) / "a").read_text() == "x" * 1000)
"""


def test_processes_write_once(root: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate()[0] for process in running)
    assert said.split().count("True") == 3
    assert said.split().count("wrote") == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EROFS, "Read-only file system"), PermissionError(errno.EACCES, "denied"), SafetensorError("full")],
)
def test_a_cache_that_cannot_be_written_is_said_once(error: Exception, root: Path, caplog) -> None:
    def refuse(folder: Path) -> None:
        raise error

    with caplog.at_level(logging.WARNING):
        assert cached("model", refuse) is None
        assert cached("model", refuse) is None
    (said,) = caplog.messages
    assert said.startswith(f"The cache folder (IA3_CACHE={root}) cannot be written")
    assert str(error) in said
    assert {path.name for path in root.iterdir()} == {".locks"}


def test_a_file_in_the_caches_place(root: Path, caplog) -> None:
    root.parent.mkdir()
    root.write_text("a file")
    assert cached("model", fill) is None
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_cache_serves_what_it_has(root: Path) -> None:
    folder = cached("model", fill)
    root.chmod(0o555)
    try:
        assert cached("model", fail) == folder
        assert cached("other", fill) is None
    finally:
        root.chmod(0o755)


def test_a_temporary_folder_lasts_as_long_as_the_process() -> None:
    code = (
        "from ia3.cache import temporary\n"
        "write = lambda folder: (folder / 'a').write_text('x')\n"
        "folder = temporary('model', write)\n"
        "assert temporary('model', None) == folder and (folder / 'a').read_text() == 'x'\n"
        "print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    first, before = digest(path), path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = digest(path)
    assert first != second
    path.write_text("one")
    assert digest(path) == first


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_rights_follow_the_umask(umask: int, files: int, folders: int, root: Path) -> None:
    def for_the_owner_alone(folder: Path) -> None:
        fill(folder)
        (folder / "a").chmod(0o600)

    before = os.umask(umask)
    try:
        folder = cached("model", for_the_owner_alone)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {files}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, root, root.parent)} == {folders}

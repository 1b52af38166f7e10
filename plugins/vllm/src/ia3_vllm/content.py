"""Adapters by their content: what a name stands for is fixed when it is loaded, whatever happens to its files later.

vLLM tells adapters apart by name and path, in its caches of keys and values too, and reads a path again whenever the
adapter had to make room. A file replaced in place would meet the keys of the former one. So an adapter's two files are
copied into a folder named by their digest, and the engine is told of that folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path

from ia3.config import CONFIG_NAME
from ia3.files import write_atomically
from ia3.tensors import SAFETENSORS_NAME

_FILES = (SAFETENSORS_NAME, CONFIG_NAME)  # as they are written: the configuration makes a folder an adapter
_TRIES = 20


def is_ours(folder: str | Path) -> bool:
    """Whether a folder's adapter is for this package to read or to refuse: any that names a method other than LoRA."""
    try:
        content = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("peft_type") not in (None, "LORA")


class Contents:
    """Copies of adapters in a temporary folder of this process's, each in a folder named by its sha256."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ia3-vllm-"))
        weakref.finalize(self, _remove, self.root, os.getpid())

    def keep(self, folder: str | Path) -> Path:
        """Copy an adapter's two files and give the copy's folder; the same content is one copy.

        Raises:
            FileNotFoundError: one of the two is missing; a pickle is no substitute.
            ValueError: the files change faster than they can be read.
        """
        files = _read_at_once(Path(folder))
        digest = hashlib.sha256()
        for content in files:
            digest.update(len(content).to_bytes(8, "little") + content)
        copy = self.root / digest.hexdigest()
        for name, content in zip(_FILES, files, strict=True):
            if not (copy / name).is_file():
                write_atomically(copy / name, content)
        return copy


def number_of(copy: Path) -> int:
    """A copy's number for the engine, by its content; above all that vLLM counts up to."""
    return int(copy.name[:15], 16) | 1 << 60


def _read_at_once(folder: Path) -> list[bytes]:
    """Both files as they were at one moment: read again where one was replaced or written meanwhile."""
    for _ in range(_TRIES):
        before = [_state(folder / name) for name in _FILES]
        contents = [(folder / name).read_bytes() for name in _FILES]
        if [_state(folder / name) for name in _FILES] == before:
            return contents
        time.sleep(0.05)
    raise ValueError(f"The files in {folder} changed {_TRIES} times while they were read: load it again later.")


def _state(path: Path) -> tuple[int, ...]:
    if not path.is_file():
        raise FileNotFoundError(
            f"No {path.name} in {path.parent}: expected an (IA)³ adapter with {' and '.join(_FILES)}. A pickle "
            "(adapter_model.bin) is not served: load it with ia3 and save it again."
        )
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remove(root: Path, process: int) -> None:
    if os.getpid() == process:  # a fork must not take its parent's copies away
        shutil.rmtree(root, ignore_errors=True)

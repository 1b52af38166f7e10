"""Files of tensors from anywhere, read within limits; every tensor in them is what it says it is.

An adapter is small, and its file is refused before it is read or unpacked where it is larger than its model could
fill, or any adapter's should be where no model is at hand. Tensors are dense, of plain types, and as large as they say.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ia3.documents import parse_json
from ia3.errors import shorten
from ia3.files import named_errors, open_file, read_file
from ia3.sites import VECTORS

_MOST_OF_A_HEADER = 16 << 20
_LONGEST_KEY = 1000
_MOST_DIMENSIONS = 8
# Beside what a model holds: headers, and vectors of a model that is tiny.
_SPARE = 16 << 20

Tensors = dict[str, torch.Tensor]

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
_OF_VECTORS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Content:
    """A safetensors file, read once.

    Args:
        path: where it came from, for errors.
        header: its header with the length before it.
        data: the numbers of its tensors, one after the other.
    """

    path: Path
    header: bytes
    data: bytearray

    def tensors(self, most: int) -> Tensors:
        """The tensors in the order of the data, which they share.

        Args:
            most: how many there may be.

        Raises:
            ValueError: the header is damaged, or says something else than the data; a tensor of a type that adapters
                don't have.
        """
        tensors: Tensors = {}
        end = 0
        for key, dtype, shape, start, stop in _entries(self.header, self.path, most):
            if start != end or stop - start != prod(shape) * dtype.itemsize or stop > len(self.data):
                raise damaged(self.path, f"its header gives {shorten(key)} another place or size than it has")
            tensors[key] = _view(self.data, dtype, shape, start, stop)
            end = stop
        if end != len(self.data):
            raise damaged(self.path, f"its tensors take {end:,} bytes of {len(self.data):,}")
        return tensors


class Limits(NamedTuple):
    """The most that an adapter's file may hold."""

    bytes: int
    tensors: int


WITHOUT_MODEL = Limits(bytes=1 << 30, tensors=50_000)
"""Where no model tells."""


def limits_of(model: nn.Module) -> Limits:
    """For a model's adapter: a number in double precision for each of its own, a tensor for each module and its own."""
    own = [tensor.numel() for tensor in chain(model.parameters(), model.buffers())]
    return Limits(_SPARE + 8 * sum(own), len(own) + sum(1 for _ in model.modules()))


def read_content(path: Path, most_bytes: int) -> Content:
    """Read a safetensors file once.

    Args:
        path: the file.
        most_bytes: how many it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, larger than its limit, or shorter than it says.
    """
    with open_file(path, most_bytes) as file, named_errors(path):
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise damaged(path, "its header is longer than the file")
        if length > _MOST_OF_A_HEADER:
            raise damaged(path, f"its header has {length:,} bytes, and an adapter's {_MOST_OF_A_HEADER:,} at most")
        header, data = file.read(length), bytearray(size - 8 - length)
        if len(header) < length or _fill(file, data) < len(data):
            raise damaged(path, "it became shorter while it was read")
    return Content(path, prefix + header, data)


def read_tensors(path: Path, limits: Limits | None = None) -> Tensors:
    """Read a safetensors file, or a pickle that holds nothing but a dictionary of plain tensors, to the CPU.

    Args:
        path: the file; any other suffix than `.safetensors` is a pickle's.
        limits: what it may hold; by default `WITHOUT_MODEL`, of whose bytes a pickle may have a quarter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, too large or damaged, it holds more than tensors, or a tensor that no adapter has.
    """
    if path.suffix == ".safetensors":
        most = limits or WITHOUT_MODEL
        tensors = read_content(path, most.bytes).tensors(most.tensors)
    else:  # which is held three times while it is read
        tensors = _unpickled(path, limits or WITHOUT_MODEL._replace(bytes=WITHOUT_MODEL.bytes // 4))
    for key, tensor in tensors.items():
        reason = why_not_plain(tensor, is_vector=key.rpartition(".")[2] == VECTORS)
        if reason:
            raise ValueError(f"{path} is no adapter's file: {shorten(key)} {reason}.")
    return tensors


def read_pickle(path: Path, limits: Limits) -> Content:
    """A pickle of tensors as `read_content` gives a safetensors file."""
    from safetensors.torch import save

    content = save({key: tensor.contiguous().clone() for key, tensor in read_tensors(path, limits).items()})
    start = 8 + int.from_bytes(content[:8], "little")
    return Content(path, content[:start], bytearray(content[start:]))


def why_not_plain(tensor: torch.Tensor, *, is_vector: bool) -> str:
    """Why a tensor is none that an adapter may have, in words that follow its name; empty where it is one."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else "sparse"
        return f"is {kind}: expected a dense tensor"
    if tensor.is_meta:
        return "has no memory: expected numbers"
    if is_vector and tensor.dtype not in _OF_VECTORS:
        return f"is a vector of {_named(tensor.dtype)}: expected {', '.join(map(_named, _OF_VECTORS))}"
    if tensor.dtype not in _DTYPES.values():
        return f"is of {_named(tensor.dtype)}: expected {', '.join(map(_named, _DTYPES.values()))}"
    return ""


def damaged(path: Path, why: object) -> ValueError:
    """The error for a file that can't be read."""
    return ValueError(f"{path} is truncated or damaged ({shorten_text(why)}): copy or download it again.")


def shorten_text(text: object, most: int = 300) -> str:
    """The beginning of another library's message, on one line."""
    written = " ".join(str(text).split())
    return written if len(written) <= most else f"{written[: most - 1]}…"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill(file: Any, data: bytearray) -> int:
    """Read as much as there is room for; one call of the system reads 2 GB at most."""
    view, filled = memoryview(data), 0
    while filled < len(data) and (count := file.readinto(view[filled:])):
        filled += count
    return filled


def _entries(header: bytes, path: Path, most: int) -> list[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """What a header says of each tensor: name, type, shape, beginning and end in the data, in the data's order."""
    try:
        content = parse_json(header[8:], "its header")
    except ValueError as error:
        raise damaged(path, error) from error
    content.pop("__metadata__", None)
    if len(content) > most:
        raise _too_many(path, len(content), most)
    return sorted((_entry(key, about, path) for key, about in content.items()), key=lambda entry: entry[3:])


def _too_many(path: Path, count: int, most: int) -> ValueError:
    return ValueError(
        f"{path} holds {count:,} tensors, and such a file {most:,} at most: it was made for another base model, or is "
        "damaged."
    )


def _entry(key: str, about: Any, path: Path) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    fields: Mapping[str, Any] = about if isinstance(about, Mapping) else {}
    kind: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    place: Any = fields.get("data_offsets")
    if (
        not _are_sizes(shape, _MOST_DIMENSIONS)
        or not _are_sizes(place, 2)
        or len(place) != 2
        or len(key) > _LONGEST_KEY
    ):
        raise damaged(path, f"its header describes no tensor under {shorten(key)}")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(
            f"{path} is no adapter's file: {shorten(key)} is of the type {shorten(kind)}, expected one of "
            f"{', '.join(_DTYPES)}."
        )
    return key, _DTYPES[kind], tuple(shape), place[0], place[1]


def _are_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48 for size in value)
    )


def _view(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:
        data, start, stop = data[start:stop], 0, stop - start
    return torch.frombuffer(data, dtype=dtype, offset=start, count=(stop - start) // dtype.itemsize).view(shape)


# Pickles

# What a dictionary of plain tensors is made of.
_NEEDED = {
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"),
    *("torch Size", "torch device", "torch.storage UntypedStorage"),
    *(
        f"torch {kind}Storage"
        for kind in (
            *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
            "ComplexFloat",
        )
    ),
}
_MOST_OPERATIONS = 1_000_000
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
# The parts of a file from before torch 1.6: a magic number, a version, the system, the object.
_OLD_PARTS = 4


def _unpickled(path: Path, limits: Limits) -> Tensors:
    content = read_file(path, limits.bytes)
    try:
        _check_pickles(content, path, limits.bytes)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(str(_holds_more(path, ""))) from error
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # damaged bytes make torch.load raise almost anything
        raise damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise ValueError(f"{path} holds no dictionary of tensors: it isn't an adapter's file.")
    if len(loaded) > limits.tensors:
        raise _too_many(path, len(loaded), limits.tensors)
    tensors = {key: tensor.detach() for key, tensor in loaded.items()}
    unpacked = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if unpacked > limits.bytes or any(len(key) > _LONGEST_KEY for key in tensors):
        raise ValueError(
            f"{path} unpacks to {unpacked:,} bytes of tensors, and such a file has {limits.bytes:,} at most, with "
            f"names of {_LONGEST_KEY:,} characters: it is no adapter's file."
        )
    return tensors


class _Refused(Exception):  # noqa: N818  it ends up in a ValueError
    """A pickle that is refused before it is unpickled; the message is the whole one."""


def _check_pickles(content: bytes, path: Path, limit: int) -> None:
    """Refuse what unpacks to more than it has, and operations that no dictionary of tensors needs."""
    if not content.startswith(b"PK"):
        stream = io.BytesIO(content)
        for _ in range(_OLD_PARTS):
            if stream.tell() < len(content):
                _check_operations(stream, path)
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise _Refused(
                    f"{path} is packed: {shorten(entry.filename)} unpacks to {entry.file_size:,} bytes. torch packs "
                    "nothing, so it is no adapter's file."
                )
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > min(limit, len(content)):
            raise _Refused(f"{path} has {len(content):,} bytes and unpacks to {unpacked:,}: it is no adapter's file.")
        for entry in archive.infolist():
            if entry.filename.rpartition("/")[2] == "data.pkl":
                _check_operations(io.BytesIO(archive.read(entry)), path)


def _check_operations(stream: io.BytesIO, path: Path) -> None:
    """Look at a pickle's operations without carrying them out.

    A tuple that is used twice is none of a tensor's: nested in each other, they would take for ever as a key.
    """
    kept: dict[Any, bool] = {}
    former = ""
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        name = operation.name
        if number > _MOST_OPERATIONS:
            raise _Refused(f"{path} is a pickle of too many parts: ask its author for a safetensors file.")
        if name == "GLOBAL" and argument not in _NEEDED:
            raise _holds_more(path, f" ({shorten_text(argument, 80)})")
        if name.endswith("PUT"):
            kept[argument] = former in _TUPLES
        elif name == "MEMOIZE":
            kept[len(kept)] = former in _TUPLES
        elif name == "DUP" or (name.endswith("GET") and kept.get(argument, False)):
            raise _holds_more(path, " (tuples in tuples)")
        former = name


def _holds_more(path: Path, what: str) -> _Refused:
    return _Refused(
        f"{path} is a pickle that holds more than tensors{what}, which could run code: ask its author for a "
        "safetensors file."
    )

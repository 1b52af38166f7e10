"""Hostile weights of adapters, configurations of adapters, and bases."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import ADAPTER_DOORS, Attack, Ground
from safetensors.torch import load_file, save

TENSORS, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
_ROADS = ("from_pretrained", "register", "hotswap", "inspect")
"""One door of each road that an adapter's files take."""

Write = Callable[[Path], Any]
Change = Callable[[dict[str, torch.Tensor], str], None]


def attacks() -> Iterator[Attack]:
    """All of them."""
    for name, write in SPECIAL.items():
        for file in (TENSORS, CONFIG):
            yield Attack("no file", f"{file} is {name}", _instead_of(file, write), ADAPTER_DOORS)
        yield Attack("no file", f"{PICKLE} is {name}", _pickle_instead(write), _ROADS)
    for name, content in HEADERS.items():
        doors = ADAPTER_DOORS if name in ("truncated", "half of it") else _ROADS
        yield Attack("safetensors", name, _instead_of(TENSORS, partial(_write_header, content)), doors)
    for name, change in TENSORS_CHANGED.items():
        yield Attack("safetensors' tensors", name, partial(_change_tensors, change), _ROADS)
    for kind in ODD_TYPES:
        yield Attack("safetensors' types", kind, partial(_retype, kind), ADAPTER_DOORS)
    for name, make in PICKLES.items():
        yield Attack("pickles", name, _pickle_instead(partial(_call, make)), (*_ROADS, "auto_model", "merge"))
    for name, changes in CONFIGURATIONS.items():
        yield Attack("configurations", name, partial(_reconfigure, changes), ADAPTER_DOORS if "one" in name else _ROADS)


def _call(make: Callable[[Path], bytes], path: Path) -> None:
    path.write_bytes(make(path))


def _copy_honest(folder: Path, ground: Ground) -> None:
    shutil.copytree(ground.adapter, folder, dirs_exist_ok=True)


def _instead_of(file: str, write: Write) -> Callable[[Path, Ground], None]:
    """An honest adapter with something else in the place of one of its files."""

    def build(folder: Path, ground: Ground) -> None:
        _copy_honest(folder, ground)
        (folder / file).unlink()
        write(folder / file)

    return build


def _pickle_instead(write: Write) -> Callable[[Path, Ground], None]:
    """An honest adapter with something else as `adapter_model.bin` in the place of its safetensors file."""

    def build(folder: Path, ground: Ground) -> None:
        _copy_honest(folder, ground)
        (folder / TENSORS).unlink()
        write(folder / PICKLE)

    return build


def _sparse(path: Path, size: int = 8 << 30, beginning: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(size)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _link_circle(path: Path) -> None:
    path.symlink_to("second")
    path.with_name("second").symlink_to(path.name)


SPECIAL: dict[str, Write] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "empty": Path.touch,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "chance without end": lambda path: path.symlink_to("/dev/urandom"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a file of the system": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "links in a circle": _link_circle,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "eight GB of nothing": _sparse,
    "one byte": lambda path: path.write_bytes(b"x"),
    "random bytes": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "unreadable text": lambda path: path.write_bytes(b"\xff\xfe{\x00}\x00"),
}


# Headers of safetensors files


def _header(content: Any, data: bytes = b"", length: int | None = None) -> Write:
    def write(path: Path) -> None:
        made = content() if callable(content) else content
        text = made if isinstance(made, bytes) else json.dumps(made).encode()
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return write


def _write_header(content: Write, path: Path) -> None:
    content(path)


def _tensor(
    key: str = "base_model.model.encoder.block.0.layer.0.SelfAttention.k.ia3_l", **changed: Any
) -> dict[str, Any]:
    return {key: {"dtype": "F32", "shape": [32, 1], "data_offsets": [0, 128], **changed}}


def _many(count: int) -> dict[str, Any]:
    return {f"base_model.model.encoder.block.{n}.k.ia3_l": _tensor()[next(iter(_tensor()))] for n in range(count)}


def _many_empty(count: int) -> dict[str, Any]:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {f"base_model.model.encoder.block.{number}.k.ia3_l": empty for number in range(count)}


def _cut(share: float) -> Write:
    def write(path: Path) -> None:
        whole = save({key: torch.ones(32, 1) for key in _many(16)})
        path.write_bytes(whole[: int(len(whole) * share)])

    return write


_DEEP = b"[" * 100_000 + b"]" * 100_000
HEADERS: dict[str, Write] = {
    "truncated": _cut(0.99),
    "half of it": _cut(0.5),
    "a tenth of it": _cut(0.1),
    "a length of 2**63": _header({}, length=1 << 63),
    "a length of 2**64 - 1": _header({}, length=(1 << 64) - 1),
    "a length of 0": _header(b"", length=0),
    "a header alone": _header(_tensor()),
    "no tensors": _header({}),
    "no JSON": _header(b"{" * 50),
    "a list": _header([]),
    "null": _header(b"null"),
    "a number": _header(b"1e999"),
    "deep lists": _header(_DEEP),
    "deep lists in a tensor": _header(b'{"k.ia3_l":' + _DEEP + b"}"),
    "no UTF-8": _header(b'{"\xff": 1}'),
    "half a character": _header(b'{"\\ud800": 1}'),
    "a key twice": _header(json.dumps(_tensor())[:-1].encode() + b"," + json.dumps(_tensor())[1:].encode(), bytes(128)),
    "100 MB of spaces": _header(lambda: b"{" + b" " * (100 << 20) + b"}"),
    "200 MB of spaces": _header(lambda: b"{" + b" " * (200 << 20) + b"}"),
    "a million tensors": _header(lambda: _many(1_000_000), bytes(128)),
    "a million empty tensors": _header(lambda: _many_empty(1_000_000)),
    "a hundred thousand empty tensors": _header(lambda: _many_empty(99_000)),
    "all tensors in one place": _header(_many(1000), bytes(128)),
    "a key of 10 MB": _header(lambda: _tensor("a" * (10 << 20) + ".ia3_l"), bytes(128)),
    "a key of dots": _header(_tensor("." * 100_000 + "ia3_l"), bytes(128)),
    "an empty key": _header(_tensor(""), bytes(128)),
    "a tensor that is a number": _header({"k.ia3_l": 1}),
    "a tensor that is null": _header({"k.ia3_l": None}),
    "a tensor without fields": _header({"k.ia3_l": {}}),
    "metadata alone": _header({"__metadata__": {"format": "pt"}}),
    "metadata of 20 MB": _header(lambda: {"__metadata__": {"format": "a" * (20 << 20)}}),
    "metadata that is a list": _header({"__metadata__": [1], **_tensor()}, bytes(128)),
    "an endless number": _header(
        b'{"k.ia3_l": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 1]}}'
    ),
    **{
        f"{field} is {json.dumps(value)[:40]}": _header(_tensor(**{field: value}), bytes(128))
        for field, values in {
            "dtype": (None, 1, "F31", "", [], "F32 ", "f32", "F64", "I32", "F4", "F8_E8M0", "X" * 10_000),
            "shape": (
                *(None, 1, "32", [], [-32, -1], [32.0, 1], [True], ["32"], [[32]], [32], [1, 32], [2, 16], [64, 1]),
                *([1 << 62, 1 << 62], [1 << 64], [1 << 31, 1 << 31, 0], [32] + [1] * 100, [32] + [1] * 10_000),
            ),
            "data_offsets": (
                *(None, 1, [], [0], [0, 128, 256], [128, 0], [-128, 0], [0, -128], [0, 1 << 62], [1, 129], [0, 127]),
                *([0.0, 128.0], ["0", "128"], [0, 1 << 64], [1 << 63, (1 << 63) + 128], [64, 192], [0, 0], [True, 128]),
            ),
        }.items()
        for value in values
    },
}


# Tensors that are not what the model has


def _change_tensors(change: Change, folder: Path, ground: Ground) -> None:
    _copy_honest(folder, ground)
    tensors = load_file(folder / TENSORS)
    change(tensors, next(iter(tensors)))
    (folder / TENSORS).write_bytes(save(tensors))


def _give(value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor], first: str) -> None:
        tensors[first] = value(tensors[first])

    return change


def _add(key: str, value: torch.Tensor) -> Change:
    def change(tensors: dict[str, torch.Tensor], first: str) -> None:
        tensors[key] = value

    return change


def _without_first(tensors: dict[str, torch.Tensor], first: str) -> None:
    del tensors[first]


def _twice(tensors: dict[str, torch.Tensor], first: str) -> None:
    tensors[first.removeprefix("base_model.model.")] = tensors[first].clone()


def _all_renamed(tensors: dict[str, torch.Tensor], first: str) -> None:
    for key in list(tensors):
        tensors[key.replace("encoder", "decoder_of_another")] = tensors.pop(key)


TENSORS_CHANGED: dict[str, Change] = {
    "a NaN": _give(lambda t: torch.full_like(t, torch.nan)),
    "infinity": _give(lambda t: torch.full_like(t, torch.inf)),
    "double precision that no float holds": _give(lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
    "no numbers": _give(lambda t: t[:0]),
    "no dimension": _give(lambda t: t.sum()),
    "one dimension": _give(lambda t: t.flatten()),
    "the other side": _give(lambda t: t.T.contiguous()),
    "five dimensions": _give(lambda t: t.reshape(1, 1, 1, *t.shape)),
    "twice as long": _give(lambda t: torch.cat([t, t])),
    "a vector of 100 MB": _give(lambda t: torch.ones(25 << 20, 1)),
    "one too few": _without_first,
    "one twice": _twice,
    "all of another model": _all_renamed,
    "the base's weight": _add("base_model.model.shared.weight", torch.ones(15, 32)),
    "a head that isn't there": _add("base_model.model.classifier.weight", torch.ones(3, 32)),
    "a vector nowhere": _add("base_model.model.nowhere.ia3_l", torch.ones(32, 1)),
    "a vector at the root": _add("ia3_l", torch.ones(32, 1)),
    "the prefix alone": _add("base_model.model.", torch.ones(32, 1)),
    "an adapter's own name": _add("base_model.model.k.ia3_l.default", torch.ones(32, 1)),
    "a key with line breaks": _add("base_model.model.\n\n\n\x1b[31m.ia3_l", torch.ones(32, 1)),
    "ten thousand vectors": lambda tensors, first: tensors.update(
        {f"base_model.model.encoder.block.{n}.SelfAttention.k.ia3_l": torch.ones(1, 1) for n in range(10_000)}
    ),
}

ODD_TYPES = ("BOOL", "I8", "U8", "I16", "I32", "I64", "U16", "U32", "U64", "C64", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3")


def _retype(kind: str, folder: Path, ground: Ground) -> None:
    """The first vector in another type, its bytes those of floats where it has as many."""
    _copy_honest(folder, ground)
    tensors = load_file(folder / TENSORS)
    content, entries, data = b"", {}, bytearray()
    for place, (key, tensor) in enumerate(tensors.items()):
        size = {"8": 1, "6": 2, "2": 4, "4": 8}.get(kind.split("_")[0][-1], 1) if kind != "BOOL" else 1
        size = 1 if kind.startswith(("F8", "F4", "F6")) else size
        raw = (
            tensor.numpy().tobytes()
            if place
            else tensor.numpy().tobytes()[: tensor.numel() * size].ljust(tensor.numel() * size, b"\0")
        )
        about = {"dtype": "F32" if place else kind, "shape": list(tensor.shape)}
        entries[key] = {**about, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    content = json.dumps(entries).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(content)) + content + data)


# Pickles


def _honest_tensors(path: Path) -> dict[str, torch.Tensor]:
    import tiny_seq2seq
    from ia3 import get_peft_model_state_dict

    return get_peft_model_state_dict(tiny_seq2seq.adapted())


def _saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def _with_first(change: Callable[[torch.Tensor], Any], **how: Any) -> Callable[[Path], bytes]:
    """The honest tensors as a pickle, but for the first."""

    def make(path: Path) -> bytes:
        tensors: dict[Any, Any] = _honest_tensors(path)
        first = next(iter(tensors))
        tensors[first] = change(tensors[first])
        return _saved(tensors, **how)

    return make


class _Runs:
    """Code that a pickle runs."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def _canary(path: Path) -> Path:
    return path.parent.parent / "canary"


def _packed(path: Path) -> bytes:
    """A pickle whose numbers are zeros, packed: some MB that unpack to 1.5 GB."""
    buffer = io.BytesIO()
    whole = _saved({"base_model.model.k.ia3_l": torch.zeros(4, 1)})
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if "/data/" in entry.filename:
                with new.open(entry.filename, "w") as file:
                    for _ in range(1500):
                        file.write(bytes(1 << 20))
            else:
                new.writestr(entry.filename, content)
    return buffer.getvalue()


def _overlapping(path: Path) -> bytes:
    """A directory that lists one entry of a megabyte ten thousand times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(1 << 20))
        for number in range(10_000):
            again = zipfile.ZipInfo(f"archive/data/{number + 1}")
            again.file_size = again.compress_size = 1 << 20
            again.header_offset = archive.infolist()[2].header_offset
            again.CRC = archive.infolist()[2].CRC
            archive.filelist.append(again)
    return buffer.getvalue()


def _tuples_of_tuples(path: Path) -> bytes:
    """A key of tuples in tuples: its hash takes 2 ** 60 steps, and it some hundred bytes."""
    body = b"\x80\x02})q\x00"
    for number in range(60):
        body += b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) + b"0"
    body += b"h\x3cK\x01s."
    return _rezipped(body)


def _rezipped(body: bytes) -> bytes:
    """A torch file with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved({}))) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = body if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
    return buffer.getvalue()


def _calls(module: str, name: str, argument: bytes) -> Callable[[Path], bytes]:
    """A pickle of one key, whose value is a call."""
    body = b"\x80\x02}X\x01\x00\x00\x00kc" + f"{module}\n{name}\n".encode() + argument + b"\x85Rs."
    return lambda path: _rezipped(body)


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "honest": lambda path: _saved(_honest_tensors(path)),
    "honest and old": lambda path: _saved(_honest_tensors(path), _use_new_zipfile_serialization=False),
    "honest parameters": _with_first(torch.nn.Parameter),
    "code": lambda path: pickle.dumps(_Runs(_canary(path))),
    "code in protocol 2": lambda path: pickle.dumps(_Runs(_canary(path)), protocol=2),
    "code in a torch file": lambda path: _saved({"k.ia3_l": _Runs(_canary(path))}),
    "code in an old torch file": lambda path: _saved(
        {"k.ia3_l": _Runs(_canary(path))}, _use_new_zipfile_serialization=False
    ),
    "a module": lambda path: _saved(torch.nn.Linear(2, 2)),
    "packed zeros": _packed,
    "one entry many times": _overlapping,
    "tuples of tuples": _tuples_of_tuples,
    "bytes of 100 GB": _calls("__builtin__", "bytearray", b"\x8a\x05\x00\x00\x00\x00\x19"),
    "a call of eval": _calls("__builtin__", "eval", b"X\x03\x00\x00\x001+1"),
    "a million operations": lambda path: _rezipped(b"\x80\x02}" + b"K\x010" * 2_000_000 + b"."),
    "deep lists": lambda path: _rezipped(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "a huge number": lambda path: _rezipped(
        b"\x80\x02}X\x01\x00\x00\x00k\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b"s."
    ),
    "no end": lambda path: _rezipped(b"\x80\x02}"),
    "an expanded tensor": _with_first(lambda t: torch.ones(1).expand(1 << 40)),
    "an expanded vector": _with_first(lambda t: torch.ones(1, 1).expand(*t.shape)),
    "a transposed tensor": _with_first(lambda t: torch.ones(*t.shape[::-1]).T),
    "tensors of one memory": lambda path: _saved(dict.fromkeys(_honest_tensors(path), torch.ones(32, 1))),
    "a tensor of 100 MB a hundred times": lambda path: _saved(
        {f"{number}.ia3_l": each for each in [torch.ones(1 << 20)] for number in range(10_000)}
    ),
    "a sparse tensor": _with_first(lambda t: t.to_sparse()),
    "a compressed sparse tensor": _with_first(lambda t: t.to_sparse_csr()),
    "a tensor without memory": _with_first(lambda t: t.to("meta")),
    "a quantised tensor": _with_first(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "a nested tensor": _with_first(lambda t: torch.nested.nested_tensor([t, t])),
    "a conjugate": _with_first(lambda t: torch.view_as_real(t.to(torch.complex64).conj_physical())[..., 0]),
    "complex numbers": _with_first(lambda t: t.to(torch.complex64)),
    "whole numbers": _with_first(lambda t: t.to(torch.int32)),
    "truth": _with_first(lambda t: t.bool()),
    "float8": _with_first(lambda t: t.to(torch.float8_e4m3fn)),
    "a number": _with_first(lambda t: 1.0),
    "nothing": _with_first(lambda t: None),
    "a dictionary": _with_first(lambda t: {"weight": t}),
    "a list of tensors": lambda path: _saved([*_honest_tensors(path).values()]),
    "one tensor": lambda path: _saved(torch.ones(3)),
    "none": lambda path: _saved(None),
    "no tensors": lambda path: _saved({}),
    "an ordered dictionary": lambda path: _saved(OrderedDict(_honest_tensors(path))),
    "keys that are numbers": lambda path: _saved(dict(enumerate(_honest_tensors(path).values()))),
    "a key of 10 MB": lambda path: _saved({"a" * (10 << 20) + ".ia3_l": torch.ones(1)}),
    "half of it": lambda path: (whole := _saved(_honest_tensors(path)))[: len(whole) // 2],
    "half of an old one": lambda path: (whole := _saved(_honest_tensors(path), _use_new_zipfile_serialization=False))[
        : len(whole) // 2
    ],
    "an archive without a pickle": lambda path: _zip({"archive/version": b"3\n"}),
    "an empty archive": lambda path: _zip({}),
    "an archive of text": lambda path: _zip({"readme.txt": b"hello"}),
    "a script": lambda path: _zip({"archive/constants.pkl": pickle.dumps((), 2), "archive/data.pkl": b"\x80\x02}."}),
    "paths that lead out": lambda path: _zip({"../../../canary": b"x", "archive/data.pkl": b"\x80\x02}."}),
    "a safetensors file": lambda path: save(_honest_tensors(path)),
    "an array of numpy": lambda path: (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"
    ),
}


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# Configurations of adapters


def _reconfigure(changes: dict[str, Any], folder: Path, ground: Ground) -> None:
    _copy_honest(folder, ground)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


_SLOW = (
    *(r"(.|.)*x", r"(.*?)*?x", r"(?=(?:.|.)*x\Z).*", r"(.+)(.+)(.+)(.+)(.+)(.+)\1\2\3\4\5\6x", r"((?:.|\.)+)+!"),
    *(
        r"(?:(?:.{0,9999}){0,9999}){0,9999}x",
        ".*" * 3000 + "x",
        r"(\w+|\w+\.)*\.nothing",
        r"(?i)(.|.)*X",
        "(a|b|.|..)*#",
    ),
    *("(?:(?:a{9999}){9999}){9999}", "x{4294967294}", "(" * 5000 + "a" + ")" * 5000, "a|" * 60_000, "(?:a{999}){999}"),
    *(
        "[" * 1000,
        "(?P<n>a)(?P=n)(?(n)b|c" + ")" * 3,
        "\\",
        "(?x) [\n (?:a{999}){999} # ]",
        "(?i)" + r"[\u0100-\uffff]" * 4000,
    ),
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{
        f"{field} is {pattern[:24]}, {number}": {
            field: pattern,
            **({"feedforward_modules": ".*wo"} if field == "target_modules" else {}),
        }
        for field in ("target_modules", "feedforward_modules", "exclude_modules")
        for number, pattern in enumerate(_SLOW)
    },
    **{
        f"layers_pattern is {pattern[:24]}": {
            **{"layers_pattern": [pattern], "layers_to_transform": [0, 1]},
            **{"target_modules": ["k", "v"], "feedforward_modules": []},
        }
        for pattern in _SLOW[:8]
    },
    "one expression without an end": {"target_modules": _SLOW[0], "feedforward_modules": ".*wo"},
    "a hundred thousand layers": {"layers_to_transform": list(range(100_000)), "target_modules": ["k"]},
    "a million names": {"target_modules": [str(number) for number in range(1_000_000)], "feedforward_modules": []},
    "a hundred thousand names twice": {
        **{"target_modules": [str(number) for number in range(100_000)]},
        **{"feedforward_modules": [str(number) for number in range(100_000)]},
    },
    "a hundred thousand modules in full": {"modules_to_save": [str(number) for number in range(100_000)]},
    "modules in full without a name": {"modules_to_save": [""]},
    "everything is excluded": {"exclude_modules": ".*"},
    "a class of os": {"task_type": None, "auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
    "a base that is one adapter itself": {"base_model_name_or_path": "."},
    "a base that leads out": {"base_model_name_or_path": "../../../../etc"},
    "a base that is a device": {"base_model_name_or_path": "/dev/zero"},
    "a base with a line break": {"base_model_name_or_path": "a\nb\x1b[31m"},
    "a base of a long name": {"base_model_name_or_path": "a" * 5000},
}

"""Files of tensors from anywhere: read within limits, every tensor what it says it is."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ia3.weights import WITHOUT_MODEL, Limits, limits_of, read_content, read_pickle, read_tensors, why_not_plain

KEY = "base_model.model.block.0.k.ia3_l"


def _write(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _one(**changed):
    return {KEY: {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8], **changed}}


def test_tensors_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        KEY: torch.randn(5, 1),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    found, expected = read_tensors(path), load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    save(found)  # which refuses tensors that share memory


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_offsets": [0, 4]}, "another place or size"),
        ({"data_offsets": [8, 16]}, "another place or size"),
        ({"data_offsets": [0, 1 << 40], "shape": [1 << 38]}, "another place or size"),
        ({"shape": [2, -1]}, "describes no tensor"),
        ({"shape": [True]}, "describes no tensor"),
        ({"shape": None}, "describes no tensor"),
        ({"dtype": "F8_E4M3"}, "is of the type 'F8_E4M3'"),
        ({"dtype": "I32"}, "is a vector of int32"),
        ({"dtype": ["F32"]}, "is of the type"),
    ],
)
def test_a_header_that_says_something_else_is_refused(tmp_path, changed, said):
    path = _write(tmp_path / "a.safetensors", _one(**changed), bytes(8))
    with pytest.raises(ValueError, match=rf"a\.safetensors .*{said}"):
        read_tensors(path)


def test_two_tensors_in_one_place_and_bytes_of_none_are_refused(tmp_path):
    both = {**_one(), "other": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for header, data in ((both, bytes(8)), (_one(), bytes(12)), ({}, bytes(1))):
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_tensors(_write(tmp_path / "a.safetensors", header, data))


def test_limits_hold_before_anything_is_read(tmp_path):
    path = _write(tmp_path / "a.safetensors", _one(), bytes(8))
    with pytest.raises(ValueError, match="bytes, and such a file has 20 at most"):
        read_content(path, 20)
    with pytest.raises(ValueError, match="holds 1 tensors, and such a file 0 at most"):
        read_tensors(path, Limits(1 << 20, 0))
    with path.open("r+b") as file:
        file.truncate(WITHOUT_MODEL.bytes + 1)
    with pytest.raises(ValueError, match="such a file has"):
        read_tensors(path)
    path.write_bytes(struct.pack("<Q", 17 << 20) + bytes(18 << 20))
    with pytest.raises(ValueError, match="its header has 17,825,792 bytes"):
        read_tensors(path)


def test_a_model_tells_how_much_its_adapter_may_hold(zoo):
    model = zoo()
    limits = limits_of(model)
    own = sum(parameter.numel() for parameter in model.parameters())
    assert limits.bytes == (16 << 20) + 8 * own
    assert limits.tensors == len([*model.parameters()]) + len([*model.modules()])


def test_a_pickle_of_plain_tensors_is_read(tmp_path):
    tensors = {KEY: torch.randn(5, 1), "other": torch.nn.Parameter(torch.randn(2, 3).T)}
    (tmp_path / "a.bin").write_bytes(_saved(tensors))
    found = read_tensors(tmp_path / "a.bin")
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    content = read_pickle(tmp_path / "a.bin", WITHOUT_MODEL)
    assert all(torch.equal(each, tensors[key]) for key, each in content.tensors(10).items())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(1).expand(1 << 40), "unpacks to 4,398,046,511,104 bytes"),
        (torch.ones(3).to_sparse(), "holds more than tensors"),
        (torch.ones(3, device="meta"), "holds more than tensors|has no memory"),
        (torch.ones(3).to(torch.complex64), "is a vector of complex64"),
        (torch.ones(3).bool(), "is a vector of bool"),
        (torch.ones(3).to(torch.float8_e4m3fn), "float8|holds more than tensors"),
        (1.0, "no dictionary of tensors"),
    ],
    ids=["expanded", "sparse", "meta", "complex", "bool", "float8", "number"],
)
def test_another_value_than_a_plain_tensor_in_a_pickle_is_refused(tmp_path, value, said):
    (tmp_path / "a.bin").write_bytes(_saved({KEY: value}))
    with pytest.raises(ValueError, match=rf"a\.bin.*({said})"):
        read_tensors(tmp_path / "a.bin")


def _rezipped(pickled: bytes, how: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved({}))) as old, zipfile.ZipFile(buffer, "w", how) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return buffer.getvalue()


def test_a_packed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    (tmp_path / "a.bin").write_bytes(_rezipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="is packed"):
        read_tensors(tmp_path / "a.bin")


@pytest.mark.timeout(20)
def test_a_key_whose_hash_takes_for_ever_is_refused(tmp_path):
    body = b"\x80\x02})q\x00"
    for number in range(60):
        body += b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) + b"0"
    (tmp_path / "a.bin").write_bytes(_rezipped(body + b"h\x3cK\x01s."))
    with pytest.raises(ValueError, match="tuples in tuples"):
        read_tensors(tmp_path / "a.bin")


def test_tensors_in_memory_are_judged_alike():
    assert why_not_plain(torch.ones(2), is_vector=True) == ""
    assert why_not_plain(torch.ones(2).int(), is_vector=False) == ""
    assert "sparse" in why_not_plain(torch.ones(2).to_sparse(), is_vector=False)
    assert "no memory" in why_not_plain(torch.ones(2, device="meta"), is_vector=True)
    assert "int32" in why_not_plain(torch.ones(2).int(), is_vector=True)

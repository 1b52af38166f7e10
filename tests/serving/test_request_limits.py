"""Keys, and what a body may hold."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from ia3.serving.limits import Keys

LONG = "0123456789abcdef"


class TestKeys:
    def test_which_one_it_is(self) -> None:
        keys = Keys([LONG, f"{LONG}2"])
        assert keys.find(f"Bearer {LONG}".encode()) == 0
        assert keys.find(f"bearer  {LONG}2 ".encode()) == 1
        assert keys.find(None) is None
        assert not Keys()

    def test_every_key_is_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By their digests, in the time that each takes, whether one fits or not."""
        compared: list[bytes] = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append(other)
            return one == other

        monkeypatch.setattr(hmac, "compare_digest", compare)
        keys = Keys([LONG, f"{LONG}2", f"{LONG}3"])
        for key in (LONG, "wrong", f"{LONG}3"):
            compared.clear()
            keys.find(f"Bearer {key}".encode())
            assert compared == [hashlib.sha256(key.encode()).digest()] * 3

    @pytest.mark.parametrize("key", ["short", "", "ä" * 20, "with a blank in it", "a\tb" * 10])
    def test_keys_that_are_none(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"Key 2 can't be taken: expected 16 or more") as found:
            Keys([LONG, key])
        assert not key or key not in str(found.value)

    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"# the shop's\n{LONG}\n\n  {LONG}2  \r\n")
        keys = Keys.read(file, "NOT_SET")
        assert [keys.find(f"Bearer {each}".encode()) for each in (LONG, f"{LONG}2", "# the shop's")] == [0, 1, None]

    def test_a_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_KEYS", f"{LONG} {LONG}2")
        assert Keys.read(None, "SOME_KEYS").find(f"Bearer {LONG}2".encode()) == 1
        assert not Keys.read(None, "NO_KEYS")

    @pytest.mark.parametrize(("content", "said"), [(b"# none\n", "holds no key"), (b"\xff\xfe", "is not UTF-8")])
    def test_files_that_hold_none(self, tmp_path: Path, content: bytes, said: str) -> None:
        (tmp_path / "keys").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            Keys.read(tmp_path / "keys", "NOT_SET")

from __future__ import annotations

from pathlib import Path

import pytest

from ia3 import IA3Config, get_peft_model
from ia3.publishing import public_name


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("bundled:flan-t5-small-titler", "bundled:flan-t5-small-titler"),
        ("google/flan-t5-small", "google/flan-t5-small"),
        ("t5-small", "t5-small"),
        ("/home/ada/models/mine", "mine"),
        ("/home/ada/models/mine/", "mine"),
        ("./mine", "mine"),
        ("../models/mine", "mine"),
        ("~/mine", "mine"),
        (r"C:\Users\ada\mine", "mine"),
        ("/c/hub/models--google--t5-small/snapshots/0123abcd", "google/t5-small"),
    ],
)
def test_names_for_others(base: str, name: str) -> None:
    assert public_name(base) == name


def test_a_folder_that_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ada" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("ada/mine") == "mine"


def test_python_publishes_no_path_either(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes] = {}

    class Api:
        def __init__(self, token: object) -> None:
            pass

        def create_repo(self, repo_id: str, **how: object) -> object:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: str, **how: object) -> None:
            found = (path for path in Path(folder_path).rglob("*") if path.is_file())
            files.update({path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    base = tiny("t5")
    base.name_or_path = str(tmp_path / "mine")
    model = get_peft_model(base, IA3Config())
    model.add_adapter("second", IA3Config())
    with pytest.warns(UserWarning, match=f"published as mine, not as {tmp_path}"):
        model.push_to_hub("me/x")
    assert "second/adapter_config.json" in files
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    model.save_pretrained(tmp_path / "saved")
    assert IA3Config.from_pretrained(tmp_path / "saved").base_model_name_or_path == str(tmp_path / "mine")

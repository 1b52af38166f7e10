from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from running import call, message, succeed

from ia3.inference.loading import load_adapter


class Hub:
    """Takes the place of `HfApi` and remembers what it was asked."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.files: dict[str, bytes] = {}
        self.url: str | None = "https://hub.example/me/reviews"

    def create_repo(self, repo_id: str, **how: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append((repo_id, how))
        return SimpleNamespace(repo_id=f"me/{repo_id.split('/')[-1]}")

    def upload_folder(self, **how: Any) -> Any:
        self.calls.append((how.pop("repo_id"), how))
        self.files = {path.name: path.read_bytes() for path in Path(how["folder_path"]).iterdir()}
        return SimpleNamespace(repo_url=self.url)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def test_the_adapters_own_files_go_up(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine alone")
    result = succeed("push", tmp_path / "mine", "reviews", "--private")
    (made, options), (into, _) = hub.calls
    assert (made, options, into) == ("reviews", {"private": True, "exist_ok": True}, "me/reviews")
    assert {*hub.files} == {"adapter_config.json", "adapter_model.safetensors", "ia3_task.json", "README.md"}
    assert hub.files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert result.stdout.splitlines()[0] == hub.url


def test_no_path_of_this_machine_goes_up(adapter: Path, base: Path, tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    card.write_text(f"{card.read_text()}\nFine-tuned from {base}.\n")
    result = succeed("push", tmp_path / "mine", "me/reviews")
    assert not [name for name, content in hub.files.items() if str(base.parent).encode() in content]
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == base.name
    assert json.loads(hub.files["ia3_task.json"])["base_model"] == base.name
    assert f"{base.name} in place of {base}. Set base_model_name_or_path" in message(result)
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_a_name_on_the_hub_stays(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("ia3_task.json", "base_model")):
        content = json.loads((tmp_path / "mine" / name).read_text())
        (tmp_path / "mine" / name).write_text(json.dumps(content | {key: "google/t5-small"}))
    before = (tmp_path / "mine" / "adapter_config.json").read_bytes()
    assert succeed("push", tmp_path / "mine", "me/reviews").stderr.strip() == ""
    assert hub.files["adapter_config.json"] == before


def test_json(adapter: Path, hub: Hub) -> None:
    hub.url = None
    content = json.loads(succeed("push", adapter, "me/reviews", "--json").stdout)
    assert content["url"] == "https://hub.example/me/reviews"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HFValidationError("bad"), "is no name of a repository"),
        (
            HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None)),
            "403",
        ),
        (ValueError("Invalid metadata"), "README.md: Invalid metadata Correct it, or remove it"),
        (RuntimeError("offline"), "can't be reached, so nothing was uploaded: offline"),
    ],
)
def test_what_the_hub_refuses(adapter: Path, hub: Hub, error: Exception, said: str) -> None:
    hub.error = error
    result = call("push", adapter, "me/reviews")
    assert result.exit_code == 2
    assert said in message(result)


def test_no_folder(tmp_path: Path, hub: Hub) -> None:
    result = call("push", tmp_path / "nothing", "me/reviews")
    assert result.exit_code == 2
    assert "There is no folder" in message(result)
    assert hub.calls == []


def test_a_damaged_adapter_stays_here(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    result = call("push", tmp_path / "broken", "me/reviews")
    assert result.exit_code == 2
    assert "truncated or damaged" in message(result)
    assert hub.calls == []


def test_a_pickle_stays_here(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    model, _ = load_adapter(adapter)
    model.save_pretrained(tmp_path, safe_serialization=False)
    result = call("push", tmp_path, "me/reviews")
    assert result.exit_code == 2
    assert "save it as safetensors first" in message(result)
    assert hub.calls == []

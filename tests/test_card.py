"""The model card beside an adapter."""

import socket

import pytest
from huggingface_hub import ModelCard

from ia3 import IA3Config, TaskType
from ia3.card import write_card


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("task", [None, *TaskType])
def test_a_new_card(tmp_path, task):
    write_card(tmp_path, IA3Config(task_type=task, base_model_name_or_path="org/base"))
    card = ModelCard((tmp_path / "README.md").read_text())
    assert (card.data.library_name, card.data.tags, card.data.base_model) == ("peft", ["ia3"], "org/base")
    loader = card.text.split("from ia3 import ")[1].split()[0]
    assert hasattr(__import__("ia3"), loader)
    assert f'{loader}.from_pretrained("{tmp_path.name}")' in card.text


def test_a_local_base_is_not_named_to_the_hub(tmp_path):
    write_card(tmp_path, IA3Config(base_model_name_or_path=str(tmp_path)))
    assert "base_model" not in ModelCard((tmp_path / "README.md").read_text()).data.to_dict()


def test_without_a_base(tmp_path):
    write_card(tmp_path, IA3Config())
    card = ModelCard((tmp_path / "README.md").read_text())
    assert "a model of your own" in card.text
    assert "base_model" not in card.data.to_dict()


def test_an_existing_card_keeps_its_words(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n- ia3\n---\n# My words\n\nwith ³ and ---\n", encoding="utf-8")
    write_card(tmp_path, IA3Config(base_model_name_or_path="org/base"))
    card = ModelCard(path.read_text(encoding="utf-8"))
    assert "# My words\n\nwith ³ and ---" in card.text
    assert (card.data.license, card.data.tags, card.data.library_name) == ("mit", ["ia3", "mine"], "peft")
    once = path.read_bytes()
    write_card(tmp_path, IA3Config(base_model_name_or_path="org/base"))
    assert path.read_bytes() == once


def test_a_card_without_metadata_gets_some(tmp_path):
    (tmp_path / "README.md").write_text("just words\n")
    write_card(tmp_path, IA3Config(base_model_name_or_path="org/base"))
    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.data.library_name == "peft"
    assert "just words" in card.text

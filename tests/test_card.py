"""The model card beside an adapter."""

import socket

import pytest
from huggingface_hub import ModelCard

from ia3 import IA3Config, TaskType
from ia3.card import add_results, update_card, write_card


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
    assert f"model = {loader}.from_pretrained(adapter)" in card.text
    assert f"`from peft import {loader}` loads them too" in card.text


def test_what_was_trained(tmp_path):
    write_card(
        tmp_path,
        IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "output.dense"],
            exclude_modules=["attention.output.dense"],
            feedforward_modules=["output.dense"],
            modules_to_save=["classifier"],
        ),
    )
    text = (tmp_path / "README.md").read_text()
    for row in (
        "| task | SEQ_CLS |",
        "| vectors at | `key`, `output.dense` |",
        "| of these, at the input | `output.dense` |",
        "| left out | `attention.output.dense` |",
        "| trained in full | `classifier` |",
    ):
        assert row in text


def test_many_paths_are_named_by_their_ends_and_patterns_escaped(tmp_path):
    paths = [f"layers.{i}.{name}" for i in range(9) for name in ("k", "v")]
    write_card(tmp_path, IA3Config(target_modules=paths, feedforward_modules=r".*\.(k|v)"))
    text = (tmp_path / "README.md").read_text()
    assert "| vectors at | `k`, `v` |" in text
    assert r"| of these, at the input | `.*\.(k\|v)` |" in text


def test_a_folder_whose_name_could_be_a_repositorys_is_no_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    write_card(tmp_path, IA3Config(base_model_name_or_path="runs/base"))
    assert "base_model" not in ModelCard((tmp_path / "README.md").read_text()).data.to_dict()


@pytest.mark.parametrize("base", ["bundled:flan-t5-small-titler", "/data/models/t5", "../runs/my base", "a/b/c"])
def test_a_base_that_is_no_repository_is_no_metadata(tmp_path, base):
    write_card(tmp_path, IA3Config(base_model_name_or_path=base))
    assert "base_model" not in ModelCard((tmp_path / "README.md").read_text()).data.to_dict()


def test_a_bundled_base_loads_here_only(tmp_path):
    write_card(tmp_path, IA3Config(task_type="SEQ_2_SEQ_LM", base_model_name_or_path="bundled:flan-t5-small-titler"))
    text = (tmp_path / "README.md").read_text()
    assert "adapter for bundled:flan-t5-small-titler" in text
    assert "from ia3 import AutoPeftModelForSeq2SeqLM" in text
    assert "PEFT can't load it" in text
    assert "from peft" not in text


def test_a_local_base_is_named_without_its_folder(tmp_path):
    write_card(tmp_path, IA3Config(base_model_name_or_path="/home/somebody/models/my-t5"))
    text = (tmp_path / "README.md").read_text()
    assert "adapter for my-t5" in text
    assert "somebody" not in text


def test_a_local_base_is_not_named_to_the_hub(tmp_path):
    write_card(tmp_path, IA3Config(base_model_name_or_path=str(tmp_path)))
    assert "base_model" not in ModelCard((tmp_path / "README.md").read_text()).data.to_dict()


def test_without_a_base(tmp_path):
    write_card(tmp_path, IA3Config())
    card = ModelCard((tmp_path / "README.md").read_text())
    assert "a model of your own" in card.text
    assert "PeftModel.from_pretrained(base_model, adapter)" in card.text
    assert "`from peft import PeftModel` loads" in card.text
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


def test_a_trainers_text_is_kept_and_how_to_load_added_once(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlibrary_name: transformers\nbase_model: bundled:my-t5\ntags: generated_from_trainer\n---\n"
        "# Run 5\n\nOn the my-data dataset.\n"
    )
    config = IA3Config(task_type="SEQ_2_SEQ_LM", base_model_name_or_path="bundled:my-t5")
    update_card(tmp_path, config, ["mine"])
    card = ModelCard(path.read_text(encoding="utf-8"))
    assert card.text.startswith("# Run 5\n\nOn the my-data dataset.\n\n## Loading\n")
    assert "model = AutoPeftModelForSeq2SeqLM.from_pretrained(adapter)" in card.text
    assert card.data.tags == ["generated_from_trainer", "ia3", "mine"]
    assert (card.data.library_name, card.data.base_model) == ("peft", None)  # the hub refuses such a base
    once = path.read_bytes()
    update_card(tmp_path, config, ["mine"])
    assert path.read_bytes() == once


def test_updating_makes_a_card_where_there_is_none(tmp_path):
    config = IA3Config(task_type="SEQ_2_SEQ_LM", base_model_name_or_path="org/base")
    (tmp_path / "updated").mkdir()
    update_card(tmp_path / "updated", config, [])
    (tmp_path / "written").mkdir()
    write_card(tmp_path / "written", config)
    assert (tmp_path / "updated" / "README.md").read_bytes() == (tmp_path / "written" / "README.md").read_bytes()


def test_results_are_put_in_once_and_what_stands_behind_stays(tmp_path):
    write_card(tmp_path, IA3Config(task_type="SEQ_2_SEQ_LM", base_model_name_or_path="org/base"))
    new = (tmp_path / "README.md").read_text()
    for accuracy in (0.25, 0.75):
        add_results(tmp_path, {"loss": "1.0"}, accuracy=accuracy, task="text-classification", data="/home/me/my.csv")
        path = tmp_path / "README.md"
        if accuracy == 0.25:
            path.write_text(path.read_text() + "\n## My notes\n\nKept.\n")
    card = ModelCard(path.read_text())
    assert card.text.count("## Training and results") == 1
    assert "| data | my.csv |\n| loss | 1.0 |" in card.text
    assert card.text.endswith("## My notes\n\nKept.\n")
    assert "/home/me" not in str(card)
    assert new.split("---")[2].strip() in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "my.csv")
    assert card.data.datasets is None
    add_results(tmp_path, {}, accuracy=0.5, task="text-classification", data="org/reviews")
    assert ModelCard(path.read_text()).data.datasets == ["org/reviews"]

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fleet import BASE, CAUSAL, RANKED, TASKS, bare, save, save_fleet, task_of
from safetensors.torch import load_file, save_file

import tiny_classifier
from ia3 import IA3Config, get_peft_model
from ia3.serving.registry import Registry
from ia3.serving.requests import Refused, UnknownModel
from ia3.tasks.task import TaskKind, save_task


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fleet(tmp_path_factory.mktemp("saved"), TASKS)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


@contextmanager
def registered(folder: Path, **options: int) -> Iterator[Registry]:
    registry = Registry(bare(), folder, base=BASE, **options)
    try:
        yield registry
    finally:
        registry.close()


def digests(registry: Registry) -> dict[str, str | None]:
    return {served.name: served.digest for served in registry.models()}


def rewrite(adapter: Path, factor: float = 2.0) -> None:
    """Other vectors in the same file, in place."""
    path = adapter / "adapter_model.safetensors"
    save_file({key: vector * factor for key, vector in load_file(path).items()}, path, metadata={"format": "pt"})


def look_twice(registry: Registry) -> None:
    """What changed is read at the second look, when it rests."""
    registry.refresh()
    registry.refresh()


def test_the_names_of_a_folder(folder: Path) -> None:
    with registered(folder) as registry:
        served = registry.models()
        assert [each.name for each in served] == [BASE, *sorted(TASKS)]
        assert (served[0].digest, served[0].parent, served[0].task_kind) == (None, None, None)
        news = next(each for each in served if each.name == "news")
        assert (news.parent, news.task_kind, news.labels) == (BASE, "label-words", RANKED["labels"])
        assert len(registry.table) == len(TASKS)
        for name in ("news", f"{BASE}:news", BASE):
            registry.release(registry.hold(name).version)
        for name in ("", "no", "../folder/news", f"{BASE}:", f"other:{BASE}", "news/"):
            with pytest.raises(UnknownModel, match="There is no model"):
                registry.hold(name)
        assert registry.refused() == {}
        assert len(registry) == len(TASKS)


def test_a_run_has_one_name(folder: Path) -> None:
    for each in ("run/adapter", "run/best", "begun/best", "found/best", "found/rate-1/adapter", "adapter"):
        shutil.copytree(folder / "news", folder / each)
    for each in ("run", "begun", "found/rate-1"):
        (folder / each / "recipe.yaml").write_text("")
    with registered(folder) as registry:
        names = {*TASKS, "run", "found/best", "found/rate-1", "adapter"}
        assert digests(registry).keys() == {BASE, *names}
        assert len(registry.table) == len(TASKS)  # the same content has one row
        registry.unload("run")
        look_twice(registry)
        assert digests(registry).keys() == {BASE, *names} - {"run"}
        registry.load("run", "run")
        registry.load("best", "run/best")
        assert digests(registry)["run"] == digests(registry)["best"] == digests(registry)["news"]


def test_identity_is_content(folder: Path) -> None:
    with registered(folder) as registry:
        first = digests(registry)["news"]
        shutil.copytree(folder / "news", folder / "copy")
        look_twice(registry)
        assert digests(registry)["copy"] == first
        save_task(folder / "copy", task_of(**RANKED | {"pattern": "{text} it is"}))
        look_twice(registry)
        assert digests(registry)["copy"] != first  # the same vectors asked another way are another adapter
        rewrite(folder / "news")
        look_twice(registry)
        assert digests(registry)["news"] not in (first, digests(registry)["copy"])


def test_a_request_keeps_the_version_that_it_came_for(folder: Path) -> None:
    with registered(folder) as registry:
        held = registry.hold("news").version
        rewrite(folder / "news")
        registry.refresh()
        assert registry.hold("news").version is held  # files that changed this moment may be half copied
        registry.refresh()
        other = registry.hold("news").version
        assert other is not held
        assert {held.row, other.row} <= {*registry.table}
        registry.release(held)
        assert held.row in registry.table
        registry.release(held)
        assert held.row not in registry.table
        assert len(registry.table) == len(TASKS)


def test_what_goes_and_comes(folder: Path) -> None:
    with registered(folder) as registry:
        shutil.move(folder / "news", folder.parent / "away")
        registry.refresh()
        assert "news" in digests(registry)  # perhaps it is just being replaced
        registry.refresh()
        assert "news" not in digests(registry)
        assert len(registry.table) == len(TASKS) - 1
        shutil.move(folder.parent / "away", folder / "news")
        look_twice(registry)
        assert "news" in digests(registry)


def test_half_a_file_keeps_the_old_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "news" / "adapter_model.safetensors"
    whole = path.read_bytes()
    with registered(folder) as registry:
        before = digests(registry)
        path.write_bytes(whole[: len(whole) // 2])
        for _ in range(4):
            registry.refresh()
        assert digests(registry) == before
        assert "truncated or damaged" in registry.refused()["news"]
        assert len(caplog.records) == 1
        path.write_bytes(whole)
        look_twice(registry)
        assert digests(registry) == before
        assert registry.refused() == {}
        assert len(registry.table) == len(TASKS)


def test_a_folder_that_changes_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(folder) as registry:
        register = registry.table.register

        def change(name: str, path: Path) -> str:
            digest = register(name, path)
            rewrite(folder / "news")
            return digest

        rewrite(folder / "news", 3.0)
        monkeypatch.setattr(registry.table, "register", change)
        with pytest.raises(Refused, match="changed while it was read"):
            registry.load("news", "news")
        monkeypatch.undo()
        assert len(registry.table) == len(TASKS)
        assert registry.load("news", "news").digest == digests(registry)["news"]


def test_loading_and_unloading_by_name(folder: Path) -> None:
    with registered(folder) as registry:
        served = registry.load("fresh/one", "news")
        assert served.digest == digests(registry)["news"] == digests(registry)["fresh/one"]
        assert registry.load("fresh/one", str(folder / "sports")).digest == digests(registry)["sports"]
        registry.unload("fresh/one")
        registry.unload("news")
        look_twice(registry)
        assert "news" not in digests(registry)  # though its folder is there
        assert len(registry.table) == len(TASKS) - 1
        registry.load("news", "news")
        rewrite(folder / "news")
        before = digests(registry)["news"]
        look_twice(registry)
        assert digests(registry)["news"] != before  # what was loaded is watched, too
        with pytest.raises(UnknownModel, match="no adapter and no alias 'fresh/one'"):
            registry.unload("fresh/one")
        with pytest.raises(UnknownModel):
            registry.unload(BASE)


def test_what_was_loaded_goes_with_its_folder(folder: Path) -> None:
    with registered(folder) as registry:
        registry.load("mine", "news")
        shutil.rmtree(folder / "news")
        counts = []
        for _ in range(5):
            registry.refresh()
            counts.append(len(registry))
        assert counts[1:] == [len(TASKS) - 1] * 4
        with pytest.raises(UnknownModel):
            registry.unload("mine")


def test_an_alias_means_one_content(folder: Path) -> None:
    with registered(folder) as registry:
        first = registry.alias("prod", "news")
        assert (first.name, first.aliases) == ("news", ("prod",))
        rewrite(folder / "news")
        look_twice(registry)
        held = registry.hold("prod")
        assert (held.name, held.version.digest) == ("news", first.digest)
        assert digests(registry)["news"] != first.digest == digests(registry)["prod"]  # nothing is hidden
        registry.alias("prod", f"{BASE}:news")
        assert registry.hold("prod").version.digest == digests(registry)["news"]
        assert "prod" not in digests(registry)
        assert held.version.row in registry.table  # a request still has it
        registry.release(held.version)
        assert held.version.row not in registry.table
        assert registry.alias("base", BASE).aliases == ("base",)
        registry.unload("news")
        assert registry.hold("prod").name == "news"
        registry.unload("prod")
        with pytest.raises(UnknownModel):
            registry.hold("prod")
        with pytest.raises(UnknownModel):
            registry.alias("prod", "nobody")
        with pytest.raises(Refused, match="'sports' is an adapter's own name"):
            registry.alias("sports", "free")
        with pytest.raises(Refused, match="'base' is an alias"):
            registry.load("base", "news")


@pytest.mark.parametrize("name", ["", "-x", "/abs", "a b", "a" * 129, "ü", "a\n", "../a", BASE])
def test_names_that_are_none(folder: Path, name: str) -> None:
    with registered(folder) as registry:
        for call in (registry.load, registry.alias):
            with pytest.raises(Refused, match=r"can't be a name|base's own name"):
                call(name, "news")


@pytest.mark.parametrize(
    "path", ["..", ".", "", "../outside", "news/../../outside", "nothing", "a\0b", "x" * 5000, "out"]
)
def test_paths_that_lead_out(folder: Path, path: str) -> None:
    outside = Path(shutil.copytree(folder / "news", folder.parent / "outside"))
    (folder / "out").symlink_to(outside, target_is_directory=True)
    with registered(folder) as registry:
        for each in (path, str(outside)):
            with pytest.raises(Refused, match="is no folder below the folder of adapters") as refused:
                registry.load("evil", each)
            assert str(folder) not in refused.value.message
        assert "out" not in digests(registry)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "ia3_task.json"])
def test_files_that_lead_out(folder: Path, name: str) -> None:
    shutil.move(folder / "news" / name, folder.parent / name)
    (folder / "news" / name).symlink_to(folder.parent / name)
    inside = folder / "sports" / "elsewhere"
    shutil.move(folder / "sports" / name, inside)
    (folder / "sports" / name).symlink_to(inside)
    with registered(folder) as registry:
        assert "leads out of the folder" in registry.refused()["news"]
        assert "sports" in digests(registry)  # a link to what lies in the folder is none that leads out


def broken(folder: Path) -> dict[str, str]:
    """Adapters that can't be served, and what is said of each."""
    save(folder / "no-task", 0, None)
    save(folder / "columns", 0, task_of(**RANKED | {"pattern": "{text} of {who}"}))
    save(folder / "causal", 0, task_of(**CAUSAL["chat"]), causal=True)
    save(folder / "task", 0, task_of(**RANKED))
    (folder / "task" / "ia3_task.json").write_text("{")
    save(folder / "head", 0, None)
    classes = {"kind": TaskKind.SEQUENCE_CLASSIFICATION, "labels": tiny_classifier.LABELS, "max_length": 8}
    save_task(folder / "head", task_of(**classes))
    whole = get_peft_model(bare(), IA3Config(task_type="SEQ_2_SEQ_LM", modules_to_save=["lm_head"]))
    whole.save_pretrained(folder / "whole")
    save_task(folder / "whole", task_of(**RANKED))
    save(folder / "nan", 0, task_of(**RANKED))
    rewrite(folder / "nan", float("nan"))
    save(folder / "pickle", 0, task_of(**RANKED))
    (folder / "pickle" / "adapter_model.safetensors").unlink()
    (folder / "pickle" / "adapter_model.bin").write_bytes(pickle.dumps({"a": torch.ones(2)}))
    (folder / "empty").mkdir()
    (folder / "empty" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return {
        "no-task": "no ia3_task.json",
        "columns": "reads the columns 'text', 'who'",
        "causal": "which a seq2seq model doesn't answer",
        "task": "ia3_task.json",
        "head": "which a seq2seq model doesn't answer",
        "whole": "modules in full ('lm_head')",
        "nan": "hold NaN or infinity",
        "pickle": "no adapter_model.safetensors",
        "empty": "no adapter_model.safetensors",
    }


def test_adapters_that_cannot_be_served(folder: Path) -> None:
    expected = broken(folder)
    with registered(folder) as registry:
        refused = registry.refused()
        assert refused.keys() == expected.keys()
        for name, why in expected.items():
            assert why in refused[name]
            assert str(folder) not in refused[name]
            with pytest.raises(Refused, match="can't be served"):
                registry.load("another", name)
        assert digests(registry).keys() == {BASE, *TASKS}
        assert len(registry.table) == len(TASKS)


def test_folders_that_are_none(folder: Path, tiny) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        Registry(bare(), folder / "nothing", base=BASE)
    model = bare()
    with pytest.raises(ValueError, match="is itself an adapter"):
        Registry(model, folder / "news", base=BASE)
    with pytest.raises(ValueError, match="BertModel answers nothing"):
        Registry(tiny("bert", task=None), folder, base=BASE)
    Registry(model, folder, base=BASE).close()
    assert type(model) is type(bare())  # given back


@pytest.mark.skipif(os.name == "nt", reason="such names are none there")
def test_a_name_that_no_answer_can_hold(folder: Path) -> None:
    shutil.copytree(folder / "news", folder / "bad\udcff")
    with registered(folder) as registry:
        assert digests(registry).keys() == {BASE, *TASKS}


def test_the_folder_is_watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(folder) as registry:
        looks, enough = [], threading.Event()

        def fail() -> None:
            looks.append(1)
            if len(looks) == 3:
                enough.set()
            raise OSError("the disk is away")

        monkeypatch.setattr(registry, "refresh", fail)
        registry.watch(every_s=1e-3)
        assert enough.wait(60)  # it goes on
    assert registry._watcher is not None
    assert not registry._watcher.is_alive()


def test_after_reading_much_the_folder_is_looked_at_again_soon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ia3.serving.registry._REST", 10_000)
    with registered(folder) as registry:
        refresh, looks = registry.refresh, threading.Semaphore(0)

        def look(*, reads: bool) -> None:
            time.sleep(0.2)
            registry._reads += reads
            looks.release()

        registry.refresh = lambda **_: look(reads=True)  # type: ignore[method-assign]
        registry.watch(every_s=0.01)
        assert all(looks.acquire(timeout=60) for _ in range(3))
        registry.refresh = lambda **_: look(reads=False)  # type: ignore[method-assign]
        while looks.acquire(timeout=1):  # a look that finds nothing is followed by a rest of many times as long
            pass
        registry.refresh = refresh  # type: ignore[method-assign]


def test_what_may_pass_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ia3.serving.registry._PASSES_S", 0.2)
    with registered(folder) as registry:
        before, register = digests(registry)["news"], registry.table.register
        errors = [OSError(24, "Too many open files"), MemoryError(), torch.OutOfMemoryError("no room")]

        def fail(name: str, path: str | Path) -> str:
            raise errors[-1]

        rewrite(folder / "news")
        registry.table.register = fail  # type: ignore[method-assign]
        while errors:
            look_twice(registry)
            look_twice(registry)  # not before its time
            assert digests(registry)["news"] == before
            assert [*registry.refused()] == ["news"]
            assert registry.stats()["refused"] == 1
            errors.pop()
            time.sleep(0.25)
            if not errors:
                registry.table.register = register  # type: ignore[method-assign]
        assert len([each for each in caplog.records if "can't be served" in each.message]) == 3
        registry.refresh()
        assert registry.refused() == {}
        assert digests(registry)["news"] != before


def test_a_folder_by_the_name_of_an_alias_or_the_base(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with registered(folder) as registry:
        registry.alias("prod", "news")
        for name in ("prod", BASE):
            shutil.copytree(folder / "sports", folder / name)
        look_twice(registry)
        assert [*registry.refused()] == ["prod", BASE]
        assert all("has that name and answers by it: rename the folder" in why for why in registry.refused().values())
        assert [each.name for each in registry.models()] == [BASE, *sorted(TASKS)]
        assert caplog.text.count("is not served by its name") == 2
        found = registry.find("prod")
        assert found is not None
        assert (found.name, found.aliases) == ("news", ("prod",))
        registry.alias("prod", "free")  # it can be moved all the same
        registry.unload("prod")
        assert [*registry.refused()] == [BASE]
        held = registry.hold("prod")
        assert held.version.digest == digests(registry)["sports"] == digests(registry)["prod"]
        registry.release(held.version)


def test_what_a_name_means(folder: Path) -> None:
    with registered(folder) as registry:
        registry.alias("prod", "news")
        by_name = {each.name: each for each in registry.models()}
        for name, meant in (("news", "news"), ("prod", "news"), (f"{BASE}:prod", "news"), (BASE, BASE)):
            assert registry.find(name) == by_name[meant]
        assert registry.find("nobody") is None
        registry.unload("news")
        for name in ("prod", f"{BASE}:prod"):
            found = registry.find(name)
            assert found is not None
            assert (found.name, found.digest) == ("prod", by_name["news"].digest)
            assert found in registry.models()


@pytest.mark.skipif(os.name == "nt", reason="links want rights there")
def test_a_link_to_an_adapter_is_an_adapter(folder: Path, tmp_path: Path) -> None:
    """As who releases by switching a link has it; what leads out is refused by name, and no circle is gone round."""
    shutil.copytree(folder / "news", tmp_path / "outside")
    (folder / "run").mkdir()
    shutil.copytree(folder / "sports", folder / "run" / "adapter")
    for name, to in (("live", "news"), ("circle", "."), ("same", "run"), ("out", tmp_path / "outside")):
        (folder / name).symlink_to(to, target_is_directory=True)
    with registered(folder) as registry:
        found = digests(registry)
        assert found["live"] == found["news"]
        assert found["same"] == found["run"] == found["sports"]
        assert set(found) == {BASE, *TASKS, "live", "same", "run"}
        assert [*registry.refused()] == ["out"]
        (folder / "live").unlink()
        (folder / "live").symlink_to("sports", target_is_directory=True)
        look_twice(registry)
        assert digests(registry)["live"] == found["sports"]

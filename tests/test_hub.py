"""Pushing to the hub and loading from it, over HTTP against `hub_stand_in`.

huggingface_hub reads its endpoint when it is imported, and the other tests run offline: what talks to the hub runs
in a process of its own. The functions without `test_` in front run there.
"""

from __future__ import annotations

import io
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from builders import SEQ2SEQ, adapted, randomise, seq2seq_batch, t5
from hub_stand_in import Hub, running_hub
from ia3 import AutoPeftModelForSeq2SeqLM, IA3Config, PeftConfig, PeftModel, as_peft_model
from test_docs import ON_THE_HUB, run_page

TOKEN = "hf_secret0123456789"
BASE = "me/base"
OWN_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

Client = Callable[..., Any]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub(TOKEN) as running:
        folder = tmp_path_factory.mktemp("base")
        t5().save_pretrained(folder)
        running.put_folder(BASE, folder)
        yield running


@contextmanager
def client_of(hub: Hub, home: Path, first: str = "") -> Iterator[Client]:
    """A process that knows the hub and ran the code `first` before it imported anything."""
    with (
        ProcessPoolExecutor(1, get_context("spawn"), initializer=exec, initargs=(first,)) as pool,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
            environment.delenv(name, raising=False)
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            environment.setenv(name, value)
        pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """`client(function, …)`: call it in the process that knows the hub, and give what it returned."""
    with client_of(hub, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    """A cache without a file in it."""
    return str(tmp_path / "cache")


# What runs in the client's process


def tiny(*more: str, seed: int = 1) -> PeftModel:
    model = t5()
    model.name_or_path = BASE
    return adapted(model, *more, seed=seed)


def logits(model: Any) -> list[Any]:
    with torch.no_grad():
        return model.eval()(**seq2seq_batch()).logits.tolist()


def push(repository: str, *more: str, seed: int = 1, token: str | None = TOKEN, **how: Any) -> tuple[list[Any], Any]:
    """Push a model with the adapters "default" and `more`; its outputs by the last of them, and the commit."""
    model = tiny(*more, seed=seed)
    commit = model.push_to_hub(repository, token=token, **how)
    if more:
        model.set_adapter(more[-1])
    return logits(model), commit


def push_as_installed(repository: str, **how: Any) -> tuple[list[Any], Any]:
    """Push the way that huggingface_hub takes where hf_xet is installed."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = False
    try:
        return push(repository, **how)
    finally:
        constants.HF_HUB_DISABLE_XET = True


def load_both(repository: str, **how: Any) -> list[Any]:
    return logits(AutoPeftModelForSeq2SeqLM.from_pretrained(repository, **how))


def load_onto_base(repository: str, **how: Any) -> list[Any]:
    return logits(PeftModel.from_pretrained(t5(), repository, **how))


def load_in_peft(repository: str, **how: Any) -> list[Any]:
    from peft import PeftModel as Theirs

    return logits(Theirs.from_pretrained(t5(), repository, **how))


def load_beside(repository: str, **how: Any) -> list[Any]:
    model = tiny(seed=9)
    model.load_adapter(repository, "new", **how)
    model.set_adapter("new")
    return logits(model)


def what_was_said(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Everything that a call logs at the lowest level or prints."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    logging.root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = True
    try:
        with redirect_stdout(said), redirect_stderr(said):
            function(*args, **kwargs)
    finally:
        logging.root.removeHandler(handler)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
    return said.getvalue()


# Pushing, and loading by name


def test_pushed_and_loaded_by_name(client: Client, hub: Hub, fresh: str) -> None:
    expected, commit = client(push, "me/plain", commit_message="The first")
    assert commit.commit_url.startswith(f"{hub.url}/me/plain/commit/")
    assert sorted(hub.repositories["me/plain"].at("main")) == OWN_FILES
    assert len(hub.asked("PUT", "/uploads/.+")) >= 1
    header = hub.asked("POST", "/api/models/me/plain/commit/main")[-1].body.splitlines()[0]
    assert b"The first" in header
    assert client(load_both, "me/plain", cache_dir=fresh) == expected
    assert client(load_onto_base, "me/plain", cache_dir=fresh) == expected
    assert client(load_beside, "me/plain", cache_dir=fresh) == expected
    config = client(PeftConfig.from_pretrained, "me/plain", cache_dir=fresh)
    assert (config.base_model_name_or_path, config.task_type) == (BASE, "SEQ_2_SEQ_LM")
    assert "me/base" in ModelCard(hub.repositories["me/plain"].at("main")["README.md"].decode()).data.base_model


def test_peft_loads_it_by_name(client: Client, fresh: str) -> None:
    expected, _ = client(push, "me/for-peft")
    assert client(load_in_peft, "me/for-peft", cache_dir=fresh) == expected


def test_the_streamed_upload(client: Client, hub: Hub, fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "large", ())  # its storage for large files is another protocol
    expected, commit = client(push_as_installed, "me/streamed")
    assert commit.commit_url.startswith(f"{hub.url}/me/streamed/commit/")
    assert client(load_both, "me/streamed", cache_dir=fresh) == expected
    _, commit = client(push_as_installed, "me/streamed", seed=2, create_pr=True)
    assert commit.pr_url == f"{hub.url}/me/streamed/discussions/1"
    assert client(load_both, "me/streamed", cache_dir=fresh, force_download=True) == expected
    assert client(load_both, "me/streamed", cache_dir=fresh, revision="refs/pr/1") != expected


def test_a_second_push_replaces_the_first(client: Client, hub: Hub, fresh: str) -> None:
    first, _ = client(push, "me/twice")
    assert client(load_onto_base, "me/twice", cache_dir=fresh) == first
    second, _ = client(push, "me/twice", seed=2)
    assert client(load_onto_base, "me/twice", cache_dir=fresh) == second != first
    assert len(hub.repositories["me/twice"].commits) == 3


def test_an_adapter_with_a_name_of_its_own(client: Client, hub: Hub, fresh: str) -> None:
    expected, _ = client(push, "me/two", "other")
    files = hub.repositories["me/two"].at("main")
    assert sorted(files) == sorted([*OWN_FILES, "other/adapter_config.json", "other/adapter_model.safetensors"])
    assert client(load_both, "me/two", subfolder="other", cache_dir=fresh) == expected
    assert client(load_onto_base, "me/two", subfolder="other", cache_dir=fresh) == expected
    assert client(load_onto_base, "me/two", cache_dir=fresh) != expected


def test_a_revision(client: Client, hub: Hub, fresh: str) -> None:
    first, commit = client(push, "me/revised")
    hub.repositories["me/revised"].branches["v2"] = commit.oid
    second, _ = client(push, "me/revised", seed=2, revision="v2")
    assert second != first
    assert client(load_onto_base, "me/revised", cache_dir=fresh) == first
    assert client(load_both, "me/revised", revision="v2", cache_dir=fresh) == second
    assert client(load_onto_base, "me/revised", revision=commit.oid, cache_dir=fresh) == first


def test_a_new_branch_is_made(client: Client, fresh: str) -> None:
    client(push, "me/branched")
    expected, _ = client(push, "me/branched", seed=2, revision="new")
    assert client(load_onto_base, "me/branched", revision="new", cache_dir=fresh) == expected


def test_private(client: Client, hub: Hub, fresh: str) -> None:
    expected, _ = client(push, "private", private=True)
    assert hub.asked("POST", "/api/repos/create")[-1].json()["visibility"] == "private"
    assert hub.repositories["me/private"].private
    with pytest.raises(FileNotFoundError, match="that you may read"):
        client(load_onto_base, "me/private", cache_dir=fresh)
    assert client(load_onto_base, "me/private", token=TOKEN, cache_dir=fresh) == expected
    assert client(load_both, "me/private", token=TOKEN, cache_dir=fresh) == expected


def test_a_repository_is_as_public_as_the_account_makes_it(client: Client, hub: Hub) -> None:
    client(push, "me/usual")
    assert "visibility" not in hub.asked("POST", "/api/repos/create")[-1].json()


def test_a_pull_request_leaves_main_alone(client: Client, hub: Hub) -> None:
    client(push, "me/asked")
    before = hub.repositories["me/asked"].at("main")
    _, commit = client(push, "me/asked", seed=2, create_pr=True)
    assert hub.asked("POST", "/api/models/me/asked/commit/main")[-1].query == {"create_pr": "1"}
    assert commit.pr_url == f"{hub.url}/me/asked/discussions/1"
    assert hub.repositories["me/asked"].at("main") == before
    assert hub.repositories["me/asked"].at("refs/pr/1") != before


def run_the_page(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.chdir(folder)
        run_page(ON_THE_HUB)


def test_the_page_of_the_documentation_runs(client: Client, hub: Hub, tmp_path: Path) -> None:
    client(run_the_page, tmp_path)
    assert hub.repositories["me/reviews-ia3"].private


# transformers' Trainer


def train_and_push(repository: str, folder: Path, base: str = BASE, bridged: bool = False) -> list[Any]:
    """Train, pushing each checkpoint, and push at the end; the trained model's outputs."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = t5()
    model.name_or_path = model.config._name_or_path = base
    model = adapted(model)
    model.add_model_tags(["mine"])
    batch = seq2seq_batch(4)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        push_to_hub=True,
        hub_model_id=repository,
        hub_token=TOKEN,
    )
    trainer = Seq2SeqTrainer(
        as_peft_model(model) if bridged else model,
        arguments,
        train_dataset=[{key: value[i] for key, value in batch.items()} for i in range(4)],
    )
    trainer.train()
    trainer.push_to_hub(tags="reviews")
    return logits(model)


def check_what_a_trainer_pushed(hub: Hub, repository: str) -> ModelCard:
    files = hub.repositories[repository].at("main")
    assert set(OWN_FILES) <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert set(card.data.tags) == {"generated_from_trainer", "ia3", "mine", "reviews"}
    assert "### Training hyperparameters" in card.text  # Trainer's own
    assert "model = AutoPeftModelForSeq2SeqLM.from_pretrained(adapter)" in card.text
    return card


@pytest.mark.parametrize("bridged", [False, True])
def test_a_trainer_pushes(client: Client, hub: Hub, tmp_path: Path, fresh: str, bridged: bool) -> None:
    expected = client(train_and_push, "me/trained", tmp_path / "run", bridged=bridged)
    card = check_what_a_trainer_pushed(hub, "me/trained")
    assert card.data.base_model == BASE
    assert client(load_both, "me/trained", cache_dir=fresh) == expected
    assert client(load_in_peft, "me/trained", cache_dir=fresh) == expected


def test_a_trainer_pushes_without_peft(
    hub: Hub, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, fresh: str
) -> None:
    with client_of(hub, tmp_path_factory.mktemp("home"), "import sys; sys.modules['peft'] = None") as client:
        expected = client(train_and_push, "me/alone", tmp_path / "run")
        assert client(load_both, "me/alone", cache_dir=fresh) == expected
    assert check_what_a_trainer_pushed(hub, "me/alone").data.base_model == BASE


def test_a_trainers_base_that_the_hub_cannot_name_does_not_stop_the_push(
    client: Client, hub: Hub, tmp_path: Path
) -> None:
    client(train_and_push, "me/local-trained", tmp_path / "run", base="bundled:flan-t5-small-titler")
    card = check_what_a_trainer_pushed(hub, "me/local-trained")
    assert card.data.base_model is None


# What is missing


@pytest.mark.parametrize("load", [load_both, load_onto_base, load_beside, PeftConfig.from_pretrained])
def test_a_missing_repository(client: Client, load: Client, fresh: str) -> None:
    with pytest.raises(FileNotFoundError, match="me/nowhere is neither a directory nor the name of a hub"):
        client(load, "me/nowhere", cache_dir=fresh)


@pytest.mark.parametrize("load", [load_both, load_onto_base, PeftConfig.from_pretrained])
def test_a_repository_without_an_adapter(client: Client, load: Client, fresh: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"No adapter_config\.json in me/base: expected an adapter saved by"):
        client(load, BASE, cache_dir=fresh)


def test_a_missing_subfolder(client: Client, fresh: str) -> None:
    client(push, "me/one")
    with pytest.raises(FileNotFoundError, match=r"No adapter_config\.json in me/one/other"):
        client(load_onto_base, "me/one", subfolder="other", cache_dir=fresh)


def test_a_missing_revision(client: Client, fresh: str) -> None:
    client(push, "me/one")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        client(load_onto_base, "me/one", revision="nowhere", cache_dir=fresh)


def test_a_configuration_without_vectors(client: Client, hub: Hub, fresh: str) -> None:
    client(push, "me/half")
    del hub.repositories["me/half"].at("main")["adapter_model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        client(load_onto_base, "me/half", cache_dir=fresh)


# Secrets and the network


def test_a_token_is_never_said(client: Client, hub: Hub, fresh: str) -> None:
    said = client(what_was_said, push, "me/secret", private=True)
    said += client(what_was_said, load_both, "me/secret", token=TOKEN, cache_dir=fresh)
    assert "me/secret" in said  # it listened
    assert TOKEN not in said
    pushed = hub.repositories["me/secret"].at("main")
    assert not [path for path, content in pushed.items() if TOKEN.encode() in content]


def test_a_refused_token_is_not_repeated(client: Client) -> None:
    with pytest.raises(Exception, match="401") as caught:
        client(what_was_said, push, "me/refused", token="hf_wrong0123456789")
    assert "hf_wrong" not in str(caught.value)


def test_saving_asks_nothing_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("saving needs no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    tiny().save_pretrained(tmp_path)


def push_on_base_named(name: str, repository: str) -> None:
    model = t5()
    model.name_or_path = name
    model = PeftModel(model, IA3Config(**SEQ2SEQ))
    randomise(model)
    model.push_to_hub(repository, token=TOKEN)


@pytest.mark.parametrize("base", ["bundled:flan-t5-small-titler", "./runs/my base", "/data/models/t5", ""])
def test_a_base_that_the_hub_cannot_name_does_not_stop_the_push(client: Client, hub: Hub, base: str) -> None:
    client(push_on_base_named, base, "me/local-base")
    card = ModelCard(hub.repositories["me/local-base"].at("main")["README.md"].decode())
    assert "base_model" not in card.data.to_dict()

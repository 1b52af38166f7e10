"""`ia3 push`: a saved adapter's files to the hub, as they are but for paths on this machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ia3.cli.flags import AsJson, expect_adapter, print_json
from ia3.errors import shorten
from ia3.runs.screen import Screen

# An adapter's own files; what else lies in its folder stays there.
_REMEDY = "Set base_model_name_or_path in adapter_config.json to its name on the hub."
_FILES = ("adapter_config.json", "adapter_model.safetensors", "ia3_task.json", "README.md")


def push(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    repository: Annotated[str, typer.Argument(help="The hub repository, such as you/reviews-ia3; made if new.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter to the hub; log in with `hf auth login` or set HF_TOKEN before."""
    from ia3.runs.adapters import read_adapter

    if not adapter.is_dir():
        raise FileNotFoundError(f"There is no folder {adapter}: expected an adapter saved by `ia3 train`.")
    expect_adapter(adapter)
    read_adapter(adapter)  # a damaged one stays here
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(f"{adapter} holds a pickle, which nobody should have to trust: save it as safetensors first.")
    progress = Screen(stderr=True)
    with tempfile.TemporaryDirectory() as copy:
        said = _copy(adapter, Path(copy))
        if said:
            progress.print(f"{said} {_REMEDY}", style="yellow")
        with progress.status(f"Uploading {adapter}"):
            url = _upload(Path(copy), repository, private or None)
    if as_json:
        print_json({"adapter": adapter, "repository": repository, "url": url})
    else:
        typer.echo(f'{url}\nUse it: ia3 predict {repository} "…"')


def _copy(adapter: Path, folder: Path) -> str:
    """Copy what is published, with a name in place of the base model's path; what to say of it, empty for nothing."""
    from ia3.config import PeftConfig
    from ia3.publishing import name_bases

    for name in _FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    replaced = name_bases(folder)
    if PeftConfig.from_pretrained(folder).base_model_name_or_path is None:
        return "The adapter's base model is not named."
    named = "; ".join(f"{name} in place of {base}" for base, name in replaced.items())
    return f"The files are published with a name of the base model that others may not find: {named}." if named else ""


def _upload(adapter: Path, repository: str, private: bool | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api: Any = HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=name, folder_path=adapter, commit_message="Upload (IA)³ adapter")
    except HFValidationError as error:
        raise ValueError(
            f"{shorten(repository)} is no name of a repository: expected one such as you/reviews-ia3."
        ) from error
    except ValueError as error:  # what the hub finds wrong with the card
        raise ValueError(f"The hub refuses README.md: {error} Correct it, or remove it.") from error
    except HfHubHTTPError as error:
        raise OSError(
            f"The hub refused the upload to {repository}: {error}. Log in (`hf auth login`, or HF_TOKEN) with an "
            "account that may write there."
        ) from error
    except Exception as error:  # the network's errors are of many kinds, with one remedy
        raise OSError(f"The hub can't be reached, so nothing was uploaded: {error}") from error
    return str(commit.repo_url) if getattr(commit, "repo_url", None) else f"{api.endpoint}/{name}"

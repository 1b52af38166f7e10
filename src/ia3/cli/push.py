"""`ia3 push`: a saved adapter's files to the hub, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ia3.cli.flags import AsJson, expect_adapter, print_json
from ia3.errors import shorten
from ia3.runs.screen import Screen

# An adapter's own files; what else lies in its folder stays there.
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
    base = read_adapter(adapter).config.base_model_name_or_path
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(f"{adapter} holds a pickle, which nobody should have to trust: save it as safetensors first.")
    progress = Screen(stderr=True)
    if base is None or Path(base).exists():
        progress.print(
            f"The adapter's base model is {base or 'not named'}, which others don't have: set "
            "base_model_name_or_path in adapter_config.json to its name on the hub.",
            style="yellow",
            markup=False,
        )
    with progress.status(f"Uploading {adapter}"):
        url = _upload(adapter, repository, private or None)
    if as_json:
        print_json({"adapter": adapter, "repository": repository, "url": url})
    else:
        typer.echo(f'{url}\nUse it: ia3 predict {repository} "…"')


def _upload(adapter: Path, repository: str, private: bool | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api: Any = HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=adapter, allow_patterns=list(_FILES), commit_message="Upload (IA)³ adapter"
        )
    except HFValidationError as error:
        raise ValueError(
            f"{shorten(repository)} is no name of a repository: expected one such as you/reviews-ia3."
        ) from error
    except ValueError as error:  # what the hub finds wrong with the card
        raise ValueError(f"The hub refuses {adapter / 'README.md'}: {error} Correct it, or remove it.") from error
    except HfHubHTTPError as error:
        raise OSError(
            f"The hub refused the upload to {repository}: {error}. Log in (`hf auth login`, or HF_TOKEN) with an "
            "account that may write there."
        ) from error
    except Exception as error:  # the network's errors are of many kinds, with one remedy
        raise OSError(f"The hub can't be reached, so nothing was uploaded: {error}") from error
    return str(commit.repo_url) if getattr(commit, "repo_url", None) else f"{api.endpoint}/{name}"

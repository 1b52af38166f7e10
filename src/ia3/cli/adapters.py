"""Names of adapters on the command line."""

from __future__ import annotations

from pathlib import Path

from ia3.files import expect_folder_or_hub


def expect_adapter(adapter: str | Path) -> None:
    """Refuse in a moment what can be no adapter, and point from a run's folder to the adapter in it.

    Raises:
        FileNotFoundError: no such folder, and no name of a repository.
        ValueError: a folder without an adapter that has some in folders of its own.
    """
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
        if inside:
            raise ValueError(f"{folder} is no adapter but a folder with {', '.join(inside)}: name {inside[0]}.")
    expect_folder_or_hub(str(adapter), "adapter", "adapter_config.json")

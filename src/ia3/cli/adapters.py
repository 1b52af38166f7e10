"""Names of adapters on the command line."""

from __future__ import annotations

from pathlib import Path


def expect_adapter(adapter: str | Path) -> None:
    """Point from a run's folder to the adapter in it.

    Raises:
        ValueError: a folder without an adapter that has some in folders of its own.
    """
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
        if inside:
            raise ValueError(f"{folder} is no adapter but a folder with {', '.join(inside)}: name {inside[0]}.")

"""An adapter's files for others: the base model stands there by a name, not by its path on the author's machine."""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath

from ia3.card import is_on_hub, read_card
from ia3.config import CONFIG_NAME
from ia3.documents import read_json
from ia3.files import BUNDLED, write_atomically

# Which key of which file names the base model.
_KEYS = {CONFIG_NAME: "base_model_name_or_path", "ia3_task.json": "base_model"}
# A folder of the hub's cache, which says whose it is.
_IN_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


def public_name(base: str) -> str:
    """A base model's name for others.

    Args:
        base: a bundled name, a name on the hub, or a path.

    Returns:
        The name as it is; of a path in the hub's cache the repository's, of another its last part.
    """
    if base.startswith(BUNDLED) or is_on_hub(base):
        return base
    if cached := _IN_CACHE.search(base):
        return f"{cached[1]}/{cached[2]}"
    return PureWindowsPath(base).name or base  # which parts at both kinds of slashes


def name_bases(folder: Path) -> dict[str, str]:
    """Put the names of base models for others into the files of the adapters in a folder and below it.

    Args:
        folder: a copy of what will be published; its files are changed.

    Returns:
        What was replaced, and by what; empty where only names stood there.
    """
    replaced: dict[str, str] = {}
    for name, key in _KEYS.items():
        for path in sorted(folder.rglob(name)):
            content = read_json(path)
            base = content.get(key)
            if isinstance(base, str) and (public := public_name(base)) != base:
                replaced[base] = content[key] = public
                text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                write_atomically(path, text.encode())
    card = folder / "README.md"
    if replaced and card.is_file():
        text = str(read_card(card))
        for base in sorted(replaced, key=len, reverse=True):
            text = text.replace(base, replaced[base])
        write_atomically(card, text.encode())
    return replaced

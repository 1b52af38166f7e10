"""The release has one number: `ia3.__version__`, from which the package is built; what names it again follows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import ia3

ROOT = Path(__file__).parents[1]


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))


def test_a_number_beside_the_one_that_is_built() -> None:
    settings = project(ROOT)
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "src/ia3/__init__.py"
    assert Path(ia3.__file__).read_text("utf-8").count(f'__version__ = "{ia3.__version__}"') == 1


def test_a_plugin_of_another_number() -> None:
    assert project(ROOT / "plugins" / "vllm")["project"]["version"] == ia3.__version__


def test_a_changelog_that_ends_with_another_number() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == ia3.__version__

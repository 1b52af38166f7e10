"""The server's routes under requests that schemathesis makes of its OpenAPI description, valid ones and others.

    python tests/attack/openapi.py [--examples N] [--seed N]

A tiny model with tiny adapters is served, and then the stand-in of the tests; every answer must have a status and a
shape that the description names, none may be a fault of the server's, and what the description refuses must be refused.

Needs: schemathesis, which `make attack` installs beside what .venv has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "serving")]

from fleet import TASKS, save_fleet, serving  # noqa: E402 (after what it needs is set)
from stand_in import ADMIN_KEY, StandIn, site  # noqa: E402 (after what it needs is set)

# Too little time for an answer is 504; and what a description can't say, such as that a name is taken, is 400.
SETTINGS = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]
positive_data_acceptance.enabled = false
"""


@contextmanager
def real() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(save_fleet(Path(folder), TASKS)) as engine,
        site(engine, keys=[ADMIN_KEY]) as running,
    ):
        yield running.url


@contextmanager
def stand_in() -> Iterator[str]:
    with site(StandIn(), keys=[ADMIN_KEY]) as running:
        yield running.url


def description(url: str) -> str:
    """The server's own, in which the models to ask are those that are served: all others get no further than a name."""
    own = {"Authorization": f"Bearer {ADMIN_KEY}"}
    found = httpx2.get(f"{url}/openapi.json").json()
    name = {"enum": [each["id"] for each in httpx2.get(f"{url}/v1/models", headers=own).json()["data"]]}
    for operations in found["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = name
            content = operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})["content"]
            fields = content["application/json"]["schema"].get("properties", {})
            if "model" in fields:
                fields["model"] = name
            if "models" in fields:
                fields["models"] = {"type": ["array", "null"], "minItems": 1, "items": name}
    return json.dumps(found)


def attack(url: str, examples: int, seed: int) -> int:
    """schemathesis' exit code: 0 where nothing was found."""
    with tempfile.TemporaryDirectory() as folder:
        described, settings = Path(folder) / "openapi.json", Path(folder) / "schemathesis.toml"
        described.write_text(description(url))
        settings.write_text(SETTINGS)
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", str(described)]
        more = ["--url", url, "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"]
        more += ["--header", f"Authorization: Bearer {ADMIN_KEY}", "--request-timeout", "20"]
        return subprocess.run([*command, *more]).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="requests a route and kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    for served in (real, stand_in):
        with served() as url:
            wrong |= attack(url, arguments.examples, arguments.seed)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()

"""`ia3 serve`: the adapters in a folder, on one base model, over HTTP."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ia3.cli.flags import AsJson, TrustRemoteCode, print_json
from ia3.errors import listed
from ia3.runs.screen import Screen
from ia3.runs.tables import NONE, Column, print_table

if TYPE_CHECKING:
    from ia3.serving.requests import Served
    from ia3.serving.starting import AnyEngine

_NEEDS = ("fastapi", "prometheus_client", "uvicorn")
_KEYS, _ADMIN_KEY = "IA3_API_KEYS", "IA3_ADMIN_KEY"
# How much of a digest tells adapters apart for people.
_SHOWN = 12


def serve(
    base: Annotated[str, typer.Argument(help="The base model: a folder, a hub repository, or a bundled model.")],
    adapters: Annotated[Path, typer.Option(help="The folder with a folder for each adapter; it is watched.")],
    host: Annotated[str, typer.Option(help="The address to listen at; other than this machine's own with keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once, each under its own adapter.")] = 32,
    gather_ms: Annotated[
        float, typer.Option(min=0, max=10_000, help="Milliseconds that a text waits for company.")
    ] = 3.0,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same answer to the last bit, whoever asks at the same time.")
    ] = False,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; more are told to come again.")] = 1024,
    max_running: Annotated[
        int, typer.Option(min=1, help="Requests that a key may have under way; without keys, all together.")
    ] = 256,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds after which a request is given up.")
    ] = 120.0,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with the clients' keys, one a line.", show_default=f"${_KEYS}")
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the key for loading, unloading and aliases.", show_default=f"${_ADMIN_KEY}"),
    ] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that requests have to end in at SIGTERM.")] = 30.0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Serve every adapter in a folder on one base model, over HTTP: OpenAI's routes, and labels with probabilities."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'Serving needs {listed(missing)}: pip install "ia3[serve]".')
    from ia3.serving.http import make_app
    from ia3.serving.limits import Keys, RequestLimits
    from ia3.serving.listening import bind, in_url, is_loopback, listen, own_names
    from ia3.serving.metrics import log_in_lines

    keys, admin = Keys.read(api_keys, _KEYS), Keys.read(admin_key_file, _ADMIN_KEY)
    if not keys and not is_loopback(host):
        raise ValueError(
            f"Other machines reach {host}, and anybody could ask: give `api_keys`, or the keys in ${_KEYS}."
        )
    with bind(host, port) as bound:
        with Screen(stderr=True).status(f"Loading {base}") as status:
            from ia3.serving.intake import Limits
            from ia3.serving.starting import start

            limits = Limits(
                batch_size=batch_size,
                gather_s=gather_ms / 1000,
                most_waiting=max_queue,
                batch_invariant=batch_invariant,
            )
            engine = start(base, adapters, limits, trust_remote_code=trust_remote_code, tell=status.update)
        most, hosts = RequestLimits(running=max_running, answer_s=timeout_s), None if keys else own_names(host)
        app = make_app(engine, keys=keys, admin=admin, limits=most, hosts=hosts)
        bound.listen()
        _tell(engine, f"http://{in_url(host)}:{bound.getsockname()[1]}", as_json=as_json)
        log_in_lines()
        if not listen(app, engine, bound, drain_s=drain_s):
            raise typer.Exit(1)


def _tell(engine: AnyEngine, url: str, *, as_json: bool) -> None:
    """What is served, where, and what isn't and why."""
    base, *adapters = engine.models()
    refused = engine.registry.refused()
    if as_json:
        print_json({"url": url, "base": base.name, "adapters": list(map(asdict, adapters)), "refused": refused})
        return
    console, errors = Screen(), Screen(stderr=True)
    if adapters:
        print_table(console, _columns(adapters), f"Adapters of {base.name}")
    for name, why in refused.items():
        errors.print(f"{name} is not served. {why}", highlight=False)
    console.print(f"\n{url}/ serves the base {base.name} and its adapters, {len(adapters):,} so far.", highlight=False)


def _columns(adapters: list[Served]) -> list[Column]:
    def cells(of: Any) -> list[str]:
        return [of(each) or NONE for each in adapters]

    return [
        Column("adapter", cells(lambda each: each.name), text=True),
        Column("digest", cells(lambda each: each.digest[:_SHOWN]), 2, text=True),
        Column("task", cells(lambda each: each.task_kind), 1, text=True),
        Column("labels", cells(lambda each: ", ".join(each.labels)), 3, text=True),
    ]

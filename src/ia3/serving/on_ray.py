"""`ia3 serve` in replicas on a Ray cluster: each holds the base and every adapter, and Ray asks the one least busy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ia3.serving.http import make_app
from ia3.serving.intake import Limits
from ia3.serving.limits import Keys, RequestLimits
from ia3.serving.metrics import log_in_lines
from ia3.serving.starting import start

try:
    from ray import serve
except ImportError as error:
    raise ImportError("ia3.serving.on_ray runs on Ray, and it is not all installed: pip install 'ia3[ray]'.") from error

_logger = logging.getLogger(__name__)


class Arguments(BaseModel):
    """What `app` takes: the flags of `ia3 serve` that mean something where Ray listens.

    Args:
        base: the base model: a hub repository, a bundled model, or a folder that all machines share.
        adapters: the folder with a folder for each adapter, on a file system that all machines share. Every replica
            watches it: what is changed there is changed everywhere, within seconds, and for replicas that come later.
        replicas: how many processes.
        use_gpu: give each of them a GPU.
        batch_size: texts at once in a replica, each under its own adapter.
        gather_ms: milliseconds that a text waits for company.
        batch_invariant: the same answer to the last bit, whoever asks at the same time.
        max_queue: texts that may wait in a replica; more are told to come again.
        api_keys: a file with the clients' keys, one a line, on that file system; without it everybody may ask.
        max_running: requests that a key may have under way; without keys, all together.
        timeout_s: seconds after which a request is given up.
        drain_s: seconds that requests have to end in when a replica is stopped.
        trust_remote_code: run code that comes with the base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    adapters: Path
    replicas: int = Field(2, ge=1)
    use_gpu: bool = False
    batch_size: int = Field(32, ge=1)
    gather_ms: float = Field(3.0, ge=0, le=10_000)
    batch_invariant: bool = False
    max_queue: int = Field(1024, ge=1)
    api_keys: Path | None = None
    max_running: int = Field(256, ge=1)
    timeout_s: float = Field(120.0, gt=0, le=86_400)
    drain_s: float = Field(30.0, ge=0)
    trust_remote_code: bool = False

    def keys(self) -> Keys:
        """Those of clients.

        Raises:
            OSError, ValueError: the file can't be read, or holds none that can be taken.
        """
        # Of a file alone: a variable that some machine lacks would leave a replica there open to everybody.
        return Keys() if self.api_keys is None else Keys.read(self.api_keys, "")


class Replica:
    """One process: an engine, and the routes of `ia3 serve` but for those that change what is served.

    A change that a client asks for would reach one replica, and none that starts later. The folder reaches all.

    Args:
        given: what `app` was given.
    """

    def __init__(self, given: Arguments) -> None:
        log_in_lines()
        self._keys = given.keys()
        if not self._keys:
            _logger.warning("Everybody who reaches Ray's proxy may ask: api_keys is a file with the clients' keys.")
        limits = Limits(
            batch_size=given.batch_size,
            gather_s=given.gather_ms / 1000,
            most_waiting=given.max_queue,
            batch_invariant=given.batch_invariant,
        )
        self._limits = RequestLimits(running=given.max_running, answer_s=given.timeout_s)
        self._engine = start(given.base, given.adapters, limits, trust_remote_code=given.trust_remote_code)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray asks for the application that it sends requests to."""
        return make_app(self._engine, keys=self._keys, limits=self._limits)

    def check_health(self) -> None:
        """What Ray asks every ten seconds; a replica that raises is replaced."""
        if not self._engine.ready:
            raise RuntimeError("The engine has stopped: this replica answers nobody any more.")

    def __del__(self) -> None:
        """What Ray calls once a replica that it stops has no request under way."""
        self._engine.close()


def app(args: dict[str, Any]) -> serve.Application:
    """The application that `serve run`, `serve deploy` and `ray.serve.run` start.

    Args:
        args: the fields of `Arguments`, as the command line or the `args` of a configuration file have them.

    Returns:
        One deployment, named `ia3`, of which Ray's own configuration may change anything, such as `num_replicas` or
        `autoscaling_config`.

    Raises:
        pydantic.ValidationError: a field that is missing, unknown or can't be so.
        FileNotFoundError: there is no such folder or file of keys.
        ValueError: keys that can't be taken.

    Example:
        >>> from ray import serve
        >>> serve.run(app({"base": "google/flan-t5-small", "adapters": "/shared/runs", "replicas": 4}))
    """
    given = Arguments.model_validate(args)
    # What isn't there shows here, and not as a replica that never starts.
    given.keys()
    if not given.adapters.is_dir():
        raise FileNotFoundError(
            f"There is no folder {given.adapters}: `adapters` is one that holds a folder for each adapter."
        )
    deployment = serve.deployment(serve.ingress()(Replica), name="ia3").options(
        num_replicas=given.replicas,
        ray_actor_options={"num_gpus": 1 if given.use_gpu else 0},
        # The engine itself says when it is too much. Ray's own queue has no end and says nothing.
        max_ongoing_requests=given.max_queue + given.batch_size,
        graceful_shutdown_timeout_s=given.drain_s,
    )
    return deployment.bind(given)

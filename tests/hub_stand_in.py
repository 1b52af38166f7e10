"""A hub in a thread: the endpoints that pushing and loading an adapter need, over real HTTP, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "me"
PULL_REQUEST = "refs/pr/1"
NO_REPOSITORY, NO_REVISION, NO_ENTRY = "RepoNotFound", "RevisionNotFound", "EntryNotFound"

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, and branches that point to them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        number = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[number] = self.at(branch) | files
        self.branches[branch] = number
        return number

    def at(self, revision: str) -> Files:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    query: dict[str, str]
    token: str | None
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RefusedError(Exception):
    """An answer other than success, with the hub's own error code."""

    status: int
    code: str = ""
    message: str = ""

    def headers(self) -> dict[str, str]:
        return {"X-Error-Code": self.code, "X-Error-Message": self.message}


@dataclass
class Hub:
    """The state of the stand-in.

    Args:
        url: where it listens.
        token: the one token that may write and read what is private.
        large: the suffixes of the files that go up as large files, as the hub's `.gitattributes` has it.
    """

    url: str
    token: str
    large: tuple[str, ...] = (".safetensors", ".bin")
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def put_folder(self, name: str, folder: Path) -> None:
        """Publish a folder without going through HTTP."""
        self.create(name).commit("main", {path.name: path.read_bytes() for path in folder.iterdir()})

    def create(self, name: str, *, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        number = repository.branches["main"] = "0" * 40
        repository.commits[number] = {}
        return repository

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests whose whole path matches."""
        return [r for r in self.requests if r.method == method and re.fullmatch(pattern, r.path)]

    # Answering

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(request)
        if request.token not in (None, self.token):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, message="Invalid credentials in Authorization header")
        for method, pattern, action in self._routes():
            match = re.fullmatch(pattern, request.path)
            if match is not None and request.method in method.split():
                answer = action(request, *(unquote(group) for group in match.groups() if group is not None))
                return answer if isinstance(answer, tuple) else (HTTPStatus.OK, {}, json.dumps(answer).encode())
        raise RefusedError(HTTPStatus.NOT_FOUND)

    def _routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        name = r"([^/]+/[^/]+)"
        api = rf"/api/models/{name}"
        return [
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", rf"{api}/branch/([^/]+)", self._branch),
            ("POST", rf"{api}/preupload/([^/]+)", self._preupload),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", "/uploads/([0-9a-f]{64})", self._upload),
            ("POST", rf"{api}/commit/([^/]+)", self._commit),
            ("POST", rf"{api}/discussions", self._discussion),
            ("GET", rf"{api}/discussions/(\d+)", self._discussion_details),
            ("GET", rf"{api}(?:/revision/([^/]+))?", self._info),
            ("GET HEAD", rf"/{name}/resolve/([^/]+)/(.+)", self._resolve),
        ]

    def _create(self, request: Request) -> Any:
        self._check_writer(request)
        wanted = request.json()
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        known = name in self.repositories
        if not known:
            self.create(name, private=wanted.get("visibility") == "private")
        content = json.dumps({"url": f"{self.url}/{name}", "name": name}).encode()
        return (HTTPStatus.CONFLICT if known else HTTPStatus.OK, {}, content)

    def _validate(self, request: Request) -> Any:
        """Refuse a card whose base model is no name of a repository, as the hub does."""
        metadata = re.match(r"---\n(.*?\n)---\n", request.json()["content"], re.DOTALL)
        base = re.search(r"^base_model: *(.*)$", metadata[1], re.MULTILINE) if metadata else None
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1].strip("'\"")):
            errors = [{"message": f'"base_model" with value {base[1]} is not valid.'}]
            return (HTTPStatus.BAD_REQUEST, {}, json.dumps({"errors": errors, "warnings": []}).encode())
        return {"errors": [], "warnings": []}

    def _branch(self, request: Request, name: str, branch: str) -> Any:
        self._check_writer(request)
        repository = self._readable(request, name)
        if branch in repository.branches:
            raise RefusedError(HTTPStatus.CONFLICT)
        repository.branches[branch] = repository.branches["main"]
        return {}

    def _preupload(self, request: Request, name: str, revision: str) -> Any:
        self._check_writer(request)
        self._files(request, name, revision)
        paths = [file["path"] for file in request.json()["files"]]
        modes = {path: "lfs" if path.endswith(self.large) else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def _batch(self, request: Request, name: str) -> Any:
        self._check_writer(request)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.url}/uploads/{wanted['oid']}", "header": {}}}}
            for wanted in request.json()["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _upload(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise RefusedError(HTTPStatus.BAD_REQUEST)
        self.uploads[oid] = request.body
        return {}

    def _commit(self, request: Request, name: str, revision: str) -> Any:
        self._check_writer(request)
        repository = self._readable(request, name)
        files: Files = {}
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, request.body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        pull_request = "create_pr" in request.query
        if pull_request:
            revision = self._pull_request_of(repository)
        number = repository.commit(revision, files)
        url = f"{self.url}/{name}"
        answer = {"commitUrl": f"{url}/commit/{number}", "commitOid": number, "success": True}
        return answer | ({"pullRequestUrl": f"{url}/discussions/1"} if pull_request else {})

    def _discussion(self, request: Request, name: str) -> Any:
        self._check_writer(request)
        self._pull_request_of(self._readable(request, name))
        return {"num": 1}

    def _discussion_details(self, request: Request, name: str, number: str) -> Any:
        return {
            "title": "",
            "num": int(number),
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "draft",
            "repo": {"name": name, "type": "model"},
            "isPullRequest": True,
            "events": [],
            "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main"},
        }

    def _pull_request_of(self, repository: Repository) -> str:
        repository.branches.setdefault(PULL_REQUEST, repository.branches["main"])
        return PULL_REQUEST

    def _info(self, request: Request, name: str, revision: str = "main") -> Any:
        files = self._files(request, name, revision)
        repository = self.repositories[name]
        number = repository.branches.get(revision, revision)
        siblings = [{"rfilename": path} for path in files]
        told = {"sha": number, "private": repository.private, "tags": [], "siblings": siblings}
        return {"id": name, "modelId": name, **told}

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Any:
        files = self._files(request, name, revision)
        repository = self.repositories[name]
        number = repository.branches.get(revision, revision)
        if path not in files:
            raise RefusedError(HTTPStatus.NOT_FOUND, NO_ENTRY)
        headers = {"ETag": f'"{_etag(files[path])}"', "X-Repo-Commit": number}
        return (HTTPStatus.OK, headers, files[path])

    # Checking

    def _check_writer(self, request: Request) -> None:
        if request.token != self.token:
            raise RefusedError(HTTPStatus.UNAUTHORIZED)

    def _readable(self, request: Request, name: str) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and request.token != self.token):
            raise RefusedError(HTTPStatus.NOT_FOUND if request.token else HTTPStatus.UNAUTHORIZED, NO_REPOSITORY)
        return repository

    def _files(self, request: Request, name: str, revision: str) -> Files:
        repository = self._readable(request, name)
        try:
            return repository.at(revision)
        except KeyError:
            raise RefusedError(HTTPStatus.NOT_FOUND, NO_REVISION) from None


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            target = urlsplit(self.path)
            token = self.headers.get("Authorization")
            request = Request(
                self.command,
                target.path,
                {key: values[0] for key, values in parse_qs(target.query).items()},
                token.removeprefix("Bearer ") if token else None,
                self._body(),
            )
            try:
                status, headers, content = hub.answer(request)
            except RefusedError as refused:
                status, headers, content = refused.status, refused.headers(), b"{}"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 (the base class's names)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A hub that listens on a free port of this machine."""
    hub = Hub("", token)
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

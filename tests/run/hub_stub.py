"""A hub on 127.0.0.1 that answers what huggingface_hub asks when a repository is made and files are committed to it.

It keeps every request, and the files of every commit by name. `refuse` maps a step ("create", "validate", "preupload",
"commit", "info") to a status it answers there instead; it then repeats the caller's token in its answer, as a careless
server might.
"""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from loopback import listening


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Hub:
    """What was asked, what was committed {repository: {name: bytes}}, and what is refused {step: status}."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)


def step_of(method: str, path: str) -> str:
    """Which call of the client this is."""
    if method == "GET":
        return "info"
    if path.endswith(("/api/repos/create", "/api/validate-yaml")):
        return "create" if path.endswith("create") else "validate"
    return path.split("/")[-2]


def _create(hub: Hub, path: str, body: dict) -> tuple[int, dict]:
    name = f"{body['organization']}/{body['name']}"
    found = name in hub.repositories
    hub.repositories.setdefault(name, {})
    hub.private.setdefault(name, body.get("visibility") == "private" or bool(body.get("private")))
    return 409 if found else 200, {"url": f"{hub.url}/{name}", "name": name, "error": "already there"}


def _preupload(hub: Hub, path: str, body: dict) -> tuple[int, dict]:
    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in body["files"]]
    return 200, {"files": files}


def _commit(hub: Hub, path: str, lines: list[dict]) -> tuple[int, dict]:
    name = "/".join(path.split("/")[3:5])
    repository = hub.repositories[name]
    for line in lines:
        if line["key"] == "file":
            value = line["value"]
            assert value["encoding"] == "base64"
            repository[value["path"]] = base64.b64decode(value["content"])
        assert line["key"] in ("header", "file"), line["key"]
    return 200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


def _answer(hub: Hub, request: Request) -> tuple[int, dict]:
    path = request.path.partition("?")[0]
    step = step_of(request.method, path)
    if step in hub.refuse:
        said = f"refused: {request.headers.get('authorization')}"
        return hub.refuse[step], {"error": said, "errors": [{"message": said}]}
    if step == "info":
        return 404, {"error": "no such repository"}
    if step == "commit":
        return _commit(hub, path, [json.loads(line) for line in request.body.splitlines()])
    body = json.loads(request.body)
    if step == "validate":
        return 200, {"errors": [], "warnings": []}
    return {"create": _create, "preupload": _preupload}[step](hub, path, body)


@contextmanager
def running():
    """A Hub that listens at `hub.url` until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self):
            length = int(self.headers.get("Content-Length", 0))
            headers = {k.lower(): v for k, v in self.headers.items()}
            hub.requests.append(Request(self.command, self.path, headers, self.rfile.read(length)))
            status, answer = _answer(hub, hub.requests[-1])
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400 and "refused" in answer.get("error", ""):
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _handle

        def log_message(self, *_):
            """Say nothing."""

    with listening(Handler) as hub.url:
        yield hub

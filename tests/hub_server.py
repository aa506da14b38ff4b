"""A small Hub-shaped server on 127.0.0.1: what huggingface_hub asks for when it pushes a
folder and loads it again. State is in memory; writes need the right bearer token."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"


class Repo:
    """Files by path, and the commits that put them there."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.lfs: set[str] = set()
        self.commits: list[str] = ["0" * 40]

    @property
    def sha(self) -> str:
        return self.commits[-1]


class HubState:
    """Everything that the server knows."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.unknown: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """Routes, as (method, pattern, function)."""

    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output quiet."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        is_write = method in ("POST", "PUT") and not path.startswith("/lfs/")
        if is_write and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid credentials"}, 401)
            return
        for verb, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (verb == method or (verb == "GET" and method == "HEAD")):
                function(self, *match.groups())
                return
        self.state.unknown.append(f"{method} {path}")
        self._json({"error": f"no route for {method} {path}"}, 404)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, content in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repo(self, name: str) -> Repo | None:
        repo = self.state.repos.get(name)
        if repo is None:
            headers = {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"}
            self._send(b'{"error": "Repository not found"}', 404, headers)
        return repo

    def create(self) -> None:
        payload = json.loads(self.body)
        name = f"{payload.get('organization') or 'user'}/{payload['name']}"
        status = 409 if name in self.state.repos else 200
        self.state.repos.setdefault(name, Repo())
        self._json({"url": f"{self._base()}/{name}", "name": name, "id": name}, status)

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name: str) -> None:
        objects = [
            {
                **{key: wanted[key] for key in ("oid", "size")},
                "actions": {"upload": {"href": f"{self._base()}/lfs/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._json({"error": "the content does not have this sha256"}, 400)
            return
        self.state.objects[oid] = self.body
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.state.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    self._json({"error": f"{value['path']} was not uploaded"}, 400)
                    return
                repo.files[value["path"]] = content
                repo.lfs.add(value["path"])
        repo.commits.append(hashlib.sha1(self.body + repo.sha.encode()).hexdigest())
        url = f"{self._base()}/{name}/commit/{repo.sha}"
        self._json({"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, name: str, *_: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            siblings = [{"rfilename": path} for path in repo.files]
            self._json({"id": name, "modelId": name, "sha": repo.sha, "siblings": siblings})

    def tree(self, name: str, *_: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            self._json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                    for path, content in repo.files.items()
                ]
            )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        content = repo.files.get(path)
        headers = {"X-Repo-Commit": repo.sha}
        if content is None:
            self._send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        headers |= {"ETag": f'"{_oid(content)}"', "X-Linked-Size": str(len(content))}
        self._send(content, 200, headers)

    def whoami(self) -> None:
        self._json({"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})

    def _base(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", "/api/whoami-v2", Handler.whoami),
]


@contextmanager
def hub_server() -> Iterator[tuple[str, HubState]]:
    """Run the server on a free port of 127.0.0.1; gives its address and its state."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

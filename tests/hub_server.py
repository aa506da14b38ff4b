"""A small Hub on 127.0.0.1, in memory: the routes that pushing and loading a model use.

with HubServer({"a-token": "a-user"}) as hub:
    ...  # clients with HF_ENDPOINT=hub.url
hub.repos["a-user/name"].commits[-1].files["config.json"].content

Files ending in one of LFS_SUFFIXES take the LFS route: batch, PUT to a signed address,
verify; what arrives must have the announced size and sha256. Routes that are not here
answer 404 and stand in `unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """sha256 of an LFS file, git's blob id of another; what the client compares."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        by_oid = {commit.oid: commit for commit in self.commits}
        return self.branches.get(revision) or by_oid.get(revision)

    def commit(self, branch: str, message: str, files: dict[str, StoredFile]) -> Commit:
        commit = Commit(secrets.token_hex(20), message, files)
        self.commits.append(commit)
        self.branches[branch] = commit
        return commit


class Refused(Exception):
    """An answer other than 200; `code` is what the Hub puts in X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """Serves from a thread while the `with` block runs.

    Args:
        users: bearer token -> user; a user may write in their own namespace only.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.signature = secrets.token_hex(8)
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Request(BaseHTTPRequestHandler):
    """One request: read the body whole, find the route, answer JSON or bytes."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def answer(self) -> None:
        body = self._body()
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        line = f"{self.command} {unquote(address.path)}"
        method = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append(line)
            try:
                for wanted, pattern, route in ROUTES:
                    found = re.fullmatch(pattern, address.path)
                    if wanted == method and found:
                        parts = [unquote(part or "") for part in found.groups()]
                        self._send(*route(self, body, *parts))
                        return
                self.hub.unknown.append(line)
                raise Refused(404, f"this test server has no route for {line}")
            except Refused as refused:
                headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
                self._send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent: `hub.requests` has it."""

    def user(self) -> str | None:
        """Who asks; None without a token. A wrong token is refused, as on the Hub."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def writer(self, namespace: str | None = None) -> str:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in (None, user):
            raise Refused(403, f"{user} has no right to write in the namespace {namespace}")
        return user

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        owner = repo_id.split("/")[0]
        if write:
            self.writer(owner)
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user() != owner):
            raise Refused(401 if self.user() is None else 404, "Not found", "RepoNotFound")
        return repo

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def _handler(hub: HubServer) -> type[_Request]:
    class Handler(_Request):
        pass

    Handler.hub = hub
    return Handler


def whoami(request: _Request, _: bytes) -> tuple[int, Any]:
    return 200, {"type": "user", "name": request.writer(), "orgs": []}


def create_repo(request: _Request, body: bytes) -> tuple[int, Any]:
    asked = json.loads(body)
    owner = asked.get("organization") or request.writer()
    request.writer(owner)
    repo_id = f"{owner}/{asked['name']}"
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repos:
        return 409, {"error": "You already created this model repo", "url": url}
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    repo = request.hub.repos[repo_id] = Repo(private)
    attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES)
    first = {".gitattributes": StoredFile(attributes.encode(), lfs=False)}
    repo.commit("main", "initial commit", first)
    return 200, {"url": url, "name": repo_id}


def create_branch(request: _Request, body: bytes, repo_id: str, branch: str) -> tuple[int, Any]:
    repo = request.repo(repo_id, write=True)
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    start = json.loads(body or b"{}").get("startingPoint", "main")
    repo.branches[branch] = request.commit_at(repo, start)
    return 200, {}


def validate_yaml(_: _Request, body: bytes) -> tuple[int, Any]:
    front = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(body)["content"], re.DOTALL)
    if front is None:
        warning = "empty or missing yaml metadata in repo card"
        return 200, {"errors": [], "warnings": [{"message": warning}]}
    try:
        metadata = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    if not isinstance(metadata, dict):
        return 400, {"errors": [{"message": "metadata is not a mapping"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


def preupload(request: _Request, body: bytes, repo_id: str, revision: str) -> tuple[int, Any]:
    files = request.commit_at(request.repo(repo_id, write=True), revision).files
    answers = []
    for asked in json.loads(body)["files"]:
        path = asked["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        answers.append(answer | ({"oid": files[path].oid} if path in files else {}))
    return 200, {"files": answers}


def lfs_batch(request: _Request, body: bytes, repo_id: str) -> tuple[int, Any]:
    request.repo(repo_id, write=True)
    objects = []
    for asked in json.loads(body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in request.hub.lfs:
            query = f"size={asked['size']}&signature={request.hub.signature}"
            upload = {"href": f"{request.hub.url}/storage/{asked['oid']}?{query}", "header": {}}
            verify = {"href": f"{request.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return 200, {"transfer": "basic", "objects": objects}


def lfs_put(request: _Request, body: bytes, oid: str) -> tuple[int, Any]:
    """The address is signed and carries no bearer token, as with real object storage."""
    if request.query.get("signature") != request.hub.signature:
        raise Refused(403, "SignatureDoesNotMatch")
    if str(len(body)) != request.query.get("size"):
        raise Refused(400, f"{len(body)} bytes arrived, {request.query.get('size')} were announced")
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, f"what arrived does not have the sha256 {oid}")
    request.hub.lfs[oid] = body
    return 200, b""


def lfs_verify(request: _Request, body: bytes, repo_id: str) -> tuple[int, Any]:
    request.repo(repo_id, write=True)
    asked = json.loads(body)
    if len(request.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, f"the object {asked['oid']} did not arrive")
    return 200, {}


def make_commit(request: _Request, body: bytes, repo_id: str, revision: str) -> tuple[int, Any]:
    repo = request.repo(repo_id, write=True)
    files = dict(request.commit_at(repo, revision).files)
    message = ""
    for line in body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            stored = request.hub.lfs.get(value["oid"])
            if stored is None or len(stored) != value["size"]:
                raise Refused(400, f"the LFS object of {value['path']} was not uploaded")
            files[value["path"]] = StoredFile(stored, lfs=True)
        elif key == "deletedFile" and value["path"] in files:
            del files[value["path"]]
        else:
            raise Refused(400, f"cannot {key} {value}")
    pull_request = request.query.get("create_pr") == "1"
    number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
    branch = f"refs/pr/{number}" if pull_request else revision
    commit = repo.commit(branch, message, files)
    url = f"{request.hub.url}/{repo_id}"
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
    if pull_request:
        answer["pullRequestUrl"] = f"{url}/discussions/{number}"
    return 200, answer


def model_info(request: _Request, _: bytes, repo_id: str, revision: str) -> tuple[int, Any]:
    repo = request.repo(repo_id)
    commit = request.commit_at(repo, revision or "main")
    siblings = [{"rfilename": path} for path in commit.files]
    return 200, {
        "id": repo_id,
        "sha": commit.oid,
        "private": repo.private,
        "tags": [],
        "siblings": siblings,
    }


def tree(
    request: _Request, _: bytes, repo_id: str, revision: str, folder: str
) -> tuple[int, Any, dict[str, str]]:
    commit = request.commit_at(request.repo(repo_id), revision)
    prefix = f"{folder}/" if folder else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    entries: dict[str, dict[str, Any]] = {}
    for path, file in inside.items():
        parents = path.removeprefix(prefix).split("/")[:-1]
        for depth in range(len(parents) if recursive else min(1, len(parents))):
            name = prefix + "/".join(parents[: depth + 1])
            oid = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
        if recursive or not parents:
            size = len(file.content)
            entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": size}
            if file.lfs:
                entries[path]["lfs"] = {"oid": file.oid, "size": size, "pointerSize": 134}
    return 200, list(entries.values()), {"X-Repo-Commit": commit.oid}


def resolve(
    request: _Request, _: bytes, repo_id: str, revision: str, path: str
) -> tuple[int, Any, dict[str, str]]:
    commit = request.commit_at(request.repo(repo_id), revision)
    file = commit.files.get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "none"}
    if file.lfs:
        # The Hub redirects to another host here; one server has only one.
        headers["X-Linked-Size"] = str(len(file.content))
        headers["X-Linked-ETag"] = headers["ETag"]
    return 200, file.content, headers


REPO, REST = r"([^/]+/[^/]+?)", r"(.+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/{REST}", create_branch),
    ("POST", f"/api/models/{REPO}/preupload/{REST}", preupload),
    ("POST", f"/api/models/{REPO}/commit/{REST}", make_commit),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/{REST})?", tree),
    ("GET", f"/api/models/{REPO}(?:/revision/{REST})?", model_info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", lfs_verify),
    ("PUT", "/storage/([0-9a-f]{64})", lfs_put),
    ("GET", f"/{REPO}/resolve/([^/]+)/{REST}", resolve),
]

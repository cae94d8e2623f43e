"""A small stand-in for the Hugging Face Hub on 127.0.0.1: what tests push to and load from, without a network.

It answers the requests with which `huggingface_hub`, `datasets` and `transformers` create repositories of models,
data sets and Spaces, upload, commit, list and download, as far as the tests of this project need it. It does not know
Xet, redirects to other hosts, pull requests, gated repositories and uploads in parts. What works here is rightly
asked; that huggingface.co accepts it, only huggingface.co can tell.

The clients are not patched, but read their settings when they are imported. So they run in a process of their own:

    with HubStandin() as hub:
        print(hub.run("from huggingface_hub import whoami; print(whoami()['name'])", home=tmp_path))
        hub.fail(status=503, path="/commit/")  # the next request for such a path
        held = hub.hold("/commit/")  # it waits there, half read, until held.go_on() or held.drop()
        hub.repositories["dataset", "user/name"].log()[0].files["README.md"]
        assert hub.unknown == []  # requests that it did not understand, answered with 501

Everything is kept in memory. A commit is there with all its files or not at all, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote

USER = "user"
TOKEN = "hf_" + "x" * 34
_LFS_SUFFIXES = {".arrow", ".bin", ".jpeg", ".jpg", ".onnx", ".parquet", ".png", ".pt", ".pth", ".safetensors"}


@dataclass(frozen=True)
class File:
    """Content under a path of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of the content, or of the pointer that stands for it."""
        blob = self.content
        if self.lfs:
            blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(blob)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree lists it."""
        size, sha256 = len(self.content), self.sha256
        lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid, **lfs}


@dataclass(frozen=True, eq=False)
class Commit:
    """All files at one time."""

    oid: str
    parent: Commit | None
    title: str
    date: str
    files: dict[str, File]


@dataclass
class Repository:
    """Commits and the branches that point to them."""

    kind: str
    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.kind} {self.id} {len(self.commits)} {title}".encode()).hexdigest()
        commit = Commit(oid, parent, title, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), files)
        self.branches[branch] = self.commits[oid] = commit
        return commit

    def log(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first; the last is the empty one that creation makes."""
        found, commit = [], self.branches[branch]
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found


@dataclass
class _Fault:
    requests: int | None
    status: int | None
    path: str
    body: str
    skip: int
    hold: Hold | None = None


class Hold:
    """A request that waits at the server, half read.

    Attributes:
        reached: Set when it has come.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._decided = threading.Event()
        self._dropped = False

    def go_on(self) -> None:
        """Read the rest and answer."""
        self._decided.set()

    def drop(self) -> None:
        """Forget it, as if the rest had never come."""
        self._dropped = True
        self._decided.set()

    def wait(self) -> bool:
        """For the server: whether to go on."""
        self.reached.set()
        return self._decided.wait(600) and not self._dropped


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubStandin:
    """The server and its state; a context manager.

    Attributes:
        url: Its address, for HF_ENDPOINT.
        repositories: By kind ("model", "dataset" or "space") and id ("user/name").
        requests: (method, path, status) of all that was asked; status 0 where the connection was dropped.
        unknown: (method, path) of what it did not understand.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.unknown: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}  # LFS objects by sha256, whether or not a commit names them
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(
        self,
        requests: int | None = 1,
        status: int | None = 503,
        path: str = "",
        *,
        body: str = "",
        skip: int = 0,
    ) -> None:
        """Fail the next requests.

        Args:
            requests: How many; None: all.
            status: The HTTP status that they get; None drops the connection without an answer.
            path: Only requests whose method and path, such as "PUT /lfs/", this regular expression finds.
            body: And whose body this one finds (a repository's creation says its name there only).
            skip: So many requests of the kind are answered before.
        """
        self._faults.append(_Fault(requests, status, path, body, skip))

    def mend(self) -> None:
        """No more failures."""
        self._faults.clear()

    def hold(self, path: str, skip: int = 0) -> Hold:
        """Let the next request whose method and path this regular expression finds wait, half read.

        The first `skip` such requests are answered.
        """
        hold = Hold()
        self._faults.append(_Fault(1, None, path, "", skip, hold))
        return hold

    def fault(self, path: str, body: bytes | None) -> _Fault | None:
        """What is due for a request, counted: a hold before its body is read, a failure after."""
        with self.lock:
            for fault in self._faults:
                if (fault.hold is None) == (body is None) or fault.requests == 0 or not re.search(fault.path, path):
                    continue
                if fault.body and not re.search(fault.body, body.decode(errors="replace")):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                if fault.requests is not None:
                    fault.requests -= 1
                return fault
        return None

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The variables with which a client process talks to this server only, and keeps its cache in `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",  # said, as the conftest of the tests sets it where it is absent
            "HF_HUB_DISABLE_XET": "1",  # else uploads go there without asking
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return kept | settings | ({} if token is None else {"HF_TOKEN": token})

    def run(self, script: str, *arguments: object, home: Path, token: str | None = TOKEN) -> str:
        """Run Python code as a client in a process of its own; `arguments` are its `sys.argv[1:]`.

        Returns what it prints; raises RuntimeError with its error messages where it fails.
        """
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment(home, token), capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the client ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout


class _Handler(BaseHTTPRequestHandler):
    """One request: finds its route below, and answers with what that returns or raises."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms
    hub: HubStandin

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        status, asked = 0, f"{self.command} {path}"
        try:
            held = self.hub.fault(asked, None)
            start = self._read_body(half=True) if held else b""
            if held and not held.hold.wait():
                self.close_connection = True
                return
            self.body = start + self._read_body(after=len(start))
            fault = self.hub.fault(asked, self.body)
            if fault and fault.status is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault:
                raise _RefusedError(fault.status, "a fault that the test asked for")
            function, arguments = self._route(path)
            with self.hub.lock:
                result = function(self, **arguments)
            status, headers, content = result if isinstance(result, tuple) else (200, {}, result)
            self._send(status, headers, content)
        except _RefusedError as refused:
            status = refused.status
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(status, headers, {"error": refused.message})
        finally:
            self.hub.requests.append((self.command, self.path, status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _read_body(self, after: int = 0, half: bool = False) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            left = int(self.headers.get("Content-Length") or 0) - after
            return self.rfile.read(left // 2 if half else left)
        if half:
            return b""
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str) -> tuple[Callable[..., Any], dict[str, str]]:
        for methods, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return function, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        self.hub.unknown.append((self.command, self.path))
        raise _RefusedError(501, f"the stand-in does not know {self.command} {path}")

    def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return USER if token else None

    def repository(self, kind: str, id: str, write: bool = False) -> Repository:
        user = self.user()
        found = self.hub.repositories.get((_singular(kind), id))
        if found is None or (found.private and not user):
            raise _RefusedError(404 if user else 401, f"Repository {id} not found", "RepoNotFound")
        if write and not user:
            raise _RefusedError(401, "Invalid username or password.")
        return found

    def commit(self, kind: str, id: str, revision: str) -> Commit:
        repository = self.repository(kind, id)
        found = repository.branches.get(revision) or repository.commits.get(revision)
        if found is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


def _singular(kind: str) -> str:
    return kind.removesuffix("s")


def _listing(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries of the files and folders below a folder ("" for all), by path."""
    found: dict[str, dict[str, Any]] = {}
    start = folder.rstrip("/") + "/" if folder else ""
    for path, file in commit.files.items():
        if path.startswith(start):
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = start + "/".join(parts[:depth])
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": commit.oid}
            if recursive or len(parts) == 1:
                found[path] = file.entry(path)
    last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}
    return [found[path] | last for path in sorted(found)]


# What it answers


def _whoami(request: _Handler) -> Any:
    if request.user() is None:
        raise _RefusedError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return {"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "isPro": False, "auth": token}


def _create(request: _Handler) -> Any:
    _whoami(request)
    asked = request.json()
    kind, id = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
    url = f"{request.hub.url}/{'' if kind == 'model' else kind + 's/'}{id}"
    if (kind, id) in request.hub.repositories:
        return 409, {}, {"error": f"You already created this {kind} repo", "url": url}  # clients read the url here too
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    repository = request.hub.repositories[kind, id] = Repository(kind, id, private)
    repository.add("main", "initial commit", {".gitattributes": File(b"*.parquet filter=lfs\n", lfs=False)})
    return {"url": url, "name": id, "id": id}


def _info(request: _Handler, kind: str, id: str, revision: str = "main") -> Any:
    commit = request.commit(kind, id, revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if request.query.get("blobs"):
        siblings = [{"rfilename": path, **file.entry(path), "blobId": file.oid} for path, file in commit.files.items()]
    private = request.repository(kind, id).private
    known = {"_id": id, "id": id, "modelId": id, "author": id.split("/")[0], "private": private, "gated": False}
    return known | {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings, "tags": [], "cardData": {}}


def _tree(request: _Handler, kind: str, id: str, revision: str, folder: str = "") -> Any:
    found = _listing(request.commit(kind, id, revision), folder, request.query.get("recursive", "").lower() == "true")
    if folder and not found:
        raise _RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return found


def _paths_info(request: _Handler, kind: str, id: str, revision: str) -> Any:
    as_json = "json" in request.headers.get("Content-Type", "")
    asked = request.json()["paths"] if as_json else parse_qs(request.body.decode()).get("paths", [])
    known = _listing(request.commit(kind, id, revision), "", recursive=True)
    return [entry for entry in known if entry["path"] in {path.strip("/") for path in asked}]


def _refs(request: _Handler, kind: str, id: str) -> Any:
    branches = request.repository(kind, id).branches.items()
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid} for name, commit in branches]
    return {"branches": listed, "tags": [], "converts": []}


def _commits(request: _Handler, kind: str, id: str, revision: str) -> Any:
    return [
        {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date, "authors": [{"user": USER}]}
        for commit in request.repository(kind, id).log(revision)
    ]


def _branch(request: _Handler, kind: str, id: str, revision: str) -> Any:
    branches = request.repository(kind, id, write=True).branches
    if revision in branches:
        raise _RefusedError(409, f"Reference already exists: refs/heads/{revision}")
    branches[revision] = request.commit(kind, id, request.json().get("startingPoint") or "main")
    return {}


def _preupload(request: _Handler, kind: str, id: str, revision: str) -> Any:
    request.repository(kind, id, write=True)
    current, answers = request.commit(kind, id, revision).files, []
    for asked in request.json()["files"]:
        lfs = Path(asked["path"]).suffix in _LFS_SUFFIXES or b"\0" in base64.b64decode(asked.get("sample") or "")
        old = current.get(asked["path"])
        oid = None if old is None else old.sha256 if old.lfs else old.oid  # equal: the client skips the file
        mode = "lfs" if lfs or asked["size"] > 10 * 2**20 else "regular"
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers}


def _lfs_batch(request: _Handler, id: str, kind: str = "models") -> Any:
    request.repository(kind, id, write=True)
    answers = []
    for asked in request.json()["objects"]:
        href = f"{request.hub.url}/lfs/{asked['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        present = asked["oid"] in request.hub.uploads
        answers.append({"oid": asked["oid"], "size": asked["size"]} | ({} if present else {"actions": actions}))
    return {"transfer": "basic", "objects": answers}


def _lfs_upload(request: _Handler, oid: str) -> Any:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _RefusedError(422, "the content does not have this sha256")
    request.hub.uploads[oid] = request.body
    return {}


def _lfs_verify(request: _Handler, oid: str) -> Any:
    if len(request.hub.uploads.get(oid, b"")) != request.json()["size"]:
        raise _RefusedError(404, "there is no such object of this size")
    return {}


def _commit(request: _Handler, kind: str, id: str, revision: str) -> Any:
    repository = request.repository(kind, id, write=True)
    head = request.commit(kind, id, revision)
    files, header = dict(head.files), {}
    for line in request.body.splitlines():
        operation = json.loads(line)
        value, path = operation["value"], operation["value"].get("path", "").strip("/")
        match operation["key"]:
            case "header":
                header = value
            case "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile":
                if value["oid"] not in request.hub.uploads:
                    raise _RefusedError(400, f"{path} names an LFS object that was not uploaded")
                files[path] = File(request.hub.uploads[value["oid"]], lfs=True)
            case "deletedFile":
                files.pop(path, None)
            case "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path + "/")}
            case other:
                raise _RefusedError(501, f"the stand-in does not know the commit operation {other}")
    if header.get("parentCommit") not in (None, head.oid):
        raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
    commit = repository.add(revision, header.get("summary", ""), files)
    return {"success": True, "commitOid": commit.oid, "commitUrl": f"{request.hub.url}/{id}/commit/{commit.oid}"}


def _resolve(request: _Handler, id: str, revision: str, path: str, kind: str = "models") -> Any:
    commit = request.commit(kind, id, revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    file = commit.files.get(path)
    if file is None:
        missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"{path} not found"}
        return 404, headers | missing, b""
    headers["ETag"] = f'"{file.sha256 if file.lfs else file.oid}"'
    if file.lfs:
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(file.content))}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if part is None or request.command == "HEAD":
        return 200, headers, file.content
    start, size = int(part[1]), len(file.content)
    if start >= size:
        raise _RefusedError(416, f"the file ends before byte {start}")
    content = file.content[start : int(part[2]) + 1 if part[2] else size]
    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
    return 206, headers, content


_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
_PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{_ID}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("GET", "/api/agent-harnesses", lambda request: {}),  # asked by the command line
    ("POST", "/api/validate-yaml", lambda request: {"errors": [], "warnings": []}),
    ("GET", _API, _info),
    ("GET", f"{_API}/revision/{_REVISION}", _info),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", _tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", _paths_info),
    ("GET", f"{_API}/refs", _refs),
    ("GET", f"{_API}/commits/{_REVISION}", _commits),
    ("POST", f"{_API}/branch/{_REVISION}", _branch),
    ("POST", f"{_API}/preupload/{_REVISION}", _preupload),
    ("POST", f"{_API}/commit/{_REVISION}", _commit),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _lfs_verify),
    ("GET HEAD", f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
]

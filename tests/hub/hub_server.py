"""A Hugging Face Hub on the loopback: enough of it for the real client to publish and load models.

What it answers is what huggingface_hub 2.4 asks for and what the Hub was seen or read to answer; the test against the
real Hub says whether that reading is right. Files are kept in memory. The storage and CDN origin is the same server
under the name `localhost`, which to the client is another host than 127.0.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

WRITER, READER, STRANGER = "hf_alice_writes", "hf_alice_reads", "hf_bob_writes"
_USERS = {WRITER: ("alice", True), READER: ("alice", False), STRANGER: ("bob", True)}
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LFS_BYTES = 10 * 2**20

Mishap = Literal["status", "reset", "lose", "flip", "close", "cut"]
Action = Mishap | Callable[[], Mishap | None]


def git_sha1(content: bytes) -> str:
    """Digest of a regular file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Request:
    """One line of the log: `body` is the JSON, the list of JSON lines, or the number of bytes that came."""

    method: str
    path: str
    origin: Literal["hub", "storage"]
    authorization: str | None
    body: Any


@dataclass(kw_only=True)
class Fault:
    """What goes wrong with requests that match.

    Attributes:
        method: Of the request.
        pattern: Searched in its path.
        action: `"status"` answers with `status`, and `"reset"` breaks the connection, before anything is done;
            `"lose"` does it and then breaks the connection; `"flip"` changes one byte of the body; `"close"` and
            `"cut"` end the body after `after` bytes, cleanly and with a reset. A function is called first and returns
            what then goes wrong, or None.
        nth: Which matching requests, from 1; None for all.
        status: Of the answer.
        after: Bytes of the body that still arrive.
    """

    method: str
    pattern: str
    action: Action
    nth: tuple[int, ...] | None = None
    status: int = 500
    after: int = 0
    seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is one of those; counts it."""
        if method != self.method or not re.search(self.pattern, path):
            return False
        self.seen += 1
        return self.nth is None or self.seen in self.nth


@dataclass(frozen=True)
class File:
    """A file of a commit; `content` is None where Xet has it."""

    size: int
    sha256: str
    content: bytes | None
    lfs: bool

    @property
    def oid(self) -> str:
        """The digest the Hub names it by."""
        return self.sha256 if self.lfs or self.content is None else git_sha1(self.content)


@dataclass(frozen=True)
class Commit:
    """A snapshot of every file."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or sha."""
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        """Put a commit on top of a branch."""
        parent = self.branches.get(branch)
        listing = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {parent} {title}\n{listing}".encode(), usedforsecurity=False)
        commit = Commit(sha.hexdigest(), parent, title, dict(files))
        self.commits[commit.sha], self.branches[branch] = commit, commit.sha
        return commit

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        commits, sha = [], self.branches.get(branch)
        while sha is not None:
            commits.append(self.commits[sha])
            sha = commits[-1].parent
        return commits


class _RefusedError(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.status = status
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {name: value for name, value in named.items() if value}


@dataclass
class _Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def _json(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(json.dumps(values).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HubServer:
    """The server, its repositories, its log of requests and its faults. A context manager.

    Args:
        xet_folder: Where hf_xet stores, if it is to be used.
    """

    def __init__(self, xet_folder: Path | None = None) -> None:
        self.xet_folder = xet_folder
        self.lock = threading.RLock()
        self.reset()
        self._http = _Listener(self)
        self.port = self._http.server_address[1]
        self.endpoint, self.storage_endpoint = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def reset(self) -> None:
        """Forget everything."""
        with self.lock:
            self.repos: dict[str, Repo] = {}
            self.objects: dict[str, bytes] = {}
            self.requests: list[Request] = []
            self.faults: list[Fault] = []
            self.errors: list[BaseException] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # for tests ------------------------------------------------------------------------------------------------------

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
        title: str = "put",
    ) -> str:
        """Commit files behind the client's back, into a new repository if need be, and return the commit's sha."""
        with self.lock:
            repo = self.repos.get(repo_id) or self._create(repo_id, private)
            repo.gated = gated
            added = {name: self._file(name, content) for name, content in files.items()}
            return repo.commit(branch, title, {**repo.history(branch)[0].files, **added}).sha

    def head(self, repo_id: str, branch: str = "main") -> str | None:
        """Sha of a branch, or None without it."""
        repo = self.repos.get(repo_id)
        return repo.branches.get(branch) if repo else None

    def history(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """Commits of a branch, newest first, without the one a repository is born with."""
        return self.repos[repo_id].history(branch)[:-1]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, str]:
        """Sha256 of every file of a branch."""
        files = self.repos[repo_id].history(branch)[0].files
        return {name: file.sha256 for name, file in files.items() if name != ".gitattributes"}

    def fail(self, method: str, pattern: str, action: Action, *nth: int, status: int = 500, after: int = 0) -> None:
        """Let something go wrong; see `Fault`."""
        fault = Fault(method=method, pattern=pattern, action=action, nth=nth or None, status=status, after=after)
        self.faults.append(fault)

    def heal(self) -> None:
        """Let everything work again, and start a new log."""
        with self.lock:
            self.faults, self.requests = [], []

    def sent(self, pattern: str = "", method: str = "") -> list[str]:
        """The requests that match, as `"METHOD /path"`."""
        lines = [f"{r.method} {r.path}" for r in self.requests if r.method == method or not method]
        return [line for line in lines if re.search(pattern, line)]

    # routes ---------------------------------------------------------------------------------------------------------

    def answer(self, request: Request, raw: bytes, byte_range: str | None) -> _Answer:
        """Serve one request."""
        for method, pattern, route in _ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                with self.lock:
                    values = {name: unquote(value) for name, value in found.groupdict().items()}
                    return route(_Call(self, request, raw, byte_range), **values)
        raise _RefusedError(404, message=f"no route for {request.method} {request.path}")

    def _create(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": self._file(".gitattributes", b"*.safetensors lfs\n")})
        return repo

    def _file(self, name: str, content: bytes) -> File:
        lfs = _is_lfs(name, len(content))
        sha256 = hashlib.sha256(content).hexdigest()
        if lfs:
            self.objects[sha256] = content
        return File(len(content), sha256, content, lfs)

    def xet_hash(self, sha256: str) -> str | None:
        """The hash by which Xet knows a file, from the records of its shards, or None if it does not have it."""
        wanted = _xet_bytes(sha256)
        for shard in sorted(self.xet_folder.rglob("*.mdb")) if self.xet_folder else ():
            data = shard.read_bytes()
            at = _SHARD_HEADER  # records of 48 bytes: a header, its segments, their verifications, the sha256
            while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                verified, described = bool(flags & 1 << 31), bool(flags & 1 << 30)
                end = at + 48 * (1 + segments * (1 + verified))
                if described and data[end : end + 32] == wanted:
                    return _xet_hex(data[at : at + 32])
                at = end + 48 * described
        return None


_SHARD_HEADER = 48


def _xet_bytes(digest: str) -> bytes:
    """Xet writes a hash as four little-endian words."""
    return struct.pack("<4Q", *(int(digest[i : i + 16], 16) for i in range(0, 64, 16)))


def _xet_hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def _is_lfs(name: str, size: int) -> bool:
    return name.endswith(_LFS_SUFFIXES) or size > _LFS_BYTES


@dataclass
class _Call:
    """One request on its way through a route."""

    hub: HubServer
    request: Request
    raw: bytes
    byte_range: str | None

    def user(self) -> tuple[str | None, bool]:
        """Name and right to write; nobody without a token."""
        if self.request.authorization is None:
            return None, False
        try:
            return _USERS[self.request.authorization.removeprefix("Bearer ")]
        except KeyError:
            raise _RefusedError(401, message="Invalid credentials in Authorization header") from None

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """The repository, if the user may know of it."""
        user, writes = self.user()
        repo = self.hub.repos.get(repo_id)
        owner = user == repo_id.partition("/")[0]
        if repo is None or (repo.private and not owner):
            raise _RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise _RefusedError(401, message="Invalid username or password.")
        if write and not (owner and writes):
            raise _RefusedError(403, message="You do not have the right to write here")
        return repo

    def commit(self, repo_id: str, revision: str, *, content: bool = False) -> Commit:
        """The commit of a revision; `content` of a gated repository is its owner's alone."""
        repo = self.repo(repo_id)
        if content and repo.gated and self.user()[0] != repo_id.partition("/")[0]:
            raise _RefusedError(403 if self.user()[0] else 401, "GatedRepo", "Access to this model is restricted")
        commit = repo.find(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # the API --------------------------------------------------------------------------------------------------------

    def whoami(self) -> _Answer:
        user, _ = self.user()
        if user is None:
            raise _RefusedError(401, message="Invalid username or password.")
        return _json({"name": user, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> _Answer:
        user, writes = self.user()
        owner = self.request.body["organization"] or user
        repo_id = f"{owner}/{self.request.body['name']}"
        if user is None:
            raise _RefusedError(401, message="Invalid username or password.")
        if owner != user or not writes:
            raise _RefusedError(403, message=f"You don't have the rights to create a model under {owner}")
        exists = repo_id in self.hub.repos
        if not exists:
            asked = self.request.body.get("visibility") == "private" or self.request.body.get("private") is True
            self.hub._create(repo_id, asked)
        return _json({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self) -> _Answer:
        return _json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> _Answer:
        self.repo(repo_id, write=True)
        present = self.commit(repo_id, revision).files
        return _json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_lfs(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        **({"oid": present[file["path"]].oid} if file["path"] in present else {}),
                    }
                    for file in self.request.body["files"]
                ]
            }
        )

    def lfs_batch(self, repo_id: str) -> _Answer:
        self.repo(repo_id, write=True)
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            if o["oid"] in self.hub.objects
            else {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {
                    "upload": {"href": f"{self.hub.storage_endpoint}/storage/{o['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
                },
            }
            for o in self.request.body["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> _Answer:
        if hashlib.sha256(self.raw).hexdigest() != oid:
            raise _RefusedError(400, message="the content has another digest")
        self.hub.objects[oid] = self.raw
        return _Answer()

    def verify(self) -> _Answer:
        content = self.hub.objects.get(self.request.body["oid"])
        if content is None or len(content) != self.request.body["size"]:
            raise _RefusedError(404, message="there is no such object")
        return _json({})

    def xet_token(self, repo_id: str, kind: str, revision: str) -> _Answer:
        self.repo(repo_id, write=kind == "write")
        self.commit(repo_id, revision)
        if self.hub.xet_folder is None:
            raise _RefusedError(404, message="there is no Xet here")
        url, token, expiry = f"local://{self.hub.xet_folder}", "xet", 2**32
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(expiry),
        }
        return _json({"casUrl": url, "accessToken": token, "exp": expiry}, headers=headers)

    def push(self, repo_id: str, revision: str) -> _Answer:
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header = self.request.body[0]["value"]
        if header.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
            raise _RefusedError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[revision]].files)
        for operation in self.request.body[1:]:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                files[path] = File(len(content), hashlib.sha256(content).hexdigest(), content, lfs=False)
            elif operation["key"] == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                if stored is None and self.hub.xet_hash(value["oid"]) is None:
                    raise _RefusedError(400, message=f"{path} was never uploaded")
                files[path] = File(value["size"], value["oid"], stored, lfs=True)
            elif operation["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise _RefusedError(400, message=f"cannot {operation['key']} {path}")
        commit = repo.commit(revision, header["summary"], files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.sha}"
        return _json({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def create_branch(self, repo_id: str, branch: str) -> _Answer:
        repo = self.repo(repo_id, write=True)
        if branch in repo.branches:
            raise _RefusedError(409, message=f"Reference already exists: {branch}")
        start = (self.request.body or {}).get("startingPoint", "main")
        repo.branches[branch] = self.commit(repo_id, start).sha
        return _json({})

    def refs(self, repo_id: str) -> _Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.repo(repo_id).branches.items()
        ]
        return _json({"branches": branches, "tags": [], "converts": []})

    def info(self, repo_id: str, revision: str = "main") -> _Answer:
        commit, repo = self.commit(repo_id, revision), self.hub.repos[repo_id]
        siblings = []
        for name, file in commit.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.oid[:40]}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(sibling)
        return _json(
            {"id": repo_id, "sha": commit.sha, "private": repo.private, "gated": repo.gated, "siblings": siblings}
        )

    def tree(self, repo_id: str, revision: str) -> _Answer:
        entries = []
        for name, file in self.commit(repo_id, revision).files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid[:40]}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        return _json(entries)

    # files ----------------------------------------------------------------------------------------------------------

    def resolve(self, repo_id: str, revision: str, name: str) -> _Answer:
        commit = self.commit(repo_id, revision, content=True)
        known = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(name)
        if file is None:
            refusal = _RefusedError(404, "EntryNotFound", f"{name} does not exist at {revision}")
            refusal.headers.update(known)
            raise refusal
        if not file.lfs:
            assert file.content is not None
            return self._part(file.content, {**known, "ETag": f'"{file.oid}"'})
        link = f"{self.hub.storage_endpoint}/storage/{file.sha256}"
        headers = {**known, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": link}
        xet_hash = self.hub.xet_hash(file.sha256)
        if xet_hash is not None:
            refresh = f"{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit.sha}"
            headers.update({"X-Xet-Hash": xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'})
        return _Answer(b"", 302, headers)

    def stored(self, oid: str) -> _Answer:
        if oid not in self.hub.objects:
            raise _RefusedError(404, message="there is no such object")
        return self._part(self.hub.objects[oid], {})

    def _part(self, content: bytes, headers: dict[str, str]) -> _Answer:
        found = re.fullmatch(r"bytes=(\d+)-", self.byte_range or "")
        if not found:
            return _Answer(content, 200, headers)
        start = int(found[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return _Answer(content[start:], 206, headers)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., _Answer]], ...] = (
    ("GET", "/api/whoami-v2", _Call.whoami),
    ("POST", "/api/repos/create", _Call.create_repo),
    ("POST", "/api/validate-yaml", _Call.validate_yaml),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", _Call.preupload),
    ("GET", f"/api/models/{_REPO}/xet-(?P<kind>read|write)-token/{_REV}", _Call.xet_token),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", _Call.push),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Call.create_branch),
    ("GET", f"/api/models/{_REPO}/refs", _Call.refs),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}", _Call.tree),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", _Call.info),
    ("GET", f"/api/models/{_REPO}", _Call.info),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Call.lfs_batch),
    ("POST", "/lfs-verify", _Call.verify),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _Call.store),
    ("GET", "/storage/(?P<oid>[0-9a-f]{64})", _Call.stored),
    ("HEAD", f"/{_REPO}/resolve/{_REV}/(?P<name>.+)", _Call.resolve),
    ("GET", f"/{_REPO}/resolve/{_REV}/(?P<name>.+)", _Call.resolve),
)


# HTTP -----------------------------------------------------------------------------------------------------------------


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exc_info()[1]
        if error and not isinstance(error, ConnectionError):  # a client that hangs up is its own business
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    server: _Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        raw = self._body()
        request = Request(
            method=self.command,
            path=urlsplit(self.path).path,
            origin="storage" if self.headers["Host"].startswith("localhost") else "hub",
            authorization=self.headers["Authorization"],
            body=self._parse(raw),
        )
        with hub.lock:
            hub.requests.append(request)
            fault = next((f for f in hub.faults if f.strikes(request.method, request.path)), None)
        action = fault.action() if fault and callable(fault.action) else fault.action if fault else None
        if fault and action == "status":
            return self._send(_json({"error": "as the test asked"}, fault.status))
        if action == "reset":
            return self._reset()
        try:
            answer = hub.answer(request, raw, self.headers["Range"])
        except _RefusedError as refusal:
            answer = _json({"error": "refused"}, refusal.status, refusal.headers)
        if action == "lose":
            return self._reset()
        if action == "flip" and answer.body:
            middle = len(answer.body) // 2
            answer.body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
        if fault and action in ("close", "cut"):
            self._send(answer, fault.after)
            self.close_connection = True
            return self._reset() if action == "cut" else None
        return self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            size = int(self.headers["Content-Length"] or 0)
            raw = self.rfile.read(size)
            if len(raw) < size:
                raise ConnectionError("the client is gone")
            return raw
        chunks = []
        while size := int(self.rfile.readline() or "0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _parse(self, raw: bytes) -> Any:
        kind = self.headers["Content-Type"] or ""
        if "ndjson" in kind:
            return [json.loads(line) for line in raw.splitlines()]
        return json.loads(raw) if raw and "json" in kind else len(raw)

    def _send(self, answer: _Answer, limit: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:limit])

    def _reset(self) -> None:
        """Break the connection so that the other side gets a reset rather than an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the log is `HubServer.requests`."""

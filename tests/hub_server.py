"""A Hugging Face Hub of this machine: the endpoints that huggingface_hub calls to upload a model
and to download it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".onnx")
"""Files that are uploaded on their own, and not within a commit."""
Files = dict[str, bytes]


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        commits: The files of each commit, by repository and hash.
        branches: The newest commit of each branch, by repository.
        damaged: Files that are sent with other bytes.
        asked: "METHOD path" of all requests.
    """

    address: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """Add files to a branch. Returns the hash of the commit."""
        before = self.branches[repo].get(branch)
        whole = {**(self.commits[repo][before] if before else {}), **files}
        number = f"{len(self.commits[repo])} {repo}"
        name = hashlib.sha1(number.encode()).hexdigest()
        self.commits[repo][name] = whole
        self.branches[repo][branch] = name
        return name

    def at(self, repo: str, revision: str) -> str | None:
        """The commit of a branch, or of a hash."""
        commit = self.branches.get(repo, {}).get(revision, revision)
        return commit if commit in self.commits.get(repo, {}) else None


@contextmanager
def hosted_hub() -> Iterator[Hub]:
    """A hub without any repository."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), content_type="application/json")

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """/USER/NAME/resolve/REVISION/FILE, or /api/models/USER/NAME"""
        path = self._path()
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            return self._json({"id": name, "private": name in self.state.private})
        repo, slash, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        hub = self.state
        if not slash or repo not in hub.commits:
            return self._send(404, b"", x_error_code="RepoNotFound")
        commit = hub.at(repo, revision)
        if commit is None:
            return self._send(404, b"", x_error_code="RevisionNotFound")
        if file not in hub.commits[repo][commit]:
            return self._send(404, b"", x_error_code="EntryNotFound", x_repo_commit=commit)
        data = hub.commits[repo][commit][file]
        tag = hashlib.sha256(data).hexdigest()
        if file in hub.damaged:
            data = bytes(len(data))
        return self._send(200, data, etag=f'"{tag}"', x_repo_commit=commit)

    def do_PUT(self) -> None:
        """/objects/HASH: the content of a large file."""
        name = self._path().rpartition("/")[2]
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == name
        self.state.objects[name] = data
        self._send(200, b"")

    def do_POST(self) -> None:
        path = self._path()
        body = self._body()
        if not self.headers.get("authorization"):
            return self._json({"error": "log in"}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        kind = path.removeprefix("/api/models/").split("/")
        repo = "/".join(kind[:2])
        if kind[2] == "preupload":
            return self._modes(json.loads(body))
        return self._commit(repo, "/".join(kind[3:]), body)

    def _create(self, value: dict) -> None:
        repo = f"{value['organization']}/{value['name']}"
        hub = self.state
        address = {"url": f"{hub.address}/{repo}"}
        if repo in hub.commits:
            return self._json({"error": "it exists", **address}, 409)
        hub.commits[repo] = {}
        hub.branches[repo] = {}
        if value.get("private") or value.get("visibility") == "private":
            hub.private.add(repo)
        return self._json(address)

    def _modes(self, value: dict) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in value["files"]
        ]
        self._json({"files": files})

    def _batch(self, value: dict) -> None:
        objects = [
            {
                **entry,
                "actions": {"upload": {"href": f"{self.state.address}/objects/{entry['oid']}"}},
            }
            for entry in value["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        files: Files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        name = self.state.commit(repo, branch, files)
        url = f"{self.state.address}/{repo}/commit/{name}"
        self._json({"success": True, "commitOid": name, "commitUrl": url})

"""A small hub on loopback that speaks with the real `huggingface_hub` client: repositories, branches, commits, LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"  # tokens; the writer may write to the repositories of `owner`
OWNER = "owner"


class Repository:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Enter a commit of files that are added to the branch's."""
        sha = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = {**self.commits[self.branches[branch]], **files}
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub:
    """What the hub holds; `url` is its endpoint. Downloads give the first `cut` bytes of a file."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: int | None = None
        self.url = ""

    def put(self, repository: str, files: dict[str, bytes], private: bool = False) -> str:
        """Make a repository with files; its commit."""
        self.repositories[repository] = Repository(private)
        return self.repositories[repository].commit("main", files)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    do_HEAD = do_POST = do_PUT = lambda self: self._route(self.command)

    def _route(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{method} /{path}")
        words = path.split("/")
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create(json.loads(self.body))
        if words[0] == "lfs":
            self.hub.blobs[words[1]] = self.body
            return self._json({})
        if words[:2] == ["api", "models"]:
            return self._model("/".join(words[2:4]), words[4:])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(self.body))
        if len(words) > 4 and words[2] == "resolve":
            return self._resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        return self._refuse(404, "EntryNotFound")

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_write(self, owner: str | None) -> bool:
        if self._token not in (WRITER, READER):
            self._refuse(401, message="Invalid username or password.")
        elif self._token == READER or owner != OWNER:
            self._refuse(403, message="You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write(asked["organization"]):
            return
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def _readable(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token is None):
            self._refuse(401 if self._token is None else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def _model(self, name: str, rest: list[str]) -> None:
        kind = rest[0] if rest else "revision"
        if kind in ("branch", "preupload", "commit") and not self._may_write(name.split("/")[0]):
            return
        repository = self._readable(name)
        if repository is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        if kind == "branch":
            there = revision in repository.branches
            repository.branches.setdefault(revision, repository.branches["main"])
            return self._json({}, 409 if there else 200)
        found = repository.files(revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "preupload":
            asked = json.loads(self.body)["files"]
            modes = [
                (one["path"], "lfs" if one["path"].endswith((".safetensors", ".pt")) else "regular") for one in asked
            ]
            return self._json(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
            )
        if kind == "commit":
            return self._commit(name, repository, revision)
        if kind == "tree":
            return self._json([self._entry(path, content) for path, content in found[1].items()])
        siblings = [{"rfilename": path} for path in found[1]]
        self._json({"id": name, "sha": found[0], "private": repository.private, "siblings": siblings, "tags": []})

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _commit(self, name: str, repository: Repository, revision: str) -> None:
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(revision, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return
        found = repository.files(revision)
        if found is None or path not in found[1]:
            return self._refuse(404, "EntryNotFound")
        content = found[1][path]
        self.send_response(200)
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        sent = content[: self.hub.cut] if self.command == "GET" else content
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)

    def _refuse(self, status: int, code: str | None = None, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, content: Any, status: int = 200) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

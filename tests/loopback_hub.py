"""A hub on this machine: the endpoints that `huggingface_hub` uses to push and to fetch a model, kept in memory.

As the real one it takes small text files in the commit and all others by the LFS protocol, answers with the commit's hash
and the files' hashes, and knows who may write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_the_owner"
LARGE = (".safetensors", ".png")
MODEL = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Commits by hash, each a dict of files; `main` is the last one."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = "0" * 40

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.main if revision == "main" else revision)


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""


class RefusedError(Exception):
    def __init__(self, status: int, said: str, code: str | None = None):
        self.status, self.said, self.code = status, said, code


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        the_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = TOKEN) -> None:
    """The client of this process as it is with HF_ENDPOINT and HF_TOKEN set, online, and without Xet."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one that was made before knows another address
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token or "")


class _Handler(BaseHTTPRequestHandler):
    the_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.the_hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)):
                    return answer(self, body, **found.groupdict())
            raise RefusedError(404, f"no such address: {path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.said}
            self._send(
                refused.status,
                {"error": refused.said},
                headers | ({"X-Error-Code": refused.code} if refused.code else {}),
            )

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
        content = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.the_hub.repos.get(name)
        if repo is None or (repo.private and not self._owner):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and not self._owner:
            raise RefusedError(403, "This token may not write here")
        return repo

    # ---- endpoints

    def create(self, body: bytes) -> None:
        if not self.headers.get("Authorization"):
            raise RefusedError(401, "Invalid username or password.")
        if not self._owner:
            raise RefusedError(403, "This token may not write here")
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.the_hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.the_hub.address}/{name}"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.the_hub.repos[name] = Repo(private=bool(private), commits={"0" * 40: {}})
        return self._send(200, {"url": f"{self.the_hub.address}/{name}"})

    def validate(self, body: bytes) -> None:
        """The metadata of a card has to be there, name its library, and name a base by an id; the hub checks more."""
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
        base, errors = values.get("base_model"), []
        if "library_name" not in values:
            errors.append("no metadata")
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
        return self._send(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._repo(repo, write=True)
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._send(200, {"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = wanted["oid"] in self.the_hub.objects
            upload = {"upload": {"href": f"{self.the_hub.address}/lfs/{wanted['oid']}"}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if known else {"actions": upload})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "another hash")
        self.the_hub.objects[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        files = dict(found.commits[found.main])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.the_hub.objects[value["oid"]]
        found.main = hashlib.sha1(body + found.main.encode()).hexdigest()
        found.commits[found.main] = files
        address = f"{self.the_hub.address}/{repo}/commit/{found.main}"
        self._send(200, {"success": True, "commitUrl": address, "commitOid": found.main})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        files = found.files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        sha = found.main if revision == "main" else revision
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._send(200, {"id": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repo(repo).files(revision) or {}
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(files.items())
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo)
        files = found.files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if file not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        commit = found.main if revision == "main" else revision
        hash_of_file = hashlib.sha256(files[file]).hexdigest()
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{hash_of_file}"', "X-Repo-Commit": commit}
        self._send(200, files[file], headers)


ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"/api/models/{MODEL}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), f"/{MODEL}.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", _Handler.upload),
    (("POST",), f"/api/models/{MODEL}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), f"/api/models/{MODEL}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), f"/api/models/{MODEL}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET",), f"/api/models/{MODEL}", _Handler.info),
    (("GET", "HEAD"), f"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]

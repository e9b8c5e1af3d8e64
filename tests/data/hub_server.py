"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as writing and reading a repository takes.

Files that end in .safetensors go the way of large files (a batch request, an upload to a storage of its own, a
verification, a pointer in the commit, a redirect on reading); all others are in the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_of_this_test", "someone"
LICENCES = ("mit", "apache-2.0", "cc-by-nc-4.0", "other")


@dataclass
class Repository:
    """Commits by hash, each with all its files; branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def write(self, branch: str, files: dict[str, bytes], message: str) -> str:
        new = {**self.commits[self.branches[branch]], **files}
        digest = hashlib.sha1(repr((len(self.commits), message, sorted(new.items()))).encode()).hexdigest()
        self.commits[digest], self.branches[branch] = new, digest
        self.messages.append(message)
        return digest


@dataclass
class Hub:
    """What the server holds, and what it was asked; the storage of large files has another name than the hub."""

    url: str = ""
    other_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url, hub.other_url = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self._answer_with(path, body)
        except Refused as refusal:
            self._send(
                refusal.status,
                json.dumps({"error": refusal.message}).encode(),
                {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _answer_with(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            return self._of_repository(name, self._repository(name, bool(rest)), rest, body)
        if path.endswith(".git/info/lfs/objects/batch"):
            self._repository(path.strip("/").partition(".git")[0], True)
            return self._json({"objects": [self._upload(one) for one in json.loads(body)["objects"]]})
        if parts[0] == "storage":
            return self._stored(parts[1], body)
        if parts[0] == "verify":
            told = json.loads(body)
            return self._json({}, 200 if len(self.hub.storage[told["oid"]]) == told["size"] else 422)
        if parts[2:3] == ["resolve"]:
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise Refused(404, "", f"{path} is not here")

    # -- repositories ----------------------------------------------------------------------------------

    @property
    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, to_write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._signed_in):
            raise Refused(404 if self._signed_in else 401, "RepoNotFound", "Repository not found")
        if to_write and not self._signed_in:
            raise Refused(401, "", "Invalid username or password.")
        return found

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._signed_in:
            raise Refused(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            raise Refused(403, "", f"You don't have the rights to create a model under {name}")
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self._json({**url, "error": "You already created this model repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(bool(private))
        self._json(url)

    def _validate(self, card: str) -> None:
        front = card.split("---\n")[1]
        named = [line.partition(": ")[2] for line in front.splitlines() if line.startswith("license: ")]
        errors = [] if not named or named[0] in LICENCES else [{"message": '"license" must be one of [...]'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _of_repository(self, name: str, repository: Repository, rest: list[str], body: bytes) -> None:
        match rest:
            case []:
                info = {"id": name, "modelId": name, "private": repository.private, "tags": []}
                self._json({**info, "sha": repository.branches["main"], "siblings": []})
            case ["branch", branch]:
                is_new = branch not in repository.branches
                repository.branches.setdefault(branch, repository.branches["main"])
                self._json({}, 201 if is_new else 409)
            case ["preupload", branch]:
                self._branch(repository, branch)
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._json({"files": modes})
            case ["commit", branch]:
                self._branch(repository, branch)
                self._commit(name, repository, branch, [json.loads(line) for line in body.splitlines()])
            case _:
                raise Refused(404, "", f"{rest} is not here")

    def _branch(self, repository: Repository, branch: str) -> None:
        if branch not in repository.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")

    def _commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = repository.write(branch, files, lines[0]["value"]["summary"])
        self._json(
            {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "success": True}
        )

    # -- files -----------------------------------------------------------------------------------------

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.storage:
            return dict(one)
        actions = {
            "upload": {"href": f"{self.hub.other_url}/storage/{one['oid']}"},
            "verify": {"href": f"{self.hub.url}/verify"},
        }
        return {**one, "authenticated": True, "actions": actions}

    def _stored(self, oid: str, body: bytes) -> None:
        if self._signed_in:
            raise Refused(400, "", "tokens are not for the storage")
        if self.command != "PUT":
            return self._send(200, self.hub.storage[oid], {"ETag": f'"{oid}"'})
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "another checksum")
        self.hub.storage[oid] = body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository.gated:
            raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = repository.commit_of(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in repository.commits[commit]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[commit][file]
        oid = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"'}
        if oid in self.hub.storage:
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return self._send(
                302, b"", {**headers, **linked, "Location": f"{self.hub.other_url}/storage/{oid}"}
            )
        self._send(200, content, headers)

    # -- HTTP ------------------------------------------------------------------------------------------

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, values: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

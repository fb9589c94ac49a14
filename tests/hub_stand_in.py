# Copyright 2026 The hf-mudjacking authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loopback that the real client of the Hub talks to. It keeps commits, and every byte it was sent, in memory.

It knows repos, branches, pull requests, commits, uploads of large files, downloads and tokens, and can be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers


WRITE, READ = "hf_write", "hf_read"
USER = "org"


@dataclass
class Repo:
    """Files by commit, commits by branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Failure:
    """What happens to the next requests that match: a status, or a connection that is cut while its body is read."""

    method: str
    path: str
    times: int
    status: int | None = None
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class HubStandIn:
    """The server; `with HubStandIn() as hub`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.bodies: list[bytes] = []
        self.requests: list[str] = []
        self.cards: dict[str, dict[str, Any]] = {}
        self.failures: deque[Failure] = deque()
        # Called once, when a commit arrives: what somebody else does in between
        self.meanwhile: Callable[[], object] | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def connect(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = WRITE) -> None:
        """Let this process's client of the Hub talk to this server, as if it had been started with its address."""
        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        # Between tries the client waits for seconds
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """A repo as the Hub makes it: with one commit and `.gitattributes`."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **(files or {})}, "initial commit")
        return repo

    def fail(
        self, method: str, path: str, status: int | None, times: int = 1, message: str = "", **headers: str
    ) -> None:
        """Let the next `times` requests whose path matches fail; without a status the connection is cut."""
        self.failures.append(Failure(method, path, times, status, message, headers))

    def received(self) -> dict[str, bytes]:
        """Every byte that was sent, by where it ended up: files of all commits, large files, and whole request bodies."""
        return dict(self._received())

    def _received(self) -> Iterator[tuple[str, bytes]]:
        for name, repo in self.repos.items():
            for sha, files in repo.commits.items():
                yield from ((f"{name}@{sha[:7]}/{path}", content) for path, content in files.items())
        yield from ((f"large/{oid}", content) for oid, content in self.large.items())
        for i, body in enumerate(self.bodies):
            yield f"body/{i}", body
            # Contents and samples of files travel as base64 within json
            for j, text in enumerate(re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', body)):
                yield f"body/{i}/{j}", base64.b64decode(text)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # ---- Dispatch ----

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        failure = self._failure(path)
        if failure is not None and failure.status is None:
            # Half of the body is read, then the line is dead
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        self.hub.bodies.append(body)
        try:
            if failure is not None:
                for name, value in failure.headers.items():
                    self._extra[name.replace("_", "-")] = value
                raise _Refused(failure.status, failure.message)
            with self.hub.lock:
                status, content, headers = self._route(self.command, path, body)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message, "Content-Type": "application/json", **self._extra}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            status, content = refused.status, json.dumps({"error": refused.message}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def _extra(self) -> dict[str, str]:
        return self.__dict__.setdefault("_extra_headers", {})

    def _failure(self, path: str) -> Failure | None:
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.times and failure.method == self.command and re.search(failure.path, path):
                    failure.times -= 1
                    return failure
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        routes = {
            r"POST /api/repos/create": self._create,
            r"GET /api/whoami-v2": self._whoami,
            r"POST /api/validate-yaml": self._validate,
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?": self._info,
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/.*)?": self._tree,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)": self._branch,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)": self._preupload,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)": self._commit,
            r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /large/(?P<oid>\w+)": self._put,
            r"POST /large/verify": self._verify,
            r"(?:GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<name>.+)": self._resolve,
        }
        for pattern, answer in routes.items():
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(body, **match.groupdict())
        raise _Refused(404, f"no such route: {method} {path}")

    # ---- Who may do what ----

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (WRITE, READ):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return token or None

    def _may_write(self, repo: str) -> None:
        token = self._token()
        if token is None:
            raise _Refused(401, "Repository not found", "RepoNotFound")
        if token != WRITE or not repo.startswith(f"{USER}/"):
            raise _Refused(403, f"You don't have the rights to write to {repo}")

    def _repo(self, name: str) -> Repo:
        token, repo = self._token(), self.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _sha(self, repo: Repo, revision: str | None) -> str:
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ---- Answers ----

    def _create(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.hub.repos:
            self._token()
            return _json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self._may_write(name)
        self.hub.create(name, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _whoami(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if self._token() is None:
            raise _Refused(401, "Invalid username or password.")
        return _json({"type": "user", "name": USER, "orgs": []})

    def _validate(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if head is None:
            return _json({"errors": [], "warnings": [{"message": "empty metadata"}]})
        return _json({"errors": [], "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str | None) -> tuple[int, bytes, dict[str, str]]:
        found = self._repo(repo)
        sha = self._sha(found, revision)
        siblings = [{"rfilename": name} for name in found.commits[sha]]
        facts = self.hub.cards.get(repo, {})
        return _json(
            {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings, **facts}
        )

    def _tree(self, body: bytes, repo: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        found = self._repo(repo)
        files = found.commits[self._sha(found, revision)]
        return _json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )

    def _branch(self, body: bytes, repo: str, branch: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_write(repo)
        found = self._repo(repo)
        if branch in found.branches:
            raise _Refused(409, "Reference already exists")
        found.branches[branch] = found.branches["main"]
        return _json({})

    def _preupload(self, body: bytes, repo: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_commit(repo)
        files = self._repo(repo).commits[self._sha(self._repo(repo), revision)]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if file["path"] in files:
                content = files[file["path"]]
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                answers[-1]["oid"] = hashlib.sha256(content).hexdigest() if large else blob
        return _json({"files": answers})

    def _may_commit(self, repo: str) -> None:
        # Whoever can read may open a pull request
        if "create_pr" not in self.query:
            self._may_write(repo)
        elif self._token() is None:
            raise _Refused(401, "Invalid username or password.")

    def _batch(self, body: bytes, repo: str) -> tuple[int, bytes, dict[str, str]]:
        if self._token() is None:
            raise _Refused(401, "Invalid username or password.")
        answers = []
        for asked in json.loads(body)["objects"]:
            answers.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self.hub.large:
                answers[-1]["actions"] = {
                    "upload": {"href": f"{self.hub.url}/large/{asked['oid']}"},
                    "verify": {"href": f"{self.hub.url}/large/verify"},
                }
        return _json({"transfer": "basic", "objects": answers})

    def _put(self, body: bytes, oid: str) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "The content does not match its hash")
        self.hub.large[oid] = body
        return 200, b"", {}

    def _verify(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "No such object")
        return _json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_commit(repo)
        found = self._repo(repo)
        if self.hub.meanwhile is not None:
            self.hub.meanwhile, interrupt = None, self.hub.meanwhile
            interrupt()
        head, *operations = [json.loads(line) for line in body.splitlines()]
        sha = self._sha(found, revision)
        pull_request = "create_pr" in self.query
        if head["value"].get("parentCommit", sha) != sha and not pull_request:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[sha])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, f"{value['path']} was never uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif value["path"] not in files:
                raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                del files[value["path"]]
        answer = {}
        if pull_request:
            found.pull_requests += 1
            revision = f"refs/pr/{found.pull_requests}"
            answer = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{found.pull_requests}"}
        sha = found.commit(revision, files, head["value"]["summary"])
        return _json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, **answer})

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> tuple[int, bytes, dict[str, str]]:
        found = self._repo(repo)
        sha = self._sha(found, revision)
        if name not in found.commits[sha]:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = found.commits[sha][name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, content, {"ETag": etag, "X-Repo-Commit": sha, "Content-Length": str(len(content))}


def _json(content: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}

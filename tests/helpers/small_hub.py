"""A hub on loopback: the few answers that huggingface_hub asks for when it fetches a model.

Repositories are dicts: commit -> file name -> bytes. Branches name commits and can be moved while
the server runs, as a push would.
"""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors",)  # what the hub keeps in LFS: their etag is the sha256 of the contents


@dataclass
class Hub:
    """What the server has and what it was asked for."""

    commits: dict[str, dict[str, dict[str, bytes]]]
    branches: dict[str, dict[str, str]]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    damage: dict[str, bytes] = field(default_factory=dict)
    """File name -> the bytes that are sent instead, under the true hash."""

    def fetched(self) -> set[str]:
        """Names of the files whose contents were sent."""
        found = [r.removeprefix("GET ") for r in self.requests if r.startswith("GET ")]
        return {path.rsplit("/", 1)[-1] for path in found if "/resolve/" in path}


@contextmanager
def small_hub(commits: Any, branches: Any) -> Iterator[Hub]:
    """Serves repositories from a thread until the block ends."""
    hub = Hub(commits, branches)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub, path = self.served, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._refuse("EntryNotFound", "no such page")

    def _resolve(self, repo: str, revision: str) -> str | None:
        if repo not in self.served.commits:
            self._refuse("RepoNotFound", "Repository not found")
            return None
        commit = self.served.branches.get(repo, {}).get(revision, revision)
        if commit not in self.served.commits[repo]:
            self._refuse("RevisionNotFound", "Revision not found")
            return None
        return commit

    def _info(self, repo: str, revision: str, body: bool) -> None:
        if (commit := self._resolve(repo, revision)) is None:
            return
        siblings = []
        for name, data in self.served.commits[repo][commit].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git(data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": _sha(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        value = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        data = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json"}, data, body)

    def _file(self, repo: str, revision: str, name: str, body: bool) -> None:
        if (commit := self._resolve(repo, revision)) is None:
            return
        data = self.served.commits[repo][commit].get(name)
        if data is None:
            self._refuse("EntryNotFound", f"no {name}")
            return
        etag = _sha(data) if name.endswith(LARGE) else _git(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        self._send(200, headers, self.served.damage.get(name, data), body)

    def _refuse(self, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(404, headers, message.encode(), self.command == "GET")

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

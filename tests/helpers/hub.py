"""A hub of models on this machine: the endpoints that huggingface_hub asks, over folders, with every answer counted."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

FILES = "/file/"
COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class Answer:
    """One answer: what was asked, and how many bytes of a body were sent."""

    method: str
    path: str
    status: int
    sent: int


@dataclass
class Hub:
    """Repositories by id, each a folder at each commit; `main` and other revisions by name."""

    url: str = ""
    folders: dict[tuple[str, str], Path] = field(default_factory=dict)  # (id, commit)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)  # (id, revision) -> commit
    gated: set[str] = field(default_factory=set)  # ids whose files want a token
    answers: list[Answer] = field(default_factory=list)
    ranges: bool = True  # whether a part of a file is sent when it is asked for
    down: int = 0  # a status that every request is answered with
    tokens_elsewhere: int = 0  # requests to the store of large files that carried a token
    cut: dict[str, int] = field(default_factory=dict)  # file name -> bytes after which the next answer breaks off

    def add(self, name: str, folder: Path, commit: str = COMMIT, revision: str = "main") -> None:
        self.folders[name, commit] = folder
        self.refs[name, revision] = commit

    def sent(self, ending: str = "") -> int:
        """Bytes of bodies sent of files whose path ends so, since the last `forget`."""
        return sum(each.sent for each in self.answers if each.path.startswith(FILES) and each.path.endswith(ending))

    def forget(self) -> None:
        self.answers.clear()


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files, of a repository's description, of its tree, and of a search."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        if self.hub.down:
            self.send(self.hub.down, b"")
        elif words == ["api", "models"]:
            found = sorted({name for name, _ in self.hub.folders if parse_qs(parts.query)["search"][0] in name})
            self.document([{"id": name, "modelId": name} for name in found])
        elif words[:2] == ["api", "models"]:
            self.description("/".join(words[2:4]), words[4:])
        elif len(words) > 3 and words[2] == "resolve":
            self.file("/".join(words[:2]), words[3], "/".join(words[4:]))
        elif self.path.startswith(FILES):
            name, commit = "/".join(words[1:3]), words[3]
            self.hub.tokens_elsewhere += "Authorization" in self.headers
            self.content((self.hub.folders[name, commit] / "/".join(words[4:])).read_bytes())
        else:
            self.refuse(404, "EntryNotFound")

    def commit_of(self, name: str, revision: str) -> str | None:
        """Of a revision's name, or of a commit; an answer is sent where there is none."""
        commit = self.hub.refs.get((name, revision), revision)
        if (name, commit) in self.hub.folders:
            return commit
        known = any(name == other for other, _ in self.hub.folders)
        self.refuse(404, "RevisionNotFound") if known else self.refuse(401, "RepoNotFound")
        return None

    def description(self, name: str, rest: list[str]) -> None:
        commit = self.commit_of(name, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        files = _files(self.hub.folders[name, commit])
        if rest[:1] == ["tree"]:
            self.document([{"type": "file", "path": p, "size": f.stat().st_size, "oid": _etag(f)} for p, f in files])
        else:
            siblings = [{"rfilename": path, "size": file.stat().st_size, "blobId": _etag(file)} for path, file in files]
            self.document({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def file(self, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(name, revision)
        if commit is None:
            return
        file = self.hub.folders[name, commit] / path
        if name in self.hub.gated and "Authorization" not in self.headers:
            self.refuse(401, "GatedRepo")
        elif not file.is_file():
            self.refuse(404, "EntryNotFound")
        else:  # all files lie on another host, as the hub's large ones do
            store = self.hub.url.replace("127.0.0.1", "localhost")
            about = {"X-Linked-Etag": f'"{_etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            where = f"{store}{FILES}{name}/{commit}/{quote(path)}"
            self.send(302, b"", {**about, "X-Repo-Commit": commit, "Location": where})

    def content(self, data: bytes) -> None:
        """The whole, or the part that is asked for."""
        about = {"Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range") if self.hub.ranges else None
        if wanted is None:
            self.send(200, data, about)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        self.send(206, data[start:stop], {**about, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def document(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0
        if self.command == "GET" and body:
            limit = self.hub.cut.pop(self.path.rpartition("/")[2], len(body))
            try:
                while sent < min(limit, len(body)):  # so that a client that has enough is noticed
                    sent += self.wfile.write(body[sent : min(limit, sent + 4096)])
            except OSError:
                pass
            self.close_connection = limit < len(body)
        self.hub.answers.append(Answer(self.command, urlsplit(self.path).path, status, sent))


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, at `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def client(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process asks `hub`, with an empty cache at `home` and no token."""
    from huggingface_hub import close_session, constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        yield patch
        close_session()

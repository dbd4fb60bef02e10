"""A Hugging Face Hub of one process: as much of it as `huggingface_hub` asks for, and ways to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

PIECE = 1 << 20  # bytes that are written at once
LARGE = 100_000  # bytes: larger files are told with their SHA-256, as the Hub tells what git-lfs keeps


class Hollow:
    """A file of any size that is zeros behind its beginning."""

    def __init__(self, beginning: bytes, size: int) -> None:
        self.beginning, self.size = beginning, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        first, stop, _ = part.indices(self.size)
        return self.beginning[first:stop].ljust(stop - first, b"\0")


File: TypeAlias = "bytes | Hollow"


@dataclass
class Hub:
    """`repositories`: files by name, by repository. `sent`: what was asked for and how many bytes of it were sent."""

    repositories: dict[str, dict[str, File]]
    break_at: dict[str, int] = field(default_factory=dict)  # the next answer ends at this byte of the file
    stall_at: dict[str, int] = field(default_factory=dict)  # answers stop there and wait
    sent: list[tuple[str, str, int, int]] = field(default_factory=list)  # method, file, first byte, bytes
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    ranges: bool = True
    shift: int = 0  # bytes by which parts of files begin too late
    commits: list[str] = field(default_factory=list)  # others than the repositories' own, of the same files
    refuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # "api" or a file: status, headers
    listing: bytes | None = None  # what is answered instead of a list of files
    url: str = ""

    def commit(self, repository: str) -> str:
        text = json.dumps({n: hashlib.sha1(_content(d)).hexdigest() for n, d in self.repositories[repository].items()})
        return hashlib.sha1(text.encode()).hexdigest()

    def bytes_of(self, file: str) -> list[tuple[int, int]]:
        """(first byte, bytes) of each GET of a file."""
        return [(first, count) for method, name, first, count in self.sent if (method, name) == ("GET", file)]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        api = path[:2] == ["api", "models"]
        repository = "/".join(path[2:4] if api else path[:2])
        rest = path[4:] if api else path[2:]
        if repository not in self.hub.repositories:
            return self._json({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(repository)
        if rest[1:] and rest[1] not in ("main", commit, *self.hub.commits):
            return self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repositories[repository]
        if refused := self.hub.refuses.get("api" if api else "/".join(rest[2:])):
            return self._json({"error": "refused"}, *refused)
        if api and self.hub.listing is not None:
            return self._send(self.hub.listing)
        if not api:
            return self._file("/".join(rest[2:]), files, commit)
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": n, **_about(d)} for n, d in files.items()]
            return self._json(entries)
        siblings = [{"rfilename": n, **_about(d)} for n, d in files.items()]
        return self._json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []})

    def _json(self, value: Any, status: int = 200, more: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, more)

    def _send(self, body: bytes, status: int = 200, more: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(more or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, name: str, files: dict[str, File], commit: str) -> None:
        if name not in files:
            return self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, first, last = files[name], 0, len(files[name]) - 1
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            first += self.hub.shift if first else 0
        headers = {"Content-Length": str(last + 1 - first), "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{_about(data).get("lfs", {}).get("oid") or _about(data)["oid"]}"'
        if asked and self.hub.ranges:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._head(206 if asked and self.hub.ranges else 200, headers)
        stop = last + 1
        if self.command == "GET":
            stop = min(stop, self.hub.break_at.pop(name, stop), self.hub.stall_at.get(name, stop))
            for start in range(first, stop, PIECE):
                self.wfile.write(data[start : min(start + PIECE, stop)])
            self.wfile.flush()
        self.hub.sent.append((self.command, name, first, stop - first))
        if self.command == "GET" and stop <= last:
            if name in self.hub.stall_at:
                self.hub.stalled.set()
                self.hub.over.wait(60)
            self.close_connection = True
            self.connection.close()


def _content(data: File) -> bytes:
    """The bytes that a checksum is made of. A hollow file has none of its own, because it is never sent whole."""
    return data if isinstance(data, bytes) else data.beginning


def _about(data: File) -> dict[str, Any]:
    """A file's entry in lists."""
    told: dict[str, Any] = {"size": len(data), "oid": hashlib.sha1(_content(data)).hexdigest(), "blobId": "0" * 40}
    if len(data) > LARGE:
        sha256 = hashlib.sha256(_content(data)).hexdigest()
        told["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}
    return told

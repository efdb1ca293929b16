"""A stand-in for the hub on loopback: the routes that huggingface_hub's own client uses, and files at plain URLs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_BYTES = 1000
"""Files from this size on are stored as the hub stores large ones: on another address, with a sha256."""


@dataclass
class Hub:
    """What the server has, and what it was asked for. `break_after` cuts each next answer short once."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    promised_sha256: dict[str, str] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    ranges: bool = True
    endpoint: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        return [path.split(f"/{COMMIT}/")[1] for method, path, _ in self.asked if method == "GET" and COMMIT in path]

    def asked_ranges(self) -> list[str]:
        return [asked_range for _, _, asked_range in self.asked if asked_range]

    def model_info(self, repo: str) -> dict[str, Any]:
        siblings = [self.sibling(name, content) for name, content in self.repos[repo].items()]
        return {"id": repo, "sha": COMMIT, "gated": "auto" if self.gated else False, "siblings": siblings}

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if len(content) >= LFS_BYTES:
            sha256 = self.promised_sha256.get(name, hashlib.sha256(content).hexdigest())
            sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
        return sibling


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(Answers):
        pass

    Handler.hub = hub
    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


class Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/"):
            self.answer_info(path.removeprefix("/api/models/").split("/revision/")[0])
        elif "/resolve/" in path:
            self.answer_file(*path[1:].split("/resolve/"))
        else:
            self.send_content(self.hub.plain.get(path[1:]))

    def answer_info(self, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound")
        return self.send_bytes(200, json.dumps(self.hub.model_info(repo)).encode(), {})

    def answer_file(self, repo: str, rest: str) -> None:
        name = rest.split("/", 1)[1]
        if self.hub.gated and self.headers.get("Authorization") != "Bearer hf_accepted":
            return self.refuse(401, "GatedRepo")
        content = self.hub.repos[repo][name]
        if len(content) < LFS_BYTES:
            return self.send_content(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.hub.plain[f"cdn/{sha256}"] = content
        linked = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256}"'}
        return self.send_bytes(302, b"", {"Location": f"/cdn/{sha256}", **linked})

    def send_content(self, content: bytes | None) -> None:
        if content is None:
            return self.refuse(404, "EntryNotFound")
        start = self.first_byte()
        if start >= len(content) > 0:
            return self.refuse(416, "Range")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send_bytes(206 if start else 200, content[start:], headers)

    def first_byte(self) -> int:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").split("-")[0]) if asked and self.hub.ranges else 0

    def refuse(self, status: int, code: str) -> None:
        self.send_bytes(status, b"", {"X-Error-Code": code})

    def send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not content:
            return
        if self.hub.break_after and len(content) >= LFS_BYTES:
            self.wfile.write(content[: self.hub.break_after.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass

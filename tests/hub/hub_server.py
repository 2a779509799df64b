"""A fake Hugging Face hub on 127.0.0.1. The real client connects to it through HF_ENDPOINT.

It implements what downloads need: HEAD and GET of /owner/repo/resolve/revision/file with commit, etag and ranges, and
GET of /api/models/owner/repo, the list of a repository's files.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Files by "owner/repo/file", faults to inject, and the requests received."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)  # repositories that require the token "secret"
    gated: set[str] = field(default_factory=set)
    break_after: int | None = None  # bytes after which the next download's connection is closed
    stall_after: int | None = None  # bytes after which the next download sets `stalled` and waits until it is cleared
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range

    @contextmanager
    def serve(self) -> Iterator["FakeHub"]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _respond(self, *, with_body: bool) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.hub.requests.append((self.command, path, wanted))
        if path.startswith("/api/models/"):
            self._send_file_list(path.removeprefix("/api/models/"))
            return
        repo, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        error = self._error_for(repo, revision, name)
        if error is not None:
            self._send_error(*error)
            return
        content = self.hub.files[f"{repo}/{name}"]
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        body = content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            cut, self.hub.break_after = self.hub.break_after, None
            if cut is None:
                self._write_with_stall(body)
            else:
                self.wfile.write(body[:cut])
                self.close_connection = True

    def _send_file_list(self, path: str) -> None:
        repo, _, rest = path.partition("/revision/")
        repo, _, tree = repo.partition("/tree/")
        names = [file.removeprefix(repo + "/") for file in self.hub.files if file.startswith(repo + "/")]
        error = self._error_for(repo, rest or tree.partition("/")[0] or "main", names[0] if names else "")
        if error is not None:
            self._send_error(*error)
            return
        files = [{"type": "file", "path": n, "size": len(self.hub.files[f"{repo}/{n}"]), "oid": "0"} for n in names]
        info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        body = json.dumps(files if tree else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _write_with_stall(self, body: bytes) -> None:
        stall, self.hub.stall_after = self.hub.stall_after, None
        self.wfile.write(body[:stall])
        if stall is not None:
            self.wfile.flush()
            self.hub.stalled.set()
            while self.hub.stalled.is_set():
                time.sleep(0.01)
            self.close_connection = True

    def _error_for(self, repo: str, revision: str, name: str) -> tuple[int, str] | None:
        if not any(file.startswith(repo + "/") for file in self.hub.files):
            return 401, "RepoNotFound"
        if repo in self.hub.gated:
            return 403, "GatedRepo"
        if repo in self.hub.private and self.headers.get("Authorization") != "Bearer secret":
            return 401, "RepoNotFound"
        if revision not in ("main", "v1", COMMIT):
            return 404, "RevisionNotFound"
        if f"{repo}/{name}" not in self.hub.files:
            return 404, "EntryNotFound"
        return None

    def _send_error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

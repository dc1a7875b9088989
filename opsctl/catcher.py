"""The door to programs that send: an HTTP server on 127.0.0.1 that keeps the body of every request."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Caught:
    """One request."""

    path: str
    body: bytes


@dataclass
class Catcher:
    """The server's port, what it answers with, and what it has caught."""

    port: int
    status: int = 200
    caught: list[Caught] = field(default_factory=list)


@contextmanager
def catching() -> Iterator[Catcher]:
    """Catch until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def _catch(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            catcher.caught.append(Caught(self.path, body))
            self.send_response(catcher.status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = _catch  # noqa: N815 - http.server names them

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        catcher = Catcher(server.server_port)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield catcher
        finally:
            server.shutdown()

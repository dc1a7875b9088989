"""Receivers of what is sent: a real Sentry endpoint (kent), one that keeps every byte, and those that hang."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration import silence

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Kent:
    """A running kent: what it received, as it understood it."""

    port: int

    @property
    def dsn(self) -> str:
        return f"http://public@127.0.0.1:{self.port}/1"

    def events(self) -> list[dict[str, Any]]:
        listed = self._get("/api/eventlist/")["events"]
        return [self._get(f"/api/event/{e['event_id']}")["payload"]["body"] for e in listed]

    def forget(self) -> None:
        self._get("/api/flush/", method="POST")

    def _get(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)


@contextlib.contextmanager
def kent_server(folder: Path) -> Iterator[Kent]:
    port = free_port()
    program = [str(Path(sys.executable).with_name("kent-server")), "run", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with log.open("wb") as out, subprocess.Popen(program, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield Kent(port)
        finally:
            process.terminate()


@dataclass
class Recorder:
    """An endpoint that keeps every byte and answers with `status`, after `delay_s`."""

    port: int
    status: int = 200
    delay_s: float = 0.0
    received: list[bytes] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        return f"http://public@127.0.0.1:{self.port}/1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def envelopes(self) -> list[tuple[str, dict[str, Any]]]:
        """The type and content of each item that Sentry's protocol brought."""
        found = []
        for request in self.received:
            if b"/envelope/" in request.partition(b" HTTP")[0]:
                *_, header, content = request.rstrip(b"\n").splitlines()
                found.append((json.loads(header)["type"], json.loads(content)))
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        return [content for kind, content in self.envelopes if kind == "event"]

    @property
    def check_ins(self) -> list[dict[str, Any]]:
        return [content for kind, content in self.envelopes if kind == "check_in"]

    @property
    def pings(self) -> list[str]:
        """The paths of what was only looked at."""
        lines = [request.partition(b" HTTP")[0].decode() for request in self.received]
        return [line.removeprefix("GET ") for line in lines if line.startswith("GET ")]


@contextlib.contextmanager
def recording(host: str = "127.0.0.1", family: socket.AddressFamily = socket.AF_INET) -> Iterator[Recorder]:
    class Server(ThreadingHTTPServer):
        address_family = family

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept.received.append(self.requestline.encode() + self.headers.as_bytes() + body)
            time.sleep(kept.delay_s)
            self.send_response(kept.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None: ...

    with Server((host, 0), Handler) as server:
        kept = Recorder(server.server_port)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield kept
        server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def accepts_and_never_answers() -> Iterator[str]:
    with silence.accepts_and_never_answers() as port:
        yield f"http://k@127.0.0.1:{port}/1"


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    with silence.full_backlog() as port:
        yield f"http://k@127.0.0.1:{port}/1"


@contextlib.contextmanager
def drips(beginning: bytes) -> Iterator[str]:
    """Sends `beginning`, then a byte a second."""
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(beginning)
            while not stop.wait(1):
                connection.sendall(b"x")

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        yield f"http://k@127.0.0.1:{server.getsockname()[1]}/1"
        stop.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


HANGING = {
    "accepts and never answers": accepts_and_never_answers,
    "lets nobody connect": full_backlog,
    "drips its status line": lambda: drips(b"HTTP/1.1 2"),
    "drips its headers": lambda: drips(b"HTTP/1.1 200 OK\r\nX: "),
}

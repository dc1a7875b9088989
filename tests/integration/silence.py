"""Ports on this machine where nobody says anything, or not for long."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def accepts_and_never_answers() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """The kernel drops what would connect, as a host behind a silent firewall does."""
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            client = open_sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@contextlib.contextmanager
def answers_once(
    server_port: int, *, then: Callable[[socket.socket], None] | None = None, host: str = "127.0.0.1"
) -> Iterator[int]:
    """A way to a server of this machine for the first connection, or for all; `then` has those that come later."""
    listener = socket.create_server((host, 0))
    with contextlib.ExitStack() as open_sockets:

        def pass_on(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def accept() -> None:
            number = 0
            with contextlib.suppress(OSError):
                while True:
                    client = open_sockets.enter_context(listener.accept()[0])
                    number += 1
                    if number > 1 and then is not None:
                        threading.Thread(target=then, args=(client,), daemon=True).start()
                        continue
                    server = open_sockets.enter_context(socket.create_connection(("127.0.0.1", server_port)))
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=pass_on, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.close()


@dataclass
class Cutter:
    """What `cuts_off` has done."""

    port: int
    cut: int = 0
    let_through: int = 0


@contextlib.contextmanager
def cuts_off(server_port: int, *, times: int, word: int) -> Iterator[Cutter]:
    """A way to a server on which the first connections end, each as the client says its `word`-th word."""
    listener = socket.create_server(("127.0.0.1", 0))
    cutter = Cutter(listener.getsockname()[1])

    def answers(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", server_port)) as server, contextlib.suppress(OSError):
            threading.Thread(target=answers, args=(server, client), daemon=True).start()
            words = 0
            while data := client.recv(65536):
                words += 1
                if words == word and cutter.cut < times:
                    cutter.cut += 1
                    return
                cutter.let_through += words == word
                server.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield cutter
    finally:
        listener.close()

"""A server whose messages are not English is understood by its codes.

The server here is ours: it speaks PostgreSQL's protocol to the real libpq, up to the end of the connection, and says in
German what a real one with `lc_messages = de_DE.UTF-8` says. Locales are not installed where these tests run.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from opsctl import db, greeting
from opsctl.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.embedded import EmbeddedServer

SSL_REQUEST = 80877103


def message(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("!i", len(payload) + 4) + payload


def fatal(state: str, words: str) -> bytes:
    fields = (b"S" + b"SCHWERWIEGEND", b"VFATAL", b"C" + state.encode(), b"M" + words.encode(), b"")
    return message(b"E", b"\0".join(fields) + b"\0")


@contextmanager
def german(*answers: bytes) -> Iterator[dict[str, object]]:
    """A server that gives these answers, one after each thing it is told, and hangs up."""

    def serve(client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                (length,) = struct.unpack("!i", client.recv(4, socket.MSG_WAITALL))
                body = client.recv(length - 4, socket.MSG_WAITALL)
                if struct.unpack("!i", body[:4])[0] != SSL_REQUEST:
                    break
                client.sendall(b"N")
            for answer in answers:
                client.sendall(answer)
                if answer is not answers[-1]:
                    client.recv(1024)

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield {"host": "127.0.0.1", "port": server.getsockname()[1], "user": "u", "password": "p", "dbname": "d"}


PASSWORD = message(b"R", struct.pack("!i", 3))
WELCOME = message(b"R", struct.pack("!i", 0))


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ((fatal("53300", "tut mir leid, schon zu viele Verbindungen"),), "too-many-clients"),
        ((fatal("57P03", "das Datenbanksystem startet"),), "starting"),
        ((fatal("28000", "kein Eintrag in der HBA-Datei"),), "authentication"),
        ((PASSWORD, fatal("28P01", "Passwort-Authentifizierung fehlgeschlagen")), "authentication"),
        ((WELCOME + fatal("3D000", "Datenbank existiert nicht"),), "missing-database"),
        ((fatal("XX000", "etwas anderes"),), "database-unavailable"),
        ((b"garbage",), "database-unavailable"),
    ],
)
def test_a_server_that_speaks_german_is_understood(answers: tuple[bytes, ...], kind: str) -> None:
    with german(*answers) as parameters, pytest.raises(DatabaseUnavailable) as found, db.connect(parameters, 5):
        pass
    assert found.value.kind == kind
    assert "Verbindungen" not in found.value.message


def test_a_real_server_is_greeted_at_its_socket(postgres: EmbeddedServer) -> None:
    host = str(postgres.socket_dir)
    assert greeting.sqlstate({"host": host, "port": postgres.port, "user": "postgres", "dbname": "gone"}, 5) == "3D000"
    assert greeting.sqlstate({"host": host, "port": postgres.port, "user": "postgres", "dbname": "postgres"}, 5) is None
    assert greeting.sqlstate({"host": f"{host}/nowhere", "port": 1, "user": "u"}, 5) is None

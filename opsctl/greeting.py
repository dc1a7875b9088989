"""Why a PostgreSQL server turns us away, in its protocol's own codes.

libpq gives a failed connection as text only, in the server's language (`lc_messages`). Where that is not English, the
start of a connection is made once more by hand, up to the password, and the SQLSTATE of its end is read
(PostgreSQL manual, "Message Formats"). Without TLS: the names of role and database are all that is sent.
"""

from __future__ import annotations

import getpass
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROTOCOL = 3 << 16
_SOCKET_FOLDER = "/var/run/postgresql"
_LONGEST = 64 * 1024
_AUTHENTICATED = b"\0\0\0\0"
WRONG_PASSWORD = "28P01"  # noqa: S105 - a code


def sqlstate(parameters: Mapping[str, Any], timeout_s: float) -> str | None:
    """The SQLSTATE with which the server of one host ends a connection; None where it cannot be had.

    A server that asks for a password has no complaint before: then it was the password.
    """
    host, port = str(parameters.get("host") or _SOCKET_FOLDER), int(parameters.get("port", 5432))
    user = str(parameters.get("user") or getpass.getuser())
    words = ("user", user, "database", str(parameters.get("dbname") or user))
    body = struct.pack("!i", _PROTOCOL) + b"".join(word.encode() + b"\0" for word in words) + b"\0"
    try:
        with _connected(host, port, timeout_s) as connection, connection.makefile("rb") as answers:
            connection.sendall(struct.pack("!i", len(body) + 4) + body)
            while header := answers.read(5):
                kind, length = struct.unpack("!ci", header)
                if not 4 <= length <= _LONGEST:
                    return None
                payload = answers.read(length - 4)
                if kind == b"E":
                    fields = {field[:1]: field[1:] for field in payload.split(b"\0")}
                    return fields.get(b"C", b"").decode("ascii", "replace") or None
                if kind == b"R" and payload != _AUTHENTICATED:
                    return WRONG_PASSWORD
                if kind == b"Z":
                    return None
    except (OSError, struct.error):
        pass
    return None


def _connected(host: str, port: int, timeout_s: float) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), timeout=timeout_s)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(f"{host}/.s.PGSQL.{port}")
    except OSError:
        connection.close()
        raise
    return connection

"""The door to a PostgreSQL server's certificate, which libpq keeps to itself.

A TLS session is begun as libpq begins one (PostgreSQL manual, "SSL Session Encryption") and ended without logging in.
The certificate is looked at, not trusted: whom it belongs to is for sslmode=verify-full.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def certificate_expiry(address: str, port: int, *, server_name: str, timeout_s: float) -> datetime:
    """When the certificate of the server at `address` ends; all of it takes no longer than `timeout_s`.

    Raises OSError, or ValueError for one that is none.
    """
    from cryptography import x509

    give_up_at = time.monotonic() + timeout_s

    def left_s() -> float:
        """For one step, which may not begin anew with all of it."""
        if (seconds := give_up_at - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((address, port), left_s()) as plain:
        plain.sendall(_SSL_REQUEST)
        plain.settimeout(left_s())
        if plain.recv(1) != b"S":
            raise OSError("the server speaks no TLS here")
        plain.settimeout(left_s())  # ssl counts it for the whole handshake
        with context.wrap_socket(plain, server_hostname=server_name) as session:
            certificate = session.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(certificate or b"").not_valid_after_utc

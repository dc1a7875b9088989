"""The door to HTTP: one request under a clock, through the environment's proxy; only its status is read."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import opsctl

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIENT = f"opsctl/{opsctl.__version__}"


class Endpoint:
    """An address that takes requests, on one connection if it keeps it open. Raises `ValueError` for no address."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        from urllib.request import getproxies, proxy_bypass

        import certifi
        import urllib3

        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
        ca_certs = os.environ.get("SSL_CERT_FILE") or certifi.where()
        self._url = url
        self._headers = {"User-Agent": CLIENT, **(headers or {})}
        self._pool = urllib3.ProxyManager(proxy, ca_certs=ca_certs) if proxy else urllib3.PoolManager(ca_certs=ca_certs)

    def get(self, until: float) -> int:
        """The status of the answer; raises what urllib3 raises when there is none in time."""
        return self._request("GET", None, until)

    def post(self, content: bytes, until: float) -> int:
        """As `get`."""
        return self._request("POST", content, until)

    def _request(self, method: str, content: bytes | None, until: float) -> int:
        import urllib3

        response = self._pool.request(
            method,
            self._url,
            body=content,
            headers=self._headers,
            timeout=urllib3.Timeout(total=until - time.monotonic()),
            retries=False,
            redirect=False,
            preload_content=False,
        )
        response.close()  # the status says it all; a body may drip
        return response.status

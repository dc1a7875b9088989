"""A seeded fleet and a folder to restore it to."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.fleet import Fleet
from tests.integration.folders import remove
from tests.integration.receivers import kent_server, recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database, RunOpsctl
    from tests.integration.receivers import Kent, Recorder


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch folder that every user reaches: pytest's own keeps others out."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    remove(folder)


@pytest.fixture
def empty_fleet(database: Database, place: Path, run_opsctl: RunOpsctl) -> Fleet:
    return Fleet(database, place, run_opsctl)


@pytest.fixture
def fleet(empty_fleet: Fleet) -> Fleet:
    empty_fleet.seed()
    return empty_fleet


@pytest.fixture
def silent_resolver(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Words before a program, for which every name is looked up at a server that does not answer."""
    high, low = divmod(os.getpid() % 2**16, 2**8)
    address = f"127.53.{high}.{low}"  # the port is always 53, and each worker of the suite needs a server
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {address}\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((address, 53))
        yield ("unshare", "-m", "sh", "-c", f'mount --bind {resolv} /etc/resolv.conf && exec "$@"', "sh")
        silent.setblocking(False)
        assert silent.recv(512)  # it was asked


@pytest.fixture(scope="module")
def running_kent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kent]:
    with kent_server(tmp_path_factory.mktemp("kent")) as kent:
        yield kent


@pytest.fixture
def kent(running_kent: Kent) -> Kent:
    running_kent.forget()
    return running_kent


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as recorder:
        yield recorder

"""What a restore takes of the machine's memory, as the kernel counts it: all processes of opsctl together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opsctl.operations.fleet import seed_fleet
from opsctl.stores.lanes import MOST_LANES
from tests.integration.folders import remove

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Database

LIMIT_MIB = 200
ON_MANY_CORES = """
import os
os.sched_getaffinity = lambda _: set(range(64))
from opsctl.cli import main
main()
"""
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Peak:
    """The most that was seen of a run, in MiB: of all its processes at one moment, of its first, of any other."""

    together: float = 0
    parent: float = 0
    writer: float = 0
    writers: set[int] = field(default_factory=set)

    def look(self, leader: int) -> None:
        """Proportional set sizes (proc_pid_smaps_rollup(5)): a page that n processes share counts 1/n for each."""
        found = {}
        with suppress(OSError, ValueError):  # it ends while we look
            children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
            for pid in [leader, *map(int, children)]:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                (pss,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
                found[pid] = int(pss) / 1024
        self.together = max(self.together, sum(found.values()))
        self.parent = max(self.parent, found.pop(leader, 0))
        self.writer = max(self.writer, *found.values(), 0)
        self.writers |= found.keys()


@pytest.fixture
def target() -> Iterator[Path]:
    """In memory where that is possible: deleting 200,000 files takes a disk longer than writing them."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 1024**3
    folder = Path(tempfile.mkdtemp(dir=memory if roomy else None))
    yield folder / "sessions"
    remove(folder)


def restore(database: Database, target: Path) -> Peak:
    process = subprocess.Popen(
        [sys.executable, "-c", ON_MANY_CORES, "sessions", "restore", "--to", target, "--service-stopped"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "OPSCTL_STATE_DIR": str(target.parent / "state"),
            "DATABASE_URL": database.url,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    peak = Peak()
    while process.poll() is None:
        peak.look(process.pid)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


def restore_anew(database: Database, target: Path) -> float:
    """The peak of all processes together, of a restore to where nothing stands."""
    peak = restore(database, target)
    remove(target)
    return peak.together


def seed(database: Database, companies: int, keys: int) -> None:
    with database.connect(autocommit=False) as connection:
        seed_fleet(connection, companies=companies, keys_per_company=keys, seed=1, key_pair_pool=16)


@pytest.mark.long
def test_two_hundred_companies_take_no_more_than_200_mib(database: Database, target: Path) -> None:
    seed(database, 200, 100)
    peak = restore(database, target)
    assert peak.together <= LIMIT_MIB
    assert len(list(target.glob("company_*"))) == 200


@pytest.mark.long
def test_as_many_companies_of_100_000_keys_as_there_can_be_writers_take_no_more_than_200_mib(
    database: Database, target: Path
) -> None:
    seed(database, MOST_LANES, 2317)
    # What is looked at from outside may miss a short peak, and what it misses here would count twice below.
    ordinary = max(restore_anew(database, target) for _ in range(3))
    # Half of 100,000 keys, because of the time: what they add to a production company counts twice. The whole is
    # restored by benchmarks/growth.py.
    for index in ("idx_keys_company", "idx_keys_type", "idx_keys_expires"):
        database.execute(f"DROP INDEX {index}")
    database.execute("ALTER TABLE whatsapp_keys SET UNLOGGED")
    database.execute(
        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at, expires_at) "
        "SELECT company_id, key_type, 9000 + n || key_id, value, updated_at + n * interval '1 s', expires_at "
        "FROM whatsapp_keys, generate_series(1, 21) AS n"
    )
    ((fewest,),) = database.execute(
        "SELECT min(n) FROM (SELECT count(*) AS n FROM whatsapp_keys GROUP BY company_id) c"
    )
    assert fewest >= 50_000
    for counter in (1, 2):  # the second one is compared with what stands there
        database.execute(f"UPDATE whatsapp_auth SET creds = creds || '{{\"accountSyncCounter\": {counter}}}'")
        peak = restore(database, target)
        assert len(peak.writers) == MOST_LANES
        grown = peak.together - ordinary
        assert ordinary + grown * 100_000 / fewest <= LIMIT_MIB, (ordinary, peak)

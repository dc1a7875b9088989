"""Where benchmarks run: a seeded server, and a filesystem that is new for every measurement.

ext4 after a mass delete is several times slower for whoever writes next, so nothing is ever deleted: as root each
measurement gets a freshly made image, otherwise a new folder in /dev/shm.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from opsctl.embedded import embedded_server
from opsctl.operations.fleet import create_schema, seed_fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.embedded import EmbeddedServer


@contextmanager
def seeded_server(*, companies: int, keys: int) -> Iterator[tuple[EmbeddedServer, tuple[str, ...]]]:
    """An embedded server with a fleet, vacuumed and checkpointed; the company ids beside it."""
    with tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as folder:
        Path(folder).chmod(0o711)
        with embedded_server(Path(folder)) as server:
            with psycopg.connect(server.conninfo()) as connection:
                create_schema(connection)
                fleet = seed_fleet(connection, companies=companies, keys_per_company=keys, seed=1, key_pair_pool=1000)
            with psycopg.connect(server.conninfo(), autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
                connection.execute("CHECKPOINT")
            yield server, fleet.company_ids


@contextmanager
def fresh_filesystem(size_gb: int = 4, inodes: int = 600_000) -> Iterator[Path]:
    """A folder on a filesystem that nothing was ever deleted from."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory(prefix="opsctl-benchmark-", dir="/dev/shm") as folder:
            yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as folder:
        image, mount = Path(folder, "image"), Path(folder, "mount")
        mount.mkdir()
        with image.open("wb") as file:
            file.truncate(size_gb * 1024**3)
        # Not lazily: initialising inode tables in the background would be measured with whoever comes first.
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=0", "-N", str(inodes)]
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
        try:
            subprocess.run(["sync"], check=True)
            yield mount
        finally:
            subprocess.run(["umount", str(mount)], check=True)

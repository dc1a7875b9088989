"""A restore of 100 companies x 2,300 keys against `tar -x` of the same tree, and against what the old script did.

    python -m benchmarks.restore | tee benchmarks/restore.txt

opsctl reads PostgreSQL, normalises, checks credentials, writes, syncs, reads every file back and publishes; `tar` only
unpacks files that are ready; the Node script writes one file after the other without normalising. Each ends with its
data synced. Two `tar` at once, each with half of the folders, have no bar: they show what the filesystem allows two
cores at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ground import fresh_filesystem, seeded_server
from benchmarks.measure import Bar, rounds_of, say, verdict
from opsctl.process import bare_environment, opsctl_words
from opsctl.stores.folder import OPSCTL_FOLDER
from tests.baileys.door import install, node

if TYPE_CHECKING:
    from collections.abc import Callable

COMPANIES, KEYS, ROUNDS = 100, 2_300, 5
TWO_TARS = "two tar -x + sync"
HERE = Path(__file__).parent


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    install(HERE)
    say(f"restore of {COMPANIES} x {KEYS:,} keys, {os.cpu_count()} cores")
    with (
        seeded_server(companies=COMPANIES, keys=KEYS) as (server, _),
        tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as scratch,
    ):
        environment = bare_environment(
            DATABASE_URL=server.conninfo(), OPSCTL_STATE_DIR=f"{scratch}/state", OPSCTL_ENV_FILE=os.devnull
        )
        url = f"postgresql://postgres@/postgres?host={server.socket_dir}&port={server.port}"
        archive = Path(scratch, "tree.tar")
        halves = [Path(scratch, f"half{number}.tar") for number in range(2)]

        def opsctl(target: Path) -> None:
            words = ("sessions", "restore", "--to", str(target / "sessions"), "--service-stopped", "--quiet")
            subprocess.run(opsctl_words(*words, "--deadline", "600"), env=environment, check=True)

        def tar(target: Path) -> None:
            subprocess.run(["tar", "-xf", str(archive), "-C", str(target)], check=True)
            _sync(target)

        def two_tars(target: Path) -> None:
            unpacking = [subprocess.Popen(["tar", "-xf", str(half), "-C", str(target)]) for half in halves]
            codes = [tar.wait() for tar in unpacking]
            if any(codes):
                raise SystemExit("tar failed")
            _sync(target)

        def node_script(target: Path) -> None:
            words = [node(), str(HERE / "rival_restore.mjs"), str(target / "sessions")]
            subprocess.run(words, env={**os.environ, "DATABASE_URL": url}, check=True, stdout=subprocess.DEVNULL)
            _sync(target)

        with fresh_filesystem() as target:
            opsctl(target)
            folders = sorted(path.name for path in (target / "sessions").iterdir() if path.name != OPSCTL_FOLDER)
            for file, some in ((archive, folders), (halves[0], folders[::2]), (halves[1], folders[1::2])):
                subprocess.run(["tar", "-cf", str(file), "-C", str(target / "sessions"), *some], check=True)
        contestants = {
            "opsctl": _timed(opsctl),
            "tar -x + sync": _timed(tar),
            TWO_TARS: _timed(two_tars),
            "node + sync": _timed(node_script),
        }
        rounds = rounds_of(contestants, ROUNDS)
    bars = [Bar("opsctl", "tar -x + sync", 1.15), Bar("node + sync", "opsctl", 4.0, at_least=True)]
    code = verdict(rounds, bars)
    say(f"  node + sync / {TWO_TARS} = {Bar('node + sync', TWO_TARS, 0).measured(rounds):.2f}")
    return code


def _timed(run: Callable[[Path], None]) -> Callable[[], float]:
    def seconds() -> float:
        with fresh_filesystem() as target:
            started = time.monotonic()
            run(target)
            return time.monotonic() - started

    return seconds


def _sync(target: Path) -> None:
    subprocess.run(["sync", "--file-system", str(target)], check=True)


if __name__ == "__main__":
    sys.exit(main())

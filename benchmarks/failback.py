"""A failback of 100 companies x 2,300 keys of which 5 % were written, against reading what it has to read.

    python -m benchmarks.failback | tee benchmarks/failback.txt

opsctl reads every file and every row, normalises, compares, plans, archives, writes and reads every row back; the other
only reads each file and copies both tables out once. Between the rounds the failback is undone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import count
from typing import Any

import psycopg

from benchmarks.ground import fresh_filesystem, seeded_server
from benchmarks.measure import Bar, rounds_of, say, verdict
from opsctl.process import bare_environment, opsctl_words
from opsctl.stores.folder import opened, read_file

COMPANIES, KEYS, ROUNDS, SHARE = 100, 2_300, 3, 0.05


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    say(f"failback of {COMPANIES} x {KEYS:,} keys, {SHARE:.0%} written, {os.cpu_count()} cores")
    with (
        seeded_server(companies=COMPANIES, keys=KEYS) as (server, _),
        tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as scratch,
        fresh_filesystem() as target,
    ):
        environment = bare_environment(
            DATABASE_URL=server.conninfo(),
            OPSCTL_STATE_DIR=f"{scratch}/state",
            OPSCTL_ENV_FILE=os.devnull,
            SESSIONS_DIR=str(target / "sessions"),
        )

        def opsctl(*words: str) -> dict[str, Any]:
            line = opsctl_words("sessions", *words, "--service-stopped", "--json", "--deadline", "600")
            done = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE)
            document: dict[str, Any] = json.loads(done.stdout)
            return document

        opsctl("restore")
        folders = sorted(path for path in (target / "sessions").iterdir() if path.name[0] != ".")
        written = [path for folder in folders for path in sorted(folder.glob("session-*.json"))[: int(KEYS * SHARE)]]
        numbers = count()

        def failback() -> float:
            number = next(numbers)
            for path in written:
                path.write_text(json.dumps(json.loads(path.read_bytes()) | {"round": number}))
            started = time.monotonic()
            document = opsctl("failback", "--yes")
            seconds = time.monotonic() - started
            assert sum(row["updated"] for row in document["rows"]) == len(written), document["summary"]
            opsctl("failback", "--undo", document["run_id"], "--yes")
            return seconds

        def read_only() -> float:
            started = time.monotonic()
            for folder in folders:
                with opened(folder) as fd:
                    for name in os.listdir(fd):
                        read_file(fd, name)
            with psycopg.connect(server.conninfo()) as connection:
                for table in ("whatsapp_auth", "whatsapp_keys"):
                    with connection.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copy:
                        for _ in copy:
                            pass
            return time.monotonic() - started

        rounds = rounds_of({"failback": failback, "read files + COPY": read_only}, ROUNDS)
    return verdict(rounds, [Bar("failback", "read files + COPY", 3.0)])


if __name__ == "__main__":
    sys.exit(main())

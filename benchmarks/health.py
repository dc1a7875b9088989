"""What `opsctl db health` costs, on an idle server of this machine.

    python -m benchmarks.health | tee benchmarks/health.txt

Bars: 150 ms more than a Python that only imports the same modules; 50 ms for all statements, probes aside; and of
1,000,000 keys every row is read at most once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import orjson
import psycopg

from benchmarks.ground import seeded_server
from benchmarks.measure import rounds_of, say
from opsctl.process import bare_environment, opsctl_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMPANIES, KEYS, ROUNDS, MANY = 20, 2_317, 11, 1_000_000
LIMIT_MS, QUERIES_LIMIT_MS = 150.0, 50.0
IMPORTS = (
    "import opsctl.cli, opsctl.cli.watch, opsctl.jobs, opsctl.operations.health, opsctl.settings, opsctl.state,"
    " psycopg, rich.table, rich.console, rich.text, rich.box, dotenv.parser, tenacity"
)
MORE_KEYS = """
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at)
SELECT (962302 + number %% 20)::text, 'session', 'more-' || number, pattern.value, now() - number * interval '1 s'
FROM
    (SELECT value FROM whatsapp_keys WHERE key_type = 'session' LIMIT 1) AS pattern,
    generate_series(1, %s) AS number
"""
READ = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'whatsapp_keys'"
COUNT = "SELECT count(*) FROM whatsapp_keys"


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    with seeded_server(companies=COMPANIES, keys=KEYS) as (server, _):
        environment = bare_environment(
            DATABASE_URL=server.conninfo(), OPSCTL_STATE_DIR=f"{os.devnull}/state", OPSCTL_ENV_FILE=os.devnull
        )
        queries_ms: list[float] = []
        health = _timed(opsctl_words("db", "health", "--json"), environment, queries_ms)
        contestants = {
            "imports": _timed([sys.executable, "-c", IMPORTS], environment, []),
            "db health": _timed(opsctl_words("db", "health"), environment, []),
            "db health --json": health,
        }
        for run in contestants.values():
            run()  # compiled and cached
        queries_ms.clear()
        rounds = rounds_of(contestants, ROUNDS)
        added_ms = statistics.median((r["db health"] - r["imports"]) * 1000 for r in rounds)
        few_ms = statistics.median(queries_ms)
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            (have,) = connection.execute(COUNT).fetchone() or (0,)
            connection.execute(MORE_KEYS, [MANY - have])
            connection.execute("VACUUM ANALYZE whatsapp_keys")
            time.sleep(1.5)  # until every session has told what it read
            before = _read(connection)
            queries_ms.clear()
            health()
            time.sleep(1.5)
            read = _read(connection) - before
    bars = (
        (f"db health takes {added_ms:.0f} ms more than its imports (limit {LIMIT_MS:g})", added_ms <= LIMIT_MS),
        (
            f"its statements take {few_ms:.1f} ms with {COMPANIES * KEYS:,} keys (limit {QUERIES_LIMIT_MS:g})",
            few_ms <= QUERIES_LIMIT_MS,
        ),
        # The sample of keys that are probed adds the few rows at which its scan ends.
        (f"of {MANY:,} keys it reads {read:,}, in {queries_ms[0]:.0f} ms", MANY <= read <= MANY + 1000),
    )
    say(f"\nmedians of {ROUNDS}:")
    for sentence, holds in bars:
        say(f"  {sentence}: {'holds' if holds else 'MISSED'}")
    return 0 if all(holds for _, holds in bars) else 1


def _timed(words: list[str], environment: Mapping[str, str], queries_ms: list[float]) -> Callable[[], float]:
    def run() -> float:
        started = time.monotonic()
        done = subprocess.run(words, env=dict(environment), capture_output=True, check=False)
        seconds = time.monotonic() - started
        if done.returncode not in {0, 1}:
            raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr.decode()}")
        if "--json" in words:
            queries_ms.append(orjson.loads(done.stdout)["facts"]["queries_ms"])
        return seconds

    return run


def _read(connection: psycopg.Connection) -> int:
    (rows,) = connection.execute(READ).fetchone() or (0,)
    return int(rows)


if __name__ == "__main__":
    sys.exit(main())

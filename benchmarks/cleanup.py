"""A cleanup of 500,000 of 1,000,000 keys against one archived delete, and what a service beside it notices.

    python -m benchmarks.cleanup | tee benchmarks/cleanup.txt

The rival is `COPY (DELETE ... RETURNING *) TO STDOUT` through `gzip -1`, synced: one transaction that locks half a
million rows until it ends. opsctl's are short, archived one by one, and checked again. The server waits for its disk.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psycopg
from psycopg.sql import SQL, Identifier

from benchmarks.measure import Bar, rounds_of, say, verdict
from opsctl.embedded import embedded_server
from opsctl.operations.fleet import create_schema
from opsctl.process import bare_environment, opsctl_words

if TYPE_CHECKING:
    from opsctl.embedded import EmbeddedServer

ROWS, ROUNDS, SERVICE_ROUNDS, SERVICE_S = 1_000_000, 5, 5, 8.0
LONGEST_MS, SLOWER = 100.0, 1.5
SEED = """
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, created_at, updated_at, expires_at)
SELECT
    (962302 + n %% 20)::text, 'session', '4915' || n || '.0',
    jsonb_build_object('version', 'v1', '_sessions', jsonb_build_object(
        encode(sha256(('a' || n)::bytea), 'base64'), jsonb_build_object(
            'registrationId', n,
            'currentRatchet', encode(sha256(('b' || n)::bytea), 'base64'),
            'indexInfo', encode(sha256(('c' || n)::bytea), 'base64'),
            '_chains', encode(sha256(('d' || n)::bytea), 'base64') || encode(sha256(('e' || n)::bytea), 'base64')
        )
    )),
    now() - interval '90 days',
    now() - CASE WHEN n %% 2 = 0 THEN interval '60 days' ELSE interval '1 day' END,
    now() - CASE WHEN n %% 2 = 0 THEN interval '50 days' ELSE interval '-6 days' END
FROM generate_series(1, %s) AS n
"""
RIVAL = (
    "COPY (DELETE FROM whatsapp_keys WHERE updated_at < now() - interval '30 days' AND expires_at < now()"
    " RETURNING *) TO STDOUT"
)
SERVICE = """
import sys, time
import psycopg
latencies = []
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    until = time.monotonic() + float(sys.argv[2])
    number = 1
    while time.monotonic() < until:
        number = (number * 7919 + 1) % 1000000 | 1
        began = time.monotonic()
        connection.execute(
            "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value) VALUES (%s, 'session', %s, '{}')"
            " ON CONFLICT (company_id, key_type, key_id) DO UPDATE SET value = excluded.value, updated_at = now()",
            (str(962302 + number % 20), f"4915{number}.0"),
        )
        latencies.append(time.monotonic() - began)
        time.sleep(0.004)
latencies.sort()
print(latencies[int(len(latencies) * 0.99)])
"""
"""Like the service: one row after the other; prints the p99 of its seconds."""


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    with tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as folder:
        Path(folder).chmod(0o711)
        settings = {"max_wal_size": "8GB", "shared_buffers": "512MB", "checkpoint_timeout": "1h", "autovacuum": "off"}
        with embedded_server(Path(folder), durable=True, settings=settings) as server:
            return _measure(server, Path(folder))


def _measure(server: EmbeddedServer, scratch: Path) -> int:
    with _connected(server, "postgres") as connection:
        connection.execute("CREATE DATABASE seed")
    with _connected(server, "seed") as connection:
        create_schema(connection)
        connection.execute(SEED, [ROWS])
        connection.execute("VACUUM (ANALYZE) whatsapp_keys")
        ((size,),) = connection.execute("SELECT pg_total_relation_size('whatsapp_keys') / 1000000")
    say(f"{ROWS:,} keys, half of them expired, {size} MB, {os.cpu_count()} cores")
    longest: list[float] = []

    def opsctl() -> float:
        with _Copy(server) as name:
            began = time.monotonic()
            facts = _cleanup(server, name, scratch, "--max-rows", "0", "--pause-ratio", "0")
            seconds = time.monotonic() - began
        longest.append(facts["longest_transaction_ms"])
        if facts["deleted"] != ROWS // 2:
            raise SystemExit(f"the cleanup deleted {facts['deleted']}")
        return seconds

    def rival() -> float:
        with _Copy(server) as name, (scratch / "rival.gz").open("wb") as file:
            began = time.monotonic()
            words = [str(server.bin_dir / "psql"), "-X", "-q", "-c", RIVAL, server.conninfo(name)]
            psql = subprocess.Popen(words, stdout=subprocess.PIPE)
            subprocess.run(["gzip", "-1"], stdin=psql.stdout, stdout=file, check=True)
            if psql.wait() != 0:
                raise SystemExit("the rival failed")
            os.fsync(file.fileno())
            return time.monotonic() - began

    rounds = rounds_of({"opsctl": opsctl, "COPY DELETE | gzip -1": rival}, ROUNDS)
    code = verdict(rounds, [Bar("opsctl", "COPY DELETE | gzip -1", 1.75)])
    worst, all_rounds = statistics.median(longest), max(longest)
    say(f"  longest transaction {worst:.0f} ms ({all_rounds:.0f}) <= {LONGEST_MS:g}: {_word(worst, LONGEST_MS)}")
    slower = _slower(server, scratch)
    say(f"  p99 of a service beside it, with the pause: x {slower:.2f} <= {SLOWER:g}: {_word(slower, SLOWER)}")
    return code or int(worst > LONGEST_MS or slower > SLOWER)


def _slower(server: EmbeddedServer, scratch: Path) -> float:
    """By what factor the p99 of upserts grows while a cleanup runs with its default pause; median of paired rounds."""
    factors = []
    for number in range(SERVICE_ROUNDS):
        with _Copy(server) as name:
            alone = _service(server, name).communicate()[0]
            service = _service(server, name)
            cleaning = _start_cleanup(server, name, scratch, "--max-rows", "0", "--max-runtime", f"{SERVICE_S:g}")
            beside = service.communicate()[0]
            cleaning.communicate()
            factors.append(float(beside) / float(alone))
            say(f"round {number + 1}: p99 {float(alone) * 1000:.2f} ms alone, {float(beside) * 1000:.2f} ms beside it")
    return statistics.median(factors)


def _service(server: EmbeddedServer, name: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SERVICE, server.conninfo(name), f"{SERVICE_S:g}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def _cleanup(server: EmbeddedServer, name: str, scratch: Path, *words: str) -> dict[str, Any]:
    out, _ = _start_cleanup(server, name, scratch, *words).communicate()
    facts: dict[str, Any] = orjson.loads(out)["facts"]
    return facts


def _start_cleanup(server: EmbeddedServer, name: str, scratch: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = bare_environment(
        DATABASE_URL=server.conninfo(name), OPSCTL_STATE_DIR=str(scratch / "state"), OPSCTL_ENV_FILE=os.devnull
    )
    line = opsctl_words("keys", "cleanup", "--yes", "--json", *words)
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE)


class _Copy:
    """A fresh copy of the seeded database, warm, for one measurement."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server

    def __enter__(self) -> str:
        with _connected(self._server, "postgres") as connection:
            connection.execute("CREATE DATABASE contest TEMPLATE seed STRATEGY FILE_COPY")
        with _connected(self._server, "contest") as connection:
            connection.execute("SELECT sum(hashtext(value::text)) FROM whatsapp_keys")
            connection.execute("CHECKPOINT")
        return "contest"

    def __exit__(self, *_: object) -> None:
        with _connected(self._server, "postgres") as connection:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier("contest")))


def _connected(server: EmbeddedServer, name: str) -> psycopg.Connection:
    return psycopg.connect(server.conninfo(name), autocommit=True)


def _word(value: float, limit: float) -> str:
    return "holds" if value <= limit else "MISSED"


if __name__ == "__main__":
    sys.exit(main())

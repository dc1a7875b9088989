"""How time and memory of a restore grow with the data: 1x, 3x and 10x of 10 companies x 2,300 keys.

    python -m benchmarks.growth | tee benchmarks/growth.txt

Bars: 10x the data in at most 11x the time, and never more than 200 MiB (proportional set size, all processes of
opsctl together), also not for two companies of 100,000 keys each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from benchmarks.ground import fresh_filesystem, seeded_server
from benchmarks.measure import Bar, rounds_of, say, verdict
from opsctl.process import bare_environment, opsctl_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEYS, ROUNDS, LIMIT_MIB = 2_300, 3, 200.0
SIZES = {"1x": 10, "3x": 30, "10x": 100}
HUGE = """
INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at)
SELECT company_id, 'session', 'huge-' || number || '.0', pattern.value, now()
FROM
    (SELECT value FROM whatsapp_keys WHERE key_type = 'session' LIMIT 1) AS pattern,
    unnest(%s::text[]) AS company_id,
    generate_series(1, 97700) AS number
"""


def main() -> int:
    """Measure, print, and exit 1 if a bar is missed."""
    with (
        seeded_server(companies=max(SIZES.values()), keys=KEYS) as (server, companies),
        tempfile.TemporaryDirectory(prefix="opsctl-benchmark-") as scratch,
    ):
        environment = bare_environment(
            DATABASE_URL=server.conninfo(), OPSCTL_STATE_DIR=f"{scratch}/state", OPSCTL_ENV_FILE=os.devnull
        )
        peaks: dict[str, float] = {}

        def restore(name: str, ids: Sequence[str]) -> float:
            chosen = [word for company in ids for word in ("--company", company)]
            seconds, peak = _measured(("sessions", "restore", "--service-stopped", "--quiet", *chosen), environment)
            peaks[name] = max(peaks.get(name, 0.0), peak)
            return seconds

        contestants = {
            name: lambda name=name, count=count: restore(name, companies[:count]) for name, count in SIZES.items()
        }
        rounds = rounds_of(contestants, ROUNDS)
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute(HUGE, [list(companies[:2])])
        restore("2 x 100,000", companies[:2])
    code = verdict(rounds, [Bar("10x", "1x", 11.0)])
    for name, peak in peaks.items():
        say(f"  {name:<12} {peak:6.0f} MiB <= {LIMIT_MIB:g}: {'holds' if peak <= LIMIT_MIB else 'MISSED'}")
    return code or int(max(peaks.values()) > LIMIT_MIB)


def _measured(words: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds and the highest sum of PSS in MiB of one run into a fresh filesystem."""
    with fresh_filesystem() as target:
        line = opsctl_words(*words, "--to", str(target / "sessions"), "--deadline", "600")
        started = time.monotonic()
        run = subprocess.Popen(line, env=dict(environment))
        peak = 0.0
        while run.poll() is None:
            peak = max(peak, _pss_mib(run.pid))
            time.sleep(0.05)
        seconds = time.monotonic() - started
    if run.returncode != 0:
        raise SystemExit(f"the restore ended with {run.returncode}")
    return seconds, peak


def _pss_mib(pid: int) -> float:
    """Of a process and its children (proc(5), smaps_rollup)."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        family = [pid, *map(int, children.read_text().split())]
    except FileNotFoundError:
        return 0.0
    total_kib = 0
    for member in family:
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total_kib += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total_kib / 1024


if __name__ == "__main__":
    sys.exit(main())

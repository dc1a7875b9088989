"""How long the pages 1 to 4 take when somebody types what triage and the pages say, and nothing else.

    python -m benchmarks.walks | tee benchmarks/walks.txt

Each walk has an installation of its own: PostgreSQL, PM2, git, and a service on real Baileys with three companies,
whose contacts write each second. Its database is broken in the way of the page; then line after line is typed, each as
soon as the one before it has ended, from `opsctl triage` until the service's log says `connection open` for every
company. What then verifies it is typed too, and not counted. So this is the time of the commands, not of detection,
reading and deciding. A line that neither stands on a page, with that exit code, nor was printed by the one before it,
and one that ends with another, fail the walk.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from benchmarks.measure import say
from opsctl.embedded import embedded_server
from opsctl.operations.fleet import create_schema
from opsctl.operations.markdown_lines import opsctl_lines
from opsctl.operations.runbooks import pages
from opsctl.queries import query
from tests.switch.rig import FLAGS, SERVICE, rig

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsctl.embedded import EmbeddedServer
    from tests.switch.rig import OnPm2

COMPANIES, EVERY_MS = 3, 1_000
ON_THE_PAGES = "962302"
"""The company that the pages take for their example."""
PAGES = re.sub(r"\s+", " ", " ".join(page.text for page in pages()).replace("\\\n", " "))
STATED = {(line.words, line.exit_code) for page in pages() for line in opsctl_lines(page.path, page.text) if line.typed}
CONNECTED_S = 30


@dataclass
class Walk:
    """One person in a shell."""

    server: EmbeddedServer
    rig: OnPm2
    wrong: list[str] = field(default_factory=list)
    printed: str = ""
    logged: int = 0
    connected_at: float = 0.0

    @property
    def company(self) -> str:
        return self.rig.companies[0]

    def type(self, line: str, exit_code: int = 0) -> None:
        program, *words = shlex.split(line)
        stated = (tuple(words), exit_code) in STATED if program == "opsctl" else line in PAGES
        if not stated and line not in self.printed:
            self.wrong.append(f"nothing says to type this, or that it ends with {exit_code}: {line}")
        self.logged = len(self._log())
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line.replace(ON_THE_PAGES, self.company)],
            env=self.rig.env | {"PATH": f"{Path(sys.executable).parent}:{self.rig.env['PATH']}"},
            cwd=self.rig.place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        say(f"  {time.monotonic() - began:5.1f} s  exit {done.returncode}  {line}")
        self.printed = done.stdout + done.stderr
        if done.returncode != exit_code:
            self.wrong.append(f"exit {done.returncode} and not {exit_code}: {line}\n{self.printed}")

    def set_flags(self, value: str) -> None:
        """What the pages ask to be edited in the service's `.env`."""
        env = self.rig.app / ".env"
        kept = [line for line in env.read_text().splitlines() if not any(flag in line for flag in FLAGS)]
        env.write_text("\n".join([*kept, *(f"{flag}={value}" for flag in FLAGS)]) + "\n")

    def connected(self) -> None:
        """Wait for what the line typed last has started."""
        began = time.monotonic()
        waiting = set(self.rig.companies)
        while waiting and time.monotonic() - began < CONNECTED_S:
            said = self._log()[self.logged :]
            waiting = {company for company in self.rig.companies if f"company {company} connection open" not in said}
            time.sleep(0.05)
        self.connected_at = time.monotonic()
        say(f"  {self.connected_at - began:5.1f} s          connection open")
        self.wrong += [f"company {company} did not connect" for company in waiting]

    def _log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.rig.pm2.home / "logs").glob("*-out*.log")))


# --- the databases, broken --------------------------------------------------------------------------------------------


def _stopped(walk: Walk) -> None:
    walk.server.stop()


def _damaged(walk: Walk) -> None:
    """The service has ended: while it runs it mends them, because it has them in memory and saves them again."""
    walk.rig.pm2("stop", SERVICE)
    with psycopg.connect(walk.rig.url, autocommit=True) as connection:
        connection.execute(query("drill_corrupt_creds"), {"company_id": walk.company})


def _deleted(walk: Walk) -> None:
    with psycopg.connect(walk.rig.url, autocommit=True) as connection:
        for statement in ("drill_delete_keys", "drill_delete_creds"):
            connection.execute(query(statement), {"company_id": walk.company})


def _dropped(walk: Walk) -> None:
    with psycopg.connect(walk.server.conninfo(), autocommit=True) as connection:
        connection.execute("DROP DATABASE fleet WITH (FORCE)")


# --- what is typed ----------------------------------------------------------------------------------------------------


def _page_1_by_a_switch(walk: Walk) -> None:
    walk.type("opsctl triage", 1)
    walk.type("opsctl config check")
    walk.type("opsctl sessions restore --dry-run")
    walk.type("opsctl sessions restore --switch --yes")
    walk.connected()
    walk.type("opsctl switch status")


def _page_1_and_back(walk: Walk) -> None:
    walk.type("opsctl triage")
    walk.type("opsctl sessions failback --dry-run")
    walk.type("opsctl sessions failback --yes")
    walk.connected()
    walk.type("opsctl switch status")


def _page_1_by_hand(walk: Walk) -> None:
    walk.type("opsctl triage", 1)
    walk.type("opsctl config check")
    walk.type("opsctl sessions restore --dry-run")
    walk.type("pm2 stop baileys-whatsapp-service")
    walk.type("opsctl sessions restore --service-stopped")
    _onto_the_folders(walk)


def _page_1_and_back_by_hand(walk: Walk) -> None:
    walk.type("opsctl sessions failback --dry-run")
    walk.type("pm2 stop baileys-whatsapp-service")
    walk.type("opsctl sessions failback --service-stopped --yes")
    _onto_postgresql(walk)


def _page_2(walk: Walk) -> None:
    walk.type("opsctl triage", 1)
    walk.type("opsctl sessions list")
    walk.type("opsctl sessions restore --dry-run")
    _repaired(walk)
    walk.type("opsctl triage")


def _page_3(walk: Walk) -> None:
    walk.type("opsctl triage", 1)
    walk.type("opsctl config show")
    walk.type("opsctl sessions list")
    walk.type("opsctl standby status")
    _repaired(walk)


def _page_4(walk: Walk) -> None:
    walk.type("opsctl triage", 1)
    walk.type("opsctl config check")
    walk.type("opsctl standby status")
    walk.type("opsctl cache inspect")
    walk.type("pm2 stop baileys-whatsapp-service")
    walk.type("opsctl sessions restore --dry-run")
    walk.type("opsctl sessions restore")
    _onto_the_folders(walk)


def _page_4_into_a_new_database(walk: Walk) -> None:
    walk.type("opsctl sessions failback --dry-run")
    walk.type("pm2 stop baileys-whatsapp-service")
    walk.type("opsctl sessions failback --service-stopped --yes")
    _onto_postgresql(walk)
    walk.type("opsctl standby sync --accept @all")
    walk.type("opsctl triage")


def _repaired(walk: Walk) -> None:
    walk.type("pm2 stop baileys-whatsapp-service")
    walk.type("opsctl sessions repair --company 962302 --from standby --dry-run")
    walk.type("opsctl sessions repair --company 962302 --from standby --service-stopped --yes")
    walk.type("pm2 start baileys-whatsapp-service")
    walk.connected()


def _onto_the_folders(walk: Walk) -> None:
    walk.set_flags("false")
    walk.type(
        "USE_REPOSITORY_PATTERN=false USE_DATABASE_AUTH_STATE=false "
        "USE_LEGACY_SUPABASE=false pm2 restart baileys-whatsapp-service --update-env"
    )
    walk.connected()
    walk.type("opsctl sessions verify")


def _onto_postgresql(walk: Walk) -> None:
    walk.set_flags("true")
    walk.type(
        "USE_REPOSITORY_PATTERN=true USE_DATABASE_AUTH_STATE=true pm2 restart baileys-whatsapp-service --update-env"
    )
    walk.connected()


def _answers_again(walk: Walk) -> None:
    walk.server.restart()


def _made_anew(walk: Walk) -> None:
    with psycopg.connect(walk.server.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE fleet")
    with psycopg.connect(walk.rig.url) as connection:
        create_schema(connection)


@dataclass(frozen=True)
class Part:
    """A break or a repair of the database by somebody else, and what is typed after it within `target_s`."""

    name: str
    happens: Callable[[Walk], None]
    typed: Callable[[Walk], None]
    target_s: int


WALKS = (
    (
        Part("page 1, by a switch", _stopped, _page_1_by_a_switch, 600),
        Part("page 1, and back", _answers_again, _page_1_and_back, 600),
    ),
    (
        Part("page 1, by hand", _stopped, _page_1_by_hand, 600),
        Part("page 1, and back by hand", _answers_again, _page_1_and_back_by_hand, 600),
    ),
    (Part("page 2", _damaged, _page_2, 15 * 60),),
    (Part("page 3", _deleted, _page_3, 30 * 60),),
    (
        Part("page 4", _dropped, _page_4, 4 * 3600),
        Part("page 4, into a new database", _made_anew, _page_4_into_a_new_database, 4 * 3600),
    ),
)


def main() -> int:
    """Walk, print, and exit 1 if a target is missed or a line is not as its page says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the services and PM2
    say(f"{COMPANIES} companies, a message each {EVERY_MS} ms, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    results = [result for parts in WALKS for result in _walk(parts)]
    say("\nfrom `opsctl triage`, or the first line of the way back, to `connection open`:")
    for part, seconds, wrong in results:
        say(f"  {part.name}: {seconds} s <= {part.target_s}: {'holds' if _holds(part, seconds, wrong) else 'MISSED'}")
        for what in wrong:
            say(f"    {what}")
    return 0 if all(_holds(*result) for result in results) else 1


def _holds(part: Part, seconds: int, wrong: list[str]) -> bool:
    return seconds <= part.target_s and not wrong


def _walk(parts: tuple[Part, ...]) -> list[tuple[Part, int, list[str]]]:
    results = []
    with tempfile.TemporaryDirectory(prefix="opsctl-walk-") as folder:
        place = Path(folder)
        place.chmod(0o711)
        with embedded_server(place, tcp=True) as server:
            with psycopg.connect(server.conninfo(), autocommit=True) as connection:
                connection.execute(sql.SQL("CREATE DATABASE fleet"))
            url = f"postgresql://postgres:{server.password}@127.0.0.1:{server.port}/fleet"
            with psycopg.connect(url) as connection:
                create_schema(connection)
            with rig(place, url, companies=COMPANIES, every_ms=EVERY_MS) as installation:
                walk = _in_peacetime(Walk(server, installation))
                for part in parts:
                    part.happens(walk)
                    say(f"\n{part.name}")
                    began, walk.wrong = time.monotonic(), []
                    part.typed(walk)
                    results.append((part, math.ceil(walk.connected_at - began), walk.wrong))
    return results


def _in_peacetime(walk: Walk) -> Walk:
    """The jobs of every day have run, and the fallback code is prepared."""
    walk.rig.env |= {
        "STANDBY_DIR": str(walk.rig.place / "standby"),
        "WHATSAPP_ADDRESS": "none",
    }
    walk.rig.json("switch", "prepare")
    walk.rig.json("cache", "warm")
    walk.rig.json("standby", "sync")
    return walk


if __name__ == "__main__":
    sys.exit(main())

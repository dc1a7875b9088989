"""Every opsctl line of the runbooks, typed in order against a real PostgreSQL in the state that the page describes.

What a page says under a line (`# exit 1, "verdict: refused"`) is what it then has to do and to print. A line in a
sentence is run where it stands too (`as_run`); what it ends with, if not with 0, is in `ENDS`. A section whose state is
another one than that which the lines before it have left has an act here, under its heading.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from opsctl.cli import tree
from opsctl.embedded import EmbeddedServer, embedded_server
from opsctl.operations.fleet import create_schema
from opsctl.operations.markdown_lines import Line, opsctl_lines
from opsctl.operations.runbooks import pages
from opsctl.queries import query
from tests.conftest import Database, Finished
from tests.integration.fleet import FIRST, Fleet
from tests.integration.test_cleanup import OLD_SESSIONS
from tests.integration.test_database_deadlines import tcp_url
from tests.integration.test_restore_damage import VALUE, damage
from tests.integration.test_switch_faults import Scene as SwitchScene
from tests.integration.test_triage import said_by_baileys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.conftest import RunOpsctl
    from tests.forks import Forks

COMMANDS = dict(tree.commands())
PAGES = {page.name: page for page in pages()}
RUN_ID = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{6}\b")
TABLES = ("whatsapp_auth", "whatsapp_keys")
SMALL_DRILL = ("--companies", "2", "--keys", "40")


@dataclass
class Scene:
    """A fleet on a server that may be stopped, and what was typed so far."""

    fleet: Fleet
    server: EmbeddedServer
    forking: Forks
    typed: list[tuple[Line, Finished]] = field(default_factory=list)
    ends: ExitStack = field(default_factory=ExitStack)

    @property
    def database(self) -> Database:
        return self.fleet.database

    def opsctl(self, *words: str) -> Finished:
        return self.fleet.opsctl(*words)

    def type(self, line: Line) -> None:
        """Type one line of a page. RUN is the run that was printed last; a drill is the same one, smaller."""
        said = "".join(done.stdout + done.stderr for _, done in self.typed)
        last_run = (RUN_ID.findall(said) or ["RUN"])[-1]
        words = [last_run if word == "RUN" else word for word in line.words]
        more = SMALL_DRILL if words[:2] == ["drill", "run"] else ()
        self.typed.append((line, self.fleet.opsctl(*words, *more)))


def in_peacetime(scene: Scene) -> None:
    """Warm copies and a warm cache, as the jobs of every day leave them."""
    assert scene.opsctl("standby", "sync").returncode == 0
    assert scene.opsctl("cache", "warm").returncode == 0


def server_gone(scene: Scene) -> None:
    in_peacetime(scene)
    scene.server.stop()


def server_back(scene: Scene) -> None:
    """It answers again; meanwhile the service has run on the folders."""
    scene.server.restart()
    assert scene.opsctl("sessions", "undo", "--yes").returncode == 0
    session = next(scene.fleet.folder().glob("session-*.json"))
    session.write_text(session.read_text().replace('"version":"v1"', '"version":"v2"'))


def corrupted(scene: Scene) -> None:
    in_peacetime(scene)
    scene.database.execute("UPDATE whatsapp_auth SET creds = creds || '{\"accountSyncCounter\": 99}'")
    assert scene.opsctl("standby", "sync").returncode == 0
    scene.database.execute(query("drill_corrupt_creds"), {"company_id": FIRST})


def unreadable_pages(scene: Scene) -> None:
    damage(scene.fleet, VALUE)


def readable_again(scene: Scene) -> None:
    scene.database.execute("DROP VIEW whatsapp_keys")
    scene.database.execute("ALTER TABLE intact_keys RENAME TO whatsapp_keys")


def undecryptable(scene: Scene) -> None:
    """Real Baileys has logged what it could not decrypt; until the service is started again, that is in its log."""
    readable_again(scene)
    log = scene.fleet.place / "service.log"
    log.write_text(said_by_baileys("undecryptable", FIRST))
    scene.fleet.env["SERVICE_LOG"] = str(log)


def started_anew(scene: Scene) -> None:
    (scene.fleet.place / "service.log").write_text("")


def company_deleted(scene: Scene) -> None:
    in_peacetime(scene)
    for statement in ("drill_delete_keys", "drill_delete_creds"):
        scene.database.execute(query(statement), {"company_id": FIRST})


def tables_away(scene: Scene) -> None:
    for table in TABLES:
        scene.database.execute(f"ALTER TABLE {table} RENAME TO {table}_away")


def tables_there_again(scene: Scene) -> None:
    for table in TABLES:
        scene.database.execute(f"ALTER TABLE {table}_away RENAME TO {table}")


def database_dropped(scene: Scene) -> None:
    in_peacetime(scene)
    with Database(scene.server, "postgres").connect() as connection:
        connection.execute("DROP DATABASE fleet WITH (FORCE)")


def new_database(scene: Scene) -> None:
    with Database(scene.server, "postgres").connect() as connection:
        connection.execute("CREATE DATABASE fleet")
    with scene.database.connect(autocommit=False) as connection:
        create_schema(connection)


def keys_expired(scene: Scene) -> None:
    in_peacetime(scene)
    scene.database.execute(OLD_SESSIONS, [3])


def deployed(scene: Scene) -> None:
    """With a crontab as opsctl writes it; the crontab and the cron of this machine are nobody's business."""
    in_peacetime(scene)
    scene.database.execute("VACUUM ANALYZE")
    programs = scene.fleet.place / "programs"
    programs.mkdir()
    crontab = programs / "crontab"
    crontab.write_text(f"#!/bin/sh\ncat <<'END'\n{scene.opsctl('cron', 'show').stdout}END\n")
    crontab.chmod(0o755)
    scene.fleet.env["PATH"] = f"{programs}:{os.environ['PATH']}"
    daemon = shutil.copy(shutil.which("sleep") or "", programs / "cron")
    scene.ends.callback(scene.ends.enter_context(subprocess.Popen([daemon, "60"])).kill)


def services_running(scene: Scene) -> None:
    """Two services under commands of the operator's, and a repository with the tag."""
    installed = SwitchScene(scene.fleet, scene.forking)
    installed.install()
    scene.fleet.env |= installed.env
    scene.ends.callback(installed.kill)


def server_stopped(scene: Scene) -> None:
    scene.server.stop()


def server_restarted(scene: Scene) -> None:
    scene.server.restart()


STARTS: dict[str, Callable[[Scene], None]] = {
    "1-postgresql-unreachable": server_gone,
    "2-corrupted-session-data": corrupted,
    "3-accidental-deletion": company_deleted,
    "4-complete-loss": database_dropped,
    "cleanup-and-undo": keys_expired,
    "contacts-and-escalation": server_gone,
    "deployment-checks": deployed,
    "first-five-minutes": server_gone,
    "game-day": in_peacetime,
    "switch-and-failback": services_running,
}
ACTS: dict[tuple[str, str], Callable[[Scene], None]] = {
    ("1-postgresql-unreachable", "The service has run on the folders"): server_back,
    ("2-corrupted-session-data", "The server cannot read its own pages"): unreadable_pages,
    ("2-corrupted-session-data", "Undecryptable messages"): undecryptable,
    ("2-corrupted-session-data", "Verification"): started_anew,
    ("3-accidental-deletion", "Tables are gone, or most of the rows"): tables_away,
    ("3-accidental-deletion", "Way back"): tables_there_again,
    ("4-complete-loss", "Way back"): new_database,
    ("switch-and-failback", "The lines to type"): server_stopped,
    ("switch-and-failback", "Way back"): server_restarted,
}


ENDS = {
    ("1-postgresql-unreachable", "opsctl triage"): 1,
    ("2-corrupted-session-data", "opsctl triage"): 1,
    ("3-accidental-deletion", "opsctl triage"): 1,
    ("4-complete-loss", "opsctl triage"): 1,
    ("contacts-and-escalation", "opsctl triage"): 1,
    ("first-five-minutes", "opsctl triage --verbose"): 1,
}
"""With what a line in a sentence of a page ends where it stands, if not with 0."""
PLACEHOLDER = re.compile(r"[A-Z]+")


def typed_everywhere() -> set[frozenset[str]]:
    return {frozenset(line.words) - {"--yes"} for name in PAGES for line in typed_lines(name)}


def as_run(line: Line) -> tuple[str, ...] | None:
    """How a line in a sentence is run where it stands: not at all, a dry run, or as it is.

    A mere mention is what has a word in capitals for a value, what a block types (here or on the page that it belongs
    to), and the drill on PM2 and Baileys, which has its own tests. What changes something is a dry run here.
    """
    if any(PLACEHOLDER.fullmatch(word) for word in line.words) or "--full" in line.words:
        return None
    command = COMMANDS[" ".join(line.words[: 1 if line.words[0] == "triage" else 2])]
    if not any("--dry-run" in param.opts for param in command.params):
        return line.words
    return None if frozenset(line.words) in typed_everywhere() else (*line.words, "--dry-run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server of our own, which the pages stop and start."""
    with embedded_server(tmp_path_factory.mktemp("runbooks"), tcp=True) as server:
        yield server


@pytest.fixture
def scene(server: EmbeddedServer, forking: Forks, place: Path) -> Iterator[Scene]:
    database = Database(server, "fleet")
    with Database(server, "postgres").connect() as connection:
        connection.execute("CREATE DATABASE fleet")
    with database.connect(autocommit=False) as connection:
        create_schema(connection)
    app = place / "app"
    app.mkdir()

    def run(*words: str | Path, env: Mapping[str, str], **_: object) -> Finished:
        done = forking.run(*words, env={"HOME": str(place), **env})
        return Finished(done.returncode, done.stdout, done.stderr)

    fleet = Fleet(database, place, cast("RunOpsctl", run))
    fleet.target = app / "baileys_sessions"
    fleet.env |= {
        "DATABASE_URL": tcp_url(server),
        "APP_DIR": str(app),
        "STANDBY_DIR": str(place / "standby"),
        "WHATSAPP_ADDRESS": "none",
    }
    fleet.seed()
    with ExitStack() as ends:
        yield Scene(fleet, server, forking, ends=ends)
    server.restart()
    with Database(server, "postgres").connect() as connection:
        connection.execute("DROP DATABASE IF EXISTS fleet WITH (FORCE)")


def typed_lines(name: str) -> list[Line]:
    page = PAGES[name]
    return [line for line in opsctl_lines(page.path, page.text) if line.typed]


def differences(line: Line, done: Finished) -> list[str]:
    """What a page says of a line and is not so."""
    found = [] if done.returncode == line.exit_code else [f"exit {done.returncode}"]
    said = done.stdout + done.stderr
    for text in line.output:
        pattern = r".*".join(map(re.escape, text.split("...")))
        if not re.search(pattern, said):
            found.append(f"{text!r} is not printed")
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(STARTS))
def test_what_the_page_says_of_its_lines_is_so(scene: Scene, name: str) -> None:
    STARTS[name](scene)
    section, wrong = "", []
    for line in opsctl_lines(PAGES[name].path, PAGES[name].text):
        if line.section != section:
            section = line.section
            if act := ACTS.get((name, section)):
                act(scene)
        if not line.typed:
            if words := as_run(line):
                done = scene.opsctl(*words, *(SMALL_DRILL if words[:2] == ("drill", "run") else ()))
                if done.returncode != ENDS.get((name, line.text), 0):
                    wrong.append(f"{line.page}:{line.number}: {line.text}: exit {done.returncode}\n{done}")
            continue
        scene.type(line)
        _, done = scene.typed[-1]
        wrong += [f"{line.page}:{line.number}: {line.text}: {what}\n{done}" for what in differences(line, done)]
    assert not wrong, "\n".join(wrong)


def test_every_page_has_a_scene() -> None:
    assert STARTS.keys() == PAGES.keys()


def test_every_act_stands_under_a_heading_that_exists() -> None:
    sections = {(name, line.section) for name in PAGES for line in typed_lines(name)}
    assert ACTS.keys() <= sections


@pytest.mark.parametrize(
    ("exit_code", "said", "found"),
    [
        (0, "would be restored", []),
        (1, "would be restored", ["exit 1"]),
        (0, "was restored", ["'would ... restored' is not printed"]),
    ],
)
def test_what_is_not_so_would_be_found(exit_code: int, said: str, found: list[str]) -> None:
    (line,) = opsctl_lines("x.md", '    opsctl triage\n    # exit 0, "would ... restored"\n')
    assert differences(line, Finished(exit_code, said, "")) == found

"""The whole way there and back: a service on real Baileys under a real PM2, an outage, a switch, a failback, timed.

Nothing of the installation is touched: database, PM2, repository, packages and folders are the drill's own, in one
scratch folder. The contacts are a program that keeps what is not confirmed, as WhatsApp does, and counts what is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg

from opsctl import process
from opsctl.embedded import LONGEST_SOCKET_PATH, SUPERUSER, embedded_server
from opsctl.errors import Refused
from opsctl.operations.drill import drill_report, scratch_folder, translating
from opsctl.operations.drill_scene import ENVIRONMENT, Check, Scene
from opsctl.operations.fleet import create_schema
from opsctl.queries import query
from opsctl.stores.publishing import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opsctl.embedded import EmbeddedServer
    from opsctl.journal import Journal
    from opsctl.report import Report

PROGRAMS = Path(__file__).parents[1] / "drill_service"
SERVICE = "drill-service"
TAG = "emergency-file-fallback-v1"
OLDEST_NODE = 20
_INSTALL_S, _ACT_S, _ANSWER_S = 600.0, 60.0, 30.0
_MORE_MESSAGES = 5
NOT_MEASURED = (
    "detection, decision, the network, WhatsApp's own login (a program stands for WhatsApp), and what a service loses "
    "that writes after the last warm copy (the contacts were silent then)"
)
_NEEDED = ("node", "npm", "git")


@dataclass(frozen=True, slots=True)
class Timings:
    """What a full drill measures, in seconds."""

    switch_s: float
    failback_s: float


def require_programs() -> None:
    """Raises `Refused` naming what a full drill needs and this machine does not have."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        raise Refused(
            f"no full drill can be held: {', '.join(missing)} is not found on PATH",
            kind="no-programs",
            hint="install nodejs (20 or newer), npm and git, or leave --full out",
        )
    said = process.run(["node", "--version"], environment={"PATH": os.environ["PATH"]}, timeout_s=_ANSWER_S).stdout
    version = said.decode(errors="replace").strip().removeprefix("v")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < OLDEST_NODE:
        raise Refused(
            f"no full drill can be held: node is {version or 'of no version'}, and Baileys needs {OLDEST_NODE}",
            kind="no-programs",
            hint="install a newer nodejs, or leave --full out",
        )


def run_full_drill(*, companies: int, scratch: Path | None, packages: Path | None, journal: Journal) -> Report:
    """A switch and a failback of a service on real Baileys under a real PM2. Everything that is made is removed.

    `packages`: a folder whose node_modules are taken instead of npm's. Raises `Refused` where it cannot be held:
    programs or packages are missing, no embedded PostgreSQL, no space.
    """
    require_programs()
    checks: list[Check] = []
    with translating("full drill", scratch), scratch_folder("opsctl-drill-", scratch) as folder:
        timings = _rehearse(folder, checks, companies=companies, packages=packages, journal=journal)
    switch_s, failback_s = timings.switch_s, timings.failback_s
    done = f"{companies} companies switched in {switch_s:.1f} s and brought back in {failback_s:.1f} s"
    facts = {"companies": companies, "full": True, "restore_s": switch_s, "failback_s": failback_s}
    return drill_report(checks, done, facts, not_measured=NOT_MEASURED, scope="connected")


def _rehearse(folder: Path, checks: list[Check], *, companies: int, packages: Path | None, journal: Journal) -> Timings:
    """Outage, switch, failback, in `folder`."""
    if len(os.fsencode(folder / "pm2" / "interactor.sock")) > LONGEST_SOCKET_PATH:
        raise Refused(f"the path {folder} is too long for PM2's sockets", kind="no-scratch", hint="pass --scratch /tmp")
    with ExitStack() as running:
        with journal.step("start an embedded PostgreSQL"):
            server = running.enter_context(embedded_server(folder))
        with journal.step("Baileys, pg and PM2 from npm" if packages is None else "Baileys, pg and PM2"):
            _install(folder, packages)
        with journal.step(f"pair {companies} companies with contacts"):
            world = running.enter_context(_world(folder, companies))
            _seed(server, world.rows)
        stage = _Stage(folder, server, world)
        with journal.step("a repository with the tag, and the service under PM2"):
            stage.make_repository()
            running.enter_context(stage.pm2_running())
            stage.pm2("start", str(stage.app / "service.mjs"), "--name", SERVICE, "--cwd", str(stage.app))
            checks.append(_going_on(world, "messages on PostgreSQL"))
        if not checks[-1].passed:
            return Timings(0.0, 0.0)
        return _there_and_back(stage, server, checks, journal=journal)


def _there_and_back(stage: _Stage, server: EmbeddedServer, checks: list[Check], *, journal: Journal) -> Timings:
    world, scene = stage.world, stage.scene
    with journal.step("in peacetime: the fallback code, and a warm copy"):
        checks.append(_ended_well("the fallback code is prepared", scene.opsctl("switch", "prepare")))
        world.ask("silence")
        world.wait_for(lambda counts: all(count["waiting"] == 0 for count in counts))
        time.sleep(0.5)  # for the answers to the last messages to be stored
        checks.append(_ended_well("a warm copy of every company", scene.opsctl("standby", "sync")))
    before = _key_ids(server)
    with journal.step("the outage"):
        server.stop()
        world.ask("speak")
        time.sleep(1.0)
    with journal.step("sessions restore --switch"):
        switched = scene.opsctl("sessions", "restore", "--switch", "--yes")
    checks.append(_ended_well("switched, every company connected", switched))
    with journal.step("messages on the folders"):
        checks.append(_going_on(world, "messages go on on the folders"))
    with journal.step("PostgreSQL is back"):
        server.restart()
    with journal.step("sessions failback"):
        failed_back = scene.opsctl("sessions", "failback", "--yes")
    checks.append(_ended_well("brought back, every company connected", failed_back))
    with journal.step("messages on PostgreSQL again"):
        checks.append(_going_on(world, "messages go on on PostgreSQL"))
    world.ask("silence")
    world.wait_for(lambda counts: all(count["waiting"] == 0 for count in counts))
    checks += _nothing_lost(world)
    lost = before - _key_ids(server)
    checks.append(Check("no key is lost", not lost, f"{len(before) - len(lost):,} of {len(before):,} keys are there"))
    return Timings(_elapsed_s(switched), _seconds_of(journal, "sessions failback"))


class _World:
    """The contacts, and what they have counted."""

    def __init__(self, port: int, rows: list[dict[str, Any]]) -> None:
        self.port = port
        self.rows = rows

    def ask(self, op: str) -> Any:  # noqa: ANN401 - what JSON holds
        with socket.create_connection(("127.0.0.1", self.port), timeout=_ANSWER_S) as connection:
            connection.sendall(json.dumps({"op": op}).encode() + b"\n")
            with connection.makefile() as said:
                return json.loads(said.readline())

    def wait_for(self, held: Callable[[list[dict[str, Any]]], bool]) -> bool:
        """Whether it held of the counts within half a minute."""
        give_up_at = time.monotonic() + _ANSWER_S
        while not held(self.ask("counts")):
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.1)
        return True


class _Stage:
    """The drill's installation, and opsctl with its settings."""

    def __init__(self, folder: Path, server: EmbeddedServer, world: _World) -> None:
        self.folder = folder
        self.world = world
        self.app = folder / "app"
        self.app.mkdir(0o755)
        path = f"{folder / 'node_modules' / '.bin'}:{os.environ.get('PATH', os.defpath)}"
        self.url = f"postgresql://{SUPERUSER}@{quote(str(server.socket_dir), safe='')}:{server.port}/postgres"
        self.programs = {"PATH": path, "HOME": str(folder), "PM2_HOME": str(folder / "pm2"), "LANG": "C.UTF-8"}
        environment = process.bare_environment(
            APP_DIR=str(self.app),
            DATABASE_URL=self.url,
            STANDBY_DIR=str(folder / "standby"),
            OPSCTL_STATE_DIR=str(folder / "state"),
            OPSCTL_ENVIRONMENT=ENVIRONMENT,
            OPSCTL_ENV_FILE=os.devnull,
            SERVICE_MANAGER="pm2",
            SERVICE_NAMES=SERVICE,
            FALLBACK_DIR=str(folder / "fallback"),
            FALLBACK_DRY_BOOT_COMMAND="node service.mjs",
            EMERGENCY_TAG=TAG,
            CONNECT_TIMEOUT_SECONDS="60",
            CONNECT_WATCH_SECONDS="5",
        )
        self.scene = Scene(self.app / "baileys_sessions", Owner.of(self.app), {**environment, **self.programs})

    def make_repository(self) -> None:
        """Two commits, the older one with the tag: what runs now is not what the fallback runs."""
        for name in ("service.mjs", "signal.mjs"):
            shutil.copy(PROGRAMS / name, self.app)
        package = {"name": SERVICE, "version": "1.0.0", "private": True, "type": "module"}
        lock = {**package, "lockfileVersion": 3, "requires": True, "packages": {"": package}}
        (self.app / "package.json").write_text(json.dumps(package), encoding="utf-8")
        (self.app / "package-lock.json").write_text(json.dumps(lock), encoding="utf-8")
        self._git("init", "--quiet")
        self._git("add", ".")
        self._git("commit", "--quiet", "--message", "runs on folders")
        self._git("tag", TAG)
        self._git("commit", "--quiet", "--allow-empty", "--message", "runs on PostgreSQL")
        companies = ",".join(row["company_id"] for row in self.world.rows)
        text = f"DATABASE_URL={self.url}\nWORLD_PORT={self.world.port}\nCOMPANIES={companies}\n"
        (self.app / ".env").write_text(text, encoding="utf-8")
        (self.app / ".env").chmod(0o600)

    def _git(self, *words: str) -> None:
        who = ("-c", "user.name=drill", "-c", "user.email=drill@localhost")
        self._run("git", "-C", str(self.app), *who, *words)

    def pm2(self, *words: str) -> None:
        self._run("pm2", *words)

    def _run(self, *words: str) -> None:
        done = process.run(words, environment=self.programs, timeout_s=_ACT_S, folder=self.folder)
        if done.exit_code != 0:
            said = (done.stderr.strip() or done.stdout.decode(errors="replace").strip()).splitlines()[-1:]
            raise Refused(
                f"{words[0]} {words[1]} ended with {done.exit_code}: {''.join(said)[:200]}", kind="drill-stage"
            )

    @contextmanager
    def pm2_running(self) -> Iterator[None]:
        """PM2 is killed afterwards, also where this process is: its guard hears of that by the end of a pipe."""
        guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; exec pm2 kill > "$PM2_HOME/killed" 2>&1'],
            env=self.programs,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        (self.folder / "pm2").mkdir(exist_ok=True)
        try:
            yield
        finally:
            assert guard.stdin is not None  # noqa: S101 - for the type checker
            guard.stdin.close()
            guard.wait(_ACT_S)


def _install(folder: Path, packages: Path | None) -> None:
    for name in ("package.json", "package-lock.json", "world.mjs", "signal.mjs"):
        shutil.copy(PROGRAMS / name, folder)
    if packages is not None:
        modules = packages.absolute() / "node_modules"
        if not (modules / "baileys").is_dir():
            raise Refused(f"{modules} has no baileys", kind="no-packages", hint="leave --packages out")
        (folder / "node_modules").symlink_to(modules)
        return
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    done = process.run(words, environment=environment, timeout_s=_INSTALL_S, folder=folder)
    if done.exit_code != 0:
        said = done.stderr.strip().splitlines()[:1] or [f"it ended with {done.exit_code}"]
        raise Refused(
            f"no full drill can be held: npm ci: {said[0][:200]}",
            kind="no-packages",
            hint="is the registry reachable? --packages DIR takes them from a folder",
        )


@contextmanager
def _world(folder: Path, companies: int) -> Iterator[_World]:
    program = subprocess.Popen(
        ["node", str(folder / "world.mjs"), f"--companies={companies}", "--every=200"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        line = program.stdout.readline() if program.stdout else ""
        if not line:
            raise Refused("no full drill can be held: its contacts do not start", kind="no-packages")
        said = json.loads(line)
        yield _World(said["port"], said["rows"])
    finally:
        program.kill()
        program.communicate()


def _seed(server: EmbeddedServer, rows: list[dict[str, Any]]) -> None:
    with psycopg.connect(server.conninfo()) as connection:
        create_schema(connection)
        for row in rows:
            company_id = row["company_id"]
            connection.execute(query("drill_insert_creds"), {"company_id": company_id, "creds": row["creds"]})
            for key_type, key_id, value in row["keys"]:
                values = {"company_id": company_id, "key_type": key_type, "key_id": key_id, "value": value}
                connection.execute(query("drill_insert_key"), values)


def _key_ids(server: EmbeddedServer) -> set[tuple[Any, ...]]:
    with psycopg.connect(server.conninfo()) as connection:
        return set(connection.execute(query("drill_key_ids")).fetchall())


def _going_on(world: _World, name: str) -> Check:
    """More messages come through, both ways, in every company."""
    before = {count["company"]: count for count in world.ask("counts")}

    def more(counts: list[dict[str, Any]]) -> bool:
        return all(
            count[what] >= before[count["company"]][what] + _MORE_MESSAGES
            for count in counts
            for what in ("confirmed", "received")
        )

    went_on = world.wait_for(more)
    counts = world.ask("counts")
    read, written = sum(c["confirmed"] for c in counts), sum(c["received"] for c in counts)
    return Check(name, went_on, f"{read:,} read and {written:,} written so far")


def _nothing_lost(world: _World) -> list[Check]:
    counts = world.ask("counts")
    sent, come = sum(c["sent"] for c in counts), sum(c["confirmed"] for c in counts)
    lost, rekeyed = sum(c["lost"] for c in counts), sum(c["rekeyed"] for c in counts)
    return [
        Check("no message is lost", lost == 0 and sent == come, f"{come:,} of {sent:,} came, {lost} lost"),
        Check("no session is re-keyed", rekeyed == 0, f"{rekeyed} of {len(counts)} began anew"),
    ]


def _ended_well(name: str, finished: process.Finished) -> Check:
    document = finished.document()
    error = document.get("error") or {}
    said = str(error.get("message") or document.get("summary") or finished.stderr.strip()[:200])
    return Check(name, finished.exit_code == 0, said if finished.exit_code else "ok")


def _elapsed_s(finished: process.Finished) -> float:
    return float((finished.document().get("rto") or {}).get("elapsed_s") or 0.0)


def _seconds_of(journal: Journal, name: str) -> float:
    return round(sum(step.seconds for step in journal.steps if step.name == name), 1)

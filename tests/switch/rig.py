"""An installation to be switched: git, a service on real Baileys under a real PM2 or systemd, and its contacts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

import opsctl
from tests.baileys.door import install, link_programs, node
from tests.conftest import Finished
from tests.pm2.door import Pm2, pm2
from tests.systemd.door import Systemd, systemd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
"""Where the packages of the drill's programs are installed for tests."""
PROGRAMS = Path(opsctl.__file__).parent / "drill_service"
SERVICE = "baileys-whatsapp-service"
TAG = "emergency-file-fallback-v1"
FLAGS = ("USE_REPOSITORY_PATTERN", "USE_DATABASE_AUTH_STATE", "USE_LEGACY_SUPABASE")


class World:
    """WhatsApp and the contacts: `world.mjs`, and what it has counted."""

    def __init__(self, process: subprocess.Popen[str], port: int, rows: list[dict[str, Any]]) -> None:
        self.process = process
        self.port = port
        self.rows = rows

    def ask(self, op: str) -> Any:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection,
            connection.makefile() as said,
        ):
            connection.sendall(json.dumps({"op": op}).encode() + b"\n")
            return json.loads(said.readline())

    def counts(self) -> dict[str, dict[str, Any]]:
        return {count["company"]: count for count in self.ask("counts")}

    def go_on(self, more: int = 3) -> dict[str, dict[str, Any]]:
        """Wait until so many more messages have come through both ways, in every company: the counts then."""
        before, give_up_at = self.counts(), time.monotonic() + 20
        while True:
            now = self.counts()
            if all(
                now[c]["confirmed"] >= before[c]["confirmed"] + more
                and now[c]["received"] >= before[c]["received"] + more
                for c in now
            ):
                return now
            assert time.monotonic() < give_up_at, (before, now)
            time.sleep(0.05)

    def nothing_is_lost(self) -> None:
        """Every message that was ever sent has come, and no conversation was begun anew."""
        self.go_on()
        for count in self.counts().values():
            assert (count["lost"], count["rekeyed"]) == (0, 0), count


@contextmanager
def world(programs: Path, companies: int, *, every_ms: int) -> Iterator[World]:
    process = subprocess.Popen(
        [node(), str(programs / "world.mjs"), f"--companies={companies}", f"--every={every_ms}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        yield World(process, said["port"], said["rows"])
    finally:
        process.kill()
        process.communicate()


class Rig:
    """One installation, with its folders below `place`.

    `settings` are those of its service manager, and the PATH on which opsctl finds it.
    """

    inside: tuple[str, ...] = ()
    """What is typed before `opsctl`, where only that sees the services."""

    def __init__(self, place: Path, url: str, life: World, settings: Mapping[str, str]) -> None:
        self.place = place
        self.url = url
        self.world = life
        self.app = place / "app"
        self.fallback = place / "fallback"
        self.sessions = self.app / "baileys_sessions"
        self.env: dict[str, str] = {
            **settings,
            "PYTHONPATH": str(Path(opsctl.__file__).parents[1]),
            "HOME": str(place / "home"),
            "OPSCTL_STATE_DIR": str(place / "state"),
            "DATABASE_URL": url,
            "APP_DIR": str(self.app),
            "FALLBACK_DIR": str(self.fallback),
            "FALLBACK_DRY_BOOT_COMMAND": "node service.mjs",
            "SERVICE_NAMES": SERVICE,
            "CONNECT_TIMEOUT_SECONDS": "20",
            "CONNECT_WATCH_SECONDS": "1",
        }
        (place / "home").mkdir(exist_ok=True)

    def git(self, *words: str | Path) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(
            ["git", *identity, *words], cwd=self.app, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    def install(self) -> None:
        """The repository with its tag, the packages above it, and the service's env file."""
        self.app.mkdir()
        for name in ("service.mjs", "signal.mjs"):
            shutil.copy(PROGRAMS / name, self.app)
        manifest = {"name": "service", "version": "1.0.0", "private": True, "type": "module"}
        lock = {
            **manifest,
            "lockfileVersion": 3,
            "requires": True,
            "packages": {"": {"name": "service", "version": "1.0.0"}},
        }
        (self.app / "package.json").write_text(json.dumps(manifest))
        (self.app / "package-lock.json").write_text(json.dumps(lock))
        (self.app / ".gitignore").write_text(".env\nbaileys_sessions\nnode_modules\n")
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "Run on folders")
        self.git("tag", TAG)
        (self.app / "newer.txt").write_text("what the tag does not have\n")
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "Run on PostgreSQL")
        (self.app / ".env").write_text(
            f"# the service's\nDATABASE_URL={self.url}\nWORLD_PORT={self.world.port}\n"
            f"COMPANIES={','.join(self.companies)}\n\n"
            "USE_REPOSITORY_PATTERN=true # since July\nexport USE_DATABASE_AUTH_STATE='true'\n"
        )
        (self.app / ".env").chmod(0o640)

    @property
    def companies(self) -> list[str]:
        return [row["company_id"] for row in self.world.rows]

    def seed(self) -> None:
        with psycopg.connect(self.url) as connection:
            for row in self.world.rows:
                company = row["company_id"]
                connection.execute(
                    "INSERT INTO whatsapp_auth (company_id, creds) VALUES (%s, %s)", [company, row["creds"]]
                )
                for key_type, key_id, value in row["keys"]:
                    connection.execute(
                        "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value) VALUES (%s, %s, %s, %s)",
                        [company, key_type, key_id, value],
                    )

    def opsctl(self, *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 120) -> Finished:
        done = subprocess.run(
            [*self.inside, sys.executable, "-m", "opsctl", *words],
            env={**self.env, **(env or {})},
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def json(self, *words: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A run that succeeds: its document."""
        done = self.opsctl(*words, "--json", env=env)
        assert done.returncode == 0, done
        document: dict[str, Any] = done.json()
        return document

    def switch(self, *words: str, env: Mapping[str, str] | None = None) -> Finished:
        return self.opsctl("sessions", "restore", "--switch", "--yes", "--json", *words, env=env)

    def failback(self, *words: str, env: Mapping[str, str] | None = None) -> Finished:
        return self.opsctl("sessions", "failback", "--yes", "--json", *words, env=env)


class OnPm2(Rig):
    """Its service runs under PM2."""

    def __init__(self, place: Path, url: str, life: World, manager: Pm2) -> None:
        super().__init__(place, url, life, manager.settings)
        self.pm2 = manager

    def start(self, **env: str) -> None:
        self.pm2(
            "start",
            self.app / "service.mjs",
            "--name",
            SERVICE,
            "--cwd",
            self.app,
            env={"USE_DATABASE_AUTH_STATE": "true", **env},
        )

    def runs_in(self) -> list[Path]:
        """Where the service's processes work, as /proc says; empty where it does not run."""
        listed = json.loads([line for line in self.pm2("jlist").splitlines() if line.startswith("[")][-1])
        pids = [entry["pid"] for entry in listed if entry["name"] == SERVICE and entry["pid"]]
        return [Path(f"/proc/{pid}/cwd").readlink() for pid in pids]

    def definition(self) -> dict[str, Any]:
        """What PM2 was told of the service, without what changes with each start."""
        listed = json.loads([line for line in self.pm2("jlist").splitlines() if line.startswith("[")][-1])
        (entry,) = [entry for entry in listed if entry["name"] == SERVICE]
        changing = {
            "created_at",
            "pm_uptime",
            "unique_id",
            "axm_monitor",
            "axm_actions",
            "axm_options",
            "_tree_pids",
            "instances",
            "exit_code",
            "filter_env",
            "prev_restart_delay",
            "watch",
            "restart_time",
            "version",
            "status",
            "axm_dynamic",
            "node_version",
        }
        found = {name: value for name, value in entry["pm2_env"].items() if name not in changing}
        found["env"] = {name: value for name, value in found["env"].items() if name != "unique_id"}
        return found


class OnSystemd(Rig):
    """Its service is a unit, whose log is in the journal."""

    def __init__(self, place: Path, url: str, life: World, manager: Systemd, path: str) -> None:
        super().__init__(place, url, life, {"PATH": path, "SERVICE_MANAGER": "systemd"})
        self.systemd = manager
        self.inside = manager.inside

    def start(self) -> None:
        self.systemd.unit(f"{SERVICE}.service", UNIT.format(node=node(), app=self.app))
        self.systemd("start", SERVICE)

    def runs_in(self) -> list[Path]:
        """Where the unit's process works, as /proc says; empty where it does not run."""
        pid = self.systemd("show", "--property=MainPID", "--value", SERVICE)
        return [Path(f"/proc/{self.systemd.pid}/root/proc/{pid}/cwd").readlink()] if pid != "0" else []


UNIT = """\
[Service]
WorkingDirectory={app}
Environment=USE_DATABASE_AUTH_STATE=true
EnvironmentFile=-{app}/.env
ExecStart={node} {app}/service.mjs
Restart=always
"""


@contextmanager
def rig(place: Path, url: str, *, companies: int = 2, every_ms: int = 150) -> Iterator[OnPm2]:
    """An installation whose service runs on PostgreSQL, with conversations under way."""
    with _living(place, companies, every_ms) as life, pm2() as manager:
        yield _under_way(OnPm2(place, url, life, manager))


@contextmanager
def systemd_rig(place: Path, url: str, *, companies: int = 2, every_ms: int = 150) -> Iterator[OnSystemd]:
    """The same with a unit of systemd."""
    programs = place / "bin"
    programs.mkdir()
    link_programs(programs)
    path = f"{programs}:{os.environ['PATH']}"
    with _living(place, companies, every_ms) as life, systemd() as manager:
        yield _under_way(OnSystemd(place, url, life, manager, path))


@contextmanager
def _living(place: Path, companies: int, every_ms: int) -> Iterator[World]:
    install(HERE)
    (place / "node_modules").symlink_to(HERE / "node_modules")
    for name in ("world.mjs", "signal.mjs"):
        shutil.copy(PROGRAMS / name, place)
    with world(place, companies, every_ms=every_ms) as life:
        yield life


R = TypeVar("R", OnPm2, OnSystemd)


def _under_way(found: R) -> R:
    found.install()
    found.seed()
    found.start()
    found.world.go_on()
    return found

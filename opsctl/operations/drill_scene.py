"""Where a drill takes place, and what it proves: opsctl's own commands, run as an operator would type them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsctl import process
from opsctl.stores.folder import OPSCTL_FOLDER
from opsctl.stores.publishing import Owner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from opsctl.embedded import EmbeddedServer

ENVIRONMENT = "drill"
_STEP_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the drill proves."""

    check: str
    passed: bool
    seen: str

    @property
    def verdict(self) -> str:
        return "ok" if self.passed else "FAILED"


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a drill takes place."""

    sessions: Path
    owner: Owner
    environment: dict[str, str]

    def opsctl(self, *words: str, inside: Sequence[str] = ()) -> process.Finished:
        """Run one command to its end; `inside` are words of a program that is to run it."""
        line = [*inside, *process.opsctl_words(*words, "--json")]
        return process.run(line, environment=self.environment, timeout_s=_STEP_LIMIT_S)

    def folders(self) -> list[Path]:
        if not self.sessions.is_dir():
            return []
        return sorted(p for p in self.sessions.iterdir() if p.name != OPSCTL_FOLDER)


def made_scene(folder: Path, server: EmbeddedServer) -> Scene:
    """An application folder; as root it belongs to `nobody`, as the service's would to the service's user."""
    app = folder / "app"
    app.mkdir(0o755)
    if os.geteuid() == 0:
        nobody = Owner.named("nobody")
        os.chown(app, nobody.uid, nobody.gid)
    environment = process.bare_environment(
        APP_DIR=str(app),
        DATABASE_URL=server.conninfo(),
        STANDBY_DIR=str(folder / "standby"),
        OPSCTL_STATE_DIR=str(folder / "state"),
        OPSCTL_ENVIRONMENT=ENVIRONMENT,
        OPSCTL_ENV_FILE=os.devnull,
        HOME=str(folder),
    )
    return Scene(app / "baileys_sessions", Owner.of(app), environment)


def passed_if(name: str, finished: process.Finished, expected: str) -> Check:
    """Passed where opsctl ended with 0 and its summary has what was expected."""
    document = finished.document()
    summary = str(document.get("summary") or finished.stderr.strip()[:200] or f"exit {finished.exit_code}")
    passed = finished.exit_code == 0 and expected in summary
    return Check(name, passed, f"{expected} companies" if passed else summary)

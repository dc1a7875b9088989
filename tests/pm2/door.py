"""A real PM2 of its own, from npm, with a folder that is gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.baileys.door import install, link_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SERVICE = HERE / "service.mjs"


@dataclass(frozen=True)
class Pm2:
    """PM2's folder, its user, and a PATH on which opsctl finds it."""

    home: Path
    path: str
    user: str | None

    @property
    def settings(self) -> dict[str, str]:
        """What opsctl needs to know of it."""
        user = {"SERVICE_USER": self.user} if self.user else {}
        return {"PATH": self.path, "SERVICE_MANAGER": "pm2", "PM2_HOME": str(self.home), **user}

    @property
    def daemon(self) -> int:
        return int((self.home / "pm2.pid").read_text())

    def __call__(self, *words: str | Path, env: dict[str, str] | None = None) -> str:
        """Run PM2 as an operator would; its output."""
        done = subprocess.run(
            ["pm2", *words],
            env={"PATH": self.path, "HOME": str(self.home), "PM2_HOME": str(self.home), **(env or {})},
            user=self.user,
            cwd=self.home,  # it may be that the user cannot enter the folder that the tests run in
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def start(self, name: str, *words: str, env: dict[str, str] | None = None) -> None:
        self("start", self.home / SERVICE.name, "--name", name, *words, env=env)


@contextmanager
def pm2(user: str | None = None) -> Iterator[Pm2]:
    """Run a PM2 whose folder has a path short enough for its sockets."""
    install(HERE)
    packages = HERE / "node_modules"
    with tempfile.TemporaryDirectory(prefix="pm2-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        programs = home / "bin"
        programs.mkdir()
        link_programs(programs)
        shutil.copy(SERVICE, home)
        if user is not None:  # who may not be able to enter this repository
            packages = Path(shutil.copytree(packages, home / "node_modules", symlinks=True))
            home.chmod(0o755)
            shutil.chown(home, user)
        (programs / "pm2").symlink_to(packages / "pm2" / "bin" / "pm2")
        daemon = Pm2(home, f"{programs}:{os.environ['PATH']}", user)
        daemon("ping")
        try:
            yield daemon
        finally:
            daemon("kill")

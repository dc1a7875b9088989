"""A real systemd of its own: process 1 of a process namespace, with units, a journal and control groups of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.forks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Layout = Literal["unified", "hybrid"]
"""How control groups are mounted: as systemd does it today, or as it did until about 2020."""

# In a mount namespace of its own. What a booting machine does besides (clean /tmp, apply sysctls) is left out: it has
# no units but those that are written here.
PREPARE = """
mount -t cgroup2 none "$HOME/groups"
mkdir "$HOME/groups/$NAME" && echo $$ > "$HOME/groups/$NAME/cgroup.procs"
if [ "$LAYOUT" = hybrid ]; then
  mkdir "$HOME/named"
  mount -t cgroup -o none,name=systemd none "$HOME/named"
  mkdir "$HOME/named/$NAME" && echo $$ > "$HOME/named/$NAME/cgroup.procs"
fi
exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc sh -euc "$BOOT"
"""
BOOT = """
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/systemd/system
mount -t tmpfs tmpfs /var/log
if [ "$LAYOUT" = hybrid ]; then
  echo "#subsys_name hierarchy num_cgroups enabled" > /run/cgroups
  mount --bind /run/cgroups /proc/cgroups  # or it takes the controllers, which the rest of the machine has too
  mount -t tmpfs tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/unified /sys/fs/cgroup/systemd
  mount -t cgroup2 none /sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd
else
  mount -t cgroup2 none /sys/fs/cgroup
fi
mkdir -p /run/log/journal
UNITS="/etc/systemd/system:/run/systemd/system:$HOME/units"
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$UNITS" \
  /lib/systemd/systemd --system --unit=booted.target --log-target=null
"""
FORGET = """
mount -t cgroup2 none "$HOME/groups" && find "$HOME/groups/$NAME" -depth -type d -exec rmdir {} +
[ "$LAYOUT" = unified ] || {
  mount -t cgroup -o none,name=systemd none "$HOME/named" && find "$HOME/named/$NAME" -depth -type d -exec rmdir {} +
}
"""
BOOTED = """
[Unit]
DefaultDependencies=no
Requires=systemd-journald.service
After=systemd-journald.service
"""
_EMPTY = ("sysinit", "basic", "shutdown", "sockets", "timers", "multi-user")
_JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
_BOOT_S = 30.0


@dataclass(frozen=True)
class Systemd:
    """The running one. `inside` are the words to put before a command that is to see it."""

    pid: int

    @property
    def inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.pid}", "--all", "--")

    @property
    def units(self) -> Path:
        """Its /etc/systemd/system, seen from outside."""
        return Path(f"/proc/{self.pid}/root/etc/systemd/system")

    def __call__(self, *words: str) -> str:
        """Run systemctl as an operator would; its output, also where it fails."""
        line = (*self.inside, "systemctl", *words)
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False).stdout.strip()

    def unit(self, name: str, text: str) -> None:
        """Install a unit."""
        (self.units / name).write_text(text)
        self("daemon-reload")

    def python(self, code: str) -> Any:
        """What a program prints that sees it; JSON."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
        line = [*self.inside, sys.executable, "-c", code]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@contextmanager
def systemd(layout: Layout = "unified") -> Iterator[Systemd]:
    """Boot, and be gone without a trace afterwards."""
    with tempfile.TemporaryDirectory(prefix="systemd-") as folder:
        home = Path(folder)
        (home / "groups").mkdir()
        _write_units(home / "units")
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": folder, "NAME": home.name, "LAYOUT": layout}
        words = ["unshare", "--mount", "sh", "-euc"]
        booting = subprocess.Popen([*words, PREPARE], env={**environment, "BOOT": BOOT})
        try:
            yield _booted(booting)
        finally:
            booting.kill()  # and with it process 1, and with that every other
            booting.wait()
            _forget([*words, FORGET], environment)


def _write_units(folder: Path) -> None:
    folder.mkdir()
    for name in _EMPTY:
        (folder / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    for name in _JOURNAL:
        shutil.copy(Path("/lib/systemd/system", name), folder)
    (folder / "booted.target").write_text(BOOTED)


def _booted(booting: subprocess.Popen[bytes]) -> Systemd:
    give_up_at = time.monotonic() + _BOOT_S
    while time.monotonic() < give_up_at:
        assert booting.poll() is None, "systemd did not start"
        children = Path(f"/proc/{booting.pid}/task/{booting.pid}/children").read_text().split()
        if children:
            started = Systemd(int(children[0]))
            if started("is-active", "booted.target") == "active":
                return started
        time.sleep(0.05)
    raise TimeoutError("systemd did not come up")


def _forget(words: list[str], environment: Mapping[str, str]) -> None:
    give_up_at = time.monotonic() + 5.0
    while subprocess.run(words, env=environment, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < give_up_at, "its control groups are still there"
        time.sleep(0.05)  # the last of its processes is still ending

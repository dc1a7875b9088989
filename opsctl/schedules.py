"""The door to what runs by the clock on this machine: crontabs, systemd timers, PM2's cron restarts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from opsctl import process, services
from opsctl.crontab import lines, times
from opsctl.errors import SettingsError
from opsctl.jobs import JOBS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import tzinfo

    from opsctl.crontab import Times
    from opsctl.settings import Settings

TIMEOUT_S = 5.0
_SYSTEM_CRONTAB, _CRON_FOLDER = Path("/etc/crontab"), Path("/etc/cron.d")
_LOCALTIME = Path("/etc/localtime")
_DAEMONS = {"cron", "crond", "cronie", "fcron", "systemd-cron"}
_NOT_AT_BOOT = {"disabled", "linked", "enabled-runtime", "linked-runtime", "transient", "masked", "masked-runtime"}
"""What systemctl(1) says under is-enabled of a unit that nothing starts when the machine does."""
_CALENDAR = re.compile(r"\*-\*-(\*|\d\d?) (\*|\d\d?):(\*|\d\d?)(/\d+)?:00(?P<utc> UTC)?")


@dataclass(frozen=True, slots=True)
class Installed:
    """One thing that runs by the clock; `times` is None where `when` says more than we read."""

    place: str
    when: str
    times: Times | None
    zone: tzinfo
    command: str
    change: str
    """What to type to change it."""
    off: str | None = None
    """Why it does not run, if it does not."""
    until_reboot: str | None = None
    """Why it runs now and not after the next start of the machine, if that is so."""
    environment: Mapping[str, str] = field(default_factory=dict)
    by_cron: bool = False


def local_zone() -> tzinfo:
    """The machine's time zone, by which cron goes; UTC where it has none."""
    try:
        with _LOCALTIME.open("rb") as file:
            return ZoneInfo.from_file(file, key="local")
    except (OSError, ValueError):
        return UTC


def installed(settings: Settings, users: Sequence[str]) -> tuple[Installed, ...]:
    """Everything that can be read, also what has nothing to do with us."""
    zone = local_zone()
    return (*_crontabs(users, zone), *_timers(zone), *_pm2(settings, zone))


def cron_runs() -> bool:
    """Whether a cron daemon is among the processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "comm").read_text(errors="replace").strip() in _DAEMONS:
                return True
    return False


def _crontabs(users: Iterable[str], zone: tzinfo) -> Iterator[Installed]:
    if shutil.which("crontab"):
        for user in users:
            whose = ["-u", user] if os.geteuid() == 0 else []
            words = ["crontab", "-l", *whose]
            done = process.run(words, environment=process.bare_environment(), timeout_s=TIMEOUT_S)
            text = done.stdout.decode(errors="replace") if done.exit_code == 0 else ""
            change = shlex.join(["crontab", "-e", *whose])
            yield from _crontab(f"crontab of {user}", text, zone, change=change, with_user=False)
    folder = sorted(_CRON_FOLDER.iterdir()) if _CRON_FOLDER.is_dir() else []
    for file in (_SYSTEM_CRONTAB, *(path for path in folder if re.fullmatch(r"[\w-]+", path.name))):
        with suppress(OSError):
            yield from _crontab(
                str(file), file.read_text(errors="replace"), zone, change=f"editor {file}", with_user=True
            )


def _crontab(place: str, text: str, zone: tzinfo, *, change: str, with_user: bool) -> Iterator[Installed]:
    for line in lines(text, with_user=with_user):
        yield Installed(
            place=f"{place}, line {line.number}",
            when=line.when,
            times=times(line.when),
            zone=zone,
            command=line.command,
            change=change,
            off="commented out" if line.off else None,
            environment=line.environment,
            by_cron=True,
        )


def _timers(zone: tzinfo) -> Iterator[Installed]:
    """Timers that are loaded, and those of ours that are only installed: a pattern does not find them."""
    wanted = "Id,Unit,LoadState,ActiveState,UnitFileState,TimersCalendar"
    ours = [f"opsctl-{job.name}.timer" for job in JOBS]
    timers = [timer for timer in _shown(wanted, "*.timer", *ours) if timer.get("LoadState") == "loaded"]
    units = {timer.get("Unit", "") for timer in timers} - {""}
    if not units:
        return
    services_ = {s.get("Id"): s for s in _shown("Id,ExecStart,Environment", *sorted(units))}
    for timer in timers:
        service = services_.get(timer.get("Unit"), {})
        when = re.search(r"OnCalendar=(.*?) ;", timer.get("TimersCalendar", ""))
        command = re.search(r"argv\[\]=(.*?) ;", service.get("ExecStart", ""))
        if when is None or command is None:
            continue
        fields = _five_fields(when[1])
        active, at_boot = timer.get("ActiveState"), timer.get("UnitFileState")
        yield Installed(
            place=str(timer.get("Id")),
            when=when[1],
            times=fields,
            zone=UTC if when[1].endswith(" UTC") else zone,
            command=command[1],
            change=f"systemctl enable --now {timer.get('Id')}",
            off=None if active == "active" else f"the timer is {active}",
            until_reboot=f"started, but {at_boot}: gone after a reboot" if at_boot in _NOT_AT_BOOT else None,
            environment=dict(w.split("=", 1) for w in _split(service.get("Environment", "")) if "=" in w),
        )


def _shown(properties: str, *units: str) -> list[dict[str, str]]:
    """`systemctl show`: a block of lines per unit. Nothing where systemd does not run."""
    if shutil.which("systemctl") is None:
        return []
    words = ["systemctl", "show", "--all", f"--property={properties}", "--", *units]
    done = process.run(words, environment=process.bare_environment(), timeout_s=TIMEOUT_S)
    blocks = done.stdout.decode(errors="replace").split("\n\n") if done.exit_code == 0 else []
    found = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks]
    return list({block["Id"]: block for block in found if "Id" in block}.values())


def _five_fields(calendar: str) -> Times | None:
    """What systemd.time(7) writes for the plain cases: daily, monthly, every so many minutes."""
    found = _CALENDAR.fullmatch(calendar)
    if found is None:
        return None
    day, hour, minute, step = found.groups()[:4]
    minute = f"{'*' if step and int(minute) == 0 else minute}{step or ''}"
    return times(f"{minute} {hour} {day} * *")


def _pm2(settings: Settings, zone: tzinfo) -> Iterator[Installed]:
    try:
        listed = services.pm2_processes(settings)
    except SettingsError:
        return
    for entry in listed:
        when = entry.get("cron_restart")
        arguments = entry.get("args")
        words = arguments if isinstance(arguments, list) else []
        yield Installed(
            place=f"PM2's {entry['name']}",
            when=str(when or ""),
            times=times(str(when)),
            zone=zone,
            command=" ".join(map(str, [entry.get("pm_exec_path"), *words])),
            change="opsctl cron show --as pm2",
            off=None if when not in {None, "", 0, "0"} else "PM2 has no cron restart for it",
            environment={"CLEANUP_AT": str(entry.get("CLEANUP_AT", ""))},  # the others are nobody's business
        )


def _split(text: str) -> list[str]:
    with suppress(ValueError):
        return shlex.split(text)
    return []

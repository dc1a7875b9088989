"""What cron has to run on this machine, written for crontab, systemd or PM2; and whether it is installed that way."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from opsctl import schedules
from opsctl.crontab import DEFAULT_PATH, times
from opsctl.jobs import JOBS, LOCKED
from opsctl.report import Column, Failure, Report
from opsctl.settings import TimeOfDay
from opsctl.stores.publishing import Owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import tzinfo

    from opsctl.jobs import Job
    from opsctl.schedules import Installed
    from opsctl.settings import Settings

KILL_AFTER_S = 30
"""From the polite signal to the other one."""
_BACKUP = re.compile(r"pg_dump|pg_basebackup|pgbackrest|barman|wal-g|backup", re.IGNORECASE)
_YEAR, _MONTH, _DAY = 366, 32, 1


class Form(StrEnum):
    """For whom the jobs are written down."""

    CRONTAB = "crontab"
    SYSTEMD = "systemd"
    PM2 = "pm2"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the lines are made from."""

    program: tuple[str, ...]
    path: str
    user: str
    state_dir: Path
    environment: dict[str, str]
    """What each job needs beside PATH."""
    schedules: dict[str, str]
    """Five fields in UTC, by job."""
    zone: tzinfo
    comments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job as it is to be installed."""

    job: str
    when: str
    """In UTC."""
    command: str
    longest_min: int


@dataclass(frozen=True, slots=True)
class CronFinding:
    """One job as it is installed; `action` is what to do about it, unless it is ok."""

    job: str
    state: str
    seen: str
    action: str | None = None


_COLUMNS = (Column("Job", "job"), Column("State", "state"), Column("Seen", "seen"), Column("What to do", "action"))
_OK = "ok"


def show(settings: Settings, form: Form) -> Report:
    """The jobs as they are to be installed, ready to be piped to where they belong."""
    plan = _plan(settings)
    written = {Form.CRONTAB: _crontab, Form.SYSTEMD: _systemd, Form.PM2: _pm2}[form](plan)
    mark = "//" if form is Form.PM2 else "#"
    rows = [JobLine(job.command, plan.schedules[job.name], _line(plan, job), job.longest_min) for job in JOBS]
    return Report(
        summary=f"{mark} {len(JOBS)} jobs for {plan.user}; afterwards: opsctl cron show --check",
        rows=rows,
        page=[*(f"{mark} {comment}" for comment in plan.comments), *written],
        facts={"form": form, "user": plan.user, "environment": plan.environment, "comments": plan.comments},
    )


def check(settings: Settings) -> Report:
    """Whether each job is installed, enabled, on time and out of a backup's way; 1 where one is not."""
    found = schedules.installed(settings, _users(settings))
    backups = _backups(found)
    rows = [row for job in JOBS for row in _look_at(job, found, backups, settings)]
    if any(one.by_cron and one.off is None and _job_in(one.command) for one in found):
        rows.append(_daemon())
    bad = [row for row in rows if row.state != _OK]
    failure = None
    if bad:
        what = f"{len(bad)} of {len(rows)} are not in order: " + "; ".join(f"{row.job} {row.state}" for row in bad)
        failure = Failure("cron", what, hint=bad[0].action)
    return Report(
        summary=failure.message if failure else f"all {len(JOBS)} jobs are installed",
        rows=rows,
        columns=_COLUMNS,
        exit_code=1 if bad else 0,
        failure=failure,
    )


# --- what is to be installed ------------------------------------------------------------------------------------------


def _plan(settings: Settings) -> Plan:
    beside = Path(sys.executable).with_name("opsctl")
    program = (str(beside),) if os.access(beside, os.X_OK) else (sys.executable, "-m", "opsctl")
    found = [shutil.which(name) for name in ("node", "pm2")] if settings["SERVICE_MANAGER"] == "pm2" else []
    folders = [str(Path(one).parent) for one in (program[0], *found) if one]
    at, comments = settings["CLEANUP_AT"], []
    environment = {}
    if settings.env_file is not None:
        environment["OPSCTL_ENV_FILE"] = str(settings.env_file.absolute())
    if here := [name for name, setting in settings.all.items() if setting.origin == "environment"]:
        comments.append(f"Cron does not know what is set in this shell only: {', '.join(here)}.")
        comments.append("Put it into the file that opsctl reads (--env-file FILE, else ./.env), and type this again.")
    backups = _backups(schedules.installed(settings, _users(settings)))
    if in_the_way := _collision(at, backups):
        at = _free_time(at, backups)
        comments.append(f"A backup runs at the cleanup's minute ({in_the_way.place}), so the cleanup is at {at}.")
        environment["CLEANUP_AT"] = str(at)
    return Plan(
        program=program,
        path=":".join(dict.fromkeys([*folders, "/usr/local/bin", "/usr/bin", "/bin"])),
        user=Owner.current().name,
        state_dir=settings.state_dir,
        environment=environment,
        schedules={job.name: job.at(at) for job in JOBS},
        zone=schedules.local_zone(),
        comments=tuple(comments),
    )


def _line(plan: Plan, job: Job) -> str:
    return shlex.join([*plan.program, *job.command.split(), *job.flags.split()])


def _crontab(plan: Plan) -> Iterator[str]:
    yield f"# Add these to the crontab of {plan.user}: (crontab -l; opsctl cron show --as crontab) | crontab -"
    yield "SHELL=/bin/sh"
    for name, value in {"PATH": plan.path, **plan.environment}.items():
        yield f'{name}="{value}"'
    for job in JOBS:
        when, note = _by_the_clock_here(plan.schedules[job.name], plan.zone)
        yield f"# opsctl {job.command}{note}"
        command = _guarded(plan, job).replace("%", r"\%")  # which alone is the end of a command there
        yield f"{when} {command}"


def _guarded(plan: Plan, job: Job) -> str:
    """A line for sh: nobody else reads what it makes, no second one beside it, and an end to it."""
    lock = shlex.quote(str(plan.state_dir / f"cron-{job.name}.lock"))
    return (
        f"umask 077; mkdir -p {shlex.quote(str(plan.state_dir))} && exec flock -n -E {LOCKED} {lock} "
        f"timeout -k {KILL_AFTER_S} {job.longest_min * 60} {_line(plan, job)}"
    )


def _by_the_clock_here(schedule: str, zone: tzinfo) -> tuple[str, str]:
    """The same in this machine's time, by which cron goes, and what to know about it."""
    minute, hour, day, *rest = schedule.split()
    if not hour.isdecimal():
        return schedule, ""
    now = datetime.now(UTC)
    offsets = {(now + timedelta(days=days)).astimezone(zone).utcoffset() for days in range(0, _YEAR, 7)}
    there = now.replace(day=int(day) if day != "*" else 15, hour=int(hour), minute=int(minute)).astimezone(zone)
    if offsets == {timedelta(0)}:
        return schedule, ""
    note = f": {int(hour):02}:{int(minute):02} UTC by this machine's clock"
    if len(offsets) > 1:
        note += " now; when it is put forward or back, change this line (--as systemd knows UTC)"
    return " ".join([str(there.minute), str(there.hour), str(there.day) if day != "*" else "*", *rest]), note


def _systemd(plan: Plan) -> Iterator[str]:
    yield "# Install these: opsctl cron show --as systemd | sudo sh"
    yield "set -eu"
    for job in JOBS:
        unit = f"/etc/systemd/system/opsctl-{job.name}"
        yield f"cat >{unit}.service <<'END'"
        yield "[Unit]"
        yield f"Description=opsctl {job.command}"
        yield "After=network-online.target"
        yield "[Service]"
        yield "Type=oneshot"  # of which systemd starts no second one beside the first
        yield f"User={plan.user}"
        yield "UMask=0077"
        for name, value in {"PATH": plan.path, **plan.environment}.items():
            yield f"Environment={_unit_word(f'{name}={value}')}"
        yield f"TimeoutStartSec={job.longest_min * 60}"
        yield f"TimeoutStopSec={KILL_AFTER_S}"
        yield f"SuccessExitStatus={LOCKED}"
        yield f"ExecStart={' '.join(map(_unit_word, shlex.split(_line(plan, job))))}"
        yield "END"
        yield f"cat >{unit}.timer <<'END'"
        yield "[Unit]"
        yield f"Description=opsctl {job.command}"
        yield "[Timer]"
        yield f"OnCalendar={_calendar(plan.schedules[job.name])}"
        yield "AccuracySec=1s"
        yield "[Install]"
        yield "WantedBy=timers.target"
        yield "END"
    yield "systemctl daemon-reload"
    yield f"systemctl enable --now {' '.join(f'opsctl-{job.name}.timer' for job in JOBS)}"


def _unit_word(word: str) -> str:
    """A word of a unit file (systemd.syntax(7), systemd.service(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./:=@+,%$-]+", escaped) else f'"{escaped}"'


def _calendar(schedule: str) -> str:
    """Five fields as systemd.time(7) has them."""
    minute, hour, day, _, _ = schedule.split()
    if minute.startswith("*/"):
        minute = f"00/{minute[2:]}"
    minute, hour, day = (word.zfill(2) if word.isdecimal() else word for word in (minute, hour, day))
    return f"*-*-{day} {hour}:{minute}:00 UTC"


def _pm2(plan: Plan) -> Iterator[str]:
    yield "// Install these: opsctl cron show --as pm2 >opsctl.config.js && pm2 start opsctl.config.js && pm2 save"
    yield "// PM2 runs each of them once at that moment, and ends one that still runs when it is due again."
    apps = []
    notes = []
    for job in JOBS:
        when, note = _by_the_clock_here(plan.schedules[job.name], plan.zone)
        notes += [f"// opsctl {job.command}{note}"] if note else []
        apps.append(
            {
                "name": f"opsctl-{job.name}",
                "script": "/bin/sh",
                "interpreter": "none",
                "args": ["-c", _guarded(plan, job)],
                "cron_restart": when,
                "autorestart": False,
                "kill_timeout": KILL_AFTER_S * 1000,
                "env": {"PATH": plan.path, **plan.environment},
            }
        )
    yield from notes
    yield from f"module.exports = {orjson.dumps({'apps': apps}, option=orjson.OPT_INDENT_2).decode()};".splitlines()


# --- what is installed ------------------------------------------------------------------------------------------------


def _users(settings: Settings) -> list[str]:
    """Whose crontabs are read: ours, and as root also that of whoever owns the service's folder."""
    users = [Owner.current().name]
    app_dir = settings["APP_DIR"]
    if os.geteuid() == 0 and app_dir is not None and app_dir.is_dir():
        users.append(Owner.of(app_dir).name)
    return list(dict.fromkeys(users))


def _job_in(command: str) -> Job | None:
    """The job that a command line runs."""
    for job in JOBS:
        words = r"\s+".join(map(re.escape, job.command.split()))
        if re.search(rf"(?:^|[/\s;&'\"])opsctl\s+{words}(?![\w-])(?!.*--dry-run)", command):
            return job
    return None


def _backups(found: Iterable[Installed]) -> list[Installed]:
    """What looks like a backup and has minutes of its own: what runs in each of them is in nobody's way."""
    backups = (one for one in found if one.off is None and _BACKUP.search(one.command) and not _job_in(one.command))
    return [one for one in backups if one.times is not None and len(one.times.minutes) < 60]


def _collision(at: TimeOfDay, backups: Sequence[Installed]) -> Installed | None:
    """The first backup that runs in that minute of any day of the year to come."""
    today = datetime.now(UTC).replace(hour=at.hour, minute=at.minute, second=0, microsecond=0)
    for backup in backups:
        for day in range(_YEAR):
            moment = (today + timedelta(days=day)).astimezone(backup.zone)
            if backup.times is not None and backup.times.at(moment):
                return backup
    return None


def _free_time(at: TimeOfDay, backups: Sequence[Installed]) -> TimeOfDay:
    """The next half hour in whose minute no backup runs, else the next minute; `at` where there is none."""
    for later in (*range(30, 24 * 60, 30), *range(1, 24 * 60)):
        minutes = (at.hour * 60 + at.minute + later) % (24 * 60)
        if not _collision(tried := TimeOfDay(*divmod(minutes, 60)), backups):
            return tried
    return at


def _look_at(
    job: Job, found: Sequence[Installed], backups: Sequence[Installed], settings: Settings
) -> Iterator[CronFinding]:
    ours = [one for one in found if _job_in(one.command) is job]
    running = [one for one in ours if one.off is None]
    if not running:
        if ours:
            yield CronFinding(job.command, "disabled", f"{ours[0].place}: {ours[0].off}", ours[0].change)
        else:
            yield CronFinding(job.command, "missing", "nothing runs it", "opsctl cron show")
        return
    if len(running) > 1:
        seen = " and ".join(one.place for one in running)
        yield CronFinding(job.command, "twice", seen, "remove all but one")
        return
    [one] = running
    if one.until_reboot:
        yield CronFinding(job.command, "disabled", f"{one.place}: {one.until_reboot}", one.change)
        return
    yield _judged(job, one, backups, settings)


def _daemon() -> CronFinding:
    if schedules.cron_runs():
        return CronFinding("cron itself", _OK, "its daemon runs")
    return CronFinding("cron itself", "stopped", "no cron daemon runs here", "start it, and let it start at boot")


def _judged(job: Job, one: Installed, backups: Sequence[Installed], settings: Settings) -> CronFinding:
    seen = f"{one.place}: {one.when}"
    missing = [flag for flag in job.flags.split() if flag == "--yes" and flag not in one.command]
    if missing:
        return CronFinding(job.command, "asks", f"{seen}: without --yes it ends with 2", one.change)
    path = one.environment.get("PATH", DEFAULT_PATH)
    if one.by_cron and not _reached(one.command, path):
        return CronFinding(job.command, "not found", f"{seen}: there is no opsctl on its PATH ({path})", one.change)
    expected = _expected(job, one, settings)
    if one.times is None:
        return CronFinding(job.command, "unclear", f"{seen}: not read by opsctl", f"compare with {expected} UTC")
    days = _DAY if "*" in expected.split()[1] else _MONTH
    since = datetime.now(UTC).replace(second=0, microsecond=0)
    starts = set(one.times.starts(since, days, one.zone))
    wanted = times(expected)
    if wanted is not None and starts != set(wanted.starts(since, days, UTC)):
        action = "opsctl cron show"
        if job.is_movable and len({(s.hour, s.minute) for s in starts}) == 1:
            first = min(starts)
            action = f"set CLEANUP_AT={first:%H:%M}, or move it"
        return CronFinding(job.command, "off time", f"{seen}: its monitor expects {expected} UTC", action)
    if job.is_movable and (in_the_way := _collision(_time_of(expected), backups)):
        at = _free_time(_time_of(expected), backups)
        seen = f"{seen}: a backup runs in that minute ({in_the_way.place})"
        return CronFinding(job.command, "collides", seen, f"opsctl cron show    # puts it at {at}")
    return CronFinding(job.command, _OK, seen)


def _expected(job: Job, one: Installed, settings: Settings) -> str:
    """When the job's monitor expects it: the environment of the line wins, as it does for the run."""
    found = re.fullmatch(r"(\d\d?):(\d\d)", one.environment.get("CLEANUP_AT", ""))
    at = TimeOfDay(int(found[1]), int(found[2])) if found else settings["CLEANUP_AT"]
    return job.at(at)


def _time_of(schedule: str) -> TimeOfDay:
    minute, hour, *_ = schedule.split()
    return TimeOfDay(int(hour), int(minute))


def _reached(command: str, path: str) -> bool:
    """Whether the opsctl of the command is where the command says, or on its PATH."""
    named = re.search(r"(?:^|[\s;&'\"])(\S*/)?opsctl\s", command)
    if named is None or "-m opsctl" in command:
        return True
    return os.access(f"{named[1]}opsctl", os.X_OK) if named[1] else shutil.which("opsctl", path=path) is not None

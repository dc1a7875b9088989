"""What is set and where it comes from, and whether this installation could restore tonight. Nothing here connects."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsctl import db, notify, process
from opsctl.errors import Refused, SettingsError
from opsctl.report import Column, Failure, Outcome, Report
from opsctl.state import State
from opsctl.stores.publishing import Owner, check_root

if TYPE_CHECKING:
    from pathlib import Path

    from opsctl.settings import Settings

# The plan: 50 companies of at most 2,317 keys and 5 MB each. A restore needs room for a new copy beside the old one.
COMFORTABLE_BYTES = 2 * 50 * 5 * 1024 * 1024
COMFORTABLE_FILES = 2 * 50 * 2317
SMALLEST_BYTES = 64 * 1024 * 1024
CRONTAB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One variable as it is effective."""

    variable: str
    value: str
    origin: str
    problem: str | None
    meaning: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw; `action` is what to do about it, unless it is ok."""

    check: str
    verdict: Outcome
    seen: str
    action: str | None = None


def show(settings: Settings, *, with_meanings: bool) -> Report:
    """Every variable with its value, secrets masked, and its origin; 3 where one makes no sense."""
    rows = tuple(
        SettingRow(
            variable=name,
            value="" if setting.problem else setting.shown(),
            origin=setting.origin,
            problem=setting.problem,
            meaning=setting.variable.meaning,
        )
        for name, setting in settings.all.items()
    )
    columns = [Column("variable", "variable"), Column("value", "value"), Column("from", "origin")]
    if settings.problems:
        columns.append(Column("problem", "problem"))
    if with_meanings:
        columns.append(Column("meaning", "meaning"))
    set_here = sum(setting.origin != "default" for setting in settings.all.values())
    failure = Failure("settings", "; ".join(settings.problems)) if settings.problems else None
    return Report(
        f"{set_here} of {len(rows)} variables are set",
        rows=rows,
        columns=columns,
        exit_code=SettingsError.exit_code if failure else 0,
        failure=failure,
    )


def check(settings: Settings) -> Report:
    """Whether a restore could begin: settings, folders, users, space, addresses, jobs; 1 where something fails."""
    owner, service = _service_user(settings)
    findings = (
        _settings(settings),
        _settings_file(settings),
        service,
        _this_user(owner),
        _sessions_folder(settings, owner),
        _space(settings),
        _state_folder(settings),
        _standby_folder(settings),
        _database(settings),
        _error_tracking(settings),
        _telegram(settings),
        _dead_man(settings),
        _cron(owner),
    )
    failed = [finding for finding in findings if finding.verdict is Outcome.FAILED]
    warned = [finding for finding in findings if finding.verdict is Outcome.WARNING]
    failure = None
    if failed:
        what = f"{len(failed)} of {len(findings)} checks failed: {', '.join(f.check for f in failed)}"
        failure = Failure("not-ready", what, hint=failed[0].action)
    return Report(
        failure.message if failure else f"a restore could begin: {len(findings) - len(warned)} checks are ok",
        rows=findings,
        columns=[Column(name, name) for name in ("check", "verdict", "seen")] + [Column("what to do", "action")],
        warnings=[f"{finding.check}: {finding.seen}" for finding in warned],
        exit_code=1 if failed else 0,
        failure=failure,
    )


def _settings(settings: Settings) -> Finding:
    if settings.problems:
        return Finding("settings", Outcome.FAILED, "; ".join(settings.problems), "opsctl config show")
    return Finding("settings", Outcome.OK, f"environment {settings.environment}")


def _settings_file(settings: Settings) -> Finding:
    path = settings.env_file
    if path is None:
        return Finding("settings file", Outcome.OK, "none; the environment alone")
    mode = stat.S_IMODE(path.stat().st_mode)
    secrets = sorted(s.variable.name for s in settings.all.values() if s.variable.secret and s.origin == str(path))
    if secrets and mode & stat.S_IROTH:
        seen = f"{path} holds {', '.join(secrets)} and everybody may read it ({mode:04o})"
        return Finding("settings file", Outcome.FAILED, seen, f"chmod o-rwx {path}")
    return Finding("settings file", Outcome.OK, f"{path} ({mode:04o})")


def _service_user(settings: Settings) -> tuple[Owner, Finding]:
    """The owner of APP_DIR; without it restore takes the folder's owner, or whoever runs it."""
    app_dir = settings["APP_DIR"]
    if app_dir is None:
        seen, action = "APP_DIR is not set, so restored files belong to whoever runs the restore", "set APP_DIR"
        return Owner.current(), Finding("service user", Outcome.WARNING, seen, action)
    if not app_dir.is_dir():
        finding = Finding("service user", Outcome.FAILED, f"APP_DIR ({app_dir}) is not a folder", "correct APP_DIR")
        return Owner.current(), finding
    owner = Owner.of(app_dir)
    return owner, Finding("service user", Outcome.OK, f"{owner.name} (uid {owner.uid}), who owns {app_dir}")


def _this_user(owner: Owner) -> Finding:
    current = Owner.current()
    seen = f"{current.name} (uid {current.uid})"
    if current.uid in {0, owner.uid}:
        return Finding("this user", Outcome.OK, seen)
    seen += f" cannot give files to {owner.name}; only root and {owner.name} can"
    return Finding("this user", Outcome.FAILED, seen, f"sudo -u {owner.name} opsctl ...")


def _sessions_folder(settings: Settings, owner: Owner) -> Finding:
    try:
        path = settings.sessions_dir
        check_root(path, owner)
    except (SettingsError, Refused) as error:
        return Finding("sessions folder", Outcome.FAILED, error.message, error.hint)
    if not path.exists():
        return Finding("sessions folder", Outcome.OK, f"{path} is not there yet; restore will make it")
    blocked = _blocked(path, owner)
    if blocked:
        seen = f"the mode of {blocked} keeps {owner.name} from writing to {path}"
        return Finding("sessions folder", Outcome.FAILED, seen, f"check the owner and mode of {blocked}")
    status = path.stat()
    seen = f"{path} of {Owner.of(path).name} ({stat.S_IMODE(status.st_mode):04o})"
    if status.st_uid != owner.uid:
        return Finding("sessions folder", Outcome.WARNING, f"{seen}, not of {owner.name}", f"chown {owner.name} {path}")
    return Finding("sessions folder", Outcome.OK, seen)


def _blocked(path: Path, owner: Owner) -> Path | None:
    """The first folder on the way whose mode keeps the service's user out; access lists are not looked at."""
    if owner.uid == 0:
        return None
    try:
        groups = os.getgrouplist(owner.name, pwd.getpwuid(owner.uid).pw_gid)
    except KeyError:  # a uid without an account
        groups = [owner.gid]
    for folder in (*reversed(path.parents), path):
        status = folder.stat()
        shift = 6 if status.st_uid == owner.uid else 3 if status.st_gid in groups else 0
        wanted = 0o3 if folder == path else 0o1
        if (status.st_mode >> shift) & wanted != wanted:
            return folder
    return None


def _space(settings: Settings) -> Finding:
    try:
        path = settings.sessions_dir
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        status = os.statvfs(there)
    except (SettingsError, OSError):
        return Finding("free space", Outcome.WARNING, "not known without a sessions folder", "set SESSIONS_DIR")
    free_bytes = status.f_bavail * status.f_frsize
    seen = f"{free_bytes / 1024**2:,.0f} MiB"
    files_are_few = status.f_files > 0 and status.f_favail < COMFORTABLE_FILES  # some filesystems count none
    if files_are_few:
        seen += f" and room for {status.f_favail:,} files"
    seen += f" at {there}"
    if free_bytes < SMALLEST_BYTES:
        return Finding("free space", Outcome.FAILED, seen, f"df -h {there}")
    if free_bytes < COMFORTABLE_BYTES or files_are_few:
        seen += "; 50 companies, beside their old folders, take "
        seen += f"{COMFORTABLE_BYTES // 1024**2} MiB and {COMFORTABLE_FILES:,} files"
        return Finding("free space", Outcome.WARNING, seen, f"df -h {there}; df -i {there}")
    return Finding("free space", Outcome.OK, seen)


def _state_folder(settings: Settings) -> Finding:
    try:
        folder = settings.state_dir
    except SettingsError as error:
        return Finding("state folder", Outcome.WARNING, error.message, "set OPSCTL_STATE_DIR")
    problem = State(folder).problem()
    if problem:
        seen = f"{problem}; there will be no history, and alerts repeat"
        return Finding("state folder", Outcome.WARNING, seen, "set OPSCTL_STATE_DIR")
    return Finding("state folder", Outcome.OK, str(folder))


def _standby_folder(settings: Settings) -> Finding:
    """Whether the warm copies can be written, and published by a rename, which needs one filesystem."""
    try:
        path = settings.standby_dir
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        status = there.stat()
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=True)
    except (SettingsError, OSError):
        return Finding("standby folder", Outcome.WARNING, "not known where it would be", "set STANDBY_DIR")
    me = Owner.current()
    if not writable or os.statvfs(there).f_flag & os.ST_RDONLY:
        return Finding("standby folder", Outcome.WARNING, f"{me.name} cannot write in {there}", "set STANDBY_DIR")
    if there == path and (status.st_uid != me.uid or status.st_mode & 0o077):
        seen = f"{path} holds keys and is not for {me.name} alone"
        return Finding("standby folder", Outcome.FAILED, seen, f"chown {me.name} {path}; chmod 700 {path}")
    device = _device_of_sessions(settings)
    if device is not None and device != status.st_dev:
        seen = f"{path} is on another filesystem than the sessions: a restore from it has to copy every file"
        return Finding("standby folder", Outcome.WARNING, seen, "set STANDBY_DIR to a folder beside the sessions")
    return Finding("standby folder", Outcome.OK, f"{path}" if there == path else f"{path}, not there yet")


def _device_of_sessions(settings: Settings) -> int | None:
    with suppress(SettingsError, OSError):
        path = settings.sessions_dir
        return next(folder for folder in (path, *path.parents) if folder.exists()).stat().st_dev
    return None


def _database(settings: Settings) -> Finding:
    try:
        parameters = db.address(settings)
    except SettingsError as error:
        return Finding("database address", Outcome.FAILED, error.message, error.hint)
    return Finding("database address", Outcome.OK, f"{db.place(parameters)} (not connected to)")


def _error_tracking(settings: Settings) -> Finding:
    if settings["SENTRY_DSN"]:
        return _receiver(settings, "sentry", "error tracking", "SENTRY_DSN is set", "check SENTRY_DSN")
    return Finding("error tracking", Outcome.WARNING, "failures are reported to nobody", "set SENTRY_DSN")


def _telegram(settings: Settings) -> Finding:
    names = ("TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID")
    missing = [name for name in names if not settings[name]]
    if len(missing) == 1:
        return Finding("telegram", Outcome.WARNING, f"{missing[0]} is not set, so nothing is sent", f"set {missing[0]}")
    if missing:
        return Finding("telegram", Outcome.OK, "not used")
    return _receiver(settings, "telegram", "telegram", "bot and chat are set", f"check {' and '.join(names)}")


def _receiver(settings: Settings, receiver: str, check: str, seen: str, action: str) -> Finding:
    """What became of what was sent; nothing is sent here."""
    try:
        standing = notify.standing(settings.state_dir, receiver)
    except SettingsError:
        return Finding(check, Outcome.OK, seen)
    if standing.status is not None and standing.status >= 300:
        refused = f"its last answer, at {standing.at}, was {standing.status}: it does not take what is sent"
        return Finding(check, Outcome.WARNING, refused, action)
    if standing.waiting:
        return Finding(check, Outcome.WARNING, f"{standing.waiting} wait because nobody answered", action)
    return Finding(check, Outcome.OK, seen)


def _dead_man(settings: Settings) -> Finding:
    url = settings["HEALTHCHECK_URL"]
    if url and "{job}" not in url:
        seen = "HEALTHCHECK_URL has no {job} in it: one job hides another's silence"
        return Finding("dead-man ping", Outcome.WARNING, seen, "put {job} into HEALTHCHECK_URL")
    if not url and settings["SENTRY_DSN"]:
        seen = "only monitors of Sentry would notice a machine that is gone, and GlitchTip has none"
        return Finding("dead-man ping", Outcome.WARNING, seen, "set HEALTHCHECK_URL")
    return Finding("dead-man ping", Outcome.OK, "HEALTHCHECK_URL is set" if url else "not used")


def _cron(owner: Owner) -> Finding:
    if shutil.which("crontab") is None:
        return Finding("cron", Outcome.OK, "no crontab program on this machine")
    users = [Owner.current().name]
    if os.geteuid() == 0 and owner.uid != 0:
        users.append(owner.name)
    lines = {user: _opsctl_lines(user) for user in users}
    seen = ", ".join(f"{user}: {'not readable' if n is None else n or 'none'}" for user, n in lines.items())
    if any(lines.values()):
        return Finding("cron", Outcome.OK, f"lines with opsctl: {seen}")
    return Finding("cron", Outcome.WARNING, f"lines with opsctl: {seen}", "opsctl cron show")


def _opsctl_lines(user: str) -> int | None:
    """How many jobs of a user's crontab name opsctl; None where it cannot be read."""
    words = ["crontab", "-l"] if user == Owner.current().name else ["crontab", "-l", "-u", user]
    done = process.run(words, environment=process.bare_environment(), timeout_s=CRONTAB_TIMEOUT_S)
    if done.exit_code != 0:  # as it is for a user who has none
        return 0 if "no crontab" in done.stderr else None
    return sum(b"opsctl" in line and not line.lstrip().startswith(b"#") for line in done.stdout.splitlines())

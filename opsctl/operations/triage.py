"""What is broken, which runbook, the exact next line: one verdict out of all that can be seen in some seconds."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from opsctl import db, services
from opsctl.operations.probes import Fault, Sight, View, look
from opsctl.report import Column, Failure, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from opsctl.settings import Settings

MARGIN_S = 0.8
"""For deciding, for printing and for ending."""
_LEAST_S = 0.5
_SHOWN_COMPANIES = 3
_REPAIRED_AT_ONCE = 10

_COLUMNS = (Column("Looked at", "check"), Column("", "verdict"), Column("Seen", "seen"))

_UNREACHABLE = "runbooks/1-postgresql-unreachable.md"
_CORRUPT = "runbooks/2-corrupted-session-data.md"
_DELETED = "runbooks/3-accidental-deletion.md"
_LOST = "runbooks/4-complete-loss.md"


@dataclass(frozen=True, slots=True)
class SightRow:
    """One thing that was looked at."""

    check: str
    verdict: str
    """`ok`, the kind of the fault, or `-` for what was not looked at."""
    seen: str
    companies: tuple[str, ...] = ()
    seconds: float | None = None


def triage(settings: Settings, *, seconds: float, everything: bool, now: datetime) -> Report:
    """Look, decide, and say what to type, in so many `seconds`. Exit 0 where nothing is broken, 1 with a verdict.

    `everything`: rows for what is sound too. Raises `SettingsError` where no database address is set.
    """
    view = look(settings, give_up_at=time.monotonic() + max(_LEAST_S, seconds - MARGIN_S), now=now)
    sights = _read_together(view)
    faults = in_order(sights, switched=view.switch is not None)
    rows = [_row(sight) for sight in sights if everything or sight in faults]
    hurried = sorted({sight.check for sight in sights if sight.hurried})
    warnings = [f"not looked at to the end, because the time was up: {', '.join(hurried)}"] if hurried else []
    facts = {"verdict": None, "owner": _owner(view), "since": view.switch.since if view.switch else None}
    if not faults:
        took_s = time.monotonic() - view.started_at
        found = "nothing was found, but not all was looked at" if hurried else "nothing is broken that can be seen here"
        return Report(
            f"{found} ({len(sights)} looks, {took_s:.1f} s); {_owner_sentence(view)}",
            rows=rows,
            columns=_COLUMNS,
            facts=facts,
            warnings=warnings,
            next_lines=["opsctl sessions failback --dry-run"] if view.switch and not hurried else [],
        )
    verdict = faults[0]
    fault = verdict.fault or Fault.UNUSABLE
    advice = ADVICE[fault]
    if view.switch is not None and verdict.check in _OF_THE_DATABASE:  # the sessions live: there is time to mend it
        advice = replace(advice, page=f"{_UNREACHABLE}#way-back", lines=("opsctl triage",))
    elif verdict.check == "live folders":
        advice = replace(advice, lines=("{stop}", "opsctl sessions verify"))
    elif view.switch is not None and fault is Fault.UNDECRYPTABLE:  # of which the database knows nothing
        advice = replace(advice, lines=("opsctl sessions verify", "{log}"))
    lines = _lines(advice, verdict, view)
    others = sorted({str(sight.fault) for sight in faults} - {str(fault)})
    if others:
        warnings.append(f"also: {', '.join(others)}; see to {fault} first")
    return Report(
        f"verdict: {fault}; {_owner_sentence(view)}",
        rows=rows,
        columns=_COLUMNS,
        facts={**facts, "verdict": str(fault), "also": others, "runbook": advice.page, "evidence": verdict.seen},
        warnings=warnings,
        next_lines=lines,
        exit_code=1,
        failure=Failure(str(fault), f"{advice.sentence}: {_named(verdict)}", hint=lines[0], runbook=advice.page),
        companies=verdict.companies,
    )


def _read_together(view: View) -> list[Sight]:
    """The sights, with what some of them mean only beside others.

    A host that nobody needs, because another of the list has let us in, is no fault. Where neither WhatsApp nor the
    database's host lets us through, the way out is the cause of both.
    """
    sights = list(view.sights)
    if view.logged_in:
        return [
            replace(s, fault=None, seen=f"{s.seen}; another host does") if s.check == "network" and s.fault else s
            for s in sights
        ]
    if {sight.fault for sight in sights} & {Fault.NAME, Fault.TIMEOUT}:
        words = "; the database's host is out of reach too"
        return [
            replace(s, fault=Fault.WAY_OUT, seen=s.seen + words) if s.fault is Fault.WHATSAPP else s for s in sights
        ]
    return sights


def in_order(sights: Sequence[Sight], *, switched: bool) -> list[Sight]:
    """What is broken, the first to see to first: causes before their consequences, and the rest by what they cost.

    The order is that of `Fault`:

    1. A full disk under the sessions, or one that hangs, stands first: every remedy writes there, and every further
       write of the service tears what is left.
    2. The way out: a network that leads nowhere is the cause of all the rest, and a restore would only add a switch
       that has to be undone.
    3. What keeps us from talking to the database, from the outside in (name, port, login, answer): nothing behind a
       closed door can be judged, and all companies wait for it.
    4. What the server cannot do: a full disk before locks, since writers that cannot write hold theirs.
    5. What its tables lack, the larger loss first: a missing table has no rows, and missing rows have no credentials.
    6. A stopped service: it may be stopped because of any of the above, and starting it then would do harm.
    7. WhatsApp alone, then what it says in the log. 440 before 401 and 403: two owners of one identity ruin more with
       each minute. Undecryptable messages last: they are late, not lost, and often the consequence of the rest.

    While a switch is on record the service does not use the database, so what is wrong with it comes after everything
    else.
    """
    order = list(Fault)
    faults = [
        # The clearest words on a fault are those of the probe that told it first.
        (switched and sight.check in _OF_THE_DATABASE, order.index(sight.fault), sight.seconds or 0, sight)
        for sight in sights
        if sight.fault is not None
    ]
    return [sight for *_, sight in sorted(faults, key=lambda found: found[:3])]


_OF_THE_DATABASE = frozenset({"network", "database", "server's disk", "locks", "tables", "rows", "credentials"})
"""What is looked at that a service on folders does not use."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a fault means, the page with its section, and the lines to type, the first one first.

    `{stop}`, `{start}`, `{repair}` and `{log}` stand for lines of their own, one or more or none; the other words in
    braces are filled in.
    """

    sentence: str
    page: str
    lines: tuple[str, ...]


_RESTORE = ("{stop}", "opsctl sessions restore --service-stopped")
_PSQL = "sudo -u postgres psql -c"
_IDLE = "sudo -u postgres psql -c \"SELECT pid, usename, application_name FROM pg_stat_activity WHERE state = 'idle'\""
ADVICE: dict[Fault, Advice] = {
    Fault.SESSIONS_DISK_FULL: Advice(
        "this machine's disk is full", f"{_UNREACHABLE}#preflight", ("df -h {folder}; df -i {folder}",)
    ),
    Fault.SESSIONS_DISK_FROZEN: Advice(
        "this machine's disk does not answer", f"{_UNREACHABLE}#preflight", ("dmesg | tail -n 30", "mount")
    ),
    Fault.WAY_OUT: Advice(
        "this machine reaches neither WhatsApp nor the database; restoring cannot help",
        f"{_UNREACHABLE}#when-restoring-cannot-help",
        ("curl -sSv -o /dev/null -m 5 https://{whatsapp}/",),
    ),
    Fault.NAME: Advice("the database's host name is not found", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE),
    Fault.REFUSED: Advice("the database refuses connections", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE),
    Fault.TIMEOUT: Advice("the database's host does not answer", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE),
    Fault.STARTING: Advice(
        "the database is starting or shutting down",
        f"{_UNREACHABLE}#the-lines-to-type",
        ("opsctl triage", *_RESTORE),
    ),
    Fault.TLS: Advice("TLS with the database fails", f"{_UNREACHABLE}#preflight", ("opsctl config show", *_RESTORE)),
    Fault.AUTHENTICATION: Advice(
        "the database does not accept the role or its password",
        f"{_UNREACHABLE}#preflight",
        ("opsctl config show", *_RESTORE),
    ),
    Fault.MISSING_DATABASE: Advice(
        "the server has no such database", f"{_LOST}#the-lines-to-type", ("opsctl config show", *_RESTORE)
    ),
    Fault.NO_CONNECTION_LEFT: Advice("the database is out of connections", f"{_UNREACHABLE}#preflight", (_IDLE,)),
    Fault.FROZEN: Advice(
        "the database lets us connect and never answers", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE
    ),
    Fault.UNUSABLE: Advice("the database cannot be used", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE),
    Fault.SERVER_DISK_FULL: Advice(
        "the database server's disk is full", f"{_UNREACHABLE}#preflight", ("{on_server}df -h", *_RESTORE)
    ),
    Fault.READ_ONLY: Advice("the database is read-only", f"{_UNREACHABLE}#the-lines-to-type", _RESTORE),
    Fault.LOCKS: Advice(
        "locks pile up in the database",
        f"{_UNREACHABLE}#preflight",
        (f'{_PSQL} "SELECT pg_terminate_backend({{pid}})"', "opsctl triage"),
    ),
    Fault.PERMISSION: Advice(
        "the role may not read the tables",
        f"{_UNREACHABLE}#preflight",
        (f'{_PSQL} "GRANT SELECT ON whatsapp_auth, whatsapp_keys TO {{role}}"',),
    ),
    Fault.MISSING_TABLES: Advice("tables are missing", f"{_DELETED}#the-lines-to-type", ("{stop}", "{repair}")),
    Fault.ROWS_MISSING: Advice("rows are missing", f"{_DELETED}#the-lines-to-type", ("{stop}", "{repair}")),
    Fault.CORRUPT_ROWS: Advice("the database cannot read its own tables", f"{_CORRUPT}#the-lines-to-type", _RESTORE),
    Fault.CORRUPT_CREDS: Advice("credentials are corrupt", f"{_CORRUPT}#the-lines-to-type", ("{stop}", "{repair}")),
    Fault.SERVICE_STOPPED: Advice("the service does not run", f"{_UNREACHABLE}#verification", ("{log}", "{start}")),
    Fault.WHATSAPP: Advice(
        "WhatsApp cannot be reached from here; restoring cannot help",
        f"{_UNREACHABLE}#when-restoring-cannot-help",
        ("curl -sSv -o /dev/null -m 5 https://{whatsapp}/",),
    ),
    Fault.REPLACED: Advice(
        "two processes use one identity (440); restoring cannot help",
        f"{_UNREACHABLE}#when-restoring-cannot-help",
        ("ps -eo pid,user,lstart,args | grep [n]ode", "{log}"),
    ),
    Fault.LOGGED_OUT: Advice(
        "WhatsApp has removed the device (401); restoring cannot help",
        f"{_UNREACHABLE}#when-restoring-cannot-help",
        ("{log}", "opsctl sessions list"),
    ),
    Fault.FORBIDDEN: Advice(
        "WhatsApp has blocked the account (403); restoring cannot help",
        f"{_UNREACHABLE}#when-restoring-cannot-help",
        ("{log}", "opsctl sessions list"),
    ),
    Fault.UNDECRYPTABLE: Advice(
        "messages cannot be decrypted", f"{_CORRUPT}#undecryptable-messages", ("opsctl keys doctor", "{log}")
    ),
}


def _lines(advice: Advice, verdict: Sight, view: View) -> list[str]:
    """The lines to type, filled in."""
    address = db.address(view.settings)
    several = {
        "{stop}": services.typed(view.manager, "stop"),
        "{start}": services.typed(view.manager, "start"),
        "{log}": _log_lines(view),
        "{repair}": [_repair_line(verdict)],
    }
    words = {
        "folder": shlex.quote(str(view.sessions_dir or view.settings.standby_dir)),
        "whatsapp": view.settings["WHATSAPP_ADDRESS"],
        "on_server": _on_the_server(address),
        "pid": verdict.pid or "PID",
        "role": address.get("user") or "ROLE",
    }
    wanted = advice.lines
    if wanted[-len(_RESTORE) :] == _RESTORE and _can_switch(view):
        wanted = (*wanted[: -len(_RESTORE)], "opsctl sessions restore --switch")
    filled: list[str] = []
    for line in wanted:
        filled += several[line] if line in several else [line.format(**words)]
    return filled


def _can_switch(view: View) -> bool:
    """Whether the services can be moved from here, as far as the settings say."""
    fallback = view.settings["FALLBACK_DIR"]
    return view.manager is not None and fallback is not None and (fallback / ".git").exists()


def _repair_line(verdict: Sight) -> str:
    """Rows of single companies are put back in their place; where whole tables are gone there is none."""
    if not verdict.companies:
        return "opsctl sessions restore --dry-run"
    companies = " ".join(f"--company {shlex.quote(company)}" for company in verdict.companies[:_REPAIRED_AT_ONCE])
    return f"opsctl sessions repair {companies} --from standby --dry-run"


def _on_the_server(address: Mapping[str, Any]) -> str:
    """`ssh HOST` where the server is another machine."""
    host = str(address.get("host") or "/").split(",")[0]
    return "" if host.startswith(("/", "@", "127.")) or host == "localhost" else f"ssh {shlex.quote(host)} "


def _log_lines(view: View) -> list[str]:
    if view.log is None:
        return []
    return [
        f"tail -n 50 {shlex.quote(str(view.log))}" if view.log.startswith("/") else f"journalctl -n 50 -u {view.log}"
    ]


def _owner(view: View) -> str | None:
    if not view.owner_known:
        return None
    return "folders" if view.switch and view.switch.folders_are_the_truth else "database"


def _owner_sentence(view: View) -> str:
    """Who owns the sessions now, by the record of a switch."""
    if view.sessions_dir is None:
        return "who owns the sessions is not known without a sessions folder"
    if not view.owner_known:
        return f"who owns the sessions is not known: {view.sessions_dir} does not answer"
    if view.switch is None:
        return "the sessions belong to PostgreSQL: no switch is on record"
    if not view.switch.folders_are_the_truth:
        return f"the sessions belong to PostgreSQL, and a switch is under way or was left: {view.switch.phase}"
    return (
        f"the sessions belong to the folders in {view.sessions_dir} since {view.switch.since} "
        f"({view.switch.phase}): what PostgreSQL has is the stale copy"
    )


def _row(sight: Sight) -> SightRow:
    verdict = "-" if sight.skipped else str(sight.fault or "ok")
    return SightRow(sight.check, verdict, _named(sight), sight.companies, sight.seconds)


def _named(sight: Sight) -> str:
    """What was seen, with the first companies that it is about."""
    shown = ", ".join(map(_bare, sight.companies[:_SHOWN_COMPANIES]))
    more = len(sight.companies) - _SHOWN_COMPANIES
    return sight.seen + (f" ({shown}{f' and {more} more' if more > 0 else ''})" if shown else "")


def _bare(text: str) -> str:
    """A company's id as it may stand in a sentence."""
    return ascii(text)[1:-1]

"""A database that fails in one way, and a restore from what is left: the standby, or what can still be read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, Any

import psycopg

from opsctl.errors import Refused
from opsctl.operations.drill_scene import Check, Scene, passed_if
from opsctl.operations.faults import Fault
from opsctl.queries import query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opsctl.embedded import EmbeddedServer
    from opsctl.journal import Journal
    from opsctl.process import Finished

DECISION_S = 5.0
"""For choosing a source, whatever the sources do."""
_STATEMENTS = {
    Fault.READ_ONLY: (query("drill_read_only"),),
    Fault.DROPPED_TABLES: (query("drill_drop_tables"),),
    Fault.CORRUPT_CREDS: (query("drill_corrupt_creds"),),
    Fault.DELETED_COMPANY: (query("drill_delete_keys"), query("drill_delete_creds")),
    Fault.ROLLED_BACK: (query("drill_roll_back_creds"), query("drill_roll_back_keys")),
}
_SMALL_DISK = 'mount -t tmpfs -o "$1" tmpfs "$0" && shift && exec "$@"'


def rehearse_fault(
    fault: Fault, server: EmbeddedServer, scene: Scene, checks: list[Check], *, companies: int, journal: Journal
) -> float:
    """Sync a standby, break the database, restore; gives the seconds that the restore took.

    Raises `Refused` where this machine cannot produce the fault: a drill that could not be held has not passed.
    """
    if fault is Fault.DISK_FULL:
        _require_mounts()
    with journal.step("a warm copy in peacetime"):
        checks.append(passed_if("a standby of every company", scene.opsctl("standby", "sync"), str(companies)))
    if not checks[-1].passed:
        return 0.0
    with psycopg.connect(server.conninfo()) as connection:
        victim = str(connection.execute(query("drill_victim")).fetchall()[0][0])
    with journal.step(f"the fault: {fault}"):
        _break(fault, server, victim)
    if fault is Fault.DISK_FULL:
        checks.append(_full_disk(scene, journal))
    if fault is Fault.READ_ONLY:
        checks.append(_takes_no_writes(server))
    try:
        with journal.step("restore from what is left"):
            restored = scene.opsctl("sessions", "restore", "--service-stopped")
    finally:
        if fault is Fault.FROZEN:
            server.thaw()
    checks += _checks_of(restored, fault, victim, companies)
    if fault is Fault.DELETED_COMPANY:
        with journal.step("the company that was offered"):
            offered = scene.opsctl("sessions", "restore", "--company", victim, "--source", "standby")
            checks.append(passed_if("it is brought back by the line that was offered", offered, "1 of 1"))
    with journal.step("verify"):
        verified = scene.opsctl("sessions", "verify")
        checks.append(passed_if("every company loads and logs in", verified, f"{companies} of {companies}"))
    return float((restored.document().get("rto") or {}).get("elapsed_s") or 0.0)


def _break(fault: Fault, server: EmbeddedServer, victim: str) -> None:
    if fault is Fault.REFUSED:
        server.stop()
    elif fault is Fault.FROZEN:
        server.freeze()
    else:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            for statement in _STATEMENTS.get(fault, ()):
                connection.execute(statement, {"company_id": victim})


def _takes_no_writes(server: EmbeddedServer) -> Check:
    """Reading goes on as before, so that nothing else would show whether the fault was there."""
    with psycopg.connect(server.conninfo()) as connection:
        said = connection.info.parameter_status("default_transaction_read_only")
    return Check("the database takes no writes", said == "on", f"default_transaction_read_only is {said}")


def _checks_of(restored: Finished, fault: Fault, victim: str, companies: int) -> Sequence[Check]:
    document = restored.document()
    rows: list[dict[str, Any]] = document.get("rows") or []
    found = Counter(f"{row['result']} from {row['source'].split()[0]}" for row in rows if row["source"])
    expected = _expected(fault, companies)
    steps = (document.get("rto") or {}).get("steps") or []
    decision_s = sum(step["seconds"] for step in steps if step["name"] == "ask every source")
    back = sum(row["result"] == "restored" for row in rows)
    wanted = companies - (fault is Fault.DELETED_COMPANY)
    return [
        Check("the source of every company", dict(found) == expected, _told(found) or restored.stderr.strip()[:200]),
        Check(f"chosen within {DECISION_S:g} s", bool(steps) and decision_s <= DECISION_S, f"{decision_s:.1f} s"),
        Check("everything is back", back == wanted and restored.exit_code == 0, f"{back} of {wanted} companies"),
        *_offer(document, fault, victim),
    ]


def _expected(fault: Fault, companies: int) -> dict[str, int]:
    if fault in {Fault.REFUSED, Fault.FROZEN, Fault.DROPPED_TABLES, Fault.ROLLED_BACK}:
        return {"restored from standby": companies}
    if fault is Fault.CORRUPT_CREDS:
        both = {"restored from standby": 1, "restored from database": companies - 1}
    elif fault is Fault.DELETED_COMPANY:
        both = {"restored from database": companies - 1}
    else:
        both = {"restored from database": companies}
    return {what: count for what, count in both.items() if count}


def _offer(document: dict[str, Any], fault: Fault, victim: str) -> list[Check]:
    if fault is not Fault.DELETED_COMPANY:
        return []
    offered = any(row["company"] == victim and row["result"] == "withheld" for row in document.get("rows") or [])
    return [Check("a deleted company is offered, not published", offered, "offered" if offered else "not named")]


def _told(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))


def _require_mounts() -> None:
    tried = shutil.which("unshare") and os.geteuid() == 0
    if not tried or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        raise Refused(
            "a full disk can only be arranged by root in a mount namespace of its own",
            kind="no-fault",
            hint="run this drill as root, or choose another --fault",
        )


def _full_disk(scene: Scene, journal: Journal) -> Check:
    """A restore onto a disk without room is refused, and changes nothing; the next one has room."""
    scene.sessions.mkdir(mode=0o700, exist_ok=True)
    os.chown(scene.sessions, scene.owner.uid, scene.owner.gid)
    with journal.step("a restore onto a full disk"):
        options = f"size=256k,mode=0700,uid={scene.owner.uid},gid={scene.owner.gid}"
        inside = ("unshare", "--mount", "sh", "-c", _SMALL_DISK, str(scene.sessions), options)
        refused = scene.opsctl("sessions", "restore", "--service-stopped", "--replace", "--yes", inside=inside)
    error = refused.document().get("error") or {}
    seen = str(error.get("message") or refused.stderr.strip()[:200])
    passed = refused.exit_code == Refused.exit_code and error.get("kind") == "disk-full"
    return Check("a full disk is named, and nothing is changed", passed and not scene.folders(), seen)

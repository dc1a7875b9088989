"""A whole disaster on an embedded PostgreSQL: seed, break, kill a restore half-way, restore, verify, measure.

Nothing of the installation is touched: server, folders, state and settings live in one scratch folder, and the commands
that run are opsctl's own, as an operator would type them.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from opsctl import process
from opsctl.baileys.filenames import CREDS_FILE
from opsctl.embedded import EmbeddedServerError, embedded_server, remove_folder
from opsctl.errors import Refused
from opsctl.operations.drill_faults import rehearse_fault
from opsctl.operations.drill_scene import ENVIRONMENT, Check, Scene, made_scene, passed_if
from opsctl.operations.fleet import create_schema, seed_fleet
from opsctl.queries import query
from opsctl.report import Column, Failure, Report
from opsctl.stores.folder import OPSCTL_FOLDER, Holding, contents, opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.embedded import EmbeddedServer
    from opsctl.journal import Journal
    from opsctl.operations.faults import Fault
    from opsctl.stores.publishing import Owner

NOT_MEASURED = "detection, decision, the network, the service's start and WhatsApp's login"


_COLUMNS = (Column("Check", "check"), Column("Verdict", "verdict"), Column("Seen", "seen"))


def run_drill(
    *, companies: int, keys: int, seed: int, fault: Fault | None, scratch: Path | None, journal: Journal
) -> Report:
    """Seed `companies` x `keys`, break, restore and verify. Everything that is made is removed.

    Without a `fault` the folders are torn and a restore is killed; with one the database fails in that way, and the
    sessions come from what is left.

    Raises `Refused` where no drill can be held: no embedded PostgreSQL, no space, no such scratch folder.
    """
    checks: list[Check] = []
    with translating("drill", scratch), scratch_folder("opsctl-drill-", scratch) as folder, ExitStack() as running:
        with journal.step("start an embedded PostgreSQL"):
            server = running.enter_context(embedded_server(folder))
        with journal.step(f"seed {companies} x {keys:,} keys"), psycopg.connect(server.conninfo()) as connection:
            create_schema(connection)
            seed_fleet(connection, companies=companies, keys_per_company=keys, seed=seed, key_pair_pool=256)
        scene = made_scene(folder, server)
        if fault is None:
            elapsed_s = _rehearse(server, scene, checks, companies=companies, seed=seed, journal=journal)
        else:
            elapsed_s = rehearse_fault(fault, server, scene, checks, companies=companies, journal=journal)
        restored = sum(1 for company in scene.folders() for _ in company.glob("[!.]*.json"))
    done = f"{companies} companies x {keys:,} keys restored in {elapsed_s:.1f} s"
    facts = {
        "companies": companies,
        "keys_per_company": keys,
        "files_restored": restored,
        "fault": fault,
        "restore_s": elapsed_s,
    }
    return drill_report(checks, done, facts, not_measured=NOT_MEASURED, scope="files")


def drill_report(checks: list[Check], done: str, facts: dict[str, Any], *, not_measured: str, scope: str) -> Report:
    """How a drill went; `facts["restore_s"]` is its clock, `done` what it took, in words."""
    failed = [check for check in checks if not check.passed]
    failure = None
    if failed:
        failure = Failure("drill-failed", "; ".join(f"{check.check}: {check.seen}" for check in failed))
    return Report(
        summary=f"{len(checks) - len(failed)} of {len(checks)} checks passed: {done}. Not measured: {not_measured}",
        rows=checks,
        columns=_COLUMNS,
        facts=facts | {"not_measured": not_measured, "verdict": "failed" if failed else "passed"},
        next_lines=["opsctl drill history"],
        exit_code=1 if failed else 0,
        failure=failure,
        rto_scope=scope,
        rto_elapsed_s=facts["restore_s"],
        rto_met=False if failed else None,
    )


@contextmanager
def translating(what: str, scratch: Path | None) -> Iterator[None]:
    """Raises `Refused` where no `what` can be held: no embedded PostgreSQL, no space, no such folder."""
    place = scratch or Path(tempfile.gettempdir())
    try:
        yield
    except EmbeddedServerError as error:
        raise Refused(f"no {what} can be held: {error}", kind="no-embedded-server", hint=error.hint) from None
    except (psycopg.Error, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error.diag.message_primary or "its PostgreSQL gave up"
        raise Refused(
            f"no {what} can be held in {place}: {why}",
            kind="no-scratch",
            hint=f"df -h {place}, or pass another --scratch",
        ) from None


@contextmanager
def scratch_folder(prefix: str, parent: Path | None) -> Iterator[Path]:
    """A new folder in `parent`, else in the system's temporary one; afterwards it is gone."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    folder.chmod(0o711)  # the users of the server and of the folders have to pass; names inside cannot be listed
    try:
        yield folder
    finally:
        remove_folder(folder)


def _rehearse(
    server: EmbeddedServer, scene: Scene, checks: list[Check], *, companies: int, seed: int, journal: Journal
) -> float:
    with journal.step("a copy in peacetime"):
        first = scene.opsctl("sessions", "restore", "--service-stopped")
        checks.append(passed_if("a copy into an empty folder", first, f"{companies} of {companies}"))
    if not checks[-1].passed:
        return 0.0  # the rest would fail for this reason
    with journal.step("the service writes on; folders are torn"):
        with psycopg.connect(server.conninfo()) as connection:
            connection.execute(query("drill_writes"))
            connection.execute(query("drill_deletes").replace("%%", "%"))
        torn = _tear(scene.folders(), scene.owner)
    refused = scene.opsctl("sessions", "restore", "--service-stopped", "--dry-run")
    checks.append(_refusal(refused, torn, companies))
    with journal.step("a restore that is killed half-way"):
        checks.append(_killed_half_way(scene, random.Random(seed)))  # noqa: S311 - a moment, not a secret
    with journal.step("restore"):
        restored = scene.opsctl("sessions", "restore", *_OVER_EVERYTHING)
        checks.append(passed_if("the restore", restored, f"{companies} of {companies}"))
    with journal.step("verify against the database"):
        verified = scene.opsctl("sessions", "verify", "--against", "database")
        checks.append(
            passed_if("every company loads, logs in and equals the database", verified, f"{companies} of {companies}")
        )
    with journal.step("owners and modes"):
        checks.append(_owners(scene))
    return float((restored.document().get("rto") or {}).get("elapsed_s") or 0.0)


_OVER_EVERYTHING = ("--service-stopped", "--replace", "--discard-changes", "--yes")


def _tear(folders: list[Path], owner: Owner) -> dict[str, str]:
    """Break up to five folders, each in another way: what was done, by folder name."""
    done: dict[str, str] = {}
    for folder, (what, tear) in zip(folders, _TEARS, strict=False):
        tear(folder, owner)
        done[folder.name] = what
    return done


def _truncate_creds(folder: Path, _: Owner) -> None:
    creds = folder / CREDS_FILE
    os.truncate(creds, creds.stat().st_size // 2)


def _lose_keys(folder: Path, _: Owner) -> None:
    for path in sorted(folder.glob("session-*.json"))[::2]:
        path.unlink()


def _change_owner(folder: Path, owner: Owner) -> None:
    creds = folder / CREDS_FILE
    if os.geteuid() == 0 and owner.uid != 0:
        os.chown(creds, 0, 0)
    creds.chmod(0o000)


def _become_foreign(folder: Path, _: Owner) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / CREDS_FILE).write_bytes(b"{}")


def _vanish(folder: Path, _: Owner) -> None:
    shutil.rmtree(folder)


_TEARS = (
    ("torn creds.json", _truncate_creds),
    ("half of its keys lost", _lose_keys),
    ("creds.json of another owner", _change_owner),
    ("replaced by something else", _become_foreign),
    ("gone", _vanish),
)


def _refusal(finished: process.Finished, torn: dict[str, str], companies: int) -> Check:
    """Without a flag that allows it, no folder that was written since may be replaced."""
    rows: list[dict[str, Any]] = finished.document().get("rows") or []
    refused = {row["folder"] for row in rows if row["result"] == "refused"}
    expected = {name for name, what in torn.items() if what in _SEEN_AS_WRITTEN}
    return Check(
        "what was written since is refused without a flag",
        refused == expected and finished.exit_code == (6 if companies > len(expected) else 5),
        f"{len(refused)} of {len(expected)} torn folders refused",
    )


_SEEN_AS_WRITTEN = {what for what, _ in _TEARS} - {"gone"}


def _killed_half_way(scene: Scene, source: random.Random) -> Check:
    """SIGKILL a restore that has begun to write; then each folder must be the old one or the new one, whole."""
    before = {path.name: _digests(path) for path in scene.folders()}
    killed = process.start(
        process.opsctl_words("sessions", "restore", *_OVER_EVERYTHING), environment=scene.environment
    )
    own = scene.sessions / OPSCTL_FOLDER
    try:
        while killed.poll() is None and not list(own.glob("staging-*/building/*")):
            time.sleep(0.005)
        time.sleep(source.uniform(0, 0.3))
    finally:
        killed.kill()
        killed.wait()
    old = new = 0
    for path in scene.folders():
        if before.get(path.name) == (found := _digests(path)):
            old += 1
        elif found is not None and _as_restored(path):
            new += 1
    total = len(scene.folders())
    whole = old + new == total and {*before} <= {path.name for path in scene.folders()}
    return Check("killed half-way, each folder is whole", whole, f"{old} old, {new} new, of {total}")


def _digests(path: Path) -> dict[str, bytes] | None:
    with opened(path) as fd:
        return contents(fd, company_id=None, environment=ENVIRONMENT).digests


def _as_restored(path: Path) -> bool:
    with opened(path) as fd:
        return contents(fd, company_id=None, environment=ENVIRONMENT).holding is Holding.OURS


def _owners(scene: Scene) -> Check:
    wrong = files = 0
    for folder in scene.folders():
        for path in (folder, *folder.iterdir()):
            status = path.lstat()
            files += 1
            expected = 0o700 if path == folder else 0o600
            if status.st_uid != scene.owner.uid or status.st_mode & 0o777 != expected:
                wrong += 1
    seen = f"{files:,} files and folders of {scene.owner.name}, {wrong} wrong"
    return Check("every file has its owner and 0600", wrong == 0 and files > 0, seen)


@dataclass(frozen=True, slots=True)
class PastDrill:
    """One earlier drill."""

    at: str
    kind: str
    """`files`, the name of a fault, or `full`: with a service, until it is connected."""
    companies: int
    keys_per_company: int | None
    """None where a service made the keys."""
    restore_s: float
    verdict: str
    trend: str


_HISTORY_COLUMNS = (
    Column("When (UTC)", "at"),
    Column("Kind", "kind"),
    Column("Companies", "companies", numeric=True),
    Column("Keys each", "keys_per_company", numeric=True),
    Column("Restore s", "restore_s", numeric=True),
    Column("Verdict", "verdict"),
    Column("", "trend"),
)
_BAR = 24


def _kind(facts: dict[str, Any]) -> str:
    return "full" if facts.get("full") else str(facts.get("fault") or "files")


def drill_history(entries: Iterator[dict[str, Any]], *, last: int) -> Report:
    """How the measured restore developed, oldest first."""
    drills = [e for e in entries if e.get("command") == "drill run" and isinstance(e.get("facts"), dict)][-last:]
    longest: dict[str, float] = {}
    for entry in drills:
        kind = _kind(entry["facts"])
        longest[kind] = max(float(entry["facts"].get("restore_s", 0)), longest.get(kind, 0.0))
    rows = [
        PastDrill(
            at=str(entry["at"])[:16].replace("T", " "),
            kind=_kind(facts),
            companies=int(facts.get("companies", 0)),
            keys_per_company=facts.get("keys_per_company"),
            restore_s=float(facts.get("restore_s", 0)),
            verdict=str(facts.get("verdict", "")),
            trend="#" * max(1, round(_BAR * float(facts.get("restore_s", 0)) / (longest[_kind(facts)] or 1.0))),
        )
        for entry in drills
        for facts in [entry["facts"]]
    ]
    if not rows:
        return Report("no drill was run yet", next_lines=["opsctl drill run"])
    passed = sum(row.verdict == "passed" for row in rows)
    return Report(
        summary=f"{passed} of {len(rows)} drills passed; the last one {rows[-1].verdict}, {rows[-1].restore_s:.1f} s",
        rows=rows,
        columns=_HISTORY_COLUMNS,
    )

"""The best source left -> Baileys session folders: choose, stage and read back, sync, exchange.

Companies are independent: one that cannot be restored does not delay the others, and is named. Where a company's best
source turns out to be damaged while it is read, its next one is tried.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import opsctl
from opsctl.baileys.filenames import CREDS_FILE, UnwritableName, folder_name
from opsctl.errors import DatabaseUnavailable, Locked, OpsctlError, Refused, SourceUnavailable
from opsctl.operations.restore_report import CompanyRow, Result, Telling, staged_row
from opsctl.operations.sources import Kind, count_reasons, moment
from opsctl.retry import WAITS_S
from opsctl.stores.folder import Holding, opened, read_file
from opsctl.stores.lanes import ABORT, END
from opsctl.stores.publishing import Owner, check_root, locked_root, readable_root
from opsctl.stores.records import Origin
from opsctl.stores.staging import Order, Staged
from opsctl.stores.switch_record import read_switch
from opsctl.stores.writers import Aborted, Adopt, Advanced, Compared, Workplace, Writers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from opsctl.journal import Journal
    from opsctl.operations.sources import Choice, Found, Offer, Source
    from opsctl.report import Report
    from opsctl.stores.postgres import Snapshot
    from opsctl.stores.publishing import SessionsRoot, Staging
    from opsctl.stores.standby import Copy, Standby

    Remaining = Callable[[], float | None]
    FindSources = Callable[[], AbstractContextManager[Found]]

_BUSY = timedelta(minutes=15)
_LOCK_WAIT_S = 2.0
"""For a standby sync that publishes; where it takes longer, the copy is copied instead of moved."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asked for."""

    target: Path
    owner: Owner
    environment: str
    run_id: str
    companies: tuple[str, ...] = ()
    service_stopped: str = ""
    """How it is known: `proven`, or `operator` for a word; empty where it is not."""
    drop_stale: bool = False
    replace_foreign: bool = False
    discard_changes: bool = False
    accept_damaged: bool = False


@dataclass(slots=True)
class _Plan:
    """What is known while a restore runs."""

    wish: Wish
    found: Found
    telling: Telling
    pending: dict[str, list[Offer]]
    """The offers of each company that is still to be tried, the best first."""
    staged: dict[str, Staged]
    now: datetime
    taken: list[tuple[Standby, str]]
    """The ready copies that were moved away, by company."""

    def is_fresh(self, offer: Offer) -> bool:
        """Whether the service was stopped before the moment that it shows, by the operator's word."""
        return bool(self.wish.service_stopped) and offer.source.is_primary


def restore(
    find: FindSources, wish: Wish, *, journal: Journal, remaining: Remaining, locked: SessionsRoot | None = None
) -> Report:
    """Restore the wished companies into `wish.target` and say how it went.

    `locked`: the target, where a switch holds its lock. Raises `SourceUnavailable`, `Refused`, `Locked`, all with
    nothing changed.
    """
    check_root(wish.target, wish.owner)
    if locked is None:
        _refuse_switched(wish)
    staging = None
    published_at: float | None = None
    with ExitStack() as reading:
        plan = _begin(reading, find, wish, journal)
        try:
            taken = nullcontext(locked) if locked else locked_root(wish.target, wish.owner, run_id=wish.run_id)
            with taken as root:
                for run_id in root.recover():
                    plan.telling.details.append(f"run {run_id} was killed; what it left was tidied up")
                with _ready_copies_made_again(plan), root.staging(wish.run_id) as staging:
                    place = Workplace(wish.target, root.fd, staging.building_fd, wish.owner, wish.environment)
                    with Writers(place) as writers:
                        with staging.flushing():
                            _copy(plan, writers, staging, journal=journal, remaining=remaining)
                        reading.close()
                        compared = _verify(staging, writers, plan, journal=journal, remaining=remaining)
                    _publish(root, staging, compared, plan, journal=journal, remaining=remaining)
                    published_at = time.monotonic()
        except (OpsctlError, OSError) as error:
            if staging is None or not staging.published:
                raise
            _settle_the_rest(plan, error)
    return replace(plan.telling.report(), rto_reached_at=published_at)


def _refuse_switched(wish: Wish) -> None:
    record = read_switch(wish.target)
    if record is not None and not wish.discard_changes:
        raise Refused(
            f"the service runs on the folders in {wish.target} since {record.since}, so they are newer than any source",
            kind="switched",
            hint="opsctl switch status; --discard-changes sets them aside",
        )


def _settle_the_rest(plan: _Plan, error: OpsctlError | OSError) -> None:
    """After something was published an error is no answer any more: what stands in place is, and what is missing."""
    wish, telling = plan.wish, plan.telling
    reason = error.message if isinstance(error, OpsctlError) else f"{wish.target}: {error.strerror}"
    with readable_root(wish.target, wish.owner) as root:
        standing = root.published_by(wish.run_id) if root else []
    late = [row for row in telling.rows.values() if row.result is Result.RESTORED and row.folder not in standing]
    for row in late:
        telling.settle(replace(row, result=Result.LATE, reason=reason))
    if not late:
        telling.warnings.append(f"everything is in place, but what came after did not end well: {reason}")


def preview_restore(find: FindSources, wish: Wish, *, journal: Journal, remaining: Remaining) -> Report:
    """What `restore` would do: everything is read, normalised and compared, nothing is written."""
    check_root(wish.target, wish.owner)
    _refuse_switched(wish)
    with ExitStack() as reading:
        plan = _begin(reading, find, wish, journal)
        # The standby's generations are for whoever syncs them; only what is published belongs to the service's user.
        of_standby = any(offer.copy for offers in plan.pending.values() for offer in offers)
        reader = Owner.current() if of_standby else wish.owner
        with _readable(wish.target) as root_fd:
            place = Workplace(wish.target, root_fd, None, reader, wish.environment)
            with Writers(place) as writers:
                compared = _copy(plan, writers, None, journal=journal, remaining=remaining)
    telling = plan.telling
    for found in compared.values():
        if (row := _row_unless_refused(found, plan)) is not None:
            result = Result.UNCHANGED if found.identical else Result.WOULD_RESTORE
            telling.settle(replace(row, result=result))
    needed = sum(staged.allocated_bytes for staged in plan.staged.values())
    free = _free_bytes(wish.target)
    telling.facts |= {"space_needed_bytes": needed, "space_free_bytes": free}
    if free < needed:
        telling.warnings.append(f"{needed:,} bytes are needed at {wish.target} and {free:,} are free")
    return telling.preview()


@contextmanager
def _readable(target: Path) -> Iterator[int | None]:
    if not target.exists():
        yield None
        return
    with opened(target) as fd:
        yield fd


def _free_bytes(target: Path) -> int:
    status = os.statvfs(target if target.exists() else target.parent)
    return status.f_bavail * status.f_frsize


def _begin(reading: ExitStack, find: FindSources, wish: Wish, journal: Journal) -> _Plan:
    with journal.step("ask every source"):
        found = reading.enter_context(find())
        choices = found.choices()
    plan = _Plan(wish, found, Telling(wish), {}, {}, datetime.now(UTC), [])
    telling = plan.telling
    selected = _select(choices, plan)
    if not selected and not telling.rows:
        said = [f"{one.name}: {one.error.message}" for one in found.lost] + count_reasons(choices.values())
        raise SourceUnavailable(f"no source can be used: {'; '.join(said)}", hint="opsctl triage", kind="no-source")
    for company, choice in selected.items():
        plan.pending[company] = list(choice.offers)
        if choice.warning:
            telling.warnings.append(f"{company}, from {choice.offers[0].label}: {choice.warning}")
        held = next((offer.held for offer in choice.offers if offer.held), None)
        if held and choice.offers[0].copy is None:
            telling.warnings.append(
                f"{company}: the standby keeps an older copy, because {held}; --source standby restores that one"
            )
    telling.notes += [f"{one.name} is no source: {one.error.message}" for one in found.lost]
    telling.notes += [f"not from {reason}" for reason in count_reasons(selected.values())]
    telling.facts |= _facts(plan)
    for source in found.sources:
        if source.snapshot is not None:
            _remark(source.snapshot, telling)
    return plan


def _facts(plan: _Plan) -> dict[str, Any]:
    wish, found = plan.wish, plan.found
    first = next((source.snapshot.server for source in found.sources if source.snapshot), None)
    used = Counter(offers[0].source.kind.value for offers in plan.pending.values() if offers)
    return {
        "target": str(wish.target),
        "owner": wish.owner.name,
        "source": next(iter(used)) if len(used) == 1 else ("mixed" if used else None),
        "sources": [
            {"source": source.name, "chosen_for": sum(o[0].source is source for o in plan.pending.values() if o)}
            for source in found.sources
        ]
        + [{"source": one.name, "chosen_for": 0, "lost": one.error.message} for one in found.lost],
        "snapshot_at": first.snapshot_at if first else None,
        "system_identifier": first.system_identifier if first else None,
        "timeline": first.timeline if first else None,
        "in_recovery": first.in_recovery if first else None,
        "service_stopped": wish.service_stopped or "unknown",
    }


def _remark(snapshot: Snapshot, telling: Telling) -> None:
    if snapshot.damage:
        telling.warnings.append(f"a table is damaged, so each company is tried by itself: {snapshot.damage}")
    if snapshot.pooled:
        telling.warnings.append(
            "PostgreSQL is reached through a transaction pooler: its own timeouts apply, and a step that is given up "
            "here may go on there"
        )
    if snapshot.server.system_identifier is None:
        telling.details.append(
            "the role may not read the server's identity; the way back will not recognise the server by it"
        )


def _select(choices: Mapping[str, Choice], plan: _Plan) -> dict[str, Choice]:
    """The companies to restore. Those that cannot be are settled as refused; raises where nothing was asked rightly."""
    wish, telling = plan.wish, plan.telling
    unknown = sorted(set(wish.companies) - choices.keys())
    if unknown:
        where = "the database" if [source.kind for source in plan.found.sources] == [Kind.DATABASE] else "no source"
        verb = "has no company" if where == "the database" else "has company"
        raise Refused(
            f"{where} {verb} {', '.join(map(ascii, unknown))}", kind="unknown-company", hint="opsctl sessions list"
        )
    wanted = sorted(set(wish.companies)) if wish.companies else list(choices)
    twins: dict[str | None, list[str]] = {}
    for company, choice in choices.items():
        if choice.offers:
            twins.setdefault(_folder_of(company), []).append(company)
    selected = {}
    for company in wanted:
        choice = choices[company]
        folder = _folder_of(company)
        if folder is None:
            reason = "its id is not a company id and could leave the folder"
            telling.settle(CompanyRow(ascii(company)[:60], "", Result.REFUSED, reason=reason))
        elif choice.offers and len(twins[folder]) > 1:
            reason = f"the companies {' and '.join(sorted(twins[folder]))} would share the folder {folder}"
            telling.settle(CompanyRow(company, folder, Result.REFUSED, reason=reason))
        elif choice.withheld is not None:
            telling.settle(CompanyRow(company, folder, Result.WITHHELD, reason=choice.withheld))
        elif not choice.offers:
            reason = _why_nothing(company, plan.found) or "; ".join(choice.reasons)
            if wish.companies:
                telling.settle(CompanyRow(company, folder, Result.DAMAGED, reason=reason))
            else:
                telling.warnings.append(f"company {company} is left out: {reason}")
        else:
            selected[company] = choice
    return selected


def _why_nothing(company: str, found: Found) -> str | None:
    """Of a company that has keys and no credentials anywhere."""
    keys = max((o.key_count for s in found.sources for o in s.offers.get(company, ()) if not o.has_creds), default=None)
    return None if keys is None else f"it has {keys} keys and no credentials"


def _folder_of(company_id: str) -> str | None:
    try:
        return folder_name(company_id)
    except UnwritableName:
        return None


@contextmanager
def _ready_copies_made_again(plan: _Plan) -> Iterator[None]:
    """Afterwards the ready copies that were taken away stand there again. After a signal the next sync makes them."""
    try:
        yield
    except (OpsctlError, OSError):
        _make_ready_copies(plan)
        raise
    _make_ready_copies(plan)


def _make_ready_copies(plan: _Plan) -> None:
    for standby, company in plan.taken:
        with suppress(OSError, OpsctlError), standby.locked(plan.wish.run_id):
            standby.rebuild_ready(company)


class _Copying:
    """The companies that are being read and written: what writers reply, and what is tried next."""

    def __init__(self, plan: _Plan, writers: Writers, staging: Staging | None, remaining: Remaining) -> None:
        self._plan = plan
        self._writers = writers
        self._staging = staging
        self._remaining = remaining
        self._keys = 0
        self._began: dict[str, tuple[float, Offer]] = {}
        self._reopened: Counter[str] = Counter()
        self._broken: set[str] = set()
        self._comparisons_due = 0
        self.advance: Callable[[int], None] = lambda _: None
        self.compared: dict[str, Compared] = {}

    def run(self) -> None:
        """Try each company's offers until one is staged, or none is left."""
        pending = self._plan.pending
        while waiting := [company for company in pending if company not in self._began]:
            for company in waiting:
                self._try_next(company)
                while not self._writers.replies.empty():
                    self._hear()
            while self._began.keys() - self._plan.staged.keys() or self._comparisons_due:
                self._hear()

    def _try_next(self, company: str) -> None:
        """Begin with the company's next offer that can be begun; without any, it was settled with the last reason."""
        offers = self._plan.pending[company]
        while offers:
            offer = offers.pop(0)
            self._began[company] = (time.monotonic(), offer)
            try:
                reason = self._begin(company, offer)
            except DatabaseUnavailable as error:
                if error.kind != "corrupt" and self._is_open_again(offer.source, error):
                    self._discard(company)
                    offers.insert(0, offer)
                    continue
                reason = error.message
            if reason is None:
                return
            self._failed(company, offer, reason)
        self._forget(company)

    def _is_open_again(self, source: Source, error: DatabaseUnavailable) -> bool:
        """Try a server that broke off again. Raises its error where nothing else is left, or the time is over."""
        if error.transient and source.reopen is not None and self._reopened[source.name] < len(WAITS_S):
            time.sleep(min(WAITS_S[self._reopened[source.name]], self._remaining() or WAITS_S[-1]))
            self._reopened[source.name] += 1
            with suppress(OpsctlError):
                source.snapshot = source.reopen()
                return True
        if error.kind == "deadline" or len(self._plan.found.sources) == 1:
            raise error
        self._broken.add(source.name)
        return False

    def _failed(self, company: str, offer: Offer, reason: str) -> None:
        """The offer cannot be used: told, and out of the way for the next one."""
        telling, following = self._plan.telling, self._plan.pending.get(company)
        if following:
            telling.warnings.append(f"{company}: from {following[0].label}, because {offer.label}: {reason}")
            if following[0].damage is not None:
                telling.warnings.append(f"{company}, from {following[0].label}: {following[0].damage}")
        telling.settle(CompanyRow(company, folder_name(company), Result.DAMAGED, source=offer.label, reason=reason))
        self._discard(company)

    def _discard(self, company: str) -> None:
        if self._staging is not None:
            self._staging.discard(folder_name(company))

    def _forget(self, company: str) -> None:
        self._plan.pending.pop(company, None)
        self._began.pop(company, None)

    def _begin(self, company: str, offer: Offer) -> str | None:
        """Hand the company to a writer; why that cannot be done, or None. Raises `DatabaseUnavailable`."""
        source = offer.source
        if source.name in self._broken:
            return "it broke off"
        if offer.copy is not None:
            return self._adopt(offer, offer.copy)
        if offer.cached is not None:
            return self._from_cache(company, offer, offer.cached.creds)
        return "it is closed" if source.snapshot is None else self._stream(company, offer, source.snapshot)

    def _stream(self, company: str, offer: Offer, snapshot: Snapshot) -> str | None:
        snapshot.give_up_after(self._remaining())
        with snapshot.company():
            creds = snapshot.creds(company)
            if creds is None:
                return "it has no credentials"
            order = _order(self._plan, offer, creds.creds.encode(), creds.updated_at)
            lane = self._writers.begin(replace(order, busy_since=snapshot.server.busy_since))
            try:
                for rows in snapshot.key_rows(company):
                    lane.put(rows)
            except DatabaseUnavailable as error:
                lane.put(ABORT)
                while error.kind != "deadline" and not self._hear(aborted=company):
                    pass
                raise
            lane.put(END)
        return None

    def _adopt(self, offer: Offer, copy: Copy) -> str | None:
        try:
            with opened(copy.path) as fd:
                creds = read_file(fd, CREDS_FILE)
        except OSError as error:
            return f"its {CREDS_FILE} cannot be read: {error.strerror}"
        return self._give(offer.source, copy, _order(self._plan, offer, creds, None), own_creds=True)

    def _give(self, source: Source, copy: Copy, order: Order, *, own_creds: bool) -> str | None:
        """Hand a copy of the standby over: where something is written, moved to its place, or copied there."""
        standby = source.standby
        if self._staging is None or standby is None:
            self._writers.begin(Adopt(order, copy.path, own_creds=own_creds))
            return None
        moved = False
        if copy.ready is not None:
            with suppress(Locked), standby.locked(self._plan.wish.run_id, wait_s=_LOCK_WAIT_S):
                moved = self._staging.take(copy.ready, order.folder)
        if moved:
            self._plan.taken.append((standby, copy.company_id))
        else:
            try:
                standby.copy_to(copy.path, order.folder, dir_fd=self._staging.building_fd)
            except FileNotFoundError:
                return "it was replaced meanwhile"
        self._writers.begin(Adopt(order, None, own_creds=own_creds))
        return None

    def _from_cache(self, company: str, offer: Offer, creds: bytes) -> str | None:
        """Credentials alone, or with the keys that the standby has of the same account."""
        order = _order(self._plan, offer, creds, None)
        for source in self._plan.found.sources:
            for other in source.offers.get(company, ()):
                if other.copy is not None and other.account is not None and other.account == offer.account:
                    return self._give(source, other.copy, order, own_creds=False)
        self._writers.begin(order).put(END)
        return None

    def _hear(self, *, aborted: str | None = None) -> bool:
        """Take one reply; whether it says that company `aborted` is left alone, which is not followed up then."""
        reply = self._writers.wait(self._remaining)
        if isinstance(reply, Advanced):
            self._keys += reply.keys
            self.advance(self._keys)
        elif isinstance(reply, Compared):
            self.compared[reply.company_id] = reply
            self._comparisons_due -= 1
        elif isinstance(reply, Staged):
            self._staged(reply)
        elif isinstance(reply, Aborted):
            if reply.company_id == aborted:
                return True
            self._torn(reply.company_id, reply.damage)
        return False

    def _staged(self, staged: Staged) -> None:
        plan, company = self._plan, staged.company_id
        started, offer = self._began[company]
        self._comparisons_due += self._writers.previewing
        row = staged_row(
            staged,
            plan.wish,
            offer,
            time.monotonic() - started,
            rpo_s=0.0 if offer.source.is_primary else offer.age_s(plan.now),
            fresh=plan.is_fresh(offer),
        )
        if row.result is Result.DAMAGED and plan.pending.get(company):
            self._next_one(company, row.reason or "it is damaged")
            return
        plan.telling.settle(row)
        plan.pending.pop(company, None)
        plan.staged[company] = staged

    def _torn(self, company: str, reason: str) -> None:
        """What was read is not what its manifest says. A ready copy has a generation beside it that may be whole."""
        _, offer = self._began[company]
        if self._staging is None or offer.copy is None or offer.copy.ready is None:
            self._next_one(company, reason)
            return
        del self._began[company]
        self._discard(company)
        self._plan.pending[company].insert(0, replace(offer, copy=replace(offer.copy, ready=None)))
        self._plan.telling.warnings.append(
            f"{company}: the ready copy of {offer.label} is not used, its generation is: {reason}"
        )

    def _next_one(self, company: str, reason: str) -> None:
        _, offer = self._began.pop(company)
        self._failed(company, offer, reason)
        if not self._plan.pending.get(company):
            self._forget(company)


def _order(plan: _Plan, offer: Offer, creds: bytes, creds_updated_at: str | None) -> Order:
    wish, copy = plan.wish, offer.copy
    server = offer.source.snapshot.server if offer.source.snapshot else None
    origin = copy.origin if copy is not None else None
    as_of = moment(offer.as_of)
    return Order(
        folder=folder_name(offer.company_id),
        creds=creds,
        creds_updated_at=creds_updated_at,
        origin=Origin(
            company_id=offer.company_id,
            run_id=wish.run_id,
            environment=wish.environment,
            source=offer.label,
            snapshot_at=server.snapshot_at if server else (origin.snapshot_at if origin else offer.as_of),
            system_identifier=offer.system_identifier,
            timeline=offer.timeline,
            me_sha256=None,
            service_stopped=wish.service_stopped if plan.is_fresh(offer) else "unknown",
            stale_keys_dropped=wish.drop_stale,
            opsctl=opsctl.__version__,
        ),
        busy_since=(as_of - _BUSY).isoformat(sep=" ") if as_of.year > 1 else offer.as_of,
        fresh=plan.is_fresh(offer),
        drop_stale=wish.drop_stale,
    )


def _copy(
    plan: _Plan,
    writers: Writers,
    staging: Staging | None,
    *,
    journal: Journal,
    remaining: Remaining,
) -> dict[str, Compared]:
    """Bring every company to the writers; `plan.staged` has those that were written afterwards.

    Gives the comparisons, which writers that write nothing make at once.
    """
    verb = "read and compare" if writers.previewing else "read and write"
    total = sum(offers[0].key_count for offers in plan.pending.values() if offers)
    copying = _Copying(plan, writers, staging, remaining)
    with journal.step(f"{verb} session files", total=total) as advance:
        copying.advance = advance
        copying.run()
    return copying.compared


def _verify(
    staging: Staging, writers: Writers, plan: _Plan, *, journal: Journal, remaining: Remaining
) -> dict[str, Compared]:
    """Sync the filesystem, and meanwhile look for every staged file under its name."""
    publishable = [s for c, s in plan.staged.items() if plan.telling.rows[c].result is Result.RESTORED]
    compared: dict[str, Compared] = {}
    with journal.step("sync and check", total=len(publishable)) as advance:
        writers.verify(publishable)
        staging.sync()
        while len(compared) < len(publishable):
            reply = writers.wait(remaining)
            if isinstance(reply, Compared):
                compared[reply.company_id] = reply
                advance(len(compared))
    return compared


def _row_unless_refused(found: Compared, plan: _Plan) -> CompanyRow | None:
    """The company's row with the numbers of files; None where it was settled as refused or damaged."""
    wish, telling = plan.wish, plan.telling
    row = replace(
        telling.rows[found.company_id],
        files_restored=found.restored,
        files_updated=found.updated,
        files_unchanged=found.unchanged,
        files_set_aside=found.set_aside,
    )
    if row.result is Result.DAMAGED:
        return None
    if found.damage is not None:
        telling.settle(replace(row, result=Result.DAMAGED, reason=found.damage))
        return None
    if found.holding is Holding.LIVE and not wish.discard_changes:
        names = ", ".join(ascii(name)[1:-1] for name in found.written_since)
        reason = f"its folder was written since it was restored ({names}); --discard-changes would lose that"
    elif found.holding is Holding.FOREIGN and not wish.replace_foreign:
        reason = f"what stands in its place ({row.folder}) is no folder that was restored here; --replace sets it aside"
    else:
        return row
    telling.settle(replace(row, result=Result.REFUSED, reason=reason))
    return None


def _publish(
    root: SessionsRoot,
    staging: Staging,
    compared: Mapping[str, Compared],
    plan: _Plan,
    *,
    journal: Journal,
    remaining: Remaining,
) -> None:
    """Exchange company by company. A deadline between two of them leaves the rest as they were."""
    telling = plan.telling
    published: set[str] = set()
    with journal.step("publish"):
        for company in sorted(compared):
            row = _row_unless_refused(compared[company], plan)
            if row is None:
                continue
            if compared[company].identical:
                telling.settle(replace(row, result=Result.UNCHANGED))
            elif remaining() == 0:
                telling.settle(replace(row, result=Result.LATE, reason="the deadline came before it"))
            else:
                try:
                    staging.publish(row.folder)
                except OSError as error:
                    reason = f"{row.folder} cannot be exchanged: {error.strerror}"
                    telling.settle(replace(row, result=Result.REFUSED, reason=reason))
                else:
                    published.add(row.folder)
                    telling.settle(row)
        if published:
            staging.sync_names()
    if published:
        root.forget_aside(published, newest=staging.run_id)

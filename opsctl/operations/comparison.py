"""Company folders against their rows: one company after another is read, compared and decided, in forked processes.

The parent has the one connection and only streams; whichever process is free reads a company's folder, takes its rows
and sends back what failback would write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsctl.baileys import buffers, credentials
from opsctl.errors import DatabaseUnavailable, OpsctlError
from opsctl.operations.sides import CompanyPlan, Sides
from opsctl.stores.folder import opened
from opsctl.stores.lanes import ABORT, END, Failed, Lanes
from opsctl.stores.records import ManifestDamaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from opsctl.baileys.buffers import StoredForm
    from opsctl.baileys.credentials import Credentials
    from opsctl.operations.three_way import Prefer
    from opsctl.stores.postgres import Creds, Server, Snapshot
    from opsctl.stores.records import Origin


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all companies."""

    server: Server
    prefer: Prefer | None
    form: StoredForm | None
    new_identities: frozenset[str]
    """Companies that may have been paired anew."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A company to compare; its rows follow."""

    number: int
    plan: CompanyPlan
    origin: Origin | None
    creds: Creds | None


class _Aborted(Exception):
    """The company's rows do not come to their end."""


def compared(
    snapshot: Snapshot,
    root_fd: int,
    asked: Sequence[tuple[CompanyPlan, Origin | None]],
    terms: Terms,
    advance: Callable[[int], None],
) -> list[CompanyPlan]:
    """The plans of all companies, in their order; those that are refused already stay as they are.

    `root_fd` is the sessions folder, `advance` hears how many are done. Raises `DatabaseUnavailable`; a company whose
    rows are corrupt is refused.
    """
    plans = [plan for plan, _ in asked]
    waiting = 0
    with Lanes(lambda connection: _serve(connection, root_fd, terms)) as lanes:
        for number, (plan, origin) in enumerate(asked):
            if plan.refused is None:
                plan.refused = _streamed(snapshot, lanes, number, plan, origin)
            waiting += plan.refused is None
            is_last = number + 1 == len(asked)
            while waiting and (is_last or not lanes.replies.empty()):
                reply = lanes.replies.get()
                if isinstance(reply, Failed):
                    raise OpsctlError(f"comparing the folders failed: {reply.what}")
                index, plans[index] = reply
                waiting -= 1
                advance(number + 1 - waiting)
    return plans


def _streamed(snapshot: Snapshot, lanes: Lanes, number: int, plan: CompanyPlan, origin: Origin | None) -> str | None:
    """Hand one company over; gives why it cannot be compared, if its rows are corrupt."""
    lane = None
    try:
        with snapshot.company():
            plan.fingerprint = snapshot.fingerprint(plan.company)
            creds = snapshot.creds(plan.company)
            lane = lanes.least_busy()
            lane.put(_Asked(number, plan, origin, creds))
            for lines in snapshot.key_rows(plan.company):
                lane.put(lines)
            lane.put(END)
    except DatabaseUnavailable as error:
        if error.kind != "corrupt":
            raise
        if lane is not None:
            lane.put(ABORT)
        return error.message
    return None


def _serve(connection: Connection[Any, Any], root_fd: int, terms: Terms) -> None:
    """Inside a process: companies in, plans out."""
    while True:
        asked: _Asked = connection.recv()
        rows = _rows(connection)
        try:
            _compare(asked, rows, root_fd, terms)
            for _ in rows:  # where they were not needed
                pass
        except _Aborted:
            continue
        connection.send((asked.number, asked.plan))


def _rows(connection: Connection[Any, Any]) -> Iterator[bytes]:
    while (lines := connection.recv_bytes()) != END:
        if lines == ABORT:
            raise _Aborted
        yield lines


def _compare(asked: _Asked, rows: Iterator[bytes], root_fd: int, terms: Terms) -> None:
    plan, origin = asked.plan, asked.origin
    try:
        with opened(plan.folder, dir_fd=root_fd) as folder_fd:
            sides = Sides(folder_fd, origin)
            if origin is not None and origin.returned is not None and origin.returned.digest == sides.digest:
                plan.returned_by = origin.returned.run_id
                return
            for lines in rows:
                sides.take(lines)
            accepted = plan.company in terms.new_identities
            plan.refused, may_delete = _account(sides, origin, asked.creds, plan, accepted=accepted)
            if plan.refused is None:
                sides.decide(
                    plan,
                    asked.creds,
                    another_server=origin is not None and _is_another(terms.server, origin),
                    may_delete=may_delete,
                    prefer=terms.prefer,
                    form=terms.form,
                )
    except ManifestDamaged as error:
        plan.refused = f"its manifest is damaged: {error}; --adopt brings it back without one, and deletes nothing"
    except OSError as error:
        plan.refused = f"it cannot be read: {error.strerror}"


def _is_another(server: Server, origin: Origin) -> bool:
    """Whether the copy was taken from another server or timeline; False also where one of them is not known."""
    if None in {server.system_identifier, origin.system_identifier}:
        return False
    return (server.system_identifier, server.timeline) != (origin.system_identifier, origin.timeline)


def _account(
    sides: Sides, origin: Origin | None, creds_row: Creds | None, plan: CompanyPlan, *, accepted: bool
) -> tuple[str | None, bool]:
    """Why the folder may not be brought back into these rows, and whether what it lost may be deleted there."""
    published = origin.me_sha256 if origin else None
    in_row = credentials.examine(buffers.normalise(creds_row.creds.encode()).data) if creds_row else None
    theirs = _fingerprint(in_row) if in_row else None
    if in_row:
        plan.me_ids = (in_row.me_id, in_row.me_lid)
    if sides.creds is None:
        unsure = (
            f"its creds.json is {sides.creds_damage}, and nothing proves that its keys are the database's account's"
        )
        proven = published is not None and theirs == published and not sides.published_pre_key_changed
        return (None if proven else unsure), False
    examined = credentials.examine(sides.creds)
    ours = _fingerprint(examined)
    plan.me_ids = (*plan.me_ids, examined.me_id, examined.me_lid)
    if not examined.registered and (theirs or published):
        return "its creds.json is not registered any more: a new pairing was begun and not finished", False
    if not accepted and {theirs, published} - {ours, None}:
        whose = "the database's" if theirs not in {ours, None} else "what was published"
        return f"its account is not {whose}: it was paired anew; --new-identity ID brings it back all the same", False
    return None, published is not None and examined.registered and ours == published and theirs in {ours, None}


def _fingerprint(examined: Credentials) -> str | None:
    return credentials.me_fingerprint(examined.me_id) if examined.me_id else None

"""Where sessions can be restored from tonight: every source asked at once, and the best one chosen per company.

Freshness is measured, never ranked by kind. Of one server's history (system identifier and timeline) the later moment
wins, whatever rows say of themselves; between two histories the newer row does, then the timeline, then the moment.
Valid comes first: a source that lacks a company's account, or more than a fifth of a protected type that another recent
source has, is damaged for that company and only used where nothing else is left.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from opsctl import db
from opsctl.baileys import credentials, key_types
from opsctl.baileys.credentials import me_fingerprint
from opsctl.errors import DatabaseUnavailable, OpsctlError, Refused, SourceUnavailable
from opsctl.retry import repeatable
from opsctl.signals import wait_for
from opsctl.stores.postgres import Snapshot, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from opsctl.stores.cache_file import CachedCreds
    from opsctl.stores.standby import Copy, Standby

    Remaining = Callable[[], float | None]

PROBE_S = 4.0
"""All sources together. One that has not said a word by then is not waited for: a decision takes 5 s at most."""
COUNTING_S = 15.0
"""But one that has answered may count its rows for longer, because being slow is not being stale."""
ALIVE_S = 0.8
"""As long as it still answers others meanwhile: a frozen server is given up with the silent ones."""
RECENT = timedelta(hours=1)
"""A copy older than this does not make a source damaged: keys come and go."""
TOLERATED_LOSS = 0.2
GRACE_S = 0.5
"""After the clock of a connection, which says better what it was waiting for."""
WENT_BACK_S = 60.0
"""A row that was deleted makes the newest one that is left a little older; a backup that was put back, by much more."""
CLOCKS_DIFFER_S = 60.0
"""A moment further ahead than this is no difference of clocks: one was set back, and the moment tells nothing."""


class Kind(StrEnum):
    """The kinds of sources."""

    DATABASE = "database"
    REPLICA = "replica"
    STANDBY = "standby"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Offer:
    """One company as one source has it."""

    company_id: str
    source: Source
    has_creds: bool
    key_count: int
    as_of: str
    """The moment that it shows, as PostgreSQL's text of a time or ISO 8601."""
    newest_at: str | None = None
    keys_by_type: Mapping[str, int] | None = None
    """None where the source could not count them."""
    account: str | None = None
    """`credentials.me_fingerprint` of me.id; None where it has none, or the source could not say."""
    system_identifier: str | None = None
    timeline: int | None = None
    held: str | None = None
    """Why the standby did not take over what the database has now."""
    problem: str | None = None
    """Why the source itself says that this is not to be used."""
    damage: str | None = None
    """What it lacks, measured against the other sources."""
    copy: Copy | None = None
    cached: CachedCreds | None = None

    @property
    def label(self) -> str:
        """The source's name, with the generation where it keeps several."""
        return f"{self.source.name} {self.copy.generation}" if self.copy else self.source.name

    def age_s(self, now: datetime) -> float | None:
        """How long before `now` the moment was that it shows: the RPO that choosing it pays.

        None where that moment is still to come.
        """
        seconds = (now - moment(self.as_of)).total_seconds()
        return None if seconds < -CLOCKS_DIFFER_S else max(0.0, seconds)


@dataclass(eq=False, slots=True)
class Source:
    """A source that answered."""

    kind: Kind
    name: str
    offers: dict[str, list[Offer]] = field(default_factory=dict)
    """By company; more than one where it keeps generations, the newest first."""
    snapshot: Snapshot | None = None
    reopen: Callable[[], Snapshot] | None = None
    standby: Standby | None = None

    def add(self, offer: Offer) -> None:
        """One more offer; of one company the first is the best."""
        self.offers.setdefault(offer.company_id, []).append(offer)

    @property
    def is_primary(self) -> bool:
        """Whether it is the server that the service writes to, as far as it can tell."""
        return self.kind is Kind.DATABASE and self.snapshot is not None and not self.snapshot.server.in_recovery


@dataclass(frozen=True, slots=True)
class Lost:
    """A source that cannot be used at all."""

    kind: Kind
    name: str
    error: OpsctlError


@dataclass(frozen=True, slots=True)
class Choice:
    """A company's offers, the best first, and why each other one lost."""

    company_id: str
    offers: tuple[Offer, ...]
    reasons: tuple[str, ...] = ()
    withheld: str | None = None
    """Why nothing of it is published without being asked for by name."""
    warning: str | None = None


def moment(text: str) -> datetime:
    """PostgreSQL's or ISO 8601's text of a time; what is no time (`infinity`) counts as the beginning of time."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class Probe:
    """One server asked in a thread: connects, describes itself, counts. Its snapshot stays open until `close`."""

    def __init__(self, kind: Kind, name: str, parameters: Mapping[str, Any], *, connect_s: float) -> None:
        self.kind = kind
        self.name = name
        self._parameters = parameters
        self._connect_s = connect_s
        self._stack = ExitStack()
        self.answered = threading.Event()
        self.done = threading.Event()
        self.source: Source | None = None
        self.error: BaseException | None = None
        self.took_s = 0.0

    def start(self, remaining: Remaining) -> None:
        threading.Thread(target=self._work, args=(remaining,), name=f"probe {self.name}", daemon=True).start()

    def _work(self, remaining: Remaining) -> None:
        started = time.monotonic()
        try:
            self.source = self._survey(remaining)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
            self.error = error
        self.took_s = time.monotonic() - started
        self.answered.set()
        self.done.set()

    @repeatable
    def _survey(self, remaining: Remaining) -> Source:
        opened = self._reopen(remaining)
        self.answered.set()
        source = Source(self.kind, self.name, snapshot=opened, reopen=lambda: self._reopen(remaining))
        for offer in _offers_of(opened, source):
            source.add(offer)
        if not any(offer.has_creds for offers in source.offers.values() for offer in offers):
            raise DatabaseUnavailable("the database holds no credentials: whatsapp_auth is empty", kind="no-rows")
        return source

    def _open(self, remaining: Remaining) -> Snapshot:
        connection = self._stack.enter_context(db.connect(self._parameters, remaining(), connect_s=self._connect_s))
        return self._stack.enter_context(snapshot(connection))

    def _reopen(self, remaining: Remaining) -> Snapshot:
        self.close()
        self._stack = ExitStack()
        return self._open(remaining)

    def result(self) -> Source | Lost:
        """What has come of it by now. Raises what is no expected failure."""
        if self.source is not None:
            return self.source
        if self.error is None:
            what = "did not finish counting its rows" if self.answered.is_set() else "did not answer"
            return Lost(self.kind, self.name, DatabaseUnavailable(f"{self.name} {what} in time", kind="frozen"))
        if isinstance(self.error, OpsctlError):
            return Lost(self.kind, self.name, self.error)
        raise self.error

    def is_alive(self) -> bool:
        """Whether the server says anything to another connection, be it a refusal, within `ALIVE_S`."""
        try:
            with db.connect(self._parameters, ALIVE_S, connect_s=ALIVE_S):
                return True
        except DatabaseUnavailable as error:
            return error.kind not in {"frozen", "timeout"}

    def close(self) -> None:
        """End the connection; nothing is waited for."""
        self._stack.close()


def _offers_of(opened: Snapshot, source: Source) -> Iterator[Offer]:
    server = opened.server
    accounts = {account.company_id: account.me_id for account in opened.accounts()}
    for tenant in opened.tenants():
        me_id = accounts.get(tenant.company_id)
        yield Offer(
            company_id=tenant.company_id,
            source=source,
            has_creds=tenant.has_creds,
            key_count=tenant.key_count,
            keys_by_type=tenant.keys_by_type,
            as_of=server.replayed_at or server.snapshot_at,
            newest_at=tenant.newest_at,
            account=me_fingerprint(me_id) if me_id else None,
            system_identifier=server.system_identifier,
            timeline=server.timeline,
        )


def ask_servers(probes: Sequence[Probe], *, others: bool, remaining: Remaining) -> tuple[list[Source], list[Lost]]:
    """Ask every server at once. `others`: something else could be used, so a silent one is not waited for long."""
    for probe in probes:
        probe.start(remaining)
    began = time.monotonic()

    def left(limit_s: float) -> float:
        deadline_s = remaining()
        spent_s = time.monotonic() - began
        bound_s = limit_s - spent_s if deadline_s is None else min(limit_s - spent_s, deadline_s + GRACE_S)
        return max(0.0, bound_s)

    for probe in probes:
        wait_for(probe.answered, left(GRACE_S + (PROBE_S if len(probes) > 1 or others else db.CONNECT_S)))
    counting = [probe for probe in probes if probe.answered.is_set()]
    for probe in counting:
        _let_count(probe, left)
    if not others and not any(probe.source for probe in counting):  # then the slowest is better than nothing
        for probe in counting:
            wait_for(probe.done, left(float("inf")))
    ended = [probe.result() for probe in probes]
    return [one for one in ended if isinstance(one, Source)], [one for one in ended if isinstance(one, Lost)]


def _let_count(probe: Probe, left: Callable[[float], float]) -> None:
    """Wait for a server that has answered: for `COUNTING_S`, as long as it is alive."""
    if wait_for(probe.done, left(PROBE_S)):
        return
    while left(COUNTING_S) > 0 and probe.is_alive() and not wait_for(probe.done, min(ALIVE_S, left(COUNTING_S))):
        pass


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look: only what is configured, and only the kinds that the operator wants."""

    database: Sequence[Mapping[str, Any]] = ()
    """One address per host."""
    database_problem: OpsctlError | None = None
    """Why DATABASE_URL, or its like, is no address."""
    replica: Sequence[Mapping[str, Any]] = ()
    standby: Standby | None = None
    generation: str | None = None
    """Only this one of the standby."""
    cache: Path | None = None
    only: Kind | None = None
    """The kind that the operator named: then nothing is withheld."""


@dataclass(frozen=True, slots=True)
class Found:
    """What could be asked, and what could not."""

    sources: tuple[Source, ...]
    lost: tuple[Lost, ...]
    only: Kind | None

    def choices(self) -> dict[str, Choice]:
        """For every company that any source knows: the offers in the order in which to try them."""
        return choose([s for s in self.sources if self.only in {None, s.kind}], explicit=self.only is not None)


@contextmanager
def found(places: Places, *, remaining: Remaining) -> Iterator[Found]:
    """Ask every place at once; the snapshots of those that answered stay open inside the block.

    Raises what the one place said where there is only one, or `SourceUnavailable` where none can be used.
    """
    sources: list[Source] = []
    lost: list[Lost] = []
    if places.database_problem is not None:
        lost.append(Lost(Kind.DATABASE, "database", places.database_problem))
    for read in (_standby, _cache):
        try:
            source = read(places)
        except OpsctlError as error:
            lost.append(Lost(Kind.STANDBY if read is _standby else Kind.CACHE, read.__name__.strip("_"), error))
        else:
            sources += [source] if source is not None and source.offers else []
    alone = len(places.database) + len(places.replica) == 1 and not sources
    connect_s = db.CONNECT_S if alone else PROBE_S
    probes = [
        Probe(kind, _server_name(kind, address, addresses), address, connect_s=connect_s)
        for kind, addresses in ((Kind.DATABASE, places.database), (Kind.REPLICA, places.replica))
        for address in addresses
    ]
    with ExitStack() as connections:
        for probe in probes:
            connections.callback(probe.close)
        servers, silent = ask_servers(probes, others=bool(sources), remaining=remaining)
        everything = Found((*servers, *sources), (*lost, *silent), places.only)
        if not any(places.only in {None, source.kind} for source in everything.sources):
            raise no_source(everything.lost)
        yield everything


def _server_name(kind: Kind, address: Mapping[str, Any], addresses: Sequence[Mapping[str, Any]]) -> str:
    return f"{kind} {address.get('host')}:{address.get('port', 5432)}" if len(addresses) > 1 else str(kind)


def _standby(places: Places) -> Source | None:
    standby = places.standby
    if standby is None:
        return None
    source = Source(Kind.STANDBY, "standby", standby=standby)
    for current in standby.copies():
        for copy in standby.generations(current.company_id) or [current]:
            if places.generation in {None, copy.generation}:
                source.add(_offer_of_copy(copy, source, held=current.held))
    if places.generation is not None and not source.offers:
        raise Refused(f"the standby keeps no generation {places.generation!a}", hint="opsctl standby status --verbose")
    if places.only is Kind.STANDBY and not source.offers:
        raise SourceUnavailable(f"the standby folder {standby.path} holds no copy", kind="no-standby")
    return source


def _offer_of_copy(copy: Copy, source: Source, *, held: str | None) -> Offer:
    origin = copy.origin
    return Offer(
        company_id=copy.company_id,
        source=source,
        has_creds=origin is not None,
        key_count=copy.key_count or 0,
        keys_by_type=copy.keys_by_type,
        as_of=copy.synced_at or (origin.snapshot_at if origin else ""),
        newest_at=copy.newest_at,
        account=copy.me_sha256,
        system_identifier=origin.system_identifier if origin else None,
        timeline=origin.timeline if origin else None,
        problem=copy.damage,
        held=held,
        copy=copy,
    )


def _cache(places: Places) -> Source | None:
    if places.cache is None or (places.only is None and not places.cache.exists()):
        return None
    from opsctl.stores.cache_file import read_cache

    source = Source(Kind.CACHE, "cache")
    for company_id, cached in read_cache(places.cache).entries.items():
        me_id = credentials.examine(cached.creds).me_id
        source.add(
            Offer(
                company_id=company_id,
                source=source,
                has_creds=True,
                key_count=0,
                as_of=cached.cached_at.isoformat(),
                account=me_fingerprint(me_id) if me_id else None,
                cached=cached,
            )
        )
    return source


def choose(sources: Sequence[Source], *, explicit: bool) -> dict[str, Choice]:
    """For every company that any source knows: the offers in the order in which to try them.

    `explicit`: the operator named the kind of source, so nothing is withheld.
    """
    primary = next((source for source in sources if source.is_primary), None)
    companies = sorted({company for source in sources for company in source.offers})
    return {company: _choice(company, sources, None if explicit else primary) for company in companies}


def _choice(company: str, sources: Sequence[Source], primary: Source | None) -> Choice:
    offers = [offer for source in sources for offer in source.offers.get(company, ())]
    keyed = [offer for offer in offers if offer.has_creds and offer.source.kind is not Kind.CACHE]
    complete = [replace(offer, damage=_damage(offer, keyed)) for offer in offers if offer.has_creds]
    lacking = [f"{offer.label}: it has no credentials" for offer in offers if not offer.has_creds]
    ranked = _ranked(complete)
    # Valid first; but credentials without keys come after everything that has keys, damaged or not.
    order = sorted(
        (offer for offer in ranked if offer.problem is None),
        key=lambda offer: (offer.source.kind is Kind.CACHE, offer.damage is not None),
    )
    if not order:
        return Choice(company, (), (*(f"{offer.label}: {offer.problem}" for offer in ranked), *lacking))
    best = order[0]
    now = datetime.now(UTC)
    reasons = [
        f"{offer.label}: {offer.problem or offer.damage or _later(best, offer, now)}"
        for offer in ranked
        if offer is not best
    ]
    withheld = None
    if primary is not None and company not in primary.offers and best.source is not primary:
        withheld = (
            f"{primary.name} can be read and does not have it; "
            f"opsctl sessions restore --company {company} --source {best.source.kind} brings it back"
        )
    warning = best.damage
    if best.account and (others := {o.label for o in keyed if o.account and o.account != best.account}):
        warning = f"{' and '.join(sorted(others))} has it with another account"
    return Choice(company, tuple(order), (*reasons, *lacking), withheld, warning)


def _later(best: Offer, other: Offer, now: datetime) -> str:
    if other.source.kind is Kind.CACHE:
        return "it holds no keys"
    age_s, best_age_s = other.age_s(now), best.age_s(now)
    if age_s is None or best_age_s is None:
        return "nobody knows which is older: a clock was set back"
    older_s = age_s - best_age_s
    if older_s > 0:
        return f"{older_s:,.0f} s older"
    return "its newest row is older" if moment(other.newest_at or "") < moment(best.newest_at or "") else "as good"


def _damage(offer: Offer, offers: Iterable[Offer]) -> str | None:
    """Why a source is damaged for a company, measured against the others; None where it is not."""
    for other in offers:
        if other.problem is not None or other.source is offer.source:
            continue
        if offer.account is None and other.account is not None:
            return f"its credentials have no account, those of {other.label} have"
        if offer.source.kind is Kind.CACHE or offer.keys_by_type is None or other.keys_by_type is None:
            continue
        gone_back_s = (moment(other.newest_at or "") - moment(offer.newest_at or "")).total_seconds()
        later = offer.source.is_primary or moment(offer.as_of) >= moment(other.as_of)
        if later and _same_history(offer, other) and gone_back_s > WENT_BACK_S:
            return f"it was set back: its newest row is {gone_back_s:,.0f} s older than that of {other.label}"
        if moment(offer.as_of) - moment(other.as_of) > RECENT:
            continue
        for key_type, known in key_types.KNOWN.items():
            there, here = other.keys_by_type.get(key_type, 0), offer.keys_by_type.get(key_type, 0)
            if known.protected and here < there * (1 - TOLERATED_LOSS):
                return f"it has {here:,} of {there:,} keys of type {key_type} that {other.label} has"
    return None


def _same_history(one: Offer, other: Offer) -> bool:
    return (one.system_identifier, one.timeline) == (other.system_identifier, other.timeline)


_RANK = {Kind.DATABASE: 3, Kind.REPLICA: 2, Kind.STANDBY: 1, Kind.CACHE: 0}


def _ranked(offers: Sequence[Offer]) -> list[Offer]:
    """The freshest first; the cache, which holds no keys, last."""
    histories: dict[tuple[str | None, int | None], list[Offer]] = {}
    for offer in offers:
        if offer.source.kind is not Kind.CACHE:
            histories.setdefault((offer.system_identifier, offer.timeline), []).append(offer)
    for history in histories.values():
        # A primary that answers is now, whatever the clocks of two hosts say.
        history.sort(key=lambda o: (o.source.is_primary, moment(o.as_of), _RANK[o.source.kind]), reverse=True)

    def freshness(history: list[Offer]) -> tuple[datetime, int, datetime]:
        newest = max(moment(offer.newest_at or "") for offer in history)
        return newest, history[0].timeline or 0, moment(history[0].as_of)

    ordered = [o for history in sorted(histories.values(), key=freshness, reverse=True) for o in history]
    return ordered + [offer for offer in offers if offer.source.kind is Kind.CACHE]


def no_source(lost: Sequence[Lost]) -> OpsctlError:
    """What to raise where nothing can be used: the one error where there was one source, else all in one sentence."""
    if len(lost) == 1:
        return lost[0].error
    said = "; ".join(f"{one.name}: {one.error.message}" for one in lost)
    kinds = {one.error.kind for one in lost}
    kind = kinds.pop() if len(kinds) == 1 else "no-source"
    return SourceUnavailable(f"no source can be used: {said}", hint="opsctl triage", kind=kind)


def count_reasons(choices: Iterable[Choice]) -> list[str]:
    """Why sources lost, each reason once with how many companies it was given for."""
    reasons = Counter(reason for choice in choices for reason in choice.reasons)
    return [f"{reason} ({count} companies)" if count > 1 else reason for reason, count in reasons.most_common()]

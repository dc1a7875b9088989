"""The warm copy of every company's sessions, its older generations, and a copy that is ready to be published.

    STANDBY_DIR/                      0700
        checked.json                  when the last whole run found which companies equal to the database
        company_<id>/
            generations/00000012/     a whole company folder with its manifest, as `opsctl.stores.staging` writes it
            generations/00000012.json what is known of it besides (`Facts`), written first
            ready/                    byte-equal to the newest generation, and sharing no inode with anything
            state.json                what a sync has to remember of the company (`State`)
            building/                 a generation that was not finished; whoever finds it removes it
            spare/                    one that is not kept any longer, for the next one to be made of
        .gone-company_<id>-<time>/    a company whose end was accepted, as long as replaced generations are kept

The newest generation is the current copy. It appears by one rename and nothing in it is ever written again, so it may
share its files with other generations by hard links. `ready` belongs to the service's user and may be renamed away by a
restore, under `Standby.locked`: the next sync, or `rebuild_ready`, makes another.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson

from opsctl.baileys.filenames import CREDS_FILE, MANIFEST_FILE, UnwritableName, folder_name, is_company_id
from opsctl.errors import AlreadyRunning, Locked, Refused
from opsctl.stores.folder import Holding, contents, digests_of, opened, origin_of, read_file
from opsctl.stores.publishing import Owner, sync_filesystem
from opsctl.stores.records import ManifestDamaged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from opsctl.stores.records import Origin

_CHECKED, _HOLDER, _SYNCING, _STATE = "checked.json", "holder.json", "sync.lock", "state.json"
_GENERATIONS, _READY, _BUILDING = "generations", "ready", "building"
_REFRESHING, _SPARE, _TRASH, _GONE = "refreshing", "spare", "trash-", ".gone-"
_NUMBER = re.compile(r"[0-9]{8}")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_S = 0.05
_NEWEST_KEPT = 3
_SPARE_KEPT_S = 3600
PUBLISHING_WAIT_S = 10.0
"""A sync holds the lock only while it publishes, never while it waits for a database."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one generation without reading its files; `taken_at` is this host's time, ISO 8601 in UTC."""

    generation: str
    taken_at: str
    key_count: int
    keys_by_type: Mapping[str, int]
    newest_at: str | None
    """The newest `updated_at` of its rows, as PostgreSQL's text in UTC."""
    me_sha256: str | None


@dataclass(frozen=True, slots=True)
class Marks:
    """By what a sync recognises that nothing has changed since, and otherwise what has."""

    source: str
    """`database`, or `folders` while a switch is on record."""
    digest: str
    """Of everything that the source holds of the company."""
    since: int | None = None
    """Every transaction before this one had ended when the rows were read."""
    next_xid: int | None = None
    database_oid: int | None = None
    system_identifier: str | None = None
    timeline: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What a sync remembers of a company. Times are this host's, ISO 8601 in UTC."""

    generation: str | None = None
    """The generation that `marks` and `synced_at` speak of."""
    synced_at: str | None = None
    verified_at: str | None = None
    marks: Marks | None = None
    held: str | None = None
    held_since: str | None = None
    held_digest: str | None = None
    """What the source held when it was looked at last and not applied."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The last run over all companies: all copies but the `missed` were equal to their source at that time."""

    at: str
    missed: tuple[str, ...] = ()
    source: str = "database"


@dataclass(frozen=True, slots=True)
class Copy:
    """One generation of one company. Cheap to come by: only heads and state files were read."""

    company_id: str
    folder: str
    generation: str
    """Eight digits: a larger number is newer."""
    origin: Origin | None
    path: Path
    ready: Path | None
    """Only beside the current generation, and only where it was made from that one."""
    synced_at: str | None
    """When it was last known to be equal to its source, by this host's clock; of an older generation, when taken."""
    key_count: int | None
    keys_by_type: Mapping[str, int]
    newest_at: str | None
    me_sha256: str | None
    verified_at: str | None
    held: str | None
    """Why what the database has now was not applied; the copy is the last good one."""
    held_since: str | None
    damage: str | None
    """Why it cannot be used."""
    state: State = field(default_factory=State)
    """What a sync remembers of the company; of an older generation, nothing."""


@dataclass(frozen=True, slots=True)
class Built:
    """A generation that is written, read back, and not yet published."""

    company_id: str
    facts: Facts
    state: State
    """What is remembered of the company once it is published."""
    base: str | None
    """The generation that it shares files with."""
    changed: frozenset[str] | None
    """The files that are not those of `base`, also those that are gone; None: all."""


class Building(NamedTuple):
    """A generation under construction."""

    fd: int | None
    """None where everything is only computed."""
    there: dict[str, str]
    """SHA-256 by name of the files that it holds already, and that nobody needs."""


class Standby:
    """A standby folder. Looking at it needs no lock; whoever changes something holds `locked`."""

    def __init__(self, path: Path, environment: str, owner: Owner | None = None) -> None:
        self.path = path
        self.environment = environment
        self.owner = owner or Owner.current()

    # Looking.

    def copies(self) -> list[Copy]:
        """The current copy of every company, by id; one without any usable head is there too, with its damage.

        Raises `Refused` where the standby folder is there and cannot be read; gives none where there is none.
        """
        try:
            names = sorted(name for name in os.listdir(self.path) if is_company_id(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Refused(
                f"{self.path}: {error.strerror}", kind="standby-unreadable", hint="check its owner and mode"
            ) from None
        checked = self.checked()
        return [self._current(name, checked) for name in names if (self.path / name).is_dir()]

    def copy(self, company_id: str) -> Copy | None:
        """The current copy of one company."""
        folder = folder_name(company_id)
        return self._current(folder, self.checked()) if (self.path / folder).is_dir() else None

    def generations(self, company_id: str) -> list[Copy]:
        """Every generation of a company, newest first; the first one is the current copy."""
        folder = folder_name(company_id)
        numbers = self._numbers(folder)
        if not numbers:
            return []
        current = self._current(folder, self.checked())
        return [current, *(self._copy(folder, number) for number in numbers[1:])]

    def generation_count(self, folder: str) -> int:
        """How many generations a company's folder has."""
        return len(self._numbers(folder))

    def damage(self, folder: Path, *, company_id: str) -> str | None:
        """Read every file of a generation, or of a ready copy, and hold it against its manifest: None where whole."""
        try:
            with opened(folder) as fd:
                found = contents(fd, company_id=company_id, environment=self.environment)
        except OSError as error:
            return f"{folder} cannot be read: {error.strerror}"
        if found.holding is Holding.OURS:
            return None
        if found.origin is None:
            return f"{folder} has no manifest that can be read"
        if found.origin.environment != self.environment:
            return f"{folder} is of the environment {found.origin.environment!a}"
        wrong = [*found.changed, *found.missing, *found.added]
        return f"{folder} is not as its manifest says ({', '.join(map(ascii, wrong[:3]))})"

    def checked(self) -> Checked | None:
        """What the last whole run left."""
        return _read(self.path / _CHECKED, Checked)

    def state(self, company_id: str) -> State:
        """What is remembered of a company; empty where that cannot be read."""
        return self._state(folder_name(company_id))

    def facts(self, company_id: str, generation: str) -> Facts | None:
        """What is known of one generation."""
        return _read(self._company(folder_name(company_id)) / _GENERATIONS / f"{generation}.json", Facts)

    def _company(self, folder: str) -> Path:
        return self.path / folder

    def _state(self, folder: str) -> State:
        return _read(self._company(folder) / _STATE, State) or State()

    def _numbers(self, folder: str) -> list[str]:
        try:
            names = os.listdir(self._company(folder) / _GENERATIONS)
        except OSError:
            return []
        return sorted((name for name in names if _NUMBER.fullmatch(name)), reverse=True)

    def _current(self, folder: str, checked: Checked | None) -> Copy:
        numbers = self._numbers(folder)
        state = self._state(folder)
        return self._copy(folder, numbers[0] if numbers else None, state=state, checked=checked)

    def _copy(
        self, folder: str, number: str | None, *, state: State | None = None, checked: Checked | None = None
    ) -> Copy:
        place = self._company(folder)
        path = place / _GENERATIONS / (number or "none")
        origin, damage = self._head(path, folder)
        facts = _read(path.with_suffix(".json"), Facts)
        ready = place / _READY if state is not None and origin is not None else None
        if ready is not None and _origin_at(ready) != origin:
            ready = None
        company_id = origin.company_id if origin else folder.removeprefix("company_")
        return Copy(
            company_id=company_id,
            folder=folder,
            generation=number or "",
            origin=origin,
            path=path,
            ready=ready,
            synced_at=_synced_at(company_id, number, state, checked) or (facts.taken_at if facts else None),
            key_count=facts.key_count if facts else None,
            keys_by_type=facts.keys_by_type if facts else {},
            newest_at=facts.newest_at if facts else None,
            me_sha256=origin.me_sha256 if origin else facts.me_sha256 if facts else None,
            verified_at=state.verified_at if state and state.generation == number else None,
            held=state.held if state else None,
            held_since=state.held_since if state else None,
            damage=damage,
            state=state or State(),
        )

    def _head(self, path: Path, folder: str) -> tuple[Origin | None, str | None]:
        """What the head of the manifest says, and why the generation cannot be used as far as that tells."""
        try:
            with opened(path) as fd:
                origin = origin_of(fd)
                if origin is None:
                    return None, "it has no manifest that can be read"
                os.stat(CREDS_FILE, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None, f"it has no {CREDS_FILE}" if path.exists() else "there is no whole copy of it yet"
        except OSError as error:
            return None, f"it cannot be read: {error.strerror}"
        if origin.environment != self.environment:
            return origin, f"it is of the environment {origin.environment!a}"
        try:
            mine = folder_name(origin.company_id) == folder
        except UnwritableName:
            mine = False
        return origin, None if mine else f"it is of another company ({origin.company_id[:50]!a})"

    # Changing, under `locked`.

    @contextmanager
    def locked(self, run_id: str, *, wait_s: float = PUBLISHING_WAIT_S) -> Iterator[None]:
        """The one lock under which anything here is renamed or removed; waits up to `wait_s` for a sync to publish.

        Makes the folder where it is missing. Raises `Locked` or `Refused`.
        """
        with self._open() as fd:
            give_up_at = time.monotonic() + wait_s
            while not _flock(fd):
                if time.monotonic() >= give_up_at:
                    raise Locked(
                        f"another run works on {self.path}: {self._holder()}", hint="wait for it, then type it again"
                    )
                time.sleep(_LOOK_S)
            with suppress(OSError):
                self._write(self.path / _HOLDER, _holder_now(run_id))
            yield

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Raises `Refused` where it cannot be made, or is not ours alone."""
        with ExitStack() as stack:
            try:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = stack.enter_context(opened(self.path))
            except OSError as error:
                raise Refused(
                    f"the standby folder {self.path} cannot be written: {error.strerror}", hint="check STANDBY_DIR"
                ) from None
            status, me = os.fstat(fd), Owner.current()
            if status.st_uid != me.uid or status.st_mode & 0o077:
                raise Refused(
                    f"the standby folder {self.path} holds keys and is not for {me.name} alone",
                    hint=f"chown {me.name} {self.path}; chmod 700 {self.path}",
                )
            yield fd

    def _holder(self) -> str:
        try:
            holder = orjson.loads((self.path / _HOLDER).read_bytes())
            return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its pid is not known"

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """For as long as a sync runs: raises `AlreadyRunning` where another one does."""
        with self._open() as fd:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(_SYNCING, flags, 0o600, dir_fd=fd)
            try:
                if not _flock(descriptor):
                    raise AlreadyRunning(f"another sync works on {self.path}", hint="wait for it, then type it again")
                yield
            finally:
                os.close(descriptor)

    @contextmanager
    def building(self, company_id: str, *, reuse: bool) -> Iterator[Building]:
        """A folder for the company's next generation, for a sync to write into.

        With `reuse` it holds the files of an older generation that is not kept any longer, where there is one: to take
        out of it what has changed spares making and removing as many names as there are keys.
        """
        place = self._company(folder_name(company_id))
        for path in (place, place / _GENERATIONS):
            path.mkdir(mode=0o700, exist_ok=True)
        self._discard(place, _BUILDING)
        there = dict(self._spare_files(place)) if reuse else {}
        if there:
            (place / _SPARE).rename(place / _BUILDING)
        else:
            (place / _BUILDING).mkdir(0o700)
        with opened(place / _BUILDING) as fd:
            for name in (CREDS_FILE, MANIFEST_FILE) if there else ():
                os.unlink(name, dir_fd=fd)
                there.pop(name, None)
            yield Building(fd, there)

    @staticmethod
    def _spare_files(place: Path) -> Iterator[tuple[str, str]]:
        with suppress(OSError, ManifestDamaged), opened(place / _SPARE) as fd:
            files = list(digests_of(fd))
            if len(files) + 1 == len(os.listdir(fd)):
                yield from files

    def abandon(self, company_id: str) -> None:
        """Remove what `building` has made."""
        self._discard(self._company(folder_name(company_id)), _BUILDING)

    def next_generation(self, company_id: str) -> str:
        """The number of the generation to build."""
        numbers = self._numbers(folder_name(company_id))
        return f"{int(numbers[0]) + 1 if numbers else 1:08d}"

    def sync(self) -> None:
        """One sync of the filesystem for all that was built. Raises OSError for what the disk did not take."""
        with opened(self.path) as fd:
            sync_filesystem(fd)

    def publish(self, built: Built) -> None:
        """Make a built and synced generation the current copy, then the ready copy like it.

        Raises OSError; a generation that came into place is remembered as such, also where making it ready failed.
        """
        folder = folder_name(built.company_id)
        place = self._company(folder)
        generations, number = place / _GENERATIONS, built.facts.generation
        self._write(generations / f"{number}.json", built.facts)
        # The name is not synced: a power failure that forgets it leaves the generation before, which is whole.
        (place / _BUILDING).rename(generations / number)
        self.remember(built.company_id, built.state)
        self._refresh_ready(built)

    def remember(self, company_id: str, state: State) -> None:
        """Replace what is remembered of a company."""
        place = self._company(folder_name(company_id))
        place.mkdir(mode=0o700, exist_ok=True)
        self._write(place / _STATE, state)

    def remember_check(self, checked: Checked) -> None:
        """Replace what the last whole run found."""
        self._write(self.path / _CHECKED, checked)

    def prune(self, company_id: str, *, keep: timedelta, now: datetime) -> None:
        """Remove the generations that were replaced longer than `keep` ago, and thin out the others.

        Of those taken within the last hour the newest of each ten minutes stays, before that of each hour; and the
        three newest in any case. A copy each minute for a day would be 1,440 folders, each of as many names as keys.
        The last one that goes is left as a spare for the next `building`.
        """
        folder = folder_name(company_id)
        place = self._company(folder)
        generations = place / _GENERATIONS
        numbers = self._numbers(folder)
        taken = {n: _moment(f.taken_at) for n in numbers if (f := _read(generations / f"{n}.json", Facts))}
        seen: set[tuple[int, int]] = set()
        for newer, number in pairwise(numbers):
            if newer not in taken or number not in taken:
                continue
            minutes = int(taken[number].timestamp() // 60)
            slot = (10, minutes // 10) if now - taken[number] < timedelta(hours=1) else (60, minutes // 60)
            superfluous = slot in seen and number not in numbers[: _NEWEST_KEPT + 1]
            seen.add(slot)
            replaced = taken[newer]
            if superfluous or now - replaced > keep:
                self._discard(place, _SPARE)
                (generations / number).rename(place / _SPARE)
                (generations / f"{number}.json").unlink(missing_ok=True)

    def tidy(self, *, keep: timedelta, now: datetime) -> None:
        """Remove what killed runs left, and the companies whose accepted end is longer ago than `keep`."""
        for name in os.listdir(self.path):
            place = self.path / name
            if name.startswith(_GONE):
                age = now.timestamp() - place.stat().st_ctime
                if age > keep.total_seconds():
                    shutil.rmtree(place, ignore_errors=True)
            elif is_company_id(name) and place.is_dir():
                for left in os.listdir(place):
                    old = left == _SPARE and now.timestamp() - (place / left).stat().st_ctime > _SPARE_KEPT_S
                    if left.startswith(_TRASH) or left in {_BUILDING, _REFRESHING} or old:
                        shutil.rmtree(place / left, ignore_errors=True)

    def let_go(self, copy: Copy, *, now: datetime) -> Path:
        """Set a company's copies aside: its end was accepted. Gives where they are until they are removed."""
        gone = self.path / f"{_GONE}{copy.folder}-{now:%Y%m%dT%H%M%SZ}"
        self._company(copy.folder).rename(gone)
        return gone

    def _refresh_ready(self, built: Built) -> None:
        """Bring the ready copy to the current generation by the files that changed; whole where it was of another."""
        place = self._company(folder_name(built.company_id))
        origin = _origin_at(place / _READY)
        base = _origin_at(place / _GENERATIONS / built.base) if built.base else None
        if origin is None or origin != base or built.changed is None:
            self.rebuild_ready(built.company_id)
            return
        self._discard(place, _REFRESHING)
        (place / _READY).rename(place / _REFRESHING)
        with opened(place / _GENERATIONS / built.facts.generation) as source, opened(place / _REFRESHING) as target:
            for name in (*built.changed, MANIFEST_FILE):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=target)
                with suppress(FileNotFoundError):  # it is gone, or was left out
                    self._copy_file(name, source, target)
        (place / _REFRESHING).rename(place / _READY)

    def rebuild_ready(self, company_id: str) -> Path:
        """Make the ready copy anew from the current generation, file by file. Raises OSError; `locked` is held."""
        folder = folder_name(company_id)
        place = self._company(folder)
        self._discard(place, _REFRESHING, _READY)
        number = self._numbers(folder)[0]
        self.copy_to(place / _GENERATIONS / number, place / _REFRESHING)
        (place / _REFRESHING).rename(place / _READY)
        return place / _READY

    def copy_to(self, generation: Path, target: Path | str, *, dir_fd: int | None = None) -> None:
        """Make the folder `target` for the service's user, equal to a generation, file by file. Raises OSError."""
        os.mkdir(target, 0o700, dir_fd=dir_fd)
        with opened(generation) as source, opened(target, dir_fd=dir_fd) as made:
            for name in os.listdir(source):
                self._copy_file(name, source, made)
            self._give(made)

    def _copy_file(self, name: str, source: int, target: int) -> None:
        data = read_file(source, name)
        descriptor = os.open(name, _CREATE, 0o600, dir_fd=target)
        try:
            written = os.write(descriptor, data)
            while written < len(data):
                written += os.write(descriptor, data[written:])
            self._give(descriptor)
        finally:
            os.close(descriptor)

    def _give(self, descriptor: int) -> None:
        if self.owner.uid != os.geteuid():
            os.fchown(descriptor, self.owner.uid, self.owner.gid)

    @staticmethod
    def _discard(place: Path, *names: str) -> None:
        """Out of the way by one rename each, then deleted; what a kill leaves of that is deleted by the next run."""
        for name in names:
            with suppress(FileNotFoundError):
                trash = place / f"{_TRASH}{time.time_ns()}"
                (place / name).rename(trash)
                shutil.rmtree(trash, ignore_errors=True)

    @staticmethod
    def _write(path: Path, value: Any) -> None:  # noqa: ANN401 - a frozen dataclass, or a mapping
        """Replace a small file in one step."""
        temporary = path.with_name(f".{path.name}.new")
        with suppress(FileNotFoundError):
            temporary.unlink()
        with os.fdopen(os.open(temporary, _CREATE, 0o600), "wb") as file:
            file.write(orjson.dumps(value))
        temporary.rename(path)


def _synced_at(company_id: str, number: str | None, state: State | None, checked: Checked | None) -> str | None:
    """When the copy was last known to be equal to its source."""
    if state is None or number is None or state.generation != number:
        return None
    if checked is not None and not state.held and company_id not in checked.missed:
        return max(checked.at, state.synced_at or "")
    return state.synced_at


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _origin_at(folder: Path) -> Origin | None:
    try:
        with opened(folder) as fd:
            return origin_of(fd)
    except OSError:
        return None


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder_now(run_id: str) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "run_id": run_id}


def _read(path: Path, into: type[T]) -> T | None:
    """A small file of ours as the dataclass it was made from; None where it is missing, torn or of other fields."""
    try:
        values = orjson.loads(path.read_bytes())
        if into is State and values.get("marks"):
            values["marks"] = Marks(**values["marks"])
        if into is Checked:
            values["missed"] = tuple(values["missed"])
        return into(**values)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None

"""A restore, an undo and their cleaning up, killed at any instant: every company's folder is the old one or the new."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from opsctl.baileys.filenames import MANIFEST_FILE
from opsctl.operations.fleet import seed_fleet
from tests import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsctl.embedded import EmbeddedServer
    from tests.forks import Finished, Forks, Running

COMPANIES = 3
REPOSITORY = Path(__file__).parents[2]
Version = Literal["A", "B"]
Digests = dict[str, str]


def digests_of(folder: Path) -> Digests:
    """Every file but the manifest, which names its run."""
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST_FILE}


@dataclass(frozen=True)
class Versions:
    """Two databases that hold the same companies with other contents, and what a restore makes of them."""

    urls: dict[Version, str]
    expected: dict[Version, dict[str, Digests]]

    def of(self, folder: str, digests: Digests) -> str:
        """Which version a folder is; fails where it is neither, or not whole."""
        (found,) = (v for v in self.expected if self.expected[v][folder] == digests)
        return found


@pytest.fixture(scope="module")
def versions(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory, forking: Forks) -> Iterator[Versions]:
    names: dict[Version, str] = {"A": f"killed_a_{os.getpid()}", "B": f"killed_b_{os.getpid()}"}
    urls, expected = {}, {}
    for seed, (version, name) in enumerate(names.items()):
        with psycopg.connect(postgres.conninfo(), autocommit=True) as connection:
            connection.execute(SQL("CREATE DATABASE {} TEMPLATE template_opsctl").format(Identifier(name)))
        with psycopg.connect(postgres.conninfo(name)) as connection:
            seed_fleet(connection, companies=COMPANIES, keys_per_company=50, seed=seed, key_pair_pool=16)
        host = quote(str(postgres.socket_dir), safe="")
        urls[version] = f"postgresql://postgres@{host}:{postgres.port}/{name}"
        site = Site(tmp_path_factory.mktemp("expected"), urls, forking)
        assert site.forked(version).returncode == 0
        expected[version] = site.folders()
        assert len(expected[version]) == COMPANIES
    yield Versions(urls, expected)
    for name in names.values():
        with psycopg.connect(postgres.conninfo(), autocommit=True) as connection:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


@dataclass
class Site:
    """A sessions folder, and ways to restore into it."""

    home: Path
    urls: dict[Version, str]
    forking: Forks
    sessions: Path = field(init=False)

    def __post_init__(self) -> None:
        self.sessions = self.home / "sessions"

    @property
    def own(self) -> Path:
        return self.sessions / ".opsctl"

    def env(self, version: Version) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(self.home),
            "OPSCTL_STATE_DIR": str(self.home / "state"),
            "SESSIONS_DIR": str(self.sessions),
            "DATABASE_URL": self.urls[version],
        }

    def forked(self, version: Version, *words: str, before: str = "") -> Finished:
        given = words or ("restore", "--service-stopped")
        return self.forking.run("sessions", *given, "--json", env=self.env(version), before=before)

    def started(self, version: Version) -> Running:
        return self.forking.start("sessions", "restore", "--service-stopped", env=self.env(version), cwd=self.home)

    def folders(self) -> dict[str, Digests]:
        return {p.name: digests_of(p) for p in sorted(self.sessions.iterdir()) if p != self.own}

    def left(self) -> list[str]:
        """What lies in `.opsctl` besides what can be undone."""
        return [p.name for p in self.own.iterdir() if not p.name.startswith("aside-")] if self.own.exists() else []


@pytest.fixture
def site(tmp_path: Path, versions: Versions, forking: Forks) -> Site:
    return Site(tmp_path, versions.urls, forking)


def every_folder_is_whole(site: Site, versions: Versions) -> dict[str, str]:
    """Each company has a folder, and it is one of the two versions to the byte."""
    found = site.folders()
    assert found.keys() == versions.expected["A"].keys()
    return {name: versions.of(name, digests) for name, digests in found.items()}


def every_folder_set_aside_is_whole(site: Site, versions: Versions) -> None:
    for aside in site.own.glob("aside-*"):
        for folder in aside.iterdir():
            versions.of(folder.name, digests_of(folder))


def processes_of_session(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def children_of(pid: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return []


def wait_until_nothing_runs(leader: int) -> None:
    deadline = time.monotonic() + 5
    while processes_of_session(leader):
        assert time.monotonic() < deadline, "a process survived"
        time.sleep(0.005)


# --- at random instants -----------------------------------------------------------------------------------------------

KILLS = 30


def until_it_writes(process: Running, site: Site) -> None:
    """Return as soon as it stages folders, or is over."""
    before = set(site.left())
    while process.poll() is None and not any(name.startswith("staging-") for name in set(site.left()) - before):
        time.sleep(0.001)


def kill(process: Running, victim: str, instant_s: float) -> None:
    time.sleep(instant_s)
    with suppress(ProcessLookupError):  # it was over before
        if victim == "everybody":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "parent":
            process.kill()
        else:  # from that instant on, the first worker there is
            while process.poll() is None and not (workers := children_of(process.pid)):
                time.sleep(0.002)
            if process.poll() is None:
                os.kill(max(workers), signal.SIGKILL)
    process.wait(30)


def test_killed_at_many_random_instants_each_folder_is_the_old_or_the_new_one_whole(
    site: Site, versions: Versions
) -> None:
    source = random.Random(20)
    assert site.forked("A").returncode == 0
    started = time.monotonic()
    assert site.forked("B").returncode == 0
    whole_run_s = time.monotonic() - started
    wanted: Version
    left: set[str] = set()
    for number in range(KILLS):
        wanted = "AB"[number // 6 % 2]  # type: ignore[assignment]
        victim = ("everybody", "parent", "a worker")[number % 3]
        while True:
            process = site.started(wanted)
            if number % 2:  # half of them while it writes, which is a small part of the whole
                until_it_writes(process, site)
                kill(process, victim, 0.1 * whole_run_s * source.random())
            else:
                kill(process, victim, whole_run_s * (number + source.random()) / KILLS)
            wait_until_nothing_runs(process.pid)
            left.update(name.partition("-")[0] for name in site.left())
            every_folder_is_whole(site, versions)
            if process.returncode != 0:
                break
            whole_run_s *= 0.95  # it was over before the kill: the next one is earlier
        assert process.returncode == (70 if victim == "a worker" else -signal.SIGKILL)
        if number % 6 == 5:  # else the next one, too, is killed over what this one left
            done = site.forked(wanted)
            assert done.returncode == 0, done.stdout
            assert set(every_folder_is_whole(site, versions).values()) == {wanted}
            assert site.left() == []
            every_folder_set_aside_is_whole(site, versions)
    assert "staging" in left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_at_random_instants_ends_with_its_code_and_nothing_staged(
    site: Site, versions: Versions, number: signal.Signals
) -> None:
    source = random.Random(number)
    assert site.forked("A").returncode == 0
    stopped = 0
    for instant in range(5):
        wanted: Version = "BA"[instant % 2]  # type: ignore[assignment]
        process = site.started(wanted)
        until_it_writes(process, site)
        time.sleep(source.random() * 0.06 * instant)
        with suppress(ProcessLookupError):
            if instant % 2:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                os.kill(process.pid, number)
        code = process.wait(30)
        code = (
            code if code >= 0 else 128 - code
        )  # as a shell shows it: of a run that was done and met it at its very end
        wait_until_nothing_runs(process.pid)
        every_folder_is_whole(site, versions)
        assert site.left() == []
        assert "Traceback" not in process.end().stderr
        assert code in {0, 128 + number}  # 0: it was done before
        stopped += code == 128 + number
    assert stopped >= 2


def test_a_worker_that_is_killed_fails_the_run_and_nothing_is_changed(site: Site, versions: Versions) -> None:
    assert site.forked("A").returncode == 0
    killing = """
import opsctl.stores.writers as writers, os, signal
real = writers.Writers.begin
def begin(self, order):
    os.kill(self._lanes[0]._process.pid, signal.SIGKILL)
    return real(self, order)
writers.Writers.begin = begin
"""
    done = site.forked("B", before=killing)
    assert done.returncode == done.json()["exit_code"] == 70
    assert "one of its processes was killed" in done.json()["error"]["message"]
    assert set(every_folder_is_whole(site, versions).values()) == {"A"}
    assert site.left() == []


# --- at every point, with and without renameat2's flags ---------------------------------------------------------------

EXCHANGE = pytest.mark.parametrize("no_exchange", [False, True], ids=["exchange", "two-renames"])


def dying(point: int, *, no_exchange: bool) -> str:
    return f"from tests.forks import die_at; die_at({point}, no_exchange={no_exchange})"


@pytest.mark.long
@EXCHANGE
def test_killed_at_every_step_of_publishing_and_cleaning_up_there_is_a_whole_folder_in_the_end(
    site: Site, versions: Versions, *, no_exchange: bool
) -> None:
    healthy = dying(0, no_exchange=no_exchange)
    assert site.forked("A", before=healthy).returncode == 0
    point = 0
    standing: Version = "A"
    while True:
        point += 1
        other: Version = "B" if standing == "A" else "A"
        done = site.forked(other, before=dying(point, no_exchange=no_exchange))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        if not no_exchange:
            every_folder_is_whole(site, versions)
        then: Version = other if point % 2 else standing  # the next run goes on, or back
        done = site.forked(then, before=healthy)
        assert done.returncode == 0, done.stdout
        assert set(every_folder_is_whole(site, versions).values()) == {then}
        assert site.left() == []
        every_folder_set_aside_is_whole(site, versions)
        standing = then
    assert point > 20


@EXCHANGE
def test_killed_at_every_step_of_undo_the_next_undo_finishes_it(
    site: Site, versions: Versions, *, no_exchange: bool
) -> None:
    healthy = dying(0, no_exchange=no_exchange)
    for version in ("A", "B"):
        assert site.forked(version, before=healthy).returncode == 0
    undo = ("undo", "--yes")
    killed_in_the_middle = 0
    for point in range(1, 100):
        standing = set(site.folders())
        done = site.forked("A", *undo, before=dying(point, no_exchange=no_exchange))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        found = {versions.of(name, digests) for name, digests in site.folders().items()}
        assert no_exchange or site.folders().keys() == standing
        killed_in_the_middle += len(found) == 2
        done = site.forked("A", *undo, before=healthy)
        assert done.returncode == 0, done.stdout
        # All companies stand as before or as undone, never some so and some so.
        assert len(set(every_folder_is_whole(site, versions).values())) == 1
        assert site.left() == []
        every_folder_set_aside_is_whole(site, versions)
    assert killed_in_the_middle >= COMPANIES - 1


def test_what_a_killed_restore_had_set_aside_can_be_undone(site: Site, versions: Versions) -> None:
    assert site.forked("A").returncode == 0
    # Dead when the first company is exchanged, and no other.
    killed = """
import opsctl.stores.publishing as publishing, os
real = publishing.exchange
def exchange(*args, **words):
    real(*args, **words)
    os.kill(os.getpid(), 9)
publishing.exchange = exchange
"""
    assert site.forked("B", before=killed).returncode == -signal.SIGKILL
    assert sorted(every_folder_is_whole(site, versions).values()) == ["A", "A", "B"]
    done = site.forked("B")
    assert done.returncode == 0
    assert sorted(row["result"] for row in done.json()["rows"]) == ["restored", "restored", "unchanged"]
    assert any("was killed" in detail for detail in done.json().get("details", ["was killed"]))
    killed_run, newest_run = sorted(p.name.removeprefix("aside-") for p in site.own.glob("aside-*"))
    assert site.forked("B", "undo", "--yes").json()["facts"]["run"] == newest_run
    assert site.forked("B", "undo", "--yes", "--run", killed_run).returncode == 0
    assert set(every_folder_is_whole(site, versions).values()) == {"A"}


def test_an_undo_after_a_killed_restore_tidies_up_too(site: Site, versions: Versions) -> None:
    assert site.forked("A").returncode == 0
    for name in ("syncfs", "rename"):
        kill_there = f"""
import os
from tests.forks import fault_points
fault_points(lambda n, name: name == {name!r} and os.kill(os.getpid(), 9))
"""
        assert site.forked("B", before=kill_there).returncode == -signal.SIGKILL
        assert site.left() != []
        assert site.forked("A", "undo", "--yes").returncode == 0  # of the first restore, which put everything there
        assert site.left() == []
        assert site.folders() == {}
        assert site.forked("A", "undo", "--yes").returncode == 0
        assert set(every_folder_is_whole(site, versions).values()) == {"A"}


def test_undo_of_one_company_and_then_of_all_goes_on_with_the_rest(site: Site, versions: Versions) -> None:
    assert site.forked("A").returncode == 0
    assert site.forked("B").returncode == 0
    first = min(site.folders()).removeprefix("company_")
    for expected in ("A", "B", "A"):
        assert site.forked("A", "undo", "--yes", "--company", first).returncode == 0
        assert every_folder_is_whole(site, versions)[f"company_{first}"] == expected
    assert site.forked("A", "undo", "--yes").returncode == 0
    assert set(every_folder_is_whole(site, versions).values()) == {"A"}
    assert site.forked("A", "undo", "--yes").returncode == 0
    assert set(every_folder_is_whole(site, versions).values()) == {"B"}


def test_a_rename_that_fails_between_two_puts_the_old_folder_back(site: Site, versions: Versions) -> None:
    assert site.forked("A").returncode == 0
    failing = """
from tests.forks import fault_points
fault_points(lambda n, name: None, no_exchange=True)
import os, errno
real = os.rename
def rename(source, target, *, src_dir_fd=None, dst_dir_fd=None):
    here = os.readlink(f"/proc/self/fd/{src_dir_fd}")
    if source.startswith("company_") and here.endswith("/ready"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
os.rename = rename
"""
    done = site.forked("B", before=failing)
    assert done.returncode != 0
    assert set(every_folder_is_whole(site, versions).values()) == {"A"}
    assert site.forked("B").returncode == 0
    assert set(every_folder_is_whole(site, versions).values()) == {"B"}
    assert site.left() == []


# --- a real filesystem without exchange -------------------------------------------------------------------------------


@contextmanager
def mounted_fuse() -> Iterator[Path]:
    """ext4 through FUSE 2, which knows no flags of renameat2."""
    with tempfile.TemporaryDirectory() as name:
        image, mount = Path(name, "image"), Path(name, "mount")
        mount.mkdir()
        with image.open("wb") as file:
            file.truncate(64 * 1024 * 1024)
        make, mount_it = needs.program("e2fsprogs"), needs.program("fuse2fs")
        assert make is not None
        assert mount_it is not None
        subprocess.run([make, "-q", "-O", "^has_journal", image], check=True)
        done = subprocess.run([mount_it, image, mount, "-o", "fakeroot"], capture_output=True, check=False)
        if done.returncode != 0 or not mount.is_mount():
            pytest.skip(f"{needs.NOT_PROVEN}a real filesystem without exchange (FUSE)")
        try:
            yield mount
        finally:
            subprocess.run(["umount", mount], check=True)


@needs.root()
@needs.debian("fuse2fs")
@needs.debian("e2fsprogs")
def test_on_a_real_filesystem_without_exchange_folders_are_published_replaced_and_undone(
    site: Site, versions: Versions
) -> None:
    with mounted_fuse() as mount:
        shutil.rmtree(mount / "lost+found")
        site.sessions = mount / "sessions"
        assert site.forked("A").returncode == 0
        assert set(every_folder_is_whole(site, versions).values()) == {"A"}
        between = """
import opsctl.stores.publishing as publishing, os
real, count = os.rename, 0
def rename(source, target, *, src_dir_fd=None, dst_dir_fd=None):
    real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    if os.readlink(f"/proc/self/fd/{dst_dir_fd}").endswith("/old"):
        os.kill(os.getpid(), 9)
os.rename = rename
"""
        assert site.forked("B", before=between).returncode == -signal.SIGKILL
        assert len(site.folders()) == COMPANIES - 1  # between the renames
        assert site.forked("B").returncode == 0
        assert set(every_folder_is_whole(site, versions).values()) == {"B"}
        assert site.left() == []
        runs = sorted(p.name.removeprefix("aside-") for p in site.own.glob("aside-*"))
        for run in runs:
            assert site.forked("B", "undo", "--yes", "--run", run).returncode == 0
        assert set(every_folder_is_whole(site, versions).values()) == {"A"}

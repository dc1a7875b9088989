"""A fleet in a database, a folder to restore it to, and opsctl between them.

Every run is searched for what must never leave: secrets, tracebacks, control characters in a text for people.
"""

from __future__ import annotations

import re
import stat
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from opsctl.baileys.buffers import bytes_of
from opsctl.operations.fleet import seed_fleet
from opsctl.stores.archive import ARCHIVE_FOLDER
from opsctl.stores.folder import OPSCTL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.conftest import Database, Finished, RunOpsctl

PLANTED = "pLaNtEd-s3cret-that-must-never-leave"
FIRST, SECOND = "962302", "962303"
KEYS = 40

Entry = tuple[int, int, int, int, int, str]
Tree = dict[str, Entry]


class Fleet:
    """Two companies of 40 keys, the folder that they are restored to, and opsctl with their address."""

    def __init__(self, database: Database, place: Path, run_opsctl: RunOpsctl) -> None:
        self.database = database
        self.place = place
        self.target = place / "sessions"
        self.state = place / "state"
        self.run_opsctl = run_opsctl
        self.env: dict[str, str] = {"DATABASE_URL": database.url, "OPSCTL_STATE_DIR": str(self.state)}
        self.secrets: set[str] = {PLANTED}

    def seed(self, companies: int = 2, keys: int = KEYS) -> None:
        with self.database.connect(autocommit=False) as connection:
            seed_fleet(connection, companies=companies, keys_per_company=keys, seed=1, key_pair_pool=8)
        self.database.execute(
            "UPDATE whatsapp_keys SET value = value || jsonb_build_object('note', %s::text) WHERE key_type = 'session'",
            [PLANTED],
        )
        for (creds,) in self.database.execute("SELECT creds FROM whatsapp_auth"):
            self.secrets |= {creds["advSecretKey"], (bytes_of(creds["noiseKey"]["private"]) or b"").hex()}

    def key(self, key_type: str, key_id: str, value: str, *, company: str = FIRST, at: str = "now") -> None:
        """Add one row; `value` is JSON text."""
        self.database.execute(
            "INSERT INTO whatsapp_keys (company_id, key_type, key_id, value, updated_at) VALUES (%s, %s, %s, %s, %s)",
            [company, key_type, key_id, value, at],
        )

    def copy_company(self, new: str, *, of: str = FIRST, keys: bool = True) -> None:
        """One more company with the rows of another."""
        self.database.execute(
            "INSERT INTO whatsapp_auth SELECT %s, creds, created_at, updated_at FROM whatsapp_auth "
            "WHERE company_id = %s",
            [new, of],
        )
        if keys:
            self.database.execute(
                "INSERT INTO whatsapp_keys SELECT %s, key_type, key_id, value, created_at, updated_at, expires_at "
                "FROM whatsapp_keys WHERE company_id = %s",
                [new, of],
            )

    def opsctl(
        self, *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 60, before: str = ""
    ) -> Finished:
        """Run opsctl; whatever it was asked, nothing secret and no traceback may have left."""
        done = self.run_opsctl(*words, env={**self.env, **(env or {})}, timeout=timeout, before=before)
        said = done.stdout + done.stderr
        if self.state.exists():
            files = [path for path in self.state.rglob("*") if path.is_file()]
            said += "".join(
                path.read_text() for path in files if path.parent.name != ARCHIVE_FOLDER
            )  # which holds rows
        said += "".join(str(path) for path in self.place.rglob("*"))
        assert not [secret for secret in self.secrets if secret in said]
        assert "Traceback" not in said
        assert "bug in opsctl" not in said
        if "--json" not in words:
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", done.stdout + done.stderr)
        return done

    def restore(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Finished:
        """`sessions restore` to the target, with the operator's word."""
        return self.opsctl("sessions", "restore", "--to", self.target, "--service-stopped", *words, env=env)

    def restored(self, *words: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A restore that succeeds: its JSON document."""
        done = self.restore(*words, "--json", env=env)
        assert done.returncode == 0, done
        document: dict[str, Any] = done.json()
        return document

    def refused(
        self, exit_code: int, sentence: str, *words: str | Path, env: Mapping[str, str] | None = None
    ) -> Finished:
        """A restore that ends so, says so, and changes nothing."""
        with unchanged(self.place):
            done = self.restore(*words, env=env)
        assert done.returncode == exit_code, done
        assert sentence in done.stderr, done.stderr
        return done

    def undo(self, *words: str | Path) -> Finished:
        return self.opsctl("sessions", "undo", "--to", self.target, *words)

    def listing(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Finished:
        return self.opsctl("sessions", "list", "--to", self.target, *words, env=env)

    def folder(self, company: str = FIRST) -> Path:
        return self.target / f"company_{company}"

    def companies(self) -> list[str]:
        """The folders that the service would load."""
        return sorted(p.name for p in self.target.iterdir() if p.name != OPSCTL_FOLDER)


def rows_of(done: Finished | dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a JSON answer by company, or by folder."""
    document = done if isinstance(done, dict) else done.json()
    return {row.get("company") or row["folder"]: row for row in document["rows"]}


def results(done: Finished | dict[str, Any]) -> dict[str, str]:
    return {company: row["result"] for company, row in rows_of(done).items()}


def tree(place: Path) -> Tree:
    """Everything below a folder, and what tells whether it was touched: inode, mode, owner, times, bytes."""
    found: Tree = {}
    for path in [place, *sorted(place.rglob("*"))]:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            content = sha256(path.read_bytes()).hexdigest()
        else:
            content = str(path.readlink()) if stat.S_ISLNK(status.st_mode) else ""
        # A lock's holder and a staging folder came and went there: that leaves the time alone.
        passed_through = stat.S_ISDIR(status.st_mode) and (
            path.name == OPSCTL_FOLDER or (path / OPSCTL_FOLDER).exists() or path == place or path.name == "sessions"
        )
        found[str(path.relative_to(place))] = (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            0 if passed_through else status.st_mtime_ns,
            content,
        )
    return found


@contextmanager
def unchanged(place: Path) -> Iterator[None]:
    """Nothing below `place` but opsctl's own state may change inside the block."""

    def look() -> Tree:
        return {name: entry for name, entry in tree(place).items() if not name.startswith(("state", "home"))}

    before = look()
    yield
    assert look() == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}

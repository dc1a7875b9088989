"""An env file changed in one step: what nobody asked for stays as it is, to the byte."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from opsctl.errors import Refused
from opsctl.stores import env_file
from tests import needs

if TYPE_CHECKING:
    from pathlib import Path

FLAGS = {"USE_A": "false", "USE_B": "false"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("USE_A=true\nUSE_B=true\n", "USE_A=false\nUSE_B=false\n"),
        (
            "# head\n\nX='a # b'\nUSE_A=true # since July\n",
            "# head\n\nX='a # b'\nUSE_A=false # since July\nUSE_B=false\n",
        ),
        ("export USE_A = 'true'\nUSE_B=", "export USE_A=false\nUSE_B=false"),
        ("USE_A=1\r\nX=2\r\n", "USE_A=false\r\nX=2\r\nUSE_B=false\n"),
        ("USE_A=1\nUSE_A=2\n", "USE_A=false\nUSE_A=false\nUSE_B=false\n"),
        ('KEY="one\nUSE_A=inside\ntwo"\nX=1', 'KEY="one\nUSE_A=inside\ntwo"\nX=1\nUSE_A=false\nUSE_B=false\n'),
        (
            "#USE_A=true\nMY_USE_A=true\nUSE_AB=true\n",
            "#USE_A=true\nMY_USE_A=true\nUSE_AB=true\nUSE_A=false\nUSE_B=false\n",
        ),
        ("", "USE_A=false\nUSE_B=false\n"),
        ("USE_A\nY=2\n", "USE_A=false\nY=2\nUSE_B=false\n"),
        ("N=a\udcffb\n", "N=a\udcffb\nUSE_A=false\nUSE_B=false\n"),
    ],
)
def test_variables_are_set_and_put_back_to_the_byte(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / ".env"
    path.write_bytes(before.encode("utf-8", "surrogateescape"))
    path.chmod(0o640)
    lines = env_file.lines_of(path, FLAGS)
    for _ in range(2):
        env_file.set_variables(path, FLAGS)
        assert path.read_bytes().decode("utf-8", "surrogateescape") == after
        assert {name: env_file.values(path)[name] for name in FLAGS} == FLAGS
    assert path.stat().st_mode & 0o777 == 0o640
    env_file.put_lines(path, lines)
    found = path.read_bytes().decode("utf-8", "surrogateescape")
    assert found.rstrip("\n") == before.rstrip("\n")  # a last line without an end was given one
    assert [p.name for p in tmp_path.iterdir()] == [".env"]


@needs.root()
def test_the_owner_stays(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("USE_A=1\n")
    os.chown(path, 65534, 65533)
    env_file.set_variables(path, FLAGS)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65533)


def test_a_symbolic_link_is_refused_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("USE_A=1\n")
    (tmp_path / ".env").symlink_to(tmp_path / "elsewhere")
    for act in (env_file.require_writable, env_file.values, lambda path: env_file.set_variables(path, FLAGS)):
        with pytest.raises(Refused, match="symbolic links") as refused:
            act(tmp_path / ".env")
        assert refused.value.kind == "env-file"
    assert (tmp_path / "elsewhere").read_text() == "USE_A=1\n"


def test_a_file_that_is_not_there_is_named_and_one_that_is_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        env_file.require_writable(tmp_path / ".env")
    (tmp_path / ".env").write_text("X=1\n")
    with pytest.raises(Refused, match="exists"):
        env_file.write_copy(None, tmp_path / ".env", uid=os.getuid(), gid=os.getgid())


def test_a_read_only_filesystem_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("X=1\n")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:  # whom no mode keeps out: /proc is a filesystem that takes no files
        with pytest.raises(Refused):
            env_file.write_copy(None, type(tmp_path)("/proc/.env"), uid=0, gid=0)
        return
    with pytest.raises(Refused, match="may not be written"):
        env_file.require_writable(tmp_path / ".env")
    tmp_path.chmod(0o700)

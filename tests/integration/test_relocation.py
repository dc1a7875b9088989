"""Services moved to another folder and back to exactly what they were: a real PM2, and a real systemd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsctl import relocation, services
from opsctl.errors import HalfDone, Refused
from opsctl.relocation import Move
from opsctl.settings import load
from tests import needs
from tests.pm2.door import Pm2, pm2
from tests.systemd.door import systemd

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = {"USE_DATABASE_AUTH_STATE": "false"}
NAMES = "one,many"
CHANGING = {
    "created_at", "pm_uptime", "unique_id", "axm_monitor", "axm_actions", "axm_options", "axm_dynamic", "_tree_pids",
    "instances", "exit_code", "filter_env", "prev_restart_delay", "watch", "merge_logs", "restart_time",
    "version", "status", "pm_id",
}  # fmt: skip


def listed(manager: Pm2) -> list[dict[str, Any]]:
    lines = [line for line in manager("jlist").splitlines() if line.startswith("[")]
    found: list[dict[str, Any]] = json.loads(lines[-1])
    return found


def definitions(manager: Pm2) -> list[dict[str, Any]]:
    """What PM2 was told of our services, without what changes with each start."""
    found = []
    for entry in listed(manager):
        told = {name: value for name, value in entry["pm2_env"].items() if name not in CHANGING}
        told["env"] = {name: value for name, value in told["env"].items() if name != "unique_id"}
        found.append(told)
    return sorted(found, key=lambda told: (told["name"], told.get("NODE_APP_INSTANCE", 0)))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pm2, services.Pm2, Move]]:
    """A service, one of two workers, and somebody else's; the first two run from `app`."""
    with pm2() as daemon:
        app, fallback = daemon.home / "app", daemon.home / "fallback"
        for folder in (app, fallback):
            folder.mkdir()
            (folder / "service.mjs").write_bytes((daemon.home / "service.mjs").read_bytes())
        apps = [
            {
                "name": "one", "script": "service.mjs", "cwd": str(app), "args": ["--data", str(app / "data"), "a b"],
                "env": {"TOKEN": "planted", "DATA": str(app / "data"), "MULTI": "a\nb"},
                "max_memory_restart": "300M", "kill_timeout": 3000,
            },
            {"name": "many", "script": "service.mjs", "cwd": str(app), "instances": 2, "exec_mode": "cluster"},
            {"name": "other", "script": "service.mjs", "cwd": str(app)},
        ]  # fmt: skip
        (daemon.home / "apps.json").write_text(json.dumps({"apps": apps}))
        daemon("start", daemon.home / "apps.json")
        daemon("save")
        monkeypatch.setenv("PATH", daemon.path)
        manager = services.manager(load(environ={**daemon.settings, "SERVICE_NAMES": NAMES}))
        assert isinstance(manager, services.Pm2)
        yield daemon, manager, Move(app, fallback, fallback / ".env", FLAGS)


def folders(manager: services.Pm2) -> set[str]:
    found = relocation.running(services.status(manager), FLAGS)
    return {str(one.folder) for one in found}


@pytest.mark.long
def test_pm2s_services_move_and_come_back_as_they_were_also_where_a_move_was_cut_in_the_middle(
    stage: tuple[Pm2, services.Pm2, Move], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, manager, move = stage
    before, dump = definitions(daemon), (daemon.home / "dump.pm2").read_bytes()
    relocator = relocation.relocator(manager, move)
    saved = relocator.saved()
    assert relocator.environment(saved)["TOKEN"] == "planted"
    services.stop(manager)

    real = relocation._MovesPm2._pm2

    def cut(self: Any, *words: str, **more: Any) -> None:
        if words[0] == "resurrect":
            raise HalfDone("cut in the middle")
        real(self, *words, **more)

    monkeypatch.setattr(relocation._MovesPm2, "_pm2", cut)
    with pytest.raises(HalfDone):
        relocator.there(saved)
    assert [service.known for service in services.status(manager)] == [False, False]
    monkeypatch.setattr(relocation._MovesPm2, "_pm2", real)
    relocator.back(saved)
    assert {service.state for service in services.status(manager)} == {services.State.STOPPED}

    relocator.there(saved)
    relocator.there(saved)  # a second time there is nothing to do
    assert services.proven_stopped(manager).stopped is True
    services.start(manager)
    assert folders(manager) == {str(move.fallback_dir)}
    assert all(one.is_fallback(move) for one in relocation.running(services.status(manager), FLAGS))
    (moved,) = [told for told in definitions(daemon) if told["name"] == "one"]
    assert moved["args"] == ["--data", str(move.fallback_dir / "data"), "a b"]
    assert moved["env"]["DATA"] == str(move.app_dir / "data")  # what it means is the service's own business
    assert {e["name"]: e["pm_cwd"] for e in json.loads((daemon.home / "dump.pm2").read_bytes())} == {
        "one": str(move.fallback_dir),
        "many": str(move.fallback_dir),
        "other": str(move.app_dir),
    }
    assert [e["pm2_env"]["status"] for e in listed(daemon) if e["name"] == "other"] == ["online"]

    daemon("save")  # by somebody who does not know of the switch
    services.stop(manager)
    relocator.back(saved)
    services.start(manager)
    assert definitions(daemon) == before
    ours = [entry for entry in json.loads(dump) if entry["name"] in NAMES.split(",")]
    saved_now = json.loads((daemon.home / "dump.pm2").read_bytes())
    assert sorted((e for e in saved_now if e["name"] in NAMES.split(",")), key=str) == sorted(ours, key=str)
    for name in ("dump.pm2", "dump.pm2.bak"):
        assert {e["pm_cwd"] for e in json.loads((daemon.home / name).read_bytes())} == {str(move.app_dir)}
    assert folders(manager) == {str(move.app_dir)}
    assert not list(daemon.home.glob("opsctl-*"))
    assert not list(daemon.home.glob("*.opsctl"))


def test_a_service_from_elsewhere_or_without_fallback_code_is_not_moved(
    stage: tuple[Pm2, services.Pm2, Move],
) -> None:
    _, manager, move = stage
    elsewhere = Move(Path("/srv/elsewhere"), move.fallback_dir, move.env_file, FLAGS)
    with pytest.raises(Refused, match=r"which is not below APP_DIR \(/srv/elsewhere\)"):
        relocation.relocator(manager, elsewhere).saved()
    (move.fallback_dir / "service.mjs").unlink()
    with pytest.raises(Refused, match="the fallback code has no"):
        relocation.relocator(manager, move).saved()


UNIT = """\
[Unit]
Description=x
[Service]
WorkingDirectory=/srv/app
EnvironmentFile=/etc/default/wa
EnvironmentFile=-/srv/app/.env
ExecStart=/usr/bin/node --env-file=/srv/app/.env \\
  /srv/app/server.js /srv/application/data
Restart=always
"""
MOVING = """
import json
from pathlib import Path
from opsctl import relocation, services
from opsctl.errors import Refused
from opsctl.relocation import Move
from opsctl.settings import load

manager = services.manager(load(environ={"SERVICE_MANAGER": "systemd", "SERVICE_NAMES": "wa"}))
flags = {"USE_DATABASE_AUTH_STATE": "false"}
fallback = Path("/srv/fallback")
relocator = relocation.relocator(manager, Move(Path("/srv/app"), fallback, fallback / ".env", flags))
"""
PROPERTIES = "--property=WorkingDirectory,EnvironmentFiles,ExecStart,NeedDaemonReload"


@needs.systemd()
def test_a_unit_gets_a_drop_in_and_loses_it_again() -> None:
    with systemd() as running:
        running.unit("wa.service", UNIT)
        before = running("show", PROPERTIES, "wa")
        running.python(f"{MOVING}relocator.there(relocator.saved())\nprint(0)")
        shown = dict(line.split("=", 1) for line in running("show", PROPERTIES, "wa").splitlines())
        moved = "/usr/bin/node --env-file=/srv/fallback/.env /srv/fallback/server.js /srv/application/data"
        assert f"argv[]={moved} ;" in shown["ExecStart"]
        folder = running.units / "wa.service.d"
        assert (shown["WorkingDirectory"], shown["NeedDaemonReload"]) == ("/srv/fallback", "no")
        assert running("show", "--property=EnvironmentFiles", "--value", "wa").splitlines() == [
            "/etc/default/wa (ignore_errors=no)",
            "/srv/fallback/.env (ignore_errors=yes)",
            "/srv/fallback/.env (ignore_errors=no)",
            "/etc/systemd/system/wa.service.d/50-opsctl-switch.env (ignore_errors=no)",
        ]
        assert (folder / "50-opsctl-switch.env").read_text() == "USE_DATABASE_AUTH_STATE=false\n"
        for killed_in_the_middle in (False, True):
            if killed_in_the_middle:
                folder.mkdir()
                for name in ("50-opsctl-switch.env", "50-opsctl-switch.new"):
                    (folder / name).touch()
            running.python(f"{MOVING}relocator.back(b'{{}}')\nprint(0)")
            assert not folder.exists()
            assert running("show", PROPERTIES, "wa") == before

        def refusal() -> str:
            said: str = running.python(f"""{MOVING}
try:
    relocator.saved()
except Refused as error:
    print(json.dumps(error.message))
""")
            return said

        running.unit("wa.service", UNIT.replace("/srv/app", "/opt/x"))
        assert refusal() == "wa does not run from APP_DIR (/srv/app)"
        (running.units / "wa.service").unlink()
        running("daemon-reload")
        assert refusal() == "systemd does not say how it starts wa"

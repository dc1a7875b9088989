"""There and back with everything real: PM2, git, PostgreSQL, and a service on real Baileys with contacts that write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.switch.rig import FLAGS, SERVICE, rig

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Database


@pytest.mark.long
def test_a_service_is_switched_and_brought_back_and_no_message_is_lost(database: Database, place: Path) -> None:
    with rig(place, database.url) as installation:
        installation.pm2("save")
        definition, saved = installation.definition(), json.loads((installation.pm2.home / "dump.pm2").read_bytes())
        head = installation.git("rev-parse", "HEAD")
        prepared = installation.json("switch", "prepare")
        assert [row["result"] for row in prepared["rows"]] == ["ready", "made", "made", "made", "made", "ready"]

        switched = installation.switch()
        assert switched.returncode == 0, switched
        document = switched.json()
        assert (document["rto"]["scope"], document["rto"]["met"]) == ("connected", True)
        assert [row["company"] for row in document["rows"]] == installation.companies
        assert all(row["connected_s"] is not None and row["copy"] == "fresh" for row in document["rows"])
        assert installation.runs_in() == [installation.fallback]
        installation.world.nothing_is_lost()
        status = installation.json("switch", "status")
        (row,) = status["rows"]
        assert (status["facts"]["owner"], row["runs_on"], row["folder"]) == (
            "folders",
            "folders",
            str(installation.fallback),
        )
        assert row["flags"] == dict.fromkeys(FLAGS, "false")
        # Whoever restarts it by hand, or reboots the machine, gets the fallback code too.
        installation.pm2("restart", SERVICE)
        assert installation.runs_in() == [installation.fallback]
        dumped = json.loads((installation.pm2.home / "dump.pm2").read_bytes())
        assert [entry["pm_cwd"] for entry in dumped] == [str(installation.fallback)]
        installation.world.nothing_is_lost()

        back = installation.failback()
        assert back.returncode == 0, back
        assert installation.runs_in() == [installation.app]
        installation.world.nothing_is_lost()
        assert installation.definition() == definition
        assert json.loads((installation.pm2.home / "dump.pm2").read_bytes()) == saved
        assert installation.json("switch", "status")["facts"]["owner"] == "database"
        assert installation.git("rev-parse", "HEAD") == head
        assert installation.git("status", "--porcelain") == ""
        assert "USE_REPOSITORY_PATTERN=true # since July\n" in (installation.app / ".env").read_text()
        assert not list((installation.sessions / ".opsctl").glob("switch*"))
        said = switched.stdout + switched.stderr + back.stdout + back.stderr
        assert not [row["creds"] for row in installation.world.rows if row["creds"][:60] in said]
        assert list(database.execute("SELECT count(*) FROM whatsapp_auth")) == [(2,)]

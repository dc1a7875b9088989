"""There and back where the service is a unit: a real systemd, git, PostgreSQL, and real Baileys with contacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import needs
from tests.switch.rig import FLAGS, SERVICE, systemd_rig

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Database

DROP_IN = "/etc/systemd/system/baileys-whatsapp-service.service.d/50-opsctl-switch.conf"


@pytest.mark.long
@needs.systemd()
def test_a_unit_is_switched_and_brought_back_and_no_message_is_lost(database: Database, place: Path) -> None:
    with systemd_rig(place, database.url) as installation:
        systemd = installation.systemd
        as_it_was = systemd("cat", SERVICE)
        prepared = installation.opsctl("switch", "prepare", "--json")
        assert prepared.returncode == 0, prepared

        switched = installation.switch()
        assert switched.returncode == 0, switched
        document = switched.json()
        assert (document["rto"]["scope"], document["rto"]["met"]) == ("connected", True)
        assert all(row["connected_s"] is not None and row["copy"] == "fresh" for row in document["rows"])
        assert installation.runs_in() == [installation.fallback]
        installation.world.nothing_is_lost()
        status = installation.json("switch", "status")
        (row,) = status["rows"]
        assert (status["facts"]["owner"], row["folder"]) == ("folders", str(installation.fallback))
        assert row["flags"] == dict.fromkeys(FLAGS, "false")
        # Whoever restarts it by hand gets the fallback code too, and so does a boot.
        systemd("restart", SERVICE)
        assert installation.runs_in() == [installation.fallback]
        assert DROP_IN in systemd("cat", SERVICE)
        installation.world.nothing_is_lost()

        back = installation.failback()
        assert back.returncode == 0, back
        assert installation.runs_in() == [installation.app]
        installation.world.nothing_is_lost()
        assert systemd("cat", SERVICE) == as_it_was
        assert installation.json("switch", "status")["facts"]["owner"] == "database"
        said = switched.stdout + switched.stderr + back.stdout + back.stderr
        assert not [row["creds"] for row in installation.world.rows if row["creds"][:60] in said]

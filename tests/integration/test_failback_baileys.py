"""The proof with the real thing: conversations that went on on the folders go on from PostgreSQL's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.baileys.door import VERSIONS, Version, converse, load_fleet, make_fleet
from tests.integration.test_restore_baileys import Service, row_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Database, RunOpsctl


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: f"baileys-{version}")
def test_conversations_that_went_on_on_the_folders_continue_from_the_rows(
    version: Version, database: Database, run_opsctl: RunOpsctl, tmp_path: Path
) -> None:
    service = Service(database, tmp_path / "sessions", run_opsctl)
    made = make_fleet(version, 2, "mixed", state=tmp_path / "made.json", pre_keys=30)
    service.insert(made.rows)
    service.restore("--service-stopped")
    assert converse(service.folder, made, live=True, save_state=tmp_path / "on-folders.json").ok
    on_folders = load_fleet(tmp_path / "on-folders.json")

    failback = ("sessions", "failback", "--from", service.folder, "--service-stopped", "--yes")
    document = service.opsctl(*failback)
    for company_id in made.company_ids:
        row = row_of(document, company_id)
        assert row["result"] == "brought back"
        assert row["updated"] > 0
        assert row["damaged"] == row["conflicting"] == row["lost"] == 0

    # What Baileys reads now are the rows alone: a folder that was made of nothing else.
    service.restore("--service-stopped", to=tmp_path / "from-rows")
    report = converse(tmp_path / "from-rows", on_folders)
    assert report.ok, report
    assert all(company.outcomes() == {"continued"} for company in report.companies)
    assert not sum(conversation.late + conversation.lost for conversation in report.conversations)

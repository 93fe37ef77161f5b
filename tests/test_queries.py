"""The queries that docs/sweeps.md shows run on stored results."""

import re
from pathlib import Path

import pytest
from rows import make_rows

from sim.store import compact, write_row

PAGE = Path(__file__).parents[1] / "docs" / "sweeps.md"


@pytest.fixture
def database(tmp_path, monkeypatch):
    duckdb = pytest.importorskip("duckdb", reason="the queries are in DuckDB's SQL")
    monkeypatch.chdir(tmp_path)
    for row in make_rows(config='{"link_gb_per_s": 25.0}', requests=3):
        write_row("results", row)
    compact("results")
    write_row("results", make_rows(config='{"link_gb_per_s": 25.0}', requests=3)[0])  # there twice
    with duckdb.connect() as connection:
        yield connection


def test_every_query_answers(database):
    view, *queries = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    database.execute(view)
    assert database.execute("SELECT count(*) FROM results").fetchone() == (21,)
    fastest, over_lru, by_link = (database.execute(query).fetchall() for query in queries)
    assert [row[2:4] for row in fastest] == [(0.125, "fate"), (0.25, "fate"), (0.5, "fate")]
    assert len(over_lru) == 21
    assert [row for row in over_lru if row[0] == "lru"] == [("lru", budget, 1.0) for budget in (0.125, 0.25, 0.5)]
    assert {row[1] for row in by_link} == {25.0}
    assert len(by_link) == 7

"""The page about speed says what the stored measurement says."""

import json
from pathlib import Path

from benchmarks.tables import PAGE, PEERS, filled, with_peers
from real.peers.report import FORMAT

STORED = Path(__file__).parents[1] / "benchmarks" / "latest.json"


def test_the_tables_are_those_of_the_stored_measurement():
    page = PAGE.read_text()
    assert filled(page, json.loads(STORED.read_text())) == page


def test_the_comparison_on_a_gpu_is_that_of_the_stored_summary():
    page, summary = PAGE.read_text(), json.loads(PEERS.read_text())
    assert summary["format"] == FORMAT  # of an older one no table is made
    assert with_peers(page, summary) == page

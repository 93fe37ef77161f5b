"""The page about speed says what the stored measurement says."""

import json
from pathlib import Path

from benchmarks.tables import PAGE, filled

STORED = Path(__file__).parents[1] / "benchmarks" / "latest.json"


def test_the_tables_are_those_of_the_stored_measurement():
    page = PAGE.read_text()
    assert filled(page, json.loads(STORED.read_text())) == page

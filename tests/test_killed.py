"""A sweep whose driver and workers are killed: resumed to the same table (tests/killing.py does it twenty times)."""

import random
import sys

import pytest
from builders import make_trace
from killing import by_rows, kill_and_resume, same_table

from sim.study import run_study
from traces import save_trace


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers under /proc")
def test_a_killed_sweep_is_resumed_to_the_same_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [[[token % 5, (token + 1) % 5], [token * token % 5, 4 - token * token % 5]] for token in range(200)]
    save_trace(make_trace([[a, [b, (b + 2) % 5]] for a, (b, _) in steps]), tmp_path / "tiny.safetensors")
    words = [
        "trace=tiny.safetensors", "model=trace", "engine=reference", "axes.system=[lru,lfu]", "axes.seed=[0,1,2,3]",
        "axes.budget=[0.5,0.6,0.7,0.8,0.9,1.0]",
    ]  # fmt: skip
    clean = run_study([*(f"++{word}" if word.startswith("axes") else word for word in words), "jobs=1", "results=clean"])
    assert clean.computed == 48
    moments = [("worker", by_rows(1)), ("driver", by_rows(10))]
    killed = kill_and_resume([*words, "jobs=2"], tmp_path / "killed", moments, random.Random(0))
    same_table(tmp_path / "killed", tmp_path / "clean")
    assert [what for what, _ in killed] == ["worker", "driver"]
    assert 0 < killed[1][1] < 48, "the driver was killed at work"

"""One study through every launcher: the rows are identical, wherever the jobs ran."""

import importlib.util
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from builders import make_trace

from sim import store
from sim.study import read_study
from traces import save_trace

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
}
STUDY = ["sweep", "-m", "trace=tiny.safetensors", "model=trace", "engine=reference", "jobs=1", "axes.system=[lru,lfu]"]
OUTER = ["budget=0.5,0.8", "seed=3"]

ALL = """
import json, sys
from sim.cli import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
"""
"""A process of its own: the plugins warn, and change what they find. One for all, since its start takes the most."""


def installed(launcher):
    return importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the results of every launcher that is installed, and what its process said."""
    folder = tmp_path_factory.mktemp("launchers")
    steps = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 4], [0, 4]], [[0, 1], [2, 0]], [[2, 0], [1, 3]]]
    save_trace(make_trace(steps), folder / "tiny.safetensors")
    chosen = {"basic": [], **{name: words for name, words in LAUNCHERS.items() if installed(name)}}
    runs = [[*STUDY, *OUTER, f"results={name}", *words] for name, words in chosen.items()]
    # Ray would write a token into the home folder, and count users.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [sys.executable, "-c", ALL, json.dumps(runs)]
    found = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    said = found.stdout.splitlines()
    assert json.loads(said[-1]) == [0] * len(runs), found.stderr
    return folder, said


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_rows_are_those_of_a_sweep_in_one_process(folder, launcher):
    if not installed(launcher):
        pytest.skip(f"needs the extra `launchers` (hydra-{launcher}-launcher)")
    results, said = folder
    basic, found = (store.read_rows(results / name) for name in ("basic", launcher))
    assert sorted(zip(basic["system"], basic["slots"], strict=True)) == [("lfu", 5), ("lfu", 8), ("lru", 5), ("lru", 8)]
    assert set(basic["seed"]) == {3}
    pd.testing.assert_frame_equal(found, basic, check_exact=True)
    for budget in ("0.5", "0.8"):
        name = f"sweep+budget={budget}"
        assert list(read_study(results / launcher, name)["key"]) == list(read_study(results / "basic", name)["key"])
        line = (
            f"{name}: 2 points stored, 2 of them computed now; rows: {launcher}/rows, which of them are the study's: "
            f"{launcher}/studies/{name}.json"
        )
        assert said.count(line) == 1

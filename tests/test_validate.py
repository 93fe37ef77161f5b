"""`foregate validate`: from the executor (on a stand-in), its results and stored runs to one report; ground truth stays."""

import gzip
import json
import shutil

import pytest
from measuring import TRACE, cell_of, machine, measured_on, routing
from test_hardware import tiny_profile

from real.validation import command
from real.validation.command import GROUND_TRUTH, check_ground_truth, resolve_winner, write_ground_truth
from real.validation.measured import read_folder, write_measured
from sim.cli import main
from sim.experiment import simulate
from traces import save_trace
from traces.errors import InputError

SYSTEMS = {"lru": 8, "fifo": 8, "load_on_demand": 2}


@pytest.fixture
def folder(tmp_path):
    """A folder of three runs measured on the tiny machine, with their trace."""
    runs = tmp_path / "runs"
    for name, slots in SYSTEMS.items():
        write_measured(runs, measured_on(machine(), cell_of(name, name, slots)))
    save_trace(TRACE, runs / "routing.safetensors")
    (runs / "hardware.json").write_text(json.dumps(tiny_profile()))
    return runs


def test_stored_runs_are_compared_on_their_own_profile_anchors_first(folder, tmp_path, capsys):
    timeline = tmp_path / "both.json.gz"
    assert main(["validate", f"runs={folder}", f"timeline={timeline}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [report["name"] for report in found["reports"]] == ["load_on_demand", "fifo", "lru"]
    assert [report["anchor"] for report in found["reports"]] == ["all missing", None, None]
    assert (found["worst_error"], found["copy_efficiency"], found["of_bound"]) == (0, 0.97, None)
    records = json.loads(gzip.decompress(timeline.read_bytes()))["traceEvents"]
    names = {record["args"].get("name") for record in records if "args" in record}
    assert {"measured: lru", "simulated: lru"} <= names
    assert "attention and gate" in {record["name"] for record in records if record["pid"] == 2}


def test_the_table_names_anchors_and_what_it_adds_up_to(folder, tmp_path, capsys):
    assert main(["validate", f"runs={folder}", f"timeline={tmp_path / 't.json.gz'}", "hardware=rtx3090_pcie4"]) == 0
    printed = capsys.readouterr().out
    assert "load_on_demand (anchor)" in printed
    assert "hardware rtx3090_pcie4" in printed
    assert "Kendall tau" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runs=nowhere"], "runs is 'nowhere': there is no such folder"),
        (["runs=tests"], "tests: there is no measured run"),
        (["rnus=x"], "'rnus' is not a setting"),
        (["link_gb_per_s=20"], "link_gb_per_s: a run is measured, and simulated, on the link that its machine has"),
        (
            ["runs=tests", "system=lru"],
            "system=lru: with runs=FOLDER what was run is compared, and this would change nothing",
        ),
        (["runs=tests", "system=winner"], "system=winner: with runs=FOLDER what was run is compared"),
        (["runs=tests", "budget=0.5"], "budget=0.5: with runs=FOLDER what was run is compared"),
        (["runs=tests", "trace.tokens=9"], "trace.tokens=9: with runs=FOLDER what was run is compared"),
        (["runs=tests", "sistem=lru"], "'sistem' is not a setting: did you mean 'system'?"),
        (["cells=cells.json"], "cells: they belong to results of real.replay; give the folder of those too: runs=FOLDER"),
        (["runs=tests", "cells=c.json"], "cells is 'c.json', but tests holds no results of real.replay (results.jsonl)"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    assert main(["validate", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_of_folders_of_runs_names_them(folder, capsys):
    assert main(["validate", f"runs={folder.parent}"]) == 2
    assert capsys.readouterr().err == f"foregate: {folder.parent}: there is no measured run, but in runs={folder}\n"


def test_without_gpu_and_ground_truth_a_sentence_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    monkeypatch.setattr(command, "GROUND_TRUTH", tmp_path)
    assert main(["validate"]) == 2
    sentence = "there is no GPU that torch can use: give runs=FOLDER of measured runs (no measurements are committed yet)"
    assert sentence in capsys.readouterr().err


def test_without_gpu_the_committed_measurements_are_compared(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    monkeypatch.setattr(command, "GROUND_TRUTH", tmp_path)
    (folder / "summary.json").write_text("{}")
    sentence = f"there is no GPU that torch can use: the measurements in {folder} are compared"
    for given, in_vain in (
        ([], ""),
        (["system=lru", "budget=0.5"], "; nothing was run, so system=lru, budget=0.5 changed nothing"),
    ):
        assert main(["validate", f"results={tmp_path}", "--json", *given]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["worst_error"] == 0
        assert printed.err.splitlines()[0] == sentence + in_vain


def test_of_the_committed_folders_the_first_is_compared_and_the_others_are_named(monkeypatch, tmp_path, capsys):
    """Of the real ones, with two runs of the first in place of all."""
    committed = sorted(path.parent for path in GROUND_TRUTH.glob("*/summary.json"))
    if len(committed) < 2:
        pytest.skip("real/ground_truth holds the measurements of fewer than two GPUs")
    truth = tmp_path / "ground_truth"
    first, *others = [truth / folder.name for folder in committed]
    stems = "olmoe_1b_7b_all_resident", "olmoe_1b_7b_lru_0p5"
    for folder in committed:
        (truth / folder.name).mkdir(parents=True)
        shutil.copy(folder / "summary.json", truth / folder.name)
    for name in ("hardware.json", "olmoe_1b_7b.safetensors"):
        shutil.copy(committed[0] / name, first)
    for stem in stems:
        for suffix in ("json", "parquet", "log.json.gz", "spans.json.gz"):
            shutil.copy(committed[0] / f"{stem}.{suffix}", first)
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    monkeypatch.setattr(command, "GROUND_TRUTH", truth)
    assert main(["validate", f"results={tmp_path}", "--json"]) == 0
    printed = capsys.readouterr()
    named = ", ".join(f"runs={folder}" for folder in others)
    sentence = f"there is no GPU that torch can use: the measurements in {first} are compared; or {named}"
    assert printed.err.splitlines()[0] == sentence
    stored = {cell["name"]: cell for cell in json.loads((first / "summary.json").read_text())["cells"]}
    reports = json.loads(printed.out)["reports"]
    assert [report["anchor"] for report in reports] == ["all resident", None]
    for report in reports:
        then = stored[report["name"]]
        assert report["measured_tpot_ns"] == then["measured_tpot_ns"]
        assert report["closed_loop"]["tpot_ns"] == then["simulated_tpot_ns"]


# ---- from the executor -------------------------------------------------------------------------------------------


@pytest.fixture
def long_trace(tmp_path):
    path = tmp_path / "long.safetensors"
    save_trace(routing(tokens=170), path)
    return path


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """Call it to let the stand-in measure in place of a GPU, with another `run_cell` if one is given."""
    measure = command._measure

    def measuring(run_cell=None):
        monkeypatch.setattr(command, "_has_gpu", lambda: True)
        monkeypatch.setattr(command, "_measure", lambda *arguments: measure(*arguments, where="cpu"))
        if run_cell is not None:
            monkeypatch.setattr("real.replay.run_cell", run_cell)

    return measuring


def test_cells_run_through_the_executor_and_into_a_report(
    long_trace, tmp_path, as_if_on_gpu, capsys, one_thread, little_garbage
):
    """On a stand-in that times nothing: what counts is that decisions arrive and are those of the simulator."""
    pytest.importorskip("torch", reason="the executor needs torch")
    overrides = [f"trace={long_trace}", "model=trace", "system=lru", "budget=0.5", f"results={tmp_path / 'results'}"]
    as_if_on_gpu()
    reports, _, timeline = command.validate(overrides)
    assert [report.anchor for report in reports] == ["all resident", "all missing", "perfect prefetch", None]
    assert reports[-1].system == "lru"
    assert reports[-1].divergence.differing == 0
    assert reports[1].divergence.differing == 0
    assert timeline.is_file()
    runs = read_folder(tmp_path / "results" / "validation")
    assert [len(run.pass_ns) for run in runs] == [4] * 4
    assert all(run.host_per_layer_ns["issue_gate"]["median"] > 0 for run in runs)
    for run in runs:
        shown = {span.event // run.cell["model"]["layers"] for span in run.spans}
        assert sorted(shown) == run.marked["step"].tolist()[-4:]
    *said, last = capsys.readouterr().err.splitlines()
    assert last.startswith("these runs were made by the stand-in on a CPU, which times nothing: their times")
    assert [line.partition(": ")[2] for line in said] == [f"pass {number} of 4" for number in (1, 2, 3, 4) for _ in runs]


def test_a_cell_that_fails_in_a_later_pass_is_said_and_the_others_are_kept(
    long_trace, tmp_path, as_if_on_gpu, capsys, one_thread, little_garbage
):
    replay = pytest.importorskip("real.replay", reason="the executor needs torch", exc_type=ImportError)
    run_cell, ran = replay.run_cell, []

    def fail_once(cell, *arguments):
        ran.append(cell.name)
        if ran.count("all missing") == 2 and ran[-1] == "all missing":
            raise InputError("no more")
        return run_cell(cell, *arguments)

    words = [f"trace={long_trace}", "model=trace", "system=lru", "budget=0.5", f"results={tmp_path}"]
    as_if_on_gpu(fail_once)
    assert main(["validate", *words]) == 2
    assert "foregate: 'all missing' failed in pass 2 of 4: no more" in capsys.readouterr().err.splitlines()
    assert ran.count("all missing") == 2
    assert [run.name for run in read_folder(tmp_path / "validation")] == ["all resident", "lru", "perfect prefetch"]


def test_what_ran_before_an_interruption_is_kept(long_trace, tmp_path, as_if_on_gpu, capsys, one_thread, little_garbage):
    """In the second pass; two cells had failed in the first one, and of the others each has the passes that it had."""
    replay = pytest.importorskip("real.replay", reason="the executor needs torch", exc_type=ImportError)
    run_cell, ran = replay.run_cell, {}

    def stop_in_the_second_pass(cell, model):
        if cell.name not in ("all resident", "lru"):
            raise InputError("no more")
        if cell.name not in ran:
            ran[cell.name] = run_cell(cell, model)
        elif cell.name == "lru":
            raise KeyboardInterrupt
        return ran[cell.name]

    words = [f"trace={long_trace}", "model=trace", "system=lru", "budget=0.5", f"results={tmp_path}"]
    as_if_on_gpu(stop_in_the_second_pass)
    assert main(["validate", *words]) == 130
    assert "foregate: interrupted" in capsys.readouterr().err
    kept = {run.name: len(run.pass_ns) for run in read_folder(tmp_path / "validation")}
    assert kept == {"all resident": 2, "lru": 1}


def test_results_of_the_executor_are_read_with_their_cells(long_trace, tmp_path, one_thread, little_garbage):
    pytest.importorskip("torch", reason="the executor needs torch")
    from real.cells import make_cell, write_cells
    from real.replay import main as replay

    cell = make_cell("one", [f"trace={long_trace}", "model=trace", "system=lru", "budget=0.5"], tmp_path)
    write_cells([cell], tmp_path / "cells.json")
    assert replay([str(tmp_path / "cells.json"), "--out", str(tmp_path / "out"), "--where", "cpu"]) == 0
    words = [f"runs={tmp_path / 'out'}", f"cells={tmp_path / 'cells.json'}", f"results={tmp_path}"]
    (report,), hardware, _ = command.validate(words)
    assert (report.name, report.divergence.differing, hardware.name) == ("one", 0, "h100_pcie5")
    with pytest.raises(InputError, match=r"cells: there is no file .*cells.json; name the cells.json that was run"):
        command.validate(words[:1])


def test_the_winner_is_the_fastest_stored_system_that_is_no_ceiling(tmp_path):
    from sim.config import compose_config

    own = ["trace.tokens=40", f"results={tmp_path}"]
    rates = {}
    for system in ("load_on_demand", "lru", "clairvoyant"):
        rates[system] = simulate(compose_config("simulate", [*own, f"system={system}", "budget=0.3"]))["tokens_per_s"]
    assert rates["clairvoyant"] > rates["lru"] > rates["load_on_demand"]
    simulate(compose_config("simulate", [*own, "system=load_on_demand", "eviction=fifo", "budget=0.2"]))
    assert resolve_winner([*own, "system=winner"]) == [*own, "system=lru", "budget=0.3"]
    assert resolve_winner([*own, "system=winner", "budget=0.2"]) == [
        *own,
        "budget=0.2",
        "system=load_on_demand",
        "eviction=fifo",
    ]
    with pytest.raises(InputError, match=r"system=winner: .* holds no result on this trace and budget"):
        resolve_winner([*own, "system=winner", "budget=0.9"])


# ---- ground truth ------------------------------------------------------------------------------------------------


def test_ground_truth_notices_a_simulator_that_drifts(tmp_path):
    runs = [(measured_on(machine(), cell_of(name, name, slots)), TRACE) for name, slots in SYSTEMS.items()]
    found = write_ground_truth(tmp_path, runs, tiny_profile(), over_best_peer=2.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert (found["over_best_peer"], found["of_bound"]) == (2.5, None)
    assert check_ground_truth(tmp_path) == []
    profile = tiny_profile()
    profile["host"]["readout_ns"]["value"] += 1  # stands for a memory model that has changed
    (tmp_path / "hardware.json").write_text(json.dumps(profile))
    drifted = check_ground_truth(tmp_path)
    of_cells = [sentence for sentence in drifted if sentence.startswith("'")]
    assert {sentence.partition(":")[0] for sentence in of_cells} == {f"'{name}'" for name in SYSTEMS}
    of_all = ["mean_error", "worst_error", "mean_error_of_medians", "worst_error_of_medians"]
    assert [sentence.split()[0] for sentence in drifted[len(of_cells) :]] == of_all
    (tmp_path / "lru.json").unlink()
    with pytest.raises(InputError, match="the runs of 'lru' are missing"):
        check_ground_truth(tmp_path)


def test_the_simulator_is_as_far_from_the_committed_measurements_as_it_was():
    folders = sorted(path.parent for path in GROUND_TRUTH.glob("*/summary.json"))
    if not folders:
        pytest.skip("no measurements are committed yet: real/ground_truth/<gpu> needs a run on a GPU")
    for folder in folders:
        assert check_ground_truth(folder) == []

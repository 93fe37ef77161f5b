"""Cells made of configurations: routing in another model's shape, and what a cell says."""

import json
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("torch", reason="the real backend needs torch (the extra `real`)")

# what must be there comes first

from real.cells import fit_routing, main, make_cell, write_cells
from real.replay import check_cells, read_cells
from real.systems import cell_system
from sim.config import compose_config
from sim.hardware import model_spec
from sim.workload import make_workload
from traces import bundled, load_trace, save_trace, take_tokens

RECORDING = take_tokens(load_trace(bundled()["reference_16x64_top8"]), 480)


def spec_of(model):
    return model_spec(compose_config("simulate", [f"model={model}"])["model"])


def test_a_recording_of_the_models_shape_keeps_its_routing():
    fitted = fit_routing(RECORDING, spec_of("olmoe_1b_7b"))
    np.testing.assert_array_equal(fitted.experts, RECORDING.experts)
    assert fitted.provenance.kind == "recorded"


def test_routing_is_cut_to_the_models_experts_and_layers_are_borrowed_from_the_next_request(tmp_path):
    spec = spec_of("qwen1_5_moe_a2_7b")
    fitted = fit_routing(RECORDING, spec)
    save_trace(fitted, tmp_path / "fitted.safetensors")  # which checks all of it
    assert fitted.experts.shape == (480, 24, 4)
    token = RECORDING.experts[5, 3].tolist()
    assert fitted.experts[5, 3].tolist() == [expert for expert in token if expert < 60][:4]
    np.testing.assert_array_equal(fitted.experts[:160, 16:], fitted.experts[160:320, :8])
    assert fitted.provenance.kind == "synthetic"


def test_a_cell_comes_back_from_its_file_and_builds_the_system_of_its_configuration(tmp_path):
    trace = tmp_path / "routing.safetensors"
    save_trace(fit_routing(RECORDING, spec_of("deepseek_v2_lite")), trace)
    overrides = [f"trace={trace}", "model=deepseek_v2_lite", "system=fate", "budget=0.25", "workload.phases=decode"]
    made = make_cell("one", overrides, tmp_path)
    write_cells([made], tmp_path / "cells.json")
    (read,) = read_cells(tmp_path / "cells.json")
    assert asdict(made) == {**asdict(read), "trace": "routing.safetensors"}
    assert json.loads((tmp_path / "cells.json").read_text())[0]["slots"] == 416
    system = cell_system(asdict(read), make_workload(load_trace(read.trace), **read.workload))
    assert system.setting.capacity.tolist()[:5] == [64, 64, 64, 64, 8]
    assert read.shape.expert_bytes == 17301504


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_grid_leaves_the_folder_as_it_was(there, tmp_path, monkeypatch, capsys):
    def interrupted(folder):
        (folder / "half.safetensors").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("real.cells.make_grid", interrupted)
    out = tmp_path / "results" / "cells"
    if there:
        out.mkdir(parents=True)
        (out / "cells.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    assert main(["--out", str(out)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_grid_is_whole_and_its_cells_can_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("real.cells.GRID", {"olmoe_1b_7b": (0.25,)})
    assert main(["--out", str(tmp_path / "cells")]) == 0
    path = tmp_path / "cells" / "cells.json"
    assert sorted(each.name for each in path.parent.iterdir()) == ["cells.json", "olmoe_1b_7b.safetensors"]
    check_cells(read_cells(path), path)
    assert main(["--out", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"--out is '{path}': it must be a folder")

"""A calibration of known timings is a profile with known constants; a machine without a GPU says so."""

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from real.calibration import profile as calibration
from real.calibration.measure_host import HostTimes, measure_host
from real.calibration.profile import Entry, calibrate, checked_path, gpu_constants, gpu_figures, host_figures, profile_text
from sim.cli import main
from sim.config import compose_config
from sim.hardware import make_hardware
from traces.errors import InputError

HOST = HostTimes([2000.0, 1000.0, 3000.0], (4000, [1000.0]), (2000, [1000.0]), ())
FACTS = {"date": "2026-01-02", "processor": "a CPU", "processors": 4}


def gpu_times():
    """A link of 10 us and 50 GB/s that takes 5 us to wake; kernels of 12 us at 2 TB/s; 500 Tflop/s."""
    copy = {size: 10_000 + size / 50 for size in (100_000, 1_000_000, 10_000_000)}
    shapes = {"small": (4, 16_000_000), "large": (2, 300_000_000)}
    return SimpleNamespace(
        h2d={size: {n: [5000 + n * time] * 3 for n in (1, 4, 16)} for size, time in copy.items()},
        d2h={64: [9000.0]},
        experts={name: (n, size, [n * (12_000 + size / 2000)]) for name, (n, size) in shapes.items()},
        experts_eager={"small": [99_000.0]},
        expert_tokens={1: [20_000.0], 4: [21_000.0]},
        attention={128: (20_000_000, [30_000.0]), 1024: (40_000_000, [41_000.0])},
        attention_eager=[70_000.0],
        head=(200_000_000, [107_000.0]),
        gemm=(10**12, [2_000_000.0]),
        device_copy=(1 << 20, [1000.0]),
        readout={".cpu()": [40_000.0], "mapped word": [9000.0, 10_000.0, 20_000.0]},
        calls={"graph launch": [6000.0, 7000.0, 8000.0]},
        contention={"gemm beside copies": ([100.0], [103.0])},
        notes=(),
    )


def test_constants_are_those_that_the_times_were_made_from():
    found = {name: entry.value for name, entry in gpu_constants(gpu_times()).items()}
    assert found == {
        "link.h2d": [(100_000, 17_000), (1_000_000, 35_000), (10_000_000, 215_000)],
        "link.h2d_train": [(100_000, 12_000), (1_000_000, 30_000), (10_000_000, 210_000)],
        "compute.memory_bandwidth": 2 * 10**12,
        "compute.expert_launch_ns": 12_000,
        "compute.flops": 5 * 10**14,
        "compute.layer_launch_ns": 20_500,  # 20 and 21 us beyond reading
        "compute.step_launch_ns": 7000,
        "host.readout_ns": 10_000,
        "host.gate_issue_ns": 7000,
    }


def test_a_written_profile_is_what_hydra_composes_on_its_base(tmp_path):
    entries = {**gpu_constants(gpu_times()), "device.memory_bytes": Entry(8 * 10**9, "bytes", "as the driver states it")}
    machine = {**FACTS, "device": "a GPU", "driver": "580.1", "measured": {**gpu_figures(gpu_times()), **host_figures(HOST)}}
    folder = tmp_path / "hardware"
    folder.mkdir()
    (folder / "box.yaml").write_text(profile_text("box", "h100_pcie5", entries, machine))
    hardware = make_hardware(compose_config("simulate", ["hardware=box"], str(tmp_path))["hardware"])
    assert hardware.name == "box"
    assert hardware.tags() == "10 measured, 3 assumed"
    assert hardware.h2d_train == ((100_000, 12_000), (1_000_000, 30_000), (10_000_000, 210_000))
    rows = {row.name: row for row in hardware.provenance()}
    assert rows["host.readout_ns"].spread == ((9200, 18_000),)
    assert rows["link.h2d"].spread == ((17_000, 17_000), (35_000, 35_000), (215_000, 215_000))
    assert rows["host.expert_issue_ns"].tag == "assumed"
    assert hardware.machine["driver"] == "580.1"
    assert hardware.machine["measured"]["slowdown"] == {"gemm beside copies": 1.03}
    assert hardware.machine["measured"]["disk_read_bytes_per_s"] == 2 * 10**9
    assert hardware.machine["measured"]["cpu_expert_bytes_per_s"] == round(6 * 2048 * 1024 / 2000 * 1e9)


def test_the_next_read_out_stands_in_where_the_executor_s_own_was_not_measured():
    times = gpu_times()
    del times.readout["mapped word"]
    assert gpu_constants(times)["host.readout_ns"].value == 40_000


@pytest.mark.parametrize(
    ("out", "base", "sentence"),
    [
        (
            "box.yml",
            "h100_pcie5",
            "out is 'box.yml': it must be a file NAME.yaml whose name has only letters, digits and '_'",
        ),
        (
            "my box.yaml",
            "h100_pcie5",
            "out is 'my box.yaml': it must be a file NAME.yaml whose name has only letters, digits",
        ),
        ("box.yaml", "a/b", "base is 'a/b': it must be the name of a profile, such as h100_pcie5"),
        ("h100_pcie5.yaml", "h100_pcie5", "out is 'h100_pcie5.yaml': a profile cannot be its own base; choose another name"),
        (
            "pyproject.toml/box.yaml",
            "h100_pcie5",
            "out is 'pyproject.toml/box.yaml': the folder pyproject.toml cannot be made: ",
        ),
    ],
)
def test_a_file_that_cannot_be_a_profile_is_refused_before_anything_is_measured(out, base, sentence):
    with pytest.raises(InputError) as error:
        checked_path(out, base)
    assert str(error.value).startswith(sentence)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(calibration, "measure_host", lambda folder: HOST)
    sentence = "there is no GPU that torch can use: the constants of GPU and link stay the base's"
    monkeypatch.setattr(calibration, "_gpu", lambda say: (None, {}, (sentence,)))
    return sentence


def test_without_a_gpu_all_constants_are_the_base_s_and_a_sentence_says_so(no_gpu, tmp_path, capsys):
    path = tmp_path / "hardware" / "box.yaml"  # whose folder is made
    assert main(["calibrate", f"out={path}", "base=rtx3090_pcie4"]) == 0
    captured = capsys.readouterr()
    assert no_gpu in captured.err
    choose = f"choose it: foregate compare --config-dir {tmp_path} hardware=box"
    assert captured.out.splitlines() == [str(path), choose]
    config = compose_config("simulate", ["hardware=box"], str(tmp_path))
    base = make_hardware(compose_config("simulate", ["hardware=rtx3090_pcie4"])["hardware"])
    assert make_hardware(config["hardware"]).constants == base.constants
    assert config["hardware"]["machine"]["measured"]["host_copy_bytes_per_s"] == 4 * 10**9


@pytest.mark.parametrize("words", [[], ["out=my box/mine.yaml"]])
def test_the_commands_that_it_prints_choose_the_profile(words, no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    if words:
        subprocess.run(printed[1].partition(": ")[2], shell=True, check=True)
    _, verb, option, folder, choice = shlex.split(printed[-1].partition(": ")[2])
    assert (verb, option) == ("compare", "--config-dir")
    name = choice.removeprefix("hardware=")
    assert compose_config("compare", [choice], folder)["hardware"]["name"] == name == ("mine" if words else "calibrated")


def test_an_unknown_base_is_refused(capsys):
    assert main(["calibrate", "out=box.yaml", "base=h100"]) == 2
    assert "base is 'h100'" in capsys.readouterr().err
    assert not Path("box.yaml").exists()


def test_an_interrupted_calibration_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "measure_host", interrupted)
    assert calibration.main(["--out", str(tmp_path / "box.yaml")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_gpu_is_one_sentence(monkeypatch, tmp_path, capsys):
    def failing(say):
        raise InputError("the GPU could not be measured: out of memory")

    monkeypatch.setattr(calibration, "_gpu", failing)
    assert calibration.main(["--out", str(tmp_path / "box.yaml")]) == 2
    assert capsys.readouterr().err == "calibration: the GPU could not be measured: out of memory\n"
    assert list(tmp_path.iterdir()) == []


def test_the_host_is_measured_where_it_is(tmp_path):
    found = measure_host(tmp_path, repeats=2)
    assert len(found.memory_copy[1]) == 2
    assert min(found.memory_copy[1]) > 0
    assert (found.disk_read is None) == any("disk" in note for note in found.notes)
    assert (found.cpu_expert is None) == any("torch" in note for note in found.notes)
    assert list(tmp_path.iterdir()) == []


def test_calibrate_returns_what_is_missing(no_gpu, tmp_path):
    assert calibrate(tmp_path / "box.yaml") == [no_gpu]

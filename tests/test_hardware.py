"""Hardware profiles: every shipped one is complete and tagged, and a bad one is refused in one sentence."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sim.hardware import TAGS, make_hardware
from traces.errors import InputError

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "hardware.md"
PROFILES = sorted(path.stem for path in (ROOT / "conf" / "hardware").glob("*.yaml"))


def load_profile(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+hardware={name}"]).hardware, resolve=True)


def constant(value, unit="ns", tag="assumed", source="made up"):
    return {"value": value, "unit": unit, "tag": tag, "source": source}


def tiny_profile():
    """Round figures: 1 GB/s of memory, 1 Gflop/s, a link of 10 ns up to 100 bytes and then 1 ns per 10."""
    return {
        "name": "tiny",
        "link": {
            "h2d": constant([[100, 10], [200, 20], [1200, 120]], "[bytes, ns]", "measured"),
            "chunk_bytes": constant(400, "bytes"),
        },
        "compute": {
            "memory_bandwidth": constant(1e9, "bytes/s", "datasheet"),
            "flops": constant(1_000_000_000, "flop/s", "datasheet"),
            "expert_launch_ns": constant(7),
            "layer_launch_ns": constant(5),
            "step_launch_ns": constant(3),
        },
        "host": {
            "readout_ns": constant(11),
            "gate_issue_ns": constant(13),
            "expert_issue_ns": constant(17),
            "step_ns": constant(19),
        },
        "device": {"memory_bytes": constant(10_000, "bytes")},
    }


def refusal(path, value):
    """Return the sentence with which the tiny profile is refused once `path` is replaced by `value`."""
    profile = copy.deepcopy(tiny_profile())
    *groups, last = path.split(".")
    place = profile
    for group in groups:
        place = place[group]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(InputError) as error:
        make_hardware(profile)
    return str(error.value)


def test_values_arrive_as_whole_numbers():
    hardware = make_hardware(tiny_profile())
    assert (hardware.memory_bandwidth, hardware.h2d[-1]) == (1_000_000_000, (1200, 120))
    assert isinstance(hardware.memory_bandwidth, int)


def test_provenance_lists_every_constant_in_order():
    rows = make_hardware(tiny_profile()).provenance()
    assert len(rows) == 12
    assert tuple(rows[1]) == ("link.chunk_bytes", 400, "bytes", "assumed", "made up", ())


def test_tags_are_counted():
    assert make_hardware(tiny_profile()).tags() == "1 measured, 2 datasheet, 9 assumed"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("host", None, "hardware.host is missing: hardware needs name, link, compute, host, device"),
        (
            "hosts",
            {},
            "hardware has no field 'hosts': did you mean 'host'? known: compute, device, host, link, machine, models, name",
        ),
        ("host", 3, "hardware.host is 3: it must be a mapping"),
        ("name", "", "hardware.name is '': it must be a text that is not empty"),
        (
            "link.chunk_byte",
            {},
            "hardware.link has no field 'chunk_byte': did you mean 'chunk_bytes'? known: chunk_bytes, committed_chunks, "
            "h2d, h2d_train",
        ),
        (
            "link.chunk_bytes.source",
            None,
            "hardware.link.chunk_bytes.source is missing: hardware.link.chunk_bytes needs value, unit, tag, source",
        ),
        (
            "link.chunk_bytes.tag",
            "measurd",
            "hardware.link.chunk_bytes.tag is 'measurd': did you mean 'measured'? known: assumed, datasheet, measured",
        ),
        ("link.chunk_bytes.unit", "MB", "hardware.link.chunk_bytes.unit is 'MB': it must be 'bytes'"),
        (
            "link.chunk_bytes.value",
            0,
            "hardware.link.chunk_bytes.value is 0: it must be a whole number of bytes, at least 1",
        ),
        (
            "host.readout_ns.value",
            -4,
            "hardware.host.readout_ns.value is -4: it must be a whole number of ns, at least 0",
        ),
        (
            "host.readout_ns.value",
            1.5,
            "hardware.host.readout_ns.value is 1.5: it must be a whole number of ns, at least 0",
        ),
        (
            "compute.flops.value",
            float("nan"),
            "hardware.compute.flops.value is nan: it must be a whole number of flop/s, at least 1",
        ),
        (
            "compute.flops.value",
            float("inf"),
            "hardware.compute.flops.value is inf: it must be a whole number of flop/s, at least 1",
        ),
        (
            "compute.flops.value",
            "71e12",
            "hardware.compute.flops.value is '71e12': it must be a whole number of flop/s, at least 1",
        ),
        (
            "host.readout_ns.spread",
            [12, 9],
            "hardware.host.readout_ns.spread holds [12, 9]: the 10th percentile is above the 90th",
        ),
        (
            "host.readout_ns.spread",
            9,
            "hardware.host.readout_ns.spread holds 9: it must be a pair [10th percentile, 90th]",
        ),
        (
            "link.h2d.spread",
            [[9, 12]],
            "hardware.link.h2d.spread is [[9, 12]]: it must be one pair [10th percentile, 90th] per point of the curve",
        ),
        ("machine", "a PC", "hardware.machine is 'a PC': it must be a mapping"),
        (
            "link.h2d.value",
            [[100, 10]],
            "hardware.link.h2d.value is [[100, 10]]: it must be a list of at least two points [bytes, ns]",
        ),
        (
            "link.h2d.value",
            [[100, 10], 5],
            "hardware.link.h2d.value[1] is 5: it must be one point [bytes, ns]",
        ),
        (
            "link.h2d.value",
            [[100, 10], [100, 11]],
            "hardware.link.h2d.value[1][0] is 100: bytes must rise, and the point before has 100",
        ),
        (
            "link.h2d.value",
            [[100, 10], [200, 9]],
            "hardware.link.h2d.value[1][1] is 9: time must not fall, and the point before has 10",
        ),
    ],
)
def test_bad_profiles_are_refused_in_one_sentence(path, value, sentence):
    assert refusal(path, value) == sentence


def test_a_measured_constant_may_state_its_spread():
    profile = tiny_profile()
    profile["host"]["readout_ns"]["spread"] = [9, 12]
    profile["link"]["h2d"]["spread"] = [[9, 10], [19, 20], [119, 130]]
    rows = {row.name: row.spread for row in make_hardware(profile).provenance()}
    assert rows["host.readout_ns"] == ((9, 12),)
    assert rows["link.h2d"] == ((9, 10), (19, 20), (119, 130))
    assert rows["link.chunk_bytes"] == ()


def test_terms_that_a_profile_may_lack():
    assert (make_hardware(tiny_profile()).h2d_train, make_hardware(tiny_profile()).step_readout_ns) == (None, None)
    profile = tiny_profile()
    profile["link"]["h2d_train"] = constant([[100, 6], [200, 12]], "[bytes, ns]", "measured")
    profile["host"]["step_readout_ns"] = constant(9)
    hardware = make_hardware(profile)
    assert (hardware.h2d_train, hardware.step_readout_ns) == (((100, 6), (200, 12)), 9)
    assert [row.name for row in hardware.provenance()][:2] == ["link.h2d", "link.h2d_train"]


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_are_complete_and_tagged(name):
    hardware = make_hardware(load_profile(name))
    assert hardware.name == name
    assert all(row.tag in TAGS for row in hardware.provenance())


@pytest.mark.parametrize("name", PROFILES)
def test_the_document_shows_every_constant(name):
    cells = {cell[0]: cell for cell in (_cells(line) for line in DOCUMENT.read_text().splitlines()) if cell}
    column = cells["constant"].index(f"`{name}`")
    for row in make_hardware(load_profile(name)).provenance():
        if row.name != "link.h2d":
            assert cells[f"`{row.name}`"][column] == f"{row.value:,} {row.tag}"


def test_the_document_s_fit_is_what_the_profile_holds():
    code, printed = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).groups()
    output = io.StringIO()
    fitted = {}
    with contextlib.redirect_stdout(output):
        exec(code, fitted)
    assert output.getvalue() == printed
    hardware = make_hardware(load_profile("h100_pcie5"))
    assert hardware.expert_launch_ns == round(fitted["launch_ns"], -2)
    assert hardware.memory_bandwidth == round(fitted["bandwidth"], -9)


def _cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []

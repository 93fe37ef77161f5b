"""Calibrating the executor: its marks taken apart, and constants that give back the times that they were made from."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from test_hardware import tiny_profile

from real.calibration.measure_executor import (
    CONTEXTS,
    MODELS,
    ShapeTimes,
    _as_fits,
    _Parts,
    _quietest,
    _samples,
    measure_executor,
)
from real.calibration.profile import Entry, executor_constants, executor_figures, profile_text
from real.cells import GRID, decoder_shape
from real.decoder import ModelShape
from real.timeline import MARKS, STAMPS
from sim.config import compose_config
from sim.costs import make_costs
from sim.hardware import make_hardware, model_spec
from traces.errors import InputError


def shape_times(**changes):
    """Gate to residents 20 us, to the first copy 50; one expert 15 us and 5 from its landing on, eight together 48."""
    found = {
        "attention": {128: [75_000.0, 75_000.0, 90_000.0], 4096: [91_000.0]},
        "shared": [0.0],
        "attention_beside": [83_000.0],
        "gap": [1000.0],
        "groups": {1: [15_000.0], 8: [48_000.0]},
        "group_beside": [27_000.0],
        "step": [125_000.0],
        "copy_first": [240_000.0],
        "copy_behind": [232_000.0],
        "gate_issue": [4000.0, 5000.0, 9000.0],
        "gate_to_residents": [20_000.0],
        "gate_to_copy": [50_000.0],
        "landing_to_experts": [5000.0],
        "ahead": [600.0],
        "step_issue": [10_000.0],
    }
    return ShapeTimes(**{**found, **changes})


def values(shapes):
    return {name: entry.value for name, entry in executor_constants(shapes).items()}


def test_one_expert_that_was_waited_for_and_all_that_were_there_take_what_they_took():
    found = values({"m": shape_times()})
    assert found["models.m.expert_ns"] + found["models.m.group_ns"] == 15_000 + 5000
    assert 8 * found["models.m.expert_ns"] + found["models.m.group_ns"] == 48_000
    assert found["models.m.attention"] == [(128, 76_000), (4096, 92_000)]
    assert (found["models.m.shared_ns"], found["models.m.step_ns"]) == (0, 126_000)


def test_the_host_s_times_are_told_apart():
    found = values({"m": shape_times()})
    names = ("readout_ns", "expert_issue_ns", "demand_issue_ns", "ahead_ns", "gate_issue_ns", "step_ns")
    assert [found[f"host.{name}"] for name in names] == [20_000, 0, 30_000, 600, 5000, 10_000]
    assert found["compute.beside_ns"] == (8000 + 12_000) / 2


def test_a_decision_that_shared_experts_hide_says_nothing_about_the_read_out():
    shared = shape_times(shared=[30_000.0], gate_to_residents=[0.0])
    assert values({"a": shape_times(), "b": shared})["host.readout_ns"] == 20_000
    assert values({"b": shared})["host.readout_ns"] == 50_000  # nothing better is known


def test_nothing_measured_is_nothing_written():
    assert executor_constants({}) == {}
    assert executor_figures({}) == {}


def test_the_profile_holds_the_models_and_costs_are_theirs():
    text = profile_text(
        "box", "base", executor_constants({"tiny": shape_times()}), {"processors": 1, "processor": "x", "date": "y"}
    )
    written = yaml.safe_load(text)
    profile = tiny_profile()
    for group in ("link", "compute", "host"):
        profile[group] |= written.get(group, {})
    hardware = make_hardware({**profile, "models": written["models"]})
    sizes = {"name": "tiny", "layers": 2, "experts": 8, "top_k": 8, "hidden_size": 4, "expert_width": 8}
    model = model_spec({**sizes, "other_bytes": 100, "kv_bytes_per_token": 4, "expert_bytes": {"bf16": 192}})
    costs = make_costs(hardware, model, np.array([1, 1]), np.array([100, 4096]))
    assert costs.attention_ns.tolist() == [76_000, 92_000]
    assert costs.group_ns + costs.expert_ns[1] == 20_000
    assert costs.step_ns.tolist() == [126_000] * 2
    assert (costs.host_demand_ns, costs.beside_ns, costs.committed_chunks) == (30_000, 10_000, 1)


def test_times_of_a_model_that_are_not_whole_are_refused():
    times = {"group_ns": {"value": 1, "unit": "ns", "tag": "measured", "source": "x"}}
    with pytest.raises(InputError, match=r"hardware\.models\.m\.attention is missing"):
        make_hardware({**tiny_profile(), "models": {"m": times}})


@pytest.mark.parametrize("name", GRID)
def test_measured_decoders_are_those_of_the_models(name):
    assert MODELS[name] == decoder_shape(model_spec(compose_config("simulate", [f"model={name}"])["model"]))


def parts_of(*kinds, stamps=None):
    """Two steps of two layers: `kinds` are (layer, kind of mark, ns until the next) of one of them."""
    starts = np.cumsum([0, *(span for _, _, span in kinds * 2)])
    marks = [
        (place // len(kinds), layer, MARKS.index(kind), starts[place]) for place, (layer, kind, _) in enumerate(kinds * 2)
    ]
    timeline = SimpleNamespace(
        layers=2,
        stamps=np.zeros((2, 2, len(STAMPS)), np.int64) if stamps is None else stamps,
        device_marks=lambda: np.array(marks),
        copy_marks=lambda: np.zeros((0, 5), np.int64),
    )
    return _Parts(SimpleNamespace(timeline=timeline), SimpleNamespace(warmup=0, steps=2))


@pytest.mark.parametrize("shared_width", [0, 8])
def test_spans_are_taken_with_their_gaps_so_that_they_add_up_to_a_step(shared_width):
    """Attention 75 (behind the embedding 82), after a gate 30 (shared experts or a gap), decide 7, experts 48, head 115."""
    layers = [
        [(n, "attention", 82 - 7 * n), (n, "gate", 30), (n, "decide", 7), (n, "start", 48), (n, "end", 3)] for n in (0, 1)
    ]
    kinds = (*layers[0], *layers[1], (1, "head", 115), (1, "step_end", 3))
    stamps = np.zeros((2, 2, len(STAMPS)), np.int64)
    stamps[..., STAMPS.index("gate_issued") :] += 4
    stamps[..., STAMPS.index("looked_ahead") :] += 2
    ahead = parts_of(*kinds, stamps=stamps + np.array([0, 0, 64, 64, 64, 64]))
    missing = SimpleNamespace(**{name: [1.0] for name in ("last_groups", "other_groups")}, copies=lambda first: [1.0])
    missing.gate_to_copy, missing.landing_to_experts = [9.0], [4.0]
    prefetched = SimpleNamespace(inner_attention=[80.0])
    shape = ModelShape(2, 8, 8, 16, 8, shared_width, 1, 32)
    samples = _samples(shape, parts_of(*kinds, stamps=stamps), missing, prefetched, ahead)
    assert (samples["gate_issue"], samples["ahead"], samples["attention_beside"]) == ([4] * 4, [8] * 4, [80])
    costs = values({"m": ShapeTimes(**samples)})
    attention, group = costs["models.m.attention"][0][1], costs["models.m.group_ns"] + 8 * costs["models.m.expert_ns"]
    decided = costs["models.m.shared_ns"] if shared_width else 30
    layer = attention + decided + 7 + group
    assert 2 * layer + costs["models.m.step_ns"] == sum(span for _, _, span in kinds)
    known = costs["host.readout_ns"] + costs["host.expert_issue_ns"]
    assert known == (9 if shared_width else 37)


def test_of_every_quantity_its_own_quietest_round_counts():
    one, other, third = [5.0, 6.0, 7.0], [1.0, 2.0, 90.0], [8.0, 8.0, 8.0]
    assert _quietest([one, other, third]) == other
    rounds = [{1: one, 8: other}, {1: third, 8: one}, {1: other, 8: third}]
    assert _quietest(rounds) == {1: other, 8: other}


@pytest.mark.parametrize(("free", "layers"), [(1 << 40, 16), (4 << 30, 10), (1 << 20, 2)])
def test_the_measured_decoder_has_the_models_layers_as_far_as_memory_goes(monkeypatch, free, layers):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, free))
    assert _as_fits(MODELS["olmoe_1b_7b"], "cuda") == MODELS["olmoe_1b_7b"]._replace(layers=layers, experts=16)


@pytest.mark.usefixtures("little_garbage")
def test_the_runs_give_samples_of_everything_on_a_cpu_too():
    steps = 2
    shape = ModelShape(2, 8, 2, 16, 8, 8, 1, 32)
    found = measure_executor({"tiny": shape}, lambda what: None, where="cpu", steps=steps)["tiny"]
    events = steps * shape.layers  # of the quietest round
    assert sorted(found.attention) == list(CONTEXTS)
    assert sorted(found.groups) == [1, 2]
    assert [len(found.groups[count]) for count in (1, 2)] == [events, events]
    assert (len(found.shared), len(found.gate_to_residents), len(found.step)) == (events, events, steps)
    assert len(found.copy_first) == len(found.copy_behind) == len(found.gate_to_copy) == events
    assert min(min(found.shared), min(found.attention[CONTEXTS[0]])) > 0


def test_an_entry_may_be_assumed():
    assert "assumed" in profile_text(
        "box",
        "base",
        {"link.chunk_bytes": Entry(4, "bytes", "so", tag="assumed")},
        {"processors": 1, "processor": "x"} | {"date": "y"},
    )

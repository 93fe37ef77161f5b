"""Costs: exact integers on a machine and a model with round figures, and one measured run."""

import dataclasses

import numpy as np
import pytest
from test_hardware import load_profile, tiny_profile
from test_model_specs import load_model

from sim.costs import NO_READOUT, along, decode_layer_ns, make_costs, transfer_ns, with_free_link
from sim.hardware import make_hardware, with_bandwidth
from traces.errors import InputError
from traces.trace import ModelSpec

TINY = make_hardware(tiny_profile())
MODEL = ModelSpec(
    name="small",
    layers=2,
    experts=4,
    top_k=2,
    hidden_size=2,
    expert_width=5,
    expert_bytes={"bf16": 900, "int4": 250},
    other_bytes=2000,
    kv_bytes_per_token=60,
)


def costs(tokens=(1,), context=(1,), model=MODEL, precision="bf16", hardware=TINY):
    return make_costs(hardware, model, np.array(tokens), np.array(context), precision)


def test_another_link_keeps_the_time_of_the_smallest_copy():
    # 10 ns up to 100 bytes, as before, and then a nanosecond for every two
    other = with_bandwidth(make_hardware(tiny_profile() | {"name": "other"}), 2 * 10**9)
    assert [along(other.h2d, size) for size in (50, 100, 101, 102, 900)] == [10, 10, 11, 11, 410]
    assert other.h2d_train is None
    found = costs(hardware=other)
    assert (found.chunks, found.chunk_ns, found.last_chunk_ns, found.link_start_ns) == (3, 160, 10, 0)


def test_host_and_step_times_are_the_profile_s():
    found = costs(tokens=(1, 1), context=(1, 2))
    assert (found.host_gate_ns, found.host_experts_ns, found.host_step_ns, found.readout_ns) == (
        13,
        17,
        19,
        11,
    )
    assert found.step_ns.tolist() == [3, 3]


def test_attention_reads_weights_and_context_once_per_step():
    # 5 launch + (2000 + 60 context) / 2 layers at a byte a nanosecond; four tokens compute for longer
    assert costs((1, 1, 4), (1, 11, 1)).attention_ns.tolist() == [5 + 1030, 5 + 1330, 5 + 4000]


def test_attention_rounds_up_once():
    model = dataclasses.replace(MODEL, layers=3)
    assert costs(model=model).attention_ns.tolist() == [5 + 687]


def test_expert_is_launch_and_the_longer_of_reading_and_computing():
    # 900 bytes to read; 6 x 2 x 5 = 60 operations a token overtake them beyond 15 tokens
    assert costs((17,)).expert_ns.tolist() == [0] + 15 * [907] + [7 + 960, 7 + 1020]


def test_an_expert_at_lower_precision_is_read_faster():
    assert costs(precision="int4").expert_ns.tolist() == [0, 257]


@pytest.mark.parametrize(
    ("size", "time"),
    [(1, 10), (100, 10), (101, 11), (150, 15), (200, 20), (700, 70), (1200, 120), (2200, 220)],
)
def test_link_time_follows_the_curve_and_goes_on_beyond_it(size, time):
    assert along(TINY.h2d, size) == time


def test_an_expert_crosses_in_chunks_and_the_last_is_the_rest():
    found = costs()
    assert (found.chunks, found.chunk_ns, found.last_chunk_ns) == (3, 40, 10)
    assert (found.expert_bytes, found.chunk_bytes) == (900, 400)
    assert transfer_ns(found) == 90


def test_a_small_expert_is_one_chunk():
    found = costs(precision="int4")
    assert (found.chunks, found.chunk_ns, found.last_chunk_ns, found.chunk_bytes) == (1, 25, 25, 250)


def test_copies_behind_another_one_cost_what_they_cost_in_a_train():
    # a chunk of 400 bytes takes 40 alone and 32 in a train, the rest of 100 bytes 8
    train = dataclasses.replace(TINY, h2d_train=((100, 8), (200, 16)))
    found = costs(hardware=train)
    assert (found.chunk_ns, found.last_chunk_ns, found.link_start_ns, transfer_ns(found)) == (32, 8, 8, 72)
    assert costs().link_start_ns == 0


def test_a_link_whose_trains_are_slower_has_no_start_to_pay():
    slow = dataclasses.replace(TINY, h2d_train=((100, 11), (200, 22)))
    assert (costs(hardware=slow).chunk_ns, costs(hardware=slow).link_start_ns) == (44, 0)


def test_the_host_waits_for_a_step_s_end_where_the_profile_says_so():
    assert costs().step_readout_ns == NO_READOUT
    assert costs(hardware=dataclasses.replace(TINY, step_readout_ns=0)).step_readout_ns == 0


def test_free_link_takes_no_time():
    free = with_free_link(costs(hardware=dataclasses.replace(TINY, h2d_train=((100, 8), (200, 16)))))
    assert (transfer_ns(free), free.link_start_ns, free.chunks, free.expert_bytes) == (0, 0, 3, 900)


def test_decode_layer_hides_the_host_behind_compute_or_the_other_way_round():
    found = costs((1, 3), (1, 9))
    assert decode_layer_ns(found, top_k=2) == 11 + 17 + 2 * 907 + 1035
    slow_host = found._replace(host_gate_ns=9999)
    assert decode_layer_ns(slow_host, top_k=2) == 11 + 17 + 9999


def test_times_are_64_bit_where_products_are_not():
    model = dataclasses.replace(MODEL, other_bytes=10**12)
    assert costs(model=model).attention_ns.tolist() == [5 + 5 * 10**11 + 30]


@pytest.mark.parametrize("field", ["hidden_size", "expert_width", "other_bytes", "kv_bytes_per_token"])
def test_a_size_that_is_not_known_is_asked_for(field):
    with pytest.raises(InputError) as error:
        costs(model=dataclasses.replace(MODEL, **{field: None}))
    assert str(error.value) == (
        f"model 'small' does not say its {field}, which timing needs: choose one that does with model=NAME"
    )


def test_expert_bytes_that_are_not_known_are_asked_for():
    with pytest.raises(InputError, match="model 'small' does not say its expert_bytes, which timing needs"):
        costs(model=dataclasses.replace(MODEL, expert_bytes={}))


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(InputError) as error:
        costs(precision="int3")
    assert str(error.value) == (
        "model 'small' has no expert_bytes at precision 'int3': did you mean 'int4'? known: bf16, int4;"
        " choose one with precision=NAME"
    )


def test_resident_olmoe_under_transformers_is_as_fast_as_measured():
    # 29.3 and 30.1 tokens/s with two inputs: all experts resident in the slots of the arm that offloads
    model = load_model("olmoe_1b_7b")
    found = costs((1,), (96,), model, hardware=make_hardware(load_profile("h100_pcie5_transformers")))
    step_ns = model.layers * decode_layer_ns(found, model.top_k) + int(found.step_ns[0]) + found.host_step_ns
    assert 29.3 < 1e9 / step_ns < 30.1


def test_top_k_experts_take_as_long_as_measured():
    # microseconds of one layer's experts in a CUDA graph, H100; the fit's worst residual is 8%
    measured = {
        "qwen1_5_moe_a2_7b": 74,
        "deepseek_v2_lite": 109,
        "olmoe_1b_7b": 132,
        "qwen3_30b_a3b": 130,
        "gpt_oss_20b": 129,
        "mixtral_8x7b": 266,
    }
    hardware = make_hardware(load_profile("h100_pcie5"))
    for name, microseconds in measured.items():
        model = load_model(name)
        found = model.top_k * costs(model=model, hardware=hardware).expert_ns[1] / 1000
        assert found == pytest.approx(microseconds, rel=0.08)

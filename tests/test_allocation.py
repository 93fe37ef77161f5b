"""How each allocation divides the slots among the layers, worked out by hand and bounded for all sizes."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.allocation.shallow_favouring import ShallowFavouring
from policies.allocation.transient import Transient
from policies.allocation.uniform import Uniform
from policies.allocation.whole_device import WholeDevice
from policies.eviction.lru import LRU
from policies.miss.wait import Wait
from policies.predictor.none import NoPrediction
from policies.prefetch.none import NoPrefetch
from policies.prefetch.top_n import TopN
from policies.system import Composition, build_system
from traces import InputError


def divided(allocation, slots, layers, experts, top_k):
    pool_of, capacity = allocation.divide(slots, layers, experts, top_k)
    return pool_of.tolist(), capacity.tolist()


def test_the_whole_device_is_one_pool():
    assert divided(WholeDevice.build(), 17, 3, 8, 2) == ([0, 0, 0], [17])


def test_transient_keeps_room_for_one_token():
    assert divided(Transient.build(), 17, 3, 8, 2) == ([0, 0, 0], [2])


def test_uniform_gives_what_does_not_divide_evenly_to_the_first_layers():
    assert divided(Uniform.build(), 17, 3, 8, 2) == ([0, 1, 2], [6, 6, 5])


# ---- shallow-favouring -----------------------------------------------------------------------------------


def test_the_first_layers_are_whole_and_the_rest_is_divided():
    assert divided(ShallowFavouring.build(2), 24, 5, 8, 2) == ([0, 1, 2, 3, 4], [8, 8, 3, 3, 2])


def test_every_layer_first_gets_room_for_one_token():
    assert divided(ShallowFavouring.build(4), 20, 6, 8, 2)[1] == [8, 4, 2, 2, 2, 2]


def test_where_even_that_does_not_fit_all_layers_get_less():
    # build_system refuses it; the division itself must not exceed the slots.
    assert divided(ShallowFavouring.build(4), 5, 4, 8, 2)[1] == [2, 1, 1, 1]


def test_a_deeper_layer_gets_no_more_than_its_experts():
    assert divided(ShallowFavouring.build(1), 32, 4, 8, 2)[1] == [8, 8, 8, 8]


def test_with_no_whole_layer_it_is_uniform():
    assert divided(ShallowFavouring.build(0), 17, 3, 8, 2) == divided(Uniform.build(), 17, 3, 8, 2)


def test_a_model_of_few_layers_is_filled_from_the_front():
    assert divided(ShallowFavouring.build(4), 20, 3, 8, 2)[1] == [8, 8, 4]


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"^full_layers is -1: it must be at least 0$"):
        ShallowFavouring.build(-1)


FATE = [
    # layers, experts, slots, slots of a deeper layer: what the released code gives Qwen1.5-MoE and DeepSeekMoE at
    # budgets of 5 to 12 GB (SYSTEMS.md, section 1.1, by executing its formula)
    *((24, 60, slots, deep) for slots, deep in [(356, 5), (555, 15), (753, 25), (952, 35), (1151, 45), (1349, 55)]),
    *((27, 64, slots, deep) for slots, deep in [(329, 3), (528, 11), (726, 20), (925, 29), (1123, 37)]),
    *((27, 64, slots, deep) for slots, deep in [(1322, 46), (1520, 54), (1719, 63)]),
]


@pytest.mark.parametrize(("layers", "experts", "slots", "deep"), FATE)
def test_where_no_layer_needs_anything_deeper_layers_get_what_fates_code_gives_and_the_remainder(
    layers, experts, slots, deep
):
    _, capacity = ShallowFavouring.build(4).divide(slots, layers, experts, 0)
    spare = (slots - 4 * experts) % (layers - 4)
    assert capacity.tolist() == [experts] * 4 + [deep + 1] * spare + [deep] * (layers - 4 - spare)


@pytest.mark.parametrize(
    ("layers", "experts", "slots", "shallow"), [(24, 60, 158, [60, 60, 38, 0]), (27, 64, 130, [64, 64, 2, 0])]
)
def test_where_no_layer_needs_anything_a_small_budget_goes_to_the_first_layers_as_in_fates_code(
    layers, experts, slots, shallow
):
    _, capacity = ShallowFavouring.build(4).divide(slots, layers, experts, 0)
    assert capacity.tolist() == shallow + [0] * (layers - 4)


def test_ours_gives_every_layer_a_tokens_experts_where_fates_code_gives_none():
    _, capacity = ShallowFavouring.build(4).divide(158, 24, 60, 4)
    assert capacity.tolist() == [60, 10] + [4] * 22


@given(st.data())
def test_no_allocation_gives_more_than_there_is_or_a_layer_more_than_its_experts(data):
    layers, experts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, experts))
    slots = data.draw(st.integers(top_k, layers * experts))
    full_layers = data.draw(st.integers(0, 14))
    for allocation in (WholeDevice.build(), Transient.build(), Uniform.build(), ShallowFavouring.build(full_layers)):
        pool_of, capacity = allocation.divide(slots, layers, experts, top_k)
        assert len(pool_of) == layers
        assert sorted(set(pool_of.tolist())) == list(range(len(capacity)))
        assert capacity.sum() <= slots
        assert (capacity >= 0).all()
        assert (capacity <= experts * np.bincount(pool_of)).all()
        if isinstance(allocation, (Uniform, ShallowFavouring)):
            assert capacity.min() >= min(top_k, slots // layers)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 9), st.data())
def test_shallow_favouring_leaves_a_slot_over_only_where_all_fits(layers, experts, full_layers, data):
    slots = data.draw(st.integers(1, layers * experts))
    _, capacity = ShallowFavouring.build(full_layers).divide(slots, layers, experts, 1)
    assert capacity.sum() == slots


# ---- a system built on it --------------------------------------------------------------------------------


def a_system(allocation, parameters=None, slots=16, prefetch=(NoPrefetch, {}), **sizes):
    parts = {
        "predictor": (NoPrediction, {}),
        "prefetch": prefetch,
        "eviction": (LRU, {}),
        "allocation": (allocation, parameters or {}),
        "miss": (Wait, {}),
    }
    return build_system(Composition("mine", parts), slots=slots, **{"layers": 4, "experts": 8, "top_k": 3, **sizes})


def test_a_system_knows_its_pools():
    setting = a_system(Uniform, slots=17).setting
    assert (setting.pool_of.tolist(), setting.capacity.tolist()) == ([0, 1, 2, 3], [5, 4, 4, 4])
    assert (setting.keys, setting.pools) == (32, 4)


@pytest.mark.parametrize(
    ("allocation", "parameters", "slots", "sentence"),
    [
        (
            WholeDevice,
            {},
            2,
            "budget gives 2 expert slots, but one event needs 3 (the model's top-k); raise the budget to at least "
            "0.0938 of all experts",
        ),
        (
            Uniform,
            {},
            11,
            "system 'mine': allocation Uniform leaves a layer with 2 of 11 slots, but one event needs 3 (the model's "
            "top-k); raise the budget to at least 0.3750 of all experts or choose allocation=global",
        ),
        (
            ShallowFavouring,
            {"full_layers": -2},
            16,
            "system 'mine': allocation.full_layers is -2: it must be at least 0",
        ),
    ],
)
def test_a_division_that_cannot_serve_one_token_is_refused(allocation, parameters, slots, sentence):
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        a_system(allocation, parameters, slots)


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(16, 64, 8), (24, 60, 4), (7, 9, 2), (26, 64, 6)])
def test_the_least_budget_that_is_named_suffices(layers, experts, top_k):
    sizes = {"layers": layers, "experts": experts, "top_k": top_k}
    for allocation, slots in ((WholeDevice, 1), (Uniform, top_k)):
        with pytest.raises(InputError) as refused:
            a_system(allocation, slots=slots, **sizes)
        least = float(re.search(r"at least ([\d.]+) of all", str(refused.value)).group(1))
        a_system(allocation, slots=int(least * layers * experts + 1e-9), **sizes)


class OffByOne(Uniform):
    """Counts its pools from 1."""

    def divide(self, slots, layers, experts, top_k):
        pool_of, capacity = super().divide(slots, layers, experts, top_k)
        return pool_of + 1, capacity


def test_a_pool_that_is_none_is_refused():
    with pytest.raises(InputError, match="must name one of its 4 pools, counted from 0, for each of 4 layers"):
        a_system(OffByOne)


def test_a_negative_depth_is_refused():
    with pytest.raises(InputError, match=r"^system 'mine': prefetch.depth is -1: it must be at least 0$"):
        a_system(WholeDevice, prefetch=(TopN, {"depth": -1}))

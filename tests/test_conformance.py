"""Every policy and every system that is discovered keeps the contract, and the model keeps its sanity list."""

from dataclasses import replace

import numpy as np
import pytest

from policies.allocation.whole_device import WholeDevice
from policies.eviction.fifo import FIFO
from policies.order import oldest
from policies.predictor.previous_token import PreviousToken
from policies.system import Composition, find_part
from sim.config import compose_config, options
from sim.conformance import check
from sim.experiment import composition_of
from traces import InputError

CARRIERS = {
    "predictor": {"prefetch": "top_n"},
    "prefetch": {"predictor": "cross_layer_gate"},
    "eviction": {"predictor": "cross_layer_gate", "prefetch": "top_n"},
    "allocation": {"predictor": "previous_token", "prefetch": "top_n"},
    "miss": {},
}
"""What stands on the other axes when one policy is tried: something that exercises it."""


def one_policy(axis, name):
    chosen = {"predictor": "none", "prefetch": "none", "eviction": "lru", "allocation": "global", "miss": "wait"}
    overrides = [f"{group}={option}" for group, option in {**chosen, **CARRIERS[axis], axis: name}.items()]
    config = compose_config("simulate", overrides)
    return Composition(f"{axis}={name}", {part: find_part(part, config[part]) for part in chosen})


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis in CARRIERS for name in options(axis)])
def test_policy_conforms(axis, name):
    check(one_policy(axis, name))


@pytest.mark.parametrize("name", options("system"))
def test_system_conforms(name):
    check(composition_of(compose_config("simulate", [f"system={name}"])))


class Unruly(FIFO):
    """Evicts what it must not."""

    def victim(self, pool, holds, limit, now):
        return oldest(self.order, pool)


class Greedy(WholeDevice):
    """Hands out slots that it does not have."""

    def divide(self, slots, layers, experts, top_k):
        return np.zeros(layers, np.int64), np.array([2 * slots])


class ByNumber(FIFO):
    """Evicts the expert with the lowest number."""

    def victim(self, pool, holds, limit, now):
        lowest, key = -1, self.order.newer[self.order.keys + pool]
        while key < self.order.keys:
            if holds[key] < limit and (lowest < 0 or key < lowest):
                lowest = key
            key = self.order.newer[key]
        return lowest


class Curious(PreviousToken):
    """Looks at gate weights without saying so."""

    NEEDS = frozenset()


@pytest.mark.parametrize(
    ("axis", "cls", "says"),
    [
        ("predictor", Curious, "IndexError.*what is used of weights, .* must be declared with @needs"),
        ("eviction", Unruly, "a victim must be a resident|is evicted while|while its event needs it"),
        ("eviction", ByNumber, "the numbers of the experts change what happens"),
        ("allocation", Greedy, "hands out 32 slots, but the budget holds 16"),
    ],
)
def test_a_policy_that_breaks_the_contract_is_caught(axis, cls, says):
    composition = one_policy("predictor", "none") if axis == "predictor" else one_policy("eviction", "fifo")
    broken = replace(composition, parts={**composition.parts, axis: (cls, {})})
    with pytest.raises((AssertionError, InputError), match=says):
        check(broken)

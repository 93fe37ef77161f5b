"""Every policy and every system that is discovered keeps the contract, and the model keeps its sanity list."""

import pytest

from policies.system import Composition, find_part
from sim.config import compose_config, options
from sim.conformance import check
from sim.experiment import composition_of

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

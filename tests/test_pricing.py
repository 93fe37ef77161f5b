"""Pricing an engine's own log gives back the engine's integers: the open loop is the memory model without decisions."""

import numpy as np
import pytest
from test_plain_model import Case

from real.validation.pricing import price
from sim.reference import run_reference


@pytest.mark.parametrize("part", range(2))
def test_a_log_priced_at_its_own_costs_is_the_run(part):
    compared = 0
    for seed in range(part * 200, part * 200 + 200):
        case = Case(seed)
        if case.workload is None:
            continue
        log = []
        run = run_reference(case.system, case.workload, case.costs, log)
        priced = price(log, case.workload, case.costs, case.system)
        assert np.array(priced.steps).tolist() == np.array(run.steps).tolist(), seed
        assert priced.link_busy_ns.sum() == run.link_busy_ns, seed
        compared += 1
    assert compared > 50

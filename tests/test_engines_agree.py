"""The fast engine gives the integers and events of the reference engine, whatever the policy, workload and costs."""

import importlib
import inspect
import os
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from builders import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

import sim.fast.run
from policies.contract import steady
from policies.eviction.fifo import FIFO
from policies.eviction.lfu import LFU
from policies.eviction.lru import LRU
from policies.order import NOWHERE, Queues, append, enter, leave, make_queues, oldest, oldest_free
from policies.predictor.popularity import Popularity
from policies.residency import ContractError
from policies.system import Composition, find_part
from sim.config import compose_config, options
from sim.conformance import build, costs_for, difference, small_trace
from sim.costs import Costs
from sim.engines import run_engine
from sim.experiment import composition_of, costs_of, system_of, workload_of
from sim.fast import PolicyRaised, native, run_fast
from sim.fast.native import make_known
from sim.fast.observed import show_floats
from sim.reference import run_reference
from sim.workload import make_workload
from traces import import_trace, take_tokens

GPT_OSS = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_decode.npz"
SYSTEMS = options("system")
AXES = {axis: options(axis) for axis in ("predictor", "prefetch", "eviction", "allocation", "miss")}


@cache
def part(axis, name):
    return find_part(axis, compose_config("simulate", [f"{axis}={name}"])[axis])


def composition(drop=False, reupload=False, **parts):
    chosen = {"predictor": "none", "prefetch": "none", "eviction": "lru", "allocation": "global", "miss": "wait", **parts}
    return Composition("tried", {axis: part(axis, name) for axis, name in chosen.items()}, drop, reupload)


def assert_agree(make_system, workload, costs, interpret=False):
    """Run both engines with and without a log."""
    logs = [], []
    reference = run_reference(make_system(), workload, costs, logs[0])
    fast = run_fast(make_system(), workload, costs, logs[1], interpret=interpret)
    found = difference(reference, logs[0], fast, logs[1])
    assert not found, f"\n{found}"
    silent = run_fast(make_system(), workload, costs, interpret=interpret)
    assert not difference(reference, [], silent, []), "the log changes what happens"


# ---- real routing ------------------------------------------------------------------------------------------------


@cache
def on_the_bundled_recording(name):
    return compose_config("simulate", [f"system={name}", "trace.tokens=150"])


@pytest.mark.parametrize("budget", [0.13, 0.25, 0.6])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_on_the_bundled_recording(name, budget):
    config = {**on_the_bundled_recording(name), "budget": budget}
    workload = workload_of(config)
    costs = costs_of(config, workload)[0]
    third = costs.last_chunk_ns // 3
    costs = costs._replace(chunks=3, chunk_ns=third, last_chunk_ns=third, demand_ns=())
    assert_agree(lambda: system_of(config, workload, costs), workload, costs)


@pytest.mark.parametrize("eviction", AXES["eviction"])
def test_every_eviction_policy_on_gpt_oss(eviction):
    if not GPT_OSS.exists():
        pytest.skip(f"no published routing at {GPT_OSS}")
    workload = make_workload(take_tokens(import_trace(GPT_OSS, "plain_arrays"), 60))
    costs = costs_for(workload)
    tried = composition(eviction=eviction, predictor="previous_token", prefetch="top_n")
    assert_agree(lambda: build(tried, workload, 200), workload, costs)


@pytest.mark.parametrize("order", ["recorded", "continuous"])
def test_steps_of_many_requests_on_the_bundled_recording(order):
    overrides = [f"workload.order={order}", "workload.batch=5", "trace.tokens=400", "system=fate", "budget=0.2"]
    config = compose_config("simulate", overrides)
    workload = workload_of(config)
    costs = costs_of(config, workload)[0]
    assert_agree(lambda: system_of(config, workload, costs), workload, costs)


# ---- any routing -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A small trace, what runs on it, and what everything costs."""

    composition: Composition
    workload: object
    costs: Costs
    slots: int
    interpret: bool

    def system(self):
        return build(self.composition, self.workload, self.slots)


@st.composite
def cases(draw, **fixed):
    """Draw a case; all numbers shrink towards few tokens, layers, experts and chunks, and towards the simplest policies."""
    # Mostly few experts; 40 fill more than one block of residents, 200 need wider ids.
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7) | st.sampled_from([40, 200]))
    top_k = draw(st.integers(1, min(experts, 3)))
    routed = st.lists(st.integers(0, experts - 1), min_size=0, max_size=top_k, unique=True)
    token = st.lists(routed, min_size=layers, max_size=layers)
    tokens = draw(st.lists(token, min_size=1, max_size=24))
    ids = np.array([[chosen + [-1] * (top_k - len(chosen)) for chosen in layers_of] for layers_of in tokens])
    request, prompt = (
        np.sort(draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))),
        draw(st.integers(0, 4)),
    )
    request = np.unique(request, return_inverse=True)[1]
    shift = draw(st.integers(0, experts - 1))
    lookahead = np.full((len(ids), layers, 2, min(experts, 2 * top_k)), -1)
    for layer in range(layers - 1):  # the next two layers' routing, a little off
        for ahead in range(min(2, layers - 1 - layer)):
            lookahead[:, layer, ahead, :] = (np.arange(lookahead.shape[3]) + shift + layer) % experts
    prompts = [prompt] * (int(request.max()) + 1)
    steps = np.cumsum([place < 1 or place >= prompt for place in _positions(request)]) - 1
    trace = make_trace(ids, requests=request, steps=steps, prompts=prompts, lookahead=lookahead, expert_count=experts)
    order, batch = draw(st.sampled_from(["one_request", "recorded", "continuous"])), draw(st.integers(1, 3))
    workload = make_workload(trace, order, batch)
    parts = {axis: fixed.get(axis) or draw(st.sampled_from(names)) for axis, names in AXES.items() if axis != "miss"}
    whole = parts["allocation"] in ("global", "transient")
    least = top_k * (1 if whole else layers)
    slots = draw(st.integers(least, max(layers * experts, least)))
    chunk_ns = draw(st.integers(0, 400))
    count = len(workload.decode)
    costs = Costs(
        host_gate_ns=draw(st.integers(0, 30)),
        host_experts_ns=draw(st.integers(0, 90)),
        host_step_ns=draw(st.integers(0, 90)),
        readout_ns=draw(st.integers(0, 40)),
        step_ns=np.full(count, draw(st.integers(0, 50))),
        attention_ns=np.full(count, draw(st.integers(0, 300))),
        expert_ns=np.concatenate([[0], np.full(len(ids), draw(st.integers(0, 250)))]),
        chunks=draw(st.integers(1, 3)),
        chunk_ns=chunk_ns,
        last_chunk_ns=draw(st.integers(0, chunk_ns)),
        expert_bytes=250,
        chunk_bytes=100,
        link_start_ns=draw(st.integers(0, 300)),
        step_readout_ns=draw(st.integers(-1, 90)),
        group_ns=draw(st.integers(0, 90)),
        demand_ns=draw(st.sampled_from([(), (0, 110, 230, 300)])),
        committed_chunks=draw(st.integers(0, 2)),
        shared_ns=draw(st.integers(0, 150)),
        host_demand_ns=draw(st.integers(0, 90)),
        host_ahead_ns=draw(st.integers(0, 90)),
        beside_ns=draw(st.sampled_from([0, 0, 7, 40])),
    )
    tried = composition(drop=draw(st.booleans()), reupload=draw(st.booleans()), **parts)
    rule, parameters = tried.parts["prefetch"]
    if "depth" in inspect.signature(rule.build).parameters:  # deeper than there are layers too
        deep = (rule, {**parameters, "depth": draw(st.integers(1, 6))})
        tried = replace(tried, parts={**tried.parts, "prefetch": deep})
    return Case(tried, workload, costs, slots, draw(st.booleans()))


def _positions(request):
    return [int(np.sum(request[:row] == request[row])) for row in range(len(request))]


@pytest.mark.parametrize("eviction", AXES["eviction"])
@given(data=st.data())
@settings(max_examples=25)
def test_every_eviction_policy_on_any_routing(eviction, data):
    case = data.draw(cases(eviction=eviction))
    assert_agree(case.system, case.workload, case.costs, case.interpret)


@pytest.mark.parametrize("predictor", AXES["predictor"])
@given(data=st.data())
@settings(max_examples=25)
def test_every_predictor_on_any_routing(predictor, data):
    case = data.draw(cases(predictor=predictor))
    assert_agree(case.system, case.workload, case.costs, case.interpret)


@given(data=st.data())
@settings(max_examples=150)
def test_any_system_on_any_routing(data):
    case = data.draw(cases())
    assert_agree(case.system, case.workload, case.costs, case.interpret)


# ---- how a disagreement is shown ---------------------------------------------------------------------------------


def test_a_disagreement_shrinks_to_the_smallest_trace_and_is_printed_as_two_logs(monkeypatch):
    """An engine that lets one expert too many land late is found, and shown on a trace of one token."""

    right = run_fast

    def broken(system, workload, costs, log=None, *, interpret=False):
        return right(system, workload, costs._replace(last_chunk_ns=costs.last_chunk_ns + 1), log)

    sizes = []

    @given(case=cases(eviction="lru", predictor="none"))
    @settings(max_examples=60, database=None)
    def search(case):
        sizes.append(case.workload.tokens)
        monkeypatch.setattr("test_engines_agree.run_fast", broken)
        try:
            assert_agree(case.system, case.workload, case.costs)
        finally:
            monkeypatch.undo()

    with pytest.raises(AssertionError, match=r"(?s)reference: ns, what, key, event +fast.*-> ") as shown:
        search()
    assert sizes[-1] == 1, "the last case that hypothesis runs is the smallest that fails"
    assert "landed" in str(shown.value)


# ---- parts of a run, and its log ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lru", "clairvoyant", "fate_released", "transition"])
def test_a_run_in_many_parts_with_a_small_log_is_the_same(name, monkeypatch):
    monkeypatch.setattr(sim.fast.run, "PART", 40)
    monkeypatch.setattr(sim.fast.run, "LOG_ROOM", 1)
    tried = composition_of(compose_config("simulate", [f"system={name}"]))
    workload = make_workload(small_trace(), "continuous", 2)
    assert_agree(lambda: build(tried, workload, 30), workload, costs_for(workload))


def test_half_floats_are_widened_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 1, 256)
    wide = np.zeros((300, 1, 256), np.float32)
    rows = np.arange(256)[::-1].copy()
    show_floats(SimpleNamespace(weights=halves), rows, {"weights": wide})
    expected = halves[rows].astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(wide[:256], expected, equal_nan=True)
    assert np.array_equal(np.signbit(wide[:256][number]), np.signbit(expected[number]))


# ---- compiled or not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "name"), [(axis, name) for axis in ("predictor", "prefetch", "eviction") for name in AXES[axis]]
)
def test_every_policy_of_the_project_is_compiled(axis, name):
    others = {"predictor": "previous_token", "prefetch": "top_n", "eviction": "lru"}
    workload = make_workload(take_tokens(small_trace(), 30))
    system = build(composition(**{**others, axis: name}), workload, 30)
    run = sim.fast.run._FastRun(system, workload, costs_for(workload), None, False)
    run.result()
    # A tuple without fields is what numba cannot pass; of the two, a prefetch rule that takes nothing is not called at all.
    assert run.hooks.interpreted == (["predictor"] if (axis, name) == ("predictor", "none") else [])


class PlainPython:
    """Least recently used in a dictionary: a class of a user's own, which only Python understands."""

    def __init__(self):
        self.order = {}

    @classmethod
    def build(cls, setting):
        return cls()

    def on_insert(self, key, pool, now):
        self.order.setdefault(pool, {})[key] = None

    def on_hit(self, key, pool, now):
        self.order[pool][key] = self.order[pool].pop(key)

    def on_evict(self, key, pool, now):
        del self.order[pool][key]

    def victim(self, pool, holds, limit, now):
        return next((key for key in self.order[pool] if holds[key] < limit), -1)


def with_eviction(cls):
    tried = composition(predictor="cross_layer_gate", prefetch="top_n")
    return Composition("tried", {**tried.parts, "eviction": (cls, {})})


def test_a_users_python_policy_runs_in_both_engines_and_is_what_it_says():
    workload = make_workload(small_trace())
    costs = costs_for(workload)
    assert_agree(lambda: build(with_eviction(PlainPython), workload, 20), workload, costs)
    lru = run_fast(build(with_eviction(LRU), workload, 20), workload, costs)
    assert not difference(lru, [], run_fast(build(with_eviction(PlainPython), workload, 20), workload, costs), [])


class NumPyByHand(FIFO):
    """A named tuple that numba cannot compile: it is called back without anybody noticing."""

    def victim(self, pool, holds, limit, now):
        return {"oldest": super().victim(pool, holds, limit, now)}["oldest"]


def test_a_named_tuple_that_cannot_be_compiled_is_called_back():
    workload = make_workload(small_trace())
    assert_agree(lambda: build(with_eviction(NumPyByHand), workload, 20), workload, costs_for(workload))


class Failing(FIFO):
    """Breaks at event 7."""

    def on_hit(self, key, pool, now):
        if now >= 7:
            raise RuntimeError("event 7")


class FailingInPython(PlainPython):
    on_hit = Failing.on_hit


class OutOfBounds(FIFO):
    """Looks behind the end of an array, which in compiled code would be somebody else's memory."""

    def on_hit(self, key, pool, now):
        self.order.newer[len(self.order.newer) + 1_000_000] = 7


class CountedFIFO(NamedTuple):
    """FIFO that knows who stands in its queues."""

    order: Queues

    @classmethod
    def build(cls, setting):
        return cls(make_queues(setting.keys, setting.pools))

    def on_insert(self, key, pool, now):
        enter(self.order, pool, key)

    def on_hit(self, key, pool, now):
        pass

    def on_evict(self, key, pool, now):
        leave(self.order, key)

    def victim(self, pool, holds, limit, now):
        return oldest_free(self.order, pool, holds, limit)


class TwiceRemoved(CountedFIFO):
    """Lets a function of the project look behind the end of an array; S3-FIFO's own version of it is not checked."""

    def on_hit(self, key, pool, now):
        leave(self.order, key)
        leave(self.order, key)


def test_what_a_python_policy_raises_comes_out_of_the_fast_engine():
    workload = make_workload(small_trace())
    with pytest.raises(RuntimeError, match="event 7"):
        run_fast(build(with_eviction(FailingInPython), workload, 20), workload, costs_for(workload))


@pytest.mark.parametrize(("cls", "error"), [(Failing, RuntimeError), (OutOfBounds, IndexError), (TwiceRemoved, IndexError)])
def test_what_a_compiled_policy_raises_is_found_by_the_reference_engine(cls, error):
    workload = make_workload(small_trace())
    costs = costs_for(workload)
    run_fast(build(with_eviction(FIFO), workload, 20), workload, costs)
    with pytest.raises(PolicyRaised):
        run_engine("fast", lambda: build(with_eviction(cls), workload, 20), workload, costs)
    with pytest.raises(error):
        run_engine("auto", lambda: build(with_eviction(cls), workload, 20), workload, costs)


class Unruly(FIFO):
    """Evicts whom it must not."""

    def victim(self, pool, holds, limit, now):
        return oldest(self.order, pool)


class Nowhere(FIFO):
    """Evicts an expert that does not exist."""

    def victim(self, pool, holds, limit, now):
        return 10**9


class Stranger(CountedFIFO):
    """Evicts an expert that holds no slot and stands in no queue."""

    def victim(self, pool, holds, limit, now):
        for key in range(len(holds)):
            if self.order.queue[key] == NOWHERE:
                return key
        return -1


class Unwilling(FIFO):
    """Evicts nobody."""

    def victim(self, pool, holds, limit, now):
        return -1


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Unruly, "a victim must be a resident"),
        (Stranger, "a victim must be a resident"),
        (Nowhere, "chose expert key 1000000000"),
        (Unwilling, "names no victim"),
    ],
)
def test_a_victim_that_may_not_leave_is_refused_by_both_engines(engine, cls, says):
    workload = make_workload(small_trace())
    with pytest.raises(ContractError, match=says):
        run_engine(engine, lambda: build(with_eviction(cls), workload, 16), workload, costs_for(workload))


class OneQueue(FIFO):
    """Knows no pools."""

    def on_insert(self, key, pool, now):
        append(self.order, 0, key)

    def victim(self, pool, holds, limit, now):
        return oldest_free(self.order, 0, holds, limit)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_victim_of_another_pool_is_refused_by_both_engines(engine):
    tried = composition(allocation="uniform")
    tried = Composition("tried", {**tried.parts, "eviction": (OneQueue, {})})
    workload = make_workload(small_trace())
    with pytest.raises(ContractError, match="a victim must be a resident"):
        run_engine(engine, lambda: build(tried, workload, 20), workload, costs_for(workload))


class Moody(LFU):
    """Inherits from a steady policy, but time changes its scores."""

    def score(self, key, now):
        return (self.last_use[key] * 7 + now * 3) % 11 + 0 * self.uses[key]


def test_steadiness_is_not_inherited_by_another_score():
    workload = make_workload(small_trace())
    assert_agree(lambda: build(with_eviction(Moody), workload, 20), workload, costs_for(workload))


ODD = np.array([0.0, -0.0, np.nan, -np.inf, 1.5, -2.0, np.inf, 5e-324])


class Odd(LFU):
    """Scores by numbers that compare strangely: infinities, no numbers, two zeros, and many equals."""

    def score(self, key, now):
        return ODD[(key + 3 * self.uses[key]) % 8]


@steady()
class OddAndSteady(Odd):
    def score(self, key, now):
        return ODD[(key + 3 * self.uses[key]) % 8]


class Halves(LFU):
    """Scores by whole numbers and by floats between them."""

    def score(self, key, now):
        return self.uses[key] + (self.last_use[key] % 2) / 2


@pytest.mark.parametrize("cls", [Odd, OddAndSteady, Halves])
@pytest.mark.parametrize("slots", [20, 70])
def test_scores_that_compare_strangely(cls, slots):
    workload = make_workload(small_trace())
    assert_agree(lambda: build(with_eviction(cls), workload, slots), workload, costs_for(workload))


class FieldNames(NamedTuple):
    """Has fields that are called like methods of other policies."""

    score: np.ndarray
    victims: np.ndarray
    observe: np.ndarray

    @classmethod
    def build(cls, setting):
        return cls(np.zeros(setting.keys, np.int64), np.zeros(setting.keys, np.int64), np.zeros(1, np.int64))

    def on_insert(self, key, pool, now):
        self.observe[0] += 1
        self.score[key] = self.observe[0]

    def on_hit(self, key, pool, now):
        self.victims[key] += 1

    def on_evict(self, key, pool, now):
        self.score[key] = 0

    def victim(self, pool, holds, limit, now):
        found = -1
        for key in range(len(self.score)):
            if self.score[key] > 0 and holds[key] < limit and (found < 0 or self.score[key] < self.score[found]):
                found = key
        return found


def test_a_field_may_be_called_like_a_method_of_another_policy():
    workload = make_workload(small_trace())
    run = sim.fast.run._FastRun(build(with_eviction(FieldNames), workload, 20), workload, costs_for(workload), None, False)
    run.result()
    assert run.hooks.interpreted == []
    assert_agree(lambda: build(with_eviction(FieldNames), workload, 20), workload, costs_for(workload))


def test_steady_must_name_a_field():
    with pytest.raises(ValueError, match="FIFO has no field 'rescaledd'"):
        steady(changed="rescaledd")(FIFO)


@pytest.mark.parametrize("signs", [("1", "2"), ("np.int64(1)", "np.int64(2)"), ("np.array([1])", "np.array([2])")])
def test_a_constant_of_another_module_decides_the_compiled_code(signs, tmp_path, monkeypatch):
    """The digest that names the cache changes with whatever the code is made of."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tried_policy.py").write_text(
        "from tried_constants import SIGN\nfrom policies.eviction.fifo import FIFO\n\n\n"
        "class Tried(FIFO):\n    def victim(self, pool, holds, limit, now):\n"
        "        return SIGN * super_victim(self, pool, holds, limit)\n\n\n"
        "from policies.order import oldest_free\n\n\n"
        "def super_victim(self, pool, holds, limit):\n    return oldest_free(self.order, pool, holds, limit)\n"
    )
    digests = []
    for sign in signs:
        (tmp_path / "tried_constants.py").write_text(f"import numpy as np\n\nSIGN = {sign}\n")
        for name in ("tried_policy", "tried_constants"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            digests.append(make_known(importlib.import_module("tried_policy").Tried))
        finally:
            sys.dont_write_bytecode = before
    assert digests[0] != digests[1]


def test_compiled_code_that_nobody_uses_any_more_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    for name, age in (("old", 31), ("young", 29)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.nbc").write_bytes(b"x")
        used = time.time() - age * 24 * 3600
        os.utime(tmp_path / name, (used, used))
    native._forget_unused.__wrapped__()
    assert [folder.name for folder in tmp_path.iterdir()] == ["young"]


class Wild(Popularity):
    """Predicts an expert that does not exist."""

    def predict(self, seen, ahead, ids, scores):
        ids[0] = 99
        return 1


class Upset(Wild):
    """Breaks while it learns, and predicts an expert that does not exist afterwards."""

    def observe(self, seen):
        if seen.event == 7:
            raise RuntimeError("event 7")

    def predict(self, seen, ahead, ids, scores):
        ids[0] = 99 if seen.event >= 7 else 0
        return 1


def test_what_went_wrong_first_is_what_is_told():
    tried = composition(prefetch="top_n")
    tried = Composition("tried", {**tried.parts, "predictor": (Upset, {})})
    workload = make_workload(small_trace())
    with pytest.raises(RuntimeError, match="event 7"):
        run_engine("auto", lambda: build(tried, workload, 20), workload, costs_for(workload))


class Wordy(Popularity):
    """Says that it predicted more than it was asked for."""

    def predict(self, seen, ahead, ids, scores):
        return len(ids) + 1


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("cls", [Wild, Wordy])
def test_a_prediction_that_is_none_is_refused_by_both_engines(engine, cls):
    tried = composition(prefetch="top_n")
    tried = Composition("tried", {**tried.parts, "predictor": (cls, {})})
    workload = make_workload(small_trace())
    with pytest.raises(ContractError, match=r"or its prefetch rule gave \d+: ids are those of 12 experts"):
        run_engine(engine, lambda: build(tried, workload, 20), workload, costs_for(workload))

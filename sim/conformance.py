"""What every policy must do: checks that run on any composition, the project's own and yours.

``check(composition)`` runs a system on small generated traces and raises AssertionError with a sentence where it breaks a
rule of the contract. The test suite calls it for every policy and system that it discovers; call it for your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from policies.contract import Ints
from policies.system import Composition, System, build_system
from sim.costs import Costs
from sim.events import future_of
from sim.fast import run_fast
from sim.reference import run_reference
from sim.result import Run, StepTimes
from sim.workload import Workload, make_workload
from traces import Trace, synthesize

Log = list[tuple[Any, ...]]
"""Events of a run: (ns, what, key, running event)."""


def check(composition: Composition) -> None:
    """Check determinism, equality of the engines, capacity, holding, counting, foresight and numbering."""
    trace = small_trace()
    for order, batch, slots in (("one_request", 1, 16), ("one_request", 1, 30), ("continuous", 3, 24)):
        workload = make_workload(trace, order, batch)
        try:
            run, log = run_logged(composition, workload, slots)
        except ValueError as error:
            if "leaves a layer with" in str(error):  # the allocation needs more slots; a user is told so
                continue
            raise
        again, again_log = run_logged(composition, workload, slots)
        assert not difference(run, log, again, again_log), "two runs with the same seed differ"
        fast, fast_log = run_logged(composition, workload, slots, engine=run_fast)
        found = difference(run, log, fast, fast_log)
        assert not found, f"the engines differ:\n{found}"
        check_slots(log, build(composition, workload, slots), workload)
        check_counts(run, log, workload)
        if "future" not in composition.needs:
            check_no_foresight(composition, workload, slots, log)
        if not any(hasattr(cls, "NUMBERS_MATTER") for cls, _ in composition.parts.values()):
            check_numbering(composition, workload, slots, log)


def difference(reference: Run, reference_log: Log, fast: Run, fast_log: Log) -> str:
    """Return in what two runs differ: a table of their logs around the first difference, or counters; "" for nothing."""
    logs = list(zip_longest(reference_log, fast_log))
    first = next((index for index, (one, two) in enumerate(logs) if one != two), None)
    if first is not None:
        shown = range(max(first - 8, 0), min(first + 8, len(logs)))
        rows = [f"{'':3}{'reference: ns, what, key, event':44} fast"]
        for index in shown:
            one, two = (", ".join(map(str, entry)) if entry else "(nothing)" for entry in logs[index])
            rows.append(f"{'' if logs[index][0] == logs[index][1] else '->':3}{one:44} {two}")
        return "\n".join(rows)
    counters = [*(f"steps.{name}" for name in StepTimes._fields), *Run._fields[1:-1]]
    pairs = zip(counters, [*reference.steps, *reference[1:-1]], [*fast.steps, *fast[1:-1]], strict=True)
    return "\n".join(
        f"{name}: {one} in the reference engine, {two} in the fast" for name, one, two in pairs if not _same(one, two)
    )


def _same(one: Any, two: Any) -> bool:
    return bool(np.all(one == two))


def check_slots(log: Log, system: System, workload: Workload) -> None:
    """At every instant no pool holds more than its slots, and nothing leaves that the running event still needs."""
    setting = system.setting
    resident: list[set[int]] = [set() for _ in setting.capacity]
    in_flight: set[int] = set()
    offsets, keys = workload.events.offsets, workload.events.keys
    served: set[int] = set()
    event = -1
    for ns, what, key, now in log:
        if now != event:
            event, served = now, set()
        pool = resident[setting.pool_of[key // setting.experts]] if key >= 0 else set()
        if what in ("load", "prefetch"):
            assert key not in pool, f"at {ns} ns expert {key} takes a second slot"
            pool.add(key)
            in_flight.add(key)
            capacity = setting.capacity[setting.pool_of[key // setting.experts]]
            assert len(pool) <= capacity, f"at {ns} ns a pool of {capacity} slots holds {len(pool)} experts"
        elif what == "refresh":
            in_flight.add(key)
        elif what == "landed":
            in_flight.discard(key)
            served.add(key)
        elif what == "hit":
            served.add(key)
        elif what == "cancel":
            in_flight.discard(key)
        elif what == "evict":
            assert key in pool, f"at {ns} ns expert {key} leaves without having a slot"
            assert key not in in_flight, f"at {ns} ns expert {key} is evicted while it is in flight"
            union = keys[offsets[now] : offsets[now + 1]]
            if len(union) <= capacity_of(system, int(union[0])):
                assert key not in union or _ended(log, now, ns), f"at {ns} ns expert {key} leaves while its event needs it"
            pool.remove(key)


def check_counts(run: Run, log: Log, workload: Workload) -> None:
    """Every access is counted once, times add up, and bytes are those of the transfers."""
    steps = run.steps
    accesses = int((steps.hits + steps.late_hits + steps.misses).sum())
    assert accesses == len(workload.events.keys), f"{accesses} accesses counted, {len(workload.events.keys)} made"
    assert int(steps.duration.sum()) == run.end_ns, "compute, wait and host time do not add up to the whole"
    assert all((part >= 0).all() for part in steps), "a counter is negative"
    assert run.link_busy_ns <= run.end_ns, "the link was busy for longer than the run took"
    loads = sum(what == "load" for _, what, _, _ in log)
    started = run.prefetches
    size, chunk = COSTS.expert_bytes, COSTS.chunk_bytes
    assert run.bytes_by_kind["demand"] == loads * size, "demand bytes are not those of the demand loads"
    moved = sum(run.bytes_by_kind[kind] for kind in ("useful", "late", "wasted"))
    assert moved <= started * size, "prefetched bytes exceed the prefetches started"
    assert moved >= started * chunk, "a prefetch that was started moved less than a chunk"
    assert run.predicted_and_needed <= min(run.predicted, run.needed_after_prediction)


def check_no_foresight(composition: Composition, workload: Workload, slots: int, log: Log) -> None:
    """With another future, everything up to that moment is decided the same."""
    half = len(workload.decode) // 2
    rows = workload.rows[workload.offsets[half] :]
    other = workload.trace
    shuffled = {}
    for name in ("experts", "weights", "router_logits", "lookahead_experts", "lookahead_scores"):
        array = getattr(other, name)
        if array is not None:
            shuffled[name] = array.copy()
            shuffled[name][rows] = array[rows[::-1]]
    changed = replace(workload, trace=replace(other, **shuffled))
    _, other_log = run_logged(composition, changed, slots)
    before = half * workload.events.layers
    assert [entry for entry in log if entry[3] < before] == [entry for entry in other_log if entry[3] < before], (
        "decisions depend on what the router chooses later"
    )


def check_numbering(composition: Composition, workload: Workload, slots: int, log: Log) -> None:
    """With the experts of every layer renumbered, the same happens to the renumbered experts."""
    trace = workload.trace
    layers, experts = trace.model.layers, trace.model.experts
    rng = np.random.default_rng(5)
    number = np.stack([rng.permutation(experts) for _ in range(layers)])
    renamed = replace(workload, trace=renumbered(trace, number))
    _, other_log = run_logged(composition, renamed, slots)
    key_of = (number + np.arange(layers)[:, None] * experts).ravel()
    mapped = [(ns, what, int(key_of[key]) if key >= 0 else key, now) for ns, what, key, now in log]
    assert mapped == other_log, "the numbers of the experts change what happens: break ties by what was seen"


# ---- what the checks run on --------------------------------------------------------------------------------------

COSTS = Costs(
    host_gate_ns=10,
    host_experts_ns=20,
    host_step_ns=5,
    readout_ns=30,
    step_ns=np.zeros(0, np.int64),
    attention_ns=np.zeros(0, np.int64),
    expert_ns=np.array([0, 40, 45, 50, 55, 60, 65, 70, 75, 80], np.int64),
    chunks=3,
    chunk_ns=50,
    last_chunk_ns=30,
    expert_bytes=250,
    chunk_bytes=100,
)
"""Made-up costs at which transfers outlast compute a little and prefetches are often interrupted."""


def small_trace(seed: int = 3) -> Trace:
    """Return a generated trace of 5 layers, 12 experts, top-3, with all optional observations."""
    return synthesize(
        seed=seed,
        layers=5,
        experts=12,
        top_k=3,
        requests=6,
        prefill_tokens=6,
        decode_tokens=14,
        lookahead_depth=2,
        lookahead_width=8,
        router_logits=True,
    )


def costs_for(workload: Workload, costs: Costs = COSTS) -> Costs:
    """Return `costs` with the per-step times of `workload`: attention takes 100 ns and a little per token."""
    tokens = np.diff(workload.offsets)
    return costs._replace(attention_ns=100 + 10 * tokens, step_ns=np.full(len(tokens), 25))


def build(composition: Composition, workload: Workload, slots: int) -> System:
    """Build `composition` for `workload`."""
    model = workload.trace.model
    return build_system(
        composition,
        slots=slots,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        seed=11,
        layer_ns=400,
        transfer_ns=130,
        future=lambda: future_of(workload.events),
    )


def run_logged(
    composition: Composition, workload: Workload, slots: int, engine: Callable[..., Run] = run_reference
) -> tuple[Run, Log]:
    """Build and run, and return the run with its log."""
    log: Log = []
    system = build(composition, workload, slots)
    try:
        return engine(system, workload, costs_for(workload), log), log
    except Exception as error:
        last = f"after {log[-1]}" if log else "at the start"
        raise AssertionError(
            f"the run broke {last} with {type(error).__name__}: {error}; a victim must be a resident with "
            f"holds[key] < limit or -1, ids and counts must be those of the layer, and what is used of weights, "
            "lookahead, logits and future must be declared with @needs"
        ) from error


def renumbered(trace: Trace, number: Ints) -> Trace:
    """Return `trace` with expert e of layer l called ``number[l, e]``."""
    layers = trace.model.layers
    changed: dict[str, Any] = {"experts": _rename(trace.experts, number[None, :, :])}
    if trace.lookahead_experts is not None:
        ahead = trace.lookahead_experts.shape[2]
        of_layer = np.minimum(np.arange(layers)[:, None] + np.arange(1, ahead + 1), layers - 1)
        ids = trace.lookahead_experts
        names = number[of_layer]  # [L, D, E]
        renamed = np.take_along_axis(names[None], np.maximum(ids, 0).astype(np.int64), axis=-1)
        changed["lookahead_experts"] = np.where(ids >= 0, renamed, -1).astype(ids.dtype)
    if trace.router_logits is not None:
        place = np.argsort(number, axis=-1)
        changed["router_logits"] = np.take_along_axis(trace.router_logits, place[None], axis=-1)
    return replace(trace, **changed)


def capacity_of(system: System, key: int) -> int:
    """Return the slots of the pool that `key` competes in."""
    return int(system.setting.capacity[system.setting.pool_of[key // system.setting.experts]])


def _rename(ids: Any, names: Any) -> Any:
    renamed = np.take_along_axis(
        np.broadcast_to(names, (len(ids), *names.shape[1:])), np.maximum(ids, 0).astype(np.int64), -1
    )
    return np.where(ids >= 0, renamed, -1).astype(ids.dtype)


def _ended(log: Log, now: int, ns: int) -> bool:
    """Whether event `now` had ended at `ns`."""
    return any(what == "end" and event == now and end <= ns for end, what, _, event in log)

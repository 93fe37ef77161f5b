"""The fast engine: one compiled loop, fed with the trace part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from policies.contract import NEVER
from policies.residency import ContractError, no_prediction, no_victim
from policies.system import System
from sim.costs import Costs, demand_times
from sim.fast import kernel
from sim.fast.hooks import PLACES, Hooks, make_told
from sim.fast.kernel import NOTHING, run_part
from sim.fast.log import EVENTS
from sim.fast.native import compiled
from sim.fast.observed import make_floats, make_observed, show_floats
from sim.fast.state import CELL, COMING, EXPERT, LOG, LOGGED_RUN, POOL, RUN, STEP, TRANSFER
from sim.fast.unions import unions
from sim.result import KINDS, Run, StepTimes
from sim.workload import Workload

PART = 1 << 14
"""Routed tokens times layers of one part of a run: of how many the events are found at a time."""

LOG_ROOM = 1 << 16
"""Log entries that are kept in the loop's own form."""


def run_fast(
    system: System,
    workload: Workload,
    costs: Costs,
    log: list[tuple[Any, ...]] | None = None,
    *,
    interpret: bool = False,
) -> Run:
    """Run a freshly built `system` on `workload` and return what happened: the integers of `sim.reference.run_reference`.

    Events are appended to `log`, if one is given, as tuples (ns, what, key, event). Policies that numba cannot compile run
    in Python; with `interpret` all do. Raises what a policy raises (`PolicyRaised` if it is compiled), and ContractError
    for a decision that is none.
    """
    return _FastRun(system, workload, costs, log, interpret).result()


class PolicyRaised(RuntimeError):  # noqa: N818
    """A compiled policy raised an exception; only Python can tell which and where (run it in the reference engine)."""


class _FastRun:
    """One run: the arrays that the loop works on, and the parts of the trace that it is given."""

    def __init__(
        self, system: System, workload: Workload, costs: Costs, log: list[tuple[Any, ...]] | None, interpret: bool
    ) -> None:
        self.system, self.workload, self.costs, self.log = system, workload, costs, log
        self.steps = make_steps(workload, costs)
        self.tables = make_tables(system, costs, logging=log is not None)
        self.told = make_told(system.setting, self.tables["experts_at"])
        self.hooks = Hooks(system, self.told, interpret=interpret)
        self.run = make_run(system, costs, events=len(self.steps) * system.setting.layers, logging=log is not None)
        if log is not None:
            self.run["log_room"] = len(self.tables["log_at"])
        self._point_to(self.tables)
        self._point_to({f"{name}_at": getattr(self.told, name) for name in self.told._fields})
        self._point_to({"expert_ns_at": costs.expert_ns, "demand_ns_at": np.array(demand_times(costs), np.int64)})
        self._events: Any = None
        self.parts = list(self._parts())
        most = max((int(workload.offsets[last] - workload.offsets[first]) for first, last in self.parts), default=0)
        self.floats = make_floats(workload.trace, system.composition.needs, most) if system.prefetch.depth else {}
        self.in_place = rows_follow_in_steps(workload)
        if self.in_place:
            self.steps["first_row"] = workload.rows[workload.offsets[:-1]]
            self.steps["last_row"] = self.steps["first_row"] + np.diff(workload.offsets)
            self._show(slice(None))

    def result(self) -> Run:
        """Run all parts and gather the counters; prefetches that nothing used by the end were wasted."""
        for first, last in self.parts:
            self._run_part(first, last)
        run = {name: int(self.run[name][0]) for name in RUN.names or ()}
        run["wasted_bytes"] += int((self.tables["experts_at"]["unused"] >= 0).sum()) * self.costs.expert_bytes
        times = ("computed", "waited", "host_idle", "hits", "late_hits", "misses")
        return Run(
            steps=StepTimes(*(self.steps[name] for name in times)),
            end_ns=run["time"],
            link_busy_ns=run["busy_ns"] + (run["time"] - run["moving_since"] if run["moving"] != NOTHING else 0),
            bytes_by_kind={kind: run[f"{kind}_bytes"] for kind in KINDS},
            prefetches=run["prefetches"],
            cancelled=run["cancelled"],
            predicted=run["predicted"],
            predicted_and_needed=run["predicted_and_needed"],
            needed_after_prediction=run["needed_after_prediction"],
            peak_slots=run["peak_slots"],
            log=self.log,
        )

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Give first and last step of every part: up to PART."""
        offsets, steps = self.workload.offsets, len(self.steps)
        most = max(PART // self.system.setting.layers, 1)
        first = 0
        while first < steps:
            last = int(np.searchsorted(offsets, offsets[first] + most, side="right")) - 1
            last = min(max(last, first + 1), steps)
            yield first, last
            first = last

    def _run_part(self, first: int, last: int) -> None:
        """Give the loop the steps `first` to `last`, as often as its log fills up."""
        layers, steps, offsets = self.system.setting.layers, self.steps[first:last], self.workload.offsets[first : last + 1]
        rows = self.workload.rows[offsets[0] : offsets[-1]]
        steps["first_float"] = offsets[:-1] - offsets[0]
        show_floats(self.workload.trace, rows, self.floats)
        if not self.in_place:
            steps["first_row"], steps["last_row"] = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
            self._show(rows)
        step_rows = steps["first_row"].copy(), steps["last_row"].copy()
        events = compiled(unions)(self.experts, *step_rows, self.system.setting.experts)
        self._before, self._events = self._events, events  # the last event of the part before still holds its experts
        self._point_to({"steps_at": steps, **dict(zip(("offsets_at", "keys_at", "tokens_at"), events, strict=True))})
        self.run["first_event"], self.run["first_step"] = first * layers, first
        loop = compiled(run_part)
        while loop(self.run, last * layers) < last * layers and not self.run["broken"][0]:
            self._keep_log()
        self._keep_log()
        self._check()

    def _show(self, rows: Any) -> None:
        """Let the loop and the predictor see some rows of the trace, from which the rows of steps then count."""
        trace = self.workload.trace
        self.experts = np.ascontiguousarray(trace.experts[rows])
        if self.system.prefetch.depth:
            self.hooks.observe(make_observed(trace, rows, self.system.composition.needs, self.floats))
        for name, address in zip(PLACES, self.hooks.table, strict=True):
            self.run[name] = address

    def _point_to(self, arrays: dict[str, Any]) -> None:
        """Write the addresses of `arrays`, by field, into the record of the run, and keep them alive."""
        for name, array in arrays.items():
            if name not in self.run.dtype.names:
                continue
            assert array.flags.c_contiguous, name
            self.run[name] = array.ctypes.data
        self._alive = {**getattr(self, "_alive", {}), **arrays}

    def _keep_log(self) -> None:
        """Move what the loop logged to the caller's list."""
        if self.log is not None:
            logged = self.tables["log_at"][: int(self.run["logged"][0])]
            self.log += [(ns, EVENTS[what], key, event) for ns, what, key, event in logged.tolist()]
            self.run["logged"] = 0

    def _check(self) -> None:
        """Raise what stopped the loop, if anything did."""
        broken, key = int(self.run["broken"][0]), int(self.run["broken_by"][0])
        if not broken:
            return
        if self.hooks.faults:
            raise self.hooks.faults[0]
        if broken == kernel.BY_EXCEPTION:
            raise PolicyRaised("a compiled policy raised an exception; the reference engine shows which")
        system = self.system
        if broken == kernel.BY_VICTIM:
            raise ContractError(no_victim(type(system.eviction).__name__, key))
        if broken == kernel.BY_PREDICTION:
            raise ContractError(no_prediction(type(system.predictor).__name__, key, system.setting.experts))
        raise ContractError(no_victim(type(system.eviction).__name__, -1))


# ---- what a run begins with --------------------------------------------------------------------------------------


def make_run(system: System, costs: Costs, events: int, logging: bool) -> Any:
    """Return the record of a run of `events` events that has not begun."""
    run = np.zeros(1, LOGGED_RUN if logging else RUN)
    setting, composition = system.setting, system.composition
    values = {
        **{name: getattr(costs, name) for name in RUN.names or () if hasattr(costs, name)},
        "layers": setting.layers,
        "experts": setting.experts,
        "keys": setting.keys,
        "events": events,
        "depth": system.prefetch.depth,
        "drop_unused_prefetches": composition.drop_unused_prefetches,
        "reupload_after_use": composition.reupload_after_use,
        "release_ns": NEVER,
        **dict.fromkeys(("now", "row", "moving", "alarm_ns"), NOTHING),
    }
    for name, value in values.items():
        run[name] = value
    return run


def make_tables(system: System, costs: Costs, logging: bool) -> dict[str, Any]:
    """Return the tables of a run, by the field of `RUN` that points to each."""
    setting, rows = system.setting, system.prefetch.depth + 1
    experts = np.zeros(setting.keys, EXPERT)
    experts["unused"] = experts["needed"] = NOTHING
    experts["pool"] = np.repeat(setting.pool_of, setting.experts)
    transfers = np.zeros(setting.keys + 1, TRANSFER)
    transfers["chunks_left"] = costs.chunks
    transfers["older"] = transfers["newer"] = np.arange(setting.keys + 1)
    pools = np.zeros(setting.pools, POOL)
    pools["capacity"] = setting.capacity
    coming = np.zeros(rows, COMING)
    coming["predicted"] = NOTHING
    cells = np.zeros((rows, setting.experts), CELL)
    coming["cells_at"] = cells.ctypes.data + np.arange(rows) * cells.strides[0]
    return {
        "cells": cells,
        "experts_at": experts,
        "transfers_at": transfers,
        "pools_at": pools,
        "takes_at": np.zeros(setting.experts, np.int64),  # ns that every expert of the layer takes, in the event
        "landed_at": np.zeros(setting.experts, np.int64),  # when every demand landed
        "wanted_at": np.zeros(setting.experts, np.int32),  # keys to be prefetched for the event that is being predicted
        "coming_at": coming,
        "log_at": np.zeros(max(LOG_ROOM, 8 * setting.keys + 4 * setting.experts + 16) if logging else 0, LOG),
    }


def make_steps(workload: Workload, costs: Costs) -> Any:
    """Return what every step costs, and room for what it counts."""
    steps = np.zeros(len(workload.decode), STEP)
    steps["attention_ns"], steps["step_ns"] = costs.attention_ns, costs.step_ns
    return steps


def rows_follow_in_steps(workload: Workload) -> bool:
    """Whether every step's rows follow one another in the trace, so that none needs to be copied."""
    follows = np.diff(workload.rows) == 1
    first_rows = workload.offsets[(workload.offsets > 0) & (workload.offsets < len(workload.rows))]
    follows[first_rows - 1] = True
    return bool(follows.all())

"""Open loop: what the decisions of a log would have cost on the simulated machine.

The log of a run (the executor's or an engine's; the words are the same) says which experts were there and which transfers
were started in which order. Time is computed anew with the memory model of docs/model.md; nothing is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Ints
from policies.system import System
from sim.costs import NO_READOUT, Costs, demand_times
from sim.result import StepTimes
from sim.workload import Workload
from traces.errors import InputError

Log = Sequence[Sequence[Any]]
"""Entries (ns, what, key, event)."""

STARTS = ("load", "prefetch", "refresh")
JUDGED = ("hit", "late_hit", "miss")


class Priced(NamedTuple):
    """What a log's decisions cost."""

    steps: StepTimes
    link_busy_ns: Ints
    """[S] time that the link moved bytes, by the step in which a transfer was started."""


def price(log: Log, workload: Workload, costs: Costs, system: System) -> Priced:
    """Return the cost of the decisions in `log`, which holds every event of `workload`, made with the slots of `system`.

    Raises InputError where the log is not of this workload: where an event judges other experts than it needs.
    """
    return _Pricing(log, workload, costs, system).result()


class _Move:
    """One transfer of the log."""

    def __init__(self, key: int, what: str, chunks: int) -> None:
        self.key, self.what, self.left = key, what, chunks
        self.landed_place: float = float("inf")
        """Where in the log it landed."""
        self.cancelled: float = float("inf")
        """The event in which it was given up."""
        self.after_end = False
        """Whether its event had ended when it was started."""
        self.base = self.ends = 0


class _Link:
    """The link, served in the order of the log."""

    def __init__(self, costs: Costs, steps: int) -> None:
        self.costs = costs
        self.demand_ns = demand_times(costs)
        self.free = -1
        """When it ends what it was given; -1 before the first."""
        self.busy = np.zeros(steps, np.int64)
        self.last: _Move | None = None
        self.paused: list[_Move] = []
        self.landed: dict[int, int] = {}

    def start(self, move: _Move, at: int, step: int, *, demand: bool = False) -> int:
        """Let a transfer go on at `at`, or when the link is free; return when it lands."""
        begins = max(at, self.free)
        move.base = begins + (0 if begins == self.free else self.costs.link_start_ns)
        by_chunks = (move.left - 1) * self.costs.chunk_ns + self.costs.last_chunk_ns
        move.ends = move.base + (self.demand_ns[move.left] if demand else by_chunks)
        self.busy[step] += move.ends - begins
        self.free, self.last = move.ends, move
        self.landed[move.key] = move.ends
        return move.ends

    def give_way(self, at: int, before: float, event: int, step: int) -> None:
        """Pause the last transfer at the end of its chunk if the log says that it landed after a demand (at `before`)."""
        move, chunk_ns = self.last, self.costs.chunk_ns
        if move is None or move.ends <= at or chunk_ns == 0 or move.landed_place < before:
            return
        chunks = max(1, -(-(at - move.base) // chunk_ns)) + self.costs.committed_chunks
        if chunks >= move.left:
            return
        boundary = move.base + chunks * chunk_ns
        self.busy[step] -= move.ends - boundary
        move.left -= chunks
        self.free, self.last = boundary, None
        if move.cancelled > event:
            self.paused.insert(0, move)


class _Pricing:
    def __init__(self, log: Log, workload: Workload, costs: Costs, system: System) -> None:
        self.events, self.costs, self.setting = workload.events, costs, system.setting
        self.depth = system.prefetch.depth
        self.computed = self.waited = self.last_landed = 0
        self.takes = costs.expert_ns[self.events.tokens].tolist()
        self.link = _Link(costs, len(workload.decode))
        self.judged: list[dict[str, list[int]]] = [{what: [] for what in JUDGED} for _ in range(self.events.total)]
        self.started: list[list[_Move]] = [[] for _ in range(self.events.total)]
        self._read(log)
        self.rows: list[list[int]] = []

    def _read(self, log: Log) -> None:
        """Sort the log by event; find what became of every transfer."""
        open_moves: dict[int, _Move] = {}
        queued: set[tuple[int, int]] = set()  # (event, key) of renewals that their event waits for before they start
        ended = -1
        for place, (_, what, key, event) in enumerate(log):
            if what == "end":
                ended = event
            elif what in JUDGED:
                self.judged[event][what].append(key)
                if what == "late_hit" and key not in open_moves:
                    queued.add((event, key))
            elif what in STARTS:
                demanded = (event, key) in queued
                queued.discard((event, key))
                open_moves[key] = move = _Move(key, "load" if demanded else what, self.costs.chunks)
                move.after_end = what == "refresh" and ended == event
                self.started[event].append(move)
            elif what == "landed" and key in open_moves:
                open_moves.pop(key).landed_place = place
            elif key in open_moves and (what == "cancel" or (what == "evict" and open_moves[key].what == "refresh")):
                open_moves.pop(key).cancelled = event

    def result(self) -> Priced:
        costs, layers = self.costs, self.events.layers
        host = compute = 0
        for step, (attention_ns, step_ns) in enumerate(
            zip(costs.attention_ns.tolist(), costs.step_ns.tolist(), strict=True)
        ):
            before, self.computed, self.waited = compute, step_ns, 0
            counts = [0, 0, 0]
            for event in range(step * layers, (step + 1) * layers):
                starts = max(compute, host)
                takes_ns = attention_ns + (costs.beside_ns if self.link.free > max(starts, self.last_landed) else 0)
                gate_end = max(starts + takes_ns, host + costs.host_gate_ns)
                known = gate_end + costs.readout_ns
                host = known + costs.host_experts_ns
                self.computed += takes_ns + costs.shared_ns
                counts = [n + len(keys) for n, keys in zip(counts, self.judged[event].values(), strict=True)]
                compute = self._serve(step, event, known + costs.host_demand_ns, max(host, gate_end + costs.shared_ns))
                host += costs.host_ahead_ns * min(self.depth, self.events.total - 1 - event)
            host += costs.host_step_ns
            compute = max(compute + step_ns, host)
            if costs.step_readout_ns != NO_READOUT:
                host = compute + costs.step_readout_ns
            self.rows.append([self.computed, self.waited, compute - before - self.computed - self.waited, *counts])
        if self.rows:
            self.link.busy[-1] -= max(
                0, self.link.free - max(compute, self.last_landed)
            )  # what moves after the end does not count
        return Priced(StepTimes(*np.array(self.rows, np.int64).reshape(-1, 6).T), self.link.busy)

    def _serve(self, step: int, event: int, known: int, issued: int) -> int:
        """Load and compute the experts of an event as the log has it; return when the last is computed."""
        link = self.link
        start, stop = int(self.events.offsets[event]), int(self.events.offsets[event + 1])
        takes = dict(zip(self.events.keys[start:stop].tolist(), self.takes[start:stop], strict=True))
        present, late, absent = self.judged[event].values()
        if sorted([*present, *late, *absent]) != sorted(takes):
            raise InputError(f"the log judges other experts than event {event} of this workload needs")
        arrival_ns = self.costs.group_ns + self.costs.beside_ns
        takes = {key: ns if key in present else ns + arrival_ns for key, ns in takes.items()}
        together = self.costs.group_ns if present else 0
        waves = self._waves(event, present, late, absent)
        together += self.costs.beside_ns if present and (late or waves[0]) else 0
        self.computed += sum(takes.values()) + together
        link.paused = [move for move in link.paused if move.cancelled > event]
        at = known
        compute: int = issued + together + sum(takes[key] for key in present)
        starts = iter([*self.started[event], None])
        following = next(starts)
        for number, wave in enumerate(waves):
            if number:
                at = compute
            awaited = [*late, *wave] if number == 0 else wave
            loads = []
            while following is not None and following.what == "load" and following.key in awaited:
                loads.append(following)
                following = next(starts)
            arrived = len(awaited) > 0
            compute = self._bring(step, event, at, compute, awaited, loads, takes)
            landed = self.last_landed
            started = False
            while following is not None and following.what != "load" and not following.after_end:
                started = True
                link.start(following, at, step)
                following = next(starts)
            longer = 0
            if arrived and link.free <= landed:
                longer = -1  # nothing moves beside the last one
            elif not arrived and present and (started or link.free > at):
                longer = 1
            compute += longer * self.costs.beside_ns
            self.computed += longer * self.costs.beside_ns
            while following is not None and following.what != "load":
                link.start(following, max(at, compute), step)
                following = next(starts)
        return compute

    def _waves(self, event: int, present: list[int], late: list[int], absent: list[int]) -> list[list[int]]:
        """Return what each wave lacks."""
        layer = event % self.events.layers
        slots = int(self.setting.capacity[self.setting.pool_of[layer]])
        first = min(len(absent), slots - len(present) - len(late))
        return [absent[:first], *(absent[place : place + slots] for place in range(first, len(absent), slots))]

    def _bring(
        self, step: int, event: int, at: int, compute: int, awaited: list[int], loads: list[_Move], takes: dict[int, int]
    ) -> int:
        """Serve a wave's demands as a train and compute each expert as it lands."""
        link = self.link
        promoted = [move for move in link.paused if move.key in awaited]
        if (loads or promoted) and (link.last is None or link.last.key not in awaited):
            link.give_way(at, min(move.landed_place for move in [*promoted, *loads]), event, step)
        asked = {move.key for move in [*promoted, *loads]}
        arrivals = sorted((max(at, link.landed.get(key, at)), key) for key in awaited if key not in asked)
        link.paused = [move for move in link.paused if move not in promoted]
        arrivals += [(link.start(move, at, step, demand=True), move.key) for move in [*promoted, *loads]]
        self.last_landed = max((landed for landed, _ in arrivals), default=at)
        for landed, key in arrivals:
            self.waited += max(0, landed - compute)
            compute = max(compute, landed) + takes[key]
        for move in link.paused:
            link.start(move, at, step)
        link.paused = []
        return compute


def evictions(log: Log, events: int) -> list[set[int]]:
    """Return the keys that left in every event."""
    return by_event(log, events, ("evict",))


def by_event(log: Log, events: int, whats: Iterable[str]) -> list[set[int]]:
    """Return, for every event, the keys of the entries named `whats`."""
    found: list[set[int]] = [set() for _ in range(events)]
    for _, what, key, event in log:
        if what in whats and 0 <= event < events:
            found[event].add(key)
    return found

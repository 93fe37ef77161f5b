"""The reference engine: the memory model of DESIGN section 5 in SimPy, readable and able to run any policy.

One process is the host thread together with the compute stream, whose times follow from each other by addition; the
link is a server of its own (`sim.link`). Time is integer nanoseconds. `docs/model.md` says what every term means.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy

from policies.contract import Seen
from policies.residency import AWAITED, FREE, HELD, Residency
from policies.system import System
from sim.costs import Costs
from sim.link import Link, Transfer
from sim.result import KINDS, Run, StepTimes
from sim.workload import Workload
from traces.trace import Array


def run_reference(system: System, workload: Workload, costs: Costs, log: list[tuple[Any, ...]] | None = None) -> Run:
    """Run a freshly built `system` on `workload` and return what happened.

    Events are appended to `log`, if one is given, as tuples (ns, what, key, detail).
    """
    engine = _Engine(system, workload, costs, log)
    engine.env.run(until=engine.env.process(engine.run()))
    return engine.result()


class _Engine:
    """One run: host thread, compute stream, link, slots, and the counters of all of them."""

    def __init__(self, system: System, workload: Workload, costs: Costs, log: list[tuple[Any, ...]] | None) -> None:
        self.env = simpy.Environment()
        self.system = system
        self.costs = costs
        self.log = log
        self.residency = Residency(system.eviction, system.setting)
        self.link = Link(self.env, costs, self._start_transfer, self._transfer_landed, self._prefetch_pauses)
        self.transfers: dict[int, Transfer] = {}
        """Transfers queued, moving or paused, by key."""
        self.now = -1
        """The running event."""
        self.needed: set[int] = set()
        """Keys that the running event, or its running wave, still needs."""
        self.arrivals: list[tuple[int, int]] = []
        """(ns, key) of the awaited transfers of the running wave, in the order in which they landed."""
        self.outstanding = 0
        """Awaited transfers of the running wave that have not landed."""
        self.all_landed: simpy.Event | None = None
        """What the host waits for while transfers are outstanding."""
        self.unused: dict[int, Transfer] = {}
        """Prefetched experts that hold a slot and were not used yet, with the transfer that brings or brought them."""
        self.to_release: dict[int, list[int]] = {}
        """Prefetched keys by the event that they were fetched for."""
        self.predictions: dict[int, set[int]] = {}
        """Keys selected for coming events."""

        self.workload = workload
        self.events = workload.events
        self.union_keys = self.events.keys.tolist()
        self.union_tokens = self.events.tokens.tolist()
        self.union_starts = self.events.offsets.tolist()
        self.expert_ns = costs.expert_ns.tolist()
        self.observed = _Observed(workload, system.composition.needs)
        self.ids = np.zeros(self.events.experts, np.int64)
        self.scores = np.zeros(self.events.experts, np.float64)

        self.bytes = dict.fromkeys(KINDS, 0)
        self.hits = self.late_hits = self.misses = 0
        self.prefetches = self.cancelled = 0
        self.predicted = self.predicted_and_needed = self.needed_after_prediction = 0
        self.taken = self.peak_slots = 0
        self.host_idle = self.waited = self.computed = 0
        self.per_step: list[tuple[int, ...]] = []

    # ---- the steps -------------------------------------------------------------------------------------------

    def run(self) -> Generator[simpy.Event, None, None]:
        """Run all steps: the host issues, the compute stream follows."""
        costs, env = self.costs, self.env
        host = compute = 0  # when the host thread and the compute stream are free
        steps = zip(costs.attention_ns.tolist(), costs.step_ns.tolist(), strict=True)
        for step, (attention_ns, step_ns) in enumerate(steps):
            for layer in range(self.events.layers):
                # Attention and gate: they start as soon as issuing begins and end no earlier than it ends.
                issued = host + costs.host_gate_ns
                gate_end = max(max(compute, host) + attention_ns, issued)
                self.computed += attention_ns
                self.host_idle += gate_end - compute - attention_ns
                yield env.timeout(gate_end + costs.readout_ns - env.now)

                host = env.now + costs.host_experts_ns
                compute = yield from self._serve_event(step, layer, gate_end, host)
            host += costs.host_step_ns
            step_end = max(compute + step_ns, host)
            self.computed += step_ns
            self.host_idle += step_end - compute - step_ns
            compute = step_end
            self._close_step()
        yield env.timeout(compute - env.now)

    def _serve_event(
        self, step: int, layer: int, gate_end: int, issued: int
    ) -> Generator[simpy.Event, None, int]:
        """Decide, load and compute the experts of one (step, layer); return when the compute stream is done."""
        self.now = now = step * self.events.layers + layer
        start, end = self.union_starts[now], self.union_starts[now + 1]
        union = self.union_keys[start:end]
        tokens = dict(zip(union, self.union_tokens[start:end], strict=True))
        present, awaited, absent = self._judge(union)

        # An event that needs more experts than its pool has slots runs in waves; what is there goes first.
        pool = self.residency.pool_of_key[union[0]] if union else 0
        slots = self.residency.capacity[pool]
        first = min(len(absent), slots - len(present) - len(awaited))
        waves = [absent[:first], *(absent[i : i + slots] for i in range(first, len(absent), slots))]
        self._begin_wave(present + awaited + waves[0])
        self._load(awaited, waves[0])
        if self.system.prefetch.depth:
            self._predict(step, layer)

        compute = issued
        self.host_idle += issued - gate_end
        for key in present:
            compute += self.expert_ns[tokens[key]]
        compute = yield from self._compute_arrivals(compute, tokens)
        wave = present + awaited + waves[0]
        for next_wave in waves[1:]:
            yield from self._end_wave(compute, wave)
            self._begin_wave(next_wave)
            self._load([], next_wave)
            compute = yield from self._compute_arrivals(compute, tokens)
            wave = next_wave
        yield from self._end_wave(compute, wave)
        self.computed += sum(self.expert_ns[count] for count in tokens.values())
        self._event_ends(union)
        return compute

    def _judge(self, union: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Split what the event needs into resident, in flight and absent, as it is when the event starts."""
        residency, now = self.residency, self.now
        present, awaited, absent = [], [], []
        for key in union:
            pool = residency.pool_of_key[key]
            if key in residency.residents[pool]:
                in_flight = key in self.transfers
                (awaited if in_flight else present).append(key)
                if key in self.unused:
                    del self.unused[key]
                    self.bytes["late" if in_flight else "useful"] += self.costs.expert_bytes
                self._note("late_hit" if in_flight else "hit", key)
                self.system.eviction.on_hit(key, pool, now)
            else:
                absent.append(key)
                self._note("miss", key)
        for key in absent:
            residency.on_miss(key, residency.pool_of_key[key], now)
        self.hits += len(present)
        self.late_hits += len(awaited)
        self.misses += len(absent)
        predicted = self.predictions.pop(now, None)
        if predicted is not None:
            self.predicted += len(predicted)
            self.predicted_and_needed += sum(key in predicted for key in union)
            self.needed_after_prediction += len(union)
        return present, awaited, absent

    # ---- waves -----------------------------------------------------------------------------------------------

    def _begin_wave(self, keys: list[int]) -> None:
        """Hold what the wave needs."""
        self.needed = set(keys)
        self.residency.holds[keys] = HELD

    def _load(self, awaited: list[int], absent: list[int]) -> None:
        """Ask the link for what the wave lacks: what is partly here first, then the rest in routed order."""
        self.arrivals = []
        self.outstanding = len(awaited) + len(absent)
        for key in awaited:
            if not self.transfers[key].demand:
                self.link.promote(self.transfers[key])
        for key in absent:
            queued = self.transfers.get(key)
            if queued is not None:
                self.link.promote(queued)
            elif key in self.residency:  # a prefetch for the next step brought it while earlier waves ran
                self.arrivals.append((self.env.now, key))
                self.outstanding -= 1
            else:
                self.transfers[key] = transfer = Transfer(key, self.now, self.costs.chunks, demand=True)
                self.link.submit_demand(transfer)
        for transfer in self.link.drop_prefetches(lambda queued: queued.target <= self.now and not queued.refresh):
            self._give_up(transfer)

    def _compute_arrivals(self, compute: int, tokens: dict[int, int]) -> Generator[simpy.Event, None, int]:
        """Wait for the wave's transfers and compute each expert as it lands; return when the stream is done."""
        if self.outstanding:
            self.all_landed = self.env.event()
            yield self.all_landed
            self.all_landed = None
        for landed, key in self.arrivals:
            if landed > compute:
                self.waited += landed - compute
                compute = landed
            compute += self.expert_ns[tokens[key]]
        return compute

    def _end_wave(self, compute: int, keys: list[int]) -> Generator[simpy.Event, None, None]:
        """Let go of the wave's experts once they are computed."""
        if compute > self.env.now:
            yield self.env.timeout(compute - self.env.now)
        self.residency.holds[keys] = FREE
        self.needed = set()

    def _event_ends(self, union: list[int]) -> None:
        """Decide what stays: nothing leaves on its own but prefetches that proved wrong, where the system says so."""
        for key in self.to_release.pop(self.now, ()):
            prefetch = self.unused.get(key)
            if prefetch is not None and prefetch.target == self.now and key not in self.transfers:
                self.residency.holds[key] = FREE
                if self.system.composition.drop_unused_prefetches:
                    self._evict(key)
        if self.system.composition.reupload_after_use:
            for key in union:
                if key in self.residency and key not in self.transfers:
                    self.transfers[key] = transfer = Transfer(key, self.now, self.costs.chunks, refresh=True)
                    self.link.submit_prefetch(transfer)
        self._note("end", -1)

    # ---- prediction ------------------------------------------------------------------------------------------

    def _predict(self, step: int, layer: int) -> None:
        """Let the predictor learn from this event, and queue what the prefetch rule takes of its predictions."""
        system, layers, experts = self.system, self.events.layers, self.events.experts
        seen = self.observed.event(step, layer, self.now)
        system.observe(seen)
        for ahead in range(1, system.prefetch.depth + 1):
            target = self.now + ahead
            if target >= self.events.count:
                return
            count = system.predictor.predict(seen, ahead, self.ids, self.scores)
            if count == 0:
                continue
            count = system.prefetch.take(self.scores, count, len(seen.experts))
            first_key = (layer + ahead) % layers * experts
            keys = [first_key + expert for expert in self.ids[:count].tolist()]
            self.predictions.setdefault(target, set()).update(keys)
            for key in keys:
                if key not in self.residency and key not in self.transfers:
                    self.transfers[key] = transfer = Transfer(key, target, self.costs.chunks)
                    self.link.submit_prefetch(transfer)

    # ---- slots and transfers: what the link asks and tells ---------------------------------------------------

    def _start_transfer(self, transfer: Transfer) -> bool:
        """Reserve the slot of a transfer that is about to start; a prefetch that finds none is given up."""
        key, residency = transfer.key, self.residency
        if transfer.refresh:
            residency.holds[key] = HELD
            self._note("refresh", key)
            return True
        pool = residency.pool_of_key[key]
        if residency.is_full(pool) and not self._make_room(pool, transfer.demand):
            self.cancelled += 1
            del self.transfers[key]
            self._note("cancel", key)
            return False
        residency.insert(key, self.now)
        self.taken += 1
        self.peak_slots = max(self.peak_slots, self.taken)
        if transfer.demand:
            self.bytes["demand"] += self.costs.expert_bytes
            self._note("load", key)
        else:
            self.prefetches += 1
            self.unused[key] = transfer
            self.to_release.setdefault(transfer.target, []).append(key)
            self._note("prefetch", key)
        return True

    def _make_room(self, pool: int, demand: bool) -> bool:
        """Free a slot of `pool`: of an expert that nothing needs; for a demand also of one that was prefetched for a
        coming event, or of a paused prefetch."""
        leaving = self.residency.victim(pool, self.now, AWAITED)
        if leaving < 0 and demand:
            leaving = self.residency.victim(pool, self.now, HELD)
        if leaving >= 0:
            self._evict(leaving)
            return True
        if demand:
            for paused in self.link.prefetch:
                if paused.started and self.residency.pool_of_key[paused.key] == pool:
                    self.link.prefetch.remove(paused)
                    self._give_up(paused)
                    return True
            raise AssertionError("a demand load found every slot of its pool held")
        return False

    def _evict(self, key: int) -> None:
        """Take a slot away; a prefetch that was never used turns out wasted, a queued renewal is not needed."""
        self.residency.evict(key, self.now)
        self.taken -= 1
        if self.unused.pop(key, None) is not None:
            self.bytes["wasted"] += self.costs.expert_bytes
        renewal = self.transfers.pop(key, None)
        if renewal is not None:
            self.link.drop_prefetches(lambda queued: queued is renewal)
        self._note("evict", key)

    def _give_up(self, transfer: Transfer) -> None:
        """Drop a transfer that nobody waits for; a paused one gives its slot back and has moved bytes for nothing."""
        del self.transfers[transfer.key]
        self.cancelled += 1
        self._note("cancel", transfer.key)
        if transfer.started:
            self.unused.pop(transfer.key, None)
            self.bytes["refresh" if transfer.refresh else "wasted"] += transfer.chunks_moved * self.costs.chunk_bytes
            self._evict(transfer.key)

    def _prefetch_pauses(self, transfer: Transfer) -> bool:
        """Keep a prefetch that gives way if its event is still to come."""
        if transfer.refresh or transfer.target > self.now:
            return True
        self._give_up(transfer)
        return False

    def _transfer_landed(self, transfer: Transfer) -> None:
        """Make an expert usable, and wake the host when it was the last one it waited for."""
        key = transfer.key
        del self.transfers[key]
        self._note("landed", key)
        if transfer.refresh:
            self.bytes["refresh"] += self.costs.expert_bytes
        if key in self.needed:
            self.arrivals.append((self.env.now, key))
            self.outstanding -= 1
            if self.outstanding == 0 and self.all_landed is not None:
                self.all_landed.succeed()
        elif transfer.refresh or transfer.target <= self.now:
            self.residency.holds[key] = FREE
            if not transfer.refresh and self.system.composition.drop_unused_prefetches:
                self._evict(key)
        else:
            self.residency.holds[key] = AWAITED

    # ---- counters --------------------------------------------------------------------------------------------

    def _close_step(self) -> None:
        counters = (self.computed, self.waited, self.host_idle, self.hits, self.late_hits, self.misses)
        self.per_step.append(counters)
        self.computed = self.waited = self.host_idle = self.hits = self.late_hits = self.misses = 0

    def _note(self, what: str, key: int) -> None:
        if self.log is not None:
            self.log.append((self.env.now, what, key, self.now))

    def result(self) -> Run:
        """Gather the counters; prefetches that nothing used by the end were wasted."""
        self.bytes["wasted"] += len(self.unused) * self.costs.expert_bytes
        columns = np.array(self.per_step, np.int64).reshape(-1, 6).T
        return Run(
            steps=StepTimes(*columns),
            end_ns=self.env.now,
            link_busy_ns=self.link.busy_ns + (self.env.now - self.link.moving_since if self.link.moving else 0),
            bytes_by_kind=self.bytes,
            prefetches=self.prefetches,
            cancelled=self.cancelled,
            predicted=self.predicted,
            predicted_and_needed=self.predicted_and_needed,
            needed_after_prediction=self.needed_after_prediction,
            peak_slots=self.peak_slots,
            log=self.log,
        )


class _Observed:
    """The trace as the policies see it, one event at a time."""

    def __init__(self, workload: Workload, needs: frozenset[str]) -> None:
        trace, rows = workload.trace, workload.rows
        self.starts = workload.offsets.tolist()
        self.experts = trace.experts[rows]
        self.weights = trace.weights[rows]
        self.request = workload.request
        nothing = np.zeros((len(rows), trace.model.layers, 0))
        lookahead = "lookahead" in needs
        self.lookahead_experts = _rows_or(trace.lookahead_experts if lookahead else None, rows, nothing[..., None].astype(np.int8))
        self.lookahead_scores = _rows_or(trace.lookahead_scores if lookahead else None, rows, nothing[..., None])
        self.router_logits = _rows_or(trace.router_logits if "logits" in needs else None, rows, nothing)

    def event(self, step: int, layer: int, now: int) -> Seen:
        """Return what a real system sees at this event."""
        rows = slice(self.starts[step], self.starts[step + 1])
        return Seen(
            now,
            layer,
            self.experts[rows, layer],
            self.weights[rows, layer],
            self.request[rows],
            self.lookahead_experts[rows, layer],
            self.lookahead_scores[rows, layer],
            self.router_logits[rows, layer],
        )


def _rows_or(array: Array | None, rows: Array, nothing: Array) -> Array:
    return nothing if array is None else array[rows]

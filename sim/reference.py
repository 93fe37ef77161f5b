"""The reference engine: the memory model of DESIGN section 5 in SimPy, readable and able to run any policy.

One process is the host thread together with the compute stream, whose times follow from each other by addition; the
link is a server of its own (`sim.link`). Time is integer nanoseconds. `docs/model.md` says what every term means.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import numpy as np
import simpy

from policies.residency import AWAITED, FREE, HELD, ContractError, Residency, no_prediction, no_victim
from policies.system import System
from sim.costs import NO_READOUT, Costs
from sim.link import Link, Transfer
from sim.observations import Observations
from sim.result import KINDS, Run, StepTimes
from sim.workload import Workload


class Span(NamedTuple):
    """What a resource was busy with, or why it stood still, from `start` to `end` ns."""

    resource: str
    """``host``, ``compute`` or ``link``; ``queue`` for a transfer that was asked for at `start`."""
    what: str
    """compute: ``attention``, ``shared``, ``expert``, ``step``, or what it waited for, ``wait`` (a transfer) or ``host``."""
    start: int
    end: int
    key: int
    """Of an expert, or -1."""
    event: int


def run_reference(
    system: System,
    workload: Workload,
    costs: Costs,
    log: list[tuple[Any, ...]] | None = None,
    spans: list[Span] | None = None,
) -> Run:
    """Run a freshly built `system` on `workload` and return what happened.

    Events are appended to `log`, if one is given, as tuples (ns, what, key, detail); what every resource did to `spans`.
    """
    engine = _Engine(system, workload, costs, log, spans)
    engine.env.run(until=engine.env.process(engine.run()))
    return engine.result()


class _Engine:
    """One run: host thread, compute stream, link, slots, and the counters of all of them."""

    def __init__(
        self,
        system: System,
        workload: Workload,
        costs: Costs,
        log: list[tuple[Any, ...]] | None,
        spans: list[Span] | None,
    ) -> None:
        self.env: Any = simpy.Environment()  # SimPy types its clock int | float; here it counts whole nanoseconds
        self.system = system
        self.costs = costs
        self.log = log
        self.spans = spans
        self.residency = Residency(system.eviction, system.setting)
        moved = None if spans is None else self._link_moved
        self.link = Link(self.env, costs, self._start_transfer, self._transfer_landed, self._prefetch_pauses, moved)
        self.transfers: dict[int, Transfer] = {}
        """Transfers queued, moving or paused, by key."""
        self.now = -1
        """The running event."""
        self.wave: list[int] = []
        """Keys that the running event, or its last wave, holds until `release_ns`."""
        self.release_ns: int | None = None
        """When the running event ends; None before that is known, and once it has ended."""
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

        self.depth = system.prefetch.depth
        self.workload = workload
        self.events = workload.events
        self.union_keys = self.events.keys.tolist()
        self.union_takes = costs.expert_ns[self.events.tokens].tolist()
        """Compute time of every routed expert, ns."""
        self.union_starts = self.events.offsets.tolist()
        self.observed = Observations(workload, system.composition.needs)
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
                starts, issued = max(compute, host), host + costs.host_gate_ns
                takes_ns = attention_ns
                if costs.beside_ns:
                    yield env.timeout(max(0, starts - env.now))
                    if self.link.moving is not None:
                        takes_ns += costs.beside_ns
                gate_end = max(starts + takes_ns, issued)
                if self.spans is not None:
                    event = step * self.events.layers + layer
                    self._span("host", "gate", host, issued, event)
                    self._span("compute", "host", compute, starts, event)
                    self._span("compute", "attention", starts, starts + takes_ns, event)
                    self._span("compute", "host", starts + takes_ns, gate_end, event)
                    self._span("compute", "shared", gate_end, gate_end + costs.shared_ns, event)
                self.computed += takes_ns + costs.shared_ns
                self.host_idle += gate_end - compute - takes_ns
                known = gate_end + costs.readout_ns
                yield env.timeout(max(0, known + costs.host_demand_ns - env.now))

                experts_issued = known + costs.host_experts_ns
                compute = yield from self._serve_event(step, layer, gate_end + costs.shared_ns, experts_issued)
                host = experts_issued + costs.host_ahead_ns * min(self.depth, self.events.total - 1 - self.now)
                if self.spans is not None:
                    self._span("host", "experts", known, experts_issued, self.now)
                    self._span("host", "ahead", experts_issued, host, self.now)
            self._span("host", "step", host, host + costs.host_step_ns, self.now)
            host += costs.host_step_ns
            step_end = max(compute + step_ns, host)
            self._span("compute", "step", compute, compute + step_ns, self.now)
            self._span("compute", "host", compute + step_ns, step_end, self.now)
            self.computed += step_ns
            self.host_idle += step_end - compute - step_ns
            compute = step_end
            if costs.step_readout_ns != NO_READOUT:
                host = compute + costs.step_readout_ns
            self._close_step()
        yield env.timeout(max(0, compute - env.now))

    def _serve_event(self, step: int, layer: int, free: int, issued: int) -> Generator[simpy.Event, None, int]:
        """Decide, load and compute the experts of one (step, layer); return when the compute stream is done.

        The compute stream has nothing else to do from `free` on, and the experts are issued at `issued`.
        """
        if self.release_ns is not None:
            self._end_event(self.release_ns)
        self.now = now = step * self.events.layers + layer
        start, end = self.union_starts[now], self.union_starts[now + 1]
        union = self.union_keys[start:end]
        takes = dict(zip(union, self.union_takes[start:end], strict=True))
        present, awaited, absent = self._judge(union)
        self._drop_stale_prefetches(union)

        # An event that needs more experts than its pool has slots runs in waves; what is there goes first.
        slots = self.residency.capacity[self.residency.pool_of_key[union[0]]] if union else 1
        first = min(len(absent), slots - len(present) - len(awaited))
        waves = [absent[:first], *(absent[i : i + slots] for i in range(first, len(absent), slots))]

        starts, beside_ns = max(issued, free), self.costs.beside_ns
        compute = starts
        self.host_idle += starts - free
        self._span("compute", "host", free, starts, now)
        for number, absent in enumerate(waves):
            wave = absent if number else present + awaited + absent
            self._begin_wave(wave, () if number else awaited, absent)
            if number == 0:
                if self.depth:
                    self._predict(step, layer)
                if present:
                    compute += self.costs.group_ns + sum(takes[key] for key in present)
            self.link.go()
            if number == 0 and present and (awaited or absent or self.link.moving is not None):
                compute += beside_ns
                self.computed += beside_ns
            first_done = compute
            if self.outstanding:
                self.all_landed = self.env.event()
                yield self.all_landed
            for landed, key in self.arrivals:
                if landed > compute:
                    self.waited += landed - compute
                    compute = landed
                compute += self.costs.group_ns + takes[key] + beside_ns
                self.computed += beside_ns
            if self.arrivals and self.link.moving is None:  # nothing moves beside the last one
                compute -= beside_ns
                self.computed -= beside_ns
            if self.spans is not None:
                self._note_experts([] if number else present, takes, starts, first_done, compute)
            if number + 1 < len(waves):
                yield self.env.timeout(max(0, compute - self.env.now))
                self.residency.hold(wave, FREE)
        self.wave, self.release_ns = wave, compute
        groups = len(union) - len(present) + bool(present)
        self.computed += sum(takes.values()) + groups * self.costs.group_ns
        if self.system.composition.reupload_after_use:
            yield self.env.timeout(max(0, compute - self.env.now))
            if self.release_ns is not None:  # else the link came by at this very instant
                self._end_event(compute)
            self._reupload(union)
            self.link.go()
        return compute

    def _judge(self, union: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Split what the event needs into resident, in flight and absent, as it is when the event starts."""
        residency, now, transfers, unused = self.residency, self.now, self.transfers, self.unused
        pool = residency.pool_of_key[union[0]] if union else 0
        residents = residency.residents[pool]
        on_hit = residency.eviction.on_hit
        present: list[int] = []
        awaited: list[int] = []
        absent: list[int] = []
        for key in union:
            if key not in residents:
                absent.append(key)
                continue
            in_flight = key in transfers
            (awaited if in_flight else present).append(key)
            if key in unused:
                del unused[key]
                self.bytes["late" if in_flight else "useful"] += self.costs.expert_bytes
            on_hit(key, pool, now)
        if self.log is not None:
            for what, keys in (("hit", present), ("late_hit", awaited), ("miss", absent)):
                for key in keys:
                    self._note(self.env.now, what, key)
        for key in absent:
            residency.on_miss(key, pool, now)
        self.hits += len(present)
        self.late_hits += len(awaited)
        self.misses += len(absent)
        predicted = self.predictions.pop(now, None)
        if predicted is not None:
            self.predicted += len(predicted)
            self.predicted_and_needed += len(predicted.intersection(union))
            self.needed_after_prediction += len(union)
        return present, awaited, absent

    def _begin_wave(self, wave: list[int], awaited: Iterable[int], absent: list[int]) -> None:
        """Hold what the wave needs and ask the link for what it lacks: what is partly here first, then in routed order."""
        self.residency.hold(wave, HELD)
        self.arrivals = []
        self.outstanding = 0
        for key in awaited:
            self.outstanding += 1
            if not self.transfers[key].demand:
                self.link.promote(self.transfers[key])
        for key in absent:
            self.outstanding += 1
            queued = self.transfers.get(key)
            if queued is not None:
                self.link.promote(queued)
            elif key in self.residency:  # a prefetch for the next step brought it while earlier waves ran
                self.arrivals.append((self.env.now, key))
                self.outstanding -= 1
            else:
                self._asked(key)
                self.transfers[key] = transfer = Transfer(key, self.now, self.costs.chunks, demand=True)
                self.link.demand.append(transfer)

    def _drop_stale_prefetches(self, union: list[int]) -> None:
        """Take out of the queue what was predicted for this event or an earlier one and is not needed."""
        now = self.now
        for queued in tuple(self.link.prefetch):
            if queued.target <= now and not queued.refresh and queued.key not in union:
                self.link.prefetch.remove(queued)
                self._give_up(queued)

    def _end_event(self, ns: int) -> None:
        """Let go of what the event held until `ns`: done when the first to care, link or next event, comes by."""
        self.release_ns = None
        self.residency.hold(self.wave, FREE)
        for key in self.to_release.pop(self.now, ()):
            prefetch = self.unused.get(key)
            if prefetch is not None and prefetch.target == self.now and key not in self.transfers:
                self.residency.holds[key] = FREE
                if self.system.composition.drop_unused_prefetches:
                    self._evict(key, ns)
        if self.log is not None:
            self.log.append((ns, "end", -1, self.now))

    def _reupload(self, union: list[int]) -> None:
        """Queue every used expert for another transfer: the device copy was spoilt by its use."""
        for key in union:
            if key in self.residency and key not in self.transfers:
                self._asked(key)
                self.transfers[key] = transfer = Transfer(key, self.now, self.costs.chunks, refresh=True)
                self.link.prefetch.append(transfer)

    # ---- prediction ------------------------------------------------------------------------------------------

    def _predict(self, step: int, layer: int) -> None:
        """Let the predictor learn from this event, and queue what the prefetch rule takes of its predictions."""
        system, layers, experts = self.system, self.events.layers, self.events.experts
        seen = self.observed.event(step, layer, self.now)
        system.observe(seen)
        most = min(system.prefetch.most(len(seen.experts)), experts)
        for ahead in range(1, self.depth + 1):
            target = self.now + ahead
            if target >= self.events.total:
                return
            predicted = system.predictor.predict(seen, ahead, self.ids[:most], self.scores[:most])
            if predicted == 0:
                continue
            count = system.take(self.scores, predicted)
            self._check_prediction(predicted, most, count)
            target_layer = (layer + ahead) % layers
            first_key = target_layer * experts
            keys = [first_key + expert for expert in self.ids[:count].tolist()]
            if target in self.predictions:
                self.predictions[target].update(keys)
            else:
                self.predictions[target] = set(keys)
            residents = self.residency.residents[self.residency.pool_of_key[first_key]]
            for key in keys:
                if key not in residents and key not in self.transfers:
                    self._asked(key)
                    self.transfers[key] = transfer = Transfer(key, target, self.costs.chunks)
                    self.link.prefetch.append(transfer)

    def _check_prediction(self, predicted: int, most: int, count: int) -> None:
        """Raise ContractError for counts and ids that cannot be."""
        wrong = [number for number, limit in ((predicted, most), (count, predicted)) if not 0 <= number <= limit]
        wrong += [expert for expert in self.ids[: max(count, 0)].tolist() if not 0 <= expert < self.events.experts]
        if wrong:
            raise ContractError(no_prediction(type(self.system.predictor).__name__, wrong[0], self.events.experts))

    # ---- slots and transfers: what the link asks and tells ---------------------------------------------------

    def _start_transfer(self, transfer: Transfer, ns: int) -> bool:
        """Reserve the slot of a transfer that is about to start; a prefetch that finds none is given up."""
        key, residency = transfer.key, self.residency
        if transfer.refresh:
            residency.holds[key] = HELD
            if self.log is not None:
                self._note(ns, "refresh", key)
            return True
        if not self._make_room(residency.pool_of_key[key], transfer.demand, ns):
            self.cancelled += 1
            del self.transfers[key]
            if self.log is not None:
                self._note(ns, "cancel", key)
            return False
        residency.insert(key, self.now)
        self.taken += 1
        if self.taken > self.peak_slots:
            self.peak_slots = self.taken
        if transfer.demand:
            self.bytes["demand"] += self.costs.expert_bytes
            if self.log is not None:
                self._note(ns, "load", key)
        else:
            self.prefetches += 1
            self.unused[key] = transfer
            self.to_release.setdefault(transfer.target, []).append(key)
            if self.log is not None:
                self._note(ns, "prefetch", key)
        return True

    def _make_room(self, pool: int, demand: bool, ns: int) -> bool:
        """See to a free slot in `pool`: of an expert that nothing needs; for a demand also of one that was prefetched for a
        coming event, or of a paused prefetch."""
        if self.release_ns is not None and self.env.now >= self.release_ns:
            self._end_event(self.release_ns)
        residency = self.residency
        if len(residency.residents[pool]) < residency.capacity[pool]:
            return True
        leaving = residency.victim(pool, self.now, AWAITED)
        if leaving < 0 and demand:
            leaving = residency.victim(pool, self.now, HELD)
        if leaving >= 0:
            self._evict(leaving, ns)
            return True
        if demand:
            for paused in self.link.prefetch:
                if paused.started and self.residency.pool_of_key[paused.key] == pool:
                    self.link.prefetch.remove(paused)
                    self._give_up(paused)
                    return True
            raise ContractError(no_victim(type(residency.eviction).__name__, -1))
        return False

    def _evict(self, key: int, ns: int) -> None:
        """Take a slot away; a prefetch that was never used turns out wasted, a queued renewal is not needed."""
        self.residency.evict(key, self.now)
        self.taken -= 1
        if key in self.unused:
            del self.unused[key]
            self.bytes["wasted"] += self.costs.expert_bytes
        if key in self.transfers:
            renewal = self.transfers.pop(key)
            self.link.prefetch.remove(renewal)
        if self.log is not None:
            self._note(ns, "evict", key)

    def _give_up(self, transfer: Transfer) -> None:
        """Drop a transfer that nobody waits for; a paused one gives its slot back and has moved bytes for nothing."""
        del self.transfers[transfer.key]
        self.cancelled += 1
        if self.log is not None:
            self._note(self.env.now, "cancel", transfer.key)
        if transfer.started:
            self.unused.pop(transfer.key, None)
            self.bytes["refresh" if transfer.refresh else "wasted"] += transfer.chunks_moved * self.costs.chunk_bytes
            self._evict(transfer.key, self.env.now)

    def _prefetch_pauses(self, transfer: Transfer) -> bool:
        """Keep a prefetch that gives way if its event is still to come."""
        if transfer.refresh or transfer.target > self.now:
            return True
        self._give_up(transfer)
        return False

    def _transfer_landed(self, transfer: Transfer, ns: int) -> None:
        """Make an expert usable, and wake the host when it was the last one it waited for."""
        key = transfer.key
        del self.transfers[key]
        if self.log is not None:
            self._note(ns, "landed", key)
        if transfer.refresh:
            self.bytes["refresh"] += self.costs.expert_bytes
        if transfer.demand:
            self.arrivals.append((ns, key))
            self.outstanding -= 1
            if self.outstanding == 0:
                assert self.all_landed is not None
                self.all_landed.succeed()
        elif transfer.refresh or transfer.target <= self.now:
            self.residency.holds[key] = FREE
            if not transfer.refresh and self.system.composition.drop_unused_prefetches:
                self._evict(key, ns)
        else:
            self.residency.holds[key] = AWAITED

    # ---- counters --------------------------------------------------------------------------------------------

    def _close_step(self) -> None:
        counters = (self.computed, self.waited, self.host_idle, self.hits, self.late_hits, self.misses)
        self.per_step.append(counters)
        self.computed = self.waited = self.host_idle = self.hits = self.late_hits = self.misses = 0

    def _note(self, ns: int, what: str, key: int) -> None:
        assert self.log is not None
        self.log.append((ns, what, key, self.now))

    def _span(self, resource: str, what: str, start: int, end: int, event: int, key: int = -1) -> None:
        if self.spans is not None and end > start:
            self.spans.append(Span(resource, what, start, end, key, event))

    def _note_experts(self, present: list[int], takes: dict[int, int], start: int, first_done: int, end: int) -> None:
        """Note when a wave computed each expert: those that were there from `start` to `first_done`, then each as it landed.

        The launch of a group counts to its first expert, and what a busy link cost to its last.
        """
        for place, key in enumerate(present, start=1):
            done = start + takes[key] + (self.costs.group_ns if place == 1 else 0)
            done = first_done if place == len(present) else done
            self._span("compute", "expert", start, done, self.now, key)
            start = done
        start = first_done
        for place, (landed, key) in enumerate(self.arrivals, start=1):
            self._span("compute", "wait", start, landed, self.now, key)
            start = max(start, landed)
            done = start + self.costs.group_ns + takes[key] + self.costs.beside_ns
            done = end if place == len(self.arrivals) else done
            self._span("compute", "expert", start, done, self.now, key)
            start = done

    def _asked(self, key: int) -> None:
        if self.spans is not None:
            self.spans.append(Span("queue", "asked", self.env.now, self.env.now, key, self.now))

    def _link_moved(self, key: int, start: int, end: int) -> None:
        self._span("link", "moved", start, end, self.now, key)

    def result(self) -> Run:
        """Gather the counters; prefetches that nothing used by the end were wasted."""
        self.link.tell()
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

"""The executor: the host thread of expert offloading, driving the same policies as the simulator on a real device.

At every (step, layer) it does what `sim.reference` does in simulated time, in the same order and the same words;
`docs/real.md` says where hardware makes a difference. What computes is a `Decoder`; what moves bytes is the `Pump`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from policies.contract import Ints
from policies.residency import AWAITED, FREE, HELD
from real.decisions import REFUSED, Decisions
from real.device import COMPUTE, COPY, Device, Memory
from real.pump import Pump, Transfer
from real.schedule import SlotRead, SlotWrite
from real.timeline import Timeline
from real.turn import BROKEN, NOT_YET, SENT, Expected, Turn, Words
from sim.fast.callbacks import NOBODY, WRONG
from sim.fast.native import FAILED
from sim.result import KINDS
from traces.errors import InputError

SILENT_S = 20.0
"""The device counts as lost when a gate's result does not come for so long."""


class Decoder(Protocol):
    """What computes. `begin_step`, `route`, `shared`, `compute`, `publish_sight` and `end_step` only submit work."""

    words: Words
    """Where gates write what they chose."""

    def begin_step(self, step: int) -> None:
        """Submit what comes before the first layer."""

    def route(self, step: int, layer: int) -> None:
        """Submit attention and gate of a layer."""

    def shared(self, step: int, layer: int) -> None:
        """Submit what of a layer does not wait for the routed experts: its shared ones."""

    def expected(self, step: int, layer: int) -> Expected:
        """Say which of `words` the gate that was submitted writes."""

    def routed(self, step: int, layer: int, ids: list[int]) -> None:
        """Take note of the routed ids of all tokens in a row (-1: none), which are in host memory now."""

    def publish_sight(self, step: int, layer: int) -> None:
        """Submit the writing of what predictors see of the layer, besides the routed ids, into host memory."""

    def read_sight(self, step: int, layer: int) -> bool:
        """Let predictors see what the last `publish_sight` was for; return False while it is not all in host memory."""

    def compute(self, step: int, layer: int, slots: Mapping[int, int]) -> None:
        """Submit the experts of a layer that `slots` names, by key: those tokens that routed to them."""

    def end_step(self, step: int) -> None:
        """Submit what comes after the last layer."""


class Shape(NamedTuple):
    """How long and wide a run is."""

    steps: int
    layers: int
    experts: int


class Outcome(NamedTuple):
    """Counts of a run, as in `sim.result.Run`."""

    hits: Ints
    """[S] resident when their event started."""
    late_hits: Ints
    """[S] in flight then."""
    misses: Ints
    """[S] neither."""
    bytes_by_kind: dict[str, int]
    prefetches: int
    cancelled: int
    predicted: int
    predicted_and_needed: int
    needed_after_prediction: int
    peak_slots: int
    bytes_sent: int
    """Bytes given to the copy stream."""


class Executor:
    """One run of the system that decides by `decisions`, with experts in `memory`.

    Decisions are appended to `log`, if one is
    given, as tuples (ns, what, key, event) in the words of the simulators' log.
    """

    def __init__(
        self,
        decisions: Decisions,
        shape: Shape,
        decoder: Decoder,
        device: Device,
        memory: Memory,
        *,
        expert_bytes: int,
        chunk_bytes: int,
        window_bytes: int,
        timeline: Timeline,
        log: list[tuple[Any, ...]] | None = None,
        one_by_one: bool = True,
    ) -> None:
        self.decisions = decisions
        self.system = system = decisions.system
        self.shape = shape
        self.decoder = decoder
        self.device = device
        self.timeline = timeline
        self.log = log
        self.one_by_one = one_by_one
        """Whether experts that had to be waited for compute each as it lands, or all after the last."""
        self.expert_bytes = expert_bytes
        self.memory = memory
        self.resident, self.holds, self.busy = decisions.resident, decisions.holds, decisions.busy
        setting = system.setting
        self.pool_of_key: list[int] = np.repeat(setting.pool_of, setting.experts).tolist()
        self.capacity: list[int] = setting.capacity.tolist()
        self.taken = [0] * len(self.capacity)
        """Slots of every pool that are taken."""
        self.link = Pump(
            device, expert_bytes, chunk_bytes, window_bytes, self._start_transfer, self._copy, self._transfer_landed
        )
        self.transfers: dict[int, Transfer] = {}
        """Transfers queued or in flight, by key."""
        slot_of: Any = np.full(setting.keys, -1, np.int64)
        self.slot_of = memoryview(slot_of)
        """[keys] slot of every resident."""
        self.turn = Turn(decisions, decoder.words, device, memory, expert_bytes, slot_of)
        self.free_slots = list(range(sum(self.capacity)))[::-1]
        self.last_use = [0] * len(self.free_slots)
        """Per slot the ticket of the compute stream after which nobody reads it."""
        self.now = -1
        """The running event."""
        self.union: list[int] = []
        """What the running event needs."""
        self.wave: list[int] = []
        """Keys that the running event, or its last wave, holds until it ends."""
        self.end_ticket = 0
        """Of the running event's last expert; 0 before that is submitted, and once the event has ended."""
        self.arrival_ticket = 0
        """Of the last transfer that the compute stream was told to wait for."""
        self.unused: dict[int, Transfer] = {}
        """Prefetched experts that hold a slot and were not used yet, with the transfer that brings or brought them."""
        self.to_release: dict[int, list[int]] = {}
        """Prefetched keys by the event that they were fetched for."""
        self.left: list[int] = []
        """Keys that lost their slot since the running event was judged: for its prediction they are still there."""
        self.depth = system.prefetch.depth
        self.due: tuple[int, int] | None = None
        """The event from which nothing was predicted yet. Where nothing has to be awaited, the next gate is submitted first:
        experts are computed sooner than the host has predicted and fed the link, and the device would stand still."""
        self._drives = False
        """Whether the next gate is the executor's to submit, and at once."""
        self._may_send = not system.composition.reupload_after_use
        """Whether the turn may start copies: renewals are queued whenever an event ends."""

        self.bytes = dict.fromkeys(KINDS, 0)
        self.hits, self.late_hits, self.misses = (np.zeros(shape.steps, np.int64) for _ in range(3))
        self.prefetches = self.cancelled = 0
        self.predicted = self.predicted_and_needed = self.needed_after_prediction = 0
        self.peak_slots = 0

    # ---- the steps -------------------------------------------------------------------------------------------

    def preload(self, keys: Iterable[int]) -> None:
        """Bring `keys` into slots before the first step; the eviction policy sees them inserted by event 0."""
        for key in keys:
            transfer = Transfer(key, 0)
            self.decisions.admit(key, self.pool_of_key[key], 1, HELD, 0)
            self._occupy(transfer, FREE)
            self._copy(transfer, 0, self.expert_bytes)
        self.device.drain()

    def run(self, steps: range | None = None) -> None:
        """Run `steps`, which follow those run before (all by default), and wait until the device is done."""
        self._drives = True
        for step in steps if steps is not None else range(self.shape.steps):
            self.begin_step(step)
            for layer in range(self.shape.layers):
                self.timeline.begin_layer(step, layer)
                self.decoder.route(step, layer)
                self.serve(step, layer)
            self.end_step(step)
        self._drives = False
        self.finish()

    def begin_step(self, step: int) -> None:
        """Begin a step; whoever drives the executor without `run` then serves every layer and ends the step."""
        self.timeline.begin_step(step)
        self.decoder.begin_step(step)

    def serve(self, step: int, layer: int) -> None:
        """Serve one event, whose gate was just submitted: wait for its result, decide, load, and submit the experts."""
        self.timeline.gate_issued()
        self.decoder.shared(step, layer)
        self.timeline.shared_issued()
        self._predict_what_is_due()
        self.timeline.looked_ahead()
        ended = self._await_routed(step, layer)
        self.timeline.routed(self.turn.seen_ns)
        self._serve_event(step, layer, sent=ended == SENT)
        self.timeline.experts_issued()
        if self.due is None:
            self._feed()

    def end_step(self, step: int) -> None:
        """End a step, all of whose layers were served."""
        self.decoder.end_step(step)
        self.timeline.end_step(step)

    def finish(self) -> None:
        """Wait until the device is done."""
        self._predict_what_is_due()
        self.device.drain()
        self.link.poll()

    def outcome(self) -> Outcome:
        """Gather the counts; prefetches that nothing used by now were wasted."""
        counted = {**self.bytes, "wasted": self.bytes["wasted"] + len(self.unused) * self.expert_bytes}
        return Outcome(
            hits=self.hits,
            late_hits=self.late_hits,
            misses=self.misses,
            bytes_by_kind=counted,
            prefetches=self.prefetches,
            cancelled=self.cancelled,
            predicted=self.predicted,
            predicted_and_needed=self.predicted_and_needed,
            needed_after_prediction=self.needed_after_prediction,
            peak_slots=self.peak_slots,
            bytes_sent=self.link.bytes_sent,
        )

    def _await_routed(self, step: int, layer: int) -> int:
        """Feed the link until the gate's result is in host memory; return how the turn ended."""
        device, link, turn = self.device, self.link, self.turn
        now, first_key = step * self.shape.layers + layer, layer * self.shape.experts
        pool = self.pool_of_key[first_key]
        turn.expect(self.decoder.expected(step, layer), first_key, now, pool, self.capacity[pool])
        rounds = 0
        while True:
            self._feed()
            busy = self.end_ticket or link.prefetch or link.in_flight  # then there is something else to look out for
            looks = min(device.looks, 64) if busy else device.looks
            if (ended := self._take_turn(pool, looks)) != NOT_YET:
                return ended
            rounds += 1
            self._look_again("the gate", step, layer, rounds)

    def _await_sight(self, step: int, layer: int) -> None:
        """Wait until what predictors see of the last event is in host memory; the link has its demands meanwhile."""
        rounds = 0
        while not self.decoder.read_sight(step, layer):
            rounds += 1
            self._look_again("what predictors see", step, layer, rounds)

    def _look_again(self, what: str, step: int, layer: int, rounds: int) -> None:
        """Let the device work before the next look. Raises InputError where it has been silent for too long."""
        self.device.idle()
        if rounds % 1024 == 0 and time.perf_counter_ns() - self.timeline.issued_ns > SILENT_S * 1e9:
            raise InputError(
                f"{what} of layer {layer} in step {step} did not come within {SILENT_S:.0f} s: the device is lost"
            )

    def _take_turn(self, pool: int, looks: int) -> int:
        """Let the compiled turn do all that it may as things are; return how it ended. Raises what a policy raised."""
        turn, link = self.turn, self.link
        if self.end_ticket:
            if (ended := turn.take(looks)) == NOT_YET:
                return ended
            self.device.saw(COMPUTE, self.end_ticket)  # the gate came after it in the compute stream
            self._end_event()
            looks = 1
        link.poll()
        if link.prefetch or not self._may_send:
            ended = turn.decide(looks)
        else:
            free = self.capacity[pool] - self.taken[pool]
            marks = self.timeline.open_copy_marks(behind=bool(link.in_flight))
            ended = turn.send(looks, free, self.free_slots[-1] if free else -1, self.device.next_event(COPY), marks)
            if ended != SENT:
                self.timeline.drop_copy_marks(marks)
        if ended == FAILED:
            self.decisions.failed()
        if ended == WRONG:
            self.decisions.wrong_victim(turn.wrong)
        if ended == BROKEN:
            self.device.fail(turn.code)
        return ended

    def _feed(self) -> None:
        """Let the link go on between events; what the last event held may leave once it is computed."""
        if self.end_ticket and self.device.done(COMPUTE, self.end_ticket):
            self._end_event()
        if self.link.prefetch:
            self.link.go()

    def _serve_event(self, step: int, layer: int, *, sent: bool) -> None:
        """Load and compute the experts of one (step, layer), which was judged; its first demand may be `sent` already."""
        self.now = step * self.shape.layers + layer
        self.decoder.routed(step, layer, self.turn.routed)
        if self.left:
            self._forget_who_left()
        first_key = layer * self.shape.experts
        self.union = union = self.turn.union
        present, awaited, absent = self._split(union)
        arriving: dict[int, Transfer] = {}
        link_can_wait = bool(sent or self.link.in_flight or not (awaited or absent))  # it is busy, or has nothing to do
        if link_can_wait:
            self.timeline.decided()
            self._compute(step, layer, present)
        self._count(step, union, present, awaited, absent)
        if self.link.prefetch:
            self._drop_stale_prefetches(union)
        if sent:
            arriving |= self._note_sent()

        # An event that needs more experts than its pool has slots runs in waves; what is there goes first.
        slots = self.capacity[self.pool_of_key[first_key]]
        first = min(len(absent), slots - len(present) - len(awaited))
        arriving |= self._begin_wave(present + awaited + absent[:first], awaited, absent[len(arriving) : first])
        # The link has its first demand; now the compute stream, then all that takes less time than they are busy for.
        if not link_can_wait:
            self.timeline.decided()
            self._compute(step, layer, present)
        self.link.send_demands()
        if self.depth:
            self.decoder.publish_sight(step, layer)
        self.due = (step, layer)
        if awaited or absent or not self._drives:
            self._predict_what_is_due()
        self._compute_arriving(step, layer, present, arriving)
        self.wave = present + awaited + absent[:first]
        for start in range(first, len(absent), slots):
            self._end_wave()
            self.wave = wave = absent[start : start + slots]
            arriving = self._begin_wave(wave, (), wave)
            self.link.go()
            resident = [key for key in wave if key not in arriving]
            self._compute(step, layer, resident)
            self._compute_arriving(step, layer, resident, arriving)

    def _compute_arriving(self, step: int, layer: int, resident: list[int], arriving: dict[int, Transfer]) -> None:
        """Submit what is in flight in the order in which it lands; the residents of its wave are submitted already."""
        if arriving:
            landing = sorted(arriving.values(), key=lambda transfer: transfer.ticket)
            for group in [[transfer] for transfer in landing] if self.one_by_one else [landing]:
                self.timeline.mark_wait()
                self.device.wait(COMPUTE, COPY, group[-1].ticket)
                self._compute(step, layer, [transfer.key for transfer in group])
            self.arrival_ticket = landing[-1].ticket
        self.end_ticket = ticket = self.device.record(COMPUTE)
        for key in (*resident, *arriving):
            self.last_use[self.slot_of[key]] = ticket

    def _compute(self, step: int, layer: int, keys: list[int]) -> None:
        """Submit the experts `keys`, which are there when the compute stream comes so far."""
        if not keys:
            return
        slot_of = self.slot_of
        slots = {key: slot_of[key] for key in keys}
        if self.device.schedule is not None:
            self.device.schedule.submit(COMPUTE, [SlotRead(slot, key) for key, slot in slots.items()], ())
        self.timeline.mark_start()
        self.decoder.compute(step, layer, slots)
        self.timeline.mark_end()

    def _end_wave(self) -> None:
        """Wait until a wave that is not the last is computed; its experts may leave then."""
        self.device.synchronize(COMPUTE, self.end_ticket)
        self._note_arrivals()
        self.end_ticket = 0
        self._hold(self.wave, FREE)

    def _hold(self, keys: Iterable[int], how: int) -> None:
        """Hold all `keys` as firmly as `how` says."""
        holds = self.holds
        for key in keys:
            holds[key] = how

    def _note_arrivals(self) -> None:
        """Note that what computed experts had waited for has landed."""
        self.device.saw(COPY, self.arrival_ticket)
        self.link.poll()

    def _split(self, union: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Split what the event needs into resident, in flight and absent, as it was when the event started."""
        transfers, is_resident = self.transfers, self.resident
        present: list[int] = []
        awaited: list[int] = []
        absent: list[int] = []
        for key in union:
            (absent if not is_resident[key] else awaited if key in transfers else present).append(key)
        return present, awaited, absent

    def _count(self, step: int, union: list[int], present: list[int], awaited: list[int], absent: list[int]) -> None:
        """Count and log what the event found; prefetches that it uses turn out useful or late."""
        now, unused = self.now, self.unused
        if unused:
            for kind, keys in (("useful", present), ("late", awaited)):
                for key in keys:
                    if key in unused:
                        del unused[key]
                        self.bytes[kind] += self.expert_bytes
        if self.log is not None:
            ns = time.perf_counter_ns()
            for what, keys in (("hit", present), ("late_hit", awaited), ("miss", absent)):
                self.log.extend([(ns, what, key, now) for key in keys])
        self.hits[step] += len(present)
        self.late_hits[step] += len(awaited)
        self.misses[step] += len(absent)
        predicted = self.decisions.predicted(now) if self.depth else None
        if predicted is not None:
            first_key = now % self.shape.layers * self.shape.experts
            self.predicted += predicted.count(1)
            self.predicted_and_needed += sum(predicted[key - first_key] for key in union)
            self.needed_after_prediction += len(union)

    def _note_sent(self) -> dict[int, Transfer]:
        """Note the copy that the turn has started; return its transfer by key."""
        key, slot, leaving = self.turn.sent
        transfer = self.transfers[key] = Transfer(key, self.now, demand=True)
        self.busy[key] = True
        self._give_slot(key, leaving)
        self._has_slot(transfer)
        assert transfer.slot == slot, "the turn and the executor disagree about a slot"
        if self.device.schedule is not None:
            self.device.schedule.submit(COPY, (), [SlotWrite(slot, key, 0, self.expert_bytes)])
        self.link.note_sent(transfer, self.device.recorded(COPY))
        self.timeline.note_copy(self.now, self.expert_bytes)
        return {key: transfer}

    def _begin_wave(self, wave: list[int], awaited: Iterable[int], absent: list[int]) -> dict[int, Transfer]:
        """Hold what the wave needs, ask the link for what it lacks, and return what of that has to be waited for."""
        self._hold(wave, HELD)
        arriving: dict[int, Transfer] = {}
        sent = False
        for key in awaited:
            arriving[key] = transfer = self.transfers[key]
            if not transfer.demand:
                self.link.promote(transfer)
        if self.link.demand:  # the link must not stand still
            self.link.send_demand()
            sent = True
        for key in absent:
            queued = self.transfers.get(key)
            if queued is not None:
                self.link.promote(queued)
            elif self.resident[key]:  # a prefetch for the next step brought it while earlier waves ran
                continue
            else:
                self.transfers[key] = queued = Transfer(key, self.now, demand=True)
                self.busy[key] = True
                self.link.demand.append(queued)
                if not sent:
                    self.link.send_demand()
                    sent = True
            arriving[key] = queued
        return arriving

    def _drop_stale_prefetches(self, union: list[int]) -> None:
        """Take out of the queue what was predicted for this event or an earlier one and is not needed."""
        now = self.now
        for queued in tuple(self.link.prefetch):
            if queued.target <= now and not queued.refresh and queued.key not in union:
                self.link.prefetch.remove(queued)
                self._give_up(queued)

    def _end_event(self) -> None:
        """Let go of what the event held, which is computed."""
        self.end_ticket = 0
        self._note_arrivals()
        self._hold(self.wave, FREE)
        for key in self.to_release.pop(self.now, ()):
            prefetch = self.unused.get(key)
            if prefetch is not None and prefetch.target == self.now and key not in self.transfers:
                self.holds[key] = FREE
                if self.system.composition.drop_unused_prefetches:
                    self._evict(key)
        if self.log is not None:
            self._note("end", -1)
        if self.system.composition.reupload_after_use:
            self._reupload()

    def _reupload(self) -> None:
        """Queue every used expert for another transfer: the device copy was spoilt by its use."""
        for key in self.union:
            if self.resident[key] and key not in self.transfers:
                self.transfers[key] = transfer = Transfer(key, self.now, refresh=True)
                self.busy[key] = True
                self.link.prefetch.append(transfer)

    # ---- prediction ------------------------------------------------------------------------------------------

    def _predict_what_is_due(self) -> None:
        """Let the predictor learn from the last event, queue what the prefetch rule takes of it, and feed the link."""
        if self.due is None:
            return
        (step, layer), self.due = self.due, None
        if self.depth:
            self._await_sight(step, layer)
            for key, target in self.decisions.look_ahead(step, layer, self.now):
                self.transfers[key] = transfer = Transfer(key, target)
                self.link.prefetch.append(transfer)
        self.link.go()

    def _forget_who_left(self) -> None:
        """Let those that lost their slots during the event before be predicted again."""
        for key in self.left:
            self.busy[key] = key in self.transfers
        self.left.clear()

    # ---- slots and transfers: what the pump asks and tells ---------------------------------------------------

    def _copy(self, transfer: Transfer, start: int, stop: int) -> None:
        """Submit a piece of a transfer, after the slot's last reader if it is the first piece."""
        slot, key, (slots, experts, slot_bytes) = transfer.slot, transfer.key, self.memory
        if start == 0:
            self.device.wait(COPY, COMPUTE, self.last_use[slot])
        if self.device.schedule is not None:
            self.device.schedule.submit(COPY, (), [SlotWrite(slot, key, start, stop)])
        to, source = slots + slot * slot_bytes + start, experts + key * slot_bytes + start
        if self.timeline.marks:
            self.timeline.mark_copy(
                self.now,
                stop - start,
                transfer.demand,
                bool(self.link.in_flight),
                lambda: self.device.copy(to, source, stop - start),
            )
        else:
            self.device.copy(to, source, stop - start)

    def _start_transfer(self, transfer: Transfer) -> bool:
        """Reserve the slot of a transfer that is about to start; a prefetch that finds none is given up."""
        key = transfer.key
        if transfer.refresh:
            self.holds[key] = HELD
            transfer.slot = self.slot_of[key]
            if self.log is not None:
                self._note("refresh", key)
            return True
        if not self._admit(key, transfer.demand):
            self.cancelled += 1
            self._close(key)
            if self.log is not None:
                self._note("cancel", key)
            return False
        self._has_slot(transfer)
        return True

    def _has_slot(self, transfer: Transfer) -> None:
        """Note that a transfer starts, whose expert was admitted."""
        key = transfer.key
        self._occupy(transfer, HELD)
        if transfer.demand:
            self.bytes["demand"] += self.expert_bytes
            if self.log is not None:
                self._note("load", key)
        else:
            self.prefetches += 1
            self.unused[key] = transfer
            self.to_release.setdefault(transfer.target, []).append(key)
            if self.log is not None:
                self._note("prefetch", key)

    def _admit(self, key: int, demand: bool) -> bool:
        """Find a slot for `key`: a free one, or that of an expert that nothing needs; for a demand also one that was
        prefetched for a coming event, or that of a prefetch that is partly there."""
        pool = self.pool_of_key[key]
        while True:
            free = self.capacity[pool] - self.taken[pool]
            leaving = self.decisions.admit(key, pool, free, HELD if demand else AWAITED, self.now)
            if leaving != REFUSED:
                self._give_slot(key, leaving)
                return True
            if not demand:
                return False
            if not self._give_up_a_prefetch(pool):
                if not any(last is not None and not last.demand for _, _, last in self.link.in_flight):
                    self.decisions.wrong_victim(-1)
                self.link.await_oldest()  # a prefetch that cannot be called back holds the slot until it lands

    def _give_slot(self, key: int, leaving: int) -> None:
        """Take the slot of who is `leaving`, if anybody has to, so that there is one for `key`."""
        if leaving != NOBODY:
            if self.pool_of_key[leaving] != self.pool_of_key[key]:
                self.decisions.wrong_victim(leaving)
            self._forget(leaving)

    def _occupy(self, transfer: Transfer, how: int) -> None:
        """Give a slot to an expert that was admitted."""
        key = transfer.key
        self.resident[key] = True
        self.holds[key] = how
        self.taken[self.pool_of_key[key]] += 1
        transfer.slot = self.slot_of[key] = self.free_slots.pop()
        self.peak_slots = max(self.peak_slots, sum(self.taken))

    def _give_up_a_prefetch(self, pool: int) -> bool:
        """Give up a prefetch of `pool` that is partly there, if there is one."""
        for paused in self.link.prefetch:
            if paused.started and self.pool_of_key[paused.key] == pool:
                self.link.prefetch.remove(paused)
                self._give_up(paused)
                return True
        return False

    def _evict(self, key: int) -> None:
        """Take a slot away for another reason than to make room."""
        self.decisions.evicted(key, self.pool_of_key[key], self.now)
        self._forget(key)

    def _forget(self, key: int) -> None:
        """Note a lost slot: a prefetch that was never used turns out wasted, a queued renewal is not needed."""
        self.resident[key], self.holds[key] = False, HELD
        self.taken[self.pool_of_key[key]] -= 1
        self.left.append(key)
        self.busy[key] = True
        self.free_slots.append(self.slot_of[key])
        self.slot_of[key] = -1
        if key in self.unused:
            del self.unused[key]
            self.bytes["wasted"] += self.expert_bytes
        if key in self.transfers:
            renewal = self.transfers.pop(key)
            self.link.prefetch.remove(renewal)
        if self.log is not None:
            self._note("evict", key)

    def _close(self, key: int) -> None:
        """Note that a transfer is over."""
        del self.transfers[key]
        self.busy[key] = False

    def _give_up(self, transfer: Transfer) -> None:
        """Drop a transfer that nobody waits for; one that is partly there gives its slot back, its bytes were wasted."""
        self._close(transfer.key)
        self.cancelled += 1
        if self.log is not None:
            self._note("cancel", transfer.key)
        if transfer.started:
            self.unused.pop(transfer.key, None)
            self.bytes["refresh" if transfer.refresh else "wasted"] += transfer.sent
            self._evict(transfer.key)

    def _transfer_landed(self, transfer: Transfer) -> None:
        """Make an expert usable."""
        key = transfer.key
        self._close(key)
        if self.log is not None:
            self._note("landed", key)
        if transfer.refresh:
            self.bytes["refresh"] += self.expert_bytes
        if transfer.demand:
            return
        if transfer.refresh or transfer.target <= self.now:
            self.holds[key] = FREE
            if not transfer.refresh and self.system.composition.drop_unused_prefetches:
                self._evict(key)
        else:
            self.holds[key] = AWAITED

    def _note(self, what: str, key: int) -> None:
        assert self.log is not None
        self.log.append((time.perf_counter_ns(), what, key, self.now))

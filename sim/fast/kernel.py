"""The memory model as one compiled loop: what `sim.reference` and `sim.link` say, function by function, without SimPy.

Where the reference engine schedules, this loop keeps one alarm, that of the link, and lets the link act up to the moment at
which the host acts next. Names and order of the functions are those of the reference engine: every change there belongs
here too, and the equality tests see to that. The state is described in `sim.fast.state`.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from policies.contract import NEVER
from policies.residency import AWAITED, FREE, HELD
from sim.fast.hooks import REFUSED, ROOM
from sim.fast.native import FAILED, call
from sim.fast.state import (
    EXPERT,
    INT32,
    INT64,
    LOG,
    NONE,
    PLACE,
    QUEUED,
    STARTED,
    cell,
    coming,
    expert_of,
    number,
    place,
    pool_of,
    put,
    record,
    step_of,
)

NOTHING = -1
"""No expert key."""

ONLY_SERVE = -1
"""A moment before all others: the link starts what it can, and no time passes."""

END, GIVE_WAY = range(2)
"""What the link's alarm means."""

BY_EXCEPTION, BY_VICTIM, BY_PREDICTION, BY_HOLDING = 1, 2, 3, 4
"""What stopped a run: a policy raised, chose a victim that may not leave, predicted what is none, or kept every slot."""

EVENTS = ("hit", "late_hit", "miss", "load", "prefetch", "refresh", "landed", "cancel", "evict", "end")
"""Names of what is logged, by number."""
HIT, LATE_HIT, MISS, LOADS, PREFETCHES, REFRESH, LANDED, CANCEL, EVICT, ENDS = range(len(EVENTS))


def run_part(runs: Any, stop: Any) -> Any:
    """Run on to event `stop`, or until the log is full or a policy broke the contract; return the event to go on with.

    Compiled by whoever calls it (`sim.fast.run`), which is also where the arguments are made.
    """
    run = runs[0]
    while run.now + 1 < stop and not run.broken:
        if run.logging and run.logged + 4 * run.keys + 2 * run.experts + 8 > run.log_room:
            break
        attention_ns = step_of(run).attention_ns
        # Attention and gate: they start as soon as issuing begins and end no earlier than it ends.
        issued = run.host + run.host_gate_ns
        gate_end = max(max(run.compute, run.host) + attention_ns, issued)
        run.computed += attention_ns
        run.host_idle += gate_end - run.compute - attention_ns
        _let_link_act(run, gate_end + run.readout_ns)

        run.host = run.time + run.host_experts_ns
        _serve_event(run, gate_end)
        run.layer += 1
        if run.layer == run.layers:
            run.layer = 0
            step_ns = step_of(run).step_ns
            run.host += run.host_step_ns
            step_end = max(run.compute + step_ns, run.host)
            run.computed += step_ns
            run.host_idle += step_end - run.compute - step_ns
            run.compute = step_end
            _close_step(run, step_of(run))
            run.step += 1
            if run.now + 1 == run.events:
                _let_link_act(run, run.compute)
    return run.now + 1


@njit
def _serve_event(run: Any, gate_end: Any) -> None:
    """Decide, load and compute the experts of one (step, layer)."""
    if run.release_ns != NEVER:
        _end_event(run)
    run.now += 1
    run.first_key = run.layer * run.experts
    run.row = 0 if run.row == run.depth else run.row + 1
    start = number(run.offsets_at, run.now - run.first_event, INT64)
    stop = number(run.offsets_at, run.now - run.first_event + 1, INT64)
    pool = expert_of(run, run.first_key).pool
    hits, awaited, absent, present_ns = _judge(run, start, stop, pool)

    # An event that needs more experts than its pool has slots runs in waves; what is there goes first.
    slots = pool_of(run, pool).capacity
    wave, next_wave = 0, min(absent, slots - hits)
    if next_wave < absent:
        _hold_wave(run, hits, wave, next_wave)
    run.host_idle += run.host - gate_end
    run.compute = run.host + present_ns
    _begin_wave(run, awaited, wave, next_wave)
    if run.depth:
        _predict(run)
    _let_link_act(run, ONLY_SERVE)
    while next_wave < absent and not run.broken:
        _let_link_act(run, max(run.compute, run.time))
        _release(run)
        wave, next_wave = next_wave, min(absent, next_wave + slots)
        _hold_wave(run, 0, wave, next_wave)
        _begin_wave(run, 0, wave, next_wave)
        _let_link_act(run, ONLY_SERVE)
    run.release_ns = run.compute
    if run.reupload_after_use:
        _let_link_act(run, max(run.compute, run.time))
        if run.release_ns != NEVER:
            _end_event(run)
        for index in range(start, stop):
            key = number(run.keys_at, index, INT32)
            if expert_of(run, key).resident and expert_of(run, key).transfer == NONE:
                _queue(run, key, run.now, True)
        _let_link_act(run, ONLY_SERVE)


@njit(forceinline=True)
def _judge(run: Any, start: Any, stop: Any, pool: Any) -> Any:
    """Split what the event needs into `Told.hits`, of which some are still in flight, and `Told.misses`.

    Return how many there are of each, and the compute time of those that need not be waited for.
    """
    now, first_key = run.now, run.first_key
    # In local variables, because a compiler must assume that writing any table changes them.
    keys_at, tokens_at, expert_ns_at = run.keys_at, run.tokens_at, run.expert_ns_at
    experts_at, places_at, hits_at, misses_at = run.experts_at, run.places_at, run.hits_at, run.misses_at
    run.held = stop - start
    hits = awaited = absent = hits_ns = awaited_ns = total_ns = 0
    for index in range(start, stop):
        key = number(keys_at, index, INT32)
        takes = number(expert_ns_at, number(tokens_at, index, INT32), INT64)
        expert = record(experts_at, key, EXPERT)
        expert.needed = now
        expert.hold = HELD  # until the event ends; for those that have no slot it means nothing
        record(places_at, key - first_key, PLACE).takes = takes
        record(places_at, index - start, PLACE).held = key
        # Both lists are written and one of them grows: nobody, no processor either, foresees which.
        put(hits_at, hits, key, INT32)
        put(misses_at, absent, key, INT32)
        resident = int(expert.resident)
        hits += resident
        absent += 1 - resident
        hits_ns += resident * takes
        total_ns += takes
        if expert.resident and expert.transfer != NONE:
            place(run, awaited).awaited = key
            awaited += 1
            awaited_ns += takes
        if expert.unused >= 0:
            expert.unused = NOTHING
            if expert.transfer != NONE:
                run.late_bytes += run.expert_bytes
            else:
                run.useful_bytes += run.expert_bytes
    if run.logging:
        for index in range(hits):
            key = number(run.hits_at, index, INT32)
            if expert_of(run, key).transfer == NONE:
                _note(run, run.time, HIT, key)
        for index in range(awaited):
            _note(run, run.time, LATE_HIT, place(run, index).awaited)
        for index in range(absent):
            _note(run, run.time, MISS, number(run.misses_at, index, INT32))
    if stop > start and call(run.event_entry, run.eviction_state, hits, absent, pool, run.now) == FAILED:
        run.broken = BY_EXCEPTION
    run.computed += total_ns
    run.hits += hits - awaited
    run.late_hits += awaited
    run.misses += absent
    this = coming(run, 0)
    if this.predicted >= 0:
        run.predicted += this.predicted
        run.needed_after_prediction += stop - start
        stale = False
        for index in range(this.predicted):
            chosen = cell(this, index).choice
            cell(this, chosen).predicted = False
            expert = expert_of(run, first_key + chosen)
            run.predicted_and_needed += expert.needed == run.now
            stale |= expert.needed != run.now and expert.transfer != NONE
        this.predicted = NOTHING
        if stale:
            _drop_stale_prefetches(run)
    return hits, awaited, absent, hits_ns - awaited_ns


@njit(forceinline=True)
def _begin_wave(run: Any, awaited: Any, wave: Any, next_wave: Any) -> None:
    """Ask the link for what the wave lacks: what is partly here first, then in routed order."""
    for index in range(awaited):
        key = place(run, index).awaited
        run.outstanding += 1
        if not expert_of(run, key).demand:
            _promote(run, key)
    for index in range(wave, next_wave):
        key = number(run.misses_at, index, INT32)
        expert = expert_of(run, key)
        if expert.resident and expert.transfer == NONE:  # a prefetch for the next step brought it during earlier waves
            _compute_when_landed(run, run.time, key)
            continue
        run.outstanding += 1
        if expert.transfer != NONE:
            _promote(run, key)
        else:
            _prepare(run, expert, run.now, False)
            expert.demand = True
            place(run, run.demands).demand = key
            run.demands += 1


@njit(forceinline=True)
def _hold_wave(run: Any, hits: Any, wave: Any, next_wave: Any) -> None:
    """Hold only what one of several waves needs."""
    run.held = hits + next_wave - wave
    for index in range(hits):
        place(run, index).held = number(run.hits_at, index, INT32)
    for index in range(wave, next_wave):
        key = number(run.misses_at, index, INT32)
        place(run, hits + index - wave).held = key
        expert_of(run, key).hold = HELD


@njit(forceinline=True)
def _release(run: Any) -> None:
    """Let go of what the event, or its last wave, holds."""
    experts_at, places_at = run.experts_at, run.places_at
    for index in range(run.held):
        record(experts_at, record(places_at, index, PLACE).held, EXPERT).hold = FREE


@njit(forceinline=True)
def _compute_when_landed(run: Any, landed: Any, key: Any) -> None:
    """Let the compute stream wait for an expert of the running event, and compute it."""
    if landed > run.compute:
        run.waited += landed - run.compute
        run.compute = landed
    run.compute += place(run, key - run.first_key).takes


@njit(forceinline=True)
def _drop_stale_prefetches(run: Any) -> None:
    """Take out of the queue what was predicted for this event and is not needed."""
    key = run.oldest
    while key != NOTHING:
        expert = expert_of(run, key)
        newer = expert.newer
        if expert.target <= run.now and not expert.refresh and expert.needed != run.now:
            _unqueue(run, key)
            _give_up(run, key)
        key = newer


@njit
def _end_event(run: Any) -> None:
    """Let go of what the event held: done when the first to care, link or next event, comes by."""
    ns = run.release_ns
    run.release_ns = NEVER
    _release(run)
    this = coming(run, 0)
    for index in range(this.prefetched):
        key = cell(this, index).prefetched
        expert = expert_of(run, key)
        cell(this, key - run.first_key).listed = False
        if expert.unused == run.now and expert.transfer == NONE:
            expert_of(run, key).hold = FREE
            if run.drop_unused_prefetches:
                _evict(run, key, ns)
    this.prefetched = 0
    _note(run, ns, ENDS, NOTHING)


# ---- prediction --------------------------------------------------------------------------------------------------


@njit
def _predict(run: Any) -> None:
    """Let the predictor learn from this event, and queue what the prefetch rule takes of its predictions."""
    step = step_of(run)
    put(run.seen_at, 0, run.now, INT64)
    put(run.seen_at, 1, run.layer, INT64)
    put(run.seen_at, 2, step.first_row, INT64)
    put(run.seen_at, 3, step.last_row, INT64)
    tokens = step.last_row - step.first_row
    if run.observe_entry and call(run.observe_entry, run.predictor_state, 0, 0, 0, 0) == FAILED:
        run.broken = BY_EXCEPTION
    most = call(run.most_entry, run.prefetch_state, tokens, 0, 0, 0)
    for ahead in range(1, run.depth + 1):
        if run.now + ahead >= run.events:
            return
        count = call(run.predict_entry, run.predictor_state, ahead, min(most, run.experts), 0, 0) if most >= 0 else most
        taken = call(run.take_entry, run.prefetch_state, count, 0, 0, 0) if count > 0 and run.take_entry else count
        if most == FAILED or count == FAILED or taken == FAILED:
            run.broken = BY_EXCEPTION
            return
        if count < 0 or count > min(most, run.experts) or taken < 0 or taken > count:
            run.broken = BY_PREDICTION
            run.broken_by = count if taken == count else taken
            return
        if count == 0:
            continue
        layer = run.layer + ahead
        while layer >= run.layers:
            layer -= run.layers
        first_key = layer * run.experts
        event = coming(run, ahead)
        event.first_key = first_key
        event.predicted = max(event.predicted, 0)
        for index in range(taken):
            chosen = number(run.ids_at, index, INT64)
            if chosen < 0 or chosen >= run.experts:
                run.broken = BY_PREDICTION
                run.broken_by = chosen
                return
            if not cell(event, chosen).predicted:
                cell(event, chosen).predicted = True
                cell(event, event.predicted).choice = chosen
                event.predicted += 1
            expert = expert_of(run, first_key + chosen)
            if not expert.resident and expert.transfer == NONE:
                _queue(run, first_key + chosen, run.now + ahead, False)


# ---- slots -------------------------------------------------------------------------------------------------------


@njit
def _start_transfer(
    run: Any,
    key: Any,
    ns: Any,
) -> Any:
    """Reserve the slot of a transfer that is about to start; a prefetch that finds none is given up."""
    expert = expert_of(run, key)
    if expert.refresh:
        expert_of(run, key).hold = HELD
        _note(run, ns, REFRESH, key)
        return True
    if not _take_slot(run, key, ns):
        run.cancelled += 1
        expert.transfer = NONE
        _note(run, ns, CANCEL, key)
        return False
    expert_of(run, key).hold = HELD
    expert.resident = True
    pool_of(run, expert.pool).taken += 1
    run.taken += 1
    run.peak_slots = max(run.peak_slots, run.taken)
    if expert.demand:
        run.demand_bytes += run.expert_bytes
        _note(run, ns, LOADS, key)
    else:
        run.prefetches += 1
        expert.unused = expert.target
        event = coming(run, expert.target - run.now)
        expected = cell(event, key - event.first_key)
        if not expected.listed:
            expected.listed = True
            cell(event, event.prefetched).prefetched = key
            event.prefetched += 1
        _note(run, ns, PREFETCHES, key)
    return True


@njit
def _take_slot(
    run: Any,
    key: Any,
    ns: Any,
) -> Any:
    """Find a slot for `key`: a free one, or that of an expert that nothing needs; for a demand also one that was prefetched
    for a coming event, or that of a paused prefetch."""
    if run.time >= run.release_ns:
        _end_event(run)
    pool = expert_of(run, key).pool
    limit = ROOM if pool_of(run, pool).taken < pool_of(run, pool).capacity else AWAITED
    leaving = call(run.admit_entry, run.eviction_state, key, pool, limit, run.now)
    if leaving == REFUSED and expert_of(run, key).demand:
        limit = HELD
        leaving = call(run.admit_entry, run.eviction_state, key, pool, limit, run.now)
        if leaving == REFUSED:
            paused = run.oldest
            while paused != NOTHING and not (
                expert_of(run, paused).transfer == STARTED and expert_of(run, paused).pool == pool
            ):
                paused = expert_of(run, paused).newer
            if paused == NOTHING:
                run.broken = BY_HOLDING
                return True
            _unqueue(run, paused)
            _give_up(run, paused)
            limit = ROOM
            leaving = call(run.admit_entry, run.eviction_state, key, pool, limit, run.now)
    if leaving == REFUSED:
        return False
    if leaving == FAILED:
        run.broken = BY_EXCEPTION
    elif limit != ROOM:
        if (
            leaving < 0
            or leaving >= run.keys
            or expert_of(run, leaving).pool != pool
            or not expert_of(run, leaving).resident
            or expert_of(run, leaving).hold >= limit
        ):
            run.broken = BY_VICTIM
            run.broken_by = leaving
        else:
            _forget(run, leaving, ns)
    return True


@njit
def _evict(run: Any, key: Any, ns: Any) -> None:
    """Take a slot away for another reason than to make room."""
    if call(run.evicted_entry, run.eviction_state, key, expert_of(run, key).pool, run.now, 0) == FAILED:
        run.broken = BY_EXCEPTION
    _forget(run, key, ns)


@njit(forceinline=True)
def _forget(run: Any, key: Any, ns: Any) -> None:
    """Note a lost slot: a prefetch that was never used turns out wasted, a queued renewal is not needed."""
    expert = expert_of(run, key)
    expert.resident = False
    pool_of(run, expert.pool).taken -= 1
    run.taken -= 1
    if expert.unused >= 0:
        expert.unused = -1
        run.wasted_bytes += run.expert_bytes
    if expert.transfer != NONE:
        expert.transfer = NONE
        _unqueue(run, key)
    _note(run, ns, EVICT, key)


@njit
def _give_up(run: Any, key: Any) -> None:
    """Drop a transfer that nobody waits for; a paused one gives its slot back and has moved bytes for nothing."""
    expert = expert_of(run, key)
    started = expert.transfer == STARTED
    expert.transfer = NONE
    run.cancelled += 1
    _note(run, run.time, CANCEL, key)
    if started:
        expert.unused = -1
        moved = (run.chunks - expert.chunks_left) * run.chunk_bytes
        if expert.refresh:
            run.refresh_bytes += moved
        else:
            run.wasted_bytes += moved
        _evict(run, key, run.time)


# ---- link --------------------------------------------------------------------------------------------------------


@njit
def _let_link_act(run: Any, until: Any) -> None:
    """Serve what was put into the queues, and let time pass to `until`; longer, if an event waits for transfers."""
    if run.demands and run.moving != NOTHING and not expert_of(run, run.moving).demand:
        _ask_to_give_way(run, expert_of(run, run.moving))
    while not run.broken:
        if run.moving == NOTHING:
            if run.demands:
                _serve_demands(run)
                until = max(until, run.time)  # what else happens at this instant comes before the host goes on
            _serve_prefetch(run)
        if run.moving == NOTHING or (run.alarm_ns > until and run.outstanding == 0):
            break
        run.time = run.alarm_ns
        if run.outstanding:
            until = run.time
        moving = expert_of(run, run.moving)
        if run.alarm == GIVE_WAY:
            _give_way(run, moving)
        else:
            run.busy_ns += run.time - run.moving_since
            key = run.moving
            run.moving = NOTHING
            _land(run, key, run.time)
    run.time = max(run.time, until)


@njit(forceinline=True)
def _serve_demands(run: Any) -> None:
    """Serve the waiting demands as one train: nothing interrupts it, and the host waits for its end."""
    ns = run.time
    for index in range(run.demands):
        key = place(run, index).demand
        expert = expert_of(run, key)
        if expert.transfer != STARTED:
            _start_transfer(run, key, ns)
        ns += (expert.chunks_left - 1) * run.chunk_ns + run.last_chunk_ns
        expert.transfer = NONE
        if expert.refresh:
            run.refresh_bytes += run.expert_bytes
        _compute_when_landed(run, ns, key)
        place(run, index).landed_ns = ns
    if run.logging:
        for index in range(run.demands):
            _note(run, place(run, index).landed_ns, LANDED, place(run, index).demand)
    run.outstanding -= run.demands
    run.demands = 0
    run.busy_ns += ns - run.time
    run.time = ns


@njit(forceinline=True)
def _serve_prefetch(run: Any) -> None:
    """Start the first prefetch that gets a slot."""
    while run.oldest != NOTHING and not run.broken:
        key = run.oldest
        expert = expert_of(run, key)
        _unqueue(run, key)
        if expert.transfer == STARTED or _start_transfer(run, key, run.time):
            expert.transfer = STARTED
            run.moving = key
            run.moving_since = run.time
            run.alarm = END
            run.alarm_ns = run.time + (expert.chunks_left - 1) * run.chunk_ns + run.last_chunk_ns
            return


@njit(forceinline=True)
def _ask_to_give_way(run: Any, moving: Any) -> None:
    """Let a prefetch stop at the end of the chunk that is moving, unless that is its last."""
    if run.chunk_ns == 0 or moving.chunks_left == 1:
        return
    elapsed = run.time - run.moving_since
    chunks = max(1, -(-elapsed // run.chunk_ns))
    if chunks < moving.chunks_left:
        run.alarm = GIVE_WAY
        run.alarm_ns = run.moving_since + chunks * run.chunk_ns


@njit(forceinline=True)
def _give_way(run: Any, moving: Any) -> None:
    """Pause the prefetch on the link at a chunk's end, if a demand is still waiting; keep it if its event is to come."""
    elapsed = run.time - run.moving_since
    chunks = elapsed // run.chunk_ns
    if moving.demand or run.demands == 0:  # promoted meanwhile: go on to the end
        run.alarm = END
        run.alarm_ns = run.time + (moving.chunks_left - 1 - chunks) * run.chunk_ns + run.last_chunk_ns
        return
    run.busy_ns += elapsed
    moving.chunks_left -= chunks
    key = run.moving
    run.moving = NOTHING
    if moving.refresh or moving.target > run.now:
        moving.older = NOTHING
        moving.newer = run.oldest
        if run.oldest == NOTHING:
            run.newest = key
        else:
            expert_of(run, run.oldest).older = key
        run.oldest = key
    else:
        _give_up(run, key)


@njit(forceinline=True)
def _land(run: Any, key: Any, ns: Any) -> None:
    """Make an expert usable, and note it where the event waits for it."""
    expert = expert_of(run, key)
    expert.transfer = NONE
    _note(run, ns, LANDED, key)
    if expert.refresh:
        run.refresh_bytes += run.expert_bytes
    if expert.demand:
        _compute_when_landed(run, ns, key)
        run.outstanding -= 1
    elif expert.refresh or expert.target <= run.now:
        expert_of(run, key).hold = FREE
        if run.drop_unused_prefetches and not expert.refresh:
            _evict(run, key, ns)
    else:
        expert_of(run, key).hold = AWAITED


@njit(forceinline=True)
def _promote(run: Any, key: Any) -> None:
    """Turn a prefetch, queued or on the link, into a demand; what has moved is kept."""
    expert_of(run, key).demand = True
    if key != run.moving:
        _unqueue(run, key)
        place(run, run.demands).demand = key
        run.demands += 1


@njit(forceinline=True)
def _prepare(run: Any, expert: Any, target: Any, refresh: Any) -> None:
    """Make a transfer of an expert that has none."""
    expert.transfer = QUEUED
    expert.target = target
    expert.refresh = refresh
    expert.demand = False
    expert.chunks_left = run.chunks


@njit(forceinline=True)
def _queue(run: Any, key: Any, target: Any, refresh: Any) -> None:
    """Put a new transfer at the end of the queue of prefetches."""
    _prepare(run, expert_of(run, key), target, refresh)
    expert_of(run, key).older = run.newest
    expert_of(run, key).newer = NOTHING
    if run.newest == NOTHING:
        run.oldest = key
    else:
        expert_of(run, run.newest).newer = key
    run.newest = key


@njit(forceinline=True)
def _unqueue(run: Any, key: Any) -> None:
    """Take a transfer out of the queue of prefetches."""
    older, newer = expert_of(run, key).older, expert_of(run, key).newer
    if older == NOTHING:
        run.oldest = newer
    else:
        expert_of(run, older).newer = newer
    if newer == NOTHING:
        run.newest = older
    else:
        expert_of(run, newer).older = older


# ---- counters ----------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _close_step(run: Any, step: Any) -> None:
    step.computed, step.waited, step.host_idle = run.computed, run.waited, run.host_idle
    step.hits, step.late_hits, step.misses = run.hits, run.late_hits, run.misses
    run.computed, run.waited, run.host_idle = 0, 0, 0
    run.hits, run.late_hits, run.misses = 0, 0, 0


@njit(forceinline=True)
def _note(run: Any, ns: Any, what: Any, key: Any) -> None:
    if run.logging:
        entry = record(run.log_at, run.logged, LOG)
        entry.ns, entry.what, entry.key, entry.event = ns, what, key, run.now
        run.logged += 1

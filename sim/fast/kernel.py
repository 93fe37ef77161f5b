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
from sim.costs import NO_READOUT
from sim.fast.callbacks import NOBODY
from sim.fast.log import CANCEL, ENDS, EVICT, LANDED, LOADS, PREFETCHES, REFRESH, log_is_full, note, note_judged, note_train
from sim.fast.native import FAILED, call
from sim.fast.state import (
    CELL,
    EXPERT,
    INT8,
    INT32,
    INT64,
    NONE,
    QUEUED,
    STARTED,
    TRANSFER,
    cell,
    coming,
    expert_of,
    number,
    pool_of,
    put,
    record,
    step_of,
    transfer_of,
)

NOTHING = -1
"""No expert key."""

ONLY_SERVE = -1
"""A moment before all others: the link starts what it can, and no time passes."""

END, GIVE_WAY = range(2)
"""What the link's alarm means."""

BY_EXCEPTION, BY_VICTIM, BY_PREDICTION, BY_HOLDING = 1, 2, 3, 4
"""What stopped a run: a policy raised, chose a victim that may not leave, predicted what is none, or kept every slot."""


def run_part(runs: Any, stop: Any) -> Any:
    """Run on to event `stop`, or until the log is full or a policy broke the contract; return the event to go on with.

    Compiled by whoever calls it (`sim.fast.run`), which is also where the arguments are made.
    """
    run = runs[0]
    while run.now + 1 < stop and not run.broken:
        if log_is_full(run):
            break
        attention_ns = step_of(run).attention_ns
        if run.beside_ns:
            _let_link_act(run, max(run.compute, run.host))
            attention_ns += run.beside_ns * int(run.moving != NOTHING)
        # Attention and gate: they start as soon as issuing begins and end no earlier than it ends.
        issued = run.host + run.host_gate_ns
        gate_end = max(max(run.compute, run.host) + attention_ns, issued)
        run.computed += attention_ns + run.shared_ns
        run.host_idle += gate_end - run.compute - attention_ns
        known = gate_end + run.readout_ns
        _let_link_act(run, known + run.host_demand_ns)

        run.host = known + run.host_experts_ns
        _serve_event(run, gate_end + run.shared_ns)
        if run.depth:
            run.host += run.host_ahead_ns * min(run.depth, run.events - 1 - run.now)
        run.layer += 1
        if run.layer == run.layers:
            run.layer = 0
            step_ns = step_of(run).step_ns
            run.host += run.host_step_ns
            step_end = max(run.compute + step_ns, run.host)
            run.computed += step_ns
            run.host_idle += step_end - run.compute - step_ns
            run.compute = step_end
            if run.step_readout_ns != NO_READOUT:
                run.host = run.compute + run.step_readout_ns
            _close_step(run, step_of(run))
            run.step += 1
            if run.now + 1 == run.events:
                _let_link_act(run, run.compute)
    return run.now + 1


@njit(forceinline=True)
def _serve_event(run: Any, free: Any) -> None:
    """Decide, load and compute the experts of one (step, layer); the compute stream does nothing else from `free` on."""
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
    starts = max(run.host, free)
    run.host_idle += starts - free
    run.compute = starts + present_ns
    _begin_wave(run, awaited, wave, next_wave)
    if run.depth:
        _predict(run)
    arrivals = awaited + next_wave
    if arrivals and hits > awaited:
        _take_longer(run, 1)
    _let_link_act(run, ONLY_SERVE)
    if arrivals:
        _let_last_be_quick(run)
    elif hits and run.moving != NOTHING:
        _take_longer(run, 1)
    while next_wave < absent and not run.broken:
        _let_link_act(run, max(run.compute, run.time))
        _release(run)
        wave, next_wave = next_wave, min(absent, next_wave + slots)
        _hold_wave(run, 0, wave, next_wave)
        _begin_wave(run, 0, wave, next_wave)
        _let_link_act(run, ONLY_SERVE)
        _let_last_be_quick(run)
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
    count, keys_at, tokens_at = stop - start, run.keys_at + start * 4, run.tokens_at + start * 4
    experts_at, holds_at, expert_ns_at = run.experts_at, run.holds_at, run.expert_ns_at
    hits_at, misses_at, awaited_at = run.hits_at, run.misses_at, run.demands_at
    takes_at, arrival_ns = run.takes_at - first_key * 8, run.group_ns + run.beside_ns
    run.held, run.held_at = count, keys_at
    hits = awaited = late = first_uses = present_ns = total_ns = 0
    for index in range(count):
        key = number(keys_at, index, INT32)
        takes = number(expert_ns_at, number(tokens_at, index, INT32), INT64)
        expert = record(experts_at, key, EXPERT)
        expert.needed = now
        put(holds_at, key, HELD, INT8)  # until the event ends; for those that have no slot it means nothing
        put(takes_at, key, takes + arrival_ns, INT64)  # read of those that are waited for
        # All lists are written and some of them grow: nobody, no processor either, foresees which.
        put(hits_at, hits, key, INT32)
        put(misses_at, index - hits, key, INT32)
        put(awaited_at, awaited, key, INT32)
        resident = int(expert.resident)
        in_flight = resident & int(expert.transfer)
        not_first = expert.unused >> 31  # -1 where it was not prefetched, or used since; 0 otherwise
        hits += resident
        awaited += in_flight
        present_ns += (resident - in_flight) * takes
        total_ns += takes
        expert.unused = NOTHING
        first_uses += 1 + not_first
        late += in_flight & ~not_first
    absent = count - hits
    run.late_bytes += late * run.expert_bytes
    run.useful_bytes += (first_uses - late) * run.expert_bytes
    note_judged(run, hits, awaited, absent)
    if count and call(run.event_entry, run.eviction_state, hits, absent, pool, run.now) == FAILED:
        _stop(run, BY_EXCEPTION, NOTHING)
    together = run.group_ns * int(hits > awaited)
    run.computed += total_ns + together + (awaited + absent) * arrival_ns
    run.hits += hits - awaited
    run.late_hits += awaited
    run.misses += absent
    this = coming(run, 0)
    if this.predicted >= 0:
        run.predicted += this.predicted
        run.needed_after_prediction += count
        stale = needed = 0
        cells_at = this.cells_at
        for index in range(this.predicted):
            chosen = record(cells_at, index, CELL).choice
            record(cells_at, chosen, CELL).predicted = False
            expert = record(experts_at, first_key + chosen, EXPERT)
            hit = int(expert.needed == now)
            needed += hit
            stale |= (1 - hit) & int(expert.transfer != NONE)
        run.predicted_and_needed += needed
        this.predicted = NOTHING
        if stale:
            _drop_stale_prefetches(run)
    return hits, awaited, absent, present_ns + together


@njit(forceinline=True)
def _begin_wave(run: Any, awaited: Any, wave: Any, next_wave: Any) -> None:
    """Ask the link for what the wave lacks: what is partly here first, then in routed order."""
    for index in range(awaited):
        _demand(run, number(run.demands_at, index, INT32))  # where it is put in again
    for index in range(wave, next_wave):
        key = number(run.misses_at, index, INT32)
        if expert_of(run, key).resident and expert_of(run, key).transfer == NONE:
            # A prefetch for the next step brought it during earlier waves.
            _compute_when_landed(run, run.time, key)
        else:
            _demand(run, key)


@njit(forceinline=True)
def _take_longer(run: Any, groups: Any) -> None:
    """Let the compute stream take as much longer as `groups` take beside a busy link."""
    run.compute += groups * run.beside_ns
    run.computed += groups * run.beside_ns


@njit(forceinline=True)
def _let_last_be_quick(run: Any) -> None:
    """Take back what the last expert that landed takes longer, if the link is idle since."""
    _take_longer(run, -int(run.moving == NOTHING))


@njit(forceinline=True)
def _hold_wave(run: Any, hits: Any, wave: Any, next_wave: Any) -> None:
    """Hold only what one of several waves needs."""
    run.held, run.held_at = hits + next_wave - wave, run.wave_at
    for index in range(hits):
        put(run.wave_at, index, number(run.hits_at, index, INT32), INT32)
    for index in range(wave, next_wave):
        key = number(run.misses_at, index, INT32)
        put(run.wave_at, hits + index - wave, key, INT32)
        put(run.holds_at, key, HELD, INT8)


@njit(forceinline=True)
def _release(run: Any) -> None:
    """Let go of what the event, or its last wave, holds."""
    holds_at, held_at = run.holds_at, run.held_at
    for index in range(run.held):
        put(holds_at, number(held_at, index, INT32), FREE, INT8)


@njit(forceinline=True)
def _compute_when_landed(run: Any, landed: Any, key: Any) -> None:
    """Let the compute stream wait for an expert of the running event, and compute it."""
    if landed > run.compute:
        run.waited += landed - run.compute
        run.compute = landed
    run.compute += number(run.takes_at, key - run.first_key, INT64)


@njit(forceinline=True)
def _drop_stale_prefetches(run: Any) -> None:
    """Take out of the queue what was predicted for this event and is not needed."""
    key = _oldest(run)
    while key != run.keys:
        expert, transfer = expert_of(run, key), transfer_of(run, key)
        newer = transfer.newer
        if transfer.target <= run.now and not expert.refresh and expert.needed != run.now:
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
    cells_at, experts_at, now, first_key = this.cells_at, run.experts_at, run.now, run.first_key
    for index in range(this.prefetched):
        key = record(cells_at, index, CELL).prefetched
        expert = record(experts_at, key, EXPERT)
        record(cells_at, key - first_key, CELL).listed = False
        if expert.unused == now and expert.transfer == NONE:
            put(run.holds_at, key, FREE, INT8)
            if run.drop_unused_prefetches:
                _evict(run, key, ns)
    this.prefetched = 0
    note(run, ns, ENDS, NOTHING)


# ---- prediction --------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _predict(run: Any) -> None:
    """Let the predictor learn from this event, and queue what the prefetch rule takes of its predictions."""
    step = step_of(run)
    seen_at = run.seen_at
    put(seen_at, 0, run.now, INT64)
    put(seen_at, 1, run.layer, INT64)
    put(seen_at, 2, step.first_row, INT64)
    put(seen_at, 3, step.last_row, INT64)
    put(seen_at, 4, step.first_float, INT64)
    tokens = step.last_row - step.first_row
    if run.observe_entry and call(run.observe_entry, run.predictor_state, 0, 0, 0, 0) == FAILED:
        _stop(run, BY_EXCEPTION, NOTHING)
        return
    most = call(run.most_entry, run.prefetch_state, tokens, 0, 0, 0)
    for ahead in range(1, run.depth + 1):
        if run.now + ahead >= run.events:
            return
        count = call(run.predict_entry, run.predictor_state, ahead, min(most, run.experts), 0, 0) if most >= 0 else most
        taken = call(run.take_entry, run.prefetch_state, count, 0, 0, 0) if count > 0 and run.take_entry else count
        if most == FAILED or count == FAILED or taken == FAILED:
            _stop(run, BY_EXCEPTION, NOTHING)
            return
        if count < 0 or count > min(most, run.experts) or taken < 0 or taken > count:
            _stop(run, BY_PREDICTION, count if taken == count else taken)
            return
        if count == 0:
            continue
        layer = run.layer + ahead
        while layer >= run.layers:
            layer -= run.layers
        first_key = layer * run.experts
        event = coming(run, ahead)
        event.first_key = first_key
        predicted = max(event.predicted, 0)
        cells_at, experts_at, wanted_at, ids_at = event.cells_at, run.experts_at, run.wanted_at, run.ids_at
        wanted, experts = 0, run.experts
        for index in range(taken):
            chosen = number(ids_at, index, INT64)
            if chosen < 0 or chosen >= experts:
                _stop(run, BY_PREDICTION, chosen)
                return
            entry = record(cells_at, chosen, CELL)
            if not entry.predicted:
                entry.predicted = True
                record(cells_at, predicted, CELL).choice = chosen
                predicted += 1
            key = first_key + chosen
            expert = record(experts_at, key, EXPERT)
            put(wanted_at, wanted, key, INT32)
            wanted += int((int(expert.resident) | expert.transfer) == NONE)
        for index in range(wanted):
            key = number(wanted_at, index, INT32)
            if expert_of(run, key).transfer == NONE:  # the predictor may have named it twice
                _queue(run, key, run.now + ahead, False)
        event.predicted = predicted


# ---- slots -------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _admit_demands(run: Any, first: Any) -> Any:
    """Let the eviction policy give slots to the waiting demands from number `first` on; return how far it came.

    Where nobody may leave, a paused prefetch gives its slot back.
    """
    pool = expert_of(run, run.first_key).pool
    put(run.room_at, 1, HELD, INT64)
    while not run.broken:
        put(run.room_at, 0, pool_of(run, pool).capacity - pool_of(run, pool).taken, INT64)
        reached = call(run.admit_entry, run.eviction_state, first, run.demands, pool, run.now)
        if reached > first:
            return reached
        if reached < 0:
            _stop_admitting(run, reached)
            return first
        paused = _oldest(run)
        while paused != run.keys and (expert_of(run, paused).transfer != STARTED or expert_of(run, paused).pool != pool):
            paused = transfer_of(run, paused).newer
        if paused == run.keys:
            _stop(run, BY_HOLDING, NOTHING)
        else:
            _unqueue(run, paused)
            _give_up(run, paused)
    return first


@njit(forceinline=True)
def _admit_prefetch(run: Any, key: Any) -> Any:
    """Let the eviction policy give a prefetch a slot that is free, or that of an expert that nothing needs."""
    if run.time >= run.release_ns:
        _end_event(run)
    pool = expert_of(run, key).pool
    put(run.room_at, 0, pool_of(run, pool).capacity - pool_of(run, pool).taken, INT64)
    put(run.room_at, 1, AWAITED, INT64)
    put(run.demands_at, 0, key, INT32)
    reached = call(run.admit_entry, run.eviction_state, 0, 1, pool, run.now)
    if reached < 0:
        _stop_admitting(run, reached)
    return reached == 1


@njit
def _stop_admitting(run: Any, reached: Any) -> None:
    """Stop the run because of what the eviction policy did."""
    if reached == FAILED:
        _stop(run, BY_EXCEPTION, NOTHING)
    else:
        _stop(run, BY_VICTIM, number(run.room_at, 0, INT64))


@njit(forceinline=True)
def _count_taken(run: Any, pool: Any, more: Any) -> None:
    """Count slots of a pool that are no longer free."""
    pool_of(run, pool).taken += more
    run.taken += more
    run.peak_slots = max(run.peak_slots, run.taken)


@njit
def _start_prefetch(run: Any, key: Any) -> Any:
    """Reserve the slot of a prefetch that is about to start; one that finds none is given up."""
    expert, ns = expert_of(run, key), run.time
    if expert.refresh:
        put(run.holds_at, key, HELD, INT8)
        note(run, ns, REFRESH, key)
        return True
    if not _admit_prefetch(run, key):
        run.cancelled += 1
        expert.transfer = NONE
        note(run, ns, CANCEL, key)
        return False
    leaving = number(run.left_at, 0, INT32)
    if leaving == NOBODY:
        _count_taken(run, expert.pool, 1)
    else:
        _forget(run, leaving, expert.pool, ns)
    expert.resident = True
    put(run.holds_at, key, HELD, INT8)
    run.prefetches += 1
    expert.unused = target = transfer_of(run, key).target
    event = coming(run, target - run.now)
    expected = cell(event, key - event.first_key)
    if not expected.listed:
        expected.listed = True
        cell(event, event.prefetched).prefetched = key
        event.prefetched += 1
    note(run, ns, PREFETCHES, key)
    return True


@njit
def _evict(run: Any, key: Any, ns: Any) -> None:
    """Take a slot away for another reason than to make room."""
    if call(run.evicted_entry, run.eviction_state, key, expert_of(run, key).pool, run.now, 0) == FAILED:
        _stop(run, BY_EXCEPTION, NOTHING)
    _count_taken(run, expert_of(run, key).pool, -1)
    put(run.holds_at, key, HELD, INT8)
    _forget(run, key, expert_of(run, key).pool, ns)


@njit(forceinline=True)
def _forget(run: Any, key: Any, pool: Any, ns: Any) -> None:
    """Note a lost slot: a prefetch that was never used turns out wasted, a queued renewal is not needed."""
    expert = expert_of(run, key)
    expert.resident = False
    if expert.pool != pool:
        _stop(run, BY_VICTIM, key)
    run.wasted_bytes += int(expert.unused >= 0) * run.expert_bytes
    expert.unused = NOTHING
    if expert.transfer != NONE:
        _end_transfer(run, key)
        _unqueue(run, key)
    note(run, ns, EVICT, key)


@njit
def _give_up(run: Any, key: Any) -> None:
    """Drop a transfer that nobody waits for; a paused one gives its slot back and has moved bytes for nothing."""
    expert = expert_of(run, key)
    started, refresh = expert.transfer == STARTED, expert.refresh
    moved = (run.chunks - transfer_of(run, key).chunks_left) * run.chunk_bytes
    _end_transfer(run, key)
    run.cancelled += 1
    note(run, run.time, CANCEL, key)
    if started:
        expert.unused = NOTHING
        if refresh:
            run.refresh_bytes += moved
        else:
            run.wasted_bytes += moved
        _evict(run, key, run.time)


# ---- link --------------------------------------------------------------------------------------------------------


@njit
def _let_link_act(run: Any, until: Any) -> None:
    """Serve what was put into the queues, and let time pass to `until`; longer, if an event waits for transfers."""
    if run.demands and run.moving != NOTHING and not expert_of(run, run.moving).demand:
        _ask_to_give_way(run)
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
        if run.alarm == GIVE_WAY:
            _give_way(run)
        else:
            run.busy_ns += run.time - run.moving_since
            key = run.moving
            run.moving = NOTHING
            _land(run, key, run.time)
    run.time = max(run.time, until)


@njit(forceinline=True)
def _serve_demands(run: Any) -> None:
    """Serve the waiting demands as one train: nothing interrupts it, and the host waits for its end."""
    ns, compute, waited, start_ns = run.time, run.compute, run.waited, _start_ns(run)
    experts_at, demands_at, left_at, demand_ns_at = run.experts_at, run.demands_at, run.left_at, run.demand_ns_at
    landed_at, takes_at = run.landed_at, run.takes_at - run.first_key * 8
    admitted = loads = 0
    for index in range(run.demands):
        if index == admitted:
            admitted = _admit_demands(run, index)
            if run.broken:
                return
        key = number(demands_at, index, INT32)
        expert = record(experts_at, key, EXPERT)
        if expert.transfer != STARTED and not expert.refresh:
            leaving = number(left_at, index, INT32)
            if leaving == NOBODY:
                _count_taken(run, expert.pool, 1)
            else:
                _forget(run, leaving, expert.pool, ns)
            expert.resident = True
            loads += 1
            note(run, ns, LOADS, key)
        elif expert.refresh:
            run.refresh_bytes += run.expert_bytes
            if expert.transfer != STARTED:
                note(run, ns, REFRESH, key)
        ns += start_ns + number(demand_ns_at, transfer_of(run, key).chunks_left, INT64)
        _end_transfer(run, key)
        start_ns = 0
        waited += max(ns - compute, 0)
        compute = max(ns, compute) + number(takes_at, key, INT64)
        put(landed_at, index, ns, INT64)
    run.compute, run.waited = compute, waited
    run.demand_bytes += loads * run.expert_bytes
    note_train(run)
    run.outstanding -= run.demands
    run.demands = 0
    run.busy_ns += ns - run.time
    run.alarm_ns = run.time = ns


@njit(forceinline=True)
def _serve_prefetch(run: Any) -> None:
    """Start the first prefetch that gets a slot."""
    while _oldest(run) != run.keys and not run.broken:
        key = _oldest(run)
        expert = expert_of(run, key)
        _unqueue(run, key)
        if expert.transfer == STARTED or _start_prefetch(run, key):
            expert.transfer = STARTED
            run.moving = key
            run.alarm = END
            start_ns = _start_ns(run)
            run.busy_ns += start_ns
            run.moving_since = run.time + start_ns
            run.alarm_ns = run.moving_since + (transfer_of(run, key).chunks_left - 1) * run.chunk_ns + run.last_chunk_ns
            return


@njit(forceinline=True)
def _start_ns(run: Any) -> Any:
    """Return what the first chunk takes longer if the link was idle; the last alarm was when it ended what it did before."""
    return 0 if run.alarm_ns == run.time else run.link_start_ns


@njit(forceinline=True)
def _ask_to_give_way(run: Any) -> None:
    """Let a prefetch stop at the end of what the copy engine was given of it, unless that ends it."""
    chunks_left = transfer_of(run, run.moving).chunks_left
    if run.chunk_ns == 0 or chunks_left == 1:
        return
    elapsed = run.time - run.moving_since
    chunks = max(1, -(-elapsed // run.chunk_ns)) + run.committed_chunks
    if chunks < chunks_left:
        run.alarm = GIVE_WAY
        run.alarm_ns = run.moving_since + chunks * run.chunk_ns


@njit(forceinline=True)
def _give_way(run: Any) -> None:
    """Pause the prefetch on the link at a chunk's end, if a demand is still waiting; keep it if its event is to come."""
    key = run.moving
    expert, transfer = expert_of(run, key), transfer_of(run, key)
    elapsed = run.time - run.moving_since
    chunks = elapsed // run.chunk_ns
    if expert.demand or run.demands == 0:  # promoted meanwhile: go on to the end
        run.alarm = END
        run.alarm_ns = run.time + (transfer.chunks_left - 1 - chunks) * run.chunk_ns + run.last_chunk_ns
        return
    run.busy_ns += elapsed
    transfer.chunks_left -= chunks
    run.moving = NOTHING
    if expert.refresh or transfer.target > run.now:
        _link(run, key, run.keys, _oldest(run))
    else:
        _give_up(run, key)


@njit(forceinline=True)
def _land(run: Any, key: Any, ns: Any) -> None:
    """Make an expert usable, and note it where the event waits for it."""
    expert = expert_of(run, key)
    refresh = expert.refresh
    _end_transfer(run, key)
    note(run, ns, LANDED, key)
    if refresh:
        run.refresh_bytes += run.expert_bytes
    if expert.demand:
        _compute_when_landed(run, ns, key)
        run.outstanding -= 1
    elif refresh or transfer_of(run, key).target <= run.now:
        put(run.holds_at, key, FREE, INT8)
        if run.drop_unused_prefetches and not refresh:
            _evict(run, key, ns)
    else:
        put(run.holds_at, key, AWAITED, INT8)


@njit(forceinline=True)
def _demand(run: Any, key: Any) -> None:
    """Let the running event wait for an expert: a prefetch that is queued or on the link becomes a demand, from where it is.

    Nobody foresees whether there is one, so nothing here is a branch.
    """
    expert = expert_of(run, key)
    expert.transfer |= QUEUED
    expert.demand = True
    _unqueue(run, key)
    put(run.demands_at, run.demands, key, INT32)
    run.demands += int(key != run.moving)
    run.outstanding += 1


@njit(forceinline=True)
def _queue(run: Any, key: Any, target: Any, refresh: Any) -> None:
    """Make a transfer of an expert that has none, and put it at the end of the queue of prefetches."""
    expert, transfer = expert_of(run, key), transfer_of(run, key)
    expert.transfer = QUEUED
    expert.refresh = refresh
    expert.demand = False
    transfer.target = target
    _link(run, key, transfer_of(run, run.keys).older, run.keys)


@njit(forceinline=True)
def _end_transfer(run: Any, key: Any) -> None:
    """Forget the transfer of an expert, so that its record is ready for the next one."""
    expert = expert_of(run, key)
    expert.transfer = NONE
    expert.refresh = False
    transfer_of(run, key).chunks_left = run.chunks


@njit(forceinline=True)
def _oldest(run: Any) -> Any:
    """Return the first of the queue of prefetches: ``run.keys``, which stands for both of its ends, if it is empty."""
    return transfer_of(run, run.keys).newer


@njit(forceinline=True)
def _link(run: Any, key: Any, older: Any, newer: Any) -> None:
    """Put a transfer into the queue of prefetches, between two others or its ends."""
    transfers_at = run.transfers_at
    transfer = record(transfers_at, key, TRANSFER)
    transfer.older, transfer.newer = older, newer
    record(transfers_at, older, TRANSFER).newer = record(transfers_at, newer, TRANSFER).older = key


@njit(forceinline=True)
def _unqueue(run: Any, key: Any) -> None:
    """Take a transfer out of the queue of prefetches; one that is in no queue is linked to itself and stays so."""
    transfers_at = run.transfers_at
    transfer = record(transfers_at, key, TRANSFER)
    older, newer = transfer.older, transfer.newer
    record(transfers_at, older, TRANSFER).newer = newer
    record(transfers_at, newer, TRANSFER).older = older
    transfer.older = transfer.newer = key


@njit
def _stop(run: Any, why: Any, over: Any) -> None:
    """Note the first reason why the run cannot go on, and over which number."""
    if not run.broken:
        run.broken, run.broken_by = why, over


# ---- counters ----------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def _close_step(run: Any, step: Any) -> None:
    step.computed, step.waited, step.host_idle = run.computed, run.waited, run.host_idle
    step.hits, step.late_hits, step.misses = run.hits, run.late_hits, run.misses
    run.computed, run.waited, run.host_idle = 0, 0, 0
    run.hits, run.late_hits, run.misses = 0, 0, 0

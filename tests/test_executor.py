"""The executor on the CPU stand-in: slots in order whatever the timing, right contents, and the simulator's decisions."""

import pytest
from builders import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from offloading import EXPERT_BYTES, Lookers, Unheard, offload
from test_engines_agree import AXES, OneQueue, cases, composition
from test_turn import Raises

from policies.residency import ContractError
from policies.system import Composition
from real.device import COMPUTE, COPY, Device
from real.executor import Executor
from real.pump import Pump, Transfer
from real.schedule import HazardError, Schedule, SlotRead, SlotWrite
from real.standin import PACES, StandIn
from real.turn import Expected, Turn
from sim.conformance import build, costs_for, small_trace
from sim.fast.run import PolicyRaised
from sim.reference import run_reference
from sim.workload import make_workload
from traces.errors import InputError

DECISIONS = ("hit", "late_hit", "miss", "load", "evict")


def decisions(log):
    return [(what, key, event) for _, what, key, event in log if what in DECISIONS]


# ---- slots -------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=150)
def test_any_system_on_any_routing_at_any_timing(data):
    """The checker is on; besides, every expert reads its own bytes, each exactly once per event, and counts add up."""
    case = data.draw(cases())
    pace, copies = data.draw(st.sampled_from(PACES)), data.draw(st.sampled_from(PACES))
    executor, lookers, _ = offload(
        case.composition,
        case.workload,
        case.slots,
        pace=pace,
        copies=copies,
        seed=data.draw(st.integers(0, 99)),
        chunk=data.draw(st.integers(1, EXPERT_BYTES)),
        window=data.draw(st.integers(1, 3 * EXPERT_BYTES)),
        one_by_one=data.draw(st.booleans()),
        device=data.draw(st.sampled_from([StandIn, Unheard])),
    )
    assert all(contents == [key % 251] * EXPERT_BYTES for _, key, contents in lookers.used)
    events = case.workload.events
    computed = sorted((event, key) for event, key, _ in lookers.used)
    needed = [
        (event, key) for event in range(events.total) for key in events.keys[slice(*events.offsets[event : event + 2])]
    ]
    assert computed == sorted(needed)
    outcome = executor.outcome()
    assert outcome.hits.sum() + outcome.late_hits.sum() + outcome.misses.sum() == len(needed)
    assert outcome.peak_slots <= case.system().setting.capacity.sum()
    in_flight = sum(transfer.sent for transfer in executor.transfers.values() if not transfer.started)
    assert in_flight == 0
    unsettled = sum(EXPERT_BYTES - t.sent for t in executor.transfers.values() if t.started and not t.refresh)
    refreshing = sum(t.sent for t in executor.transfers.values() if t.refresh)
    assert outcome.bytes_sent == sum(outcome.bytes_by_kind.values()) - unsettled + refreshing


def forget(monkeypatch, stream):
    """Let the executor forget the waits of one stream."""
    right = Device.wait
    monkeypatch.setattr(
        Device, "wait", lambda self, waiting, on, ticket: waiting == stream or right(self, waiting, on, ticket)
    )


def test_a_read_that_does_not_wait_for_its_transfer_is_a_hazard(monkeypatch):
    forget(monkeypatch, COMPUTE)
    with pytest.raises(HazardError, match="read for expert 0 before it is filled"):
        offload(composition(), make_workload(make_trace([[[0, 1]]])), 2, pace="lazy")


def test_an_overwrite_that_does_not_wait_for_the_last_reader_is_a_hazard():
    schedule = Schedule(8)
    schedule.submit(COPY, (), [SlotWrite(0, 5, 0, 8)])
    schedule.record(COPY, 1)
    schedule.wait(COMPUTE, COPY, 1)
    schedule.submit(COMPUTE, [SlotRead(0, 5)], ())
    schedule.record(COMPUTE, 1)
    with pytest.raises(HazardError, match="slot 0 is overwritten with expert 6 before its last reader ended"):
        schedule.submit(COPY, (), [SlotWrite(0, 6, 0, 8)])


def test_an_overwrite_after_the_host_saw_the_reader_end_is_in_order():
    schedule = Schedule(8)
    schedule.submit(COPY, (), [SlotWrite(0, 5, 0, 8)])
    schedule.record(COPY, 1)
    schedule.wait(COMPUTE, COPY, 1)
    schedule.submit(COMPUTE, [SlotRead(0, 5)], ())
    schedule.record(COMPUTE, 1)
    schedule.saw(COMPUTE, 1)
    schedule.submit(COPY, (), [SlotWrite(0, 6, 0, 8)])
    assert (schedule.reads, schedule.writes) == (1, 2)


# ---- decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", AXES["eviction"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_demand_only_systems_decide_as_the_simulator_does(eviction, allocation):
    """Also with a batch whose events need waves, and where only the next gate says that an event is over."""
    tried = composition(eviction=eviction, allocation=allocation)
    for order, batch, slots in (("one_request", 1, 30), ("continuous", 3, 24)):
        workload = make_workload(small_trace(), order, batch)
        simulated = []
        run_reference(build(tried, workload, slots), workload, costs_for(workload), simulated)
        for pace, device in (("eager", StandIn), ("lazy", StandIn), ("lazy", Unheard)):
            _, _, log = offload(tried, workload, slots, pace=pace, device=device)
            assert decisions(log) == decisions(simulated)


def test_a_prefetch_that_lands_in_time_is_a_hit_and_one_in_flight_a_late_hit():
    tried = composition(predictor="oracle", prefetch="top_n")
    workload = make_workload(make_trace([[[0], [1]]]))
    what = {
        pace: [what for _, what, key, _ in offload(tried, workload, 2, pace=pace)[2] if key == 3]
        for pace in ("eager", "lazy")
    }
    assert what == {"eager": ["prefetch", "landed", "hit"], "lazy": ["prefetch", "late_hit", "landed"]}


@pytest.fixture
def order(monkeypatch):
    """Gates and copies in the order in which they are submitted."""
    found = []
    route, copy = Lookers.route, StandIn.copy
    monkeypatch.setattr(Lookers, "route", lambda self, *where: found.append(f"route {where}") or route(self, *where))
    monkeypatch.setattr(StandIn, "copy", lambda self, *what: found.append("copy") or copy(self, *what))
    return found


def test_a_prefetch_is_given_to_the_link_behind_a_demand_that_has_not_landed(order):
    """Or the link would stand still from the landing until the host has seen it."""
    tried = composition(predictor="oracle", prefetch="top_n")
    offload(tried, make_workload(make_trace([[[0], [1]]])), 2, pace="lazy", chunk=EXPERT_BYTES, window=1)
    assert order == ["route (0, 0)", "copy", "copy", "route (0, 1)"]


def test_where_all_is_there_the_next_gate_is_submitted_before_prefetches_and_else_after_them(order):
    tried = composition(predictor="oracle", prefetch="top_n")
    workload = make_workload(make_trace([[[0], [1], [2]], [[0], [1], [2]]]))
    offload(tried, workload, 9, pace="eager", chunk=EXPERT_BYTES, window=EXPERT_BYTES)
    assert order == [
        *("route (0, 0)", "copy", "copy"),  # a demand, behind it what the next layer needs
        *("route (0, 1)", "route (0, 2)", "copy"),
        *("route (1, 0)", "route (1, 1)", "route (1, 2)"),
    ]


@pytest.fixture
def of_last_step(monkeypatch):
    """What the executor itself submits in the second step: groups of experts, and demands in pieces."""
    found = []
    compute, copy = Lookers.compute, Executor._copy

    def watch(executor, transfer, start, stop):
        if executor.now >= 2 and transfer.demand:
            found.append(f"load {transfer.key}")
        copy(executor, transfer, start, stop)

    def computed(lookers, step, layer, slots):
        if step == 1:
            found.append(f"compute {sorted(slots)}")
        compute(lookers, step, layer, slots)

    monkeypatch.setattr(Executor, "_copy", watch)
    monkeypatch.setattr(Lookers, "compute", computed)
    return found


ONE_OF_TWO_STAYS = [[[0, 1], [0, 1]], [[0, 2], [0, 3]]]


def test_residents_are_submitted_before_demands_while_the_link_is_busy(of_last_step):
    """A prefetch is half sent, the rest of it becomes a demand: it stands behind the first half anyway."""
    tried = composition(predictor="oracle", prefetch="top_n")
    workload = make_workload(make_trace(ONE_OF_TWO_STAYS))
    offload(tried, workload, 8, pace="eager", copies="lazy", chunk=EXPERT_BYTES // 2, window=1)
    assert of_last_step == ["compute [0]", "load 2", "compute [2]", "compute [4]", "load 7", "compute [7]"]


def test_a_demand_is_given_to_an_idle_link_before_residents_are_submitted(of_last_step):
    """Where the turn may not start it, since renewals are queued."""
    offload(composition(reupload=True), make_workload(make_trace(ONE_OF_TWO_STAYS)), 8, pace="eager")
    assert of_last_step == ["load 2", "compute [0]", "compute [2]", "load 7", "compute [4]", "compute [7]"]


@pytest.mark.parametrize(
    ("silent", "sentence"),
    [
        ("gate", "the gate of layer 0 in step 0 did not come within 0 s: the device is lost"),
        ("sight", "what predictors see of layer 0 in step 0 did not come within 0 s: the device is lost"),
    ],
)
def test_a_device_that_is_silent_for_too_long_is_lost(monkeypatch, silent, sentence):
    monkeypatch.setattr("real.executor.SILENT_S", 0.0)
    monkeypatch.setattr(StandIn, "idle", lambda device: None)
    if silent == "gate":
        monkeypatch.setattr(Lookers, "route", lambda lookers, step, layer: None)
        monkeypatch.setattr(Lookers, "expected", lambda lookers, step, layer: Expected(0, 2, 2, 1))
    else:
        monkeypatch.setattr(Lookers, "read_sight", lambda lookers, step, layer: False)
    tried = composition(predictor="oracle", prefetch="top_n")
    with pytest.raises(InputError, match=sentence):
        offload(tried, make_workload(make_trace(ONE_OF_TWO_STAYS)), 8, pace="eager")


# ---- what the turn starts itself ---------------------------------------------------------------------------------


def test_nothing_is_started_by_the_turn_where_used_experts_are_brought_again(monkeypatch):
    """Renewals are queued whenever an event ends, even where the link is given all of them at once."""
    sent = []
    send = Turn.send
    monkeypatch.setattr(Turn, "send", lambda self, *arguments: sent.append(self) or send(self, *arguments))
    workload = make_workload(small_trace())
    executor, _, _ = offload(composition(reupload=True), workload, 30, pace="eager", window=1000)
    assert executor.outcome().bytes_by_kind["refresh"] > 0
    assert sent == []
    offload(composition(), workload, 30, pace="eager", window=1000)
    assert sent


class NotesCopies(StandIn):
    """Knows what its copy stream was given, in order: marks, and copies with their source."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.given = []
        """("mark", its number), or ("copy", source, bytes, whether the host knows the link to be idle)."""

    def copy(self, target, source, size):
        self.given.append(("copy", source, size, self._known[COPY] == self._recorded[COPY]))
        super().copy(target, source, size)

    def _queue_mark(self, stream, mark):
        if stream == COPY:
            self.given.append(("mark", mark))
        super()._queue_mark(stream, mark)


@pytest.mark.parametrize(
    ("pace", "chunk", "window"), [("eager", 3, 6), ("lazy", EXPERT_BYTES, 3 * EXPERT_BYTES), ("random", 3, 12)]
)
def test_marks_of_copies_are_those_of_the_copies_that_the_log_tells_of(pace, chunk, window):
    """One row per piece, between its marks, whoever started it; one that goes behind another begins with that one's end."""
    workload = make_workload(small_trace())
    tried = composition(predictor="previous_token", prefetch="top_n")
    executor, lookers, log = offload(
        tried, workload, 20, pace=pace, chunk=chunk, window=window, device=NotesCopies, marks=True
    )
    device, timeline = executor.device, executor.timeline
    places = [place for place, what in enumerate(device.given) if what[0] == "copy"]
    expected, sent, waited_for = [], {}, {(key, event) for _, what, key, event in log if what == "late_hit"}
    started = [(what, key, event) for _, what, key, event in log if what in ("load", "prefetch")]
    behind = 0
    for place, (event, size, demand, _, _) in zip(places, timeline.copy_marks().tolist(), strict=True):
        _, source, copied, idle = device.given[place]
        key, start = divmod(source - lookers.memory.experts, EXPERT_BYTES)
        before, after = device.given[place - 1], device.given[place + 1]
        assert (before[0], after[0], size) == ("mark", "mark", copied)
        assert idle == (place == 1 or device.given[place - 2][0] == "mark")  # whether it has a first mark of its own
        if start == 0:
            what, *began = started.pop(0)
            assert began == [key, event]
            sent[key] = 0
            assert demand == (what == "load")
        else:
            assert demand == ((key, event) in waited_for)
        assert start == sent[key]
        sent[key] += size
        behind += demand and not idle
        expected.append((event, size, demand, before[1], after[1]))
    assert started == []
    assert timeline._copies == expected
    assert (timeline.copy_marks()[:, 3] <= timeline.copy_marks()[:, 4]).all()
    assert behind or pace == "eager"
    # No mark is left of a turn that sent nothing.
    marks = {mark for *_, mark in timeline._marks} | {mark for what, mark, *_ in device.given if what == "mark"}
    assert marks == set(range(device.mark(COMPUTE)))


def test_a_demand_that_was_sent_is_in_flight_and_counts_as_no_prefetch():
    device, landed = StandIn("lazy"), []
    pump = Pump(device, EXPERT_BYTES, 3, 6, lambda transfer: True, lambda *piece: None, landed.append)
    transfer = Transfer(5, 0, demand=True)
    pump.note_sent(transfer, device.record(COPY))
    assert (transfer.started, transfer.sent, transfer.ticket) == (True, EXPERT_BYTES, 1)
    assert (list(pump.in_flight), pump.ahead_bytes, pump.bytes_sent) == ([(1, 0, transfer)], 0, EXPERT_BYTES)
    pump.poll()
    assert landed == []
    device.drain()
    pump.poll()
    assert (landed, len(pump.in_flight), pump.ahead_bytes) == ([transfer], 0, 0)


# ---- failures ----------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_ends_the_run_with_a_sentence():
    with pytest.raises(InputError, match="a host-to-device copy failed"):
        offload(composition(), make_workload(small_trace()), 16, fail_at_copy=7)


def test_a_copy_of_the_turn_s_own_that_fails_ends_the_run_too():
    with pytest.raises(InputError, match="a host-to-device copy failed"):
        offload(composition(), make_workload(make_trace([[[0]]])), 2, pace="eager", fail_at_copy=1)


def with_eviction(eviction, **parts):
    """Return a demand-only system with a policy of the test's."""
    return Composition("tried", {**composition(**parts).parts, "eviction": (eviction, {})})


def test_what_a_policy_raises_in_the_turn_ends_the_run():
    with pytest.raises((ValueError, PolicyRaised), match=r"no more|raised an exception"):
        offload(with_eviction(Raises), make_workload(make_trace([[[0]]])), 2)


def test_a_victim_of_another_pool_in_the_turn_ends_the_run_and_is_named():
    """Of two layers with a slot each: the second one's next expert would take the slot of the first one's."""
    workload = make_workload(make_trace([[[0], [0]], [[0], [1]]], expert_count=4))
    with pytest.raises(ContractError, match="chose expert key 0: a victim must be a resident"):
        offload(with_eviction(OneQueue, allocation="uniform"), workload, 2)


def test_waiting_for_what_was_never_submitted_is_a_defect():
    with pytest.raises(RuntimeError, match="never submitted"):
        StandIn().idle()

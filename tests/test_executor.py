"""The executor on the CPU stand-in: slots in order whatever the timing, right contents, and the simulator's decisions."""

import pytest
from builders import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from offloading import EXPERT_BYTES, Lookers, offload
from test_engines_agree import AXES, cases, composition

from real.device import COMPUTE, COPY, Device
from real.schedule import HazardError, Schedule, SlotRead, SlotWrite
from real.standin import PACES, StandIn
from sim.conformance import build, costs_for, small_trace
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


@pytest.mark.parametrize("pace", ["eager", "lazy"])
@pytest.mark.parametrize("eviction", AXES["eviction"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_demand_only_systems_decide_as_the_simulator_does(eviction, allocation, pace):
    """Also with a batch whose events need waves."""
    tried = composition(eviction=eviction, allocation=allocation)
    for order, batch, slots in (("one_request", 1, 30), ("continuous", 3, 24)):
        workload = make_workload(small_trace(), order, batch)
        simulated = []
        run_reference(build(tried, workload, slots), workload, costs_for(workload), simulated)
        _, _, log = offload(tried, workload, slots, pace=pace)
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


# ---- failures ----------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_ends_the_run_with_a_sentence():
    with pytest.raises(InputError, match="a host-to-device copy failed"):
        offload(composition(), make_workload(small_trace()), 16, fail_at_copy=7)


def test_waiting_for_what_was_never_submitted_is_a_defect():
    with pytest.raises(RuntimeError, match="never submitted"):
        StandIn().idle()

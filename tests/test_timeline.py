"""Where the time of a step went, from marks set by hand."""

import time

import numpy as np
import pytest

from real.device import COMPUTE, COPY
from real.standin import StandIn
from real.timeline import HOST_PARTS, Timeline, host_per_layer, spans_of


class Clock(StandIn):
    """A device whose marks have the times that a test gives."""

    def __init__(self):
        super().__init__()
        self.times = {COMPUTE: [], COPY: []}
        self.given = []

    def mark(self, stream):
        self.given.append(self.times[stream].pop(0))
        return len(self.given) - 1

    def mark_ns(self, mark):
        return self.given[mark]


@pytest.fixture
def timeline():
    """One step of two layers: the second waits for a transfer; two copies of 100 bytes each, one right after the other."""
    device = Clock()
    device.times[COMPUTE] = [0, 10, 13, 15, 25, 27, 37, 37, 40, 45, 60, 70, 71, 81]
    device.times[COPY] = [38, 50, 50, 60]
    timeline = Timeline(device, layers=2, marks=True)
    timeline.begin_step(0)  # 0
    timeline.begin_layer(0, 0)
    timeline.gate_issued()  # 10
    timeline.shared_issued()  # 13
    timeline.routed(time.perf_counter_ns())
    timeline.decided()
    timeline.mark_start()  # 15
    timeline.mark_end()  # 25
    timeline.experts_issued()
    timeline.begin_layer(0, 1)  # 27
    timeline.gate_issued()  # 37
    timeline.shared_issued()
    timeline.routed(time.perf_counter_ns())
    for _ in range(2):
        timeline.mark_copy(1, 100, True, False, lambda: None)
    timeline.decided()
    timeline.mark_wait()  # 40
    timeline.mark_start()  # 45
    timeline.mark_end()  # 60
    timeline.experts_issued()  # 70
    timeline.end_step(0)  # 71
    return timeline


def test_compute_wait_and_host_are_the_whole_duration(timeline):
    times = timeline.device_times()
    assert [part.tolist() for part in times[:6]] == [[49], [5], [17], [23], [25], [1]]


def test_the_links_rate_is_that_of_copies_in_a_row(timeline):
    times = timeline.device_times()
    assert times.link_busy.tolist() == [22]
    assert times.burst_bytes_per_s == 200 / 22 * 1e9


def test_spans_say_what_the_times_add_up(timeline):
    stamps = np.array([[[0, 9, 11, 20, 30, 40], [42, 50, 50, 60, 70, 90]]])
    for shared in (True, False):
        spans = spans_of(stamps, timeline.device_marks(), range(1), shared=shared)
        compute = [(what, start, end, event) for resource, what, start, end, _, event in spans if resource == "compute"]
        before = [("attention", 0, 10, 0), ("shared", 10, 13, 0)] if shared else [("attention", 0, 13, 0)]
        assert compute[: len(before) + 1] == [*before, ("host", 13, 15, 0)]
        spent = dict.fromkeys(("host", "wait", "experts", "step"), 0)
        for what, start, end, _ in compute:
            spent[what] = spent.get(what, 0) + end - start
        assert [spent[name] for name in ("wait", "host", "experts", "step")] == [5, 17, 25, 1]
    assert [span[1:] for span in spans if span[0] == "host"] == [
        ("gate", 0, 9, -1, 0),
        ("ahead", 9, 11, -1, 0),
        ("decide", 20, 30, -1, 0),
        ("issue", 30, 40, -1, 0),
        ("gate", 42, 50, -1, 1),
        ("decide", 60, 70, -1, 1),
        ("issue", 70, 90, -1, 1),
    ]


def test_host_time_of_a_layer_by_part():
    stamps = np.array(
        [
            [[0, 9, 10, 20, 30, 40], [42, 50, 53, 60, 70, 90]],
            [[100, 107, 110, 120, 130, 140], [144, 150, 151, 160, 170, 190]],
        ]
    )
    found = host_per_layer(stamps)
    assert list(found) == list(HOST_PARTS)
    assert [part["median"] for part in found.values()] == [7.5, 2, 9.5, 10, 15, 3]
    assert found["issue_gate"]["p10"] == pytest.approx(6.3)
    assert found["issue_gate"]["p90"] == pytest.approx(8.7)
    assert all(np.isnan(list(part.values())).all() for part in host_per_layer(stamps[:0]).values())

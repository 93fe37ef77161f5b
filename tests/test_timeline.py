"""Where the time of a step went, from marks set by hand."""

import time

import pytest

from real.device import COMPUTE, COPY
from real.standin import StandIn
from real.timeline import Timeline


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

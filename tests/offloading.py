"""A decoder without a model, for tests of the executor: it routes as a trace says and looks at what the slots hold."""

import numpy as np

from real.decisions import Decisions
from real.device import COMPUTE, COPY
from real.executor import Executor, Shape
from real.schedule import Schedule
from real.standin import StandIn
from real.timeline import Timeline
from sim.conformance import build

EXPERT_BYTES = 8
"""Every byte of expert k is k, so that whoever reads a slot sees what is there."""


class Lookers:
    """Routes as the workload says; its experts note what their slot held when they were computed."""

    def __init__(self, workload, device, slots):
        self.workload, self.device = workload, device
        self.slots = np.full((slots, EXPERT_BYTES), -1)
        self.known = None
        self.used = []
        """(event, key, contents of the slot) as computed."""

    def begin_step(self, step):
        pass

    def route(self, step, layer):
        self.known = None
        rows = self.workload.rows[self.workload.offsets[step] : self.workload.offsets[step + 1]]
        routed = self.workload.trace.experts[rows, layer].ravel().tolist()
        self.device.submit(COMPUTE, lambda: setattr(self, "known", routed))

    def routed(self, step, layer):
        return self.known

    def compute(self, step, layer, slots):
        event = step * self.workload.events.layers + layer
        for key, slot in slots.items():
            self.device.submit(COMPUTE, lambda key=key, slot=slot: self.used.append((event, key, self.slots[slot].tolist())))

    def end_step(self, step):
        pass

    def copy(self, key, slot, start, stop):
        def move():
            self.slots[slot, start:stop] = key

        self.device.submit(COPY, move)


def offload(
    composition, workload, slots, *, pace="random", copies=None, seed=0, chunk=3, window=6, one_by_one=True, **options
):
    """Run a system on the stand-in with the schedule proved; return executor, decoder and log."""
    device = StandIn(pace, copies=copies, seed=seed, schedule=Schedule(EXPERT_BYTES), **options)
    system = build(composition, workload, slots)
    lookers = Lookers(workload, device, int(system.setting.capacity.sum()))
    events, log = workload.events, []
    executor = Executor(
        Decisions.on_trace(system, workload),
        Shape(len(workload.decode), events.layers, events.experts),
        lookers,
        device,
        lookers.copy,
        expert_bytes=EXPERT_BYTES,
        chunk_bytes=chunk,
        window_bytes=window,
        timeline=Timeline(device, events.layers),
        log=log,
        one_by_one=one_by_one,
    )
    executor.run()
    return executor, lookers, log

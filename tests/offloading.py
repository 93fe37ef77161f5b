"""A decoder without a model, for tests of the executor: it routes as a trace says and looks at what the slots hold."""

import numpy as np

from real.decisions import Decisions
from real.device import COMPUTE, Memory
from real.executor import Executor, Shape
from real.schedule import Schedule
from real.standin import StandIn
from real.timeline import Timeline
from real.turn import Expected, Words
from sim.conformance import build

EXPERT_BYTES = 8
"""Every byte of expert k is k % 251, so that whoever reads a slot sees what is there."""


class Lookers:
    """Routes as the workload says; its experts note what their slot held when they were computed."""

    def __init__(self, workload, device, slots):
        self.workload, self.device = workload, device
        keys = workload.trace.model.layers * workload.trace.model.experts
        self.slots = np.full((slots, EXPERT_BYTES), 255, np.uint8)
        self.experts = np.repeat(np.arange(keys) % 251, EXPERT_BYTES).astype(np.uint8)
        self.memory = Memory(self.slots.ctypes.data, self.experts.ctypes.data, EXPERT_BYTES)
        most = int(np.diff(workload.offsets).max()) * workload.trace.model.top_k
        self.words = Words(np.zeros(most, np.int64), 32, 1)
        self.count = 0
        self.used = []
        """(event, key, contents of the slot) as computed."""

    def begin_step(self, step):
        pass

    def route(self, step, layer):
        rows = self.workload.rows[self.workload.offsets[step] : self.workload.offsets[step + 1]]
        ids = np.maximum(self.workload.trace.experts[rows, layer].ravel().astype(np.int64), -1)
        self.count = len(ids)
        tag = self.tag(step, layer)
        self.device.submit(COMPUTE, lambda: self.words.array[: len(ids)].__setitem__(slice(None), tag << 32 | (ids + 1)))

    def shared(self, step, layer):
        pass

    def expected(self, step, layer):
        return Expected(0, self.count, self.count, self.tag(step, layer))

    def routed(self, step, layer, ids):
        assert len(ids) == self.count

    def publish_sight(self, step, layer):
        pass

    def read_sight(self, step, layer):
        return True

    def tag(self, step, layer):
        return step * self.workload.events.layers + layer + 1

    def compute(self, step, layer, slots):
        event = step * self.workload.events.layers + layer
        for key, slot in slots.items():
            self.device.submit(COMPUTE, lambda key=key, slot=slot: self.used.append((event, key, self.slots[slot].tolist())))

    def end_step(self, step):
        pass


class Unheard(StandIn):
    """Never answers that computation is done: the host learns of an event's end by the words of the next gate alone."""

    def _query(self, stream, ticket):
        return super()._query(stream, ticket) and stream != COMPUTE


def offload(
    composition,
    workload,
    slots,
    *,
    pace="random",
    copies=None,
    seed=0,
    chunk=3,
    window=6,
    one_by_one=True,
    device=StandIn,
    marks=False,
    **options,
):
    """Run a system on a new stand-in `device` with the schedule proved; return executor, decoder and log."""
    device = device(pace, copies=copies, seed=seed, schedule=Schedule(EXPERT_BYTES), **options)
    system = build(composition, workload, slots)
    lookers = Lookers(workload, device, int(system.setting.capacity.sum()))
    events, log = workload.events, []
    executor = Executor(
        Decisions.on_trace(system, workload),
        Shape(len(workload.decode), events.layers, events.experts),
        lookers,
        device,
        lookers.memory,
        expert_bytes=EXPERT_BYTES,
        chunk_bytes=chunk,
        window_bytes=window,
        timeline=Timeline(device, events.layers, marks=marks),
        log=log,
        one_by_one=one_by_one,
    )
    executor.run()
    return executor, lookers, log

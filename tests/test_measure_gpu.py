"""The GPU's measurements run from end to end on a CPU that stands in for it: every shape fits and every figure is there."""

import contextlib
import ctypes
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the GPU's measurements need torch")

from real.calibration import measure_gpu  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")


class Event:
    def __init__(self, enable_timing=False):
        self.ns = 0

    def record(self, stream=None):
        self.ns = time.perf_counter_ns()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.ns - self.ns) / 1e6


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass


class Graph:
    """Remembers the work that was captured instead of its kernels."""

    def replay(self):
        self.work()


@pytest.fixture
def stand_in(monkeypatch):
    registered = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: registered.append(address),
        cudaHostUnregister=registered.remove,
    )
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Stream,
        OutOfMemoryError=torch.cuda.OutOfMemoryError,
        synchronize=lambda: None,
        current_stream=Stream,
        stream=lambda stream: contextlib.nullcontext(),
        cudart=lambda: runtime,
        check_error=lambda error: None,
        _sleep=lambda cycles: None,
    )
    stand_in = SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")})
    stand_in.cuda = cuda
    monkeypatch.setattr(measure_gpu, "torch", stand_in)

    def captured(work):
        graph = Graph()
        graph.work = work
        return graph

    for name, value in {
        "DEVICE": "cpu",
        "captured": captured,
        "copy_on": lambda stream, to, source, size: ctypes.memmove(to, source, size),
        "_warm_clocks": lambda: None,
        "_gemm": lambda count: lambda: None,
        "_STAGE": 1 << 20,
        "_MORE_THAN_CACHED": 1 << 10,
        "_VOCABULARY": 16,
        "_HIDDEN": 64,
        "SIZES": (4096, 1 << 16),
        "SHAPES": {"one": (64, 8, 2), "two": (32, 16, 1)},
        "TOKENS": (1, 3),
        "CONTEXTS": (4, 8),
    }.items():
        monkeypatch.setattr(measure_gpu, name, value)
    monkeypatch.setattr(measure_gpu._Link, "copy", lambda link, size: None if size > 1 << 20 else COPY(link, size))
    return registered


COPY = measure_gpu._Link.copy


def test_everything_is_measured_once_and_nothing_stays_registered(stand_in):
    said = []
    found = measure_gpu.measure_gpu(said.append, repeats=2)
    assert stand_in == []
    assert len(said) == 5
    assert {size: list(trains) for size, trains in found.h2d.items()} == {4096: [1, 4, 16], 1 << 16: [1, 4, 16]}
    assert [(name, row[0], row[1]) for name, row in found.experts.items()] == [("one", 2, 3072), ("two", 1, 3072)]
    assert {context: row[0] for context, row in found.attention.items()} == {
        4: 2 * (4 * 64 * 64 + 64 * 64 + 2 * 4 * 64),
        8: 2 * (4 * 64 * 64 + 64 * 64 + 2 * 8 * 64),
    }
    assert list(found.readout) == [".cpu()", "copy and event"]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("read-out through mapped memory was not measured: ")
    assert len(found.contention) == 4
    samples = [found.attention_eager, found.head[1], found.gemm[1], *found.d2h.values(), *found.expert_tokens.values()]
    assert all(len(times) == 2 for times in samples)


def test_copies_are_submitted_while_the_stream_is_busy(stand_in, monkeypatch):
    """Or the host's calls would count."""
    order = []
    monkeypatch.setattr(measure_gpu.torch.cuda, "_sleep", lambda cycles: order.append("busy"))
    link = measure_gpu._Link(torch.zeros(1 << 16, dtype=torch.uint8))
    monkeypatch.setattr(link, "copy", lambda size: order.append("copy"))
    assert len(link.train(4096, 2, 1)) == 1
    assert order == ["busy", "copy", "copy"] * 3


def test_memory_is_given_back_when_the_work_fails(stand_in):
    with pytest.raises(RuntimeError, match="a copy engine"), measure_gpu.registered(64):
        raise RuntimeError("a copy engine error")
    assert stand_in == []

"""What one GPU, its link and the calls that drive it take. Samples in ns; needs torch with CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from real.calibration.fitting import quietest
from real.cuda import copy_on
from real.host import undisturbed

DEVICE = "cuda"

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 12_582_912, 17_301_504, 64 << 20, 256 << 20, 512 << 20)
"""Bytes of the copies that are timed; OLMoE's and Qwen1.5-MoE's expert are among them."""
ROUNDS = 3
"""All copies are timed so often, one size after the other, and of each the quietest round counts."""

COUNTS = (1, 4, 16)
"""Copies of a train."""
SHAPES = {
    "Qwen1.5-MoE-A2.7B": (2048, 1408, 4),
    "DeepSeek-V2-Lite": (2048, 1408, 6),
    "OLMoE-1B-7B": (2048, 1024, 8),
    "Qwen3-30B-A3B": (2048, 768, 8),
    "gpt-oss-20b": (2880, 2880, 4),
    "Mixtral-8x7B": (4096, 14336, 2),
}
"""Hidden size, expert width and top-k."""
TOKENS = (1, 2, 4, 8, 16, 64, 256)
"""Tokens of one expert."""
CONTEXTS = (128, 1024, 4096)
"""Cached tokens that attention reads."""

_HIDDEN, _EXPERTS, _TOP_K, _VOCABULARY = 2048, 64, 8, 50304  # OLMoE's layer and head
_STAGE = 1 << 30
_MORE_THAN_CACHED = 400 << 20  # weights of one graph: more than any L2 holds, so that all are read from memory

Samples = list[float]


class GpuTimes(NamedTuple):
    """Samples of one GPU."""

    h2d: dict[int, dict[int, Samples]]
    """Trains of copies host to device, by bytes of one copy and count of copies, all submitted before the first starts."""
    d2h: dict[int, Samples]
    """One copy device to host, by bytes."""
    experts: dict[str, tuple[int, int, Samples]]
    """(experts in a row, bytes of one, times of all) for one token in a CUDA graph, by shape."""
    experts_eager: dict[str, Samples]
    """The same without a graph."""
    expert_tokens: dict[int, Samples]
    """One OLMoE expert in a CUDA graph, by how many tokens it computes."""
    attention: dict[int, tuple[int, Samples]]
    """(bytes read, times) of attention and gate of one layer in a CUDA graph, by context."""
    attention_eager: Samples
    """The same without a graph, at the shortest context."""
    head: tuple[int, Samples]
    """(bytes read, times) of last norm, head and argmax in a CUDA graph."""
    gemm: tuple[int, Samples]
    """(floating-point operations, times) of large bf16 matrix products."""
    device_copy: tuple[int, Samples]
    """(bytes read and written, times) of a copy within device memory."""
    readout: dict[str, Samples]
    """From the end of a gate on the device until the host knows the ids, launch latency included, by method."""
    calls: dict[str, Samples]
    """Host time of one call, by call."""
    contention: dict[str, tuple[Samples, Samples]]
    """(alone, beside the other) of compute and of copies, by what and beside what."""
    notes: tuple[str, ...]
    """A sentence for everything that is missing."""


def measure_gpu(say: Callable[[str], None] = lambda what: None, repeats: int = 15) -> GpuTimes:
    """Measure the current CUDA device in about a minute; `say` is told what comes next.

    Raises RuntimeError where the driver refuses memory or work; nothing stays registered.
    """
    notes: list[str] = []
    with torch.inference_mode(), registered(_STAGE) as host, undisturbed():
        say("warming up")
        _warm_clocks()
        link = _Link(host)
        say("host-to-device copies")
        rounds = [
            {size: {count: link.train(size, count, max(repeats // ROUNDS, 1)) for count in COUNTS} for size in SIZES}
            for _ in range(ROUNDS)
        ]
        h2d = {size: {count: quietest([each[size][count] for each in rounds]) for count in COUNTS} for size in SIZES}
        d2h = {size: timed(partial(link.back, size), repeats) for size in (64, 512, 4096)}
        device_copy = (_STAGE, timed(link.within_device, repeats))
        say("read-out and calls")
        readout = _readouts(host, notes)
        calls = _calls(link)
        say("contention between copies and compute")
        contention = _contention(link, repeats)
        gemm = (20 * 8192**3, timed(_gemm(10), repeats))
        del link
        say("experts and attention")
        experts, experts_eager = _experts(repeats, notes)
        return GpuTimes(
            h2d=h2d,
            d2h=d2h,
            experts=experts,
            experts_eager=experts_eager,
            expert_tokens={tokens: _expert_row(_HIDDEN, 1024, 1, tokens, repeats) for tokens in TOKENS},
            attention={context: _attention(context, repeats) for context in CONTEXTS},
            attention_eager=_attention(CONTEXTS[0], repeats, eager=True)[1],
            head=_head(repeats),
            gemm=gemm,
            device_copy=device_copy,
            readout=readout,
            calls=calls,
            contention=contention,
            notes=tuple(notes),
        )


@contextmanager
def registered(size: int) -> Iterator[torch.Tensor]:
    """Give plain host memory of `size` bytes that the driver pinned in place; torch would round pinned memory up."""
    memory = torch.empty(size, dtype=torch.uint8).fill_(1)  # touched, so that the pages exist
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    try:
        yield memory
    finally:
        try:
            torch.cuda.synchronize()  # nothing may still be reading it
        finally:
            torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))


def timed(work: Callable[[], Any], repeats: int, *, queued: bool = False) -> Samples:
    """Return the device time of `work` on the current stream, `repeats` times after two that are not counted.

    With `queued` the device is kept busy until all of the work was submitted, so that the host's calls do not count.
    """
    samples = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
        samples.append(_device_ns(work))
    return samples[2:]


def _device_ns(work: Callable[[], Any]) -> float:
    """Return the device time of `work` between two events on the current stream, once it is done."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) * 1e6)


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return `work` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _warm_clocks(seconds: float = 1.5) -> None:
    """Keep the device busy until its clocks are up."""
    work = _gemm(10)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        work()
        torch.cuda.synchronize()


def _gemm(count: int) -> Callable[[], None]:
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(left)

    def work() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return work


# ---- link --------------------------------------------------------------------------------------------------------


class _Link:
    """Copies between registered host memory and the device, each from another place than the one before."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host, self.device = host, torch.zeros_like(host, device=DEVICE)
        self.stream = torch.cuda.Stream()
        self.at = 0

    def copy(self, size: int) -> None:
        """Submit one copy host to device to the current stream, as the executor does."""
        if self.at + size > len(self.host):
            self.at = 0
        stream = torch.cuda.current_stream().cuda_stream
        copy_on(stream, self.device.data_ptr() + self.at, self.host.data_ptr() + self.at, size)
        self.at += size

    def back(self, size: int) -> None:
        """Submit one copy device to host to the current stream."""
        self.host[:size].copy_(self.device[:size], non_blocking=True)

    def within_device(self) -> None:
        """Submit one copy of half of the device's memory over the other half: as many bytes are read and written."""
        half = len(self.device) // 2
        self.device[:half].copy_(self.device[half:])

    def train(self, size: int, count: int, repeats: int) -> Samples:
        """Time `count` copies in a row."""
        with torch.cuda.stream(self.stream):
            return timed(_times(count, partial(self.copy, size)), repeats if size < 1 << 26 else 2, queued=True)


def _times(count: int, work: Callable[[], Any]) -> Callable[[], None]:
    """Return `work`, done `count` times."""

    def repeated() -> None:
        for _ in range(count):
            work()

    return repeated


def _contention(link: _Link, repeats: int) -> dict[str, tuple[Samples, Samples]]:
    """Time matrix products and memory-bound experts beside copies, and a copy beside each."""
    row = captured(_expert_weights(_HIDDEN, 1024, 8, 1)[0])
    found = {}
    for name, work in (("gemm", _gemm(10)), ("experts", _times(10, row.replay))):
        alone = timed(work, repeats, queued=True)
        beside = _beside(work, _times(4, partial(link.copy, 512 << 20)), link.stream, repeats)
        found[f"{name} beside copies"] = (alone, beside)
        copy = partial(link.copy, 64 << 20)
        copy_alone = timed(copy, repeats, queued=True)
        others = torch.cuda.Stream()
        copy_beside = _beside(copy, _times(5, work), others, repeats)
        found[f"copies beside {name}"] = (copy_alone, copy_beside)
    return found


def _beside(work: Callable[[], Any], other: Callable[[], Any], stream: torch.cuda.Stream, repeats: int) -> Samples:
    """Time `work` while `other`, which takes longer, runs on `stream`."""
    samples = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            other()
        torch.cuda._sleep(400_000)  # until the work was submitted too
        samples.append(_device_ns(work))
    torch.cuda.synchronize()
    return samples[2:]


# ---- host --------------------------------------------------------------------------------------------------------


class _Mapped:
    """Registered host memory as what CUDA tensors are made from."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<i8", "data": (address, False), "version": 3}


def _readouts(host: torch.Tensor, notes: list[str], repeats: int = 60) -> dict[str, Samples]:
    """Time three ways to learn a gate's choice: from its launch until the host knows, less the gate's own time."""
    token = torch.randn(1, _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    gate = torch.randn(_EXPERTS, _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.zeros(_TOP_K, dtype=torch.int64, device=DEVICE)
    words = host[: 8 * (_TOP_K + 1)].view(torch.int64)
    words.zero_()
    seen = words.numpy()
    event = torch.cuda.Event()

    def choose() -> None:
        ids.copy_(functional.linear(token, gate).softmax(-1).topk(_TOP_K).indices[0])

    def by_cpu() -> None:
        graph.replay()
        ids.cpu()

    def by_event() -> None:
        graph.replay()
        words[:_TOP_K].copy_(ids, non_blocking=True)
        event.record()
        event.synchronize()

    graph = captured(choose)
    methods: dict[str, Callable[[], None]] = {".cpu()": by_cpu, "copy and event": by_event}
    try:
        mapped = torch.as_tensor(_Mapped(words.data_ptr(), _TOP_K + 1), device=DEVICE)
        turn = torch.zeros(1, dtype=torch.int64, device=DEVICE)

        def choose_and_write() -> None:
            choose()
            turn.add_(1)
            torch.add(ids, 0, out=mapped[:_TOP_K])
            torch.add(turn, 0, out=mapped[_TOP_K:])  # last: whoever sees it sees the ids

        writing = captured(choose_and_write)

        def by_word() -> None:
            before = int(seen[_TOP_K])
            until = time.perf_counter() + 1
            writing.replay()
            while seen[_TOP_K] == before:
                if time.perf_counter() > until:
                    raise RuntimeError("the word never changed")

        by_word()
        methods["mapped word"] = by_word
    except (RuntimeError, ValueError, TypeError) as error:
        notes.append(f"read-out through mapped memory was not measured: {str(error).splitlines()[0]}")
    gate_ns = float(np.median(timed(graph.replay, repeats, queued=True)))
    return {name: [max(0.0, sample - gate_ns) for sample in _on_host(work, repeats)] for name, work in methods.items()}


def _calls(link: _Link) -> dict[str, Samples]:
    """Time the calls themselves."""
    small = torch.zeros(8, device=DEVICE)
    graph = captured(lambda: small.add_(1))
    event = torch.cuda.Event()
    stream = torch.cuda.current_stream()
    event.record()

    def record_and_wait() -> None:
        event.record()
        event.synchronize()

    return {
        "graph launch": _on_host(graph.replay),
        "eager kernel": _on_host(lambda: small.add_(1)),
        "submit a copy": _on_host(lambda: link.copy(4096)),
        "record an event": _on_host(event.record),
        "wait for an event on a stream": _on_host(lambda: stream.wait_event(event)),
        "step read-out": _on_host(record_and_wait),
    }


def _on_host(work: Callable[[], Any], repeats: int = 60) -> Samples:
    """Return the host's time of `work`, on a device that has nothing else to do."""
    samples = []
    for _ in range(repeats + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        work()
        samples.append(float(time.perf_counter_ns() - begin))
    torch.cuda.synchronize()
    return samples[5:]


# ---- compute -----------------------------------------------------------------------------------------------------


def _expert_weights(hidden: int, width: int, top_k: int, tokens: int) -> tuple[Callable[[], None], int]:
    """Return work that computes rows of `top_k` experts for `tokens`, and how many rows it takes to leave every cache."""
    size = 3 * hidden * width * 2
    rows = max(1, -(-_MORE_THAN_CACHED // (size * top_k)))
    token = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    blobs = torch.randn(rows * top_k, 3 * hidden * width, dtype=torch.bfloat16, device=DEVICE).mul_(0.02)
    out = torch.zeros_like(token)

    def work() -> None:
        for blob in blobs:
            gate_up = blob[: 2 * hidden * width].view(2 * width, hidden)
            down = blob[2 * hidden * width :].view(hidden, width)
            gate, up = functional.linear(token, gate_up).chunk(2, dim=-1)
            out.add_(functional.linear(functional.silu(gate) * up, down), alpha=0.1)

    return work, rows


def _expert_row(hidden: int, width: int, top_k: int, tokens: int, repeats: int, *, eager: bool = False) -> Samples:
    """Time one row of experts."""
    work, rows = _expert_weights(hidden, width, top_k, tokens)
    run = work if eager else captured(work).replay
    return [sample / rows for sample in timed(run, repeats, queued=not eager)]


def _experts(repeats: int, notes: list[str]) -> tuple[dict[str, tuple[int, int, Samples]], dict[str, Samples]]:
    graphs: dict[str, tuple[int, int, Samples]] = {}
    eager: dict[str, Samples] = {}
    for name, (hidden, width, top_k) in SHAPES.items():
        try:
            times = _expert_row(hidden, width, top_k, 1, repeats)
            eager[name] = _expert_row(hidden, width, top_k, 1, repeats, eager=True)
        except torch.cuda.OutOfMemoryError:
            notes.append(f"experts of {name} were not measured: they do not fit on the device")
            continue
        graphs[name] = (top_k, 3 * hidden * width * 2, times)
    return graphs, eager


def _layer(context: int) -> tuple[Callable[[], None], int, int]:
    """Return work that runs attention and gate of several OLMoE layers, how many, and the bytes that one reads."""
    layers, heads = -(-_MORE_THAN_CACHED // (4 * _HIDDEN * _HIDDEN * 2)), 16
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    token, norm = torch.randn(1, _HIDDEN, **options), torch.ones(_HIDDEN, **options)
    qkv = torch.randn(layers, 3 * _HIDDEN, _HIDDEN, **options).mul_(0.02)
    out, gate = (
        torch.randn(layers, _HIDDEN, _HIDDEN, **options).mul_(0.02),
        torch.randn(layers, _EXPERTS, _HIDDEN, **options),
    )
    cache = torch.randn(layers, 2, 1, heads, context, _HIDDEN // heads, **options)
    ids = torch.zeros(layers, _TOP_K, dtype=torch.int64, device=DEVICE)

    def work() -> None:
        state = token
        for layer in range(layers):
            inner = functional.rms_norm(state, (_HIDDEN,), norm)
            query, key, value = functional.linear(inner, qkv[layer]).view(3, 1, heads, 1, _HIDDEN // heads)
            cache[layer, 0, :, :, :1] = key
            cache[layer, 1, :, :, :1] = value
            read = functional.scaled_dot_product_attention(query, cache[layer, 0], cache[layer, 1])
            state = state + functional.linear(read.reshape(1, _HIDDEN), out[layer])
            inner = functional.rms_norm(state, (_HIDDEN,), norm)
            ids[layer] = functional.linear(inner, gate[layer]).softmax(-1).topk(_TOP_K).indices[0]

    return work, layers, 2 * (4 * _HIDDEN * _HIDDEN + _EXPERTS * _HIDDEN + 2 * context * _HIDDEN)


def _attention(context: int, repeats: int, *, eager: bool = False) -> tuple[int, Samples]:
    work, layers, size = _layer(context)
    run = work if eager else captured(work).replay
    return size, [sample / layers for sample in timed(run, repeats, queued=not eager)]


def _head(repeats: int) -> tuple[int, Samples]:
    token = torch.randn(1, _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    norm = torch.ones(_HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    head = torch.randn(_VOCABULARY, _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    graph = captured(lambda: functional.linear(functional.rms_norm(token, (_HIDDEN,), norm), head).argmax(-1))
    return 2 * _VOCABULARY * _HIDDEN, timed(graph.replay, repeats, queued=True)

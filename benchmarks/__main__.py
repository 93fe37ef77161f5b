"""Everything about speed, measured in one run: ``make bench``; writes ``benchmarks/latest.json`` and a figure.

Wall-clock noise is large on shared machines: what is compared runs in turn, medians are taken, and ratios of one run say
more than figures of two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from policies.system import find_part
from sim.config import Config, compose_config, options
from sim.curves import miss_curve
from sim.experiment import costs_of, system_of, workload_of
from sim.fast import run_fast
from sim.reference import run_reference
from traces import import_trace, save_trace, synthesize

HERE = Path(__file__).parent
GPT_OSS = HERE.parents[1] / "shared" / "traces" / "gpt_oss_20b_decode.npz"
"""A published recording, where it lies beside the project."""
STANDARD = ["system=next_gate", "prefetch.n=4", "budget=0.25"]
"""The standard loop: 24 layers x 64 experts, top-6, the next layer's gate prefetches 4, global LRU at 25 %."""


def main() -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "latest.json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes: tries the script, measures nothing")
    arguments = parser.parse_args()
    scale = 20 if arguments.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.repeats, scale)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"written to {arguments.out}")


def measure(folder: Path, repeats: int, scale: int) -> dict[str, Any]:
    """Return all figures; `scale` divides the sizes."""
    standard = generate(folder / "standard.safetensors", tokens=32_000 // scale)
    found: dict[str, Any] = {"machine": machine(), "repeats": repeats}
    say("the standard loop, both engines in turn")
    found |= engines(standard, repeats)
    say("every system")
    systems = every_system(standard, max(repeats // 2, 3))
    found |= {"slowest_system_steps_per_s": min(systems.values()), "system_steps_per_s": systems}
    say("cost per layer-step as the trace, the model and the number of systems grow")
    found["growth"] = growth(folder, repeats, scale)
    say("untimed replay beside libCacheSim")
    found["replay_over_libcachesim"], found["replay_accesses_per_s"] = replays(repeats, 2_000_000 // scale)
    say("twenty capacities of ten million accesses")
    found["curve_seconds"] = curve_seconds(10_000_000 // scale)
    say("the main job: every system at ten budgets on 5,000 tokens of gpt-oss-20b")
    found["compare_all_seconds"], found["compare_all_trace"] = compare_all(folder, tokens=5000 // scale)
    say("memory")
    found["peak_memory_over_trace"] = peak_memory(folder, tokens=100_000 // scale)
    say("a new process")
    found["warm_start_seconds"] = warm_start(folder)
    return found


# ---- what is measured --------------------------------------------------------------------------------------------


def engines(standard: list[str], repeats: int) -> dict[str, float]:
    """Return layer-steps/s of the standard loop in the fast engine, with a policy in Python, and over the reference."""
    config = compose_config("simulate", [*standard, *STANDARD])
    fast = runner(config, run_fast)
    python = runner(config, lambda *run: run_fast(*run, interpret=True))
    in_python = python_lru(config)
    reference = runner(compose_config("simulate", [*standard, *STANDARD, "trace.tokens=400"]), run_reference)
    rates: dict[str, list[float]] = {"fast": [], "all_in_python": [], "python": [], "reference": []}
    for _ in range(repeats):
        for name, run in (("fast", fast), ("all_in_python", python), ("python", in_python), ("reference", reference)):
            rates[name].append(run())
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "fast_over_reference": median["fast"] / median["reference"],
        "fast_steps_per_s": median["fast"],
        "reference_steps_per_s": median["reference"],
        "python_policy_steps_per_s": median["python"],
        "all_policies_in_python_steps_per_s": median["all_in_python"],
    }


def every_system(standard: list[str], repeats: int) -> dict[str, float]:
    """Return layer-steps/s of every system at 25 %."""
    rates = {}
    for name in options("system"):
        run = runner(compose_config("simulate", [*standard, f"system={name}", "budget=0.25"]), run_fast)
        rates[name] = statistics.median(run() for _ in range(repeats))
    return rates


def growth(folder: Path, repeats: int, scale: int) -> dict[str, Any]:
    """Return layer-steps/s of the standard loop as one dimension grows, and the log-log slope of time over tokens."""
    found: dict[str, Any] = {}
    grown = {
        "tokens": [{"tokens": tokens // scale} for tokens in (4000, 8000, 16_000, 32_000)],
        "layers": [{"layers": layers} for layers in (12, 24, 48, 96)],
        "experts": [{"experts": experts} for experts in (32, 64, 128, 256)],
        "top_k": [{"top_k": top_k} for top_k in (2, 4, 6, 8)],
    }
    for name, shapes in grown.items():
        runs = {}
        for shape in shapes:
            trace = generate(folder / "growing.safetensors", **{"tokens": 4000 // scale, **shape})
            config = compose_config("simulate", [*trace, *STANDARD])
            runs[next(iter(shape.values()))] = runner(config, run_fast)
        rates: dict[int, list[float]] = {size: [] for size in runs}
        for _ in range(repeats):
            for size, run in runs.items():
                rates[size].append(run())
        found[name] = {str(size): statistics.median(values) for size, values in rates.items()}
    sizes = np.array([int(size) for size in found["tokens"]])
    seconds = sizes / np.array(list(found["tokens"].values()))
    found["slope_of_time_over_tokens"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    return found


def replays(repeats: int, accesses: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return our accesses/s over libCacheSim's, and ours, by policy: Zipf(1.0), 1,500 objects, a quarter of them slots."""
    import libcachesim

    from sim.events import future_of
    from sim.replay import one_pool, replay

    events = zipf(accesses)
    future = future_of(events)
    setting = one_pool(events, 375, future)
    theirs = {
        "lru": "LRU",
        "fifo": "FIFO",
        "lfu": "LFU",
        "arc": "ARC",
        "s3fifo": "S3FIFO",
        "sieve": "Sieve",
        "belady": "Belady",
    }
    ratios, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        reader = oracle_file(Path(folder) / "trace.oracleGeneral", events, future, libcachesim)
        for name, their_name in theirs.items():
            cls, parameters = find_part("eviction", compose_config("simulate", [f"eviction={name}"])["eviction"])
            ours: list[float] = []
            others: list[float] = []
            for _ in range(repeats + 1):
                policy = cls.build(setting, **parameters)  # type: ignore[attr-defined]
                start = time.process_time()
                counted = replay(policy, setting, events, "fast")
                ours.append(time.process_time() - start)
                cache = getattr(libcachesim, their_name)(375, hashpower=12)
                reader.reset()
                start = time.process_time()
                miss_ratio, _ = cache.process_trace(reader)
                others.append(time.process_time() - start)
            assert abs(miss_ratio - counted.misses / counted.accesses) < 1e-6, (name, miss_ratio, counted)
            ratios[name] = statistics.median(others[1:]) / statistics.median(ours[1:])
            rates[name] = accesses / statistics.median(ours[1:])
    return ratios, rates


def curve_seconds(accesses: int) -> float:
    """Return how long an LRU miss curve of twenty capacities takes."""
    events = zipf(accesses)
    part = find_part("eviction", compose_config("simulate", ["eviction=lru"])["eviction"])
    slots = np.linspace(75, 1500, 20).astype(int).tolist()
    miss_curve(part, zipf(1000), slots)  # compiled, loaded
    start = time.process_time()
    miss_curve(part, events, slots)
    return time.process_time() - start


def compare_all(folder: Path, tokens: int) -> tuple[float, str]:
    """Return the seconds of ``foregate compare`` of every system at ten budgets, once all is compiled, and of what."""
    trace, what = gpt_oss(folder, tokens)
    budgets = "[0.15,0.2,0.25,0.3,0.35,0.4,0.5,0.6,0.7,0.8]"
    command = [sys.executable, "-m", "sim.cli", "compare", *trace, f"budget={budgets}"]
    for results in ("first", "second"):
        start = time.perf_counter()
        subprocess.run([*command, f"results={folder / results}"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
    return seconds, what


def gpt_oss(folder: Path, tokens: int) -> tuple[list[str], str]:
    """Return overrides for so many tokens of gpt-oss-20b's routing, and words for them; generated where none is there."""
    path = folder / "gpt_oss.safetensors"
    if GPT_OSS.exists():
        save_trace(import_trace(GPT_OSS, "plain_arrays"), path)
        trace, how = [f"trace={path.absolute()}", f"trace.tokens={tokens}", "model=gpt_oss_20b"], "recorded"
    else:
        trace = generate(path, tokens=tokens, layers=24, experts=32, top_k=4, model="gpt_oss_20b")
        how = "generated"
    return trace, f"{tokens:,} tokens of gpt-oss-20b's routing, {how}"


def peak_memory(folder: Path, tokens: int) -> float:
    """Return the peak memory that the standard loop adds to a process, over the size of its trace."""
    trace = generate(folder / "long.safetensors", tokens=tokens)
    size = (folder / "long.safetensors").stat().st_size
    peaks = [peak_of([*trace, *STANDARD, f"trace.tokens={count}"]) for count in (100, tokens)]
    return (peaks[1] - peaks[0]) / size


def warm_start(folder: Path) -> float:
    """Return the seconds of one simulation in a new process whose code was compiled before."""
    command = [sys.executable, "-m", "sim.cli", "simulate", "trace.tokens=50", f"results={folder / 'warm'}"]
    subprocess.run(command, check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run([*command, "seed=1"], check=True, capture_output=True)
    return time.perf_counter() - start


# ---- how it is measured ------------------------------------------------------------------------------------------


def generate(path: Path, tokens: int, layers: int = 24, experts: int = 64, top_k: int = 6, model: str = "") -> list[str]:
    """Write generated decode routing and return the overrides that choose it."""
    requests = max(tokens // 500, 1)
    shape = {"layers": layers, "experts": experts, "top_k": top_k}
    trace = synthesize(**shape, requests=requests, prefill_tokens=1, decode_tokens=tokens // requests, lookahead_depth=1)
    save_trace(trace, path)
    return [f"trace={path.absolute()}", f"model={model or 'deepseek_v2_lite'}", "workload.phases=decode"]


def runner(config: Config, engine: Callable[..., Any]) -> Callable[[], float]:
    """Return a function that runs the engine once and gives its layer-steps per second of processor time."""
    workload = workload_of(config)
    costs = costs_of(config, workload)[0]
    total = len(workload.decode) * workload.trace.model.layers
    engine(system_of(config, workload, costs), workload, costs)  # compiled, loaded, and its caches filled

    def once() -> float:
        system = system_of(config, workload, costs)
        start = time.process_time()
        engine(system, workload, costs)
        return total / (time.process_time() - start)

    return once


def python_lru(config: Config) -> Callable[[], float]:
    """Return the same for an LRU that a user wrote as an ordinary Python class."""
    from dataclasses import replace

    def engine(system: Any, workload: Any, costs: Any) -> Any:
        return run_fast(replace(system, eviction=PythonLRU()), workload, costs)

    return runner(config, engine)


class PythonLRU:
    """Least recently used, in a dictionary."""

    def __init__(self) -> None:
        self.order: dict[int, None] = {}

    def on_insert(self, key: int, pool: int, now: int) -> None:
        """Stand last."""
        self.order[key] = None

    def on_hit(self, key: int, pool: int, now: int) -> None:
        """Stand last again."""
        del self.order[key]
        self.order[key] = None

    def on_evict(self, key: int, pool: int, now: int) -> None:
        """Leave."""
        del self.order[key]

    def victim(self, pool: int, holds: Any, limit: int, now: int) -> int:
        """Return the first that may leave."""
        for key in self.order:
            if holds[key] < limit:
                return key
        return -1


def zipf(accesses: int) -> Any:
    """Return accesses to 1,500 objects with Zipf(1.0) popularity, one per event."""
    from sim.events import Events

    weights = 1 / np.arange(1, 1501)
    keys = np.random.default_rng(1).choice(1500, accesses, p=weights / weights.sum()).astype(np.int32)
    return Events(1, 1500, np.arange(accesses + 1), keys, np.ones(accesses, np.int32))


def oracle_file(path: Path, events: Any, future: Any, libcachesim: Any) -> Any:
    """Write `events` in libCacheSim's oracleGeneral format and return a reader of them."""
    record = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])
    rows = np.zeros(len(events.keys), record)
    rows["time"], rows["key"], rows["size"] = np.arange(len(rows)), events.keys, 1
    rows["next"] = np.where(future.following == np.iinfo(np.int64).max, -1, future.following)
    rows.tofile(path)
    return libcachesim.TraceReader(
        trace=str(path),
        trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE,
        reader_init_params=_ignoring_sizes(libcachesim),
    )


def _ignoring_sizes(libcachesim: Any) -> Any:
    parameters = libcachesim.ReaderInitParam()
    parameters.ignore_obj_size = True
    return parameters


def peak_of(overrides: list[str]) -> int:
    """Return the peak resident bytes of a process that runs the standard loop."""
    code = (
        "import sys\n"
        "from benchmarks.__main__ import runner, run_fast, compose_config\n"
        "runner(compose_config('simulate', sys.argv[1:]), run_fast)\n"
        "status = open('/proc/self/status').read().split()\n"  # ru_maxrss would count the process that started this one
        "print(int(status[status.index('VmHWM:') + 1]) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *overrides], check=True, capture_output=True, text=True)
    return int(done.stdout)


def machine() -> str:
    """Describe the machine in a line."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def say(what: str) -> None:
    """Tell on standard error what is being measured, and the peak memory so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what} ({used:.0f} MB)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

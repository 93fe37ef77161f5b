"""How many layer-steps per second the reference engine simulates on one core: ``make bench``.

Wall-clock noise is large on shared machines, so every case is run several times, the cases in turn, and the median and
the best of each are printed; compare figures of one run only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.config import Config, compose_config
from sim.experiment import costs_of, system_of, workload_of
from sim.reference import run_reference
from traces import save_trace, synthesize

NEXT_LAYER = ["system=lru", "predictor=oracle", "prefetch=top_n"]
GATE = ["system=next_gate", "prefetch.n=4"]
BUNDLED = ["workload.phases=decode", "trace=reference"]


def cases(folder: Path) -> dict[str, Config]:
    """Return the configurations that are timed, by name."""
    standard = folder / "standard_24x64_top6.safetensors"
    if not standard.exists():
        save_trace(synthesize(layers=24, experts=64, top_k=6, requests=4, prefill_tokens=1, decode_tokens=250), standard)
    generated = [f"trace={standard.absolute()}", "model=deepseek_v2_lite", "workload.phases=decode"]
    found = {
        "bundled recording, LRU": [*BUNDLED, "system=lru"],
        "bundled recording, LRU + next layer's gate": [*BUNDLED, *GATE],
        "24 x 64 top-6 generated, LRU": [*generated, "system=lru"],
        "24 x 64 top-6 generated, LRU + next layer's gate": [*generated, *GATE],
    }
    imported = folder / "gpt_oss_20b_decode.safetensors"
    if imported.exists():
        real = [f"trace={imported.absolute()}", "trace.tokens=1000", "model=gpt_oss_20b"]
        found["gpt-oss-20b recording, LRU"] = [*real, "system=lru"]
        found["gpt-oss-20b recording, LRU + next layer foreseen"] = [*real, *NEXT_LAYER]
    budgets = (0.25, 0.5)
    return {
        f"{name}, {budget:.0%} of experts": compose_config("simulate", [*overrides, f"budget={budget}"])
        for name, overrides in found.items()
        for budget in budgets
    }


def timer(config: Config) -> Callable[[], float]:
    """Return a function that runs the engine once and gives its layer-steps per second of processor time."""
    workload = workload_of(config)
    costs = costs_of(config, workload)[0]
    total = workload.events.total  # builds the events before the clock starts

    def once() -> float:
        system = system_of(config, workload, costs)
        start = time.process_time()
        run_reference(system, workload, costs)
        return total / (time.process_time() - start)

    return once


def main() -> None:
    """Time all cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("results/benchmarks"), help="traces and latest.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    timers = {name: timer(config) for name, config in cases(arguments.folder).items()}
    rates: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(arguments.repeats):
        for name, once in timers.items():
            rates[name].append(once())
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"layer-steps per second, one core, {machine}, {arguments.repeats} runs each\n")
    print("| case | median | best |\n|---|---:|---:|")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):,.0f} | {max(found):,.0f} |")
    latest: dict[str, Any] = {"machine": machine, "layer_steps_per_s": rates}
    (arguments.folder / "reference_engine.json").write_text(json.dumps(latest, indent=1))


if __name__ == "__main__":
    main()

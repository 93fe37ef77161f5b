"""Write the tables of docs/performance.md anew: ``python -m benchmarks.tables``.

They are of `benchmarks/latest.json`, and of the comparison with other ways of offloading on a GPU, `PEERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from real.peers import report

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PEERS = HERE.parent / "real" / "ground_truth" / "h100" / "peers.json"
"""A `summary.json` of `real.peers`."""


def speed(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    """Give what was measured beside what was asked for."""
    slowest = min(found["system_steps_per_s"], key=found["system_steps_per_s"].get)
    yield "fast engine over reference engine, standard loop", f"{found['fast_over_reference']:.0f}x", "100x"
    yield "fast engine, standard loop, layer-steps/s", _millions(found["fast_steps_per_s"]), "5 M"
    yield "the same without prefetch (`lru`)", _millions(found["system_steps_per_s"]["lru"]), ""
    yield f"slowest system (`{slowest}`)", _millions(found["slowest_system_steps_per_s"]), "1 M"
    python = found["python_policy_steps_per_s"]
    yield "a user's LRU as a plain Python class, the rest compiled", f"{python / 1e3:.0f} k", "150 k"
    yield "all policies in Python, the loop compiled", f"{found['all_policies_in_python_steps_per_s'] / 1e3:.0f} k", ""
    yield "reference engine, standard loop", f"{found['reference_steps_per_s'] / 1e3:.1f} k", ""
    yield "twenty capacities of ten million accesses (LRU)", f"{found['curve_seconds']:.1f} s", "3 s"
    yield (
        f"`foregate compare`, {len(found['system_steps_per_s'])} systems at ten budgets, {found['compare_all_trace']}",
        f"{found['compare_all_seconds']:.0f} s",
        "30 s",
    )
    memory = f"{found['peak_memory_over_trace']:.2f}"
    yield "peak memory that a run of the standard loop adds, over its trace", memory, "2"
    yield "one simulation in a new process, compiled before", f"{found['warm_start_seconds']:.1f} s", "3 s"
    slope = f"{found['growth']['slope_of_time_over_tokens']:.2f}"
    yield "log-log slope of time over tokens", slope, "0.95 to 1.05"


def replays(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    """Give the untimed replays beside libCacheSim's."""
    for name, ratio in found["replay_over_libcachesim"].items():
        yield name, f"{found['replay_accesses_per_s'][name] / 1e6:.0f}", f"{ratio:.1f}x", "5x" if name == "lru" else "1x"


def growth(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    """Give layer-steps per second as one dimension grows."""
    for name in ("tokens", "layers", "experts", "top_k"):
        rates = found["growth"][name]
        yield f"{name} {' / '.join(rates)}", *(f"{rate / 1e6:.2f}" for rate in rates.values())


TABLES = {
    "speed": (speed, "| what | measured | asked for |\n|---|---:|---:|"),
    "replay": (replays, "| policy | foregate, M accesses/s | over libCacheSim | asked for |\n|---|---:|---:|---:|"),
    "growth": (growth, "| | | | | |\n|---|---:|---:|---:|---:|"),
}


def filled(page: str, found: dict[str, Any]) -> str:
    """Return `page` with every table between its two marks, ``<!-- NAME -->`` and ``<!-- end -->``, as `found` has it."""
    for name, (rows, head) in TABLES.items():
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows(found))
        table = f"<!-- {name} -->\n{head}\n{body}\n<!-- end -->"
        page, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, table=table: table, page, flags=re.DOTALL)
        assert count == 1, name
    measured = f"<!-- machine -->\n{found['machine']}, {found['repeats']} repeats\n<!-- end -->"
    return re.sub(r"<!-- machine -->.*?<!-- end -->", lambda _: measured, page, flags=re.DOTALL)


def with_peers(page: str, summary: dict[str, Any]) -> str:
    """Return `page` with the comparison on a GPU as `summary` has it; one of an older format changes nothing."""
    if summary.get("format") != report.FORMAT:
        return page
    section = f"<!-- peers -->\n{report.setting(summary)}\n\n{report.table(summary)}\n<!-- end -->"
    page, count = re.subn("<!-- peers -->.*?<!-- end -->", lambda _: section, page, flags=re.DOTALL)
    assert count == 1
    return page


def _millions(rate: float) -> str:
    return f"{rate / 1e6:.2f} M"


if __name__ == "__main__":
    page = filled(PAGE.read_text(), json.loads((HERE / "latest.json").read_text()))
    PAGE.write_text(with_peers(page, json.loads(PEERS.read_text())))

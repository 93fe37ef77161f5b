"""Draw `benchmarks/latest.json`: ``python -m benchmarks.figure`` writes docs/performance.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BLUE, GREY = "#0072B2", "#999999"  # of Okabe and Ito's colours, which everybody can tell apart


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the speed of every system, and how it changes as trace and model grow."""
    figure, (systems, growing) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(3, 2), layout="constrained")
    rates = dict(sorted(found["system_steps_per_s"].items(), key=lambda item: item[1]))
    systems.barh(list(rates), [rate / 1e6 for rate in rates.values()], color=BLUE)
    systems.axvline(1, color=GREY, linewidth=1)
    systems.set_xlabel("million layer-steps per second, one core")
    systems.set_title("every system, 24 layers x 64 experts, top-6, 25 %", fontsize=10)
    for name, marker in (("tokens", "o"), ("layers", "s"), ("experts", "^"), ("top_k", "D")):
        rates = found["growth"][name]
        smallest = int(next(iter(rates)))
        sizes = [int(size) / smallest for size in rates]
        growing.plot(sizes, [rate / 1e6 for rate in rates.values()], marker=marker, label=name)
    growing.set_xscale("log", base=2)
    growing.set_xticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    growing.set_ylim(bottom=0)
    growing.set_xlabel("size, times the smallest measured")
    growing.set_ylabel("million layer-steps per second")
    growing.set_title("LRU and the next layer's gate, as things grow", fontsize=10)
    growing.legend(frameon=False)
    for axes in (systems, growing):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(found["machine"], fontsize=9, color=GREY)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(json.loads((HERE / "latest.json").read_text()), HERE.parent / "docs" / "performance.png")

"""What the rows of a comparison say: medians, ratios to the best peer, and how far the bound is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return ``arms`` (medians over the repeats but the first), ``over_best_peer``, ``of_bound`` and ``errors``.

    ``over_best_peer`` is by budget the best of ours over the best other arm that offloads at that budget or, like
    accelerate's, at none; ``equal_kernels`` the same with ours run eagerly. ``of_bound`` is tokens/s times the larger of C,
    a step of ours with everything resident in the same way, and X, the link's time for the bytes that a token moved.
    """
    measured = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["arm"] for row in measured))
    arms = [_arm([row for row in measured if row["arm"] == name]) for name in names]
    reference = next((arm["tokens"] for arm in arms if arm["arm"] == "resident eager"), None)
    step_s = {
        how: 1 / arm["tokens_per_s"]
        for arm in arms
        for how in ("graphs", "eager")
        if arm["arm"] == f"resident foregate, {how}"
    }
    own = {how: arm["tokens"] for arm in arms for how in ("graphs", "eager") if arm["arm"] == f"resident foregate, {how}"}
    for arm in arms:
        how = "graphs" if arm.get("graphs") else "eager"
        mine = arm["arm"].startswith(("foregate", "resident foregate"))
        arm["equals_resident_eager"] = _equal(arm["tokens"], reference)
        arm["equals_resident_same_kernel"] = _equal(arm["tokens"], own.get(how)) if mine else None
        if mine and how in step_s and arm.get("link_bytes_per_s"):
            link_s = arm["bytes_h2d_per_token"] / arm["link_bytes_per_s"]
            arm["resident_step_ms"], arm["link_ms"] = 1e3 * step_s[how], 1e3 * link_s
            arm["of_bound"] = arm["tokens_per_s"] * max(step_s[how], link_s)
    budgets = sorted({arm["budget"] for arm in arms if arm["offloads"] and arm["budget"] is not None})
    over = {str(budget): _ratios(arms, budget) for budget in budgets}
    bounds = [arm["of_bound"] for arm in arms if arm["offloads"] and "of_bound" in arm]
    for arm in arms:
        arm["distinct_tokens"] = len(set(arm.pop("tokens")))
    return {
        "arms": arms,
        "over_best_peer": over,
        "of_bound": {"least": min(bounds), "median": median(bounds)} if bounds else None,
        "errors": [{name: row[name] for name in ("arm", "error", "repeat")} for row in rows if "error" in row],
    }


def _arm(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one arm's medians; the first repeat counts only where there is no other."""
    kept = [row for row in rows if row["repeat"] > 0] or list(rows)
    last = kept[-1]
    found = {
        name: last.get(name) for name in ("arm", "offloads", "budget", "device_expert_bytes", "graphs", "notes", "tokens")
    }
    speeds = [row["tokens_per_s"] for row in kept]
    found |= {
        "repeats": len(kept),
        "tokens_per_s": median(speeds),
        "least_tokens_per_s": min(speeds),
        "most_tokens_per_s": max(speeds),
        "prefill_s": median(row["prefill_s"] for row in kept),
        "peak_device_bytes": max(row["peak_device_bytes"] for row in kept),
    }
    if "bytes_h2d" in last:
        found["bytes_h2d_per_token"] = median(row["bytes_h2d"] / max(row["decoded"], 1) for row in kept)
        found["hit_rate"] = median(row["hit_rate"] for row in kept)
    if "link_bytes_per_s" in last:
        found["link_bytes_per_s"] = median(row["link_bytes_per_s"] for row in kept)
        parts = last["host_per_layer_ns"]
        found["host_per_layer_ns"] = {name: median(row["host_per_layer_ns"][name] for row in kept) for name in parts}
    return found


def _ratios(arms: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    offloading = [arm for arm in arms if arm["offloads"] and arm["budget"] in (budget, None)]
    ours = [arm for arm in offloading if arm["arm"].startswith("foregate")]
    peers = [arm for arm in offloading if not arm["arm"].startswith("foregate")]
    if not ours or not peers:
        return None
    best, peer = (max(group, key=lambda arm: arm["tokens_per_s"]) for group in (ours, peers))
    eager = [arm["tokens_per_s"] for arm in ours if not arm.get("graphs")]
    return {
        "ours": best["arm"],
        "peer": peer["arm"],
        "ratio": best["tokens_per_s"] / peer["tokens_per_s"],
        "equal_kernels": max(eager) / peer["tokens_per_s"] if eager else None,
    }


def _equal(tokens: Sequence[int], others: Sequence[int] | None) -> bool | None:
    """Whether two runs agree as far as both go."""
    if others is None:
        return None
    shorter = min(len(tokens), len(others))
    return list(tokens[:shorter]) == list(others[:shorter])


def table(summary: dict[str, Any]) -> str:
    """Return a summary as a table in Markdown, with the ratios below it."""
    lines = [
        "| arm | tokens/s | least to most | hit | MB a token | peak GB | tokens as resident | of bound |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for arm in summary["arms"]:
        own = arm["equals_resident_same_kernel"]
        same = arm["equals_resident_eager"] if own is None else own
        cells = (
            arm["arm"],
            _number(arm["tokens_per_s"], ".1f"),
            f"{arm['least_tokens_per_s']:.1f} to {arm['most_tokens_per_s']:.1f}",
            _number(arm.get("hit_rate"), ".3f"),
            _number(arm.get("bytes_h2d_per_token"), ".0f", 1e-6),
            _number(arm["peak_device_bytes"], ".1f", 1e-9),
            {None: "", True: "yes", False: "no"}[same],
            _number(arm.get("of_bound"), ".0%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for budget, ratio in summary["over_best_peer"].items():
        if ratio is not None:
            equal = _number(ratio["equal_kernels"], ".2f")
            lines.append(
                f"\nbudget {budget}: {ratio['ours']} is {ratio['ratio']:.2f} times {ratio['peer']}; run eagerly {equal}"
            )
    lines += [f"\n{error['arm']}: {error['error']}" for error in summary["errors"]]
    return "\n".join(lines)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)

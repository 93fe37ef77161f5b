"""What the rows of a comparison say: medians, ratios to the best peer, and how far the bound is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import ne
from statistics import median
from typing import Any

FORMAT = 2
"""Of the summary; the page of the figures is made of this one alone."""

FIELDS = ("arm", "kind", "kernel", "budget", "decoded", "device_expert_bytes", "graphs", "notes")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return ``arms``, medians over the repeats but the first, what they come to by budget, and ``errors``.

    ``over_best_peer``: the fastest of ours over the fastest peer of that budget or, like accelerate, of none.
    ``equal_kernels``: ours run eagerly with a per-layer LRU over the published-style one with our kernel, and the fastest of
    ours over the same. ``of_bound``: how near the fastest of ours with graphs, the fastest run eagerly, and the run that
    knows the future (``anchor``) come to 1/max(C, X). C is the step with everything resident in the same kernel, in its
    fastest repeat, X the time of the link for the bytes that a token moved, at the best rate of back-to-back copies that any
    arm saw when it opened: a machine that is slow for a moment must not make a bound that is easily reached.
    """
    measured = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["arm"] for row in measured))
    by_name = {name: [row for row in measured if row["arm"] == name] for name in names}
    arms = [_arm(by_name[name]) for name in names]
    resident = {arm["kernel"]: by_name[arm["arm"]][-1]["tokens"] for arm in arms if arm["kind"] == "resident"}
    step_s = {arm["kernel"]: 1 / arm["most_tokens_per_s"] for arm in arms if arm["kind"] == "resident"}
    rate = max((row["link_bytes_per_s"] for row in measured if "link_bytes_per_s" in row), default=None)
    for arm in arms:
        kernel, mine = arm["kernel"], by_name[arm["arm"]]
        arm["unlike_resident_eager"] = _unlike(mine, resident.get("eager"))
        arm["unlike_resident_same_kernel"] = _unlike(mine, resident.get(kernel))
        if kernel in step_s and rate and "link_bytes_per_s" in arm:
            link_s = arm["bytes_h2d_per_token"] / rate
            arm["resident_step_ms"], arm["link_ms"] = 1e3 * step_s[kernel], 1e3 * link_s
            arm["of_bound"] = arm["tokens_per_s"] * max(step_s[kernel], link_s)
    budgets = sorted({arm["budget"] for arm in arms if arm["kind"] != "resident" and arm["budget"] is not None})
    return {
        "link_bytes_per_s": rate,
        "arms": arms,
        "over_best_peer": {str(budget): _over_best_peer(arms, budget) for budget in budgets},
        "equal_kernels": {str(budget): _equal_kernels(arms, budget) for budget in budgets},
        "of_bound": {str(budget): _of_bound(arms, budget) for budget in budgets},
        "errors": [{name: row[name] for name in ("arm", "kind", "error", "repeat")} for row in rows if "error" in row],
    }


def defects(summary: Mapping[str, Any]) -> list[str]:
    """Say which arms of ours failed, or gave another token than the resident model in the same kernel."""
    mine = ("ours", "anchor")
    wrong = [arm["arm"] for arm in summary["arms"] if arm["kind"] in mine and arm["unlike_resident_same_kernel"]]
    failed = [error for error in summary["errors"] if error["kind"] in mine]
    return [f"not the resident model's tokens: {arm}" for arm in wrong] + [f"failed: {error['arm']}" for error in failed]


def _arm(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one arm's medians; the first repeat counts only where there is no other."""
    kept = [row for row in rows if row["repeat"] > 0] or list(rows)
    last = kept[-1]
    speeds = [row["tokens_per_s"] for row in kept]
    found = {name: last.get(name) for name in FIELDS} | {
        "repeats": len(kept),
        "tokens_per_s": median(speeds),
        "least_tokens_per_s": min(speeds),
        "most_tokens_per_s": max(speeds),
        "prefill_s": median(row["prefill_s"] for row in kept),
        "peak_device_bytes": max(row["peak_device_bytes"] for row in kept),
        "distinct_tokens": len(set(last["tokens"])),
    }
    if "bytes_h2d" in last:
        found["bytes_h2d_per_token"] = median(row["bytes_h2d"] / max(row["decoded"], 1) for row in kept)
        found["hit_rate"] = median(row["hit_rate"] for row in kept)
    if "link_bytes_per_s" in last:
        found["link_bytes_per_s"] = median(row["link_bytes_per_s"] for row in kept)
        found["unforeseen_events"] = max(row["unforeseen_events"] for row in kept)
        parts = last["host_per_layer_ns"]
        found["host_per_layer_ns"] = {
            name: median(row["host_per_layer_ns"][name] for row in kept if name in row["host_per_layer_ns"])
            for name in parts
        }
    return found


def _unlike(rows: Sequence[dict[str, Any]], resident: Sequence[int] | None) -> int | None:
    """Return how many passes gave another token than the resident model, in the worst of `rows`, as far as both go."""
    if resident is None:
        return None
    unlike: list[int] = [sum(map(ne, row["tokens"], resident)) for row in rows]
    return max(unlike)


def _fastest(arms: Sequence[dict[str, Any]], kind: str, budgets: tuple[float | None, ...]) -> dict[str, Any] | None:
    chosen = [arm for arm in arms if arm["kind"] == kind and arm["budget"] in budgets]
    return max(chosen, key=lambda arm: arm["tokens_per_s"], default=None)


def _ratio(ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> dict[str, Any] | None:
    if ours is None or peer is None:
        return None
    return {"ours": ours["arm"], "peer": peer["arm"], "ratio": ours["tokens_per_s"] / peer["tokens_per_s"]}


def _over_best_peer(arms: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    return _ratio(_fastest(arms, "ours", (budget,)), _fastest(arms, "peer", (budget, None)))


def _equal_kernels(arms: Sequence[dict[str, Any]], budget: float) -> dict[str, Any] | None:
    """Compare the two eager runs of a per-layer LRU on our kernel, where the executor differs alone; and our fastest."""
    ours = next((arm for arm in arms if arm["arm"] == f"foregate lru_per_layer, eager, {budget:g}"), None)
    peer = _fastest(arms, "equal", (budget,))
    found = _ratio(ours, peer)
    if found is None or ours is None or peer is None:
        return None
    moved, theirs = ours["bytes_h2d_per_token"], peer["bytes_h2d_per_token"]
    fastest = _ratio(_fastest(arms, "ours", (budget,)), peer)
    return {**found, "ratio_of_bytes": moved / theirs if theirs else None, "fastest": fastest}


def _of_bound(arms: Sequence[dict[str, Any]], budget: float) -> dict[str, Any]:
    """Return arm and share of its bound: of the fastest with graphs, the fastest run eagerly, and who knows the future."""
    bounded = [arm for arm in arms if arm["budget"] == budget and "of_bound" in arm]
    found: dict[str, Any] = {}
    for name, kind, how in (("graphs", "ours", "graphs"), ("eager", "ours", "eager"), ("anchor", "anchor", "graphs")):
        same = [arm for arm in bounded if arm["kernel"] == f"foregate, {how}"]
        arm = _fastest(same, kind, (budget,))
        found[name] = arm and {"arm": arm["arm"], "of_bound": arm["of_bound"]}
    return found


def setting(summary: Mapping[str, Any]) -> str:
    """Say on what machine, model and tokens a summary was measured."""
    decoded = max(arm["decoded"] for arm in summary["arms"])
    repeats = max(arm["repeats"] for arm in summary["arms"])
    software = f"torch {summary['torch']}, transformers {summary['transformers']}"
    return (
        f"One {summary['device']}, {summary['cpus']} CPUs, {software}, {summary['date']}. {summary['model']}; batch 1; a "
        f"prompt of {summary['prompt_tokens']} tokens and {summary['warm_up_tokens']} decoded ones to warm up, then another "
        f"prompt and {decoded} tokens that are timed; medians of up to {repeats} repeats after one that is dropped."
    )


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary as a table in Markdown, with what it comes to below it."""
    lines = [
        "| arm | repeats | tokens | tokens/s | least to most | hit | MB a token | peak GB "
        "| as resident eager | as resident, same kernel | of bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|---:|",
    ]
    for arm in summary["arms"]:
        passes = arm["decoded"] + 1
        cells = (
            arm["arm"],
            str(arm["repeats"]),
            str(arm["decoded"]),
            _number(arm["tokens_per_s"], ".1f"),
            f"{arm['least_tokens_per_s']:.1f} to {arm['most_tokens_per_s']:.1f}",
            _number(arm.get("hit_rate"), ".3f"),
            _number(arm.get("bytes_h2d_per_token"), ".0f", 1e-6),
            _number(arm["peak_device_bytes"], ".1f", 1e-9),
            _agreement(arm["unlike_resident_eager"], passes),
            _agreement(arm["unlike_resident_same_kernel"], passes),
            _number(arm.get("of_bound"), ".0%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{line}" for line in _in_words(summary)]
    lines += [f"\n{error['arm']}: {error['error']}" for error in summary["errors"]]
    return "\n".join(lines)


def _in_words(summary: Mapping[str, Any]) -> list[str]:
    """Say what a summary comes to, a sentence for each budget and question."""
    lines = []
    for budget, ratio in summary["over_best_peer"].items():
        if ratio is not None:
            best = f"*{ratio['ours']}* is **{ratio['ratio']:.2f} times** as fast as the best peer, *{ratio['peer']}*"
            lines.append(f"Budget {budget}: {best}.")
        equal = summary["equal_kernels"][budget]
        if equal is not None:
            moved = _number(equal["ratio_of_bytes"], ".2f")
            lines.append(
                f"Budget {budget}, equal kernels, no graphs: *{equal['ours']}* is **{equal['ratio']:.2f} times** as fast as "
                f"*{equal['peer']}*, having moved {moved} times the bytes; the fastest of ours is "
                f"{equal['fastest']['ratio']:.2f} times."
            )
        bound = summary["of_bound"][budget]
        names = {"graphs": "fastest of ours with graphs", "eager": "fastest run eagerly", "anchor": "with a known future"}
        reached = [
            f"{text} (*{bound[name]['arm']}*) {bound[name]['of_bound']:.0%}"
            for name, text in names.items()
            if bound[name] is not None
        ]
        if reached:
            lines.append(f"Budget {budget}, of 1/max(C, X): {'; '.join(reached)}.")
        lines += [_host_time(arm) for arm in summary["arms"] if bound["graphs"] and arm["arm"] == bound["graphs"]["arm"]]
    surprised = {arm["arm"]: arm["unforeseen_events"] for arm in summary["arms"] if arm.get("unforeseen_events")}
    lines += [f"*{arm}*: the router chose otherwise than recorded in {count} events." for arm, count in surprised.items()]
    return lines


def _host_time(arm: Mapping[str, Any]) -> str:
    parts = {name: f"{ns / 1e3:.0f}" for name, ns in arm["host_per_layer_ns"].items()}
    waits = parts.pop("await_gate")
    spent = ", ".join(f"{name.replace('_', ' ')} {us}" for name, us in parts.items())
    return f"Host time of a layer, *{arm['arm']}*, medians in microseconds: {spent}; it waits for the gate for {waits}."


def _agreement(unlike: int | None, passes: int) -> str:
    return "" if unlike is None else "yes" if unlike == 0 else f"{unlike} of {passes} differ"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)

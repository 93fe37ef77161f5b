"""Rankings of stored results: as a table of figures, in the terminal, as Markdown, as HTML and as JSON.

One table per trace, workload, hardware, model and budget. Its columns answer, in this order: how fast is it;
what limits it; is it the policy or the working set; how far is it from the best; did it cost quality.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sim.bootstrap import FEWEST_REQUESTS, Comparison, compare_speed
from sim.result import KINDS, limited_by
from sim.store import LISTS
from traces.errors import InputError

SETTING = ["trace", "trace_hash", "trace_kind", "trace_model", "workload", "tokens", "hardware", "model"]
"""Columns that all rows of one table share, besides the budget; `tokens` for traces that were cut short."""

BASELINE = "lru"
"""The system that every other one is compared with."""

BEST = "clairvoyant"
"""The ceiling that knows the future and has the same link: what a better policy could reach."""

SYNTHETIC = "SYNTHETIC ROUTING"
"""What every table and figure of generated routing says."""

PARTS = ("compute", "wait", "host")
"""What the time of a token consists of; columns ``<part>_ms_per_token``."""


def ranked(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return the rows table by table, fastest first and ceilings last, with columns added.

    ``label``                the system, and what tells it from its namesakes in the table (seed, engine, ...)
    ``rank``                  "1", "=2", ...: systems of one rank cannot be told apart from the fastest of
                              them; "3?" where there are too few requests to tell; "" for a ceiling
    ``speed_vs_lru``          tokens/s over those of lru in the same table; NaN without lru. ``_low`` and
                              ``_high`` are its 95 % interval, ``_is_real`` whether that excludes 1 (None
                              where there are too few requests)
    ``share_of_clairvoyant``  tokens/s over those of the clairvoyant in the same table; NaN without it
    ``limited_by``            anew, from the columns

    `seed` is that of the bootstrap. Raises InputError where there are no rows.
    """
    return pd.concat([_rank(table, seed) for table in _tables(rows)], ignore_index=True)


def print_ranking(console: Console, rows: pd.DataFrame) -> None:
    """Print one table per budget, in as many blocks as the console's width asks for, and a legend."""
    shown: set[str] = set()
    for table in split(ranked(rows)):
        groups = _groups(table)
        shown |= _shown(table, groups)
        first, *others = title(table)
        console.print()
        console.print(Text(first, style="bold"), soft_wrap=False)
        for line in others:
            console.print(Text(line))
        for block in _blocks(console, table, groups):
            console.print(block)
        for note in notes(table):
            console.print(Text(note))
    console.print(Text(legend(shown), style="dim"))


def ranking_markdown(rows: pd.DataFrame) -> str:
    """Return the tables as Markdown, ceilings in italics."""
    parts: list[str] = []
    shown: set[str] = set()
    for table in split(ranked(rows)):
        groups = _groups(table)
        shown |= _shown(table, groups)
        first, *others = title(table)
        parts.append("  \n".join([f"**{first}**", *others]))
        header = ["", "system", *(_markdown_header(title, columns) for title, columns in groups)]
        lines = [header, ["---:", "---", *["---:"] * len(groups)]]
        for place, row in enumerate(records(table)):
            cells = [" / ".join(column.cells[place].strip() for column in columns) for _, columns in groups]
            mark = "*" if row["ceiling"] else ""
            name = f"{mark}{row['label']}{mark}"
            lines.append([row["rank"], name, *(cell.replace("*", "\\*") for cell in cells)])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += notes(table)
    parts.append(legend(shown).replace("*", "\\*"))
    return "\n\n".join(parts) + "\n"


def ranking_html(rows: pd.DataFrame) -> str:
    """Return the tables as HTML, ceilings in a part of their own (class ``ceilings``)."""
    parts: list[str] = []
    shown: set[str] = set()
    for table in split(ranked(rows)):
        groups = _groups(table)
        shown |= _shown(table, groups)
        first, *others = title(table)
        parts.append(f"<h3>{escape(first)}</h3>" + "".join(f"<p>{escape(line)}</p>" for line in others))
        above = "".join(f'<th colspan="{len(columns)}">{escape(title)}</th>' for title, columns in groups)
        below = "".join(f"<th>{escape(column.header)}</th>" for _, columns in groups for column in columns)
        head = f'<thead><tr><th colspan="2"></th>{above}</tr><tr><th></th><th>system</th>{below}</tr></thead>'
        bodies = {"systems": "", "ceilings": ""}
        for place, row in enumerate(records(table)):
            cells = "".join(f"<td>{escape(column.cells[place].strip())}</td>" for _, columns in groups for column in columns)
            line = f"<tr><td>{row['rank']}</td><th>{escape(row['label'])}</th>{cells}</tr>"
            bodies["ceilings" if row["ceiling"] else "systems"] += line
        body = "".join(f'<tbody class="{name}">{lines}</tbody>' for name, lines in bodies.items() if lines)
        parts.append(f'<div class="wide"><table>{head}{body}</table></div>')
        parts += [f"<p>{escape(note)}</p>" for note in notes(table)]
    explained = "".join(f"<li>{escape(line)}</li>" for line in legend(shown).split("\n"))
    return "\n".join([*parts, f'<ul class="legend">{explained}</ul>'])


def ranking_dict(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the tables as JSON values: per table what its rows share, and its systems in order.

    Figures that do not exist are None; the lists per request and the config stay in the store, under ``key``.
    """
    shared = [*SETTING, "budget", "budget_bytes"]
    left_out = {*LISTS, "config", *shared}
    tables = []
    for table in split(ranked(rows)):
        systems = [{name: _json(row[name]) for name in row if name not in left_out} for row in records(table)]
        head = {name: _json(value) for name, value in table.iloc[0][shared].items()}
        tables.append({"title": title(table), **head, "systems": systems})
    return {"tables": tables}


def split(rankings: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the tables of what `ranked` returned."""
    return [table for _, table in rankings.groupby([*SETTING, "budget"], sort=False, dropna=False)]


def title(table: pd.DataFrame) -> list[str]:
    """Return the lines above a table: its budget first, then what its rows share."""
    return [f"{synthetic(table)}{budget(table)}", setting(table)]


def synthetic(rows: pd.DataFrame) -> str:
    """Return what must stand before everything else said of generated routing, or ""."""
    return f"{SYNTHETIC}: " if (rows["trace_kind"] == "synthetic").any() else ""


def budget(table: pd.DataFrame) -> str:
    """Say the budget of a table: share of all experts' bytes, bytes, slots."""
    row = table.iloc[0]
    slots = table["slots"].unique()
    amount = f"{row['budget_bytes'] / 1e9:.3g} GB" + (f", {slots[0]:,} slots" if len(slots) == 1 else "")
    return f"budget {row['budget']:.3g} of all experts ({amount})"


def setting(table: pd.DataFrame) -> str:
    """Say what was run on what: trace, workload, model and hardware with where its constants come from."""
    row = table.iloc[0]
    kind = "" if row["trace_kind"] == "recorded" else f" ({row['trace_kind']})"
    run = f"{row['tokens']:,} tokens of {_requests(len(row['requests']))}, {row['workload']}"
    routed = row["trace_model"]
    if not routed:
        model = f"priced with the bytes of {row['model']}"
    elif routed == row["model"]:
        model = row["model"]
    else:
        model = f"routing of {routed} priced with the bytes of {row['model']}"
    return f"trace {row['trace']}{kind}: {run}; {model} on {row['hardware']}{_tags(row['config'])}"


def notes(table: pd.DataFrame) -> list[str]:
    """Return what is to be said about a table's systems, once for all that share it."""
    noted = table[table["note"].fillna("") != ""] if "note" in table else table.iloc[:0]
    lines = []
    for note, rows in noted.groupby("note", sort=False):
        about = "caution" if len(rows) == len(table) else ", ".join(rows["label"])
        lines.append(f"{about}: {note}")
    return lines


def legend(groups: Iterable[str]) -> str:
    """Return what the columns and signs of these groups mean, a line each."""
    shown = set(groups)
    return "\n".join(text for name, text in _LEGEND.items() if name in shown)


def _shown(table: pd.DataFrame, groups: Iterable[tuple[str, list[_Column]]]) -> set[str]:
    """Return what of a table the legend must explain."""
    signs = {sign for sign in "=?" if table["rank"].str.contains(sign, regex=False).any()}
    return signs | {title for title, _ in groups}


_GAP = 1
"""Blanks between groups of columns."""


class _Column(NamedTuple):
    header: str
    cells: list[str]


_SPEED, _TIME, _EXPERTS, _BYTES, _DISTANCE, _QUALITY, _AGAINST = (
    "how fast",
    "ms per token",
    "experts %",
    "MB per token",
    "best",
    "gate mass %",
    "speed against",
)

_LEGEND = {
    "=": "=  cannot be told apart from the fastest of that rank, by a paired bootstrap over requests",
    "?": f"?  not claimed: fewer than {FEWEST_REQUESTS} requests",
    _SPEED: "tok/s  tokens per second; p50, p95  of the time per output token (TPOT), and mean TTFT, in ms",
    _TIME: "*  where most of the time goes; wait, host  compute stood still for a transfer, for the host",
    _EXPERTS: "hit, late, miss  resident, in flight, neither when their layer started",
    _BYTES: "demand  loads on a miss; useful, late, wasted  prefetches in time, too late, never used; "
    "refresh  again after use",
    _DISTANCE: f"best  % of the speed of {BEST}, which knows the future",
    _AGAINST: f"{BASELINE}  speed as a multiple of {BASELINE}'s, 95 % interval; n.s.: the interval holds 1",
    _QUALITY: "skipped, substituted  share of the gate's weight that was not computed as routed",
}


def _tables(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the rows of every setting in order of appearance, and of every budget from small to large."""
    if rows.empty:
        raise InputError("there are no results to rank")
    rows = rows.reset_index(drop=True)
    routed = rows["trace_model"] if "trace_model" in rows else pd.Series([None] * len(rows), dtype=object)
    # Null, None and NaN are one to the reader but several to `groupby`.
    rows["trace_model"] = routed.astype(object).where(routed.notna(), "")
    for _, same_setting in rows.groupby(SETTING, sort=False, dropna=False):
        for _, table in same_setting.groupby("budget", sort=True, dropna=False):
            yield table


def _rank(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return one table in order, with the columns that `ranked` adds."""
    table = table.assign(label=_labels(table))
    table = table.sort_values(["ceiling", "tokens_per_s", "label"], ascending=[True, False, True])
    rows = records(table)
    against = [_against(row, rows, seed) for row in rows]
    return table.assign(
        rank=_ranks([row for row in rows if not row["ceiling"]], seed) + [""] * int(table["ceiling"].sum()),
        speed_vs_lru=[found.ratio for found in against],
        speed_vs_lru_low=[found.low for found in against],
        speed_vs_lru_high=[found.high for found in against],
        speed_vs_lru_is_real=pd.Series([found.is_real for found in against], index=table.index, dtype=object),
        share_of_clairvoyant=[_share_of_best(row, rows) for row in rows],
        limited_by=[limited_by(row) for row in rows],
    )


def _ranks(rows: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """Return the ranks of systems that are sorted by speed."""
    leaders: list[int] = []
    doubtful = False
    for place, row in enumerate(rows):
        found = compare_speed(rows[leaders[-1]], row, seed) if leaders else None
        doubtful = doubtful or (found is not None and found.is_real is None)
        leaders.append(leaders[-1] if found is not None and found.is_real is False else place)
    shared = Counter(leaders)
    return [f"{'=' if shared[leader] > 1 else ''}{leader + 1}{'?' if doubtful else ''}" for leader in leaders]


def _against(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], seed: int) -> Comparison:
    """Compare a row with lru in the same table."""
    baseline = _fellow(row, rows, BASELINE)
    if baseline is None:
        return Comparison(math.nan, math.nan, math.nan, None, 0, f"no result of {BASELINE}")
    return compare_speed(row, baseline, seed)


def _share_of_best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    best = _fellow(row, rows, BEST)
    return math.nan if best is None else float(row["tokens_per_s"] / best["tokens_per_s"])


def _fellow(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], system: str) -> Mapping[str, Any] | None:
    """Return the row of `system` that is most like `row`: of its seed, engine and code where there is one."""
    found = [other for other in rows if other["system"] == system]
    alike = ("seed", "engine", "code_version")
    return max(found, key=lambda other: [other[name] == row[name] for name in alike], default=None)


def _labels(table: pd.DataFrame) -> pd.Series[str]:
    """Return the systems' names, with what differs between rows of one name."""
    labels = table["system"].astype(object)
    for name, text in (("seed", "seed {}"), ("slots", "{} slots"), ("engine", "{}"), ("code_version", "{}")):
        twins = table.groupby(labels)[name].transform("nunique") > 1
        if twins.any():
            labels = labels.where(~twins, labels + " " + table[name].map(text.format))
    twins = labels.duplicated(keep=False)
    return labels.where(~twins, labels + " " + table["key"].str[:8])


def _groups(table: pd.DataFrame) -> list[tuple[str, list[_Column]]]:
    """Return the columns of a printed table by the question that they answer, without the empty ones."""
    moved = table[[f"{kind}_bytes" for kind in KINDS]]
    megabytes = moved.div(moved.sum(axis=1).replace(0, 1), axis=0).mul(table["moved_mb_per_token"], axis=0)
    accesses = table[["hits", "late_hits", "misses"]].sum(axis=1).replace(0, 1)
    times = table[[f"{part}_ms_per_token" for part in PARTS]]
    time_digits = _digits(times.to_numpy())
    speed = [
        _Column("tok/s", _numbers(table["tokens_per_s"])),
        _Column("p50", _numbers(table["tpot_ms_p50"])),
        _Column("p95", _numbers(table["tpot_ms_p95"])),
    ]
    if table["ttft_ms_mean"].notna().any():
        speed.append(_Column("TTFT", _numbers(table["ttft_ms_mean"], 0)))
    time = [
        _Column(
            part,
            [
                f"{value:.{time_digits}f}{'*' if most == part else ' '}"
                for value, most in zip(times[f"{part}_ms_per_token"], table["limited_by"], strict=True)
            ],
        )
        for part in PARTS
    ]
    experts = [
        _Column(header, [_percent(value) for value in table[name] / accesses])
        for header, name in (("hit", "hits"), ("late", "late_hits"), ("miss", "misses"))
    ]
    bytes_moved = [
        _Column(kind, _numbers(megabytes[f"{kind}_bytes"], _digits(megabytes.to_numpy())))
        for kind in KINDS
        if kind == "demand" or moved[f"{kind}_bytes"].any()
    ]
    groups = [(_SPEED, speed), (_TIME, time), (_EXPERTS, experts), (_BYTES, bytes_moved)]
    if table["share_of_clairvoyant"].notna().any():
        best = _Column("%", [_whole(100 * share) for share in table["share_of_clairvoyant"]])
        groups.append((_DISTANCE, [best]))
    if table["speed_vs_lru"].notna().any():
        groups.append((_AGAINST, [_Column(BASELINE, [_difference(row) for row in records(table)])]))
    quality = [
        _Column(what, [_percent(share) for share in table[f"gate_mass_{what}"]])
        for what in ("skipped", "substituted")
        if table[f"gate_mass_{what}"].fillna(0).any()
    ]
    if quality:
        groups.append((_QUALITY, quality))
    return groups


def _blocks(console: Console, table: pd.DataFrame, groups: Sequence[tuple[str, list[_Column]]]) -> Iterator[Table]:
    """Yield the groups side by side; those that do not fit follow in further blocks under the same names."""
    names = ("", [_Column("", list(table["rank"])), _Column("system", list(table["label"]))])
    # Asked without a limit, for else the measure is cut at the console's width.
    unlimited = console.options.update(max_width=10_000)

    def width(group: tuple[str, list[_Column]]) -> int:
        return Measurement.get(console, unlimited, _group(table, *group)).maximum + _GAP

    widths = [width(group) for group in groups]
    free = console.width - width(names) + _GAP
    cuts = _cuts(widths, free)
    # As few blocks as fit, and then as narrow as as few allow, so that the last one is not a single column.
    narrower = free
    while narrower > max(widths) and len(_cuts(widths, narrower - 1)) == len(cuts):
        narrower -= 1
        cuts = _cuts(widths, narrower)
    for start, end in zip([0, *cuts], [*cuts, len(groups)], strict=True):
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in range(start, end + 1):
            grid.add_column(no_wrap=True)
        grid.add_row(*(_group(table, *group) for group in [names, *groups[start:end]]))
        yield grid


def _cuts(widths: Sequence[int], free: int) -> list[int]:
    """Return before which items a new line must start where each line has room for `free`."""
    cuts: list[int] = []
    used = 0
    for place, width in enumerate(widths):
        if place and used + width > free:
            cuts.append(place)
            used = 0
        used += width
    return cuts


def _group(table: pd.DataFrame, title: str, columns: Sequence[_Column]) -> Group:
    """Return the columns under one heading, systems first and the ceilings below a line of their own."""
    ceiling = table["ceiling"].to_numpy()
    inner = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, min_width=len(title))
    for column in columns:
        side: Literal["left", "right"] = "left" if column.header == "system" else "right"
        inner.add_column(Text(column.header), justify=side, no_wrap=True)
    for place in np.flatnonzero(~ceiling):
        inner.add_row(*(Text(column.cells[place]) for column in columns))
    if ceiling.any():
        inner.add_row(*(Text("ceilings:" if column.header == "system" else "", style="dim") for column in columns))
    for place in np.flatnonzero(ceiling):
        inner.add_row(*(Text(column.cells[place], style="dim") for column in columns))
    return Group(Text(title, style="bold", justify="center"), inner)


def _markdown_header(title: str, columns: Sequence[_Column]) -> str:
    return f"{title}: {' / '.join(column.header for column in columns)}"


def _difference(row: Mapping[str, Any]) -> str:
    """Say a speed as a multiple of lru's, with its interval."""
    if row["system"] == BASELINE and row["speed_vs_lru"] == 1:
        return "1"
    if math.isnan(row["speed_vs_lru"]):
        return "-"
    # Enough digits that a real difference does not read as none.
    digits = 2 if abs(row["speed_vs_lru"] - 1) >= 0.02 else 3
    ratio, low, high = (f"{row[f'speed_vs_lru{end}']:.{digits}f}" for end in ("", "_low", "_high"))
    if row["speed_vs_lru_is_real"] is None:
        return f"{ratio}x ?"
    return f"{ratio}x {low}-{high}" if row["speed_vs_lru_is_real"] else f"n.s. {low}-{high}"


def _tags(config: Any) -> str:
    """Say how many constants of the hardware are measured, from a datasheet or assumed."""
    try:
        hardware = json.loads(config)["hardware"]
    except (TypeError, ValueError, KeyError):
        return ""
    counted = Counter(_tags_in(hardware))
    return f" ({', '.join(f'{count} {tag}' for tag, count in counted.most_common())})" if counted else ""


def _tags_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "tag" and isinstance(inner, str):
                yield inner
            else:
                yield from _tags_in(inner)


def _numbers(values: pd.Series[float], digits: int | None = None) -> list[str]:
    """Write a column with the same digits after the point in every cell; "-" where there is no figure."""
    digits = _digits(values.to_numpy()) if digits is None else digits
    return ["-" if math.isnan(value) else "0" if value == 0 else f"{value:.{digits}f}" for value in values]


def _digits(values: Any) -> int:
    largest = np.nanmax(values, initial=0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2


def _percent(share: float) -> str:
    """Write a share with one digit after the point; exactly none and all without."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}" if 0 < share < 1 else f"{100 * share:.0f}"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count:,} requests"


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as mappings, by column."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _json(value: Any) -> Any:
    """Return a cell as a JSON value."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain

"""The report: one HTML file of stored results that needs nothing else, neither files nor a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd

from policies.system import AXES
from sim import store
from sim.bootstrap import FEWEST_REQUESTS
from sim.config import Config
from sim.figures import FIGURES, agreement_figure, host_figure
from sim.figures.style import DPI
from sim.hardware import TAGS, make_hardware
from sim.report import SETTING, SYNTHETIC, notes, ranked, ranking_html, records, setting, split, synthetic
from traces.atomic import write_atomically
from traces.errors import InputError, nearest

OF_CELLS = {"validation": agreement_figure, "host_time": host_figure}
"""Figures that are drawn from measured cells instead of rows."""


class Measured(NamedTuple):
    """What a validation on one machine found."""

    machine: str
    summary: Mapping[str, Any]
    """The content of a ``summary.json`` (docs/validation.md)."""


class Selected(NamedTuple):
    """Rows to report."""

    rows: pd.DataFrame
    left_out: int
    """Results of older code, left out because newer code has run the same."""


def select_rows(results: str | Path, select: Mapping[str, Any]) -> Selected:
    """Return the stored rows that have the values of `select`, by column a value or several; of equal runs the newest.

    Rows of one setting follow one another, the settings in the order of their names and numbers. Raises InputError for an
    unknown column and where no row is left.
    """
    known = [name for name in store.SCHEMA.names if name not in store.LISTS]
    for column in select:
        if column not in known:
            raise InputError(f"select: there is no column '{column}': {nearest(column, known)}")
    rows = store.read_rows(results, where=select)
    if rows.empty:
        raise InputError(f"{results}: no stored result has {dict(select)}")
    age = {key: place for place, key in enumerate(store.keys_by_age(results))}
    by_age = rows.assign(age=rows["key"].map(age)).sort_values("age")
    newest = by_age.drop_duplicates(["trace_hash", "config"], keep="last").index
    kept = rows[rows.index.isin(newest)].reset_index(drop=True)
    settings = [[_by_number(str(value)) for value in row] for row in kept[SETTING].itertuples(index=False)]
    return Selected(
        kept.iloc[sorted(range(len(kept)), key=settings.__getitem__)].reset_index(drop=True), len(rows) - len(kept)
    )


def no_rows() -> Selected:
    """Return what the figures `OF_CELLS` need of the store: nothing."""
    return Selected(pd.DataFrame(), 0)


def _by_number(text: str) -> list[tuple[str, float]]:
    """Return what sorts texts by the numbers in them: 25 before 100."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(word, float(number)) for word, number in zip(parts[::2], [*parts[1::2], "0"], strict=True)]


def write_figures(
    names: Sequence[str], rows: pd.DataFrame, measured: Sequence[Measured], folder: str | Path
) -> tuple[list[Path], list[str]]:
    """Draw figures by name into `folder`, each as PNG and PDF; return the files and, for each that could not be, why."""
    written: list[Path] = []
    refused = []
    for name in names:
        paths = [Path(folder) / f"{name}{ending}" for ending in (".png", ".pdf")]
        try:
            _draw(name, rows, measured, *paths)
        except InputError as error:
            refused.append(f"{name}: {error}")
        else:
            written += paths
    return written, refused


def write_report(
    chosen: Selected,
    measured: Sequence[Measured],
    path: str | Path,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Path:
    """Write the report of the chosen rows to `path` and return it; the same rows give the same bytes.

    `progress` is told (done, total, what) after every figure.
    """
    rows = chosen.rows
    tables = split(ranked(rows))
    banner = f'<p class="warning">{SYNTHETIC}: what is marked so was generated, not recorded.</p>' if synthetic(rows) else ""
    sections = [
        f"<h1>foregate report</h1>{banner}{_list(dict.fromkeys(setting(table) for table in tables))}",
        _section("Before you read it", _list(caveats(chosen, measured))),
        _section("Rankings", ranking_html(rows)),
        _section("Figures", "".join(_figures(rows, measured, progress))),
        _section("Configuration", _systems(rows) + "".join(_machines(rows)) + _configs(rows)),
        _section("Where the results come from", _provenance(rows)),
    ]
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{_HEAD}</head><body>{"".join(sections)}</body></html>\n'
    write_atomically(Path(path), page.encode())
    return Path(path)


def caveats(chosen: Selected, measured: Sequence[Measured]) -> list[str]:
    """Return what a reader must know before the figures, the gravest first."""
    rows = chosen.rows
    found = []
    for name in rows.loc[rows["trace_kind"] == "synthetic", "trace"].unique():
        found.append(
            f"{SYNTHETIC}: trace {name} was generated to have the statistics of a model's routing; no model routed so."
        )
    found.append(f"Every figure of a system is simulated. {' '.join(_validity(one) for one in measured) or _NOT_VALIDATED}")
    for hardware in _hardware(rows):
        assumed = ", ".join(constant.name for constant in hardware.constants if constant.tag == "assumed")
        found.append(f"Hardware {hardware.name}: {hardware.tags()}" + (f"; assumed: {assumed}." if assumed else "."))
    priced = rows[(rows["trace_model"] != rows["model"]) & rows["trace_model"].notna()]
    for (routed, model), _ in priced.groupby(["trace_model", "model"], sort=False):
        found.append(f"The routing is that of {routed}; bytes and compute are those of {model}.")
    few = int((rows["requests"].map(len) < FEWEST_REQUESTS).sum())
    if few:
        found.append(f"{few} results have fewer than {FEWEST_REQUESTS} requests: no difference is claimed between them.")
    found += [note for table in split(ranked(rows)) for note in notes(table)]
    if rows["ceiling"].any():
        found.append("Ceilings, in italics, know the future or have a link that costs nothing: no real system reaches them.")
    if chosen.left_out:
        found.append(f"{chosen.left_out} results of older code are left out, since newer code has run the same.")
    versions = rows["code_version"].unique()
    if len(versions) > 1:
        found.append(f"The results are of {len(versions)} versions of the code: {', '.join(versions)}.")
    return list(dict.fromkeys(found))


# ---- figures -----------------------------------------------------------------------------------------------------

_TITLES = {
    "ranking": "How fast is each system, and what limits it?",
    "budget_curve": "What does more memory buy?",
    "time_breakdown": "Where does the time go as the budget grows?",
    "traffic": "What crosses the link?",
    "crossover": "Which system wins at which link and budget?",
    "miss_curve": "How many experts would a cache miss, without prefetch and without time?",
    "prediction_by_layer": "How much of each layer is foretold?",
    "validation": "How wrong is the simulation?",
    "host_time": "What does the host thread do in a layer?",
}
"""The question that each figure answers."""

NAMES = tuple(_TITLES)
"""Every figure that can be drawn."""


def _draw(name: str, rows: pd.DataFrame, measured: Sequence[Measured], *paths: Path) -> None:
    if name not in OF_CELLS:
        FIGURES[name](rows, *paths)
        return
    if not measured:
        raise InputError("no measurements are committed yet")
    cells = [{**cell, "name": _cell_name(cell, one, measured)} for one in measured for cell in one.summary["cells"]]
    OF_CELLS[name](cells, ", ".join(one.machine for one in measured), *paths)


def _cell_name(cell: Mapping[str, Any], one: Measured, measured: Sequence[Measured]) -> str:
    return str(cell["name"]) if len(measured) == 1 else f"{one.machine}: {cell['name']}"


def _figures(rows: pd.DataFrame, measured: Sequence[Measured], progress: Callable[[int, int, str], None]) -> Iterator[str]:
    """Yield every figure that these rows can give, drawn into the page, or a sentence on why there is none."""
    with TemporaryDirectory() as folder:
        for place, (name, question) in enumerate(_TITLES.items(), start=1):
            path = Path(folder) / f"{name}.png"
            try:
                _draw(name, rows, measured, path)
            except InputError as error:
                content = f"<p>Not drawn: {escape(str(error))}.</p>"
            else:
                data = path.read_bytes()
                pixels = int.from_bytes(data[16:20], "big")  # of a PNG's width
                inline = base64.b64encode(data).decode()
                width = pixels * 96 // DPI  # a browser's inch has 96 pixels
                content = f'<img width="{width}" alt="{escape(question)}" src="data:image/png;base64,{inline}">'
            progress(place, len(_TITLES), name)
            yield f'<h3 id="{name}">{escape(question)}</h3>{content}'


# ---- text and tables ---------------------------------------------------------------------------------------------


def _validity(one: Measured) -> str:
    found = one.summary
    tau = "-" if found["kendall_tau"] is None else f"{found['kendall_tau']:.2f}"
    return (
        f"Against {len(found['cells'])} runs measured on {one.machine} and simulated on the profile "
        f"{found['hardware']}, measured in the same hour, the simulated step was wrong by "
        f"{found['mean_error']:.1%} on average and {found['worst_error']:.1%} at worst; the order of systems agreed with a "
        f"Kendall's tau of {tau}. Take no smaller difference for one that a GPU would show; other profiles were not "
        "measured against, and are wrong by more."
    )


_NOT_VALIDATED = "No measurement on a GPU is at hand to say how wrong that is."


def _hardware(rows: pd.DataFrame) -> list[Any]:
    """Return the machines of the rows, each once."""
    profiles = [json.loads(config)["hardware"] for config in rows.drop_duplicates("hardware")["config"]]
    return [make_hardware(profile) for profile in profiles]


def _machines(rows: pd.DataFrame) -> Iterator[str]:
    for hardware in _hardware(rows):
        lines = [
            [constant.name, _value(constant.value), constant.unit, constant.tag, constant.source]
            for constant in sorted(hardware.constants, key=lambda constant: TAGS.index(constant.tag))
        ]
        table = _table(["constant", "value", "unit", "tag", "source"], lines)
        yield _details(f"Hardware {hardware.name}: {hardware.tags()}", table)


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(f"{size:,}: {ns:,}" for size, ns in value)


def _systems(rows: pd.DataFrame) -> str:
    """Return a table of what the systems are made of."""
    lines = []
    for row in records(rows.drop_duplicates("system").sort_values(["ceiling", "system"])):
        config: Config = json.loads(row["config"])
        lines.append([row["system"], *(_part(config[axis]) for axis in AXES)])
    return _details("What each system is made of", _table(["system", *AXES], lines))


def _part(spec: Mapping[str, Any]) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in spec.items() if name != "_target_")
    name = str(spec["_target_"]).rpartition(".")[2]
    return f"{name} ({parameters})" if parameters else name


def _configs(rows: pd.DataFrame) -> str:
    """Return one resolved configuration in full; the others are in the store."""
    text = json.dumps(json.loads(rows.iloc[0]["config"]), indent=1)
    return _details(f"Resolved configuration of {rows.iloc[0]['key'][:12]}", f"<pre>{escape(text)}</pre>")


def _provenance(rows: pd.DataFrame) -> str:
    traces = rows.drop_duplicates("trace_hash")
    names = ["trace", "trace_kind", "trace_model", "trace_hash"]
    lines = [[str(row[name]) for name in names] for row in records(traces)]
    about = [
        f"{len(rows)} results, code {', '.join(rows['code_version'].unique())}, engine {', '.join(rows['engine'].unique())}."
    ]
    columns = ["system", "hardware", "budget", "seed", "key"]
    each = [[str(row[name]) for name in columns] for row in records(rows)]
    return (
        _list(about)
        + _table(["trace", "kind", "model", "sha256"], lines)
        + _details("Every result and its key", _table(columns, each))
    )


def _section(name: str, content: str) -> str:
    return f"<section><h2>{escape(name)}</h2>{content}</section>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table class="text"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# The policy forbids a browser to fetch anything, whatever the rows' texts may hold.
_HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>foregate report</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff;
       max-width: 1300px; margin: 2em auto; padding: 0 1em }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em }
h3 { margin-bottom: 0.3em }
.warning { color: #D55E00; font-weight: bold; font-size: 1.2em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0.5em 0 }
td, th { padding: 1px 8px; text-align: right; white-space: nowrap; font-weight: normal }
thead th { font-weight: bold; border-bottom: 1px solid #999; vertical-align: bottom }
thead tr:first-child th[colspan] { text-align: center; border-bottom: 0 }
tbody th, thead tr:last-child th:nth-child(2), table.text td, table.text th { text-align: left }
table.text td { white-space: normal; vertical-align: top }
tbody tr:nth-child(even) { background: #f4f4f4 }
tbody.ceilings { color: #666; font-style: italic; border-top: 1px solid #999 }
img { max-width: 100% }
pre, .legend { font-size: 12px }
pre { overflow-x: auto; background: #f4f4f4; padding: 1em }
details { margin: 0.7em 0 }
summary { cursor: pointer }
</style>"""

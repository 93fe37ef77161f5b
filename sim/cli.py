"""The command line: ``foregate VERB [Hydra overrides]``. Every verb is a function that can be called without it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import traces
from policies.system import AXES
from sim.compare import compare
from sim.config import (
    Config,
    check_types,
    compose_config,
    expand,
    groups,
    name_system,
    one_of,
    options,
    quoted,
    readable,
)
from sim.experiment import composition_of, simulate, trace_path, trace_tokens
from sim.report import print_ranking, ranking_dict
from sim.search import search
from sim.study import Outcome, as_word, run_study, status
from traces.errors import InputError, nearest
from traces.recorder.loading import require_packages

USAGE = """foregate VERB [overrides]

  compare                 rank systems on a trace at equal memory (the main job)
  simulate                one system, one result; -m sweeps: simulate -m system=lru,fate budget=0.2,0.4
  sweep                   a study: sweep experiment=ranking, or axes of your own: sweep axes.system=[lru,fate]
  search                  parameters tuned on half of the requests, reported on the others: search experiment=tuning
  status                  which points of every study are stored, and which are missing
  report                  stored results as one HTML file, or as a figure: report figure=budget_curve
  trace record            a real model's routing, as it generates (needs torch and transformers)
  generate                a real model with its experts offloaded (needs torch and transformers)
  validate                run systems on the GPU (or read runs=FOLDER) and say how wrong the simulation was
  calibrate               measure this machine and write its hardware profile
  trace import FILE       another program's recording into a trace file
  trace inspect [FILE]    what a trace's routing is like
  trace synthesize        routing with the statistics of a published model
  list [GROUP]            what can be plugged where

Overrides choose (trace=, workload=, hardware=, model=, system=, budget=), swap one part of a system (predictor=, prefetch=,
eviction=, allocation=, miss=) or set a value (prefetch.depth=2). `foregate VERB --cfg` prints the resulting configuration;
--config-dir DIR adds options of your own; --json prints JSON instead of tables (compare, validate, trace
inspect).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except InputError as error:
        print(f"foregate: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"foregate: {error.filename}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"foregate: interrupted{_after_interrupt(arguments)}", file=sys.stderr)  # noqa: T201
        return 130


def _after_interrupt(arguments: Sequence[str] | None) -> str:
    """Return the end of the sentence about an interrupt: what was kept, and what the same command does."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["compare"], ["simulate"], ["sweep"], ["search"]) or words[:2] == ["trace", "record"]:
        return "; finished results are kept, the same command goes on"
    if words[:1] == ["validate"]:
        return "; runs that were measured are kept, but the same command starts over"
    return "; nothing was kept, the same command starts over"


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        _out().print(USAGE, end="", highlight=False, markup=False)
        return 0
    verb = words.pop(0)
    if verb == "trace":
        verb = f"trace {words.pop(0)}" if words else "trace"
    if verb not in _VERBS:
        raise InputError(f"'{verb}' is not a verb: {nearest(verb, _VERBS)}")
    if {"-h", "--help"} & set(words):
        _out().print(USAGE + _settings_help(verb), end="", highlight=False, markup=False, soft_wrap=True)
        return 0
    return _VERBS[verb](words)


def _settings_help(verb: str) -> str:
    """Return the settings of a verb with their defaults and comments, as its configuration file has them."""
    file = resources.files("conf") / f"{verb.replace(' ', '_')}.yaml"
    if not file.is_file():
        return ""
    lines = file.read_text().splitlines()
    own = [line for line in lines if re.match("[a-z_]+:", line) and not line.startswith(("defaults:", "hydra:"))]
    also = "those of simulate, and " if "  - simulate" in lines else ""
    return f"\nSettings of {verb}, {also}by default:\n\n" + "".join(f"  {line}\n" for line in own)


# ---- verbs -------------------------------------------------------------------------------------------------------


def _compare(words: list[str]) -> int:
    overrides, config_dir = _options("compare", words)
    if overrides is None:
        return 0
    _refuse_timeline(overrides)
    base = compose_config("compare", overrides, config_dir)
    with _Progress("systems x budgets") as progress:
        rows, left_out = compare(overrides, config_dir=config_dir, progress=progress)
    if base["json"]:
        print(json.dumps(ranking_dict(rows), indent=1))  # noqa: T201
    else:
        print_ranking(_out(), rows)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in left_out:
        errors.print(f"left out: {sentence}", markup=False)
    from sim.figures import ranking_figure  # matplotlib takes half a second to import

    figure = ranking_figure(rows, Path(base["results"]) / "ranking.png")
    errors.print(f"figure: {figure}; rows: {Path(base['results']) / 'rows'}", markup=False)
    return 0


def _report(words: list[str]) -> int:
    config = _settings("report", words, "results")
    if config is None:
        return 0
    from real.validation.command import ground_truth
    from sim.html import NAMES, OF_CELLS, Measured, no_rows, select_rows, write_figures, write_report

    if config["figure"] is not None:
        one_of("figure", config["figure"], ("all", *NAMES))  # before rows, which need not be there yet
    measured = [Measured(machine, summary) for machine, summary in ground_truth()]
    chosen = no_rows() if config["figure"] in OF_CELLS else select_rows(config["results"], config["select"])
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    if config["figure"] is None:
        with _Progress("figures", "{done} of {total} figures drawn") as progress:
            path = write_report(chosen, measured, config["out"] or Path(config["results"]) / "report.html", progress)
        _out().print(str(path), soft_wrap=True, highlight=False, markup=False)
        return 0
    names = list(NAMES) if config["figure"] == "all" else [config["figure"]]
    paths, refused = write_figures(names, chosen.rows, measured, config["out"] or Path(config["results"]) / "figures")
    for path in paths:
        _out().print(str(path), soft_wrap=True, highlight=False, markup=False)
    if not paths:
        raise InputError(refused[0])
    for sentence in refused:
        errors.print(f"not drawn: {sentence}", markup=False)
    return 0


def _simulate(words: list[str]) -> int:
    if {"-m", "--multirun"} & set(words):
        return _multirun("simulate", words)
    overrides, config_dir = _options("simulate", words)
    if overrides is None:
        return 0
    config = compose_config("simulate", overrides, config_dir)
    if config["timeline"] is not None:
        from sim.timeline import check_timeline, write_run_timeline

        check_types(config)
        check_timeline(config["timeline"], config["timeline_steps"])  # before anything runs
    _say(_row_line(simulate(config)))
    if config["timeline"] is not None:
        path = write_run_timeline(config["timeline"], config, config["timeline_steps"])
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"timeline: {path}", markup=False)
    return 0


def _sweep(words: list[str]) -> int:
    # Axes are an open mapping: their keys need not stand in a file.
    words = [f"++{word}" if word.startswith("axes.") else word for word in words]
    if {"-m", "--multirun"} & set(words):
        return _multirun("sweep", words)
    overrides, config_dir = _options("sweep", words)
    if overrides is None:
        return 0
    with _Progress("points") as progress:
        outcome = run_study(overrides, config_dir=config_dir, progress=progress)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in outcome.left_out:
        errors.print(f"left out: {sentence}", markup=False)
    _say(_study_line(outcome))
    return 0


def _study_line(outcome: Outcome) -> str:
    name, results = outcome.study.name, outcome.study.results
    return (
        f"{name}: {outcome.stored} points stored, {outcome.computed} of them computed now; rows: {Path(results) / 'rows'}, "
        f"which of them are the study's: {Path(results) / 'studies' / name}.json"
    )


def _search(words: list[str]) -> int:
    words = [f"++{word}" if word.startswith("space.") else word for word in words]
    overrides, config_dir = _options("search", words)
    if overrides is None:
        return 0
    with _Progress("trials", "{done} of {total} trials done") as progress:
        found = search(overrides, config_dir=config_dir, progress=progress)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in found.failed:
        errors.print(f"could not run: {sentence}", markup=False)
    parameters = ", ".join(
        f"{name} {as_word(found.before[name])} -> {as_word(value)}" for name, value in found.after.items()
    )
    _say(f"{found.system}: {parameters} (the fastest of {found.trials} trials)")
    for name, each in (("the requests it was tuned on", found.tuning), ("the requests held out", found.held_out)):
        interval = "too few to say" if each.is_real is None else f"{each.low:.3f} to {each.high:.3f}"
        _say(f"  {name} ({each.requests}): {each.ratio:.3f}x as fast as before ({interval})")
    _say(f"  gap: {100 * found.gap:.1f} points; rows: {Path(found.study.results) / 'rows'}")
    return 0


def _status(words: list[str]) -> int:
    config = _settings("status", words, "results")
    if config is None:
        return 0
    found = status(config["results"])
    if not found:
        raise InputError(f"{config['results']}: no study was run here")
    for study in found:
        lines = [f"{study.name}: {study.stored} of {study.points} points stored, {len(study.missing)} missing"]
        if study.cannot_run:
            lines.append(f"  {len(study.cannot_run)} cannot run, the first: {next(iter(study.cannot_run.values()))}")
        if study.missing:
            lines.append("  the first missing: " + " ".join(f"{axis}={value}" for axis, value in study.missing[0].items()))
        for line in lines:
            _say(line)
    return 0


def _multirun(verb: str, words: list[str]) -> int:
    """Let Hydra sweep with the launcher chosen; a job that cannot run does not stop the others."""
    overrides, config_dir = _options(verb, [word for word in words if word not in ("-m", "--multirun")])
    if overrides is None:
        return 0
    _refuse_timeline(overrides)
    overrides = expand(overrides)
    found = None if config_dir is None else str(Path(config_dir).absolute())
    job = partial(_job, verb, overrides, found, str(Path.cwd()), os.getpid())
    search = create_config_search_path("pkg://conf")
    if found is not None:
        search.prepend("command-line", f"file://{found}", anchor="schema")
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    try:
        # What `hydra.main` does, except that it keeps the jobs' results to itself.
        hydra = Hydra.create_main_hydra2("foregate", search)
        batches = hydra.multirun(verb, job, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(readable(error, verb, overrides, found)) from error
    finally:
        GlobalHydra.instance().clear()
    returns: list[JobReturn] = [each for batch in batches for each in batch]
    faults = []
    for each in returns:
        printed, lines, fault = each.return_value
        for line in [] if printed else lines:
            _say(line)
        if fault is not None:
            faults.append(fault)
    if faults:
        count = f"{len(faults)} points of the sweep could not run, the first: " if len(faults) > 1 else ""
        raise InputError(f"{count}{faults[0]}")
    return 0


def _refuse_timeline(overrides: Sequence[str]) -> None:
    """Raise InputError where many runs are asked for a timeline."""
    if any(override.partition("=")[0] == "timeline" for override in overrides):
        raise InputError("timeline: only of one run, foregate simulate ... timeline=NAME.json.gz without -m")


def _job(
    verb: str, words: list[str], config_dir: str | None, folder: str, parent: int, composed: DictConfig
) -> tuple[bool, list[str], str | None]:
    """Run one job of a multirun, wherever the launcher put it; return whether its lines are printed, them, and a fault.

    Exceptions are for defects: Hydra would print a line of its own about one, and only of the first job that has one.
    """
    if Path(folder).is_dir():
        os.chdir(folder)  # relative paths mean what they mean where the command was given
    here = os.getpid() == parent
    chosen = list(HydraConfig.get().overrides.task)
    try:
        if verb == "simulate":
            lines = [_row_line(simulate(_job_config(composed)))]
        else:
            swept = [word for word in chosen if word not in words]
            study = "+".join([str(composed["study"]), *(word.replace("/", "_") for word in swept)])
            outcome = run_study([*chosen, f"study={quoted(study)}"], config_dir=config_dir)
            lines = [*(f"left out: {sentence}" for sentence in outcome.left_out), _study_line(outcome)]
    except InputError as error:
        return here, [], str(error)
    if here:
        for line in lines:
            _say(line)
    return here, lines, None


def _job_config(composed: DictConfig) -> Config:
    """Return the configuration of one point of a sweep."""
    overrides = list(HydraConfig.get().overrides.task)
    try:
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(readable(error, "simulate", overrides)) from error
    assert isinstance(container, dict)
    config: Config = {str(key): value for key, value in container.items()}
    name_system(config, overrides)
    return config


def _trace_import(words: list[str]) -> int:
    config = _settings("trace_import", words, "source")
    if config is None:
        return 0
    source = Path(config["source"])
    out = Path(config["out"] or f"{source.stem}.safetensors")
    trace = traces.import_trace(source, config["format"], **config["options"])
    traces.save_trace(trace, out)
    _say_written(out, trace, f"{len(trace.domains)} requests")
    return 0


def _trace_record(words: list[str]) -> int:
    # The recorder itself checks its options, since it is also used without a command line.
    overrides, config_dir = _options("trace_record", _with_checkpoint(words))
    if overrides is None:
        return 0
    config = compose_config("trace_record", overrides, config_dir)
    check_types(config)
    checkpoint, prompts, out = (config.pop(name) for name in ("checkpoint", "prompts", "out"))
    out = Path(out or f"{Path(checkpoint).name}.safetensors")
    options = traces.RecordOptions.of(config)
    with _Progress("batches", "{done} of {total} batches done, {what}") as progress:
        trace = traces.record(checkpoint, prompts, out, options, progress=progress)
    _say_written(out, trace, f"{len(trace.domains)} requests in {trace.steps:,} forward passes")
    return 0


def _with_checkpoint(words: list[str]) -> list[str]:
    """Write ``model=`` as ``checkpoint=``: to Hydra it would choose from the group of models that can be priced."""
    words = [f"checkpoint={quoted(word.removeprefix('model='))}" if word.startswith("model=") else word for word in words]
    if not any("checkpoint=" in word for word in words):
        raise InputError("model has no value; give one: model=FOLDER_OR_ID")
    return words


def _generate(words: list[str]) -> int:
    overrides, config_dir = _options("generate", _with_checkpoint(words))
    if overrides is None:
        return 0
    config = compose_config("generate", overrides, config_dir)
    check_types(config)
    require_packages("generating")
    from real.generate import device_of, generate

    if config.get("free_link"):
        raise InputError(f"system '{config['system']['name']}' needs a link that takes no time, which no machine has")
    where = device_of(config["device"])
    if where == "cpu" and config["device"] == "auto":
        errors = Console(stderr=True, soft_wrap=True, highlight=False)
        errors.print("there is no GPU that torch can use: everything runs on the CPU, and the times mean nothing")
    with _Progress("requests", "{done} of {total} requests done") as progress:
        result = generate(
            config["checkpoint"],
            config["prompts"],
            composition_of(config),
            config["budget"],
            where=where,
            progress=progress,
            **{name: config[name] for name in ("new_tokens", "graphs", "check", "dtype", "seed")},
        )
    print(json.dumps(result, indent=1))  # noqa: T201
    return 0


def _say_written(out: Path, trace: traces.Trace, extent: str) -> None:
    model = trace.model
    _out().print(
        f"{out}: {trace.tokens:,} tokens of {extent}, {model.layers} layers x {model.experts} experts, top-{model.top_k}, "
        f"from {model.name}",
        soft_wrap=True,
        highlight=False,
    )


def _trace_inspect(words: list[str]) -> int:
    config = _settings("trace_inspect", words, "trace")
    if config is None:
        return 0
    trace = traces.load_trace(trace_path(config), verify=True)
    tokens = trace_tokens(config)
    if tokens is not None:
        trace = traces.take_tokens(trace, tokens)
    found = traces.inspect_trace(trace, seed=config["seed"])
    evidence = traces.find_evidence(trace, config["seed"]) if config["evidence"] else None
    if config["json"]:
        shown = found.as_json() if evidence is None else {**found.as_json(), "evidence": evidence.as_json()}
        print(json.dumps(shown, indent=1))  # noqa: T201
        return 0
    _out().print(traces.render_statistics(found))
    if evidence is not None:
        _out().print(traces.render_evidence(evidence))
    return 0


def _trace_synthesize(words: list[str]) -> int:
    config = _settings("trace_synthesize", words, "out")
    if config is None:
        return 0
    recipes = traces.CALIBRATED
    if config["recipe"] not in recipes:
        raise InputError(f"recipe is '{config['recipe']}': {nearest(str(config['recipe']), recipes)}")
    trace = traces.synthesize(seed=config["seed"], **{**recipes[config["recipe"]], **config["parameters"]})
    traces.save_trace(trace, config["out"])
    _out().print(f"{config['out']}: {trace.tokens:,} tokens of SYNTHETIC routing ({config['recipe']})", highlight=False)
    return 0


def _validate(words: list[str]) -> int:
    from real.validation.command import print_reports, reports_dict, validate

    overrides, config_dir = _options("validate", words)
    if overrides is None:
        return 0
    reports, hardware, timeline = validate(overrides, config_dir)
    if "json=true" in overrides:
        print(json.dumps(reports_dict(reports), indent=1))  # noqa: T201
    else:
        print_reports(_out(), reports, hardware)
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"timeline: {timeline}", markup=False)
    return 0


def _calibrate(words: list[str]) -> int:
    config = _settings("calibrate", words, "out")
    if config is None:
        return 0
    from real.calibration.profile import calibrate  # torch takes seconds to import, and need not be there

    one_of("base", config["base"], options("hardware"))
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in calibrate(config["out"], config["base"], lambda what: errors.print(what, markup=False)):
        errors.print(sentence, markup=False)
    _say(str(config["out"]))
    for line in _how_to_choose(Path(config["out"])):
        _say(line)
    return 0


def _how_to_choose(profile: Path) -> list[str]:
    """Return the commands that use a written profile: Hydra finds it in a folder ``hardware`` of its --config-dir alone."""
    folder = profile.parent
    if folder.name == "hardware":
        return [f"choose it: foregate compare --config-dir {shlex.quote(str(folder.parent))} hardware={profile.stem}"]
    group = shlex.quote(str(folder / "hardware"))
    return [
        f"put it into a folder 'hardware': mkdir -p {group} && mv {shlex.quote(str(profile))} {group}",
        f"then choose it: foregate compare --config-dir {shlex.quote(str(folder))} hardware={profile.stem}",
    ]


def _list(words: list[str]) -> int:
    known = [*groups(), "formats"]
    for word in words:
        if word not in known:
            raise InputError(f"there is no group '{word}': {nearest(word, known)}")
    for group in words or known:
        _out().print(f"[bold]{group}[/bold]{' (an axis)' if group in AXES else ''}", highlight=False)
        for name, text in _described(group):
            _out().print(f"  {name:22} {text}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _described(group: str) -> list[tuple[str, str]]:
    """Return every option of a group with the line that introduces it."""
    if group == "formats":
        return [(name, (module.__doc__ or "").split("\n")[0]) for name, module in traces.importers().items()]
    folder = Path(str(sys.modules["conf"].__file__)).parent / group
    described = []
    for name in options(group):
        lines = (folder / f"{name}.yaml").read_text().splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
        described.append((name, comments[0] if comments else ""))
    return described


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "compare": _compare,
    "simulate": _simulate,
    "sweep": _sweep,
    "search": _search,
    "status": _status,
    "report": _report,
    "generate": _generate,
    "validate": _validate,
    "calibrate": _calibrate,
    "trace import": _trace_import,
    "trace record": _trace_record,
    "trace inspect": _trace_inspect,
    "trace synthesize": _trace_synthesize,
    "list": _list,
}


# ---- what the verbs share ----------------------------------------------------------------------------------------


def _options(config_name: str, words: list[str]) -> tuple[list[str] | None, str | None]:
    """Split the words into overrides and --config-dir; with --cfg print the configuration and return no overrides."""
    overrides, config_dir, rest = [], None, list(words)
    show = False
    while rest:
        word = rest.pop(0)
        if word == "--cfg":
            show = True
            if rest and rest[0] == "job":
                rest.pop(0)
        elif word == "--json":
            overrides.append("json=true")
        elif word == "--config-dir":
            if not rest:
                raise InputError("--config-dir needs a folder")
            config_dir = rest.pop(0)
        elif word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise InputError(f"'{word}' is not an override: write NAME=VALUE, or `foregate --help`")
        else:
            overrides.append(word)
    if show:
        print(OmegaConf.to_yaml(OmegaConf.create(compose_config(config_name, overrides, config_dir))), end="")  # noqa: T201
        return None, config_dir
    return overrides, config_dir


def _settings(config_name: str, words: list[str], positional: str) -> Config | None:
    """Compose a verb's configuration; a first word that is no override is the value of `positional`."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        value = words[0] if positional == "trace" else quoted(words[0])
        words = [f"{positional}={value}", *words[1:]]
    # Mappings that are open: their keys need not stand in the file.
    words = [f"++{word}" if word.startswith(("parameters", "options", "select")) else word for word in words]
    overrides, config_dir = _options(config_name, words)
    if overrides is None:
        return None
    config = compose_config(config_name, overrides, config_dir)
    check_types(config)
    return config


def _row_line(row: dict[str, Any]) -> str:
    """Return one result in a line, or as much of it as matters first."""
    return (
        f"{row['system']} at {row['budget']:.3g}: {row['tokens_per_s']:.1f} tokens/s, limited by {row['limited_by']} "
        f"(ms per token: compute {row['compute_ms_per_token']:.2f}, wait {row['wait_ms_per_token']:.2f}, "
        f"host {row['host_ms_per_token']:.2f}), {row['hit_rate']:.1%} hits, {row['moved_mb_per_token']:.0f} MB per token; "
        f"{row['trace']}{' (SYNTHETIC ROUTING)' if row['trace_kind'] == 'synthetic' else ''} priced as {row['model']} on "
        f"{row['hardware']}"
    )


def _say(line: str) -> None:
    _out().print(line, soft_wrap=True, highlight=False, markup=False)


class _Output(Console):
    """Standard output whose reader may go away: `main` sees to that."""

    def on_broken_pipe(self) -> None:
        """Pass the exception on, where rich would exit with 1."""
        raise


def _out() -> Console:
    """Return standard output; wide enough for the tables where it is not a terminal."""
    return _Output() if sys.stdout.isatty() else _Output(width=150)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; always on standard error."""

    def __init__(self, what: str, line: str = "{done} of {total} runs done") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("")
        self.tenth = 0
        self.line = line

    def __enter__(self) -> Callable[[int, int, str], None]:
        self.bar.start()
        return self._tell

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _tell(self, done: int, total: int, what: str) -> None:
        self.bar.update(self.task, completed=done, total=total, description=what)
        if not self.console.is_terminal and done * 10 // total > self.tenth:
            self.tenth = done * 10 // total
            self.console.print(self.line.format(done=done, total=total, what=what), markup=False)


if __name__ == "__main__":
    sys.exit(main())

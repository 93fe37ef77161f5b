"""The command line, run in-process: what it prints, what it stores, and one sentence for whatever is wrong."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from builders import make_trace, save_npz

import conf
import policies
import real
import sim
import traces
from sim import store
from sim.cli import _VERBS, main
from sim.config import compose_config, options
from traces import load_trace, save_trace

HERE = Path(__file__).parents[1]

STEPS = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 4], [0, 4]], [[0, 1], [2, 0]], [[2, 0], [1, 3]]]
"""Five tokens in two layers of five experts."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder in which every test runs; what a command changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line and return exit code, standard output and the lines of standard error."""

    def run_words(*words):
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run_words


@pytest.fixture
def tiny(folder):
    """Overrides for a trace file that takes no time."""
    save_trace(make_trace(STEPS), folder / "tiny.safetensors")
    return ["trace=tiny.safetensors", "model=trace", "budget=0.5"]


def systems_in(results):
    return sorted(store.read_rows(results)["system"])


def rows_in(results):
    """Every stored row's file, and when it was written."""
    return {file.name: file.stat().st_mtime_ns for file in (Path(results) / "rows").iterdir()}


# ---- what works ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["simulate", "--help"], ["trace", "inspect", "-h"]])
def test_help_says_every_verb(run, words):
    code, out, err = run(*words)
    assert (code, err) == (0, [])
    assert out.startswith("foregate VERB [overrides]\n")
    verbs = ("compare", "simulate", "sweep", "search", "status", "list", "trace record", "trace import", "trace inspect")
    for verb in (*verbs, "trace synthesize"):
        assert f"\n  {verb} " in out


def test_help_of_a_verb_says_its_own_settings(run):
    out = run("validate", "--help")[1]
    settings = out.partition("\nSettings of validate, those of simulate, and by default:\n\n")[2].splitlines()
    assert [line.split(":")[0] for line in settings] == ["  runs", "  cells", "  timeline", "  json"]
    assert "\n  figure: null # ranking, budget_curve, " in run("report", "-h")[1]
    assert "  new_tokens: " in run("trace", "record", "-h")[1]
    assert "Settings of" not in run("list", "-h")[1]


def test_an_unknown_figure_is_named_before_rows_are_missed(run):
    code, _, err = run("report", "figure=nosuch", "results=nowhere")
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("foregate: figure is 'nosuch': known: all, budget_curve, ")


def test_list_names_every_option_of_every_group(run):
    code, out, err = run("list")
    assert (code, err) == (0, [])
    for group in ("predictor", "prefetch", "eviction", "allocation", "miss", "system", "trace", "workload", "hardware"):
        listed = [line.split()[0] for line in out.split(f"\n{group}")[-1].split("\n")[1:] if line.startswith("  ")]
        assert listed[: len(options(group))] == options(group)


def test_list_of_a_group_gives_a_line_to_each_option(run):
    code, out, err = run("list", "allocation", "formats")
    assert (code, err) == (0, [])
    assert out.splitlines() == [
        "allocation (an axis)",
        "  global                 One pool for the whole device.",
        "  shallow_favouring      All experts of the first layers, the rest divided (Fate).",
        "  transient              Room for one token, and nothing kept.",
        "  uniform                The same slots for every layer.",
        "formats",
        *(f"  {name:22} {module.__doc__.splitlines()[0]}" for name, module in traces.importers().items()),
    ]


def test_simulate_prints_one_line_and_stores_one_row(run, tiny, folder):
    code, out, err = run("simulate", *tiny)
    assert (code, err) == (0, [])
    assert out.startswith("lru at 0.5: ")
    assert out.endswith(" 15.0% hits, 0 MB per token; tiny priced as tiny on h100_pcie5\n")
    assert systems_in("results") == ["lru"]
    assert sorted(path.name for path in folder.iterdir()) == ["results", "tiny.safetensors"]


def test_simulate_runs_on_the_bundled_recording(run):
    code, out, err = run("simulate", "trace.tokens=20", "system=fate", "eviction=lru")
    assert (code, err) == (0, [])
    assert out.startswith("fate+eviction=lru at 0.25: ")


def test_a_sweep_runs_every_point(run, tiny):
    code, out, err = run("simulate", "-m", *tiny[:2], "system=lru,sieve", "budget=0.5,0.3")
    assert (code, err) == (0, [])
    begun = [line.split(":")[0] for line in out.splitlines()]
    assert begun == ["lru at 0.5", "lru at 0.3", "sieve at 0.5", "sieve at 0.3"]
    assert systems_in("results") == ["lru", "lru", "sieve", "sieve"]


def test_a_point_of_a_sweep_is_the_same_result_as_a_run_of_its_own(run, tiny):
    run("simulate", "--multirun", *tiny, "system=lru", "eviction=sieve")
    before = rows_in("results")
    assert systems_in("results") == ["lru+eviction=sieve"]
    assert run("simulate", *tiny, "system=lru", "eviction=sieve")[0] == 0
    assert rows_in("results") == before


def test_a_sweep_takes_options_of_ones_own(run, tiny, folder):
    (folder / "own" / "eviction").mkdir(parents=True)
    (folder / "own" / "eviction" / "own.yaml").write_text("# Own.\n_target_: policies.eviction.lru.LRU\n")
    code, out, err = run("simulate", "-m", "--config-dir", "own", *tiny, "eviction=own")
    assert (code, err) == (0, [])
    assert out.startswith("lru+eviction=own at 0.5: ")


def test_a_sweep_leaves_the_process_as_it_was(run, tiny):
    before = sys.argv
    run("simulate", "-m", *tiny)
    assert sys.argv is before
    assert run("simulate", *tiny)[0] == 0


def test_cfg_prints_the_configuration_and_runs_nothing(run, folder):
    code, out, err = run("simulate", "--cfg", "system=fate", "budget=4GB")
    assert (code, err) == (0, [])
    assert yaml.safe_load(out) == compose_config("simulate", ["system=fate", "budget=4GB"])
    assert list(folder.iterdir()) == []


COMPARE = ["compare", "trace.tokens=100", "budget=0.25", "jobs=1"]


def test_compare_ranks_draws_and_stores(run, folder):
    code, out, err = run(*COMPARE, "systems=[lru,belady]")
    assert code == 0
    assert "budget 0.25 of all experts" in out
    assert "belady" in out
    assert err == ["1 of 2 runs done", "2 of 2 runs done", "figure: results/ranking.png; rows: results/rows"]
    assert systems_in("results") == ["belady", "lru"]
    assert (folder / "results" / "ranking.png").stat().st_size > 10_000


def test_compare_goes_on_where_it_was_and_runs_nothing_twice(run, tiny, monkeypatch):
    import sim.experiment

    ran = []
    run_system = sim.experiment.run_system

    def counted(config, *others):
        ran.append(config["system"]["name"])
        return run_system(config, *others)

    monkeypatch.setattr(sim.experiment, "run_system", counted)
    words = ["compare", *tiny, "jobs=1"]
    assert run(*words, "systems=[lru]")[0] == 0
    assert run(*words, "systems=[lru,lfu]")[0] == 0
    assert ran == ["lru", "lfu"]
    before = rows_in("results")
    code, _, err = run(*words, "systems=[lru,lfu]", "--json")
    assert (code, err) == (0, ["figure: results/ranking.png; rows: results/rows"])
    assert (ran, rows_in("results")) == (["lru", "lfu"], before)


def test_compare_leaves_out_what_the_trace_cannot_serve_and_says_so(run, tiny):
    code, out, err = run("compare", *tiny, "jobs=1", "systems=[lru,fate]", "json=true")
    assert code == 0
    assert [one["system"] for one in json.loads(out)["tables"][0]["systems"]] == ["lru"]
    assert err[1] == (
        "left out: system 'fate': its predictor CrossLayerGate needs lookahead observations, which trace 'tiny' does not "
        "hold; choose another predictor or a trace recorded with it"
    )


def test_a_trace_without_gate_weights_runs_all_but_those_who_need_them(run, folder):
    known, unknown = make_trace(STEPS), replace(make_trace(STEPS), weights=None, ranked=False)
    for name, trace in (("known", known), ("unknown", unknown)):
        save_trace(trace, folder / f"{name}.safetensors")
        words = [f"trace={name}.safetensors", "model=trace", "budget=0.5", "jobs=1", "systems=[lru,previous_token]"]
        code, _, err = run("compare", *words, f"results={name}")
        assert code == 0
    assert err[1] == (
        "left out: system 'previous_token': its predictor PreviousToken needs gate weights, which trace 'unknown' does not "
        "hold; choose another predictor or a trace recorded with it"
    )
    assert systems_in("unknown") == [name for name in systems_in("known") if name != "previous_token"]
    speed = {name: store.read_rows(name).set_index("system")["tokens_per_s"] for name in ("known", "unknown")}
    assert speed["known"]["lru"] == speed["unknown"]["lru"]


def test_import_takes_the_options_of_the_format(run, folder):
    tokens = [[[0, 0], [0, 1], [5, 4]], [[0, 0], [2, 3], [1, 0]]]
    (folder / "it.json").write_text(json.dumps({"prompt_routed_experts": tokens, "choices": [{"routed_experts": []}]}))
    words = ["trace", "import", "it.json", "format=vllm", "options.experts=6", "options.moe_layers=[1,2]"]
    assert run(*words) == (0, "it.safetensors: 2 tokens of 1 requests, 2 layers x 6 experts, top-2, from it\n", [])
    assert load_trace("it.safetensors", verify=True).experts.tolist() == [token[1:] for token in tokens]


def test_compare_leaves_out_budgets_that_a_system_cannot_use(run, tiny):
    code, _, err = run("compare", *tiny[:2], "jobs=1", "systems=[lru,lru_per_layer]", "budget=[0.3,0.5]")
    assert code == 0
    assert len(store.read_rows("results")) == 3
    assert [line for line in err if line.startswith("left out: ")] == [
        "left out: system 'lru_per_layer': allocation Uniform leaves a layer with 1 of 3 slots, but one event needs 2 (the "
        "model's top-k); raise the budget to at least 0.4000 of all experts or choose allocation=global"
    ]


def test_compare_gives_the_same_rows_from_several_processes(run, tiny):
    words = ["compare", *tiny, "systems=[lru,lfu]", "--json"]
    one, two = run(*words, "jobs=1", "results=one"), run(*words, "jobs=2", "results=two")
    assert one[0] == two[0] == 0
    assert json.loads(one[1])["tables"][0]["systems"][0]["tokens_per_s"] > 0
    assert sorted(rows_in("one")) == sorted(rows_in("two"))


def test_inspect_describes_a_trace(run, tiny):
    code, out, err = run("trace", "inspect", "tiny.safetensors", "--json")
    assert (code, err) == (0, [])
    found = json.loads(out)
    assert {name: found[name] for name in ("model", "tokens", "layers", "experts", "top_k")} == {
        "model": "tiny",
        "tokens": 5,
        "layers": 2,
        "experts": 5,
        "top_k": 2,
    }
    assert json.loads(run("trace", "inspect", "tiny.safetensors", "trace.tokens=3", "json=true")[1])["tokens"] == 3


def test_inspect_prints_tables_otherwise(run, tiny):
    code, out, err = run("trace", "inspect", "tiny.safetensors")
    assert (code, err) == (0, [])
    assert "tiny" in out


def test_inspect_shows_evidence_when_asked(run, tiny):
    code, out, err = run("trace", "inspect", "tiny.safetensors", "evidence=true")
    assert (code, err) == (0, [])
    assert "shuffled" in out
    assert "shuffled" not in run("trace", "inspect", "tiny.safetensors")[1]
    assert (
        json.loads(run("trace", "inspect", "tiny.safetensors", "evidence=true", "json=true")[1])["evidence"]["domains"]
        is None
    )
    assert run("trace", "inspect", "tiny.safetensors", "evidence=yes please")[2] == [
        "foregate: evidence is 'yes please': it must be true or false"
    ]


SMALL = "parameters={layers: 2, experts: 6, top_k: 2, requests: 2, prefill_tokens: 3, decode_tokens: 4, lookahead_depth: 1}"


def test_synthesize_writes_a_trace_that_can_be_simulated(run):
    code, out, err = run("trace", "synthesize", "out=made up.safetensors", "seed=3", SMALL)
    assert (code, out, err) == (0, "made up.safetensors: 14 tokens of SYNTHETIC routing (deepseek_v2_lite)\n", [])
    assert load_trace("made up.safetensors", verify=True).is_synthetic
    code, out, _ = run("simulate", "trace=./made up.safetensors", "system=fate", "budget=0.5")
    assert code == 0
    assert "; made up (SYNTHETIC ROUTING) priced as olmoe_1b_7b on h100_pcie5" in out


def test_synthesize_makes_the_same_trace_from_the_same_seed(run):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("trace", "synthesize", f"{out}.safetensors", f"seed={seed}", SMALL)
    first, same, other = (load_trace(f"{name}.safetensors").hash for name in "abc")
    assert (first == same, first == other) == (True, False)


@pytest.mark.parametrize("change", ["parameters.requests=3", "++parameters.requests=3", "parameters={requests: 3}"])
def test_parameters_of_a_recipe_may_be_added(run, change):
    code, out, _ = run("trace", "synthesize", "x.safetensors", SMALL, change)
    assert (code, out) == (0, "x.safetensors: 21 tokens of SYNTHETIC routing (deepseek_v2_lite)\n")


def test_import_writes_a_trace_beside_where_it_is_called(run, folder):
    (folder / "elsewhere").mkdir()
    save_npz(folder / "elsewhere" / "it's.npz", STEPS, expert_count=5)
    code, out, err = run("trace", "import", "elsewhere/it's.npz")
    said = "it's.safetensors: 5 tokens of 1 requests, 2 layers x 5 experts, top-2, from tiny\n"
    assert (code, out, err) == (0, said, [])
    assert load_trace("it's.safetensors", verify=True).experts.tolist() == STEPS
    assert run("simulate", "trace=it's.safetensors")[0] == 0


# ---- what is refused -------------------------------------------------------------------------------------


def save_pickle(path):
    """Write a pickle that would betray itself if it were read."""

    class Opened:
        def __reduce__(self):
            return (Path.touch, (Path("opened"),))

    path.write_bytes(pickle.dumps(Opened()))


def cut_short(path, source):
    path.write_bytes(source.read_bytes()[:-7])


REFUSED = {
    "unknown verb": (["simulat"], "'simulat' is not a verb: did you mean 'simulate'? known: calibrate, compare, "),
    "unknown trace verb": (["trace", "inspekt"], "'trace inspekt' is not a verb: did you mean 'trace inspect'? known: "),
    "trace without a verb": (["trace"], "'trace' is not a verb: did you mean 'trace record'? known: "),
    "unknown group": (["list", "evictoin"], "there is no group 'evictoin': did you mean 'eviction'? known: "),
    "unknown system": (["simulate", "system=lruu"], "system=lruu: system 'lruu' is unknown: did you mean 'lru'? known: "),
    "unknown system to compare": (["compare", "systems=[lru,fatte]"], "systems is 'fatte': did you mean 'fate'? known: "),
    "one system to compare": (
        ["compare", "system=fate"],
        "system=NAME chooses one system, but a comparison takes ",
    ),
    "no system to compare": (["compare", "systems=[]"], "systems or budget is empty: name at least one"),
    "unknown axis": (["simulate", "evictoin=lru"], "'evictoin' is not a setting: did you mean 'eviction'? known: "),
    "misspelt key": (["simulate", "budgt=1"], "'budgt' is not a setting: did you mean 'budget'? known: "),
    "no override": (["simulate", "budget"], "'budget' is not an override: write NAME=VALUE, or `foregate --help`"),
    "unknown option": (["simulate", "--fast"], "'--fast' is not an override: write NAME=VALUE, or `foregate --help`"),
    "foreign pickle": (["simulate", "trace=pickle.safetensors"], "pickle.safetensors: "),
    "truncated trace": (["simulate", "trace=short.safetensors"], "short.safetensors: "),
    "truncated trace to inspect": (["trace", "inspect", "short.safetensors"], "short.safetensors: "),
    "no such trace": (["simulate", "trace=no.safetensors"], "no.safetensors: there is no such file"),
    "budget too small": (
        ["simulate", "budget=0.001"],
        "budget gives 1 expert slots, but one event needs 8 (the model's top-k); raise the budget to at least 0.0079 of ",
    ),
    "no budget to compare": (["compare", "budget=[0.5,abc]"], "budget is 'abc': it must be a fraction of all experts "),
    "no lookahead": (
        ["simulate", "trace=tiny.safetensors", "system=fate"],
        "system 'fate': its predictor CrossLayerGate needs lookahead observations, which trace 'tiny' does not hold; ",
    ),
    "no system can run": (
        ["compare", "trace=tiny.safetensors", "systems=[fate]"],
        "no system could run: system 'fate': its predictor CrossLayerGate needs lookahead observations, ",
    ),
    "unknown engine": (["simulate", "engine=foo", "trace.tokens=9"], "engine is 'foo': known: auto, fast, reference"),
    "no jobs": (["compare", "jobs=0"], "jobs is 0: it must be a number of processes, or -1 for one per core"),
    "no tokens": (["simulate", "trace.tokens=0"], "trace.tokens is 0: it must be a whole number of tokens, at least 1"),
    "wrong seed": (["trace", "inspect", "seed=-1"], "seed is -1: it must be a whole number of at least 0"),
    "results are a file": (
        ["simulate", "trace=tiny.safetensors", "model=trace", "budget=0.5", "results=tiny.safetensors"],
        "tiny.safetensors/rows: Not a directory",
    ),
    "results to compare are a file": (
        ["compare", "trace=tiny.safetensors", "model=trace", "budget=0.5", "systems=[lru]", "results=tiny.safetensors"],
        "tiny.safetensors/rows: Not a directory",
    ),
    "results cannot be written": (
        ["simulate", "trace=tiny.safetensors", "model=trace", "budget=0.5", "results=/proc/foregate"],
        "/proc/foregate: No such file or directory",
    ),
    "no folder of options": (["simulate", "--config-dir", "no"], "--config-dir is 'no': there is no such folder"),
    "no name of a folder": (["simulate", "--config-dir"], "--config-dir needs a folder"),
    "nothing to import": (["trace", "import"], "source has no value; give one: source=..."),
    "import of no file": (["trace", "import", "no.npz"], "no.npz: there is no such file"),
    "import of a pickle": (["trace", "import", "pickle.safetensors"], "pickle.safetensors: "),
    "unknown format": (
        ["trace", "import", "no.npz", "format=foo"],
        "format: 'foo' cannot be imported; known: llama_cpp",
    ),
    "unknown recipe": (["trace", "synthesize", "recipe=qwen3"], "recipe is 'qwen3': did you mean 'qwen3_30b'? known: "),
    "wrong parameters": (["trace", "synthesize", "parameters=3"], "parameters is 3: it must be a mapping such as "),
    "trace of another name": (["trace", "synthesize", "x.npz", SMALL], "x.npz: a trace file's name must end in "),
    "no folder for a trace": (["trace", "synthesize", "no/x.safetensors", SMALL], "no/x.safetensors: the folder no does "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(run, tiny, folder, what):
    save_pickle(folder / "pickle.safetensors")
    cut_short(folder / "short.safetensors", folder / "tiny.safetensors")
    words, sentence = REFUSED[what]
    code, out, err = run(*words)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"foregate: {sentence}")
    assert sorted(path.name for path in folder.rglob("*")) == [
        "pickle.safetensors",
        "short.safetensors",
        "tiny.safetensors",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["system=lru,lruu"], "system=lruu: system 'lruu' is unknown: did you mean 'lru'? known: "),
        (["prefetch=top_n", "prefetch.depht=1,2"], "'prefetch.depht' is not a setting: did you mean 'depth'? known: "),
        (["budget"], "'budget' is not an override: write NAME=VALUE, or `foregate --help`"),
        (["seed=a,b"], "2 points of the sweep could not run, the first: seed is 'a': it must be a whole number "),
        (["results=tiny.safetensors"], "tiny.safetensors/multirun: Not a directory"),
    ],
)
def test_a_wrong_sweep_is_one_sentence_too(run, tiny, words, sentence):
    code, _, err = run("simulate", "-m", *tiny, *words)
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith(f"foregate: {sentence}")
    assert not Path("results/rows").exists()


def test_a_sweep_without_a_trace_is_told_what_to_give(run):
    sentence = "foregate: trace.path has no value; give one: trace.path=..."
    assert run("simulate", "-m", "trace=file") == (2, "", [sentence])


def test_a_point_that_cannot_run_does_not_stop_a_sweep(run, tiny):
    code, out, err = run("simulate", "-m", *tiny, "budget=abc,0.3")
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines()] == ["lru at 0.3"]
    assert err == [
        "foregate: budget is 'abc': it must be a fraction of all experts above 0 and at most 1, or bytes such as 4GB"
    ]


@pytest.mark.parametrize("words", [["simulate"], ["simulate", "-m"], ["compare", "jobs=1", "systems=[lru]"]])
def test_an_interrupt_is_said_in_a_sentence(run, tiny, monkeypatch, words):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.experiment.run_system", interrupted)
    code, out, err = run(*words, *tiny)
    assert (code, out) == (130, "")
    assert err == ["foregate: interrupted; finished results are kept, the same command goes on"]
    assert not Path("results/rows").exists()


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["calibrate"], "nothing was kept, the same command starts over"),
        (["generate", "model=x", "prompts=y"], "nothing was kept, the same command starts over"),
        (["validate"], "runs that were measured are kept, but the same command starts over"),
        (["trace", "record", "model=x"], "finished results are kept, the same command goes on"),
    ],
)
def test_an_interrupted_command_promises_only_what_it_keeps(run, monkeypatch, words, end):
    def interrupted(words):
        raise KeyboardInterrupt

    verb = " ".join(words[:2]) if words[0] == "trace" else words[0]
    monkeypatch.setitem(_VERBS, verb, interrupted)
    assert run(*words) == (130, "", [f"foregate: interrupted; {end}"])


def test_an_interrupt_during_the_imports_is_a_sentence(monkeypatch, capsys):
    import sim.__main__

    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "sim.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sim.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert sim.__main__.main() == 130
    assert capsys.readouterr().err == "foregate: interrupted before anything ran\n"


def test_a_defect_keeps_its_traceback(run, tiny, monkeypatch):
    monkeypatch.setattr("sim.experiment.run_system", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("simulate", *tiny)
    with pytest.raises(ZeroDivisionError):
        run("simulate", "-m", *tiny)


# ---- as a program of its own -----------------------------------------------------------------------------


def program(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_installed_command_works_from_any_folder(folder):
    found = program(Path(sys.executable).with_name("foregate"), "--help", cwd=folder)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("foregate VERB [overrides]\n")


def test_a_reader_that_goes_away_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "sim.cli", "list"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    found = subprocess.run(
        words, stdout=writing, stderr=subprocess.PIPE, cwd=folder, env=environment, timeout=60, check=False
    )
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, b"")


EVERY_MODULE = """
import importlib, pkgutil, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of these would fail
training = {"traces.reference.experts", "traces.reference.train", "traces.reference.run"}
for package in ("traces", "policies", "sim"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if found.name in training:
            continue
        importlib.import_module(found.name)
        print(found.name)
"""


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_recording_says_which_package_it_needs(run, folder, monkeypatch, package):
    if package == "transformers":
        pytest.importorskip("torch", reason="without torch, torch is what is missed first")
    (folder / "prompts.txt").write_text("a prompt\n")
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    sentence = f"recording needs the package {package}, which is not installed: pip install 'foregate[real]'"
    found = run("trace", "record", "model=any", "prompts=prompts.txt")
    assert found == (2, "", [f"foregate: {sentence}"])
    assert [path.name for path in folder.iterdir()] == ["prompts.txt"]


def test_simulation_and_analysis_never_import_torch(folder):
    found = program("-c", EVERY_MODULE, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (found.returncode, found.stderr) == (0, "")
    assert {"traces.files", "policies.eviction.lru", "sim.cli", "sim.reference"} <= set(found.stdout.split())


@pytest.mark.parametrize("package", [conf, policies, real, sim, traces], ids=lambda package: package.__name__)
def test_all_packages_are_those_of_this_checkout(package):
    assert Path(package.__file__).parents[1] == HERE

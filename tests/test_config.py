"""Configurations: every option composes and builds, and what is wrong is refused by name."""

import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from builders import make_events_of, make_trace

import policies
from policies.contract import Setting
from policies.system import AXES, Composition, build_system, find_part
from sim import store
from sim.compare import compare
from sim.config import check_config, check_types, compose_config, expand, groups, name_system, one_of, options, quoted
from sim.costs import Costs
from sim.events import future_of
from sim.experiment import composition_of, key_of, simulate, slots_of, trace_name, trace_path, workload_of
from traces import InputError, ModelSpec, save_trace

CONF = Path(sys.modules["policies"].__file__).parents[1] / "conf"


def refused(sentence):
    """The expectation of an InputError that says exactly `sentence`."""
    return pytest.raises(InputError, match=f"^{re.escape(sentence)}$")


@pytest.fixture
def tiny(tmp_path):
    """A trace file of five tokens, two layers of five experts, top-2, without lookahead."""
    path = tmp_path / "tiny.safetensors"
    steps = [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 4], [0, 4]], [[0, 1], [2, 0]], [[2, 0], [1, 3]]]
    save_trace(make_trace(steps), path)
    return path


def composed(group, option):
    """A configuration with that option chosen; it is shared, so do not change it."""
    if group == "system":
        return composed_once(("system=" + option,))
    # Composing takes a while: the i-th options of all groups go together.
    place = options(group).index(option)
    others = [(name, options(name)) for name in groups() if name not in ("system", "experiment")]
    chosen = [f"{name}={known[place % len(known)]}" for name, known in others]
    return composed_once((*chosen, "trace.path=somewhere"))


@cache
def composed_once(overrides):
    return compose_config("simulate", overrides)


# ---- what is there ---------------------------------------------------------------------------------------


def test_every_axis_is_a_group():
    assert set(AXES) <= set(groups())
    assert groups() == sorted([*AXES, "experiment", "hardware", "model", "system", "trace", "workload"])


OPTIONS = [(group, option) for group in groups() for option in options(group) if group != "experiment"]
"""Of every group but that of studies, which tests/test_study.py runs."""


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    config = composed(group, option)
    check_config(config)
    assert isinstance(config[group], dict)


def policy_classes(axis):
    """The classes that the modules of an axis define."""
    package = importlib.import_module(f"policies.{axis}")
    modules = [importlib.import_module(f"policies.{axis}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return {
        f"{module.__name__}.{name}"
        for module in modules
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and hasattr(cls, "build")
    }


@pytest.mark.parametrize("axis", AXES)
def test_every_policy_has_a_file_in_conf_and_every_file_names_a_policy(axis):
    targets = {composed(axis, option)[axis]["_target_"] for option in options(axis)}
    assert targets == policy_classes(axis)


def test_every_folder_of_policies_is_an_axis():
    folders = [found.name for found in pkgutil.iter_modules(policies.__path__) if found.ispkg]
    assert sorted(folders) == sorted(AXES)


@pytest.mark.parametrize(("axis", "option"), [(axis, option) for axis in AXES for option in options(axis)])
def test_every_policy_builds_with_the_parameters_of_its_file(axis, option):
    config = composed(axis, option)
    parts = {part: find_part(part, config[part]) for part in AXES}
    events = make_events_of([[[0, 1], [2, 3], [4, 5]]], 6)
    sizes = {"slots": 9, "layers": 3, "experts": 6, "top_k": 2, "layer_ns": 300, "transfer_ns": 100}
    system = build_system(Composition("mine", parts), future=lambda: future_of(events), **sizes)
    assert [type(getattr(system, part)) for part in AXES if part != "allocation"] == [
        parts[part][0] for part in AXES if part != "allocation"
    ]


@pytest.mark.parametrize("axis", AXES)
def test_every_parameter_of_a_policy_is_said_in_one_of_its_files(axis):
    said = {}
    for option in options(axis):
        spec = composed(axis, option)[axis]
        said.setdefault(spec["_target_"], set()).update(spec)
    for target, names in said.items():
        cls, _ = find_part(axis, {"_target_": target})
        assert set(inspect.signature(cls.build).parameters) - {"setting"} == names - {"_target_"}


@pytest.mark.parametrize("name", options("system"))
def test_every_system_is_a_short_file_with_its_own_name_that_chooses_its_parts(name):
    config = composed("system", name)
    assert config["system"]["name"] == name
    lines = (CONF / "system" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert len(lines) <= 12
    assert composition_of(config).name == name


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_file_says_in_its_first_comment_what_it_is(file):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    assert re.match(r"# \S.{10,}", comments[0])


# ---- finding a policy ------------------------------------------------------------------------------------

LRU = {"_target_": "policies.eviction.lru.LRU"}
TOP_N = {"_target_": "policies.prefetch.top_n.TopN"}


def test_a_part_is_a_class_and_its_parameters():
    cls, parameters = find_part("prefetch", {**TOP_N, "n": 3, "depth": 2})
    assert (cls.__name__, parameters) == ("TopN", {"n": 3, "depth": 2})


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({**TOP_N, "dept": 2}, "prefetch.dept is not a parameter of TopN: did you mean 'depth'? known: depth, n"),
        ({**LRU, "decay": 2}, "prefetch.decay is not a parameter of LRU: it takes no parameters"),
        ({**TOP_N, "n": "many"}, "prefetch.n is 'many': it must be a whole number or null"),
        ({**TOP_N, "n": 2.5}, "prefetch.n is 2.5: it must be a whole number or null"),
        ({**TOP_N, "depth": True}, "prefetch.depth is True: it must be a whole number"),
        ({**TOP_N, "depth": None}, "prefetch.depth is None: it must be a whole number"),
        (
            {"_target_": "policies.prefetch.percentile.Percentile", "percentile": "75%"},
            "prefetch.percentile is '75%': it must be a number",
        ),
        (
            {"_target_": "policies.predictor.cross_layer_gate.CrossLayerGate", "count_votes": 1},
            "prefetch.count_votes is 1: it must be true or false",
        ),
        (
            {"_target_": "os.system"},
            "prefetch._target_ is 'os.system': it must name a class of the package 'policies'; to use one of your own, "
            "name its package too: plugins=[os]",
        ),
        (
            {"_target_": "policies_of_mine.LRU"},
            "prefetch._target_ is 'policies_of_mine.LRU': it must name a class of the package 'policies'; to use one of "
            "your own, name its package too: plugins=[policies_of_mine]",
        ),
        (
            {},
            "prefetch._target_ is '': it must name a class of the package 'policies'; to use one of your own, name its "
            "package too: plugins=[PACKAGE]",
        ),
        ({"_target_": "policies"}, "prefetch._target_ is 'policies': it must be written MODULE.CLASS"),
        (
            {"_target_": "policies.nothing.Here"},
            "prefetch._target_ is 'policies.nothing.Here', which cannot be imported: No module named 'policies.nothing'",
        ),
        (
            {"_target_": "policies.ranking.Rank"},
            "prefetch._target_ is 'policies.ranking.Rank', which cannot be imported: module 'policies.ranking' has no "
            "attribute 'Rank'",
        ),
        (
            {"_target_": "policies.ranking.rank"},
            "prefetch._target_ is 'policies.ranking.rank', which is no policy: it must be a class with a method `build`",
        ),
        (
            {"_target_": "policies.system.System"},
            "prefetch._target_ is 'policies.system.System', which is no policy: it must be a class with a method `build`",
        ),
    ],
)
def test_what_is_no_policy_or_no_parameter_is_refused(spec, sentence):
    with refused(sentence):
        find_part("prefetch", spec)


def test_a_whole_number_does_where_a_number_is_due():
    assert find_part("prefetch", {"_target_": "policies.prefetch.percentile.Percentile", "percentile": 90})[1] == {
        "percentile": 90
    }


def test_a_parameter_outside_its_range_is_refused_when_the_system_is_built():
    config = compose_config("simulate", ["prefetch=percentile", "prefetch.percentile=101"])
    with refused("system 'lru+prefetch.percentile=101+prefetch=percentile': prefetch.percentile is 101: it must lie "
                 "between 0 and 100"):  # fmt: skip
        build_system(composition_of(config), slots=9, layers=3, experts=6, top_k=2)


def test_a_trace_without_what_a_part_needs_is_refused():
    composition = composition_of(compose_config("simulate", ["system=fate"]))
    with refused(
        "system 'fate': its predictor CrossLayerGate needs lookahead observations, which trace 'mine' does not hold; "
        "choose another predictor or a trace recorded with it"
    ):
        composition.check(frozenset({"logits"}), "mine")
    composition.check(frozenset({"lookahead"}), "mine")


def test_what_a_system_needs_is_what_any_of_its_parts_needs():
    assert composition_of(compose_config("simulate", ["system=clairvoyant"])).needs == {"future"}
    assert composition_of(compose_config("simulate", ["system=fate", "eviction=belady"])).needs == {"future", "lookahead"}


def test_only_parts_that_need_the_future_receive_it():
    asked = []

    def future():
        asked.append(True)
        return future_of(make_events_of([[[0, 1]]], 6))

    sizes = {"slots": 3, "layers": 1, "experts": 6, "top_k": 2}
    build_system(composition_of(compose_config("simulate")), future=future, **sizes)
    assert asked == []
    system = build_system(composition_of(compose_config("simulate", ["system=belady"])), future=future, **sizes)
    assert asked == [True]
    assert system.setting.future is None


# ---- a policy of the user's own --------------------------------------------------------------------------

MINE = '''
"""Evict the expert used most recently."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from policies.contract import Setting


class MRU(NamedTuple):
    last_use: np.ndarray

    @classmethod
    def build(cls, setting: "Setting", start: int = -1):
        return cls(np.full(setting.keys, start))

    def on_insert(self, key, pool, now):
        self.last_use[key] = now

    on_hit = on_insert

    def on_evict(self, key, pool, now):
        pass

    def score(self, key, now):
        return -self.last_use[key]
'''
YAML = """# The most recently used leaves.
_target_: my_policy.MRU
start: -1
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a policy of 25 lines and its YAML, in which the program is run; its options' folder."""
    (tmp_path / "my_policy.py").write_text(MINE)
    (tmp_path / "options" / "eviction").mkdir(parents=True)
    (tmp_path / "options" / "eviction" / "mru.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield str(tmp_path / "options")
    sys.modules.pop("my_policy", None)


def overrides(trace, *more):
    return [f"trace={trace}", "model=trace", "budget=0.5", "plugins=[my_policy]", *more]


def test_a_policy_of_ones_own_is_one_file_and_one_yaml(mine, tiny):
    assert len(MINE.strip().splitlines()) <= 27
    assert len(YAML.splitlines()) == 3
    row = simulate(compose_config("simulate", overrides(tiny, "eviction=mru", "engine=reference"), mine))
    # By hand: the only hits are 0 in the third step, 1 in the fourth, and 1 and 3 of the second layer in the fifth.
    assert (row["system"], row["slots"], row["hits"], row["misses"]) == ("lru+eviction=mru", 5, 4, 16)


def test_a_policy_of_ones_own_is_not_imported_unless_its_package_is_named(mine):
    config = compose_config("simulate", ["eviction=mru"], mine)
    with refused(
        "eviction._target_ is 'my_policy.MRU': it must name a class of the package 'policies'; to use one of your own, "
        "name its package too: plugins=[my_policy]"
    ):
        composition_of(config)
    assert "my_policy" not in sys.modules


def test_an_edited_policy_gives_another_result(mine, tiny):
    config = compose_config("simulate", overrides(tiny, "eviction=mru"), mine)
    trace = workload_of(config).trace
    before = key_of(config, trace)
    assert key_of(config, trace) == before
    Path("my_policy.py").write_text(MINE + "# edited\n")
    assert key_of(config, trace) != before


def test_a_system_of_ones_own_is_compared_like_any_other(mine, tiny):
    systems = Path(mine) / "system"
    systems.mkdir()
    chosen = "# @package _global_\ndefaults:\n  - override /eviction: mru\nsystem: {name: mine}\n"
    (systems / "mine.yaml").write_text(chosen)
    assert "mine" in options("system", mine)
    rows, left_out = compare(overrides(tiny, "systems=[lru,mine]", "jobs=1"), config_dir=mine)
    assert (sorted(rows["system"]), left_out) == (["lru", "mine"], [])
    row = rows.set_index("system").loc["mine"]
    assert (row["engine"], row["slots"], row["hits"], row["misses"]) == ("fast", 5, 4, 16)


def test_an_option_of_ones_own_is_suggested_for_a_misspelt_one(mine):
    with pytest.raises(InputError, match=r"^eviction=mrru: eviction 'mrru' is unknown: did you mean 'mru'\? known: arc"):
        compose_config("simulate", ["eviction=mrru"], mine)


def test_a_system_of_ones_own_must_say_its_name(mine):
    (Path(mine) / "system").mkdir()
    (Path(mine) / "system" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    with refused("system.name is missing: a file of the group system must say `system: {name: NAME}`"):
        compose_config("simulate", ["system=mine"], mine)


def test_a_misspelt_setting_in_a_file_of_ones_own_is_refused(mine):
    (Path(mine) / "system").mkdir()
    (Path(mine) / "system" / "mine.yaml").write_text("# @package _global_\nsystem: {name: mine}\nfree_lnk: true\n")
    with pytest.raises(InputError, match=r"^'free_lnk' is not a setting: did you mean 'free_link'\? known: "):
        check_config(compose_config("simulate", ["system=mine"], mine))


def test_a_folder_of_options_must_exist(tmp_path):
    with refused(f"--config-dir is '{tmp_path}/no': there is no such folder"):
        compose_config("simulate", [], str(tmp_path / "no"))


def test_a_folder_of_options_may_have_any_name(tmp_path):
    folder = tmp_path / "it's [mine], = or $ not"
    (folder / "eviction").mkdir(parents=True)
    (folder / "eviction" / "own.yaml").write_text("# Own.\n_target_: policies.eviction.lru.LRU\n")
    assert compose_config("simulate", ["eviction=own"], str(folder))["eviction"] == LRU


# ---- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expanded"),
    [
        ("trace=a.safetensors", ["trace=file", "trace.path='a.safetensors'"]),
        ("trace=some/where", ["trace=file", "trace.path='some/where'"]),
        ("trace=/it's.safetensors", ["trace=file", r"trace.path='/it\'s.safetensors'"]),
        ("trace=reference", ["trace=reference"]),
        ("trace.path=a/b", ["trace.path=a/b"]),
        ("budget=0.5", ["budget=0.5"]),
    ],
)
def test_a_path_is_short_for_the_trace_in_that_file(override, expanded):
    assert expand([override]) == expanded


def test_a_quoted_text_is_read_as_it_is():
    texts = ["a b", "it's", "a=b,c", "[x]", "{y}", "(z)", "a:b", "é", "#", "back\\slash"]
    assert compose_config("simulate", [f"plugins=[{','.join(map(quoted, texts))}]"])["plugins"] == texts


def test_the_path_of_a_trace_may_hold_anything():
    path = "/it's [mine], = or # not/t.safetensors"
    assert trace_path(compose_config("simulate", [f"trace={path}"])) == Path(path)


def test_a_trace_is_called_by_its_files_name(tiny):
    assert trace_name(compose_config("simulate", [f"trace={tiny}"])) == "tiny"
    assert trace_name(compose_config("simulate")) == "reference_16x64_top8"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([], "lru"),
        (["budget=0.1", "trace.tokens=3", "seed=4", "model=trace"], "fate"),
        (["eviction=lru"], "fate+eviction=lru"),
        (["prefetch.depth=2", "+eviction=lru"], "fate+eviction=lru+prefetch.depth=2"),
        (["eviction=lru", "prefetch.depth=2"], "fate+eviction=lru+prefetch.depth=2"),
        (["free_link=true"], "fate+free_link=true"),
        (["drop_unused_prefetches=false"], "fate+drop_unused_prefetches=false"),
        (["reupload_after_use=true"], "fate+reupload_after_use=true"),
    ],
)
def test_a_system_is_named_after_itself_and_what_was_changed(changes, name):
    config = {"system": {"name": name.partition("+")[0]}}
    name_system(config, changes)
    assert config["system"]["name"] == name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["system=lruu"], "system=lruu: system 'lruu' is unknown: did you mean 'lru'? known: arc, "),
        (["hardware=h100"], "hardware=h100: hardware 'h100' is unknown: did you mean 'h100_pcie5'? known: "),
        (["evictoin=lru"], "'evictoin' is not a setting: did you mean 'eviction'? known: allocation, budget, "),
        (["prefetch=top_n", "prefetch.depht=2"], "'prefetch.depht' is not a setting: did you mean 'depth'? known: depth, n"),
        (["eviction.decay=2"], "'eviction.decay' is not a setting: the eviction chosen takes no parameters"),
        (["trace=file"], "trace.path has no value; give one: trace.path=..."),
        (["budget={"], "no viable alternative at input '{'"),
    ],
)
def test_what_hydra_refuses_is_said_in_one_sentence(given, sentence):
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}") as refusal:
        compose_config("simulate", given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eviktion": {}}, "'eviktion' is not a setting: did you mean 'eviction'? known: allocation, "),
        ({"trace": {"token": 3}}, "'trace.token' is not a setting: did you mean 'tokens'? known: path, requests, tokens"),
        ({"workload": {"size": 3}}, "'workload.size' is not a setting: known: batch, order, phases"),
        ({"miss": None}, "miss is not chosen: it must be one of wait"),
        ({"seed": "abc"}, "seed is 'abc': it must be a whole number of at least 0"),
        ({"seed": 1.5}, "seed is 1.5: it must be a whole number of at least 0"),
        ({"seed": -1}, "seed is -1: it must be a whole number of at least 0"),
        ({"seed": True}, "seed is True: it must be a whole number of at least 0"),
        ({"free_link": "maybe"}, "free_link is 'maybe': it must be true or false"),
        ({"drop_unused_prefetches": 1}, "drop_unused_prefetches is 1: it must be true or false"),
        ({"plugins": "mine"}, "plugins is 'mine': it must be a list of packages, such as [mine]"),
        ({"results": 7}, "results is 7: it must be a folder"),
        ({"engine": 7}, "engine is 7: it must be a text"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes, sentence):
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        check_config({**composed("system", "lru"), **changes})


def test_a_group_that_was_taken_out_is_missed():
    with refused("miss is not chosen: it must be one of wait"):
        check_config(compose_config("simulate", ["~miss"]))


def test_settings_of_other_verbs_are_checked_too():
    check_types({"out": None, "source": "a.npz", "options": {}})
    with refused("options is 3: it must be a mapping such as {NAME: VALUE}"):
        check_types({"options": 3})


def test_one_of_names_the_nearest():
    assert one_of("engine", "fast", ["fast", "reference"]) == "fast"
    with refused("engine is 'fats': did you mean 'fast'? known: fast, reference"):
        one_of("engine", "fats", ["fast", "reference"])


# ---- budgets ---------------------------------------------------------------------------------------------

MODEL = ModelSpec("tiny", 4, 10, 2)
"""40 experts."""


def slots(budget, expert_bytes=100_000_000):
    nothing = np.zeros(1, np.int64)
    costs = Costs(0, 0, 0, 0, nothing, nothing, nothing, 1, 0, 0, expert_bytes, expert_bytes)
    return slots_of(budget, MODEL, costs)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.25, 10), (0.249, 9), (1, 40), (1.0, 40), ("0.5", 20), (0.7, 28), (0.575, 23), (".5", 20), (1e-6, 0),
        ("2GB", 20), ("2 gb", 20), ("2GiB", 21), ("0.5GB", 5), ("1500MB", 15), ("1MiB", 0), ("100000000B", 1),
        ("99999999B", 0), ("1GB", 10), (4_000_000_000, 40), (2e9, 20), (1_000_000_000, 10), ("900GB", 40),
        ("1e9B", 10),
    ],
)  # fmt: skip
def test_a_budget_is_a_fraction_or_bytes_rounded_down_to_whole_experts(budget, expected):
    assert slots(budget) == expected


@pytest.mark.parametrize(
    "budget",
    ["abc", 0, -1, -0.5, "0GB", True, False, None, "", "GB", "4XB", "4 G B", "1.2.3", [0.1], float("nan"), float("inf")],
)
def test_a_budget_that_is_neither_is_refused(budget):
    with refused(f"budget is {budget!r}: it must be a fraction of all experts above 0 and at most 1, or bytes such as 4GB"):
        slots(budget)


@pytest.mark.parametrize(("given", "expected"), [("4_000_000_000", 40), ("2GB", 20)])
def test_budgets_survive_the_way_through_hydra(given, expected):
    assert slots(compose_config("simulate", [f"budget={given}"])["budget"]) == expected


# ---- results ---------------------------------------------------------------------------------------------


def test_a_result_is_named_by_what_decides_it_and_not_by_where_it_goes(tiny):
    config = compose_config("simulate", [f"trace={tiny}"])
    compared = compose_config("compare", [f"trace={tiny}", "jobs=1", "systems=[lru]", "json=true", "results=elsewhere"])

    def key(**changes):
        changed = {**config, **changes}
        return key_of(changed, workload_of(changed).trace)

    assert len(key()) == 64
    assert key_of({**compared, "budget": 0.25}, workload_of(config).trace) == key()
    fewer = {**config["trace"], "tokens": 3}
    others = [
        {"seed": 1},
        {"free_link": True},
        {"budget": 0.5},
        {"trace": fewer},
        {"eviction": composed("eviction", "lfu")["eviction"]},
    ]
    assert len({key(), *(key(**other) for other in others)}) == len(others) + 1


def test_a_trace_file_that_changed_is_read_again(tiny):
    config = compose_config("simulate", [f"trace={tiny}"])
    assert workload_of(config).tokens == 5
    assert workload_of(config) is workload_of(config)
    save_trace(make_trace([[[0, 1]], [[1, 0]]]), tiny)
    assert workload_of(config).tokens == 2


def test_a_result_that_is_stored_is_read_back(tiny, tmp_path, monkeypatch):
    config = compose_config("simulate", overrides(tiny, f"results={tmp_path}/out"))
    first = simulate(config)
    assert store.has(tmp_path / "out", first["key"])
    monkeypatch.setattr("sim.experiment.run_system", None)
    np.testing.assert_equal(simulate(config), first)


def test_a_setting_says_how_many_keys_and_pools_there_are():
    setting = Setting(3, 5, 2, np.arange(3), np.array([4, 4, 4]), seed=0, layer_ns=0, transfer_ns=0)
    assert (setting.keys, setting.pools) == (15, 3)


def test_a_part_of_a_trace_has_a_hash_of_its_own():
    """Two traces of one name and length must not share a result."""
    config = compose_config("simulate", ["trace.tokens=200"])
    whole = workload_of(compose_config("simulate")).trace
    part = workload_of(config).trace
    assert len(part.hash) == 64
    assert part.hash != whole.hash
    assert key_of(config, part) != key_of(config, whole)


def test_a_system_that_needs_the_future_is_a_ceiling(tmp_path):
    row = simulate(compose_config("simulate", ["eviction=belady", "trace.tokens=40", f"results='{tmp_path}'"]))
    assert bool(row["ceiling"])


def test_a_changed_constant_and_a_precision_are_part_of_the_names():
    changed = compose_config("simulate", ["hardware.host.readout_ns.value=5"])
    assert changed["hardware"]["name"] == "h100_pcie5+hardware.host.readout_ns.value=5"


def test_shapes_that_differ_and_memory_that_is_not_there_are_said(tmp_path):
    overrides = ["trace.tokens=40", "model=mixtral_8x7b", "hardware=gtx1080ti_pcie3", f"results='{tmp_path}'"]
    note = simulate(compose_config("simulate", overrides))["note"]
    assert "the routing is of a 16 x 64 top-8 model, the bytes are of a 32 x 8 top-2 one" in note
    assert note.endswith("but the device has 11.0 GB")

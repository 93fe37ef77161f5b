"""Every eviction policy against cases worked out by hand, its bounds, and curves measured elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Setting
from policies.eviction.arc import ARC
from policies.eviction.belady import Belady
from policies.eviction.fate_arc import FateARC
from policies.eviction.fifo import FIFO
from policies.eviction.least_stale import LeastStale
from policies.eviction.lfru import LFRU
from policies.eviction.lfu import LFU
from policies.eviction.lrfu import LRFU
from policies.eviction.lru import LRU
from policies.eviction.s3fifo import S3FIFO
from policies.eviction.sieve import Sieve
from policies.order import NOWHERE, enter, make_queues, oldest, shorten
from policies.residency import AWAITED, FREE, HELD, Residency
from sim.events import Events, future_of, make_events, one_key_events
from sim.replay import one_pool, pool_per_layer, replay
from traces import DECODE, bundled, load_trace

POLICIES = [LRU, FIFO, LFU, LRFU, LFRU, ARC, FateARC, S3FIFO, Sieve, LeastStale, Belady]

GPT_OSS = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_decode.npz"
needs_gpt_oss = pytest.mark.skipif(not GPT_OSS.exists(), reason=f"no published routing at {GPT_OSS}")


def watched(policy: Any, left: list[tuple[int, int]], states: list[Any]) -> Any:
    """The policy's class, noting who leaves at which event, and the state that every load left."""

    class Watched(policy):
        def on_insert(self, key: int, pool: int, now: int) -> None:
            super().on_insert(key, pool, now)
            states.append(self)

        def on_evict(self, key: int, pool: int, now: int) -> None:
            super().on_evict(key, pool, now)
            left.append((now, key))

    return Watched


def one_expert_each(keys: list[int]) -> Events:
    """Events of one layer, each of which needs one expert."""
    return Events(
        layers=1,
        experts=max(keys) + 1,
        offsets=np.arange(len(keys) + 1),
        keys=np.array(keys),
        tokens=np.ones(len(keys), np.int64),
    )


def evictions(policy: Any, events: Events, slots: int, **parameters: Any) -> list[tuple[int, int]]:
    """(event, key) of every eviction from one pool."""
    setting = one_pool(events, slots, future_of(events))
    left: list[tuple[int, int]] = []
    replay(watched(policy, left, []).build(setting, **parameters), setting, events, engine="reference")
    return left


def a_setting(slots: int = 3, layers: int = 1, experts: int = 6) -> Setting:
    """One pool of `slots` slots over ten events that need nothing."""
    nothing = Events(layers, experts, np.zeros(11, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return one_pool(nothing, slots, future_of(nothing))


# ---- cases worked out by hand ----------------------------------------------------------------------------


def test_lru_serves_the_golden_case() -> None:
    steps = np.array([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]])
    events = make_events(np.repeat(steps[:, None], 3, axis=1), np.arange(6), 4)
    setting = pool_per_layer(events, 2)
    assert replay(LRU.build(setting), setting, events) == (30, 12, 18)


@pytest.mark.parametrize(
    ("policy", "slots", "keys", "left"),
    [
        (LRU, 2, [0, 1, 0, 2], [(3, 1)]),
        (FIFO, 2, [0, 1, 0, 2], [(3, 0)]),
        (LFU, 2, [0, 0, 1, 2, 1], [(3, 1), (4, 2)]),
        # 1 and 0 were used twice; 1 longer ago, though 0 came first
        (LFU, 2, [0, 1, 1, 0, 2], [(4, 1)]),
        # at event 3: 0 counts .96 ** 3 + .96 ** 2 and 1 counts .96
        (LRFU, 2, [0, 0, 1, 2], [(3, 1)]),
        # 0 kept its count over its eviction: at event 7 it weighs 2.5, and 2, used later, 1.8
        (LRFU, 2, [0, 0, 1, 1, 2, 0, 2, 3], [(4, 0), (5, 2), (6, 1), (7, 2)]),
        # at event 5: 0 scores 3 uses over 4 steps, 1 scores 2 over 2
        (LFRU, 2, [0, 0, 0, 1, 1, 2], [(5, 0)]),
        # 1 returns from B1: T1's target is 1, and T2 gives up 0; that returns from B2: the target is 0 again
        (ARC, 2, [0, 1, 0, 2, 1, 0], [(3, 1), (4, 0), (5, 2)]),
        # 1 returns from B1: the target rises by 1 and T1 = {2, 3} is above it
        (ARC, 3, [0, 0, 1, 2, 3, 1], [(4, 1), (5, 2)]),
        # ... and here by the length of T1, which is then at its target: T2 = {0} pays
        (FateARC, 3, [0, 0, 1, 2, 3, 1], [(4, 1), (5, 0)]),
        # small is {0}, main {1, 2}; 0 returns from the ghosts into main, which then is too long
        (S3FIFO, 3, [0, 1, 2, 3, 0, 4], [(3, 0), (4, 3), (5, 1)]),
        # 0 was used twice more while it was in small: it moves to main, where 1 is the oldest without a use
        (S3FIFO, 3, [0, 1, 2, 0, 0, 3], [(5, 1)]),
        # the hand spares 0 once, goes on from where it stopped, and newcomers come in behind it
        (Sieve, 3, [0, 1, 2, 0, 3, 4, 5], [(4, 1), (5, 2), (6, 3)]),
        # of 0, next used at 3, and 1, next used at 4; then of 0 and 2, never used again, the first to come
        (Belady, 2, [0, 1, 2, 0, 1], [(2, 1), (4, 0)]),
    ],
)
def test_evicts_who_the_rule_says(policy: Any, slots: int, keys: list[int], left: list[tuple[int, int]]) -> None:
    assert evictions(policy, one_expert_each(keys), slots) == left


def test_lrfu_with_strong_decay_is_lru() -> None:
    assert evictions(LRFU, one_expert_each([0, 0, 1, 2]), 2, decay=0.5) == [(3, 0)]


def test_lrfu_counts_survive_the_rescaling_of_long_runs() -> None:
    keys = [0, 0, 1] + [2] * 10_000 + [3]
    assert evictions(LRFU, one_expert_each(keys), 3, decay=0.5)[-1] == (10_003, 0)


def test_lrfu_refuses_a_decay_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], not 1.5"):
        LRFU.build(a_setting(), decay=1.5)


def test_least_stale_evicts_the_layers_that_were_passed() -> None:
    # Two layers of two experts: step 0 needs 0 and 2, step 1 needs 0 and 3, step 2 needs 1.
    # LRU gives up 2, last used at event 1; but 2 and 3 are of the layer ahead, and 0 is of the one that runs.
    events = Events(2, 2, np.arange(6), np.array([0, 2, 0, 3, 1]), np.ones(5, np.int64))
    assert (evictions(LRU, events, 3), evictions(LeastStale, events, 3)) == ([(4, 2)], [(4, 0)])


def test_least_stale_is_a_sweep_ahead_when_the_layer_is_the_first() -> None:
    events = Events(2, 2, np.arange(6), np.array([0, 2, 1, 3, 0]), np.ones(5, np.int64))
    assert evictions(LeastStale, events, 3) == [(3, 0), (4, 1)]


# ---- prefetch --------------------------------------------------------------------------------------------


def test_belady_knows_the_next_use_of_a_prefetched_expert() -> None:
    events = one_expert_each([0, 1, 2, 1])
    policy = Belady.build(one_pool(events, 2, future_of(events)))
    policy.on_insert(1, 0, 0)
    assert policy.next_use[1] == 1
    policy.on_hit(1, 0, 1)
    assert policy.next_use[1] == 3


def test_the_first_use_of_a_prefetched_expert_is_its_first() -> None:
    policies: list[Any] = [policy.build(a_setting()) for policy in (LFU, LFRU, ARC, S3FIFO, Sieve)]
    for policy in policies:
        policy.on_insert(0, 0, 0)
        policy.on_hit(0, 0, 1)
    lfu, lfru, arc, s3fifo, sieve = policies
    assert (lfu.uses[0], lfru.uses[0]) == (1, 1)
    assert arc.resident.queue[0] == 0  # T1
    assert (s3fifo.again[0], sieve.again[0]) == (0, 0)


@pytest.mark.parametrize(("policy", "of"), [(ARC, "ghost"), (FateARC, "ghost"), (S3FIFO, "order")])
def test_an_unused_prefetch_leaves_no_ghost(policy: Any, of: str) -> None:
    built = policy.build(a_setting())
    built.on_insert(0, 0, 0)
    built.on_evict(0, 0, 1)
    assert getattr(built, of).queue[0] == NOWHERE


def test_prefetches_do_not_touch_fates_lists() -> None:
    policy = FateARC.build(a_setting())
    policy.on_miss(0, 0, 0)
    policy.on_insert(0, 0, 0)
    policy.on_evict(0, 0, 1)
    policy.on_insert(0, 0, 2)
    assert policy.ghost.length.tolist() == [1, 0]
    policy.on_evict(0, 0, 3)
    assert (policy.ghost.length.tolist(), policy.target.tolist()) == ([1, 0], [0])


def test_fate_gives_up_unused_prefetches_first() -> None:
    setting = a_setting()
    residency = Residency(FateARC.build(setting), setting)
    residency.on_miss(0, 0, 0)
    residency.insert(0, 0, FREE)
    residency.insert(1, 0, FREE)
    assert residency.victim(0, 1) == 1


# ---- what is held stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_only_what_may_leave_leaves(policy: Any) -> None:
    setting = a_setting(slots=4)
    residency = Residency(policy.build(setting), setting)
    for key in range(4):
        residency.on_miss(key, 0, 0)
        residency.insert(key, 0, HELD)
        residency.eviction.on_hit(key, 0, 1)
    assert residency.victim(0, 2, HELD) == -1
    residency.holds[2] = AWAITED
    assert (residency.victim(0, 2, AWAITED), residency.victim(0, 2, HELD)) == (-1, 2)
    residency.holds[3] = FREE
    assert residency.victim(0, 2, AWAITED) == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_pool_gives_up_nothing(policy: Any) -> None:
    setting = a_setting()
    assert Residency(policy.build(setting), setting).victim(0, 0) == -1


@pytest.mark.parametrize("policy", [ARC, FateARC, S3FIFO, Sieve, LRU, FIFO])
def test_asking_in_vain_changes_nothing(policy: Any) -> None:
    setting = a_setting(slots=4)
    residency = Residency(policy.build(setting), setting)
    for key in range(4):
        residency.on_miss(key, 0, 0)
        residency.insert(key, 0, HELD)
        residency.eviction.on_hit(key, 0, 1)
    before = repr(residency.eviction)
    residency.victim(0, 2, HELD)
    assert repr(residency.eviction) == before


@given(
    st.sampled_from([policy for policy in POLICIES if policy is not Belady]),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 11), st.booleans(), st.integers(FREE, HELD)), max_size=80),
)
def test_victims_are_residents_that_may_leave(policy: Any, slots: int, calls: list[tuple[int, bool, int]]) -> None:
    setting = a_setting(slots, layers=2)
    residency = Residency(policy.build(setting), setting)
    for now, (key, is_use, hold) in enumerate(calls):
        if key in residency:
            if is_use:
                residency.eviction.on_hit(key, 0, now)
            residency.holds[key] = hold
            continue
        if is_use:  # else a prefetch
            residency.on_miss(key, 0, now)
        if residency.is_full(0):
            leaving = residency.victim(0, now, AWAITED)
            if leaving < 0:
                leaving = residency.victim(0, now, HELD)
            free = [resident for resident in residency.residents[0] if residency.holds[resident] < HELD]
            assert leaving in free or (leaving == -1 and not free)
            if leaving < 0:
                continue
            residency.evict(leaving, now)
        residency.insert(key, now, hold)


# ---- ghosts ----------------------------------------------------------------------------------------------


def test_shorten_drops_the_oldest() -> None:
    order = make_queues(4, 1)
    for key in (2, 0, 3):
        enter(order, 0, key)
    shorten(order, 0, 2)
    assert (oldest(order, 0), order.length[0], order.queue.tolist()) == (0, 2, [0, NOWHERE, NOWHERE, 0])


unions = st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=60)


def events_of(steps: list[set[int]], layers: int = 1) -> Events:
    """Steps in which every layer needs the same experts."""
    experts = np.full((len(steps), layers, 4), -1)
    for step, union in enumerate(steps):
        experts[step, :, : len(union)] = sorted(union)
    return make_events(experts, np.arange(len(steps) + 1), 10)


@given(unions, st.integers(1, 8), st.sampled_from([ARC, FateARC]))
def test_arc_remembers_as_many_as_it_holds(steps: list[set[int]], slots: int, policy: Any) -> None:
    events = events_of(steps)
    setting = one_pool(events, slots)
    states: list[Any] = []
    replay(watched(policy, [], states).build(setting), setting, events, engine="reference")
    arc = states[-1]
    residents, ghosts = list(arc.resident.length), list(arc.ghost.length)
    assert sum(residents) == min(slots, len(set.union(*steps)))
    assert residents[0] + ghosts[0] <= slots
    assert sum(residents) + sum(ghosts) <= 2 * slots
    assert 0 <= arc.target[0] <= slots


@given(unions, st.integers(1, 12))
def test_s3fifo_bounds_its_ghosts(steps: list[set[int]], slots: int) -> None:
    events = events_of(steps)
    setting = one_pool(events, slots)
    states: list[Any] = []
    replay(watched(S3FIFO, [], states).build(setting), setting, events, engine="reference")
    small, main, ghosts = states[-1].order.length
    assert small + main == min(slots, len(set.union(*steps)))
    assert ghosts <= int(0.9 * slots)


# ---- Belady ----------------------------------------------------------------------------------------------


@given(unions, st.integers(1, 8), st.sampled_from(POLICIES), st.sampled_from([one_pool, pool_per_layer]))
@settings(max_examples=300)
def test_no_policy_misses_less_than_belady(steps: list[set[int]], slots: int, policy: Any, pools: Any) -> None:
    events = one_key_events(events_of(steps, layers=2))
    setting = pools(events, slots, future_of(events))
    bound = replay(Belady.build(setting), setting, events).misses
    found = replay(policy.build(setting), setting, events)
    assert found.misses >= bound
    assert replay(policy.build(setting), setting, events, engine="reference") == found


# ---- measured curves -------------------------------------------------------------------------------------

# Hits of 86,016 accesses: (one pool per layer at 25 %, at 50 %, one pool for the device at 25 %).
# The table of docs/eviction.md.
HITS: dict[Any, tuple[int, int, int]] = {
    LRU: (45_849, 67_313, 42_254),
    FIFO: (43_665, 63_646, 38_159),
    LFU: (41_616, 59_932, 22_381),
    LRFU: (49_301, 68_801, 46_952),
    LFRU: (46_569, 65_598, 27_616),
    ARC: (46_767, 67_376, 43_874),
    FateARC: (46_641, 67_355, 43_908),
    S3FIFO: (48_690, 68_512, 44_156),
    Sieve: (48_005, 68_550, 22_381),
    LeastStale: (45_849, 67_313, 42_026),
    Belady: (60_213, 76_920, 64_927),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_hit_rates_on_the_bundled_recording(policy: Any) -> None:
    trace = load_trace(bundled()["reference_16x64_top8"])
    chosen = trace.experts[(trace.phase == DECODE) & (trace.request % 2 == 0)]  # one request of each domain
    events = make_events(chosen, np.arange(len(chosen) + 1), 64)
    future = future_of(events)
    found = []
    for setting in (
        pool_per_layer(events, 16, future),
        pool_per_layer(events, 32, future),
        one_pool(events, 256, future),
    ):
        found.append(replay(policy.build(setting), setting, events).hits)
    assert tuple(found) == HITS[policy]


# SYSTEMS 8.3 does not say which 9,000 tokens it measured. These are the first; LRFU and Belady then agree to
# every digit given there (.704, .781). LRU agrees (.669) only if experts used by the same event are ordered
# by their number; here hits are renewed in routed order before misses are loaded, which costs half a point.
@needs_gpt_oss
@pytest.mark.parametrize(
    ("policy", "parameters", "hits", "published", "tolerance"),
    [
        (LRU, {}, 574_047, 0.669, 0.006),
        (LRFU, {"decay": 0.92}, 608_155, 0.704, 0.0005),
        (Belady, {}, 674_498, 0.781, 0.0005),
    ],
)
def test_hit_rates_on_gpt_oss(
    policy: Any, parameters: dict[str, float], hits: int, published: float, tolerance: float
) -> None:
    with np.load(GPT_OSS) as arrays:
        experts = arrays["experts"][:9000].astype(np.int64)
    events = make_events(experts, np.arange(9001), 32)
    setting = pool_per_layer(events, 8, future_of(events))
    found = replay(policy.build(setting, **parameters), setting, events)
    assert found.hits == hits
    assert abs(found.hits / found.accesses - published) <= tolerance

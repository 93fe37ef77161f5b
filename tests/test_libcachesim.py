"""The classic eviction policies count exactly the misses that libCacheSim counts, on real routing.

Replay here is as libCacheSim replays: one expert at a time, one pool for the whole device, unit sizes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.eviction.arc import ARC
from policies.eviction.belady import Belady
from policies.eviction.fifo import FIFO
from policies.eviction.lfu import LFU
from policies.eviction.lru import LRU
from policies.eviction.s3fifo import S3FIFO
from policies.eviction.sieve import Sieve
from sim.events import Events, future_of, make_events, one_key_events
from sim.replay import one_pool, replay
from traces import bundled, load_trace

GPT_OSS = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_decode.npz"

# Misses of 38,400 accesses at each eighth but the last, and at 15/16, of all 1,024 experts.
CURVES: dict[Any, list[int]] = {
    LRU: [28_463, 18_877, 12_668, 8440, 5500, 3341, 1809, 1248],
    FIFO: [28_781, 21_037, 14_813, 10_587, 7105, 4737, 2589, 1721],
    LFU: [34_962, 25_501, 18_983, 13_577, 8962, 5166, 2553, 1504],
    ARC: [27_390, 18_349, 12_276, 8302, 5445, 3289, 1779, 1265],
    Sieve: [34_962, 25_501, 18_983, 13_577, 8962, 5166, 1848, 1276],
    S3FIFO: [25_482, 18_441, 12_294, 8180, 5223, 3039, 1744, 1252],
    Belady: [15_891, 9165, 5768, 3772, 2452, 1656, 1169, 1049],
}


def accesses(experts: Any, expert_count: int) -> Events:
    """The first 300 tokens, one expert at a time."""
    return one_key_events(make_events(experts[:300].astype(np.int64), np.arange(301), expert_count))


def capacities(events: Events) -> list[int]:
    universe = events.layers * events.experts
    return [universe * sixteenths // 16 for sixteenths in (2, 4, 6, 8, 10, 12, 14, 15)]


def our_curve(policy: Any, events: Events) -> list[int]:
    future = future_of(events)
    settings = [one_pool(events, slots, future) for slots in capacities(events)]
    return [replay(policy.build(setting), setting, events).misses for setting in settings]


def their_curve(policy: Any, events: Events) -> list[int]:
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    algorithm = getattr(libcachesim, policy.__name__)
    never = 1 << 62
    next_access = np.minimum(future_of(events).following, never).tolist()
    curve = []
    for slots in capacities(events):
        cache = algorithm(slots, hashpower=14)
        hits = 0
        for key, following in zip(events.keys.tolist(), next_access, strict=True):
            hits += cache.get(libcachesim.Request(obj_id=key, obj_size=1, next_access_vtime=following))
        curve.append(len(events.keys) - hits)
    return curve


@pytest.fixture(scope="module")
def reference() -> Events:
    return accesses(load_trace(bundled()["reference_16x64_top8"]).experts, 64)


@pytest.fixture(scope="module")
def gpt_oss() -> Events:
    if not GPT_OSS.exists():
        pytest.skip(f"no published routing at {GPT_OSS}")
    with np.load(GPT_OSS) as arrays:
        return accesses(arrays["experts"], 32)


@pytest.mark.parametrize("policy", CURVES)
def test_misses_on_the_bundled_recording(policy: Any, reference: Events) -> None:
    assert our_curve(policy, reference) == CURVES[policy]


@pytest.mark.parametrize("policy", CURVES)
def test_libcachesim_misses_as_often_on_the_bundled_recording(policy: Any, reference: Events) -> None:
    assert their_curve(policy, reference) == CURVES[policy]


@pytest.mark.parametrize("policy", CURVES)
def test_libcachesim_misses_as_often_on_gpt_oss(policy: Any, gpt_oss: Events) -> None:
    assert our_curve(policy, gpt_oss) == their_curve(policy, gpt_oss)

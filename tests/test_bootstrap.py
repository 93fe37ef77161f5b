"""A difference is claimed only where other requests would have shown it too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import make_row

from sim import bootstrap
from sim.bootstrap import Comparison, compare_speed
from traces.errors import InputError


def row(tokens, time, requests=None):
    requests = list(range(len(tokens))) if requests is None else requests
    return {"system": "a", "requests": requests, "request_tokens": tokens, "request_ns": time}


requests_of_a_row = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e3, 1e12, allow_nan=False)), min_size=5, max_size=60
)


def test_the_ratio_is_that_of_tokens_per_second_over_all_requests():
    found = compare_speed(row([10, 30], [2e9, 2e9]), row([10, 30], [1e9, 4e9]))
    assert found.ratio == (40 / 4) / (40 / 5)


def test_a_constant_ratio_has_an_interval_of_no_width():
    found = compare_speed(row([8] * 6, [1e9] * 6), row([8] * 6, [2e9] * 6))
    assert found == Comparison(2.0, 2.0, 2.0, True, 6, "")


def test_the_interval_is_the_known_one():
    """One of six requests is 3 times as fast: a third of the resamples, (5/6)^6, lacks it."""
    found = compare_speed(row([1] * 6, [1.0] * 6), row([1] * 6, [3.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    assert (found.ratio, found.low, found.high) == (pytest.approx(8 / 6), 1.0, 2.0)
    assert found.is_real is False


@given(requests_of_a_row)
@settings(max_examples=40)
def test_a_system_never_differs_from_itself(requests):
    tokens, time = (list(values) for values in zip(*requests, strict=True))
    assert compare_speed(row(tokens, time), row(tokens, time)) == Comparison(1.0, 1.0, 1.0, False, len(tokens), "")


@given(requests_of_a_row)
@settings(max_examples=40)
def test_ten_percent_on_every_request_are_always_real(requests):
    tokens, time = (list(values) for values in zip(*requests, strict=True))
    slower = [1.1 * ns for ns in time]
    found = compare_speed(row(tokens, slower), row(tokens, time))
    assert found.is_real is True
    assert (found.ratio, found.low, found.high) == pytest.approx((1 / 1.1,) * 3)
    assert compare_speed(row(tokens, time), row(tokens, slower)).is_real is True


@given(requests_of_a_row, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_requests_does_not_matter(requests, random):
    tokens, time = (list(values) for values in zip(*requests, strict=True))
    noisy = [ns * random.uniform(0.5, 1.5) for ns in time]
    order = list(range(len(tokens)))
    random.shuffle(order)
    shuffled = row([tokens[i] for i in order], [time[i] for i in order], order)
    assert compare_speed(shuffled, row(tokens, noisy)) == compare_speed(row(tokens, time), row(tokens, noisy))


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_near_one():
    fast, slow = make_row("fate", wait=33, noise=0.2), make_row("lru", noise=0.2)
    assert compare_speed(fast, slow, seed=3) == compare_speed(fast, slow, seed=3)
    one, other = compare_speed(fast, slow, seed=3), compare_speed(fast, slow, seed=4)
    assert one != other
    assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=0.02)


def test_pairing_finds_what_two_separate_intervals_would_hide():
    """Requests differ tenfold, systems by 3 % on each of them."""
    time = np.geomspace(1e9, 1e10, 20)
    assert compare_speed(row([100] * 20, time), row([100] * 20, 1.03 * time)).is_real is True


def test_drawing_in_blocks_changes_nothing(monkeypatch):
    pair = make_row("fate", noise=0.3), make_row("lru", noise=0.3)
    whole = compare_speed(*pair)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 100)
    assert compare_speed(*pair) == whole


def test_few_requests_claim_nothing():
    fast, slow = row([9] * 4, [1e9] * 4), row([9] * 4, [2e9] * 4)
    assert compare_speed(fast, slow) == Comparison(2.0, 2.0, 2.0, None, 4, "too few requests")


def test_different_requests_are_refused():
    with pytest.raises(InputError, match="one ran 2 requests, the other 2, and they are not the same"):
        compare_speed(row([1, 1], [1.0, 1.0], [0, 1]), row([1, 1], [1.0, 1.0], [0, 2]))


def test_an_interval_of_95_percent_holds_the_truth_about_that_often():
    """Pairs of 30 requests whose times differ by chance only: one in twenty is called real, give or take."""
    random = np.random.default_rng(0)
    called_real = 0
    for _ in range(300):
        one, other = random.lognormal(0, 0.5, (2, 30))
        called_real += bool(compare_speed(row([1] * 30, one), row([1] * 30, other), resamples=500).is_real)
    assert 5 <= called_real <= 30

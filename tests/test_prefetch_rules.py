"""How many of the predicted experts each prefetch rule takes, worked out by hand."""

import re

import numpy as np
import pytest
from builders import make_setting

from policies.prefetch.cumulative_mass import CumulativeMass
from policies.prefetch.none import NoPrefetch
from policies.prefetch.percentile import Percentile
from policies.prefetch.top_n import TopN
from policies.prefetch.window import Window

SCORES = np.array([0.5, 0.25, 0.125, 0.125, 99, 99])
"""Four predictions; what stands behind them is left over from others and counts for nothing."""


def taken(rule, tokens=1, count=4):
    count = min(count, rule.most(tokens))
    return rule.take(SCORES, count) if hasattr(rule, "take") else count


def test_no_prefetch_takes_nothing_and_looks_no_layer_ahead():
    rule = NoPrefetch.build(make_setting())
    assert (rule.depth, taken(rule)) == (0, 0)


@pytest.mark.parametrize("rule", [TopN, Window, Percentile, CumulativeMass])
def test_rules_look_one_layer_ahead_unless_told_otherwise(rule):
    assert (rule.build(make_setting()).depth, rule.build(make_setting(), depth=3).depth) == (1, 3)


@pytest.mark.parametrize(("n", "tokens", "expected"), [(3, 1, 3), (0, 1, 0), (9, 1, 4), (1, 3, 3), (3, 3, 4)])
def test_top_n_takes_n_for_every_token_and_no_more_than_there_are(n, tokens, expected):
    assert taken(TopN.build(make_setting(), n=n), tokens) == expected


def test_top_n_takes_the_models_top_k_where_nothing_is_said():
    assert TopN.build(make_setting(top_k=3)).n == 3


def test_top_n_does_not_take_less_than_nothing():
    with pytest.raises(ValueError, match=r"^n is -3: it must be at least 0$"):
        TopN.build(make_setting(), n=-3)


@pytest.mark.parametrize(("experts", "expected"), [(60, 15), (64, 16), (8, 2)])
def test_the_75th_percentile_takes_a_quarter_of_the_experts(experts, expected):
    assert Percentile.build(make_setting(experts=experts)).n == expected


@pytest.mark.parametrize(("percentile", "expected"), [(0, 60), (100, 0), (90, 6), (99.9, 0), (97.5, 2)])
def test_a_percentile_is_rounded_to_whole_experts(percentile, expected):
    assert Percentile.build(make_setting(experts=60), percentile=percentile).n == expected


def test_the_percentile_holds_for_every_token():
    rule = Percentile.build(make_setting(experts=6), percentile=80)
    assert [taken(rule, tokens) for tokens in (1, 2, 3, 4, 5)] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("percentile", [-1, 101, float("nan")])
def test_a_percentile_outside_0_to_100_is_refused(percentile):
    with pytest.raises(ValueError, match=rf"^percentile is {percentile}: it must lie between 0 and 100$"):
        Percentile.build(make_setting(), percentile=percentile)


@pytest.mark.parametrize(
    ("mass", "expected"), [(0, 0), (0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.876, 4), (1, 4)]
)
def test_cumulative_mass_takes_the_fewest_that_hold_the_share(mass, expected):
    assert taken(CumulativeMass.build(make_setting(), mass=mass)) == expected


def test_the_mass_is_a_share_of_what_was_predicted():
    assert taken(CumulativeMass.build(make_setting(), mass=0.6), count=2) == 1
    assert taken(CumulativeMass.build(make_setting(), mass=0.7), count=2) == 2


@pytest.mark.parametrize("mass", [-0.1, 1.1, float("nan")])
def test_a_mass_outside_0_to_1_is_refused(mass):
    with pytest.raises(ValueError, match=rf"^mass is {re.escape(str(mass))}: it must lie between 0 and 1$"):
        CumulativeMass.build(make_setting(), mass=mass)


@pytest.mark.parametrize(("layer_ns", "transfer_ns", "expected"), [(300, 100, 3), (299, 100, 2), (99, 100, 1), (0, 7, 1)])
def test_the_window_takes_what_the_link_brings_in_a_layer_and_at_least_one(layer_ns, transfer_ns, expected):
    rule = Window.build(make_setting(layer_ns=layer_ns, transfer_ns=transfer_ns))
    assert taken(rule) == expected


def test_the_window_of_fates_code_may_be_nothing():
    assert taken(Window.build(make_setting(layer_ns=99, transfer_ns=100), least=0)) == 0


def test_a_free_link_brings_every_expert():
    assert Window.build(make_setting(experts=6, layer_ns=50, transfer_ns=0)).n == 6


def test_the_window_takes_everything_for_several_tokens():
    assert taken(Window.build(make_setting(layer_ns=100, transfer_ns=100)), tokens=2) == 4


def test_a_window_does_not_take_less_than_nothing():
    with pytest.raises(ValueError, match=r"^least is -1: it must be at least 0$"):
        Window.build(make_setting(), least=-1)

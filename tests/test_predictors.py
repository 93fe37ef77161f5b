"""Every predictor on cases worked out by hand, and the noisy oracle's rates over many draws."""

import numpy as np
import pytest
from builders import make_events_of, make_seen, make_setting, predicted
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.predictor.cross_layer_gate import CrossLayerGate
from policies.predictor.noisy_oracle import NoisyOracle
from policies.predictor.none import NoPrediction
from policies.predictor.oracle import Oracle
from policies.predictor.popularity import Popularity
from policies.predictor.previous_token import PreviousToken
from policies.predictor.transition import Transition
from policies.ranking import note_seen, rank
from policies.system import _learn_nothing


def observed(predictor, layers, tokens_of_events, weights=None):
    """Let `predictor` learn from events 0, 1, ... and return what it saw last; `weights` are of the last."""
    for event, experts in enumerate(tokens_of_events):
        last = event == len(tokens_of_events) - 1
        seen = make_seen(event, layers, experts, weights if last else None)
        getattr(predictor, "observe", _learn_nothing)(seen)
    return seen


def names(prediction):
    return [expert for expert, _ in prediction]


# ---- ranking ---------------------------------------------------------------------------------------------


def ranked(by_expert, seen_at):
    ids, scores = np.full(len(by_expert), -7), np.zeros(len(by_expert))
    count = rank(np.array(by_expert, float), np.array(seen_at), ids, scores)
    return list(zip(ids[:count].tolist(), scores[:count].tolist(), strict=True))


def test_the_best_score_comes_first_and_scores_of_nothing_are_left_out():
    assert ranked([0.5, 0, 2, -1], [0, 0, 0, 0]) == [(2, 2.0), (0, 0.5)]


def test_of_equal_scores_the_one_seen_last_comes_first():
    assert ranked([1, 1, 2, 1], [7, 9, 1, 8]) == [(2, 2.0), (1, 1.0), (3, 1.0), (0, 1.0)]


def test_nothing_above_zero_is_no_prediction():
    assert ranked([0, 0], [3, 4]) == []


def test_experts_listed_first_in_an_event_were_seen_latest_and_later_events_beat_earlier_ones():
    seen_at = np.zeros(5, np.int64)
    note_seen(seen_at, np.array([[3, 1], [1, -1]]), event=0)
    note_seen(seen_at, np.array([[4, 2]]), event=1)
    assert np.argsort(-seen_at).tolist() == [4, 2, 3, 1, 0]


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 10**9)), min_size=1, max_size=9, unique_by=lambda x: x[1]))
@settings(max_examples=60)
def test_a_ranking_does_not_depend_on_the_numbers_of_the_experts(experts):
    scores, seen_at = zip(*experts, strict=True)
    backwards = [(len(experts) - 1 - expert, score) for expert, score in ranked(scores[::-1], seen_at[::-1])]
    assert ranked(scores, seen_at) == backwards


# ---- none ------------------------------------------------------------------------------------------------


def test_no_prediction_predicts_nothing():
    assert predicted(NoPrediction.build(make_setting()), make_seen(0, 2, [[0, 1]])) == []


# ---- previous token --------------------------------------------------------------------------------------


def test_the_step_before_is_expected_again_heavier_weights_first():
    predictor = PreviousToken.build(make_setting())
    predictor.observe(make_seen(0, 2, [[0, 1]], [[0.5, 0.25]]))
    predictor.observe(make_seen(1, 2, [[4, 2]], [[0.75, 0.25]]))
    seen = make_seen(2, 2, [[3, 5]])
    predictor.observe(seen)
    assert predicted(predictor, seen) == [(4, 0.75), (2, 0.25)]


def test_nothing_is_expected_in_the_first_step():
    predictor = PreviousToken.build(make_setting())
    assert predicted(predictor, observed(predictor, 2, [[[0, 1]]])) == []


def test_only_the_last_step_counts():
    predictor = PreviousToken.build(make_setting(layers=1))
    assert names(predicted(predictor, observed(predictor, 1, [[[0, 1]], [[2, -1]]]))) == [2]


def test_the_previous_token_reaches_over_the_end_of_a_step():
    predictor = PreviousToken.build(make_setting())
    seen = observed(predictor, 2, [[[0, 1]], [[4, 2]]])
    assert names(predicted(predictor, seen, ahead=1)) == [0, 1]
    assert names(predicted(predictor, seen, ahead=2)) == [4, 2]


def test_several_tokens_add_their_weights():
    predictor = PreviousToken.build(make_setting(layers=1))
    seen = observed(predictor, 1, [[[0, 1], [2, 1]]], weights=[[0.5, 0.375], [0.5, 0.375]])
    assert predicted(predictor, seen) == [(1, 0.75), (0, 0.5), (2, 0.5)]


def test_a_routed_expert_of_weight_zero_is_expected_too():
    predictor = PreviousToken.build(make_setting(layers=1))
    assert names(predicted(predictor, observed(predictor, 1, [[[0, 1]]], weights=[[1.0, 0.0]]))) == [0, 1]


# ---- popularity ------------------------------------------------------------------------------------------


def test_the_experts_used_most_are_expected():
    predictor = Popularity.build(make_setting(layers=1))
    seen = observed(predictor, 1, [[[0, 1]], [[1, 2]], [[1, 2]]])
    assert predicted(predictor, seen) == [(1, 3.0), (2, 2.0), (0, 1.0)]


def test_of_equally_popular_experts_the_more_recent_comes_first():
    predictor = Popularity.build(make_setting(layers=1))
    assert names(predicted(predictor, observed(predictor, 1, [[[5, 0]], [[3, 1]]]))) == [3, 1, 5, 0]


def test_every_token_of_a_step_counts():
    predictor = Popularity.build(make_setting(layers=1))
    seen = observed(predictor, 1, [[[0, 1], [1, -1], [1, 2]]])
    assert predicted(predictor, seen) == [(1, 3.0), (0, 1.0), (2, 1.0)]


def test_popularity_is_counted_by_layer_and_reaches_over_the_end_of_a_step():
    predictor = Popularity.build(make_setting())
    seen = observed(predictor, 2, [[[0, 1]], [[4, 2]], [[0, 3]], [[4, 5]]])
    assert predicted(predictor, seen, ahead=1) == [(0, 2.0), (3, 1.0), (1, 1.0)]
    assert predicted(predictor, seen, ahead=2) == [(4, 2.0), (5, 1.0), (2, 1.0)]


# ---- transition ------------------------------------------------------------------------------------------


def test_what_followed_is_expected_to_follow_again():
    predictor = Transition.build(make_setting(layers=2, top_k=1))
    seen = observed(predictor, 2, [[[0]], [[3]], [[0]], [[3]], [[0]], [[4]], [[1]], [[5]], [[0]]])
    assert predicted(predictor, seen) == [(3, 2 / 3), (4, 1 / 3)]


def test_each_routed_expert_speaks_for_what_followed_it():
    predictor = Transition.build(make_setting(layers=2))
    seen = observed(predictor, 2, [[[0, 1]], [[3, 4]], [[0, 2]], [[3, 5]], [[1, 2]]])
    # 1 was followed by 3 and 4, 2 by 3 and 5: half a vote for each from either.
    assert predicted(predictor, seen) == [(3, 1.0), (5, 0.5), (4, 0.5)]


def test_a_transition_two_layers_ahead_is_learned_where_the_reach_says_so():
    predictor = Transition.build(make_setting(layers=3, top_k=1), reach=2)
    seen = observed(predictor, 3, [[[0]], [[1]], [[2]], [[0]]])
    assert names(predicted(predictor, seen, ahead=1)) == [1]
    assert names(predicted(predictor, seen, ahead=2)) == [2]
    short = Transition.build(make_setting(layers=3, top_k=1), reach=1)
    assert predicted(short, observed(short, 3, [[[0]], [[1]], [[2]], [[0]]]), ahead=2) == []


def test_transitions_do_not_reach_over_the_end_of_a_step():
    predictor = Transition.build(make_setting(layers=2, top_k=1))
    seen = observed(predictor, 2, [[[0]], [[3]], [[0]], [[3]]])
    assert predicted(predictor, seen) == []


def test_pairs_are_not_counted_from_one_step_to_the_next():
    predictor = Transition.build(make_setting(layers=2, top_k=1))
    observed(predictor, 2, [[[0]], [[3]], [[1]], [[4]]])
    assert predictor.pairs[0, 1].sum() == 0


def test_an_expert_never_seen_in_this_layer_says_nothing():
    predictor = Transition.build(make_setting(layers=2, top_k=1))
    assert predicted(predictor, observed(predictor, 2, [[[0]], [[3]], [[1]]])) == []


def test_several_tokens_count_by_their_share():
    predictor = Transition.build(make_setting(layers=2, top_k=1))
    observed(predictor, 2, [[[0], [0], [0], [1]], [[3], [3], [4], [4]]])
    assert predictor.pairs[0, 0, 0].tolist() == [0, 0, 0, 0.75 * 0.5, 0.75 * 0.5, 0]
    assert predictor.pairs[0, 0, 1].tolist() == [0, 0, 0, 0.25 * 0.5, 0.25 * 0.5, 0]


def test_a_reach_below_one_is_refused():
    with pytest.raises(ValueError, match=r"^reach is 0: it must be at least 1$"):
        Transition.build(make_setting(), reach=0)


# ---- cross-layer gate ------------------------------------------------------------------------------------

ONE_TOKEN = {"lookahead": [[[5, 2, 0, -1], [1, 3, -1, -1]]], "scores": [[[0.5, 0.25, 0.125, 0], [0.75, 0.25, 0, 0]]]}
"""What one token's gate input says about the next two layers."""


def test_for_one_token_the_recorded_ranking_is_passed_on():
    gate = CrossLayerGate.build(make_setting(layers=3))
    seen = make_seen(0, 3, [[0, 1]], **ONE_TOKEN)
    assert predicted(gate, seen, ahead=1) == [(5, 0.5), (2, 0.25), (0, 0.125)]
    assert predicted(gate, seen, ahead=2) == [(1, 0.75), (3, 0.25)]


def test_the_gate_does_not_reach_beyond_what_was_recorded():
    gate = CrossLayerGate.build(make_setting(layers=9))
    assert predicted(gate, make_seen(0, 9, [[0, 1]], **ONE_TOKEN), ahead=3) == []


def test_the_gate_does_not_reach_beyond_the_last_layer():
    gate = CrossLayerGate.build(make_setting(layers=3))
    assert predicted(gate, make_seen(1, 3, [[0, 1]], **ONE_TOKEN), ahead=2) == []
    assert predicted(gate, make_seen(2, 3, [[0, 1]], **ONE_TOKEN), ahead=1) == []


THREE_TOKENS = {
    "lookahead": [[[4, 1, 0, 2]], [[1, 3, 0, 2]], [[3, 5, 0, 2]]],
    "scores": [[[0.5, 0.25, 0.125, 0.125]], [[0.375, 0.25, 0.25, 0.125]], [[0.5, 0.125, 0.125, 0.125]]],
}
"""What three tokens say about the next layer; only the first two ranks are their top-k."""


def test_several_tokens_vote_for_their_top_k_with_their_probabilities():
    gate = CrossLayerGate.build(make_setting())
    seen = make_seen(0, 2, [[0, 1]] * 3, **THREE_TOKENS)
    assert predicted(gate, seen) == [(3, 0.75), (1, 0.625), (4, 0.5), (5, 0.125)]


def test_several_tokens_vote_with_one_vote_each_where_votes_are_counted():
    gate = CrossLayerGate.build(make_setting(), count_votes=True)
    seen = make_seen(0, 2, [[0, 1]] * 3, **THREE_TOKENS)
    # 1 and 3 have two votes, 4 and 5 one: whoever was voted for first comes first.
    assert predicted(gate, seen) == [(1, 2.0), (3, 2.0), (4, 1.0), (5, 1.0)]


def test_counting_votes_changes_nothing_for_one_token():
    gate = CrossLayerGate.build(make_setting(layers=3), count_votes=True)
    assert predicted(gate, make_seen(0, 3, [[0, 1]], **ONE_TOKEN)) == [(5, 0.5), (2, 0.25), (0, 0.125)]


def test_the_gate_needs_lookahead():
    assert frozenset({"lookahead"}) == CrossLayerGate.NEEDS


# ---- oracle ----------------------------------------------------------------------------------------------

STEPS = [[[0, 1], [4, 2]], [[3, 5], [1, -1]]]
"""Two steps of two layers."""


def test_the_oracle_names_exactly_what_comes():
    oracle = Oracle.build(make_setting(events=make_events_of(STEPS, 6)))
    assert predicted(oracle, make_seen(0, 2, [[0, 1]]), ahead=1) == [(4, 1.0), (2, 1.0)]


def test_the_oracle_sees_over_the_end_of_a_step():
    oracle = Oracle.build(make_setting(events=make_events_of(STEPS, 6)))
    assert names(predicted(oracle, make_seen(1, 2, [[4, 2]]), ahead=1)) == [3, 5]
    assert names(predicted(oracle, make_seen(0, 2, [[0, 1]]), ahead=3)) == [1]


def test_behind_the_last_event_the_oracle_sees_nothing():
    oracle = Oracle.build(make_setting(events=make_events_of(STEPS, 6)))
    assert predicted(oracle, make_seen(2, 2, [[3, 5]]), ahead=2) == []
    assert predicted(oracle, make_seen(3, 2, [[1, -1]]), ahead=1) == []


# ---- noisy oracle ----------------------------------------------------------------------------------------


def drawn(steps, experts, seed, ahead=1, **rates):
    """The set that the noisy oracle predicts for every event but the first `ahead`."""
    events = make_events_of(steps, experts)
    layers = events.layers
    noisy = NoisyOracle.build(make_setting(layers=layers, experts=experts, events=events, seed=seed), **rates)
    return [
        frozenset(names(predicted(noisy, make_seen(event, layers, [[0]]), ahead, experts)))
        for event in range(events.total - ahead)
    ]


def random_steps(count, layers, experts, top_k):
    rng = np.random.default_rng(8)
    return [[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(count)]


def test_with_full_recall_and_no_false_alarms_the_noisy_oracle_is_the_oracle():
    steps = random_steps(20, 3, 8, 2)
    oracle = Oracle.build(make_setting(layers=3, experts=8, events=make_events_of(steps, 8)))
    for ahead in (1, 2, 4):
        sure = [frozenset(names(predicted(oracle, make_seen(event, 3, [[0]]), ahead, 8))) for event in range(60 - ahead)]
        assert drawn(steps, 8, seed=1, ahead=ahead, recall=1, false_positive_rate=0) == sure


def test_the_noisy_oracle_has_the_rates_that_it_is_told():
    steps = random_steps(1500, 2, 16, 4)
    unions = [set(map(int, layer)) for step in steps for layer in step][1:]
    found = drawn(steps, 16, seed=3, recall=0.7, false_positive_rate=0.1)
    right = sum(len(union & predicted) for union, predicted in zip(unions, found, strict=True))
    wrong = sum(len(predicted - union) for union, predicted in zip(unions, found, strict=True))
    # 12,000 and 36,000 draws: four standard deviations.
    assert right / (len(unions) * 4) == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / 12_000) ** 0.5)
    assert wrong / (len(unions) * 12) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 36_000) ** 0.5)


def test_right_and_wrong_experts_are_ranked_at_random():
    steps = [[[0], [0]]] * 800
    noisy = NoisyOracle.build(make_setting(experts=2, events=make_events_of(steps, 2)), recall=1, false_positive_rate=1)
    first = [predicted(noisy, make_seen(event, 2, [[0]]), 1, 2)[0][0] for event in range(1599)]
    assert np.mean(first) == pytest.approx(0.5, abs=4 * 0.5 / 1599**0.5)


def test_draws_depend_on_the_seed_and_the_depth_and_on_nothing_else():
    steps = random_steps(30, 2, 16, 4)
    first = drawn(steps, 16, seed=1, recall=0.5)
    assert drawn(steps, 16, seed=1, recall=0.5) == first
    assert drawn(steps, 16, seed=2, recall=0.5) != first
    # The same event, foretold from one layer further away, meets other luck.
    assert drawn(steps, 16, seed=1, ahead=2, recall=0.5) != first[1:]


def test_a_better_oracle_finds_what_a_worse_one_finds_and_more():
    steps = random_steps(30, 2, 16, 4)
    worse = drawn(steps, 16, seed=1, recall=0.3, false_positive_rate=0)
    better = drawn(steps, 16, seed=1, recall=0.6, false_positive_rate=0)
    assert all(few <= many for few, many in zip(worse, better, strict=True))
    assert worse != better


@pytest.mark.parametrize(("name", "rate"), [("recall", 1.5), ("recall", -0.1), ("false_positive_rate", float("nan"))])
def test_a_rate_outside_0_to_1_is_refused(name, rate):
    with pytest.raises(ValueError, match=rf"^{name} is {rate}: it must lie between 0 and 1$"):
        NoisyOracle.build(make_setting(events=make_events_of(STEPS, 6)), **{name: rate})

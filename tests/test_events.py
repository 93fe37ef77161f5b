"""Events: the union of what a (step, layer) needs, and what a clairvoyant is told about it."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import NEVER
from sim.events import future_of, make_events, one_key_events


def lists(events):
    """The keys of every event."""
    starts = events.offsets.tolist()
    return [events.keys[a:b].tolist() for a, b in pairwise(starts)]


def token_counts(events):
    return [events.tokens[a:b].tolist() for a, b in pairwise(events.offsets)]


THREE_TOKENS = np.array([[[3, 1], [0, 2]], [[1, 4], [2, -1]], [[4, 3], [-1, -1]]])
"""Three tokens, two layers of five experts."""


def test_a_token_alone_needs_its_experts_in_descending_weight():
    events = make_events(THREE_TOKENS, np.arange(4), 5)
    assert lists(events) == [[3, 1], [5, 7], [1, 4], [7], [4, 3], []]


def test_the_union_of_several_tokens_is_in_order_of_first_appearance():
    assert lists(make_events(THREE_TOKENS, np.array([0, 3]), 5)) == [[3, 1, 4], [5, 7]]


def test_every_key_counts_the_tokens_that_use_it():
    assert token_counts(make_events(THREE_TOKENS, np.array([0, 3]), 5)) == [[2, 2, 2], [1, 2]]
    assert token_counts(make_events(THREE_TOKENS, np.array([0, 2, 3]), 5)) == [[1, 2, 1], [1, 2], [1, 1], []]


def test_a_step_that_needs_nothing_is_an_event_of_its_own():
    events = make_events(np.full((1, 2, 3), -1), np.array([0, 1]), 4)
    assert (events.total, lists(events)) == (2, [[], []])


def test_no_steps_are_no_events():
    events = make_events(np.zeros((0, 2, 3), np.int8), np.array([0]), 4)
    assert (events.total, events.keys.tolist(), events.tokens.tolist()) == (0, [], [])


def test_keys_do_not_overflow_the_type_of_the_ids():
    events = make_events(np.full((1, 9, 1), 127, np.int8), np.array([0, 1]), 128)
    assert events.keys.tolist() == [128 * layer + 127 for layer in range(9)]
    assert events.keys.dtype == np.int32


def test_one_key_events_are_the_same_accesses_one_at_a_time():
    events = make_events(THREE_TOKENS, np.array([0, 3]), 5)
    assert lists(one_key_events(events)) == [[3], [1], [4], [5], [7]]


def test_the_future_of_a_small_case():
    events = make_events(np.array([[[0, 1]], [[2, 0]], [[1, -1]]]), np.arange(4), 4)
    future = future_of(events)
    assert events.keys.tolist() == [0, 1, 2, 0, 1]
    assert future.following.tolist() == [1, 2, NEVER, NEVER, NEVER]
    assert future.first.tolist() == [0, 0, 1, NEVER]


@st.composite
def routings(draw):
    """Ids [T, L, K], each token's distinct and followed by -1, the steps' offsets, and E."""
    layers, experts, top_k = draw(st.integers(1, 3)), draw(st.integers(3, 6)), draw(st.integers(1, 3))
    steps = draw(st.lists(st.integers(1, 3), max_size=5))
    chosen = st.lists(st.integers(0, experts - 1), unique=True, max_size=top_k)
    ids = np.full((sum(steps), layers, top_k), -1)
    for token in range(len(ids)):
        for layer in range(layers):
            row = draw(chosen)
            ids[token, layer, : len(row)] = row
    return ids, np.cumsum([0, *steps]), experts


@given(routings())
@settings(max_examples=60)
def test_events_are_what_a_plain_loop_finds(case):
    ids, offsets, experts = case
    events = make_events(ids, offsets, experts)
    keys, counts = [], []
    for start, end in pairwise(offsets):
        for layer in range(ids.shape[1]):
            uses = {}
            for expert in ids[start:end, layer].ravel().tolist():
                if expert >= 0:
                    uses[layer * experts + expert] = uses.get(layer * experts + expert, 0) + 1
            keys.append(list(uses))
            counts.append(list(uses.values()))
    assert (lists(events), token_counts(events)) == (keys, counts)


@given(routings(), st.booleans())
@settings(max_examples=60)
def test_the_future_is_what_a_plain_search_finds(case, sequential):
    events = make_events(*case)
    events = one_key_events(events) if sequential else events
    future, unions = future_of(events), lists(events)

    def next_use(key, after):
        return next((event for event in range(after, len(unions)) if key in unions[event]), NEVER)

    following = [next_use(key, event + 1) for event, union in enumerate(unions) for key in union]
    first = [next_use(key, 0) for key in range(events.layers * events.experts)]
    assert (future.following.tolist(), future.first.tolist()) == (following, first)

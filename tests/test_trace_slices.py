"""Parts put together again: first tokens of requests, requests one after another, one recording out of several."""

from dataclasses import replace

import numpy as np
import pytest
from builders import make_trace

from traces import InputError, first_tokens, join_requests, one_after_another, split_requests, validate_trace


def batch():
    """Two requests decoded together: prompts of 2 and 1 tokens, then two passes with a token of each."""
    ids = [[[0]], [[1]], [[2]], [[3]], [[4]], [[5]], [[6]]]
    trace = make_trace(ids, requests=[0, 0, 1, 0, 1, 0, 1], steps=[0, 0, 0, 1, 1, 2, 2], prompts=[2, 1], logits=True)
    return replace(trace, domains=("a", "b"))


def test_requests_one_after_another():
    alone = one_after_another(batch())
    validate_trace(alone, "alone")
    assert alone.request.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert alone.experts[:, 0, 0].tolist() == [0, 1, 3, 5, 2, 4, 6]
    assert alone.step.tolist() == [0, 0, 1, 2, 3, 4, 5], "a prompt is one pass, each decode token another"
    np.testing.assert_array_equal(one_after_another(alone).step, alone.step)


def test_first_tokens_of_every_request():
    part = first_tokens(batch(), 3)
    assert part.request.tolist() == [0, 0, 1, 0, 1, 1]
    assert part.position.tolist() == [0, 1, 0, 2, 1, 2]
    assert part.domains == ("a", "b")
    assert first_tokens(batch(), 99).tokens == 7


def test_no_first_tokens_are_refused():
    with pytest.raises(InputError, match="0 tokens of each request; take at least 1"):
        first_tokens(batch(), 0)


def test_joined_requests_are_numbered_on():
    joined = join_requests([batch(), one_after_another(batch())])
    validate_trace(joined, "joined")
    assert joined.request.tolist() == [0, 0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 3, 3, 3]
    assert joined.step.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8]
    assert joined.domains == ("a", "b", "a", "b")


def test_an_array_that_one_part_lacks_is_left_out():
    assert join_requests([batch(), batch()]).router_logits is not None
    assert join_requests([batch(), replace(batch(), router_logits=None)]).router_logits is None


def test_only_parts_of_one_model_are_joined():
    with pytest.raises(InputError, match="none is given to join"):
        join_requests([])
    other = replace(batch(), model=replace(batch().model, name="other"))
    with pytest.raises(InputError, match="number 1 is of 'other', the first of 'tiny'; join parts of one recording"):
        join_requests([batch(), other])


def test_halves_that_share_no_request_have_half_of_every_domain():
    requests = [0, 1, 2, 3, 5, 6, 7]
    trace = make_trace([[[request]] for request in requests], requests=requests)
    trace = replace(trace, domains=("b", "a", "b", "a", "a", "a", "c", "b"))
    assert split_requests(trace) == ([1, 2, 5, 6], [0, 3, 7])
    with pytest.raises(InputError, match="the trace has one request: it takes two to split it"):
        split_requests(make_trace([[[0]], [[1]]]))

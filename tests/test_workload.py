"""Workloads: which tokens share a step, worked out by hand on small traces."""

import re

import numpy as np
import pytest
from builders import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.workload import make_workload
from traces import InputError, validate_trace


def a_trace(requests, prompts, steps=None):
    """A trace of one layer whose tokens all use the same expert."""
    return make_trace(np.zeros((len(requests), 1, 1)), requests=requests, prompts=prompts, steps=steps)


def steps_of(workload):
    """The rows of every step."""
    return [rows.tolist() for rows in np.split(workload.rows, workload.offsets[1:-1])]


#               request 0: two of prompt, three of answer; request 1: one and two; request 2: two of answer only
INTERLEAVED = a_trace([0, 0, 1, 0, 1, 2, 0, 1, 2, 0], prompts=[2, 1, 0], steps=[0, 0, 1, 2, 2, 3, 3, 4, 4, 4])


def test_recorded_runs_the_passes_of_the_recording():
    workload = make_workload(INTERLEAVED, "recorded")
    assert steps_of(workload) == [[0, 1], [2], [3, 4], [5, 6], [7, 8, 9]]
    assert workload.name == "recorded"


def test_recorded_passes_need_not_be_numbered_without_gaps():
    trace = a_trace([0, 0, 0, 0], prompts=[1], steps=[3, 7, 7, 20])
    assert steps_of(make_workload(trace, "recorded")) == [[0], [1, 2], [3]]


def test_one_request_runs_each_prompt_in_one_pass_and_then_token_by_token():
    workload = make_workload(INTERLEAVED)
    assert steps_of(workload) == [[0, 1], [3], [6], [9], [2], [4], [7], [5], [8]]
    assert workload.decode.tolist() == [False, True, True, True, False, True, True, True, True]
    assert workload.name == "one_request"


def test_one_request_ignores_the_batch():
    assert steps_of(make_workload(INTERLEAVED, "one_request", batch=3)) == steps_of(make_workload(INTERLEAVED))


def test_continuous_serves_as_many_requests_as_the_batch_and_fills_up_when_one_ends():
    workload = make_workload(INTERLEAVED, "continuous", batch=2)
    # Prompts of 0 and 1; both answer; when 1 ends, 2 (without a prompt) takes its place.
    assert steps_of(workload) == [[0, 1], [2], [3, 4], [6, 7], [9, 5], [8]]
    assert workload.decode.tolist() == [False, False, True, True, True, True]
    assert workload.name == "continuous_2"


def test_continuous_with_room_for_all_starts_with_all_prompts():
    workload = make_workload(INTERLEAVED, "continuous", batch=9)
    assert steps_of(workload) == [[0, 1], [2], [3, 4, 5], [6, 7, 8], [9]]


def test_continuous_with_room_for_one_is_one_request():
    assert steps_of(make_workload(INTERLEAVED, "continuous", batch=1)) == steps_of(make_workload(INTERLEAVED))


def test_a_request_without_an_answer_takes_no_place():
    trace = a_trace([0, 0, 1, 1, 2, 2], prompts=[2, 1, 1])
    assert steps_of(make_workload(trace, "continuous", batch=1)) == [[0, 1], [2], [3], [4], [5]]


def test_phases_decode_leaves_prompts_out():
    workload = make_workload(INTERLEAVED, phases="decode")
    assert steps_of(workload) == [[3], [6], [9], [4], [7], [5], [8]]
    assert workload.decode.all()
    assert workload.name == "one_request_decode"


def test_a_recorded_pass_that_mixes_both_phases_counts_as_decode_and_loses_its_prompt_tokens_without_prompts():
    trace = a_trace([0, 0, 1, 0, 1], prompts=[1, 1], steps=[0, 1, 1, 2, 2])
    workload = make_workload(trace, "recorded", phases="decode")
    assert (steps_of(workload), workload.decode.tolist()) == ([[1], [3, 4]], [True, True])
    assert make_workload(trace, "recorded").decode.tolist() == [False, True, True]


def test_every_processed_token_knows_its_request():
    assert make_workload(INTERLEAVED, "continuous", batch=2).request.tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 2, 2]


def test_attention_reads_a_prompt_once_and_for_every_token_of_decode_all_before_it():
    workload = make_workload(INTERLEAVED, "continuous", batch=2)
    # Rows 3 and 4 stand at positions 2 and 1 of their requests: 3 and 2 tokens are read, themselves among them.
    assert workload.context.tolist() == [2, 1, 3 + 2, 4 + 3, 5 + 1, 2]


def test_a_recorded_pass_over_several_prompts_reads_each_of_them():
    trace = a_trace([0, 0, 0, 1, 1, 2], prompts=[3, 2, 1], steps=[0] * 6)
    assert make_workload(trace, "recorded").context.tolist() == [3 + 2 + 1]


def test_a_pass_of_prompt_and_decode_tokens_reads_each_request_once_however_they_stand():
    trace = a_trace([0, 1, 0, 1, 0], prompts=[3, 1], steps=[0] * 5)
    assert make_workload(trace, "recorded").context.tolist() == [3 + 2]


def test_a_prompt_in_parts_reads_what_came_before():
    trace = a_trace([0, 0, 0, 0, 0], prompts=[5], steps=[0, 0, 1, 1, 1])
    assert make_workload(trace, "recorded").context.tolist() == [2, 5]


def test_the_events_are_those_of_the_steps():
    trace = make_trace([[[0, 1]], [[1, 2]], [[3, 0]]], prompts=[2])
    assert make_workload(trace).events.keys.tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"order": "sorted"}, "workload.order is 'sorted': known are recorded, one_request, continuous"),
        ({"phases": "prefill"}, "workload.phases is 'prefill': known are all, decode"),
        ({"batch": 0}, "workload.batch is 0: it must be a whole number of requests, at least 1"),
        ({"batch": 1.5}, "workload.batch is 1.5: it must be a whole number of requests, at least 1"),
        ({"batch": "four"}, "workload.batch is 'four': it must be a whole number of requests, at least 1"),
        ({"batch": True}, "workload.batch is True: it must be a whole number of requests, at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(arguments, sentence):
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        make_workload(INTERLEAVED, **arguments)


def test_a_trace_of_prompts_has_no_decode_to_run():
    with pytest.raises(InputError, match=r"^workload.phases is 'decode', but the trace holds no such token$"):
        make_workload(a_trace([0, 0], prompts=[2]), phases="decode")


@st.composite
def traces(draw):
    """Requests of random lengths whose tokens are interleaved at random."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    requests = draw(st.permutations([r for r, length in enumerate(lengths) for _ in range(length)]))
    prompts = [draw(st.integers(0, length)) for length in lengths]
    steps = np.cumsum(draw(st.lists(st.integers(0, 1), min_size=len(requests), max_size=len(requests))))
    return a_trace(requests, prompts, steps)


@given(traces(), st.sampled_from(["recorded", "one_request", "continuous"]), st.integers(1, 4))
@settings(max_examples=80)
def test_every_token_runs_once_and_those_of_a_request_in_order(trace, order, batch):
    validate_trace(trace, "a made-up trace")
    workload = make_workload(trace, order, batch)
    assert sorted(workload.rows.tolist()) == list(range(trace.tokens))
    assert (np.diff(workload.offsets) > 0).all()
    for request in range(len(trace.domains)):
        of_request = trace.position[workload.rows[workload.request == request]]
        assert of_request.tolist() == list(range(len(of_request)))


@given(traces(), st.integers(1, 4))
@settings(max_examples=40)
def test_no_step_of_decode_serves_more_than_the_batch_or_a_request_twice(trace, batch):
    workload = make_workload(trace, "continuous", batch)
    for start, end, decode in zip(workload.offsets[:-1], workload.offsets[1:], workload.decode, strict=True):
        served = workload.request[start:end].tolist()
        assert len(set(served)) == (len(served) if decode else 1)
        assert len(set(served)) <= batch

"""The figures of a run, from durations that are easy to divide."""

import numpy as np
from builders import make_trace

from sim.result import KINDS, Run, StepTimes, metrics
from sim.workload import make_workload

MS = 10**6


def run_of(durations):
    """Return a run whose steps took `durations` ms, all of it compute."""
    compute = np.array(durations) * MS
    nothing = np.zeros(len(durations), np.int64)
    times = StepTimes(compute, nothing, nothing, nothing, nothing, nothing)
    return Run(times, int(compute.sum()), 0, dict.fromkeys(KINDS, 0), 0, 0, 0, 0, 0, 0)


def test_one_request_at_a_time():
    """A prompt of two tokens in 5 ms, then two tokens in 1 and 3 ms."""
    workload = make_workload(make_trace([[[0]]] * 4, prompts=[2], steps=[0, 0, 1, 2], expert_count=4))
    row = metrics(run_of([5, 1, 3]), workload)
    assert (row["tokens"], row["tokens_per_s"]) == (2, 500)
    assert (row["tpot_ms_mean"], row["tpot_ms_p50"], row["ttft_ms_mean"]) == (2, 2, 5)
    assert row["compute_ms_per_token"] == 2
    assert (row["requests"], row["request_tokens"], row["request_ns"]) == ([0], [2], [4 * MS])


def test_a_pass_that_decodes_one_request_and_reads_the_prompt_of_another_counts_only_what_it_decodes():
    trace = make_trace(
        [[[0]]] * 7, requests=[0, 0, 1, 1, 1, 0, 1], steps=[0, 1, 1, 1, 1, 2, 2], prompts=[1, 3], expert_count=4
    )
    row = metrics(run_of([7, 2, 4]), make_workload(trace, "recorded"))
    assert (row["tokens"], row["tokens_per_s"]) == (3, 500)
    assert (row["requests"], row["request_tokens"], row["request_ns"]) == ([0, 1], [2, 1], [4 * MS, 2 * MS])
    assert row["ttft_ms_mean"] == (7 + 2) / 2


def test_a_prompt_in_two_passes_is_waited_for_twice():
    trace = make_trace([[[0]]] * 5, steps=[0, 0, 1, 1, 2], prompts=[4], expert_count=4)
    row = metrics(run_of([3, 4, 1]), make_workload(trace, "recorded"))
    assert (row["ttft_ms_mean"], row["tpot_ms_mean"]) == (7, 1)


def test_a_trace_of_prompts_counts_prompt_tokens():
    trace = make_trace([[[0]]] * 4, requests=[0, 0, 1, 1], steps=[0, 0, 1, 1], prompts=[2, 2], expert_count=4)
    row = metrics(run_of([1, 3]), make_workload(trace))
    assert (row["tokens"], row["tokens_per_s"], row["ttft_ms_mean"]) == (4, 1000, 2)
    assert np.isnan(row["tpot_ms_mean"])

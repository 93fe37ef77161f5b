"""Evidence of learning: exact on hand-made routing, and gone from the shuffled control."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from builders import make_trace
from rich.console import Console

from traces import bundled, find_evidence, load_trace, render_evidence, shuffled, synthesize, validate_trace
from traces.evidence import domain_separation, render_summary, reuse_distances

# --- the control ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting():
    """A trace whose requests have strong tastes of their own, with lookahead."""
    sizes = {"layers": 3, "experts": 16, "top_k": 2, "requests": 4, "prefill_tokens": 2, "decode_tokens": 60}
    trace = synthesize(**sizes, lookahead_depth=1, request_spread=3.0, early_strength=(1.0,))
    return replace(trace, domains=("a", "a", "b", "b"))


def test_the_control_keeps_each_layers_sets_of_experts(lasting):
    control = shuffled(lasting)
    validate_trace(control, "control")
    for layer in range(3):
        recorded, dealt = (np.sort(trace.experts[:, layer], axis=-1).tolist() for trace in (lasting, control))
        assert sorted(recorded) == sorted(dealt)
        assert recorded != dealt


def test_the_control_moves_weights_with_their_experts(lasting):
    pairs = [
        set(zip(t.experts[:, 0].ravel().tolist(), t.weights[:, 0].ravel().tolist(), strict=True))
        for t in (lasting, shuffled(lasting))
    ]
    assert pairs[0] == pairs[1]


def test_the_control_leaves_lookahead_and_requests_where_they_are(lasting):
    control = shuffled(lasting)
    assert control.lookahead_experts is lasting.lookahead_experts
    assert control.request is lasting.request
    assert control.router_logits is None
    assert control.is_synthetic


def test_a_trace_without_gate_weights_has_evidence(lasting):
    found = find_evidence(replace(lasting, weights=None))
    assert found.shuffled_overlap == find_evidence(lasting).shuffled_overlap


def test_the_same_seed_gives_the_same_control(lasting):
    same, other = shuffled(lasting, 5), shuffled(lasting, 6)
    np.testing.assert_array_equal(shuffled(lasting, 5).experts, same.experts)
    assert (same.experts != other.experts).any()


def test_what_ties_tokens_together_is_gone_from_the_control(lasting):
    found = find_evidence(lasting)
    assert found.overlap.mean[0] > 1.5 * found.shuffled_overlap.mean[0]
    assert found.recall.mean[0][0] > 2 * found.shuffled_recall.mean[0][0]
    assert found.lru > found.shuffled_lru


# --- reuse ----------------------------------------------------------------------------------------------


def test_reuse_is_counted_in_tokens_of_the_request():
    """Experts 0 1, 0 2, 0 1: 0 comes again after 1 token, twice; 1 after 2; three are first uses."""
    reuse = reuse_distances(make_trace([[[0, 1]], [[0, 2]], [[0, 1]]]))
    assert reuse.share == pytest.approx((2 / 6, 3 / 6) + (3 / 6,) * 5)
    assert (reuse.first, reuse.median) == (0.5, 1.0)


def test_reuse_stays_inside_requests_and_layers():
    apart = make_trace([[[0], [1]], [[1], [0]], [[0], [0]]], requests=[0, 0, 1], expert_count=2)
    assert reuse_distances(apart).first == 1.0
    assert reuse_distances(apart).median is None


def test_interleaved_requests_count_their_own_tokens():
    reuse = reuse_distances(make_trace([[[0]], [[1]], [[0]], [[1]]], requests=[0, 1, 0, 1]))
    assert (reuse.share[0], reuse.first) == (0.5, 0.5)


def test_missing_experts_are_no_uses():
    assert reuse_distances(make_trace([[[0, -1]], [[0, -1]]], expert_count=2)).share[0] == 0.5


# --- domains --------------------------------------------------------------------------------------------


def two_domains(*experts):
    """Return a trace of one layer and 4 experts; token i is request i, the first half of domain a, the rest of b."""
    count = len(experts)
    trace = make_trace([[[expert]] for expert in experts], requests=range(count), expert_count=4)
    return replace(trace, domains=("a",) * (count // 2) + ("b",) * (count // 2))


def test_domains_of_their_own_experts_are_told_apart_by_one_use():
    domains = domain_separation(two_domains(0, 0, 0, 0, 1, 1, 1, 1))
    assert domains.names == ("a", "b")
    assert domains.information == pytest.approx((1.0,))
    assert domains.hottest_shared == ((1.0, 0.0), (0.0, 1.0))
    assert domains.apart == 0.0
    assert domains.dealt_anew < 0.5


def test_domains_of_the_same_experts_share_them():
    domains = domain_separation(two_domains(2, 3, 2, 2, 3, 2))
    assert domains.information == pytest.approx((0.0,))
    assert domains.apart == 1.0


def test_domains_of_one_request_each_are_not_dealt_anew():
    assert domain_separation(two_domains(0, 1)).dealt_anew is None
    assert domain_separation(two_domains(0, 0, 1, 1)).dealt_anew is not None


def test_requests_without_a_domain_are_left_out():
    trace = two_domains(0, 0, 1, 1)
    assert domain_separation(replace(trace, domains=("a", "", "b", ""))).information == pytest.approx((1.0,))
    assert domain_separation(replace(trace, domains=("a",) * 4)) is None


# --- the whole ------------------------------------------------------------------------------------------


def text_of(tables):
    console = Console(file=io.StringIO(), width=160)
    console.print(tables)
    return console.file.getvalue()


def test_evidence_is_json_and_tables(lasting):
    found = find_evidence(lasting)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["domains"]["names"] == ["a", "b"]
    assert "foretold d=1" in text_of(render_evidence(found))
    assert "dealt anew" in text_of(render_summary([("recorded", found)]))


def test_evidence_of_a_single_token_without_lookahead_and_domain():
    found = find_evidence(make_trace([[[0, 1]]]))
    assert (found.recall, found.domains, found.reuse.first) == (None, None, 1.0)
    assert "foretold" not in text_of(render_evidence(found))
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("name", sorted(bundled()))
def test_the_routing_of_bundled_recordings_is_learned(name):
    found = find_evidence(load_trace(bundled()[name]))
    assert found.recall.mean[0][0] > 3 * found.shuffled_recall.mean[0][0]
    assert found.overlap.mean[0] > 1.5 * found.shuffled_overlap.mean[0]
    assert np.mean(found.domains.information) > found.domains.dealt_anew > np.mean(found.shuffled_domains.information)

"""Tiny traces, settings and observations for tests that work out by hand what must happen."""

import json

import numpy as np

from policies.contract import Seen, Setting
from sim.events import future_of, make_events
from traces import DECODE, PREFILL, ModelSpec, Provenance, Trace

SIZES = {
    "hidden_size": 8,
    "expert_width": 4,
    "expert_bytes": {"bf16": 1000},
    "other_bytes": 2000,
    "kv_bytes_per_token": 10,
}
"""Of a model that is priced as it is."""


def make_trace(experts, *, requests=None, steps=None, prompts=None, lookahead=None, expert_count=None, logits=False):
    """Return a consistent trace with the routed ids `experts` [T, L, K]; -1 stands for no expert.

    `requests` [T] are all 0, every token is a step of its own (`steps` [T]) and decode: `prompts` gives how many of
    each request's tokens are prompt. `lookahead` [T, L, D, M] are ranked ids, to which falling scores are made up.
    """
    experts = np.asarray(experts, np.int8)
    tokens, layers, top_k = experts.shape
    request = np.zeros(tokens, np.int32) if requests is None else np.asarray(requests, np.int32)
    position = np.array([np.sum(request[:t] == request[t]) for t in range(tokens)], np.int32)
    count = int(request.max()) + 1
    prompt = np.zeros(count, int) if prompts is None else np.asarray(prompts)
    arrays = {}
    if lookahead is not None:
        ranked = np.asarray(lookahead, np.int8)
        falling = np.linspace(0.5, 0.1, ranked.shape[-1])
        arrays["lookahead_experts"] = ranked
        arrays["lookahead_scores"] = np.where(ranked >= 0, falling, 0).astype(np.float16)
    expert_count = int(experts.max()) + 1 if expert_count is None else expert_count
    if logits:
        arrays["router_logits"] = np.zeros((tokens, layers, expert_count), np.float16)
    return Trace(
        model=ModelSpec("tiny", layers, expert_count, top_k, **SIZES),
        provenance=Provenance("recorded", "a test", "tests/builders.py"),
        domains=("",) * count,
        experts=experts,
        weights=np.where(experts >= 0, np.linspace(0.6, 0.2, top_k), 0).astype(np.float16),
        request=request,
        position=position,
        step=np.arange(tokens, dtype=np.int32) if steps is None else np.asarray(steps, np.int32),
        phase=np.where(position < prompt[request], PREFILL, DECODE).astype(np.uint8),
        **arrays,
    )


def make_events_of(steps, expert_count):
    """Return the events of `steps`: for every step and layer the ids that one token routes to."""
    experts = np.array(steps)
    return make_events(experts, np.arange(len(experts) + 1), expert_count)


def make_setting(layers=2, experts=6, top_k=2, events=None, **changes):
    """Return the setting of one pool that holds everything; `events` give it a future."""
    fields = {
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "pool_of": np.zeros(layers, np.int64),
        "capacity": np.array([layers * experts]),
        "seed": 0,
        "layer_ns": 0,
        "transfer_ns": 0,
        "future": None if events is None else future_of(events),
    }
    return Setting(**{**fields, **changes})


def make_seen(event, layers, experts, weights=None, lookahead=None, scores=None):
    """Return event `event` as a policy sees it: `experts` [n, K], `lookahead` and `scores` [n, D, M]."""
    experts = np.asarray(experts)
    nothing = np.zeros((len(experts), 0, 0))
    return Seen(
        event=event,
        layer=event % layers,
        experts=experts,
        weights=np.full(experts.shape, 0.5) if weights is None else np.asarray(weights),
        request=np.arange(len(experts)),
        lookahead_experts=nothing.astype(np.int8) if lookahead is None else np.asarray(lookahead),
        lookahead_scores=nothing if scores is None else np.asarray(scores),
        router_logits=np.zeros((len(experts), 0)),
    )


def predicted(predictor, seen, ahead=1, experts=6):
    """Return what `predictor` expects, as (expert, score), best first."""
    ids, scores = np.full(experts, -7), np.full(experts, np.nan)
    count = predictor.predict(seen, ahead, ids, scores)
    assert (ids[count:] == -7).all() or count == 0 or len(set(ids[:count].tolist())) == count
    return list(zip(ids[:count].tolist(), scores[:count].tolist(), strict=True))


def save_npz(path, experts, top_k=2, expert_count=6):
    """Write a recording of one request of decode in the format `plain_arrays`."""
    experts = np.asarray(experts, np.uint8)
    meta = {
        "model": "tiny",
        "num_layers": experts.shape[1],
        "num_experts": expert_count,
        "top_k": top_k,
        "phase": "decode",
    }
    np.savez(
        path,
        experts=experts,
        weights=np.full(experts.shape, 1 / top_k, np.float16),
        offsets=np.array([0, len(experts)]),
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    return path

"""What a policy is told, what it may keep, and what it must answer.

A policy is a `NamedTuple` of NumPy arrays and numbers with ordinary methods: a pure state machine
without clock, device or I/O. Its methods use only array elements, numbers and the functions of
`policies.order`, so that the same text runs as plain Python and can be compiled.

Every policy class has a classmethod `build(setting, **parameters)`; the parameters are the keys of its
YAML. The decorator `needs` names what it cannot do without:

``weights``    the trace's gate weights
``lookahead``  the trace's cross-layer gate observations
``logits``     the trace's router logits
``future``     what the router will choose (oracles and bounds; no real system has it)

The axes, and the methods of each:

predictor
    ``observe(seen)``                        learn from one event (optional)
    ``predict(seen, ahead, ids, scores)``    write the experts expected `ahead` layers after the event just
                                             seen, best first and no more than ``len(ids)``, and return how many;
                                             0 says "no prediction"
prefetch
    ``depth``                                how many layers ahead it asks for
    ``most(tokens)``                         how many experts it would fetch at most for a step of `tokens`
    ``take(scores, count)``                  how many of the `count` ranked experts to fetch (optional: all of them)
eviction
    ``on_miss(key, pool, now)``              a routed expert is absent; called for all of them when the event starts,
                                             before any room is made (optional)
    ``on_insert(key, pool, now)``            the expert took a slot: its load starts; without an ``on_miss`` in this
                                             event it is a prefetch, whose first use comes as ``on_hit``
    ``on_hit(key, pool, now)``               a routed expert was resident or in flight when its event started
    ``on_evict(key, pool, now)``             the expert lost its slot
    and one of
    ``score(key, now)``                      a number: the lowest leaves, of equals the one inserted first; written so
                                             that `key` may be one key or an array of keys
    ``victim(pool, holds, limit, now)``      the key that leaves, or -1: only keys with ``holds[key] < limit`` may
allocation
    ``divide(slots, layers, experts, top_k)``  the pool of every layer and the slots of every pool
miss
    ``action(key, now)``                     what a miss does: `LOAD`

An **expert key** is ``layer * experts + expert``. `now` is the running number of the event (step * layers +
layer), the only clock a policy has. Within an event the experts come in order of first appearance: token by token,
heaviest gate weight first, or as recorded where the trace does not know which is heaviest (`Trace.ranked`). Whoever
runs a policy may keep a copy of it with its queues as lists (`policies.order.with_lists`), so a policy object that was
handed over is not looked at again. A **pool** is a set of slots that compete: one for the whole device, or one per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LOAD = 0
"""Miss action: transfer the expert over the link and wait for it."""

CAPABILITIES = ("weights", "lookahead", "logits", "future")
"""What a policy may need."""

_Policy = TypeVar("_Policy", bound=type)


def needs(*capabilities: str) -> Callable[[_Policy], _Policy]:
    """Declare what a policy class cannot do without; a trace that lacks it is refused with a sentence."""
    unknown = set(capabilities) - set(CAPABILITIES)
    if unknown:
        raise ValueError(f"{sorted(unknown)} is no capability: known are {', '.join(CAPABILITIES)}")

    def declare(policy: _Policy) -> _Policy:
        policy.NEEDS = frozenset(capabilities)  # type: ignore[attr-defined]
        return policy

    return declare


def needs_of(policy: type) -> frozenset[str]:
    """Return what a policy class declared with `needs`."""
    declared: frozenset[str] = getattr(policy, "NEEDS", frozenset())
    return declared


def steady(changed: str = "") -> Callable[[_Policy], _Policy]:
    """Declare that an expert's score stays what it is until the policy is told of that expert.

    A hit, miss, insertion or eviction of an expert may change its own score, time alone changes none; an engine then need
    not ask for all of them for every victim. `changed` names an array of one number that grows whenever that is not so.
    """

    def declare(policy: _Policy) -> _Policy:
        if changed and changed not in getattr(policy, "_fields", ()):
            raise ValueError(f"{policy.__name__} has no field '{changed}', which @steady(changed=...) names")
        policy.STEADY = changed  # type: ignore[attr-defined]
        return policy

    return declare


def numbers_matter(reason: str) -> Callable[[_Policy], _Policy]:
    """Declare that a policy's decisions depend on how experts are numbered, and why that cannot be otherwise."""

    def declare(policy: _Policy) -> _Policy:
        policy.NUMBERS_MATTER = reason  # type: ignore[attr-defined]
        return policy

    return declare


class Seen(NamedTuple):
    """One event as a real system sees it, right after the router of its layer ran.

    The arrays are whoever runs the policy's own: a method reads them and keeps none.
    Arrays that nobody declared to need have zero rows. Expert ids are -1 where a token used fewer than K.
    """

    event: int
    """Running number of the event: step * layers + layer."""
    layer: int
    experts: npt.NDArray[np.integer]
    """[n, K] routed experts of the n tokens, descending weight where the trace knows it (`Trace.ranked`)."""
    weights: npt.NDArray[np.floating]
    """[n, K] their gate weights."""
    request: npt.NDArray[np.integer]
    """[n] the request of each token."""
    lookahead_experts: npt.NDArray[np.integer]
    """[n, D, M] ranked experts by the gate of layer + d + 1 on this layer's gate input; -1 is none."""
    lookahead_scores: npt.NDArray[np.floating]
    """[n, D, M] their probabilities."""
    router_logits: npt.NDArray[np.floating]
    """[n, E] logits of this layer's own gate."""


class Future(NamedTuple):
    """What the router will choose; only policies that declare the need receive it.

    Event i needs ``keys[offsets[i]:offsets[i + 1]]``; ``following`` holds, at the same places, the next event that
    needs the key again, and ``first[key]`` the first event that needs it (`NEVER` where there is none).
    """

    offsets: Ints
    keys: npt.NDArray[np.int32]
    following: Ints
    first: Ints


NEVER = np.iinfo(np.int64).max
"""An event that does not come."""


@dataclass(frozen=True)
class Setting:
    """What a policy knows when it is built: shapes, sizes and its seed, but nothing of the trace's course."""

    layers: int
    experts: int
    top_k: int
    pool_of: Ints
    """[layers] the pool that holds each layer's experts."""
    capacity: Ints
    """[pools] slots of each pool."""
    seed: int
    layer_ns: int
    """Time of one decode layer when nothing is waited for, as a system would measure it beforehand."""
    transfer_ns: int
    """Time to bring one expert over the link, measured likewise."""
    future: Future | None = None

    @property
    def keys(self) -> int:
        """Number of expert keys."""
        return self.layers * self.experts

    @property
    def pools(self) -> int:
        """Number of pools."""
        return len(self.capacity)

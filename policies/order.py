"""Queues of expert keys as arrays: the building block of list-based eviction policies.

Several queues share one `Order` or `Queues`; a key stands in at most one of them. All operations are O(1) but
`oldest_free`, which walks past keys that may not leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from policies.contract import Ints

Links = npt.NDArray[np.uint32]
"""Half as wide as other numbers of a policy, since what every access follows should stay in the processor's nearest cache,
and without a sign, since compiled code looks at an index with a sign twice: it may count from the end. Compare them or use
them as an index; a difference of two would have no sign either in compiled code."""

NOWHERE = 2**32 - 1
"""No queue."""


class Order(NamedTuple):
    """Doubly linked queues over `keys` expert keys; queue q has the sentinel node ``keys + q``."""

    keys: np.uint32 | int
    newer: Links
    older: Links


class Queues(NamedTuple):
    """An `Order` that also knows which queue a key stands in and how long each is: `enter` and `leave` keep account."""

    keys: np.uint32 | int
    newer: Links
    older: Links
    queue: Links
    """[keys] the queue that a key stands in, or NOWHERE."""
    length: Ints
    """[queues] how many keys stand in each."""


def make_order(keys: int, queues: int) -> Order:
    """Return `queues` empty queues over `keys` keys."""
    links = np.arange(keys + queues, dtype=np.uint32)
    # The number of keys has no sign either: sentinels are found with it.
    return Order(np.uint32(keys), links, links.copy())


def make_queues(keys: int, queues: int) -> Queues:
    """Return the same as `Queues`."""
    return Queues(*make_order(keys, queues), np.full(keys, NOWHERE, np.uint32), np.zeros(queues, np.int64))


def with_lists(policy: Any) -> Any:
    """Return `policy` with the arrays of its queues as lists: what plain Python reads one at a time, three times faster."""
    if isinstance(policy, (Order, Queues)):
        return type(policy)(int(policy.keys), *(links.tolist() for links in policy[1:]))
    if not hasattr(policy, "_asdict"):
        return policy
    queues = {name: with_lists(part) for name, part in policy._asdict().items() if isinstance(part, (Order, Queues))}
    return policy._replace(**queues) if queues else policy


def append(order: Order | Queues, queue: int, key: int) -> None:
    """Put `key`, which stands in no queue, at the newest end of `queue`."""
    end = order.keys + queue
    last = order.older[end]
    order.newer[last] = key
    order.older[key] = last
    order.newer[key] = end
    order.older[end] = key


def remove(order: Order | Queues, key: int) -> None:
    """Take `key` out of the queue that it stands in."""
    before = order.older[key]
    after = order.newer[key]
    order.newer[before] = after
    order.older[after] = before


def renew(order: Order | Queues, queue: int, key: int) -> None:
    """Move `key` to the newest end of `queue`, in which it stands."""
    end = order.keys + queue
    last = order.older[end]
    if last == key:
        return
    before = order.older[key]
    after = order.newer[key]
    order.newer[before] = after
    order.older[after] = before
    order.newer[last] = key
    order.older[key] = last
    order.newer[key] = end
    order.older[end] = key


def enter(queues: Queues, queue: int, key: int) -> None:
    """Put `key`, which stands in no queue, at the newest end of `queue`."""
    append(queues, queue, key)
    queues.queue[key] = queue
    queues.length[queue] += 1


def leave(queues: Queues, key: int) -> None:
    """Take `key` out of the queue that it stands in."""
    remove(queues, key)
    queues.length[queues.queue[key]] -= 1
    queues.queue[key] = NOWHERE


def oldest(order: Order | Queues, queue: int) -> int:
    """Return the oldest key of `queue`, or -1 where it is empty."""
    key = order.newer[order.keys + queue]
    return key if key < order.keys else -1


def oldest_free(order: Order | Queues, queue: int, holds: Ints, limit: int) -> int:
    """Return the oldest key of `queue` that may leave (``holds[key] < limit``), or -1."""
    keys = order.keys
    key = order.newer[keys + queue]
    while key < keys and holds[key] >= limit:
        key = order.newer[key]
    return key if key < keys else -1


def shorten(queues: Queues, queue: int, length: int) -> None:
    """Drop the oldest keys of `queue` until at most `length` stand in it: the bound of a ghost list."""
    end = queues.keys + queue
    while queues.length[queue] > max(length, 0):
        leave(queues, queues.newer[end])

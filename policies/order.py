"""Queues of expert keys as arrays: the building block of list-based eviction policies.

Several queues share one `Order`; a key stands in at most one of them. All operations are O(1) but
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
    queue: Links
    """[keys] the queue that a key stands in, or NOWHERE."""
    length: Ints
    """[queues] how many keys stand in each."""


def make_order(keys: int, queues: int) -> Order:
    """Return `queues` empty queues over `keys` keys."""
    links = np.arange(keys + queues, dtype=np.uint32)
    # The number of keys has no sign either: sentinels are found with it.
    return Order(np.uint32(keys), links, links.copy(), np.full(keys, NOWHERE, np.uint32), np.zeros(queues, np.int64))


def with_lists(policy: Any) -> Any:
    """Return `policy` with the arrays of its queues as lists: what plain Python reads one at a time, three times faster."""
    if isinstance(policy, Order):
        return Order(int(policy.keys), *(links.tolist() for links in policy[1:]))
    if not hasattr(policy, "_asdict"):
        return policy
    queues = {name: with_lists(part) for name, part in policy._asdict().items() if isinstance(part, Order)}
    return policy._replace(**queues) if queues else policy


def append(order: Order, queue: int, key: int) -> None:
    """Put `key`, which stands in no queue, at the newest end of `queue`."""
    end = order.keys + queue
    last = order.older[end]
    order.newer[last] = key
    order.older[key] = last
    order.newer[key] = end
    order.older[end] = key
    order.queue[key] = queue
    order.length[queue] += 1


def remove(order: Order, key: int) -> None:
    """Take `key` out of the queue that it stands in."""
    before = order.older[key]
    after = order.newer[key]
    order.newer[before] = after
    order.older[after] = before
    order.length[order.queue[key]] -= 1
    order.queue[key] = NOWHERE


def renew(order: Order, key: int) -> None:
    """Move `key` to the newest end of the queue that it stands in."""
    before = order.older[key]
    after = order.newer[key]
    end = order.keys + order.queue[key]
    if after == end:
        return
    order.newer[before] = after
    order.older[after] = before
    last = order.older[end]
    order.newer[last] = key
    order.older[key] = last
    order.newer[key] = end
    order.older[end] = key


def oldest(order: Order, queue: int) -> int:
    """Return the oldest key of `queue`, or -1 where it is empty."""
    key = order.newer[order.keys + queue]
    return key if key < order.keys else -1


def oldest_free(order: Order, queue: int, holds: Ints, limit: int) -> int:
    """Return the oldest key of `queue` that may leave (``holds[key] < limit``), or -1."""
    keys = order.keys
    key = order.newer[keys + queue]
    while key < keys and holds[key] >= limit:
        key = order.newer[key]
    return key if key < keys else -1


def shorten(order: Order, queue: int, length: int) -> None:
    """Drop the oldest keys of `queue` until at most `length` stand in it: the bound of a ghost list."""
    end = order.keys + queue
    while order.length[queue] > max(length, 0):
        remove(order, order.newer[end])

"""From repeated timings to the constants of a hardware profile: pure functions, without a clock or a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Samples = Sequence[float]
"""Repeated measurements of one quantity."""


class Summary(NamedTuple):
    """The middle of repeated measurements and their spread, in the unit of the samples."""

    median: float
    p10: float
    p90: float
    samples: int


def summary(samples: Samples) -> Summary:
    """Return median, 10th and 90th percentile of `samples`; raises ValueError where there are none."""
    if len(samples) == 0:
        raise ValueError("there are no samples")
    p10, median, p90 = np.percentile(np.asarray(samples, float), [10, 50, 90]).tolist()
    return Summary(median, p10, p90, len(samples))


def quietest(rounds: Sequence[list[float]]) -> list[float]:
    """Return the round whose median is least: other guests of a shared machine only ever make it slower."""
    return min(rounds, key=lambda samples: summary(samples).median)


class Train(NamedTuple):
    """What copies cost that follow one another."""

    start_ns: float
    """What the first one takes longer than the others."""
    copy_ns: float
    """What each one takes."""


def fit_train(train_ns: Mapping[int, float]) -> Train:
    """Split the times of trains of 1 and more equal copies into ``start_ns + count * copy_ns``, by least squares.

    `train_ns` gives the ns of a train by its count of copies; an isolated copy is the train of 1. The line goes through the
    isolated copy, whose time the model charges on an idle link. Raises ValueError without count 1 and another one.
    """
    if 1 not in train_ns or len(train_ns) < 2:
        raise ValueError("a train needs the time of 1 copy and of more")
    more = np.array([count - 1 for count in train_ns], float)
    longer = np.array([time - train_ns[1] for time in train_ns.values()], float)
    copy_ns = float(more @ longer / (more @ more))
    return Train(train_ns[1] - copy_ns, copy_ns)


def rising(points: Mapping[int, float]) -> list[tuple[int, int]]:
    """Return (bytes, ns) by rising bytes, times rounded and lifted where noise let a larger copy seem faster."""
    sizes = sorted(points)
    times = np.maximum.accumulate([max(0, round(points[size])) for size in sizes]).tolist()
    return list(zip(sizes, times, strict=True))


class Kernel(NamedTuple):
    """Device time of work that reads memory: ``launch_ns + bytes / bytes_per_s``."""

    launch_ns: float
    bytes_per_s: float
    worst: float
    """Largest relative residual of the fit."""


def fit_kernel(experts: Sequence[tuple[int, int, float]]) -> Kernel:
    """Fit launch and bandwidth to (experts in a row, bytes of one, ns of all), by least squares.

    Raises ValueError where the times do not grow with the bytes: then they do not say how fast memory is.
    """
    count, size, time = np.array(experts, float).T
    terms = np.stack([count, count * size], axis=1)
    (launch_ns, per_byte), *_ = np.linalg.lstsq(terms, time, rcond=None)
    if launch_ns < 0:  # no kernel ends before its memory is read
        launch_ns, per_byte = 0.0, float((count * size) @ time / ((count * size) @ (count * size)))
    if not per_byte > 0:
        raise ValueError("the times of experts do not grow with their bytes")
    worst = float(np.abs(terms @ (launch_ns, per_byte) / time - 1).max())
    return Kernel(float(launch_ns), 1e9 / float(per_byte), worst)


def overhead_ns(measured: Sequence[tuple[int, float]], bytes_per_s: float) -> float:
    """Return the median ns that work took beyond reading its bytes; `measured` holds (bytes, ns). At least 0."""
    beyond = [time - size / bytes_per_s * 1e9 for size, time in measured]
    return max(0.0, float(np.median(beyond)))


def slowdown(alone: Samples, beside: Samples) -> float:
    """Return by which factor the median of `beside` is larger than that of `alone`."""
    return summary(beside).median / summary(alone).median

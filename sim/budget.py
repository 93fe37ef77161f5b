"""How much device memory experts may take: a fraction of all of them, or bytes."""

from __future__ import annotations

import re
from typing import Any

from traces.errors import InputError


def slots_within(budget: Any, all_slots: int, expert_bytes: int) -> int:
    """Return how many experts a budget holds: a fraction of all of them, or bytes (a number above 1, or ``4GB``)."""
    number, unit_bytes = parse_budget(budget)
    if unit_bytes is None:
        return int(number * all_slots + 1e-9)
    return min(all_slots, int(number * unit_bytes) // expert_bytes)


def parse_budget(budget: Any) -> tuple[float, int | None]:
    """Return a budget's number and the bytes of its unit, None for a fraction of all experts; raises InputError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(budget))
    if isinstance(budget, bool) or match is None or match.group(2).upper() not in units or float(match.group(1)) <= 0:
        raise InputError(
            f"budget is {budget!r}: it must be a fraction of all experts above 0 and at most 1, or bytes such as 4GB"
        )
    number, unit = float(match.group(1)), match.group(2).upper()
    if not unit and 1 < number < 10**6:
        raise InputError(
            f"budget is {budget!r}: as a fraction it is above 1, and as bytes it lacks a unit, such as {budget}GB"
        )
    return number, None if number <= 1 and not unit else units[unit]

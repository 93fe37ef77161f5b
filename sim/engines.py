"""Which engine runs a system: the compiled one, unless somebody asks for the other or a policy needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from policies.system import Composition, System, build_system
from sim.costs import Costs, decode_layer_ns, transfer_ns
from sim.reference import run_reference
from sim.result import Run
from sim.workload import Workload

ENGINES = ("auto", "fast", "reference")
"""What `engine` may be. Both engines give the same integers."""


def build_for(composition: Composition, workload: Workload, costs: Costs, slots: int, seed: int) -> System:
    """Build `composition` afresh for one run of `workload` with `slots` expert slots on the device. Raises InputError."""
    model = workload.trace.model
    return build_system(
        composition,
        slots=slots,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        seed=seed,
        layer_ns=decode_layer_ns(costs, model.top_k),
        transfer_ns=transfer_ns(costs),
        future=lambda: workload.future,
    )


def run_engine(
    name: str, build: Callable[[], System], workload: Workload, costs: Costs, log: list[tuple[Any, ...]] | None = None
) -> tuple[Run, str]:
    """Run a system, freshly built by `build`, in the engine `name`; return what happened and which engine it was.

    ``auto`` is the fast engine. Where a compiled policy raises an exception, of which nothing but that is known, the
    reference engine runs it again and the exception that Python raises is the one to read.
    """
    if name == "reference":
        return run_reference(build(), workload, costs, log), name
    from sim.fast import PolicyRaised, run_fast  # numba takes half a second to import

    try:
        return run_fast(build(), workload, costs, log), "fast"
    except PolicyRaised:
        if name == "fast":
            raise
        if log is not None:
            log.clear()
        return run_reference(build(), workload, costs, log), "reference"

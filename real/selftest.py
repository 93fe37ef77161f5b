"""Does the executor keep its word on this machine's GPU? ``python -m real.selftest``

Small shapes, seconds: outputs equal those of the resident model bit for bit, prompts in waves included, with the schedule
proved; and failures end in a sentence with nothing left allocated or registered.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from real.commands import ended
from real.decoder import ModelShape
from real.device import COMPUTE, Calls, Device
from real.driver import check_gpu
from real.replay import Cell, Measured, Model, run_cell
from real.slab import HostSlab
from traces.errors import InputError
from traces.files import save_trace
from traces.synthetic import synthesize

LATE_COPY = 310
"""A copy in the middle of a run: the link's rate is measured with 288 before it."""

SHAPE = ModelShape(layers=4, experts=16, top_k=3, hidden=512, expert_width=384, shared_width=256, heads=4, vocabulary=1000)


def run(where: str) -> list[str]:
    """Run all checks and return what is wrong; prints a line per check."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routing.safetensors"
        save_trace(_routing(), path)
        model = Model(SHAPE, where)
        try:
            for name, check in _checks(path, model):
                try:
                    check()
                    print(f"self-test: {name}: as it must be", flush=True)
                except Exception as error:  # every check is to run, whatever the one before ran into
                    wrong.append(f"{name}: {type(error).__name__}: {error}")
                    print(f"self-test: {wrong[-1]}", flush=True)
        finally:
            model.close()
    return wrong


def _checks(path: Path, model: Model) -> Iterator[tuple[str, Callable[[], None]]]:
    for order, batch, phases in (("one_request", 1, "all"), ("continuous", 3, "all"), ("continuous", 4, "decode")):
        for system, slots in _systems():
            cell = _cell(path, system, slots, order, batch, phases)
            yield f"{system['name']}, {order}, batch {batch}, {phases}", lambda cell=cell: _equals_resident(cell, model)  # type: ignore[misc]
    cell = _cell(path, _systems()[0][0], 12, "one_request", 1, "all")
    yield "the same twice", lambda: _same(run_cell(cell, model), run_cell(cell, model))
    if model.where != "cpu":
        yield (
            "more slots than the GPU's memory holds",
            lambda: _refuses(model, replace(cell, slots=10**9), "memory does not suffice"),
        )
        yield "host memory that cannot be registered", _refuses_registration
        yield "a copy that fails", lambda: _copy_fails(cell, model)
    yield "an interrupted run", lambda: _interrupted(cell, model)


def _equals_resident(cell: Cell, model: Model) -> None:
    """Compare with all experts resident; the schedule of the offloaded run is proved."""
    everything = SHAPE.layers * SHAPE.experts
    lru = _systems()[0][0]
    resident = run_cell(replace(cell, system=lru, slots=everything, preload=True, prove=True), model)
    assert not any(resident.row["misses"]), "the resident model misses experts"
    offloaded = run_cell(replace(cell, prove=True), model)
    assert any(offloaded.row["misses"]), "nothing was missing"
    _same(resident, offloaded)
    assert len(np.unique(resident.checksums)) > len(resident.checksums) // 2, "all steps give the same output"


def _same(one: Measured, two: Measured) -> None:
    differing = np.flatnonzero(one.checksums != two.checksums)
    assert len(differing) == 0, (
        f"the output differs from step {differing[0]} on, in {len(differing)} of {len(one.checksums)} steps"
    )
    assert (one.chosen == two.chosen).all(), "tokens differ"


def _refuses(model: Model, cell: Cell, sentence: str) -> None:
    before = _allocated()
    try:
        run_cell(cell, model)
    except InputError as error:
        assert sentence in str(error), str(error)
    else:
        raise AssertionError("was not refused")
    assert _allocated() <= before, f"{_allocated() - before} bytes are left allocated"


def _refuses_registration() -> None:
    from real import cuda

    registered: list[int] = []

    def register(address: int, size: int) -> None:
        cuda.register(address, size)
        registered.append(address)
        cuda.register(address, size)  # a second time, which the driver refuses

    def unregister(address: int) -> None:
        cuda.unregister(address)
        registered.remove(address)

    try:
        HostSlab(4, 1 << 20, register, unregister)
    except InputError as error:
        assert "cannot be registered" in str(error), str(error)
    else:
        raise AssertionError("was not refused")
    for address in tuple(registered):
        unregister(address)


def _copy_fails(cell: Cell, model: Model) -> None:
    """Let the driver itself refuse a copy in the middle of a run: its target is no memory of the device."""
    from real.cuda import Cuda

    class Broken(Cuda):
        copies = 0

        def copy(self, target: int, source: int, size: int) -> None:
            self.copies += 1
            super().copy(0 if self.copies == LATE_COPY else target, source, size)

        def calls(self) -> Calls:
            def memcpy(target: int, source: int, size: int, stream: int) -> int:
                self.copies += 1
                return int(self._memcpy(0 if self.copies == LATE_COPY else target, source, size, stream))

            self.kept = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 4)(memcpy)
            return super().calls()._replace(memcpy=ctypes.cast(self.kept, ctypes.c_void_p).value or 0)

    device = Broken()
    with _closing(device):
        before = _allocated()
        try:
            run_cell(cell, model, device)
        except InputError as error:
            assert "copy" in str(error), str(error)
        else:
            raise AssertionError("was not noticed")
        assert _allocated() <= before, f"{_allocated() - before} bytes are left allocated"
    _same(run_cell(cell, model), run_cell(cell, model))


def _interrupted(cell: Cell, model: Model) -> None:
    """Interrupt a run in its thirtieth event; the next run gives what it gave before."""
    before = _allocated()
    expected = run_cell(cell, model)
    record, calls = Device.record, [0]

    def interrupt(self: Device, stream: int) -> int:
        calls[0] += stream == COMPUTE
        if calls[0] == 30:
            raise KeyboardInterrupt
        return record(self, stream)

    Device.record = interrupt  # type: ignore[method-assign]
    try:
        run_cell(cell, model)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the interruption was swallowed")
    finally:
        Device.record = record  # type: ignore[method-assign]
    _same(expected, run_cell(cell, model))
    del expected
    assert _allocated() <= before, f"{_allocated() - before} bytes are left allocated"


@contextmanager
def _closing(device: Device) -> Iterator[None]:
    try:
        yield
    finally:
        device.close()


def _allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _routing() -> Any:
    return synthesize(
        seed=5,
        layers=SHAPE.layers,
        experts=SHAPE.experts,
        top_k=SHAPE.top_k,
        requests=5,
        prefill_tokens=9,
        decode_tokens=12,
        lookahead_depth=2,
        lookahead_width=8,
        router_logits=True,
    )


def _systems() -> list[tuple[dict[str, Any], int]]:
    """Systems that need little and differ much, with their slots: demand only, nothing kept, predicted, known beforehand."""

    def system(name: str, slots: int, **parts: Any) -> tuple[dict[str, Any], int]:
        plain = {
            "predictor": {"_target_": "policies.predictor.none.NoPrediction"},
            "prefetch": {"_target_": "policies.prefetch.none.NoPrefetch"},
            "eviction": {"_target_": "policies.eviction.lru.LRU"},
            "allocation": {"_target_": "policies.allocation.whole_device.WholeDevice"},
            "miss": {"_target_": "policies.miss.wait.Wait"},
        }
        return {"name": name, "drop_unused_prefetches": False, "reupload_after_use": False, **plain, **parts}, slots

    predicted = {
        "predictor": {"_target_": "policies.predictor.cross_layer_gate.CrossLayerGate"},
        "prefetch": {"_target_": "policies.prefetch.top_n.TopN"},
    }
    return [
        system("lru", 12),
        system("transient", 3, allocation={"_target_": "policies.allocation.transient.Transient"}),
        system("next_gate", 14, **predicted),
        (system("next_gate, spoilt by use", 14, **predicted)[0] | {"reupload_after_use": True}, 14),
        system(
            "oracle",
            20,
            predictor={"_target_": "policies.predictor.oracle.Oracle"},
            prefetch=predicted["prefetch"] | {"depth": 3},
        ),
    ]


def _cell(path: Path, system: dict[str, Any], slots: int, order: str, batch: int, phases: str) -> Cell:
    return Cell(
        name=system["name"],
        trace=str(path),
        workload={"order": order, "batch": batch, "phases": phases},
        model=SHAPE._asdict(),
        system=system,
        slots=slots,
        warmup=0,
        steps=14,
        marked=1,
        seed=0,
        layer_ns=100_000,
        transfer_ns=30_000,
        chunk_bytes=SHAPE.expert_bytes // 3,
        window_bytes=SHAPE.expert_bytes,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m real.selftest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where", choices=("cuda", "cpu"), default="cuda")
    where = parser.parse_args(arguments).where
    return ended(lambda: _run_all(where), "the checks that follow did not run")


def _run_all(where: str) -> int:
    check_gpu(where)
    wrong = run(where)
    print(f"self-test: {len(wrong)} checks failed" if wrong else "self-test: all is as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

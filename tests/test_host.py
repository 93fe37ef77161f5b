"""The host thread is put on one CPU and gets its own back, whatever happens."""

import gc
import os

import pytest

from real.host import quickest_cpu, undisturbed

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system does not say on which CPUs a thread may run"
)


def test_inside_there_is_one_cpu_and_no_garbage_collection():
    before = os.sched_getaffinity(0)
    with undisturbed():
        assert len(os.sched_getaffinity(0)) == 1
        assert not gc.isenabled()
    assert os.sched_getaffinity(0) == before
    assert gc.isenabled()


def test_an_exception_gives_everything_back():
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), undisturbed():
        raise RuntimeError
    assert os.sched_getaffinity(0) == before
    assert gc.isenabled()


def test_the_quickest_is_the_one_that_takes_least(monkeypatch):
    monkeypatch.setattr("real.host._busy_ns", {3: 50, 5: 20, 7: 90}.get)
    assert quickest_cpu({3, 5, 7}) == 5

"""What holds for all tests: random cases are the same on every machine, and none fails for being slow once."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("foregate", deadline=None, derandomize=True)
settings.load_profile("foregate")


LONG = (
    "test_plain_model.py",  # compiles the engine, while another worker runs what does not need it
    "test_recorder.py",
    "test_recorder_architectures.py",
    "test_reference_training.py",
    "test_live.py",
    "test_executor.py",  # compiles most policies
    "test_notebooks.py",
    "test_killed.py",
    "test_launchers.py",
    "test_engines_agree.py",
    "test_conformance.py",
)
"""Files that run first, in this order, so that no worker is left alone with one of them at the end, and that workers which
begin at the same time do not all compile the same."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices on several threads wait for one another, and the other core is another worker's."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def little_garbage():
    """Collect garbage in no time: every measured run does, and transformers' modules would be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

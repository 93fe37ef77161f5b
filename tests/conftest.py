"""What holds for all tests: random cases are the same on every machine, and none fails for being slow once."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("foregate", deadline=None, derandomize=True)
settings.load_profile("foregate")


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

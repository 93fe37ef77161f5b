"""What holds for all tests: random cases are the same on every machine, and none fails for being slow once."""

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

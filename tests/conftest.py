"""What holds for all tests: random cases are the same on every machine, and none fails for being slow once."""

from hypothesis import settings

settings.register_profile("foregate", deadline=None, derandomize=True)
settings.load_profile("foregate")

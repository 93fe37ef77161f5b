"""The memory model compiled: the integers of the reference engine, hundreds of times faster."""

from sim.fast.run import PolicyRaised, run_fast

__all__ = ["PolicyRaised", "run_fast"]

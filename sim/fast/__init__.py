"""The memory model compiled: the integers of the reference engine, hundreds of times faster."""

from sim.fast.run import run_fast

__all__ = ["run_fast"]

"""The installed command ``foregate``: `sim.cli`, whose imports take a second in which it may be interrupted, too."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process and return its exit status."""
    try:
        from sim.cli import main as run
    except KeyboardInterrupt:
        print("foregate: interrupted before anything ran", file=sys.stderr)  # noqa: T201
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())

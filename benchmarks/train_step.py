"""Measure a training step against what the libraries do alone, ratios in one run.

Usage: python benchmarks/train_step.py [CASE] [--quick]
"""

import sys
from collections.abc import Callable

import train_compact
import train_loop

CASES: dict[str, Callable[[bool], None]] = {
    "compact": train_compact.run,
    "loop": train_loop.run,
}
"""Name of each case; it gets whether to be quick, and prints a table."""

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--quick"]
    for name in arguments or CASES:
        print(f"\n## {name}")
        CASES[name]("--quick" in sys.argv)

"""Benchmarks of checkpoints and exports, each against its peers in one run.

Run `python benchmarks/checkpoint.py consolidate|merge|save|load [--quick]`.
"""

import argparse
import os
from importlib import import_module

PARTS = {
    "consolidate": "checkpoint_consolidate",
    "merge": "checkpoint_merge",
    "save": "checkpoint_save",
    "load": "checkpoint_load",
}
"""Module of each part; it has `run(quick)`, which prints a table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: to see that it runs")
    arguments = parser.parse_args()
    # Before torch is imported: its thread pool would count as CPU time of whoever comes first.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        import_module(PARTS[part]).run(arguments.quick)


if __name__ == "__main__":
    main()

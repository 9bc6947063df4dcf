"""Benchmarks of the data side, each against its peers in one run.

Run `python benchmarks/data.py pack|read|order|decode [--quick]`.
"""

import argparse
import os
from importlib import import_module

PARTS = {"pack": "data_pack", "read": "data_read", "order": "data_order", "decode": "data_decode"}
"""Module of each part; it has `run(quick)`, which prints a table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: to see that it runs")
    arguments = parser.parse_args()
    # Before numpy and torch are imported: their thread pools would count as CPU time of whoever comes first.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        import_module(PARTS[part]).run(arguments.quick)


if __name__ == "__main__":
    main()

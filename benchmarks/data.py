"""Benchmarks of the data side, each against its peers in one run.

Run `python benchmarks/data.py pack|read|order|decode|all [--quick]`.
"""

from measure import run_parts

PARTS = {"pack": "data_pack", "read": "data_read", "order": "data_order", "decode": "data_decode"}

if __name__ == "__main__":
    run_parts(str(__doc__), PARTS)

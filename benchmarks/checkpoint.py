"""Benchmarks of checkpoints and exports, each against its peers in one run.

Run `python benchmarks/checkpoint.py consolidate|merge|save|load|all [--quick]`.
"""

import os

from measure import run_parts

PARTS = {
    "consolidate": "checkpoint_consolidate",
    "merge": "checkpoint_merge",
    "save": "checkpoint_save",
    "load": "checkpoint_load",
}

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_parts(str(__doc__), PARTS)

"""Measure a training step against what the libraries do alone, ratios in one run.

Run `python benchmarks/train_step.py compact|loop|all [--quick]`.
"""

from measure import run_parts

PARTS = {"compact": "train_compact", "loop": "train_loop"}

if __name__ == "__main__":
    run_parts(str(__doc__), PARTS)

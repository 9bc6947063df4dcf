"""Every optimizer on two real ZeRO ranks does what it does on whole weights in one process, and resumes bit-equal."""

import json
import os
import sys
from pathlib import Path

from wan_dist.parallel.launch import run_ranks

PROGRAM = Path(__file__).with_name("optimizers_program.py")
# Share of the largest movement of a weight that may lie between both. Element-wise optimizers differ by the order in
# which gradients are added up. 8 bits keep moments to about 1 %. Newton-Schulz blows rounding up in the directions in
# which a gradient of 8 samples has next to nothing.
TOLERANCE = {"adamw_8bit": 0.1, "muon": 0.03}


def test_optimizers_are_themselves_on_partitioned_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)]
    assert run_ranks([*command, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    refused = found.pop("adafactor-3-all")
    for case, result in found.items():
        tolerance = TOLERANCE.get(case.split("-")[0], 1e-5)
        assert result["distance"] <= tolerance * result["moved"], (case, result)
        assert result["resumed"], case
    # Each as DeepSpeed cuts it: three calls of `step` for AdamW, one for what counts its steps.
    assert (found["adamw-3-all"]["num_groups"], found["prodigy-3-all"]["num_groups"]) == (3, 1)
    # Flat pieces have no rows and columns to factor: what the configuration refuses is another optimizer.
    assert refused["distance"] > 0.1 * refused["moved"]

"""Weights go into partitions: no rank ever holds more than its part and some buffers, and the file is read once."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from wan_dist.parallel.launch import run_ranks

pytestmark = pytest.mark.proof
PROGRAM = Path(__file__).with_name("load_program.py")
NUM_RANKS = 2
BUFFERS_BYTES = 64 * 2**20


def test_a_rank_adds_its_part_and_reads_the_file_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=128,
        in_channels=48,
        out_channels=48,
        text_dim=1024,
        ffn_dim=4096,
        num_layers=6,
    )
    model.save_pretrained(tmp_path / "model")
    del model
    file_bytes = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert 400e6 < file_bytes < 600e6
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    command += [str(PROGRAM), str(tmp_path / "model"), str(tmp_path / "out")]
    assert run_ranks(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) == 0
    ranks = [json.loads((tmp_path / f"out.rank{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    for dtype, model_bytes in (("fp32", file_bytes), ("bf16", file_bytes / 2)):
        for rank in ranks:
            assert rank[dtype]["added"] <= model_bytes / NUM_RANKS + BUFFERS_BYTES, dtype
        # Rows that a boundary cuts are read by both.
        assert file_bytes * 0.99 <= sum(rank[dtype]["read"] for rank in ranks) <= 1.05 * file_bytes
        assert ranks[0][dtype]["part"] != ranks[1][dtype]["part"]
    assert {ranks[0][dtype]["dtype"] for dtype in ("fp32", "bf16")} == {"torch.float32", "torch.bfloat16"}

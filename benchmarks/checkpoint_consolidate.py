"""ZeRO-3 shards to safetensors: CPU-seconds net of imports and added anonymous memory, against DeepSpeed and cp."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import hardware, interleave, median_ratio, settle, versions
from safetensors.torch import load_file

from wan_dist.core.hashing import sha256_of
from wan_dist.io.safetensors_stream import write_sharded
from wan_dist.io.tensor_stream import of_shards
from wan_dist.io.zero_shards import read_master_weights

TAG = "transformer"
OURS = """import sys, torch
from pathlib import Path
from checkpoint_consolidate import ours
ours(Path(sys.argv[1]), Path(sys.argv[2]), torch.float32)"""
THEIRS = """import sys
from pathlib import Path
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
source = Path(sys.argv[1])
convert(str(source.parent), sys.argv[2], tag=source.name, max_shard_size="1000GB", safe_serialization=True)"""
NUM_RANKS = 2


def run(quick: bool) -> None:
    """Measure and print a table."""
    megabytes, rounds = (96, 1) if quick else (480, 7)
    with tempfile.TemporaryDirectory(prefix="wan-dist-benchmark-") as name:
        root = Path(name)
        source = make_shards(root / "checkpoint" / TAG, megabytes * 10**6 // 4)
        peer = root / "deepspeed"
        contestants: dict[str, Callable[[], object]] = {
            "wan_dist, fp32": lambda: ours(source, root / "ours", torch.float32),
            "wan_dist, bf16": lambda: ours(source, root / "ours-bf16", torch.bfloat16),
            "wan_dist, fp32, the shards' SHA-256 first": lambda: hashed_first(source, root / "hashed"),
            "DeepSpeed zero_to_fp32": lambda: theirs(source, peer),
            "wan_dist, fp32, as a process with its imports": lambda: process(OURS, source, root / "p"),
            "zero_to_fp32, as a process with its imports": lambda: process(THEIRS, source, root / "q"),
            "cp of the result": lambda: shutil.copyfile(peer / "model.safetensors", root / "copy"),
        }
        theirs(source, peer)
        reports = {name: root / f"peak-{number}" for number, name in enumerate(contestants)}
        measured = {name: _measured(work, reports[name]) for name, work in contestants.items()}
        spent = interleave(measured, rounds, prepare=settle)
        peaks = {name: max(map(float, report.read_text().split())) for name, report in reports.items()}
        check_equal(root / "ours" / "weights.safetensors", peer / "model.safetensors")
    print(f"{hardware()}; {versions('torch', 'deepspeed', 'safetensors')}")
    print(
        f"{NUM_RANKS} ranks, {megabytes} MB of fp32 masters, {3 * megabytes} MB with Adam's moments; median of {rounds}"
    )
    print("| contestant | CPU-s | of zero_to_fp32's | of cp's | added anonymous memory, MiB |")
    print("|---|---|---|---|---|")
    cpu = {name: [s.cpu_s for s in values] for name, values in spent.items()}
    for name, values in cpu.items():
        deepspeed = median_ratio(values, cpu["DeepSpeed zero_to_fp32"])
        copied = median_ratio(values, cpu["cp of the result"])
        print(
            f"| {name} | {statistics.median(values):.2f} | {deepspeed:.2f}x | {copied:.2f}x | {peaks[name]:.0f} |",
            flush=True,
        )


def make_shards(folder: Path, count: int) -> Path:
    """Write the shards of a model of `count` parameters as ZeRO-3 does, moments included."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    width = 1024
    shapes = {f"blocks.{number}.weight": torch.Size((width, width)) for number in range(count // width**2)}
    size = sum(shape.numel() // NUM_RANKS for shape in shapes.values())
    for rank in range(NUM_RANKS):
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [shapes],
            "shared_params": {},
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "ds_version": "0.19.8",
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = torch.randn(size, generator=generator)
        state = {
            "zero_stage": 3,
            "partition_count": NUM_RANKS,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": [{"exp_avg": flat * 0.1, "exp_avg_sq": flat**2}]},
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)
    return folder


def ours(source: Path, out: Path, dtype: torch.dtype) -> None:
    out.mkdir(exist_ok=True)
    tensors = {name: of_shards(tensor) for name, tensor in read_master_weights(source).items()}
    write_sharded(
        out,
        "weights",
        tensors,
        dtype=dtype,
        max_shard_bytes=10**12,
        metadata={"format": "pt"},
        on_bytes=lambda _: None,
    )


def process(program: str, source: Path, out: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", program, str(source), str(out)]
    subprocess.run(words, check=True, capture_output=True, env=environment)


def theirs(source: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        convert_zero_checkpoint_to_fp32_state_dict(
            str(source.parent), str(out), tag=source.name, max_shard_size="1000GB", safe_serialization=True
        )


def hashed_first(source: Path, out: Path) -> None:
    for path in source.iterdir():
        sha256_of(path)
    ours(source, out, torch.float32)


def check_equal(path: Path, other: Path) -> None:
    found, wanted = load_file(path), load_file(other)
    if set(found) != set(wanted) or not all(torch.equal(found[name], tensor) for name, tensor in wanted.items()):
        raise SystemExit("the contestants wrote different weights")


def _measured(work: Callable[[], object], report: Path) -> Callable[[], object]:
    """Return the work with the peak of its added anonymous memory written to a file; it runs in a forked process."""

    def watched() -> None:
        before, peak, done = _anonymous_mib(), [0.0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], _anonymous_mib() - before)
                time.sleep(0.01)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            work()
        finally:
            done.set()
            thread.join()
        with report.open("a") as handle:
            handle.write(f"{peak[0]}\n")

    return watched


def _anonymous_mib() -> float:
    """Return this process's anonymous memory; that of processes it starts is not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

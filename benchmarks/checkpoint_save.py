"""What a save costs training: its stall against DeepSpeed's own synchronous save, and how much it slows the steps."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import hardware, median_ratio, versions

WIDTH = 1024


def run(quick: bool) -> None:
    """Start two ranks, then one, which leaves a core to the writer; rank 0 prints the tables."""
    print(f"{hardware()}; {versions('torch', 'deepspeed')}", flush=True)
    for num_ranks in (2, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        with tempfile.TemporaryDirectory(prefix="wan-dist-benchmark-") as name:
            subprocess.run([*command, str(Path(__file__)), name, *(["--quick"] if quick else [])], check=True)


def _rank(root: Path, quick: bool) -> None:
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    import torch

    from wan_dist.io.saving import Saver
    from wan_dist.parallel import dist

    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=600)
    num_layers, rounds = (8, 2) if quick else (48, 9)
    step, engine = _engine(ranks, num_layers)
    step()  # the optimizer makes its moments
    size = 12 * num_layers * WIDTH**2 // ranks.world_size
    state, copy = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    saver = Saver(root / "ours", ranks.device, asynchronous=True, keep_last=1)

    def ours() -> None:
        saver.start({"model": engine}, 1, {"epoch": 0}, zero_stage=3, exclude_frozen=False)

    contestants: dict[str, Callable[[], object]] = {
        "one memcpy of this rank's state": lambda: copy.copy_(state),
        "DeepSpeed save_checkpoint, not synced": lambda: engine.save_checkpoint(str(root / "theirs"), tag="model"),
        "DeepSpeed save_checkpoint, then sync": lambda: _synced(engine, root / "theirs"),
        "wan_dist, until training goes on": ours,
    }
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    total: list[float] = []
    for number in range(rounds + 1):
        for name, work in contestants.items():
            if ranks.is_main:
                shutil.rmtree(root / "theirs", ignore_errors=True)
                os.sync()
            dist.barrier()
            started = time.perf_counter()
            work()
            stall_s = dist.max_over_ranks(time.perf_counter() - started, ranks)
            if saver.busy:
                _committed(saver.wait())
                total += [time.perf_counter() - started] if number else []
            spent[name] += [stall_s] if number else []
    idle, writing = _steps(step, ours, saver, ranks, rounds)
    saver.close()
    if ranks.is_main:
        print(f"{ranks.world_size} rank(s), {size / 1e6:.0f} MB of masters and moments each; median of {rounds}")
        _print(spent)
        print(f"wan_dist, until it is on disk, read back and committed: {statistics.median(total):.2f} s")
        slower = statistics.median(writing) / statistics.median(idle)
        print(f"a step while the writer writes: {statistics.median(writing):.3f} s, {slower:.2f}x of one without")
    dist.barrier()
    dist.stop()


def _engine(ranks: Any, num_layers: int) -> tuple[Callable[[], object], Any]:
    """Return a function that trains one step, and its engine."""
    import deepspeed
    import torch

    from wan_dist.parallel.ds_config import deepspeed_config

    settings = deepspeed_config(
        micro_batch_size=1,
        world_size=ranks.world_size,
        dtype="bf16",
        max_grad_norm=1.0,
        zero_stage=3,
    )
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    batch = torch.randn(64, WIDTH, device=ranks.device, dtype=torch.bfloat16)

    def step() -> None:
        engine.backward(engine(batch).float().square().mean())
        engine.step()

    return step, engine


def _steps(
    step: Callable[[], object], save: Callable[[], object], saver: Any, ranks: Any, rounds: int
) -> tuple[list[float], list[float]]:
    """Return seconds of steps without a save, and of those taken while one is written."""
    from wan_dist.parallel import dist

    def timed() -> float:
        started = time.perf_counter()
        step()
        return dist.max_over_ranks(time.perf_counter() - started, ranks)

    idle, writing = [], []
    for _ in range(rounds):
        idle += [timed() for _ in range(4)]
        save()
        outcome = None
        while outcome is None:
            writing.append(timed())
            outcome = saver.poll()
        _committed(outcome)
    return idle, writing


def _synced(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="model")
    os.sync()


def _committed(outcome: Any) -> None:
    if outcome.problem:
        raise SystemExit(outcome.problem)


def _print(spent: dict[str, list[float]]) -> None:
    memcpy, theirs, *_ = spent.values()
    print("| contestant | s that training waits | of a memcpy | of DeepSpeed's |\n|---|---|---|---|")
    for name, seconds in spent.items():
        ratios = [median_ratio(seconds, other) for other in (memcpy, theirs)]
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratios[0]:.2f}x | {ratios[1]:.3f}x |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _rank(Path(sys.argv[1]), "--quick" in sys.argv)

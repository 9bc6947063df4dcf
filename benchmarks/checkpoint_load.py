"""A model into ZeRO-3's partitions: memory and file pages per rank, against `from_pretrained` on every rank."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import hardware, median_ratio, versions

CONTESTANTS = {
    "ours": "wan_dist, slices into partitions",
    "theirs": "from_pretrained, then zero.Init of the module",
}


def run(quick: bool) -> None:
    """Measure in fresh ranks each time and print a table."""
    num_layers, rounds = (1, 1) if quick else (4, 5)
    print(f"{hardware()}; {versions('torch', 'deepspeed', 'diffusers')}", flush=True)
    with tempfile.TemporaryDirectory(prefix="wan-dist-benchmark-") as name:
        root = Path(name)
        size = _make_model(root / "transformer", num_layers)
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in CONTESTANTS}
        for _ in range(rounds):
            for kind, results in found.items():
                results.append(_measured(kind, root, num_ranks=2))
    print(f"model of {size / 2**20:.0f} MiB in bf16, 2 ranks, files in the page cache; median of {rounds}")
    print("| contestant | s | of ours | added anonymous memory per rank, MiB, peak | after | file pages read, MiB |")
    print("|---|---|---|---|---|---|")
    for kind, results in found.items():
        seconds, ours = ([r["seconds"] for r in rows] for rows in (results, found["ours"]))
        cells = [f"{max(r[key] for r in results):.0f}" for key in ("peak", "after", "pages")]
        ratio = median_ratio(seconds, ours)
        print(f"| {CONTESTANTS[kind]} | {statistics.median(seconds):.2f} | {ratio:.2f}x | {' | '.join(cells)} |")


def _make_model(folder: Path, num_layers: int) -> int:
    """Write blocks as wide as ti2v-5B's in bf16; return their bytes.

    Of narrower ones the C library would keep what is freed, which is then no memory of theirs.
    """
    import torch

    from wan_dist.models.wan.transformer import empty_transformer

    shape = {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": num_layers}
    model: Any = empty_transformer(
        {"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48, **shape}
    )
    model = model.to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _measured(kind: str, root: Path, num_ranks: int) -> dict[str, float]:
    """Return the slowest and largest of the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"}
    subprocess.run([*command, str(Path(__file__)), kind, str(root)], check=True, env=environment)
    rows = [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    return {key: max(row[key] for row in rows) for key in rows[0]}


def _rank(kind: str, root: Path) -> None:
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    import deepspeed
    import torch
    from diffusers import WanTransformer3DModel

    from wan_dist.models.wan.transformer import empty_transformer
    from wan_dist.parallel import dist
    from wan_dist.parallel.load import build_model, fill

    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=600)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    folder = root / "transformer"
    config = json.loads((folder / "config.json").read_text())
    # What the first use imports and sets up is not what is measured.
    tiny = config | {"num_attention_heads": 1, "ffn_dim": 8, "num_layers": 1}
    build_model(lambda: empty_transformer(tiny), settings, torch.bfloat16)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        torch.nn.Linear(8, 8)

    def load() -> Any:
        if kind == "ours":
            model = build_model(lambda: empty_transformer(config), settings, torch.bfloat16)
            fill(model, folder)
            return model
        model: Any = WanTransformer3DModel.from_pretrained(str(folder), dtype=torch.bfloat16)
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        return model

    dist.barrier()
    before, peak, done = _status("RssAnon"), [0.0], threading.Event()
    pages = _status("RssFile")
    most = [0.0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _status("RssAnon") - before)
            most[0] = max(most[0], _status("RssFile") - pages)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    model = load()
    dist.barrier()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    row = {"seconds": seconds, "peak": peak[0], "after": _status("RssAnon") - before, "pages": most[0]}
    (root / f"rank-{ranks.rank}.json").write_text(json.dumps(row))
    del model
    dist.barrier()
    dist.stop()


def _status(field: str) -> float:
    """Return a line of this process's status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _rank(sys.argv[1], Path(sys.argv[2]))

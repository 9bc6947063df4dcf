"""What a training config makes of shards, before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_dist.config.load import load_config
from wan_dist.core.buckets import REASONS as BUCKET_REASONS
from wan_dist.core.words import counted
from wan_dist.data.timing import REASONS as TIMING_REASONS
from wan_dist.train.build_data import open_dataset, sample_order

_EPOCHS_SHOWN = 4


def plan_report(config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return buckets, drops, blocks per epoch and the world sizes that divide the batch, as JSON values."""
    cfg = load_config(config, overrides)
    dataset = open_dataset(cfg)
    order = sample_order(cfg, dataset)
    batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
    buckets = [
        {"width": b.width, "height": b.height, "num_frames": b.num_frames, "clips": int(n), "samples_per_epoch": per}
        for b, n, per in zip(dataset.buckets, dataset.counts.sum(0), order.samples_per_epoch(), strict=True)
    ]
    dataset.close()
    return {
        "clips": dataset.num_clips,
        "used": int(dataset.counts.sum()),
        "buckets": buckets,
        "drops": dataset.drops,
        "tail": cfg.data.tail,
        "steps_per_epoch": [order.blocks_per_epoch(epoch) for epoch in range(_EPOCHS_SHOWN)],
        "global_batch_size": batch,
        "world_sizes": [n for n in range(1, batch // micro + 1) if batch % (micro * n) == 0],
    }


def describe_plan(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"{report['used']} of {counted(report['clips'], 'clip')} used"]
    lines.append(f"{'bucket px':>11} {'frames':>7} {'clips':>8} {'per epoch':>10}")
    for b in report["buckets"]:
        size = f"{b['width']}x{b['height']}"
        note = "  fewer than a batch" if 0 < b["samples_per_epoch"] < report["global_batch_size"] else ""
        lines.append(f"{size:>11} {b['num_frames']:>7} {b['clips']:>8} {b['samples_per_epoch']:>10.6g}{note}")
    reasons = {**BUCKET_REASONS, **TIMING_REASONS}
    lines += [f"left out, {why}: {count} ({reasons[why]})" for why, count in sorted(report["drops"].items())]
    steps = ", ".join(map(str, report["steps_per_epoch"]))
    lines.append(f"steps in epochs 0 to {_EPOCHS_SHOWN - 1}: {steps} (tail: {report['tail']})")
    lines.append(
        f"global batch {report['global_batch_size']}: runs on {', '.join(map(str, report['world_sizes']))} ranks"
    )
    return "\n".join(lines)

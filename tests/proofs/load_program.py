"""One rank: loads a transformer into ZeRO-3 partitions and writes what that took, for `test_load.py`.

Usage: load_program.py FOLDER OUT
"""

import gc
import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from wan_dist.models.wan.transformer import empty_transformer
from wan_dist.parallel.environment import prepare_environment


class Peak:
    """The most anonymous memory of this process while it runs, sampled every millisecond."""

    def __init__(self) -> None:
        gc.collect()
        self.before_bytes = self.highest_bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.highest_bytes = max(self.highest_bytes, anonymous_bytes())
            time.sleep(0.001)

    def added_bytes(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self.highest_bytes, anonymous_bytes()) - self.before_bytes


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class CountedSlices:
    """A safetensors file that counts the bytes of the tensors' parts it hands out."""

    def __init__(self, handle: Any, counts: dict[str, int]) -> None:
        self._handle, self._counts = handle, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def get_slice(self, name: str) -> Any:
        source, counts = self._handle.get_slice(name), self._counts

        class Counted:
            def get_shape(self) -> list[int]:
                return source.get_shape()

            def __getitem__(self, key: Any) -> torch.Tensor:
                part = source[key]
                counts["bytes"] += part.nbytes
                return part

        return Counted()


def main(folder: str, out: str) -> None:
    prepare_environment()
    import contextlib

    from wan_dist.parallel import dist, load
    from wan_dist.parallel.ds_config import deepspeed_config

    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=300)
    config = json.loads((Path(folder) / "config.json").read_text())
    counts = {"bytes": 0}

    @contextlib.contextmanager
    def opened(path: Path) -> Any:
        with safe_open(path, framework="pt") as handle:
            yield CountedSlices(handle, counts)

    load._open = opened  # type: ignore[assignment]
    # What the libraries take once they are imported is not what loading adds.
    with torch.device("meta"):
        empty_transformer(config)
    importlib.import_module("torch._dynamo")
    results = {}
    for dtype in ("fp32", "bf16"):
        settings = deepspeed_config(
            micro_batch_size=1,
            world_size=ranks.world_size,
            dtype=dtype,  # type: ignore[arg-type]
            max_grad_norm=1.0,
            zero_stage=3,
        )
        counts["bytes"] = 0
        dist.barrier()
        peak = Peak()
        wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = load.build_model(lambda: empty_transformer(config), settings, wanted)
        load.fill(model, Path(folder))
        added = peak.added_bytes()
        first: Any = next(model.parameters())
        results[dtype] = {"added": added, "read": counts["bytes"], "part": first.ds_tensor.float().sum().item()}
        results[dtype]["dtype"] = str(first.ds_tensor.dtype)
        del model, first
        dist.barrier()
    Path(f"{out}.rank{ranks.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[-2:])

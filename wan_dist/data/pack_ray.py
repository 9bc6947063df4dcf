"""Write shards on a Ray cluster: the same tasks and the same bytes as on one machine."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_dist.core.errors import ConfigError, DataError, WanDistError
from wan_dist.data.pack_local import run_local
from wan_dist.data.pack_shard import ShardTask
from wan_dist.data.pack_state import DoneShard


def run_ray(
    tasks: Sequence[ShardTask], num_workers: int, on_clip: Callable[[int, list[str]], None]
) -> Iterator[DoneShard]:
    """Yield shards as they are finished. Source and output folders must be at the same path on every node.

    Uses the cluster at `RAY_ADDRESS`, or starts one on this machine with `num_workers` CPUs.

    Args:
        tasks: the shards to write.
        num_workers: shards written at the same time where a cluster has to be started.
        on_clip: called for every source of a finished shard with its size in bytes and the codes of its rejects.
    Raises:
        ConfigError: Ray is not installed or its cluster is not reached.
        DataError: a shard could not be written.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError as error:
        raise ConfigError(f"--executor ray needs Ray ({error}): pip install 'wan_dist[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        _start(ray, num_workers)
    try:
        write = ray.remote(num_cpus=1)(_write)
        # Workers do not start in this folder.
        waiting = {write.remote(_absolute(task)): task for task in tasks}
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(finished[0])
            try:
                shard = ray.get(finished[0])
            except RayTaskError as error:
                if isinstance(error.cause, WanDistError):
                    raise DataError(str(error.cause)) from None
                raise
            _report(task, shard, on_clip)
            yield shard
    finally:
        if started:
            ray.shutdown()


def _write(task: ShardTask) -> DoneShard:
    return next(iter(run_local([task], 1, lambda *_: None)))


def _absolute(task: ShardTask) -> ShardTask:
    return replace(task, source_dir=task.source_dir.absolute(), out_dir=task.out_dir.absolute())


def _report(task: ShardTask, shard: DoneShard, on_clip: Callable[[int, list[str]], None]) -> None:
    codes = [reject.code for reject in shard.rejects]
    for number, clip in enumerate(task.clips):
        on_clip(clip.source.num_bytes, codes if number == 0 else [])


def _start(ray: Any, num_workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    # Nodes need this package; where it is a checkout, its folder is on a file system that they share.
    root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": num_workers, "include_dashboard": False}
    try:
        ray.init(
            **options, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": search_path}}
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        place = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray cluster"
        raise ConfigError(f"--executor ray: {place} does not answer: {error}") from error

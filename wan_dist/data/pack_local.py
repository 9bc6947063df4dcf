"""Write shards on this machine, several at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue

from wan_dist.data.pack_shard import ShardTask, Stopped, pack_shard
from wan_dist.data.pack_state import DoneShard
from wan_dist.data.probe_worker import Prober


def run_local(
    tasks: Sequence[ShardTask], num_workers: int, on_clip: Callable[[int, list[str]], None]
) -> Iterator[DoneShard]:
    """Yield shards as they are finished.

    Threads write and hash (both without the interpreter lock); what can crash, FFmpeg, runs in a process per thread.

    Args:
        tasks: the shards to write.
        num_workers: shards written at the same time.
        on_clip: called after every source with its size in bytes and the codes of its rejects, from several threads.
    """
    stopping = threading.Event()

    def report(num_bytes: int, codes: list[str]) -> None:
        on_clip(num_bytes, codes)
        if stopping.is_set():
            raise Stopped

    def write(task: ShardTask) -> DoneShard:
        prober = idle.get()
        try:
            return pack_shard(task, prober, report)
        finally:
            idle.put(prober)

    with ExitStack() as stack:
        idle: SimpleQueue[Prober] = SimpleQueue()
        for _ in range(num_workers):
            idle.put(stack.enter_context(Prober()))
        pool = stack.enter_context(ThreadPoolExecutor(num_workers, "pack"))
        try:
            for future in as_completed([pool.submit(write, task) for task in tasks]):
                yield future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise

"""Starts ranks of `wan-dist train` by forking, so that a proof may start fifty jobs: the imports are paid once.

Usage: rank_server.py; reads {"ranks": N, "words": [...], "log": PATH} per line, and answers {"pids": [...]} at once and
{"statuses": [...]} when all ranks have ended.
"""

import json
import os
import signal
import socket
import sys
import time

# What the launcher does to the ranks that are left when one has failed.
REST_ENDS_AFTER_S = 5.0


def become_rank(rank: int, num_ranks: int, port: int, words: list[str], log: str) -> None:
    """Run `wan-dist train` in this process and end it."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["wan-dist", "train", *words]
    code = 1
    try:
        from wan_dist.__main__ import main as command

        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_job(job: dict[str, object]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    num_ranks, words, log = int(str(job["ranks"])), list(map(str, job["words"])), str(job["log"])  # type: ignore[call-overload]
    pids = []
    for rank in range(num_ranks):
        pid = os.fork()
        if not pid:
            become_rank(rank, num_ranks, port, words, log)
        pids.append(pid)
    print(json.dumps({"pids": pids}), flush=True)
    statuses: dict[int, int] = {}
    failed_at = None
    while len(statuses) < num_ranks:
        for pid in set(pids) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                failed_at = failed_at or (time.monotonic() if statuses[pid] else None)
        if failed_at and time.monotonic() - failed_at > REST_ENDS_AFTER_S:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    print(json.dumps({"statuses": [statuses[pid] for pid in pids]}), flush=True)


def main() -> None:
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    import deepspeed  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import torch
    import transformers

    import wan_dist.train.build  # noqa: F401

    torch.set_num_threads(1)
    # Both load their classes when they are first asked for.
    _ = diffusers.AutoencoderKLWan, diffusers.WanTransformer3DModel, transformers.UMT5EncoderModel
    for line in sys.stdin:
        run_job(json.loads(line))


if __name__ == "__main__":
    main()

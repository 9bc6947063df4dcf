"""The ranks of a job: who this process is, start, agreement, end."""

import datetime
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank: number of this process, 0 is the one that reports.
        world_size: number of processes.
        local_rank: number of this process on its machine, which picks the accelerator.
        device: where this rank computes.
        sequence_size: neighbouring ranks that share the tokens of the same samples.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of this rank's group among those that see different samples."""
        return self.rank // self.sequence_size

    @property
    def data_world_size(self) -> int:
        """Number of groups that see different samples."""
        return self.world_size // self.sequence_size


def ranks_from_environment() -> Ranks:
    """Return this process's place as deepspeed, torchrun or `wan-dist launch` announced it; alone without them."""
    if "RANK" not in os.environ:
        _announce_single_rank()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, device)


def _announce_single_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def start(ranks: Ranks, *, timeout_s: float) -> None:
    """Connect the ranks; collective.

    Args:
        ranks: this process's place.
        timeout_s: seconds after which a collective that some rank never joins fails on the others.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if "OMP_NUM_THREADS" not in os.environ:
        # The ranks of a machine share its cores; the number of threads also decides the last digits on a CPU.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max((os.cpu_count() or 1) // local_size, 1))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    else:
        # DeepSpeed's CPU backend compiles a shared-memory all-reduce at start-up, about 40 s on two cores and a hard
        # dependency on a C++ compiler; marked incompatible, it uses gloo, as it does on other systems than Linux.
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        verbose=False,
    )


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return whether `flag` is true on at least one rank; collective, the same answer everywhere."""
    return max_over_ranks(float(flag), ranks) > 0


def max_over_ranks(value: float, ranks: Ranks) -> float:
    """Return the largest `value` of all ranks; collective."""
    return _reduce(value, ranks, torch.distributed.ReduceOp.MAX)


def mean_over_ranks(value: float, ranks: Ranks) -> float:
    """Return the mean `value` of all ranks; collective."""
    return _reduce(value, ranks, torch.distributed.ReduceOp.SUM) / ranks.world_size


def from_main(value: Any, ranks: Ranks) -> Any:
    """Return rank 0's picklable `value` on every rank; collective."""
    values = [value if ranks.is_main else None]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _reduce(value: float, ranks: Ranks, op: torch.distributed.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    torch.distributed.all_reduce(tensor, op=op)
    return float(tensor.item())


def barrier() -> None:
    """Wait until every rank is here; collective."""
    torch.distributed.barrier()


def stop() -> None:
    """Leave the job; safe to call twice."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

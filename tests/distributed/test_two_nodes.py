"""`launch/hostfile.sh` without ssh: two nodes of one rank each, both on this machine."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.distributed.conftest import Job, Material, read_rows
from tests.processes import BIN

SCRIPT = Path(__file__).parents[2] / "launch" / "hostfile.sh"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.proof
def test_two_nodes_train_as_two_ranks_of_one(material: Material, straight: Job) -> None:
    hostfile = material.folder / "hostfile"
    hostfile.write_text("# two nodes\nnode0 slots=1\n\nnode1 slots=1\n")
    config = material.config("two-nodes")
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "NO_SSH": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    nodes = [
        subprocess.Popen(
            [str(SCRIPT), str(hostfile), str(config), "train.num_steps=2"],
            env={**environment, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output)
    ours = [row["loss"] for row in read_rows(material.run_dir("two-nodes"))]
    assert ours == [row["loss"] for row in straight.rows()[:2]]

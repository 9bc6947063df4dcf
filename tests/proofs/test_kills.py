"""Twenty kills at random moments cost nothing but time."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.proofs.runs import Ranks, checkpoint_of, losses, state_of, unequal, workshop

pytestmark = pytest.mark.proof
NUM_KILLS, NUM_STEPS = 20, 60
VICTIMS = ("rank 0", "rank 1", "writer of rank 0", "writer of rank 1")


def alive(ranks: Ranks) -> bool:
    return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" for pid in ranks.pids)


def strike(ranks: Ranks, rng: random.Random) -> str | None:
    """Kill a rank or its writer a random moment after a random step of this job; return which, None if it had ended."""
    wanted = ranks.steps_done() + rng.randint(1, 3)
    try:
        while ranks.steps_done() < wanted:
            if not alive(ranks):
                return None
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        victim = rng.choice(VICTIMS)
        rank = int(victim[-1])
        writer = ranks.writer_of(rank) if victim.startswith("writer") else None
        os.kill(writer or ranks.pids[rank], signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return victim if writer else f"rank {rank}"


def test_twenty_kills_end_in_the_weights_of_the_run_that_nobody_killed(tmp_path: Path) -> None:
    rng = random.Random(20)
    sections = {
        "train": {"num_steps": NUM_STEPS, "ema_decay": 0.9},
        "checkpoint": {"save_every": 2, "keep_last": 2},
    }
    with workshop(tmp_path) as shop:
        clean, killed = shop.config("clean", **sections), shop.config("killed", **sections)
        shop.train(clean)
        victims: list[str] = []
        statuses = [-1]
        while any(statuses):
            ranks = shop.start(killed)
            while len(victims) < NUM_KILLS and (victim := strike(ranks, rng)):
                victims.append(victim)
                if victim.startswith("rank"):
                    break
            statuses = ranks.wait()
            assert statuses == [0, 0] or -signal.SIGKILL in statuses, ranks.log.read_text()
    assert len(victims) == NUM_KILLS
    assert set(victims) == set(VICTIMS)
    runs = [shop.run_dir(name) for name in ("clean", "killed")]
    first, second = (losses(run) for run in runs)
    assert first == second
    assert not unequal(*(state_of(checkpoint_of(run, NUM_STEPS)) for run in runs))
    left = sorted(path.name for path in (runs[1] / "checkpoints").iterdir())
    assert left == ["latest", "step-00000058", "step-00000060"]

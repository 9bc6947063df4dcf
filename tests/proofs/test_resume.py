"""A run that was ended and continued is the run that was never ended, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_cli
from tests.proofs.runs import Workshop, checkpoint_of, losses, state_of, unequal, weights_of, workshop

pytestmark = pytest.mark.proof
STEPS, STOPPED_AT = 4, 2

# Per case: what differs from full training of a ti2v-5B under ZeRO-3, and what changes when it is resumed.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "accumulation and average": ({"train": {"global_batch_size": 4, "ema_decay": 0.9}}, []),
    "offload, average left off": (
        {"parallel": {"offload_optimizer": "cpu", "offload_param": "cpu"}, "train": {"ema_decay": 0.9}},
        ["train.ema_decay=0"],
    ),
    # Dropout draws from the ranks' own random states.
    "LoRA with dropout, average begun": (
        {"method": {"kind": "lora", "rank": 4, "dropout": 0.2}},
        ["train.ema_decay=0.9"],
    ),
    "both experts": (
        {"variant": "t2v-A14B", "model": {"expert": "both"}, "train": {"ema_decay": 0.9, "seed": 1}},
        [],
    ),
    "ZeRO-2": ({"parallel": {"zero_stage": 2}, "train": {"ema_decay": 0.9}}, []),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with workshop(tmp_path_factory.mktemp("resume")) as opened:
        yield opened


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_straight_run(shop: Workshop, name: str) -> None:
    sections, changes = CASES[name]
    config = shop.config(name, **sections)
    shop.train(config)
    straight, resumed = shop.run_dir(name), shop.as_stopped(name, STOPPED_AT, f"{name}, resumed")
    log = shop.train(config, f"run_dir={resumed}", *changes)
    assert f"resumed from {resumed / 'checkpoints' / 'step-00000002'}" in log.replace("\n", "")
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == STEPS
    first, second = (state_of(checkpoint_of(run, STEPS)) for run in (straight, resumed))
    trained = [key for key in first if not key.endswith("|average")]
    assert not unequal({key: first[key] for key in trained}, {key: second[key] for key in trained})
    if not changes:
        assert not unequal(first, second)
    start = weights_of(checkpoint_of(straight, STOPPED_AT))
    assert unequal(start, weights_of(checkpoint_of(straight, STEPS)))
    if "begun" in name:
        assert "holds no running average of transformer" in " ".join(log.split())
        assert_average(resumed, STOPPED_AT, "transformer", start)
    elif name != "both experts":
        assert_average(straight, 1, "transformer", weights_of(checkpoint_of(straight, 1), average=True))


def assert_average(run: Path, step: int, component: str, average: dict[str, torch.Tensor]) -> None:
    """Assert that the averages saved after `step`, where it was `average`, are those of the weights saved with them."""
    for number in range(step + 1, STEPS + 1):
        checkpoint = checkpoint_of(run, number)
        if not any("ema-" in file for file in checkpoint.files):
            return
        decay = min(0.9, (1 + number) / (10 + number))
        weights = weights_of(checkpoint)
        average = {name: average[name].lerp(weights[name], 1.0 - decay) for name in weights}
        assert not unequal(average, weights_of(checkpoint, average=True))
        assert unequal(average, weights)


def test_the_average_of_a_resumed_run_is_exported(shop: Workshop) -> None:
    run, out = shop.run_dir("accumulation and average, resumed"), shop.folder / "exported"
    done = run_cli("consolidate", run, out, "--ema", "--dtype", "fp32")
    assert done.status == 0, done.stderr
    exported = {f"transformer/{name}": tensor for name, tensor in _files_of(out / "transformer").items()}
    assert not unequal(exported, weights_of(checkpoint_of(run, STEPS), average=True))
    refused = run_cli("consolidate", shop.run_dir("offload, average left off, resumed"), out, "--ema")
    assert (refused.status, "this run kept no average" in refused.stderr) == (1, True)


def _files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_other_numbers_of_ranks_go_on_with_the_same_samples_and_state(shop: Workshop) -> None:
    """2 ranks, then 1 without offloading, then 3, against 2 all the way: equal but for the order of summation."""
    config = shop.config(
        "elastic",
        model={"dtype": "fp32"},
        optim={"schedule": "constant"},
        train={"num_steps": 6, "global_batch_size": 6, "ema_decay": 0.9},
        parallel={"offload_optimizer": "cpu"},
        checkpoint={"save_every": 2},
    )
    shop.train(config)
    straight, elastic = shop.run_dir("elastic"), shop.as_stopped("elastic", 2, "elastic, resumed")
    log = shop.train(config, f"run_dir={elastic}", "train.num_steps=4", "parallel.offload_optimizer=none", num_ranks=1)
    assert "cutting the shards of 2 ranks anew for 1" in " ".join(log.split())
    log = shop.train(config, f"run_dir={elastic}", num_ranks=3)
    assert "cutting the shards of 1 ranks anew for 3" in " ".join(log.split())
    assert [checkpoint_of(elastic, step).world_size for step in (2, 4, 6)] == [2, 1, 3]
    before, after = losses(straight), losses(elastic)
    assert set(after) == set(range(1, 7))
    # fp32: other sums round otherwise; another sample or another noise would change the second digit.
    assert after == pytest.approx(before, rel=1e-5)
    first, second = (state_of(checkpoint_of(run, 6)) for run in (straight, elastic))
    assert set(first) == set(second)
    started = state_of(checkpoint_of(straight, 2))
    for name, value in first.items():
        moved = float((value - started[name]).norm())
        # Adam divides by what may be next to nothing, where rounding decides.
        assert float((value - second[name]).norm()) <= 0.02 * moved, name

"""What is saved from every ZeRO stage reads back bit for bit: by us, by DeepSpeed, and into another number of ranks."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.layouts_program import CASES
from tests.processes import run_program

pytestmark = pytest.mark.proof

PROGRAM = Path(__file__).with_name("layouts_program.py")
# DeepSpeed's optimizer for bf16 with fp32 accumulation under ZeRO-1 does not name its stage, and ZeRO-0 has no shards.
EXPORTED = [name for name in CASES if name not in ("zero1", "zero0")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained three steps on two ranks and saved; what was live, and what came next, beside it.

    Resumed on one, two and three ranks; the program compares weights and moments with what was live.
    """
    folder = tmp_path_factory.mktemp("layouts")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(PROGRAM.parents[2])}
    done = run_program([sys.executable, PROGRAM, folder], timeout_s=400, env=environment)
    assert done.status == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_reading_equals_deepspeeds_own_export(saved: Path, name: str) -> None:
    ours, theirs = load_file(saved / f"{name}.ours.safetensors"), load_file(saved / f"{name}.theirs.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


def test_reading_what_deepspeed_cannot_export_equals_the_live_weights(saved: Path) -> None:
    assert not (saved / "zero1.theirs.safetensors").exists()
    ours, live = load_file(saved / "zero1.ours.safetensors"), load_file(saved / "zero1.safetensors")
    masters = {name: value for name, value in live.items() if "|" not in name and name != "step"}
    assert set(masters) | {"offset"} == set(ours)
    assert all(torch.equal(ours[name].reshape(-1), value) for name, value in masters.items())


@pytest.mark.parametrize("name", CASES)
def test_the_same_ranks_go_on_bit_for_bit(saved: Path, name: str) -> None:
    went_on = json.loads((saved / f"{name}.json").read_text())
    for line in (saved / f"{name}.resumed-2.jsonl").read_text().splitlines():
        assert json.loads(line) == went_on


@pytest.mark.parametrize("name", [name for name in CASES if name != "zero3-factored"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_other_ranks_go_on_from_the_same_weights(saved: Path, name: str, num_ranks: int) -> None:
    # Weights and moments were compared bit for bit in there. The first loss is theirs; the next ones differ by the
    # order in which gradients are added.
    first, _ = json.loads((saved / f"{name}.json").read_text())
    for line in (saved / f"{name}.resumed-{num_ranks}.jsonl").read_text().splitlines():
        assert json.loads(line)[0] == first


def test_a_state_that_cannot_be_cut_anew_is_refused(saved: Path) -> None:
    # The program expects the refusal with 1 and 3 ranks, and goes on with 2.
    assert (saved / "zero3-factored.resumed-2.jsonl").exists()
    assert not (saved / "zero3-factored.resumed-1.jsonl").exists()

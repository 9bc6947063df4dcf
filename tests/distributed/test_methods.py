"""What is trained, what is not, and that memory options, ZeRO stages and ranks change how and not what.

Every case runs inside one start of two ranks (a second one has a single rank): starting costs more than training.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.methods_program import NO_LEAF_MODULES
from tests.jobs import pack_clips, write_config
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.parallel.launch import run_ranks

pytestmark = pytest.mark.proof

PROGRAM = Path(__file__).with_name("methods_program.py")
LORA = ["method={kind: lora, rank: 4, alpha: 8}"]
# alpha / sqrt(rank) = 8 / sqrt(4) is the 16 / 4 of plain LoRA.
CASES: dict[str, list[str]] = {
    "lora": LORA,
    "no checkpointing": [*LORA, "train.gradient_checkpointing=none"],
    "attention kept": [*LORA, "train.gradient_checkpointing=attention", "train.offload_hidden_states=true"],
    "sequence": [*LORA, "parallel.sequence_parallel=2"],
    "stage 0": [*LORA, "parallel.zero_stage=0"],
    "stage 1": [*LORA, "parallel.zero_stage=1"],
    "stage 2": [*LORA, "parallel.zero_stage=2"],
    "layer by layer": [*LORA, NO_LEAF_MODULES],
    "offload": [*LORA, "parallel.offload_param=cpu", "parallel.offload_optimizer=cpu"],
    "alpha 16": ["method={kind: lora, rank: 4, alpha: 16}"],
    "rslora": ["method={kind: lora, rank: 4, alpha: 8, rslora: true}"],
    "dora": ["method={kind: lora, rank: 4, alpha: 8, dora: true}"],
    "embedding": ["method={kind: embedding, num_vectors: 2}", "optim.lr=0.1"],
    "full": ["optim.expert_lr={low_noise: 0.0005}"],
    "full layer by layer": ["optim.expert_lr={low_noise: 0.0005}", NO_LEAF_MODULES],
    "full whole": ["optim.expert_lr={low_noise: 0.0005}", "parallel.zero_stage=1"],
    "sequence full": ["optim.expert_lr={low_noise: 0.0005}", "parallel.sequence_parallel=2"],
    "fp8": [*LORA, "model.base_dtype=fp8", "parallel.zero_stage=1"],
    "nf4": [*LORA, "model.base_dtype=nf4", "model.dtype=bf16", "parallel.zero_stage=2"],
    "embedding fp8": [
        "method={kind: embedding, num_vectors: 2}",
        "optim.lr=0.1",
        "model.base_dtype=fp8",
        "parallel.zero_stage=0",
    ],
    "not finite": [*LORA, "optim.lr=1e30", "train.num_steps=4", "optim.max_grad_norm=0"],
}
SAME_AS_LORA = [
    "sequence",
    "no checkpointing",
    "attention kept",
    "stage 0",
    "stage 1",
    "stage 2",
    "layer by layer",
    "offload",
]
ON_ONE_RANK = ["lora", "embedding", "full"]
# fp32; another order of sums moves a gradient by 1e-7 relative, and Adam divides by its size.
RELATIVE = 1e-5


def _run(folder: Path, config: Path, cases: dict[str, list[str]], num_ranks: int) -> list[dict[str, Any]]:
    out = folder / f"on-{num_ranks}"
    (folder / f"{num_ranks}.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command += [str(PROGRAM), str(config), str(folder / f"{num_ranks}.json"), str(out)]
    assert run_ranks(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) == 0
    return [json.loads(Path(f"{out}.rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of both experts of a tiny t2v-A14B in fp32."""
    folder = tmp_path_factory.mktemp("methods")
    clips = draw_clips(9, 64, 64)[:4]
    shards = pack_clips(folder, clips, fps=8)
    model = make_tiny_pipeline("t2v-A14B", folder / "model", [clip.caption for clip in clips])
    return write_config(
        folder / "config.yaml",
        run_dir=folder / "run",
        model={"path": str(model), "variant": "t2v-A14B", "expert": "both", "dtype": "fp32"},
        data={"shards": str(shards), "sizes": [[64, 64]], "num_frames": [9], "fps": 8.0, "num_workers": 0},
        optim={"lr": 1e-3, "weight_decay": 0.1},
        train={"num_steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "seed": 2},
        parallel={"offload_optimizer": "none"},
    )


@pytest.fixture(scope="module")
def ran(config: Path) -> dict[str, dict[str, Any]]:
    """Results by case; those of one rank under `NAME on one rank`."""
    on_two = _run(config.parent, config, CASES, 2)
    assert json.dumps(on_two[0]) == json.dumps(on_two[1]), "the ranks disagree"
    alone = _run(config.parent, config, {name: CASES[name] for name in ON_ONE_RANK}, 1)[0]
    return {**on_two[0], **{f"{name} on one rank": result for name, result in alone.items()}}


def _series(result: dict[str, Any], key: str) -> list[Any]:
    return [step[key] for step in result["steps"]]


@pytest.mark.parametrize("name", SAME_AS_LORA)
def test_how_it_is_computed_changes_nothing(ran: dict[str, Any], name: str) -> None:
    assert _series(ran[name], "loss") == pytest.approx(_series(ran["lora"], "loss"), rel=RELATIVE)
    assert _series(ran[name], "norm") == pytest.approx(_series(ran["lora"], "norm"), rel=1e-3)


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_trains_the_same(ran: dict[str, Any], name: str) -> None:
    alone, two = ran[f"{name} on one rank"], ran[name]
    assert _series(alone, "expert") == _series(two, "expert")
    assert _series(alone, "loss") == pytest.approx(_series(two, "loss"), rel=RELATIVE)
    assert _series(alone, "norm") == pytest.approx(_series(two, "norm"), rel=1e-3)


@pytest.mark.parametrize("name", ["full whole", "full layer by layer", "sequence full"])
def test_full_training_is_the_same_however_it_is_shared(ran: dict[str, Any], name: str) -> None:
    """A factor of the group's size in the gradients, which DeepSpeed alone would leave, shows in the norm."""
    assert _series(ran[name], "loss") == pytest.approx(_series(ran["full"], "loss"), rel=RELATIVE)
    assert _series(ran[name], "norm") == pytest.approx(_series(ran["full"], "norm"), rel=1e-4)


def test_two_data_ranks_of_two_sequence_ranks_are_one_rank(config: Path) -> None:
    cases = {name: CASES[name] for name in ("sequence", "sequence full")}
    alone = {name: [word for word in words if "sequence" not in word] for name, words in cases.items()}
    on_four = _run(config.parent, config, cases, 4)
    assert all(json.dumps(results) == json.dumps(on_four[0]) for results in on_four), "the ranks disagree"
    on_one = _run(config.parent, config, alone, 1)[0]
    for name in cases:
        assert _series(on_four[0][name], "expert") == _series(on_one[name], "expert")
        assert _series(on_four[0][name], "loss") == pytest.approx(_series(on_one[name], "loss"), rel=RELATIVE)
        assert _series(on_four[0][name], "norm") == pytest.approx(_series(on_one[name], "norm"), rel=1e-3)


@pytest.mark.parametrize(("name", "whole"), [("fp8", "lora"), ("nf4", "lora"), ("embedding fp8", "embedding")])
def test_a_base_of_fewer_bits_trains_the_same_things(ran: dict[str, Any], name: str, whole: str) -> None:
    """The losses are those of other weights, a little off; that they are right is `test_frozen_base.py`'s matter."""
    found = ran[name]
    assert found["names"] == ran[whole]["names"]
    assert found["frozen"] == found["before"]["frozen"] != ran[whole]["frozen"]
    assert _series(found, "expert") == _series(ran[whole], "expert")
    first, wanted = _series(found, "loss")[0], _series(ran[whole], "loss")[0]
    assert first == pytest.approx(wanted, rel=0.05)
    assert first != wanted
    states = [found["before"]["trained"], *(step["trained"] for step in found["steps"])]
    assert len({json.dumps(state) for state in states}) == len(states)


def test_rslora_is_lora_with_another_scale(ran: dict[str, Any]) -> None:
    assert _series(ran["rslora"], "loss") == pytest.approx(_series(ran["alpha 16"], "loss"), rel=RELATIVE)
    assert _series(ran["rslora"], "norm")[0] != pytest.approx(_series(ran["lora"], "norm")[0], rel=0.1)


def test_both_experts_get_steps_and_one_that_is_not_drawn_does_not_move(ran: dict[str, Any]) -> None:
    """Weight decay and momentum would move it; three steps of this seed are drawn for both experts."""
    assert set(_series(ran["full"], "expert")) == {"high_noise", "low_noise"}
    folder_of = {"high_noise": "transformer", "low_noise": "transformer_2"}
    for name in ("lora", "full"):
        before = ran[name]["before"]["trained"]
        for step in ran[name]["steps"]:
            moved = {component for component in before if before[component] != step["trained"][component]}
            assert moved == {folder_of[step["expert"]]}
            before = step["trained"]


def test_an_expert_has_its_own_learning_rate(ran: dict[str, Any]) -> None:
    rates = {(step["expert"], step["lr"]) for step in ran["full"]["steps"]}
    assert rates == {("high_noise", 1e-3), ("low_noise", 5e-4)}


def test_exactly_the_trainable_set_is_trained(ran: dict[str, Any]) -> None:
    for name in ("lora", "dora", "embedding"):
        result = ran[name]
        assert result["frozen"] == result["before"]["frozen"], "the frozen base has changed"
    kinds = {n.split(".default")[0].rsplit(".", 1)[1] for n in ran["lora"]["names"]["transformer"]}
    assert kinds == {"lora_A", "lora_B"}
    kinds = {n.split(".default")[0].rsplit(".", 1)[1] for n in ran["dora"]["names"]["transformer_2"]}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert ran["embedding"]["names"] == {"embedding": ["embedding"]}


def test_an_embedding_learns_from_both_experts(ran: dict[str, Any]) -> None:
    result = ran["embedding"]
    assert len({step["expert"] for step in result["steps"]}) == 2
    states = [result["before"]["trained"]["embedding"], *(s["trained"]["embedding"] for s in result["steps"])]
    assert len(set(states)) == len(states)
    assert all(step["norm"] > 0 for step in result["steps"])


def test_steps_of_infinite_gradients_change_nothing(ran: dict[str, Any]) -> None:
    """The first step of each expert makes its adapters huge; what follows is not finite and is skipped by all ranks."""
    steps = ran["not finite"]["steps"]
    assert any(step["skipped"] for step in steps)
    before = steps[0]["trained"]
    for step in steps[1:]:
        if step["skipped"]:
            assert step["trained"] == before
        before = step["trained"]

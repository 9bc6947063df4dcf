from pathlib import Path

import pytest

from wan_dist.config.check import _output_problem, check_paths
from wan_dist.config.load import load_config
from wan_dist.config.resources import configs_dir
from wan_dist.core.errors import ConfigError, DataError, ModelError

A14B = configs_dir() / "train" / "t2v-a14b-high.yaml"
TI2V = configs_dir() / "train" / "ti2v-5b.yaml"


def problems_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("count", "below", "above"), [(80, 77, 81), (82, 81, 85), (4, 1, 5), (0, 1, 5), (-3, 1, 5)])
def test_frames_must_be_4n_plus_1(count: int, below: int, above: int):
    text = problems_of(A14B, f"data.num_frames=[81, {count}]")
    assert f"data.num_frames = {count} is not 4n+1; use {below} or {above}." in text


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        (A14B, "[830, 480]", "data.sizes = 830x480: width is not a multiple of 16; use 816 or 832."),
        (A14B, "[832, 481]", "data.sizes = 832x481: height is not a multiple of 16; use 480 or 496."),
        (A14B, "[8, 480]", "data.sizes = 8x480: width is not a multiple of 16; use 16 or more."),
        (A14B, "[-16, 480]", "data.sizes = -16x480: width is not a multiple of 16; use 16 or more."),
        (TI2V, "[1280, 720]", "data.sizes = 1280x720: height is not a multiple of 32; use 704 or 736."),
    ],
)
def test_sizes_must_fit_the_variant(path: Path, size: str, message: str):
    assert message in problems_of(path, f"data.sizes=[{size}]")


def test_values_listed_twice_are_named():
    assert "832x480 is listed twice" in problems_of(A14B, "data.sizes=[[832, 480], [832, 480]]")
    assert "data.num_frames = 81 is listed twice" in problems_of(A14B, "data.num_frames=[81, 81]")


def test_expert_is_required_for_two_and_refused_for_one():
    assert "use high_noise or low_noise" in problems_of(A14B, "model.expert=null")
    assert "ti2v-5B has one transformer; remove the key" in problems_of(TI2V, "model.expert=low_noise")


def test_optimizer_values_are_checked():
    assert "optim.betas[1] = 1.0 is not in [0, 1)" in problems_of(TI2V, "optim.betas=[0.9, 1.0]")


def test_deepspeed_key_that_is_ours_is_refused_at_load():
    text = problems_of(TI2V, "parallel.deepspeed.train_batch_size=4", "data.num_frames=[80]")
    assert "parallel.deepspeed.train_batch_size = 4 collides" in text
    assert "data.num_frames = 80" in text


def test_missing_folders_are_named_in_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(TI2V, ["model.path=m", "data.shards=s"])
    with pytest.raises(ModelError) as caught:
        check_paths(cfg)
    model_line, data_line = str(caught.value).splitlines()
    assert model_line.startswith(f"model.path = m: there is no such folder under {tmp_path}")
    assert data_line.endswith("write it with `wan-data pack CLIPS s`.")

    Path("m").mkdir()
    with pytest.raises(ModelError, match=r"holds no model_index\.json"):
        check_paths(cfg)
    Path("m/model_index.json").write_text("{}")
    Path("s").write_text("")
    with pytest.raises(DataError, match="is a file, not a folder"):
        check_paths(cfg)
    Path("s").unlink()
    Path("s").mkdir()
    Path("s/manifest.json").write_text("{}")
    check_paths(cfg)


def test_a_stream_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TI2V, ["data.source=stream", "data.tail=pad", "data.shards=[{path: a}]", "data.cache_dir=c"])
    message = str(caught.value)
    assert "data.tail = pad: data.source = stream cannot do this" in message
    assert "data.cache_dir = c" in message
    assert "data.shards is a list" in message
    load_config(TI2V, ["data.source=stream", "data.shards=a/data-{000..099}.tar"])


@pytest.mark.parametrize("run_dir", ["file", "file/inside"])
def test_a_run_folder_that_cannot_be_made_is_named_before_the_start(tmp_path: Path, run_dir: str) -> None:
    (tmp_path / "file").write_text("")
    found = _output_problem(tmp_path / run_dir)
    assert found == f"{tmp_path / 'file'} is not a folder"
    assert _output_problem(tmp_path / "new" / "deeper") is None


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (TI2V, ["flow.t_min=0.5", "flow.t_max=0.5"], "flow.t_min = 0.5 is not below flow.t_max = 0.5"),
        (
            A14B,
            ["flow.t_max=0.8"],
            "no noise level to t2v-A14B's high_noise expert (boundary 0.875); use flow.t_max above 0.875, or model",
        ),
        (A14B, ["model.expert=low_noise", "flow.t_min=0.875"], "use flow.t_min below 0.875, or model.expert: high_"),
        (TI2V, ["flow.sampling=mode", "flow.mode_scale=1.8"], "flow.mode_scale = 1.8 is not in [-1, 1.7519]"),
        (
            TI2V,
            ["flow.beta_alpha=2.0"],
            "flow.sampling = uniform does not read it; remove it, or use flow.sampling: beta",
        ),
        (TI2V, ["flow.shift=resolution", "flow.shift_rule=linear"], "flow.shift_points is missing: shift_rule linear"),
        (TI2V, ["flow.shift_points=[[256, 3]]"], "only flow.shift: resolution reads it, flow.shift is auto"),
        (TI2V, ["flow.shift_rule=linear"], "flow.shift_rule = linear: only flow.shift: resolution reads it"),
        (TI2V, ["flow.shift=resolution", "flow.shift_points=[[1, 2], [3, 4]]"], "shift rule sqrt takes 1 points"),
        (
            TI2V,
            ["flow.shift=resolution", "flow.shift_rule=linear", "flow.shift_points=[[100, 5], [200, 4]]"],
            "the line through ((100, 5.0), (200, 4.0)) gives shift",
        ),
    ],
)
def test_noise_levels_that_cannot_be_drawn_are_refused(path: Path, overrides: list[str], message: str):
    assert message in problems_of(path, *overrides)


def test_every_sampling_and_shift_rule_loads():
    for sampling in ("uniform", "logit_normal", "mode", "sigmoid", "beta"):
        load_config(A14B, [f"flow.sampling={sampling}", "flow.t_min=0.1", "flow.t_max=0.95"])
    load_config(A14B, ["flow.shift=resolution"])
    load_config(
        A14B, ["flow.shift=resolution", "flow.shift_rule=exponential", "flow.shift_points=[[32760, 3], [75600, 5]]"]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=adafactor"], "ZeRO stage 3 cuts weights into flat pieces, of which it cannot factor rows"),
        (["optim.name=muon"], "optim.max_grad_norm = 1.0 would clip the update after it was made orthogonal"),
        (["optim.name=prodigy", "optim.decay=matrices"], "it keeps one count for all weights"),
        (["optim.name=schedule_free", "optim.schedule=cosine"], "averaging takes a schedule's place; use constant."),
        (["optim.schedule=cosine", "optim.num_cycles=3"], "remove it, or use cosine_restarts."),
        (["optim.decay_share=0.5"], "optim.decay_share = 0.5: optim.schedule = cosine does not read it"),
        (["optim.schedule=wsd", "optim.decay_share=0.0"], "optim.decay_share = 0.0 is not allowed"),
    ],
)
def test_optimizers_that_would_silently_be_others_are_refused(overrides: list[str], message: str):
    assert message in problems_of(TI2V, *overrides)


def test_optimizers_that_work_load():
    for name in ("adamw", "adamw_8bit", "lion", "prodigy"):
        load_config(TI2V, [f"optim.name={name}"])
    load_config(TI2V, ["optim.name=muon", "optim.max_grad_norm=0"])
    load_config(TI2V, ["optim.name=schedule_free", "optim.schedule=constant"])


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (A14B, ["samples.every=5", "samples.prompts=[a]"], "and this run holds one; use model.expert: both, or 0."),
        (TI2V, ["samples.every=5"], "samples.prompts is empty"),
        (TI2V, ["samples.every=5", "samples.prompts=[a, b]", "samples.images=[x.png]"], "1 files for 2 prompts"),
        (TI2V, ["samples.every=5", "samples.prompts=[a]", "samples.size=[100, 64]"], "are multiples of 32"),
        (
            TI2V,
            ["samples.every=5", "samples.prompts=[a]", "samples.num_frames=8"],
            "samples.num_frames = 8 is not 4n+1",
        ),
        (TI2V, ["train.ema_decay=0.9", "optim.name=schedule_free", "optim.schedule=constant"], "keeps its own average"),
        (TI2V, ["train.ema_decay=0.9", "parallel.zero_stage=0"], "averages are kept on shards"),
    ],
)
def test_samples_and_averages_that_a_run_cannot_have_are_refused(path: Path, overrides: list[str], message: str):
    assert message in problems_of(path, *overrides)

from pathlib import Path

import pytest

from wan_dist.config.load import load_config
from wan_dist.config.migrate import MIGRATIONS
from wan_dist.core.errors import ConfigError

GOOD = """\
run_dir: runs/x
model:
  path: models/x
  variant: t2v-A14B
  expert: high_noise
data:
  shards: shards
  sizes: [[832, 480]]
  num_frames: [81]
  fps: 16
train:
  num_steps: 100
"""


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t2v.yaml").write_text(GOOD)
    return Path("t2v.yaml")


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def with_text(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_good_config_loads_with_defaults(good: Path):
    cfg = load_config(good)
    assert cfg.data.sizes == [(832, 480)]
    assert cfg.data.fps == 16.0
    assert cfg.flow.shift == "auto"


def test_overrides_are_yaml_and_the_last_one_wins(good: Path):
    cfg = load_config(
        good,
        [
            "train.num_steps=10",
            "train.num_steps=20",
            "optim.lr=1e-4",
            "data.sizes=[[480, 832], [832, 480]]",
            "run_dir=runs/a=b",
            "flow.shift=3",
            "parallel.deepspeed.zero_optimization.stage3_max_reuse_distance=5",
        ],
    )
    assert cfg.train.num_steps == 20
    assert cfg.optim.lr == 1e-4
    assert cfg.data.sizes == [(480, 832), (832, 480)]
    assert cfg.run_dir == "runs/a=b"
    assert cfg.flow.shift == 3
    assert cfg.parallel.deepspeed == {"zero_optimization": {"stage3_max_reuse_distance": 5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "override 'train' is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("train..x=3", "is not KEY=VALUE"),
        ("model.path.x=3", "model.path is a value, not a section"),
        ("run_dir=[a", "the value is not valid YAML"),
        ("data={a: 1, a: 2}", "a is set twice"),
    ],
)
def test_bad_overrides_are_named(good: Path, override: str, message: str):
    assert any(message in line for line in problems_of(good, override))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.num_frame=[81]", "data.num_frame is not a known key; did you mean data.num_frames?"),
        ("data.Num_Frames=[81]", "data.Num_Frames is not a known key; did you mean data.num_frames?"),
        ("data.lr=1", "data.lr is not a known key; it belongs elsewhere: use optim.lr."),
        ("num_steps=1", "num_steps is not a known key; it belongs elsewhere: use train.num_steps."),
        ("dat.fps=1", "dat is not a known key; did you mean data?"),
        ("data.learning=1", "data.learning is not a known key; known in data are shards, sizes, num_frames, "),
        ("train.micro_batch_size=0", "train.micro_batch_size = 0 is not allowed; use a number greater than 0."),
        ("train.num_steps=1.5", "train.num_steps = 1.5 is not allowed; use a whole number."),
        ("train.num_steps=true", "train.num_steps = true is not allowed; use a whole number."),
        ("data.allow_upscale=no", "data.allow_upscale = 'no' is not allowed; use true or false."),
        ("data.crop=middle", "data.crop = 'middle' is not allowed; use 'center' or 'random'."),
        ("flow.shift=big", "flow.shift = 'big' is not allowed; use 'auto' or 'resolution' or a number."),
        ("optim=", "optim = null is not allowed; use a section of keys."),
        ("optim.betas=[0.9]", "optim.betas = [0.9] has too few items."),
        ("data.sizes=[]", "data.sizes = [] is not allowed; use a list of at least 1"),
        ("train.micro_batch_size=2", "train.global_batch_size = 1 is not a multiple of train.micro_batch_size = 2."),
        ("model.variant=t2v-a14b", "model.variant = 't2v-a14b' is not allowed; use 'ti2v-5B', 't2v-A14B' or"),
        ("version=2", "version = 2 is not allowed; use 1."),
        ("version=one", "version = 'one' is not allowed; use 1."),
    ],
)
def test_schema_problems_say_what_is_allowed(good: Path, override: str, line: str):
    assert any(line in found for found in problems_of(good, override))


def test_missing_keys_say_what_they_are_for(good: Path):
    with_text(good, "  num_steps: 100\n", "  seed: 1\n")
    with_text(good, "run_dir: runs/x\n", "")
    assert problems_of(good) == [
        "t2v.yaml: run_dir is missing; set it. Run folder: checkpoints, metrics, resolved config.",
        "t2v.yaml:10: train.num_steps is missing; set it. Optimizer steps of the whole run.",
    ]


def test_missing_section_names_its_required_keys(good: Path):
    with_text(good, "train:\n  num_steps: 100\n", "")
    assert problems_of(good) == ["t2v.yaml: train is missing; add it with at least num_steps."]


def test_every_problem_is_reported_together_with_its_place(good: Path):
    with_text(good, "[81]", "[80]")
    with_text(good, "832, 480", "830, 480")
    with_text(good, "  fps: 16\n", "  fps: 16\n  fps: fast\n  allow_upscale: yes\n")
    assert problems_of(good, "train.num_steps=many") == [
        "t2v.yaml:10: data.fps is set twice, in lines 10 and 11; keep one.",
        "t2v.yaml:12: data.allow_upscale = 'yes' is not allowed; use true or false.",
        "override train.num_steps: train.num_steps = 'many' is not allowed; use a whole number.",
        "t2v.yaml:8: data.sizes = 830x480: width is not a multiple of 16; use 816 or 832.",
        "t2v.yaml:9: data.num_frames = 80 is not 4n+1; use 77 or 81.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "t2v.yaml: holds a list; a config is a mapping of sections such as `model:`."),
        ("a: [1\n", "t2v.yaml:2: not valid YAML: "),
        ("", "t2v.yaml: run_dir is missing"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_config_are_named(good: Path, text: str, message: str):
    good.write_text(text)
    assert problems_of(good)[0].startswith(message) or message in problems_of(good)[0]


def test_unreadable_files_are_named(good: Path):
    assert "there is no such file" in problems_of(Path("absent.yaml"))[0]
    good.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in problems_of(good)[0]
    assert "cannot be read" in problems_of(Path())[0]


def test_a_file_of_a_newer_version_is_named(good: Path):
    good.write_text(f"version: 2\n{GOOD}")
    assert problems_of(good) == [
        "t2v.yaml:1: version = 2 was written by a newer wan_dist; this one reads up to 1, update it."
    ]


def test_a_registered_migration_brings_an_old_file_up_to_date(good: Path, monkeypatch: pytest.MonkeyPatch):
    def move_steps(document: dict) -> dict:
        steps = {"num_steps": document["steps"]}
        return {key: value for key, value in document.items() if key != "steps"} | {"train": steps}

    good.write_text("version: 0\nsteps: 7\n" + GOOD.replace("train:\n  num_steps: 100\n", ""))
    assert "version = 0 cannot be read; use 1 to 1." in problems_of(good)[0]
    monkeypatch.setitem(MIGRATIONS, 0, move_steps)
    cfg = load_config(good, ["optim.lr=0.5"])
    assert (cfg.version, cfg.train.num_steps, cfg.optim.lr) == (1, 7, 0.5)


@pytest.mark.parametrize("size", ["832x480", "[832, 480]", "[832x480]", "[[832, 480]]"])
def test_one_size_and_one_length_need_no_lists(good: Path, size: str):
    cfg = load_config(good, [f"data.sizes={size}", "data.num_frames=77"])
    assert (cfg.data.sizes, cfg.data.num_frames) == ([(832, 480)], [77])


def test_short_forms_are_checked_like_lists(good: Path):
    assert "data.num_frames = 80 is not 4n+1; use 77 or 81." in problems_of(good, "data.num_frames=80")[0]
    assert "data.sizes = [] is not allowed; use a list of at least 1." in problems_of(good, "data.sizes=[]")[0]
    assert "is not allowed" in problems_of(good, "data.num_frames=true")[0]

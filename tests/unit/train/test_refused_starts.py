"""What a transformer's own configuration makes impossible is refused before anything is loaded or connected."""

from pathlib import Path

import pytest

from tests.jobs import write_config
from wan_dist.config.load import load_config
from wan_dist.core.errors import ConfigError, NotFiniteError, UnfitDataError
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.train.build import _check_transformers


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    model = make_tiny_pipeline("ti2v-5B", folder / "model")
    return write_config(
        folder / "config.yaml",
        run_dir=folder / "run",
        model={"path": str(model), "variant": "ti2v-5B"},
        data={"shards": "shards", "sizes": [[96, 96]], "num_frames": [9], "fps": 8.0},
        train={"num_steps": 1},
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.sequence_parallel=3"],
            "sequence_parallel = 3 does not divide the transformer's 4 attention heads; use one of 1, 2, 4",
        ),
        (
            ["method={kind: lora, targets: ['blocks.0.attn3.to_q']}"],
            "'blocks.0.attn3.to_q' matches none of the transformer's 26 linear layers; .* use attention, blocks, all",
        ),
    ],
)
def test_a_start_that_the_transformer_cannot_follow_is_refused(
    config: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _check_transformers(load_config(config, overrides))


def test_data_that_cannot_serve_a_configuration_end_as_a_bad_configuration_does() -> None:
    assert UnfitDataError.exit_code == NotFiniteError.exit_code == ConfigError.exit_code == 2

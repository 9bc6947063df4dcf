import json
import re
from pathlib import Path

import pytest

from wan_dist.config.document import dump_config, json_schema
from wan_dist.config.load import load_config
from wan_dist.config.resources import configs_dir, train_configs
from wan_dist.models.wan.variants import VARIANTS


def test_every_variant_and_expert_has_a_config():
    shipped = {(cfg.model.variant, cfg.model.expert) for cfg in map(load_config, train_configs())}
    wanted = set()
    for variant in VARIANTS.values():
        experts = (*variant.experts, "both") if variant.num_transformers > 1 else (None,)
        wanted |= {(variant.name, expert) for expert in experts}
    assert shipped == wanted


@pytest.mark.parametrize("path", train_configs(), ids=lambda path: path.name)
def test_shipped_config_reloads_equal_after_a_dump(path: Path, tmp_path: Path):
    cfg = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(cfg))
    assert load_config(resolved) == cfg


@pytest.mark.parametrize("path", train_configs(), ids=lambda path: path.name)
def test_shipped_config_points_editors_to_the_schema(path: Path):
    match = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert match
    assert (path.parent / match[1]).is_file()


def test_shipped_schema_is_current():
    shipped = json.loads((configs_dir() / "train.schema.json").read_text())
    assert shipped == json_schema(), "run `make schema`"

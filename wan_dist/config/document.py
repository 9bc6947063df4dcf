"""A configuration as text: resolved YAML, and the JSON Schema that editors use."""

from typing import Any

from wan_dist.config.schema import TrainConfig
from wan_dist.config.yaml_text import dump_yaml


def dump_config(cfg: TrainConfig) -> str:
    """Return the whole configuration as YAML, defaults written out; it loads back equal.

    Args:
        cfg: a loaded configuration.
    """
    return dump_yaml(cfg.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a training config."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainConfig.model_json_schema()}

"""The transformer of a pipeline folder as the libraries' class, built without initialising weights."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from wan_dist.core.errors import ModelError
from wan_dist.models.wan.compact import bind_compact
from wan_dist.models.wan.variants import WanVariant

EXPERT_FOLDERS = {"high_noise": "transformer", "low_noise": "transformer_2"}


def transformer_folder(pipeline_dir: Path, expert: str | None) -> Path:
    """Return the folder of the transformer that `expert` names; the only one without an expert.

    diffusers keeps the high-noise expert in `transformer` and the low-noise one in `transformer_2`
    (`diffusers/scripts/convert_wan_to_diffusers.py`).

    Raises:
        ModelError: the folder is absent.
    """
    folder = pipeline_dir / (EXPERT_FOLDERS[expert] if expert else "transformer")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; {pipeline_dir} is not a WAN pipeline in diffusers layout.")
    return folder


def read_transformer_config(folder: Path, variant: WanVariant) -> dict[str, Any]:
    """Return a transformer's config.json, checked against the variant.

    Raises:
        ModelError: unreadable, another class, or channels of another variant.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    if config.get("_class_name") != "WanTransformer3DModel":
        raise ModelError(f"{path}: _class_name is {config.get('_class_name')!r}, not 'WanTransformer3DModel'.")
    found = (config.get("in_channels"), config.get("out_channels"))
    wanted = (variant.in_channels, variant.out_channels)
    if found != wanted:
        raise ModelError(
            f"{path}: in/out channels are {found[0]}/{found[1]}, {variant.name} has {wanted[0]}/{wanted[1]}; "
            "is model.variant right?"
        )
    return config


def empty_transformer(config: dict[str, Any]) -> nn.Module:
    """Return a `WanTransformer3DModel` of this config whose weights are allocated and not initialised.

    It also takes a timestep of its own for the first latent frame, see `wan_dist.models.wan.compact`.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights():
        model = WanTransformer3DModel.from_config(config)
    assert isinstance(model, WanTransformer3DModel)
    bind_compact(model)
    return model

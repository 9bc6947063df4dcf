"""Where exported weights come from: header strings of their files and a model card beside them."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from wan_dist.core.hashing import sha256_of
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.component_weights import expert_of, method_of
from wan_dist.io.run_folder import CONFIG_NAME, METRICS_NAME
from wan_dist.io.safetensors_stream import HASH_KEY
from wan_dist.models.wan.variants import get_variant

_BASE_MODELS = {
    name: f"Wan-AI/Wan2.2-{name.replace('ti2v', 'TI2V').replace('t2v', 'T2V').replace('i2v', 'I2V')}"
    for name in ("ti2v-5B", "t2v-A14B", "i2v-A14B")
}
_SHOWN_SECTIONS = ("method", "flow", "optim", "train")


def modelspec(title: str, variant: str, *, expert: str | None = None, kind: str = "") -> dict[str, str]:
    """Return header strings by the Model Metadata Standard; the writer fills in the hash of a LoRA or a word.

    Whole models go without that optional hash: it would be two fifths of the CPU time of writing them.

    Args:
        title: name of the model.
        variant: official name.
        expert: high_noise or low_noise; its timestep range is written.
        kind: what follows the architecture's name, such as "lora".
    Source: https://github.com/Stability-AI/ModelSpec; architecture and implementation as musubi-tuner writes them.
    """
    spec = get_variant(variant)
    width, height = spec.sizes_px[0]
    strings = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"wan2.1/{kind}" if kind else "wan2.1",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{width}x{height}",
    }
    if kind:
        strings[HASH_KEY] = ""
    if spec.boundary is not None and expert:
        edge = round(spec.boundary * 1000)
        strings["modelspec.timestep_range"] = f"{edge},1000" if expert == "high_noise" else f"0,{edge}"
    return strings


def header_of(checkpoint: Checkpoint, component: str, title: str, *, ema: bool, kind: str = "") -> dict[str, str]:
    """Return the header strings of a file that holds a component of a checkpoint."""
    expert = expert_of(checkpoint, component)
    strings = modelspec(title, checkpoint.state["variant"], expert=expert, kind=kind)
    strings |= {
        "wan_dist.variant": checkpoint.state["variant"],
        "wan_dist.component": component,
        "wan_dist.step": str(checkpoint.step),
        "wan_dist.weights": "ema" if ema else "last",
        "wan_dist.method": json.dumps(method_of(checkpoint), sort_keys=True),
        "wan_dist.data_digest": str(checkpoint.state.get("data_digest", "")),
        "wan_dist.config_sha256": _config_digest(checkpoint),
    }
    return strings | ({"wan_dist.expert": expert} if expert else {})


def model_card(
    checkpoint: Checkpoint,
    title: str,
    *,
    components: Iterable[str],
    layout: str,
    dtype: str,
    ema: bool,
    usage: str,
) -> str:
    """Return a README.md: what was trained, on what, for how long, and how to load it.

    Args:
        checkpoint: where the weights come from.
        title: heading.
        components: those of the checkpoint that were written.
        layout: format of the weights.
        dtype: of the weights, as the command line has it.
        ema: whether they are the running average.
        usage: Python lines that load them.
    """
    state, method = checkpoint.state, method_of(checkpoint)
    variant = state["variant"]
    facts = {
        "base model": _BASE_MODELS.get(variant, variant),
        "trained": ", ".join(expert_of(checkpoint, name) or name for name in components),
        "method": _described(method),
        "weights": f"{'running average' if ema else 'last'} after step {checkpoint.step}, {dtype}, {layout} format",
        "samples per step": state.get("global_batch_size"),
        "epochs": state.get("epoch"),
        "seed": state.get("seed"),
        "last loss": _last_loss(checkpoint),
        "data digest": state.get("data_digest"),
        "config SHA-256": _config_digest(checkpoint),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    settings = _settings(checkpoint)
    blocks = [
        _front_matter(variant, method["kind"]),
        f"# {title}",
        f"A WAN 2.2 `{variant}` model trained with wan_dist.",
        "\n".join(["| | |", "|---|---|", *rows]),
        f"```python\n{usage}\n```" if usage else "",
        f"## Settings\n\n```yaml\n{settings}```" if settings else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _front_matter(variant: str, kind: str) -> str:
    tags = ["wan2.2", "text-to-video", "wan_dist", *(["lora"] if kind == "lora" else [])]
    values: Mapping[str, Any] = {
        "license": "apache-2.0",
        "base_model": _BASE_MODELS.get(variant, variant),
        "base_model_relation": "adapter" if kind == "lora" else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if variant == "i2v-A14B" else "text-to-video",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False)}---"


def _described(method: Mapping[str, Any]) -> str:
    if method["kind"] != "lora":
        return str(method["kind"])
    extras = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if method.get(key)]
    return ", ".join([f"LoRA of rank {method['rank']}, alpha {method['alpha']:g}", *extras])


def _run_dir(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.resolve().parent.parent


def _config_digest(checkpoint: Checkpoint) -> str:
    path = _run_dir(checkpoint) / CONFIG_NAME
    return sha256_of(path) if path.is_file() else ""


def _settings(checkpoint: Checkpoint) -> str:
    """Return the sections of the run's config that say how it trained; those with paths are left out."""
    path = _run_dir(checkpoint) / CONFIG_NAME
    if not path.is_file():
        return ""
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    shown = {name: config[name] for name in _SHOWN_SECTIONS if name in config}
    return yaml.safe_dump(shown, sort_keys=False)


def _last_loss(checkpoint: Checkpoint) -> str | None:
    """Return the loss that was last reported before the checkpoint, None if there is no report."""
    path = _run_dir(checkpoint) / METRICS_NAME
    if not path.is_file():
        return None
    last = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            last = row["loss"] if row["step"] <= checkpoint.step else last
        except (ValueError, KeyError, TypeError):
            continue  # a killed run may leave half a row; other rows need no loss
    return None if last is None else f"{last:.4g}"

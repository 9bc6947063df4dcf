"""One rank: trains several cases one after the other and writes what they did, for `test_methods.py`.

Usage: methods_program.py CONFIG CASES.json OUT
"""

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan_dist.config.load import load_config
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel.environment import prepare_environment

NO_LEAF_MODULES = "no leaf modules"
"""Among a case's overrides: ZeRO-3 gathers every layer by itself instead of whole blocks."""


def main(config: str, cases: str, out: str) -> None:
    prepare_environment()
    from wan_dist.parallel import dist
    from wan_dist.train import engines

    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=60)
    results = {}
    for name, overrides in json.loads(Path(cases).read_text()).items():
        with pytest.MonkeyPatch.context() as patched:
            if NO_LEAF_MODULES in overrides:
                patched.setattr(engines, "gather_in_blocks", lambda _examples, _model: None)
            words = [word for word in overrides if word != NO_LEAF_MODULES]
            results[name] = _train(load_config(Path(config), words), ranks)
        gc.collect()
    Path(f"{out}.rank{ranks.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.stop()


def _train(cfg: Any, ranks: Any) -> dict[str, Any]:
    from wan_dist.parallel import dist
    from wan_dist.train import build
    from wan_dist.train.loop import TrainState, train

    variant, ranks = get_variant(cfg.model.variant), build.grouped(cfg, ranks)
    settings = build.deepspeed_settings(cfg, ranks, build.accumulation(cfg, ranks))
    batches, _ = build.build_batches(cfg, ranks)
    experts = build.build_experts(cfg, variant, settings, ranks)
    engines = build.engines_of(experts)
    steps: list[dict[str, Any]] = []

    def digests(trained: bool) -> dict[str, str]:
        return {component: _digest(engine, trained) for component, engine in engines.items()}

    class Record:
        def after_step(self, state: Any, result: Any) -> None:
            loss = dist.mean_over_ranks(float(result.loss), ranks)
            norm = float(result.grad_norm)
            row = {"expert": result.expert, "loss": loss, "norm": norm, "lr": result.lr, "skipped": result.skipped}
            steps.append({**row, "trained": digests(True)})

    before = {"trained": digests(True), "frozen": digests(False)}
    names = {c: [n for n, p in e.module.named_parameters() if p.requires_grad] for c, e in engines.items()}
    try:
        train(
            build._chooser(cfg, experts, ranks),
            batches,
            TrainState(),
            num_steps=cfg.train.num_steps,
            hooks=[Record()],
            should_stop=lambda: False,
        )
    finally:
        batches.close()
    for engine in engines.values():
        engine.destroy()
    return {"names": names, "before": before, "steps": steps, "frozen": digests(False)}


def _digest(engine: Any, trained: bool) -> str:
    """Return the SHA-256 of all trained, or all frozen, parameters of an engine, and of frozen bits with the latter."""
    import deepspeed

    digest = hashlib.sha256()
    parameters = [p for p in engine.module.parameters() if p.requires_grad == trained]
    whole = engine.zero_optimization_stage() < 3
    with deepspeed.zero.GatheredParameters(parameters, enabled=not whole):
        for parameter in parameters:
            digest.update(parameter.detach().float().contiguous().view(torch.uint8).numpy().tobytes())
    for name, buffer in engine.module.named_buffers():
        if not trained and name.endswith("stored"):
            digest.update(buffer.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[-3:])

"""Prior samples: their target is what the model gives without its adapters, which are left as they were."""

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig

from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.data.batching import Batch
from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel import dist
from wan_dist.train.objective import Objective
from wan_dist.train.prior import adapters_off, base_prediction


def test_targets_of_prior_samples_are_the_base_models(monkeypatch) -> None:
    torch.manual_seed(0)
    base: Any = build_transformer(get_variant("t2v-A14B")).eval()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False, use_dora=True))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    latents, text = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 512, 64)
    batch = Batch(("a", "b"), 0, (0, 1), latents, text, None, prior=(False, True))
    asked: list[bool] = []
    monkeypatch.setattr(dist, "any_rank", lambda flag, _: asked.append(flag) or flag)
    plain = Objective(SigmaSampler(shift=12.0), torch.float32, 3)
    objective = replace(plain, base_prediction=base_prediction(dist.ranks_from_environment()))
    terms = objective.loss(model, batch)
    sigma, noise = plain.draw_sigma(batch), plain.draw_noise(batch)
    s = sigma.view(-1, 1, 1, 1, 1)
    inputs = ((1 - s) * latents + s * noise, 1000 * sigma, text, None)
    with torch.no_grad():
        kept, adapted = predict_velocity(base, *inputs), predict_velocity(model, *inputs)
    assert float((kept - adapted).abs().max()) > 1e-3
    target = torch.stack([(noise - latents)[0], kept[1]])
    torch.testing.assert_close(terms.sample_losses, ((adapted - target) ** 2).flatten(1).mean(1))
    assert terms.loss.requires_grad
    # Ranks agree even where this one has no prior sample; and nothing is computed where none has.
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    objective.loss(model, replace(batch, prior=()))
    assert (asked, calls) == ([True, False], [1])
    with adapters_off(model), torch.no_grad():
        assert torch.equal(predict_velocity(model, *inputs), kept)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(predict_velocity(model, *inputs), adapted)

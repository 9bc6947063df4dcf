"""`wan-dist train` with one formula broken on purpose, for the memorisation proofs.

Usage: sabotaged_train.py BREAKAGE CONFIG
"""

import sys

import torch

from wan_dist.core import flow_matching
from wan_dist.data import encode
from wan_dist.data.encode import Encoders
from wan_dist.models.wan.condition import given_frames_mask
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.train import objective
from wan_dist.train.objective import Objective


def _shift_backwards(u, shift):
    return u / (shift - (shift - 1) * u)


def _rows_swapped(transformer, noisy, timestep, text, condition, first_timestep=None):
    if first_timestep is not None:
        timestep, first_timestep = first_timestep, timestep
    return predict_velocity(transformer, noisy, timestep, text, condition, first_timestep)


def _first_frame_late(inputs_of):
    """The given first frame stands in the second latent frame's place."""

    def late(self, batch, sigma, noise, given):
        inputs = inputs_of(self, batch, sigma, noise, given)
        noisy = flow_matching.add_noise(batch.latents, noise, sigma)
        moved = torch.cat([noisy[:, :, :1], batch.latents[:, :, :1], noisy[:, :, 2:]], dim=2)
        chosen = torch.tensor(given).view(-1, 1, 1, 1, 1)
        return inputs._replace(noisy_latents=torch.where(chosen, moved, inputs.noisy_latents))

    return late


def _mask_all_four(num_frames, height, width, *, with_last=False):
    """The last latent frame counts as given whole, as diffusion-pipe has it."""
    mask = given_frames_mask(num_frames, height, width, with_last=with_last)
    if with_last:
        mask[:, -1] = 1.0
    return mask


def _mask_inverted(num_frames, height, width, *, with_last=False):
    """0 where a frame is given, as ti2v-5B's pipeline has it for its own mask."""
    return 1.0 - given_frames_mask(num_frames, height, width, with_last=with_last)


BREAKAGES = {
    "none": lambda: None,
    "velocity sign": lambda: setattr(flow_matching, "velocity", lambda latents, noise: latents - noise),
    "timestep scale": lambda: setattr(flow_matching, "timestep_of", lambda sigma: sigma),
    "shift applied backwards": lambda: setattr(flow_matching, "shift_sigma", _shift_backwards),
    "timestep rows swapped": lambda: setattr(objective, "predict_velocity", _rows_swapped),
    "first frame late": lambda: setattr(Objective, "_inputs", _first_frame_late(Objective._inputs)),
    "mask all four": lambda: setattr(encode, "given_frames_mask", _mask_all_four),
    "mask inverted": lambda: setattr(encode, "given_frames_mask", _mask_inverted),
    "normalisation": lambda: setattr(Encoders, "normalise", lambda self, latents: latents.float()),
}

if __name__ == "__main__":
    breakage, config = sys.argv[-2:]
    BREAKAGES[breakage]()
    sys.argv = ["wan-dist", "train", config]
    from wan_dist.__main__ import main

    main()

"""Train the tiny 48-channel VAE that the package ships for the ti2v-5B tiny pipeline.

It is diffusers' `AutoencoderKLWan` with the switches of the WAN 2.2 5B VAE and few channels, trained on random
moving shapes. Rerun it only to replace the asset:

    python tools/train_tiny_vae.py --out wan_dist/models/wan/assets/tiny_vae_48 --minutes 30
"""

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from wan_dist.data.shapes import SHAPE_COLOURS, SHAPES, draw_clips, draw_random_clip

logger = logging.getLogger("train_tiny_vae")

# The switches of the real 5B VAE (diffusers scripts/convert_wan_to_diffusers.py, vae22) with narrow layers;
# 1.3 M parameters, 2.7 MB in fp16.
TINY_CONFIG = {
    "base_dim": 16,
    "decoder_base_dim": 24,
    "z_dim": 48,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}

# (clips, frames, height, width), about 0.4 s a step on one core. Pictures come first: they teach colour and outline
# to the same weights for a third of the cost, and videos alone had not learned colours after 400 steps.
PICTURE_SHAPES = ((16, 1, 48, 48), (8, 1, 64, 64), (4, 1, 96, 96))
VIDEO_SHAPES = ((2, 9, 64, 64), (2, 9, 64, 64), (4, 5, 64, 64), (1, 9, 96, 96))
PICTURE_SHARE = 0.35

STD_FLOOR = 0.25
"""Least latents_std as a share of the largest: a channel that the KL term switched off stays near zero
when normalised instead of becoming unit noise that a diffusion model would have to learn."""


def main() -> None:
    """Train until the time is up, then write the asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished VAE")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_vae"), help="folder of checkpoints")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="CPU time of training; the learning rate ends at zero"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--kl-weight", type=float, default=1e-4, help="weight of the mean KL per latent value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--continue", dest="resume", action="store_true", help="go on from the checkpoint in --work")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train(args)
    write_asset(vae, args.out)


def train(args: argparse.Namespace) -> AutoencoderKLWan:
    """Return the trained VAE, float32, latents_mean and latents_std not yet set."""
    vae = AutoencoderKLWan(**TINY_CONFIG)
    # Latents begin almost free of noise; at the default unit variance the first thousand steps learn only backgrounds.
    with torch.no_grad():
        _, logvar_bias = vae.quant_conv.bias.chunk(2)  # pyright: ignore[reportOptionalMemberAccess]
        logvar_bias.fill_(-6.0)
        # RMS norm keeps only the direction of the channels: beside small biases, dark and light grey are the same.
        for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
            torch.nn.init.normal_(conv.bias, std=0.5)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    step, used_s, checkpoint_path = 0, 0.0, args.work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint_path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, used_s = state["step"], state["used_s"]
    rng = np.random.default_rng([args.seed, step])
    started, saved, total_s = time.process_time() - used_s, time.monotonic(), args.minutes * 60
    sums = torch.zeros(3)
    while (used_s := time.process_time() - started) < total_s:
        lr = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * used_s / total_s))
        for group in optimizer.param_groups:
            group["lr"] = max(lr, 1e-5)
        loss, parts = reconstruction_loss(vae, draw_batch(rng, used_s < PICTURE_SHARE * total_s), args.kl_weight)
        sums = sums + parts
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            l1, mse, kl = (sums / 50).tolist()
            psnr = 10 * math.log10(4.0 / mse)
            logger.info("step %d  %.0f s  lr %.1e  l1 %.4f  psnr %.1f dB  kl %.2f", step, used_s, lr, l1, psnr, kl)
            sums = torch.zeros(3)
        if time.monotonic() - saved > 60:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used_s": used_s}
            torch.save(state, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)
            saved = time.monotonic()
    return vae


def draw_batch(rng: np.random.Generator, pictures: bool) -> Tensor:
    """Return random shapes, [B, 3, F, H, W] in [-1, 1], moving over F frames or as pictures, F = 1."""
    choices = PICTURE_SHAPES if pictures else VIDEO_SHAPES
    num_clips, *size = choices[rng.integers(len(choices))]
    return to_video(np.stack([draw_clip(rng, *size) for _ in range(num_clips)]))


def draw_clip(rng: np.random.Generator, num_frames: int, height: int, width: int) -> np.ndarray:
    """Return one clip, uint8 [F, H, W, 3]: half the time of the quickstart's kind, moved about, else anything."""
    if rng.random() < 0.5:
        return draw_random_clip(rng, num_frames, height, width)
    colour, shape = str(rng.choice(list(SHAPE_COLOURS))), str(rng.choice(SHAPES))
    clips = draw_clips(num_frames, height, width, colours=(colour,), shapes=(shape,))
    # The plain background makes a roll a shift; the shape stays inside for nearly all of it.
    shift_px = rng.integers(-height // 8, height // 8 + 1), rng.integers(-width // 8, width // 8 + 1)
    return np.roll(clips[rng.integers(len(clips))].frames, shift_px, axis=(1, 2))


def to_video(clips: np.ndarray) -> Tensor:
    """Return [B, 3, F, H, W] in [-1, 1] from uint8 [B, F, H, W, 3]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def reconstruction_loss(vae: AutoencoderKLWan, video: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Return L1 + 2 MSE + weighted KL of a batch, and the parts [L1, MSE, KL] for the log.

    Args:
        vae: the model.
        video: [B, 3, F, H, W] in [-1, 1].
        kl_weight: weight of the KL to a unit normal, averaged over latent values.
    """
    posterior = encode(vae, video)
    error = decode_unclamped(vae, posterior.sample()) - video
    l1, mse = error.abs().mean(), error.square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return l1 + 2.0 * mse + kl_weight * kl, torch.stack([l1, mse, kl]).detach()


def encode(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """Return the posterior of [B, 3, F, H, W] videos in [-1, 1]."""
    return vae.encode(video, return_dict=False)[0]  # pyright: ignore[reportReturnType]


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return decoded videos, [B, 3, F, H, W], without `AutoencoderKLWan.decode`'s clamp to [-1, 1].

    The clamp has no gradient outside, so pixels that overshoot would never come back; training with it stalled
    at 14 dB.

    Args:
        vae: the model.
        latents: [B, 48, f, h, w].
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frame = hidden[:, :, index : index + 1]
        chunks.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), patch_size=TINY_CONFIG["patch_size"])


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan) -> tuple[list[float], list[float]]:
    """Return mean and floored standard deviation of each latent channel over the captioned clips."""
    latents = []
    for num_frames, size in ((9, 96), (9, 64)):
        clips = draw_clips(num_frames, size, size, colours=tuple(SHAPE_COLOURS), shapes=SHAPES)
        for first in range(0, len(clips), 8):
            video = to_video(np.stack([clip.frames for clip in clips[first : first + 8]]))
            latents.append(encode(vae, video).mode().transpose(0, 1).flatten(1))
    values = torch.cat(latents, dim=1)
    std = values.std(dim=1)
    return values.mean(dim=1).tolist(), std.clamp(min=STD_FLOOR * std.max().item()).tolist()


def write_asset(vae: AutoencoderKLWan, out_dir: Path) -> None:
    """Write the VAE in diffusers' layout, fp16, with its latent statistics in the config."""
    vae.eval()
    mean, std = latent_statistics(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.half().save_pretrained(out_dir)
    logger.info("wrote %s, latent std %.3f to %.3f", out_dir, min(std), max(std))


if __name__ == "__main__":
    main()

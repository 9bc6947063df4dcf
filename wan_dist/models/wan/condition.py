"""What i2v-A14B is told about the given frames: 4 mask channels and the frames' latents, 20 in all; and loss masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES_PER_LATENT = 4


def condition_video(video: Tensor, with_last: Sequence[bool]) -> Tensor:
    """Return the given frames and zeros, [B, 3, F, H, W] in [-1, 1]; zero is grey there, as the model expects.

    Args:
        video: [B, 3, F, H, W] in [-1, 1].
        with_last: of each sample, whether its last frame is given beside the first.
    Source: `wan/image2video.py` of the official repository; diffusers `WanImageToVideoPipeline.prepare_latents`.
    """
    condition = torch.zeros_like(video)
    condition[:, :, :1] = video[:, :, :1]
    for sample, last in enumerate(with_last):
        if last:
            condition[sample, :, -1] = video[sample, :, -1]
    return condition


def given_frames_mask(num_frames: int, height: int, width: int, *, with_last: bool = False) -> Tensor:
    """Return which pixel frames are given, one channel per frame of a latent, [4, f, h, w] fp32, 1 where given.

    The VAE makes the first latent from one frame and every further one from four; the first frame's mask therefore
    stands four times in front, and a given last frame is the last of its latent's four: [0, 0, 0, 1].

    Args:
        num_frames: F, 4n+1.
        height: h, in latents.
        width: w, in latents.
        with_last: the last frame is given too.
    Source: as `condition_video`.
    """
    mask = torch.zeros(num_frames + FRAMES_PER_LATENT - 1, height, width)
    mask[:FRAMES_PER_LATENT] = 1.0
    if with_last:
        mask[-1] = 1.0
    return mask.view(-1, FRAMES_PER_LATENT, height, width).transpose(0, 1).contiguous()


def latent_mask(frames: Tensor, num_frames: int, stride: tuple[int, int]) -> Tensor:
    """Return how much of each latent the mask covers, [1, f, h, w] fp32 in [0, 1].

    The mean over the pixels that a latent stands for: one frame for the first, four for every further one.

    Args:
        frames: [F, H, W, 3] uint8, white where the clip counts; one frame stands for all.
        num_frames: F of the clip, 4n+1.
        stride: pixels per latent (frames; height and width).
    """
    grey = frames.float().mean(dim=-1) / 255.0
    pooled = F.avg_pool2d(grey[:, None], stride[1])[:, 0]
    first, rest = pooled[:1], pooled[1:]
    num_further = (num_frames - 1) // stride[0]
    if len(pooled) == 1:
        return first.expand(1 + num_further, -1, -1)[None].contiguous()
    return torch.cat([first, rest.unflatten(0, (num_further, stride[0])).mean(dim=1)])[None].contiguous()

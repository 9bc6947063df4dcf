"""What i2v-A14B is told about the given first frame: 4 mask channels and the frame's latents, 20 in all."""

import torch
from torch import Tensor

FRAMES_PER_LATENT = 4


def condition_video(video: Tensor) -> Tensor:
    """Return the first frame followed by zeros, [B, 3, F, H, W] in [-1, 1]; zero is grey there, as the model expects.

    Args:
        video: [B, 3, F, H, W] in [-1, 1].
    Source: `wan/image2video.py` of the official repository; diffusers `WanImageToVideoPipeline.prepare_latents`.
    """
    condition = torch.zeros_like(video)
    condition[:, :, :1] = video[:, :, :1]
    return condition


def first_frame_mask(num_frames: int, height: int, width: int) -> Tensor:
    """Return which pixel frames are given, one channel per frame of a latent, [4, f, h, w] fp32, 1 where given.

    The VAE makes the first latent from one frame and every further one from four; the first frame's mask therefore
    stands four times in front.

    Args:
        num_frames: F, 4n+1.
        height: h, in latents.
        width: w, in latents.
    Source: as `condition_video`.
    """
    mask = torch.zeros(num_frames + FRAMES_PER_LATENT - 1, height, width)
    mask[:FRAMES_PER_LATENT] = 1.0
    return mask.view(-1, FRAMES_PER_LATENT, height, width).transpose(0, 1).contiguous()

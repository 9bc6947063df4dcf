"""Read samples into what the transformer sees, from a cache or by the encoders, kept in memory for the next time."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import NotFiniteError
from wan_dist.core.rng import uniform
from wan_dist.data.cached import padded
from wan_dist.data.encode import Encoders
from wan_dist.data.memory_cache import MemoryCache
from wan_dist.models.wan.condition import latent_mask


class ReadSample(NamedTuple):
    """One sample as the reader threads leave it.

    Attributes:
        position: where it stands in its bucket's endless stream.
        key: the clip's key.
        prompt: caption or empty.
        cache_key: names exactly the pixels.
        frames: [F, H, W, 3]; None where its latents are cached.
        problems: what was wrong with the samples that it replaces.
        loss_weight: what its loss is multiplied by.
        with_last: its last frame is given beside the first.
        latents: tensors of a latents family; None where there are none.
        text: [L, D] of a text family; None likewise.
        mask: [1, f, h, w] fp32 in [0, 1] on the CPU, how much of each latent counts; None where all do.
        is_prior: the target is what the model gives without its adapters.
    """

    position: int
    key: str
    prompt: str
    cache_key: str
    frames: NDArray[np.uint8] | None
    problems: tuple[str, ...]
    loss_weight: float
    with_last: bool = False
    latents: dict[str, Tensor] | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    is_prior: bool = False


class SampleEncoder:
    """Latents, condition and text of samples. `parts`, `draw_last` and `knows` may be called from several threads.

    Attributes:
        encoders: the VAE and the text encoder.
        with_condition: i2v-A14B's condition is wanted too.
    """

    def __init__(
        self, encoders: Encoders, *, with_condition: bool, flf2v_probability: float, seed: int, cache_bytes: int
    ) -> None:
        """Prepare.

        Args:
            encoders: VAE and text encoder.
            with_condition: encode the given frames too, as i2v-A14B needs.
            flf2v_probability: share of samples, of more than one frame, whose last frame is given beside the first.
            seed: seed of all per-sample randomness.
            cache_bytes: host memory for encoded latents, and as much again for text.
        """
        self.encoders, self.with_condition = encoders, with_condition
        self._flf2v_probability, self._seed = flf2v_probability, seed
        self._latents, self._text = MemoryCache(cache_bytes), MemoryCache(cache_bytes)

    def draw_last(self, shape: Bucket, bucket: int, position: int) -> bool:
        """Return whether the last frame of the sample at `position` is given too.

        Args:
            shape: the shape of its frames.
            bucket: number of its bucket.
            position: where it stands there.
        """
        if not self.with_condition or shape.num_frames == 1:
            return False
        return uniform(self._seed, "flf2v", bucket, position) < self._flf2v_probability

    def parts(self, with_last: bool) -> tuple[str, ...]:
        """Return the names of the cached tensors that a sample needs."""
        if not self.with_condition:
            return ("latents",)
        return ("latents", "condition_last" if with_last else "condition")

    def knows(self, cache_key: str, with_last: bool) -> bool:
        """Return whether the latents of these pixels are in memory, so that nothing need be decoded."""
        return self._latents.get(_memory_key(cache_key, with_last)) is not None

    def latents(self, sample: ReadSample) -> Tensor | None:
        """Return latents and, behind them, the channels of the condition, [C, f, h, w] fp32 on the device.

        None where memory has dropped them since the sample was read without its frames.

        Raises:
            NotFiniteError: the VAE gave NaN or infinity.
        """
        if sample.latents is not None:
            return self._normalised(sample.latents, sample.with_last)
        memory_key = _memory_key(sample.cache_key, sample.with_last)
        known = self._latents.get(memory_key)
        if known is None:
            if sample.frames is None:
                return None
            parts = [self.encoders.encode_video(sample.frames[None])]
            if self.with_condition:
                parts.append(self.encoders.encode_condition(sample.frames[None], [sample.with_last]))
            known = torch.cat(parts, dim=1)[0].cpu()
            check_finite(known, f"sample {sample.key}: the VAE")
            self._latents.put(memory_key, known)
        return known.to(self.encoders.device)

    def mask(self, cache_key: str, read: Callable[[], NDArray[np.uint8] | None], num_frames: int) -> Tensor | None:
        """Return how much of each latent a clip's mask covers, [1, f, h, w] fp32 on the CPU.

        Args:
            cache_key: names exactly the pixels of the clip.
            read: gives the mask's frames.
            num_frames: of the clip, 4n+1.
        """
        key = f"{cache_key}+mask"
        known = self._latents.get(key)
        if known is None and (frames := read()) is not None:
            known = latent_mask(torch.from_numpy(frames), num_frames, self.encoders.stride)
            self._latents.put(key, known)
        return known

    def text(self, sample: ReadSample) -> Tensor:
        """Return the prompt's embedding, [512, D] on the device.

        Raises:
            NotFiniteError: the text encoder gave NaN or infinity.
        """
        if sample.text is not None:
            return padded(sample.text).to(self.encoders.device)
        known = self._text.get(sample.prompt)
        if known is None:
            known = self.encoders.encode_prompts([sample.prompt])[0].cpu()
            check_finite(known, f"sample {sample.key}: the text encoder")
            self._text.put(sample.prompt, known)
        return known.to(self.encoders.device)

    def _normalised(self, stored: dict[str, Tensor], with_last: bool) -> Tensor:
        """Return what `latents` gives, from cached posterior means."""
        means = [stored[part][None].to(self.encoders.device) for part in self.parts(with_last)]
        conditions = [self.encoders.with_mask(mean, [with_last]) for mean in means[1:]]
        return torch.cat([self.encoders.normalise(means[0]), *conditions], dim=1)[0]


def check_finite(encoded: Tensor, what: str) -> None:
    """Return if a tensor holds neither NaN nor infinity.

    Raises:
        NotFiniteError: it does; the message says what made it.
    """
    if not bool(torch.isfinite(encoded).all()):
        raise NotFiniteError(
            f"{what} gave NaN or infinity; look at the clip, and at the model's weights if others fail too."
        )


def _memory_key(cache_key: str, with_last: bool) -> str:
    return f"{cache_key}+last" if with_last else cache_key

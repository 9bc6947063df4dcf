"""From the sample order to encoded batches: one bucket per micro-step, the same samples for any number of ranks."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_dist.core.errors import DataError, NotFiniteError, StorageError
from wan_dist.core.order import Block, SampleOrder
from wan_dist.core.rng import seed_of, uniform
from wan_dist.data.cached import CachedSamples
from wan_dist.data.clips import ClipDataset
from wan_dist.data.encode import Encoders
from wan_dist.data.sample_encoder import ReadSample, SampleEncoder
from wan_dist.data.samples import draw_sample

logger = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 8
_MIN_READ_BEFORE_ABORT = 20


@dataclass(frozen=True)
class Batch:
    """One micro-step of one rank.

    Attributes:
        keys: clip keys, B of them.
        bucket: number of the bucket that all share.
        positions: where each sample stands in its bucket's endless stream; all its randomness is keyed by this.
        latents: [B, C, f, h, w] fp32, normalised, on the device.
        text_embeds: [B, 512, D] on the device.
        condition: [B, 20, f, h, w] fp32 on the device for i2v-A14B, None for the other variants.
        loss_weights: [B] fp32 on the device, what each sample's loss is multiplied by; None where all are 1.
        loss_mask: [B, 1, f, h, w] fp32 in [0, 1] on the device, how much of each latent counts; None where all do.
        prior: B of them, whose target is what the model gives without its adapters; empty where there are none.
    """

    keys: tuple[str, ...]
    bucket: int
    positions: tuple[int, ...]
    latents: Tensor
    text_embeds: Tensor
    condition: Tensor | None
    loss_weights: Tensor | None = None
    loss_mask: Tensor | None = None
    prior: tuple[bool, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Transformer tokens of all samples: latents in patches of 1 x 2 x 2."""
        num_samples, _, frames, height, width = self.latents.shape
        return num_samples * frames * (height // 2) * (width // 2)


class ClipBatches:
    """Reads, decodes and encodes this rank's share of every block, reading ahead in threads.

    Attributes:
        num_read: samples read for the batches so far, replaced ones included.
        bad_samples: what was wrong with those that could not be read and were replaced.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        encoders: Encoders,
        order: SampleOrder,
        *,
        with_condition: bool,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        seed: int,
        caption_dropout: float,
        num_workers: int,
        cache_bytes: int,
        max_bad_fraction: float,
        cached: CachedSamples | None = None,
        flf2v_probability: float = 0.0,
        with_masks: bool = False,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: opened shards.
            encoders: VAE and text encoder.
            order: sample order whose block is one optimizer step.
            with_condition: encode the given frames too, as i2v-A14B needs.
            rank: this rank among those that see different samples.
            world_size: number of such ranks; with the micro-batch it must divide the block.
            micro_batch_size: clips per forward pass.
            seed: seed of all per-sample randomness.
            caption_dropout: share of samples whose prompt is emptied.
            num_workers: reader threads; 0 reads in the caller.
            cache_bytes: host memory for encoded latents, and as much again for text.
            max_bad_fraction: share of unreadable samples at which reading fails.
            cached: latents or text embeddings that are read instead of encoded; None encodes both.
            flf2v_probability: share of samples whose last frame is given beside the first, with `with_condition`.
            with_masks: read the masks of clips that have one.
        """
        if order.block_size % (world_size * micro_batch_size):
            raise ValueError(f"block of {order.block_size} does not divide by {world_size} x {micro_batch_size}")
        self._dataset, self._order = dataset, order
        self._encoder = SampleEncoder(
            encoders,
            with_condition=with_condition,
            flf2v_probability=flf2v_probability,
            seed=seed,
            cache_bytes=cache_bytes,
        )
        self._rank, self._world_size, self._micro = rank, world_size, micro_batch_size
        self._seed, self._caption_dropout = seed, caption_dropout
        self._max_bad_fraction = max_bad_fraction
        self._cached, self._with_masks = cached, with_masks
        self._pool = ThreadPoolExecutor(num_workers, "read-clips") if num_workers else None
        self.num_read = 0
        self.bad_samples: list[str] = []

    def close(self) -> None:
        """End the reader threads and the decoder's processes."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._dataset.close()

    def steps(self, epoch: int, block: int) -> Iterator[tuple[Block, Iterator[Batch]]]:
        """Yield, endlessly from a state, each block with this rank's micro-batches of it, read one block ahead.

        Raises:
            DataError: too many samples could not be read.
        """
        ahead: deque[tuple[Block, list[Future[ReadSample]]]] = deque()
        for following in self._order.blocks(epoch, block):
            ahead.append((following, self._submit(following)))
            if len(ahead) > 1:
                current, futures = ahead.popleft()
                yield current, self._batches(current, futures)

    def _submit(self, block: Block) -> list[Future[ReadSample]]:
        share = self._order.block_size // self._world_size
        first = block.first + self._rank * share
        return [self._start(block.bucket, position) for position in range(first, first + share)]

    def _start(self, bucket: int, position: int) -> Future[ReadSample]:
        if self._pool:
            return self._pool.submit(self._read, bucket, position)
        future: Future[ReadSample] = Future()
        try:
            future.set_result(self._read(bucket, position))
        except Exception as error:  # handed to whoever asks for the result, as a thread would
            future.set_exception(error)
        return future

    def _read(self, bucket: int, position: int) -> ReadSample:
        """Read the sample at `position`, or a replacement that depends on the position only."""
        problems: list[str] = []
        for attempt in range(_MAX_SUBSTITUTES):
            place = position if attempt == 0 else seed_of(self._seed, "substitute", bucket, position, attempt) % 2**40
            try:
                sample = self._read_exactly(bucket, position, place)
            except (StorageError, NotFiniteError):
                raise  # the sample is not at fault: another run would read it, or others fail too
            except DataError as error:
                problems.append(str(error))
                logger.warning("replaced an unreadable sample: %s", error)
            else:
                return sample._replace(problems=tuple(problems))
        raise DataError(
            f"bucket {bucket}: {_MAX_SUBSTITUTES} samples in a row could not be read; check the shards. "
            f"The last: {problems[-1]}"
        )

    def _read_exactly(self, bucket: int, position: int, place: int) -> ReadSample:
        ref = self._order.at(bucket, place)
        row = self._dataset.row_of(bucket, ref.shard, ref.index)
        weight, is_prior = self._dataset.loss_weight(ref.shard), self._dataset.is_prior(ref.shard)
        last = self._encoder.draw_last(self._dataset.buckets[bucket], bucket, position)
        latents, text = self._read_cached(bucket, position, ref.shard, row, self._encoder.parts(last))
        has_mask = self._with_masks and self._dataset.has_mask(ref.shard, row)
        mask = latents.pop("mask").float() if latents is not None and "mask" in latents else None
        if self._cached and latents is not None and text is not None:
            key = self._cached.key_of(ref.shard, row)
            return ReadSample(position, key, "", "", None, (), weight, last, latents, text, mask, is_prior)
        clip, prompt = draw_sample(
            self._dataset,
            ref,
            bucket=bucket,
            position=position,
            seed=self._seed,
            caption_dropout=self._caption_dropout,
        )
        known = latents is not None or self._encoder.knows(clip.cache_key, last)
        frames = None if known else self._dataset.frames(clip)
        if has_mask and mask is None:
            mask = self._encoder.mask(clip.cache_key, lambda: self._dataset.mask(clip), clip.bucket.num_frames)
        return ReadSample(
            position, clip.key, prompt, clip.cache_key, frames, (), weight, last, latents, text, mask, is_prior
        )

    def _read_cached(
        self, bucket: int, position: int, shard: int, row: int, parts: Sequence[str]
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """Return what is cached of a sample; its draws are those of `draw_sample`."""
        cached, latents, text = self._cached, None, None
        if cached and cached.has_latents:
            masks = ("mask",) if self._with_masks and self._dataset.has_mask(shard, row) else ()
            latents = cached.read_latents(shard, row, self._dataset.buckets[bucket], (*parts, *masks))
        if cached and cached.has_text:
            if uniform(self._seed, "caption_dropout", bucket, position) < self._caption_dropout:
                text = cached.empty_text
            else:
                text = cached.read_text(shard, row, uniform(self._seed, "caption", bucket, position))
        return latents, text

    def _batches(self, block: Block, futures: Sequence[Future[ReadSample]]) -> Iterator[Batch]:
        for start in range(0, len(futures), self._micro):
            samples = [future.result() for future in futures[start : start + self._micro]]
            self._count(samples)
            # One tensor per clip: its latents and, behind them, the channels of its condition.
            encoded = torch.stack([self._encoded(block.bucket, s) for s in samples])
            num_channels = self._encoder.encoders.latents_mean.shape[1]
            yield Batch(
                keys=tuple(s.key for s in samples),
                bucket=block.bucket,
                positions=tuple(s.position for s in samples),
                latents=encoded[:, :num_channels],
                text_embeds=torch.stack([self._encoder.text(s) for s in samples]),
                condition=encoded[:, num_channels:] if self._encoder.with_condition else None,
                loss_weights=self._loss_weights(block, samples),
                loss_mask=self._loss_mask(samples, encoded),
                prior=tuple(s.is_prior for s in samples) if any(s.is_prior for s in samples) else (),
            )

    def _loss_mask(self, samples: Sequence[ReadSample], encoded: Tensor) -> Tensor | None:
        """Return how much each latent counts, [B, 1, f, h, w]; None where no sample has a mask."""
        if all(s.mask is None for s in samples):
            return None
        whole = torch.ones(1, *encoded.shape[2:])
        return torch.stack([whole if s.mask is None else s.mask for s in samples]).to(encoded.device)

    def _loss_weights(self, block: Block, samples: Sequence[ReadSample]) -> Tensor | None:
        """Return what each sample weighs, [B]; None where all weigh 1."""
        num_real = self._order.block_size - block.num_padding
        # The mean over a padded block is then the mean over its real samples, on any number of ranks.
        scale = self._order.block_size / num_real
        weights = [s.loss_weight * scale if s.position < block.first + num_real else 0.0 for s in samples]
        return None if set(weights) == {1.0} else torch.tensor(weights, device=self._encoder.encoders.device)

    def _count(self, samples: Sequence[ReadSample]) -> None:
        # Counted here and not by the reader threads: the sums depend on the samples used and on no timing.
        for sample in samples:
            self.num_read += 1 + len(sample.problems)
            self.bad_samples.extend(sample.problems)
        num_bad = len(self.bad_samples)
        if self.num_read >= _MIN_READ_BEFORE_ABORT and num_bad > self._max_bad_fraction * self.num_read:
            raise DataError(
                f"{num_bad} of {self.num_read} samples could not be read (data.max_bad_fraction = "
                f"{self._max_bad_fraction}); the last: {self.bad_samples[-1]}"
            )

    def _encoded(self, bucket: int, sample: ReadSample) -> Tensor:
        encoded = self._encoder.latents(sample)
        if encoded is None:  # dropped from memory between reading ahead and now
            return self._encoded(bucket, self._read(bucket, sample.position))
        return encoded

"""From a stream of clips to encoded batches: one bucket per micro-step, whatever comes first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import DataError
from wan_dist.core.order import Block
from wan_dist.core.rng import seed_of
from wan_dist.data.batching import Batch
from wan_dist.data.encode import Encoders
from wan_dist.data.sample_encoder import SampleEncoder, check_finite
from wan_dist.data.stream import ClipStream, StreamedClip, draw_streamed

_MIN_READ_BEFORE_ABORT = 20


class _Ready(NamedTuple):
    """The decoded clips of one micro-step."""

    bucket: int
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    prompts: tuple[str, ...]
    frames: NDArray[np.uint8]


class StreamBatches:
    """Reads this rank's share of a stream, one block ahead.

    Clips wait in their buckets until one has a micro-batch. A block's number counts optimizer steps; it is all that a
    resumed run takes over, and starts a new order of the tars.

    Attributes:
        num_read: clips decoded so far.
        bad_samples: what was wrong with those that could not be decoded and were left out.
    """

    def __init__(
        self,
        stream: ClipStream,
        encoders: Encoders,
        *,
        with_condition: bool,
        rank: int,
        world_size: int,
        block_size: int,
        micro_batch_size: int,
        seed: int,
        caption_dropout: float,
        max_bad_fraction: float,
        flf2v_probability: float = 0.0,
    ) -> None:
        """Prepare; nothing is read yet. Arguments as of `ClipBatches`; `block_size` is the global batch."""
        self._stream, self._encoders = stream, encoders
        self._encoder = SampleEncoder(
            encoders,
            with_condition=with_condition,
            flf2v_probability=flf2v_probability,
            seed=seed,
            cache_bytes=0,
        )
        self._rank, self._world_size = rank, world_size
        self._block_size, self._micro = block_size, micro_batch_size
        self._seed, self._caption_dropout = seed, caption_dropout
        self._max_bad_fraction = max_bad_fraction
        self._pool = ThreadPoolExecutor(1, "stream-clips")
        self.num_read = 0
        self.bad_samples: list[str] = []

    def close(self) -> None:
        """End the reader thread and the decoder's processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stream.close()

    def steps(self, epoch: int, block: int) -> Iterator[tuple[Block, Iterator[Batch]]]:
        """Yield, endlessly from a state, each block with this rank's micro-batches of it.

        Raises:
            DataError: no clip can be used, or too many could not be decoded.
        """
        ready = self._ready(block)
        ahead = self._pool.submit(self._take_block, ready)
        while True:
            taken = ahead.result()
            ahead = self._pool.submit(self._take_block, ready)
            first = block * self._block_size
            yield Block(epoch, block, taken[0].bucket, first), (self._encode(micro) for micro in taken)
            block += 1

    def _take_block(self, ready: Iterator[_Ready]) -> list[_Ready]:
        return [next(ready) for _ in range(self._block_size // self._world_size // self._micro)]

    def _ready(self, block: int) -> Iterator[_Ready]:
        share = self._block_size // self._world_size
        count = 0
        waiting: dict[int, list[tuple[StreamedClip, NDArray[np.uint8], int, str]]] = {}
        for clip in self._stream.clips(self._rank, self._world_size, seed_of(self._seed, "stream", block)):
            step, place = divmod(count, share)
            position = (block + step) * self._block_size + self._rank * share + place
            window, prompt = draw_streamed(clip, self._seed, position, self._caption_dropout)
            frames = self._decode(clip, *window)
            if frames is None:
                continue
            count += 1
            full = waiting.setdefault(clip.bucket, [])
            full.append((clip, frames, position, prompt))
            if len(full) == self._micro:
                del waiting[clip.bucket]
                yield _Ready(
                    clip.bucket,
                    tuple(c.key for c, _, _, _ in full),
                    tuple(p for _, _, p, _ in full),
                    tuple(text for _, _, _, text in full),
                    np.stack([f for _, f, _, _ in full]),
                )

    def _decode(self, clip: StreamedClip, choice: float, crop_xy: tuple[float, float]) -> NDArray[np.uint8] | None:
        self.num_read += 1
        try:
            return self._stream.frames(clip, choice, crop_xy)
        except DataError as error:
            self.bad_samples.append(str(error))
        num_bad = len(self.bad_samples)
        if self.num_read >= _MIN_READ_BEFORE_ABORT and num_bad > self._max_bad_fraction * self.num_read:
            raise DataError(
                f"{num_bad} of {self.num_read} samples could not be read (data.max_bad_fraction = "
                f"{self._max_bad_fraction}); the last: {self.bad_samples[-1]}"
            )
        return None

    def _encode(self, micro: _Ready) -> Batch:
        shape = self._stream.buckets[micro.bucket]
        condition = None
        if self._encoder.with_condition:
            last = [self._encoder.draw_last(shape, micro.bucket, position) for position in micro.positions]
            condition = self._encoders.encode_condition(micro.frames, last)
        batch = Batch(
            keys=micro.keys,
            bucket=micro.bucket,
            positions=micro.positions,
            latents=self._encoders.encode_video(micro.frames),
            text_embeds=self._encoders.encode_prompts(micro.prompts),
            condition=condition,
        )
        check_finite(batch.latents, f"samples {', '.join(batch.keys)}: the VAE")
        check_finite(batch.text_embeds, f"samples {', '.join(batch.keys)}: the text encoder")
        return batch

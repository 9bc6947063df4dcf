"""What is left to chance about a training sample: its window in time, its crop, its caption."""

from wan_dist.core.order import SampleRef
from wan_dist.core.rng import uniform
from wan_dist.data.clips import ClipDataset, LocatedClip


def draw_sample(
    dataset: ClipDataset, ref: SampleRef, *, bucket: int, position: int, seed: int, caption_dropout: float
) -> tuple[LocatedClip, str]:
    """Return a clip as it is trained on at `position`, not yet decoded, and its prompt.

    Args:
        dataset: opened shards.
        ref: where the sample lies.
        bucket: number of its bucket.
        position: where it stands in the bucket's endless stream; every draw depends on this and on the seed only.
        seed: seed of all per-sample randomness.
        caption_dropout: share of samples whose prompt is emptied.
    Raises:
        DataError: its captions cannot be read.
    """

    def draw(purpose: str) -> float:
        return uniform(seed, purpose, bucket, position)

    clip = dataset.locate(bucket, ref.shard, ref.index, choice=draw("frames"), crop_xy=(draw("crop_x"), draw("crop_y")))
    prompt = clip.captions[int(draw("caption") * len(clip.captions))]
    return clip, "" if draw("caption_dropout") < caption_dropout else prompt

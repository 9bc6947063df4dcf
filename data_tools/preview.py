"""`wan-data preview`: what the trainer sees of given clips."""

from pathlib import Path
from typing import Annotated

import typer

from data_tools.contact_sheet import contact_sheet
from wan_dist.config.load import load_config
from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import ConfigError, DataError
from wan_dist.core.order import SampleOrder, SampleRef
from wan_dist.core.words import counted
from wan_dist.data.clips import ClipDataset, LocatedClip
from wan_dist.data.samples import draw_sample
from wan_dist.sample.video import write_mp4
from wan_dist.train.build_data import open_dataset, sample_order


def preview(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or URL of packed shards.")],
    config: Annotated[Path, typer.Option(help="Training config that says what the trainer sees.")],
    keys: Annotated[str, typer.Option(help="Keys of the clips, joined by commas.")],
    out: Annotated[Path, typer.Option(help="Contact sheet (.png) or video (.mp4, one for each key).")],
    epoch: Annotated[int, typer.Option(min=0, help="Epoch whose random window, crop and caption are shown.")] = 0,
) -> None:
    """Write exactly the frames that training decodes for some clips, with caption and the time of every frame.

    Example: `wan-data preview shards/ --config train.yaml --keys clip_1,clip_2 --out sheet.png`
    """
    if out.suffix not in (".png", ".mp4"):
        raise ConfigError(f"--out {out}: use a name that ends in .png or .mp4.")
    cfg = load_config(config, [f"data.shards={shards}"])
    dataset = open_dataset(cfg)
    try:
        order = sample_order(cfg, dataset)
        wanted = [key for key in keys.split(",") if key]
        shown = [(key, *_drawn(cfg, dataset, order, key, epoch)) for key in wanted]
        if out.suffix == ".png":
            rows = [(_title(c, prompt), dataset.frames(c), dataset.frame_times(c)) for _, c, prompt in shown]
            contact_sheet(rows).save(out)
            typer.echo(f"{out}: {counted(len(rows), 'clip')}")
            return
        for key, clip, prompt in shown:
            path = out if len(shown) == 1 else out.with_name(f"{out.stem}-{key}.mp4")
            write_mp4(path, dataset.frames(clip), clip.fps)
            typer.echo(f"{path}: {_title(clip, prompt)}")
    finally:
        dataset.close()


def _title(clip: LocatedClip, prompt: str) -> str:
    shape = f"{clip.bucket.width}x{clip.bucket.height}, {clip.bucket.num_frames} frames at {clip.fps:g} fps"
    return f"{clip.key}: {shape}: {prompt or '(empty prompt: caption dropout)'}"


def _drawn(cfg: TrainConfig, dataset: ClipDataset, order: SampleOrder, key: str, epoch: int) -> tuple[LocatedClip, str]:
    """Return a clip and its prompt as they are drawn where the clip stands in an epoch of its bucket."""
    bucket, shard, index = dataset.find(key)
    position = _position(order, bucket, shard, index, epoch)
    return draw_sample(
        dataset,
        SampleRef(epoch, shard, index),
        bucket=bucket,
        position=position,
        seed=cfg.train.seed,
        caption_dropout=cfg.data.caption_dropout,
    )


def _position(order: SampleOrder, bucket: int, shard: int, index: int, epoch: int) -> int:
    num_samples = int(order.samples_per_epoch()[bucket])
    for position in range(epoch * num_samples, (epoch + 1) * num_samples + 1):
        ref = order.at(bucket, position)
        if (ref.shard, ref.index) == (shard, index):
            return position
    raise DataError(f"epoch {epoch} does not come to this clip; try another --epoch.")

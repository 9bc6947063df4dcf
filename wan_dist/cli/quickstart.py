"""`wan-dist quickstart`: clips in, trained video out, by the same commands that real training uses."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wan_dist.data.shapes import ShapeClip

EPILOG = "Example: wan-dist quickstart --out quickstart"

_NUM_PROMPTS = 8
_MARKER = ".quickstart"  # only a folder that a quickstart made is deleted by --restart
_INFERENCE_STEPS = 30


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to make; everything lies in it.")] = Path("quickstart"),
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="Ranks; CPU ranks without GPUs.")] = 2,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier quickstart in --out first.")] = False,
) -> None:
    """Draw clips, pack them, train a tiny WAN 2.2 on 2 ZeRO-3 ranks, export it, sample videos; under 5 minutes."""
    from wan_dist.config.resources import configs_dir
    from wan_dist.core.errors import ConfigError

    if restart and (out / _MARKER).is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is not an empty folder; choose another with --out, or --restart an earlier one.")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    started = time.monotonic()
    config = configs_dir() / "train" / "quickstart.yaml"
    overrides = [f"run_dir={out / 'run'}", f"model.path={out / 'model'}", f"data.shards={out / 'shards'}"]
    _say(1, "draw captioned clips")
    clips = draw(config, out / "clips")
    _say(2, "pack them into WebDataset shards")
    _run("data_tools", "pack", out / "clips", out / "shards")
    _say(3, "make a tiny ti2v-5B pipeline")
    captions = out / "captions.txt"
    captions.write_text("".join(f"{clip.caption}\n" for clip in clips), encoding="utf-8")
    _run("wan_dist", "models", "make-tiny", "--variant", "ti2v-5B", out / "model", "--captions", captions)
    _say(4, f"train it: {num_gpus} DeepSpeed ranks, ZeRO-3, bf16, gradient checkpointing, optimizer offload")
    _run("wan_dist", "launch", config, "--num-gpus", num_gpus, *overrides)
    _say(5, "consolidate the sharded checkpoint into a diffusers folder")
    _run("wan_dist", "consolidate", out / "run", out / "export", "--format", "diffusers")
    _say(6, f"sample {_NUM_PROMPTS} videos with diffusers' own WanPipeline")
    report = sample(config, out, clips[:_NUM_PROMPTS])
    typer.echo(_summary(out, report, time.monotonic() - started))


def draw(config: Path, folder: Path) -> "list[ShapeClip]":
    """Write the clips that the quickstart's config is made for, mp4 and caption each, and return them."""
    from wan_dist.config.load import load_config
    from wan_dist.data.shapes import draw_clips
    from wan_dist.sample.video import write_mp4

    data = load_config(config, []).data
    width, height = data.sizes[0]
    clips = draw_clips(data.num_frames[0], height, width)
    for clip in clips:
        write_mp4(folder / f"{clip.name}.mp4", clip.frames, data.fps)
        (folder / f"{clip.name}.txt").write_text(clip.caption + "\n", encoding="utf-8")
    typer.echo(f"{len(clips)} clips of {data.num_frames[0]} frames, {width}x{height} px, in {folder}")
    return clips


def sample(config: Path, out: Path, clips: "Sequence[ShapeClip]") -> dict[str, object]:
    """Draw one video per clip's caption from the exported weights and measure whether it shows what was asked."""
    import torch
    from rich.console import Console

    from wan_dist.cli.progress import progress_bar, quiet_libraries
    from wan_dist.config.load import load_config
    from wan_dist.io.hashing import write_json_atomic
    from wan_dist.parallel.environment import prepare_environment
    from wan_dist.sample.pipeline import SampleOptions, draw_videos, load_text_to_video
    from wan_dist.sample.video import write_contact_sheet, write_mp4

    prepare_environment()
    quiet_libraries()
    data = load_config(config, []).data
    width, height = data.sizes[0]
    options = SampleOptions(width, height, data.num_frames[0], _INFERENCE_STEPS, 1.0, seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_text_to_video(out / "export", device, torch.float32)
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("denoise", total=options.num_inference_steps)
        videos = draw_videos(
            pipeline, [c.caption for c in clips], options, lambda step: bar.update(task, completed=step)
        )
    rows = [_judge(clip, video) for clip, video in zip(clips, videos, strict=True)]
    for clip, video, row in zip(clips, videos, rows, strict=True):
        row["video"] = str(write_mp4(out / "samples" / f"{clip.name}.mp4", video, data.fps))
    write_contact_sheet(out / "samples.png", videos, [clip.caption for clip in clips])
    report: dict[str, object] = {
        "num_prompts": len(rows),
        "num_colour_matches": sum(bool(row["colour_matches"]) for row in rows),
        "num_direction_matches": sum(bool(row["direction_matches"]) for row in rows),
        "videos": rows,
    }
    write_json_atomic(out / "report.json", report)
    return report


def _judge(clip: "ShapeClip", video: "NDArray[np.uint8]") -> dict[str, object]:
    """Return, and print, whether a sampled video has the colour and direction that its caption names."""
    from wan_dist.sample.measure import dominant_colour, motion_direction

    colour, direction = dominant_colour(video), motion_direction(video)
    words = {True: "yes", False: "no"}
    typer.echo(
        f"  {clip.caption:<40} colour {words[colour == clip.colour]:<3} direction {words[direction == clip.direction]}"
    )
    return {
        "prompt": clip.caption,
        "colour": colour,
        "colour_matches": colour == clip.colour,
        "direction": direction,
        "direction_matches": direction == clip.direction,
    }


def _say(number: int, text: str) -> None:
    typer.echo(f"\n[{number}/6] {text}")


def _run(module: str, *arguments: object) -> None:
    """Run one of our commands as a user would, and print it so that it can be copied."""
    from wan_dist.core.errors import LaunchError

    names = {"wan_dist": "wan-dist", "data_tools": "wan-data"}
    words = [str(a) for a in arguments]
    typer.echo(f"$ {shlex.join([names[module], *words])}")
    status = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
    if status:
        raise LaunchError(f"`{shlex.join([names[module], *words])}` failed with exit status {status}; see above.")


def _summary(out: Path, report: dict[str, object], seconds: float) -> str:
    total = report["num_prompts"]
    again = ["wan-dist", "generate", str(out / "export"), "--prompt", "a blue circle moves up"]
    again += ["--out", str(out / "blue.mp4"), *_size_flags(out)]
    verdict = (
        f"Dominant colour matches the caption in {report['num_colour_matches']} of {total} sampled videos, "
        f"direction in {report['num_direction_matches']} of {total}. Took {seconds / 60:.1f} minutes."
    )
    lines = [
        "",
        verdict,
        "",
        *(f"  {label:<12} {path}" for label, path in _places(out)),
        "",
        f"Loss curve:  tensorboard --logdir {out / 'run'}",
        f"Another one: {shlex.join(again)}",
    ]
    return "\n".join(lines)


def _places(out: Path) -> list[tuple[str, Path]]:
    return [
        ("clips", out / "clips"),
        ("shards", out / "shards"),
        ("run folder", out / "run"),
        ("weights", out / "export"),
        ("videos", out / "samples"),
        ("all at once", out / "samples.png"),
        ("report", out / "report.json"),
    ]


def _size_flags(out: Path) -> list[str]:
    video = next((out / "clips").glob("*.mp4"))
    import av

    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        sizes = {
            "--width": stream.width,
            "--height": stream.height,
            "--num-frames": stream.frames,
            "--fps": int(stream.average_rate or 8),
            "--num-inference-steps": _INFERENCE_STEPS,
            "--guidance-scale": 1,
        }
    return [str(word) for pair in sizes.items() for word in pair]

"""`wan-dist generate`: a prompt into an mp4."""

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    'Example: wan-dist generate quickstart/export --prompt "a red circle moves to the left" --out red.mp4 '
    "--width 96 --height 96 --num-frames 9 --fps 8 --num-inference-steps 30 --guidance-scale 1"
)


def generate(
    model: Annotated[Path, typer.Argument(help="Pipeline folder in diffusers layout.")],
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    out: Annotated[Path, typer.Option(help="File to write, .mp4; its settings go beside it as .json.")],
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    width: Annotated[int, typer.Option(help="Width, px.")] = 1280,
    height: Annotated[int, typer.Option(help="Height, px.")] = 704,
    num_frames: Annotated[int, typer.Option(help="Frames, 4n+1.")] = 121,
    fps: Annotated[float, typer.Option(min=1, help="Frames per second of the file.")] = 24,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(min=1, help="Classifier-free guidance; 1 turns it off.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")] = 0,
    lora: Annotated[
        list[Path] | None, typer.Option(help="LoRA of any format, for the only or the high-noise expert; repeatable.")
    ] = None,
    multiplier: Annotated[
        list[float] | None, typer.Option(help="Strength of each --lora in turn, or one for all; 1 is as trained.")
    ] = None,
    lora_low: Annotated[list[Path] | None, typer.Option(help="LoRA for the low-noise expert; repeatable.")] = None,
    multiplier_low: Annotated[list[float] | None, typer.Option(help="The same for each --lora-low.")] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="Trained word, written in the prompt as its token; repeatable.")
    ] = None,
) -> None:
    """Draw one video with diffusers' own pipeline and scheduler, as the folder has them."""
    import torch
    from rich.console import Console

    from wan_dist.adapters.embedding_files import add_word, read_word
    from wan_dist.cli.progress import progress_bar, quiet_libraries
    from wan_dist.cli.strengths import with_strengths
    from wan_dist.core.errors import RequestError
    from wan_dist.io.hashing import write_json_atomic
    from wan_dist.parallel.environment import prepare_environment
    from wan_dist.sample.adapters import add_loras
    from wan_dist.sample.pipeline import SampleOptions, check_options, draw_videos, load_text_to_video
    from wan_dist.sample.video import write_mp4

    if out.suffix != ".mp4":
        raise RequestError(f"--out {out}: only .mp4 is written.")
    high = with_strengths("--multiplier", lora, multiplier)
    low = with_strengths("--multiplier-low", lora_low, multiplier_low)
    words = [read_word(path) for path in embedding or []]
    for word in words:
        if word.token not in prompt:
            raise RequestError(f"--prompt does not contain {word.token}, the token of an --embedding.")
    prepare_environment()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = SampleOptions(width, height, num_frames, num_inference_steps, guidance_scale, seed, negative_prompt)
    pipeline = load_text_to_video(model, device, dtype)
    check_options(pipeline, options)
    add_loras(pipeline, "transformer", high)
    add_loras(pipeline, "transformer_2", low)
    written = prompt
    for word in words:
        add_word(pipeline, word)
        written = word.expand(written)
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("denoise", total=num_inference_steps)
        video = draw_videos(pipeline, [written], options, lambda step: bar.update(task, completed=step))[0]
    write_mp4(out, video, fps)
    info = {"prompt": prompt, **options.as_dict(), "fps": fps, "model": str(model), "dtype": str(dtype)}
    info |= {
        "loras": [[str(path), strength] for path, strength in [*high, *low]],
        "embeddings": [w.token for w in words],
    }
    write_json_atomic(out.with_suffix(".json"), info)
    typer.echo(json.dumps({"video": str(out), "info": str(out.with_suffix(".json"))}))

"""`wan-dist models`: pipeline folders."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make pipeline folders.")


@app.command("make-tiny", epilog="Example: wan-dist models make-tiny --variant ti2v-5B models/tiny-5b")
def make_tiny(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    variant: Annotated[str, typer.Option(help="ti2v-5B, t2v-A14B or i2v-A14B.")] = "ti2v-5B",
    captions: Annotated[
        Path | None,
        typer.Option(help="Text file (one caption a line) or .jsonl with a caption key: trains the tokenizer."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
) -> None:
    """Write a tiny pipeline in diffusers layout: real classes and channel layout, random transformer weights.

    It trains on a CPU in minutes; use it to try configs, data and machines before the real weights.
    """
    from wan_dist.cli.progress import quiet_libraries
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    quiet_libraries()
    from wan_dist.models.wan.build import DEFAULT_CAPTIONS, make_tiny_pipeline

    texts = read_captions(captions) if captions else DEFAULT_CAPTIONS
    typer.echo(make_tiny_pipeline(variant, out, texts, seed=seed))


@app.command("import", epilog="Example: wan-dist models import Wan2.2-TI2V-5B models/5b --variant ti2v-5B --base DIR")
def import_weights(
    source: Annotated[Path, typer.Argument(help="Official folder, a transformer's folder, or a single .safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    variant: Annotated[str, typer.Option(help="ti2v-5B, t2v-A14B or i2v-A14B.")],
    low: Annotated[Path | None, typer.Option(help="The low-noise expert, where SOURCE is the high-noise one.")] = None,
    expert: Annotated[
        Literal["high_noise", "low_noise"] | None, typer.Option(help="Which one SOURCE is, where it is one of two.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Diffusers folder that gives VAE, text encoder, tokenizer and scheduler.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Link the base's parts instead of copying them.")] = False,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Dtype of the result; the source's otherwise.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size at which a new weight file begins, such as 5GB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say the size, write nothing.")] = False,
) -> None:
    """Write official or ComfyUI weights (bf16, fp16, fp32) as a pipeline folder in diffusers layout."""
    from rich.console import Console

    from wan_dist.cli.progress import ByteProgress, progress_bar, told_size
    from wan_dist.cli.sizes import bytes_of
    from wan_dist.io.consolidate import Progress
    from wan_dist.io.import_model import find_experts, import_model
    from wan_dist.io.safetensors_stream import DTYPES
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    experts = find_experts(source, variant, expert, low)
    max_shard_bytes = bytes_of(max_shard_size, "--max-shard-size")
    with progress_bar(Console(stderr=True)) as bar:
        told = ByteProgress(bar, "import")
        import_model(
            experts,
            out,
            variant=variant,
            base=base,
            link=link,
            dtype=DTYPES[dtype] if dtype else None,
            max_shard_bytes=max_shard_bytes,
            progress=Progress(told_size if dry_run else told.start, told.advance),
            dry_run=dry_run,
        )
    if base is None and not dry_run:
        typer.echo("only transformers were written; --base DIR adds the other parts of a pipeline", err=True)
    typer.echo(out)


def read_captions(path: Path) -> list[str]:
    """Return the captions of a text or JSON Lines file.

    Raises:
        DataError: unreadable, or a row without a caption.
    """
    from wan_dist.core.errors import DataError

    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if path.suffix != ".jsonl":
        return lines
    captions: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)["caption"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not a JSON object with a caption key.") from None
        captions.extend(value if isinstance(value, list) else [value])
    return captions

"""`wan-dist lora`: LoRA files out of runs, into other formats, into weights and out of them."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Export, convert, merge and look at LoRA files.")

Layout = Annotated[
    Literal["original", "comfyui", "diffusers", "kohya"],
    typer.Option(
        "--format", help="original (scale in B, loads everywhere), comfyui, diffusers or kohya (with alpha or header)."
    ),
]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the matrices.")]
Expert = Annotated[
    Literal["high_noise", "low_noise"] | None, typer.Option(help="Only this expert; all that were trained otherwise.")
]
Lora = Annotated[
    list[Path] | None, typer.Option(help="LoRA for the only transformer or the high-noise expert; repeatable.")
]
LoraLow = Annotated[list[Path] | None, typer.Option(help="LoRA for the low-noise expert; repeatable.")]
Multiplier = Annotated[
    list[float] | None, typer.Option(help="Strength of each --lora in turn, or one for all; 1 is as trained.")
]
MultiplierLow = Annotated[list[float] | None, typer.Option(help="The same for each --lora-low.")]
KeptDtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Dtype of the result; the source's otherwise.")
]
ShardSize = Annotated[str, typer.Option(help="Size at which a new weight file begins, such as 5GB.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say the size, write nothing.")]
OneOfTwo = Annotated[
    Literal["transformer", "transformer_2"] | None, typer.Option(help="Which one, of a file that holds both experts.")
]


@app.command(epilog="Example: wan-dist lora export runs/fox fox.safetensors")
def export(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest whole checkpoint) or checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="File to make; NAME_high_noise and NAME_low_noise for two experts.")],
    layout: Layout = "original",
    dtype: Dtype = "bf16",
    expert: Expert = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the running average instead of the last weights.")] = False,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Read a checkpoint that no run of yours wrote: it can run code.")
    ] = False,
) -> None:
    """Write the LoRA that a run trained as files that other programs load."""
    from wan_dist.io.component_weights import find_checkpoint
    from wan_dist.io.lora_export import export_loras
    from wan_dist.io.safetensors_stream import DTYPES
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    checkpoint = find_checkpoint(source, trusted=trust_checkpoint)
    for path in export_loras(checkpoint, out, layout=layout, dtype=DTYPES[dtype], expert=expert, ema=ema):
        typer.echo(path)


@app.command(epilog="Example: wan-dist lora convert fox.safetensors fox-kohya.safetensors --format kohya")
def convert(
    source: Annotated[Path, typer.Argument(help="LoRA file of any trainer, or a folder that peft wrote.")],
    out: Annotated[Path, typer.Argument(help="File to make.")],
    layout: Layout = "original",
    dtype: KeptDtype = None,
    base: Annotated[
        Path | None, typer.Option(help="The transformer that a DoRA was trained on, where its format needs it.")
    ] = None,
    component: OneOfTwo = None,
) -> None:
    """Write a LoRA file in another format."""
    from wan_dist.io.lora_export import convert_lora
    from wan_dist.io.safetensors_stream import DTYPES

    convert_lora(source, out, layout=layout, dtype=DTYPES[dtype] if dtype else None, base=base, component=component)
    typer.echo(out)


@app.command(epilog="Example: wan-dist lora merge models/wan22 merged --lora fox.safetensors --multiplier 0.8")
def merge(
    base: Annotated[Path, typer.Argument(help="Pipeline folder, transformer's folder, or single file.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a file where the base is one.")],
    lora: Lora = None,
    multiplier: Multiplier = None,
    lora_low: LoraLow = None,
    multiplier_low: MultiplierLow = None,
    dtype: KeptDtype = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """Add LoRAs to a model's weights, one after another, in memory of a few chunks."""
    _merge(base, out, (lora, multiplier), (lora_low, multiplier_low), 1.0, dtype, max_shard_size, dry_run)


@app.command(epilog="Example: wan-dist lora unmerge merged models/back --lora fox.safetensors --multiplier 0.8")
def unmerge(
    base: Annotated[Path, typer.Argument(help="What merge wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; a file where the base is one.")],
    lora: Lora = None,
    multiplier: Multiplier = None,
    lora_low: LoraLow = None,
    multiplier_low: MultiplierLow = None,
    dtype: KeptDtype = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
) -> None:
    """Take LoRAs out of a model's weights again; what rounding to bf16 lost stays lost."""
    _merge(base, out, (lora, multiplier), (lora_low, multiplier_low), -1.0, dtype, max_shard_size, dry_run)


@app.command(
    epilog="Example: wan-dist lora extract models/base/transformer tuned/transformer tuned.safetensors --rank 64"
)
def extract(
    base: Annotated[Path, typer.Argument(help="Transformer's folder or file, before.")],
    tuned: Annotated[Path, typer.Argument(help="The same, tuned.")],
    out: Annotated[Path, typer.Argument(help="File to make.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 32,
    layout: Layout = "original",
    dtype: Dtype = "bf16",
) -> None:
    """Write the difference of two models as a LoRA: its nearest matrices of a rank, by SVD."""
    from rich.console import Console

    from wan_dist.cli.progress import progress_bar
    from wan_dist.io.lora_export import check_free, extract_lora, save_lora
    from wan_dist.io.safetensors_stream import DTYPES, HASH_KEY

    check_free(out)
    with progress_bar(Console(stderr=True), "{task.fields[module]}") as bar:
        task = bar.add_task("extract", total=None, module="")
        found = extract_lora(base, tuned, rank=rank, on_module=lambda name: bar.update(task, advance=1, module=name))
    header = {"format": "pt", "modelspec.title": out.stem, HASH_KEY: ""}
    save_lora(out, found.weights, layout=layout, dtype=DTYPES[dtype], base=None, header=header)
    worst = max(found.left, key=lambda name: found.left[name])
    typer.echo(f"{len(found.left)} modules; left out at most {found.left[worst]:.1%} of a change ({worst})", err=True)
    if found.not_carried:
        typer.echo(f"{len(found.not_carried)} changed tensors do not fit a LoRA: {found.not_carried[0]} …", err=True)
    typer.echo(out)


@app.command(epilog="Example: wan-dist lora inspect fox.safetensors --json")
def inspect(
    source: Annotated[Path, typer.Argument(help="LoRA file of any trainer, or a folder that peft wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with each module's norm.")] = False,
    component: OneOfTwo = None,
) -> None:
    """Print rank, alpha, targets, format and norms of a LoRA file."""
    from wan_dist.io.lora_export import describe_lora

    found = describe_lora(source, component)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    norms = found["norms"]
    strongest = sorted(norms, key=lambda name: -norms[name])[:3]
    rows = {
        "format": found["format"] + ("" if found["scale_stated"] else " (no alpha in it: alpha = rank)"),
        "expert": found["expert"] or "not said",
        "modules": f"{found['num_modules']}, {found['num_parameters'] / 1e6:.2f} M values in {found['dtype']}",
        "rank": ", ".join(map(str, found["ranks"])),
        "alpha": ", ".join(f"{alpha:g}" for alpha in found["alphas"]),
        "DoRA": "yes" if found["dora"] else "no",
        "targets": ", ".join(found["targets"]),
        "largest norms": ", ".join(f"{name} {norms[name]:.3g}" for name in strongest),
    }
    for name, value in rows.items():
        typer.echo(f"{name:14} {value}")


def _merge(
    base: Path,
    out: Path,
    high: tuple[list[Path] | None, list[float] | None],
    low: tuple[list[Path] | None, list[float] | None],
    sign: float,
    dtype: str | None,
    max_shard_size: str,
    dry_run: bool,
) -> None:
    from rich.console import Console

    from wan_dist.cli.progress import ByteProgress, progress_bar, told_size
    from wan_dist.cli.sizes import bytes_of
    from wan_dist.cli.strengths import with_strengths
    from wan_dist.io.consolidate import Progress
    from wan_dist.io.lora_merge import Applied, merge_loras
    from wan_dist.io.safetensors_stream import DTYPES

    def applied(option: str, files: list[Path] | None, given: list[float] | None) -> list[Applied]:
        return [Applied(path, sign * strength) for path, strength in with_strengths(option, files, given)]

    loras = {"transformer": applied("--multiplier", *high), "transformer_2": applied("--multiplier-low", *low)}
    max_shard_bytes = bytes_of(max_shard_size, "--max-shard-size")
    with progress_bar(Console(stderr=True)) as bar:
        told = ByteProgress(bar, "merge" if sign > 0 else "unmerge")
        progress = Progress(told_size if dry_run else told.start, told.advance)
        kept = DTYPES[dtype] if dtype else None
        merge_loras(base, out, loras, dtype=kept, max_shard_bytes=max_shard_bytes, progress=progress, dry_run=dry_run)
    typer.echo(out)

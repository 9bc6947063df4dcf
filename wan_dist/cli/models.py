"""`wan-dist models`: pipeline folders."""

import json
from pathlib import Path
from typing import Annotated

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

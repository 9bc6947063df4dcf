"""`wan-dist checkpoint`: look at, verify and delete the checkpoints of a run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="List, verify and delete the checkpoints of a run.",
    epilog="Example: wan-dist checkpoint verify runs/tiny-4clips",
)

Run = Annotated[Path, typer.Argument(help="Run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list", epilog="Example: wan-dist checkpoint list runs/tiny-4clips")
def list_(run: Run, as_json: AsJson = False) -> None:
    """Show step, size, age, ranks and components of every checkpoint, newest first; files are not read."""
    _print([_row(folder, problems=None) for folder in _folders(run)], as_json)


@app.command(epilog="Example: wan-dist checkpoint verify runs/tiny-4clips --json")
def verify(run: Run, as_json: AsJson = False) -> None:
    """Read every file of every checkpoint and compare it with its hash; exit status 1 if one is damaged."""
    from wan_dist.cli.progress import progress_bar
    from wan_dist.core.errors import CheckpointError
    from wan_dist.io.checkpoint import read_manifest

    folders = _folders(run)
    rows = []
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        for folder in bar.track(folders, description="verify"):
            try:
                problems = read_manifest(folder).problems()
            except CheckpointError as error:
                problems = [str(error)]
            rows.append(_row(folder, problems=problems))
    _print(rows, as_json)
    if any(row["problems"] for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: wan-dist checkpoint prune runs/tiny-4clips --keep-last 1 --dry-run")
def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest checkpoints kept.")] = 1,
    keep_every: Annotated[int, typer.Option(min=0, help="Steps whose multiples are kept; 0 for none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete all but the newest checkpoints, once the newest one verifies; refused while the run trains."""
    from wan_dist.core.errors import CheckpointError
    from wan_dist.io import checkpoint as checkpoints
    from wan_dist.io.run_folder import checkpoints_dir, claim_run

    folders = _folders(run)
    root = checkpoints_dir(run)
    with claim_run(run):
        names = [folder.name for folder in checkpoints.superfluous(root, keep_last, keep_every)]
        if not dry_run and folders:
            if problems := checkpoints.read_manifest(folders[0]).problems():
                raise CheckpointError(f"{'; '.join(problems)}; nothing was deleted.")
            names = checkpoints.prune(root, keep_last, keep_every)
    typer.echo(json.dumps(names) if as_json else "\n".join(names) or "nothing to delete")


def _folders(run: Path) -> list[Path]:
    from wan_dist.core.errors import CheckpointError
    from wan_dist.io.checkpoint import step_folders
    from wan_dist.io.run_folder import CONFIG_NAME, checkpoints_dir

    root = checkpoints_dir(run)
    if not root.is_dir() and not (run / CONFIG_NAME).is_file():
        raise CheckpointError(f"{run}: is no run folder (it has neither {root.name} nor {CONFIG_NAME}).")
    return step_folders(root)


def _row(folder: Path, problems: list[str] | None) -> dict[str, Any]:
    """Return what is known of a checkpoint; `problems` are those that were looked for, None to look at sizes only."""
    from wan_dist.core.errors import CheckpointError
    from wan_dist.io.checkpoint import read_manifest, step_of
    from wan_dist.io.trust import is_own

    row: dict[str, Any] = {"step": step_of(folder), "folder": str(folder), "saved": folder.stat().st_mtime}
    try:
        checkpoint = read_manifest(folder)
    except CheckpointError as error:
        return {**row, "problems": problems or [str(error)]}
    return {
        **row,
        "saved": checkpoint.saved,
        "bytes": checkpoint.num_bytes,
        "ranks": checkpoint.world_size,
        "zero_stage": checkpoint.zero_stage,
        "components": list(checkpoint.components),
        "method": checkpoint.state.get("method", {}).get("kind"),
        "own": is_own(checkpoint.manifest),
        "verified": problems is not None and not problems,
        "problems": checkpoint.missing() if problems is None else problems,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    import time

    columns = ("step", "saved", "GB", "ranks", "zero", "method", "components", "state")
    lines = [columns, *(_cells(row, time.strftime("%Y-%m-%d %H:%M", time.localtime(row["saved"]))) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        for problem in row["problems"]:
            typer.echo(problem)


def _cells(row: dict[str, Any], saved: str) -> tuple[str, ...]:
    if row["problems"]:
        state = "DAMAGED"
    else:
        state = ("verified" if row["verified"] else "complete") + ("" if row["own"] else ", not yours")
    known = "bytes" in row
    return (
        str(row["step"]),
        saved,
        f"{row['bytes'] / 1e9:.3f}" if known else "?",
        str(row.get("ranks", "?")),
        str(row.get("zero_stage", "?")),
        str(row.get("method") or "?"),
        "+".join(row.get("components", ["?"])),
        state,
    )

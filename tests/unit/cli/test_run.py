"""Exit statuses and error lines that both programs share."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging
import typer
from wan_dist.cli.run import run_app
from wan_dist.core.errors import ConfigError, DataError

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def data(): raise DataError("clips: none. Add some.")

@app.command()
def config(): raise ConfigError("bad.yaml: one.\\nbad.yaml: two.")

@app.command()
def interrupt(): raise KeyboardInterrupt

@app.command()
def mistake(): raise ValueError("ours")

@app.command()
def leave(): raise typer.Exit(3)

@app.command()
def fine(count: int = 1):
    logging.getLogger("wan_dist.x").info("a log line")
    logging.getLogger("other").info("another library's")
    print("result")

run_app(app, "prog")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    root = Path(__file__).parents[3]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["data"], 1, "prog: clips: none. Add some."),
        (["config"], 2, "prog: bad.yaml: one.\nprog: bad.yaml: two.\n"),
        (["leave"], 3, None),
        (["nope"], 2, "prog: No such command 'nope'."),
        (["fine", "--count", "x"], 2, "prog: Invalid value for '--count'"),
        (["interrupt"], 130, None),
    ],
)
def test_status_and_one_line(arguments: list[str], status: int, line: str | None) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if line is None:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == max(1, line.count("\n"))


def test_our_own_mistakes_keep_their_traceback() -> None:
    done = run("mistake")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: ours" in done.stderr


def test_results_go_to_stdout_and_our_logs_to_stderr() -> None:
    done = run("fine")
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert done.stderr == "INFO wan_dist.x: a log line\n"


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace('print("result")', 'print("x" * 10_000_000)'), "fine"],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 1)

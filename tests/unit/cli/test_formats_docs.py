"""The commands of docs/formats.md exist with every option that it names."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from wan_dist.cli.main import app

DOCS = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
COMMANDS = sorted(set(re.findall(r"`wan-dist ((?:consolidate|lora|embedding|models|generate) [^`]+)`", DOCS)))


def parse(line: str) -> None:
    """Have a command line parsed; unknown commands and options, missing arguments and bad values raise."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("wan-dist", words)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_is_understood(line: str) -> None:
    parse(line)
    with pytest.raises(Exception, match="--no-such-option"):
        parse(f"{line} --no-such-option")


def test_the_table_names_every_command_on_weights() -> None:
    root: Any = typer.main.get_command(app)
    wanted = {"consolidate", "embedding export", "models import"}
    wanted |= {f"lora {name}" for name in root.commands["lora"].commands}
    assert {name for name in wanted if not any(line.startswith(name) for line in COMMANDS)} == set()

"""What the code imports is what pyproject.toml asks for, not what happens to come along with something else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[3]
OURS = {"wan_dist", "data_tools", "launch", "tests"}


def imported(folder: Path) -> set[str]:
    """Return the top-level names that the modules below a folder import, wherever they do."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def test_every_imported_package_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name, lines in extras.items() if name != "dev" for line in lines)]
    declared = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in asked}
    owners = packages_distributions()
    found = {folder: imported(ROOT / folder) for folder in ("wan_dist", "data_tools")}
    assert "torch" in found["wan_dist"]
    undeclared = {
        f"{folder}: {name}"
        for folder, names in found.items()
        for name in names
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, [name])} & declared
    }
    assert undeclared == set()

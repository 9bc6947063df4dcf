"""A YAML file and command line overrides to a `TrainConfig`, or every problem at once."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from wan_dist.config.check import semantic_problems
from wan_dist.config.migrate import migrate
from wan_dist.config.problems import schema_problems, section_fields
from wan_dist.config.schema import TrainConfig
from wan_dist.config.yaml_text import KeyPath, Problem, YamlSyntaxError, dotted, parse_yaml
from wan_dist.core.errors import ConfigError

_OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)=(?P<value>.*)", re.DOTALL)


@dataclass
class _Draft:
    """A config on its way in.

    Attributes:
        name: the file, as the user wrote it.
        values: the document so far.
        origins: where each key was set, as a message shows it.
        problems: what is wrong so far.
    """

    name: str
    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the validated configuration of a file with overrides on top.

    Relative paths inside it stay as they are; they are relative to the current folder, not to the file.

    Args:
        path: YAML file.
        overrides: `section.key=value` each, in order; the value is read as YAML.
    Raises:
        ConfigError: the file cannot be read or something in it is wrong. One line for each problem.
    """
    draft = _read(path)
    for override in overrides:
        _apply_override(draft, override)
    cfg = _validate(draft)
    if cfg is None or draft.problems:
        raise ConfigError("\n".join(f"{_where(draft, problem.path)}: {problem.text}" for problem in draft.problems))
    return cfg


def _read(path: str | Path) -> _Draft:
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: there is no such file under {Path.cwd()}; check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read as UTF-8 text: {error}.") from error
    try:
        document = parse_yaml(text)
    except YamlSyntaxError as error:
        where = f"{name}:{error.line}" if error.line else name
        raise ConfigError(f"{where}: not valid YAML: {error}.") from error
    values = {} if document.value is None else document.value
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}: holds a {type(values).__name__}; a config is a mapping of sections such as `model:`."
        )
    origins = {key: f"{name}:{line}" for key, line in document.lines.items() if key}
    migrated, problems = migrate(values)
    return _Draft(name, migrated, origins, [*document.problems, *problems])


def _apply_override(draft: _Draft, override: str) -> None:
    """Set one key in the draft, or note why that cannot be done."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        text = f"override {override!r} is not KEY=VALUE; write for example train.num_steps=10."
        draft.problems.append(Problem((), text))
        return
    *parents, last = path = tuple(match["key"].split("."))
    try:
        document = parse_yaml(match["value"])
    except YamlSyntaxError as error:
        text = f"override {override!r}: the value is not valid YAML: {error}; put text in quotes."
        draft.problems.append(Problem((), text))
        return
    draft.problems += [Problem((), f"override {override!r}: {problem.text}") for problem in document.problems]
    target = draft.values
    for depth, parent in enumerate(parents, start=1):
        inner = target.get(parent)
        if inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            text = f"override {override!r}: {dotted(path[:depth])} is a value, not a section."
            draft.problems.append(Problem((), text))
            return
        target[parent] = inner
        target = inner
    target[last] = document.value
    for known in [known for known in draft.origins if known[: len(path)] == path]:
        del draft.origins[known]
    draft.origins[path] = f"override {match['key']}"


def _validate(draft: _Draft) -> TrainConfig | None:
    """Return the typed config if the schema takes it, adding all further problems to the draft."""
    cfg, refused = None, []
    _spell_out(draft.values)
    try:
        cfg = TrainConfig.model_validate(draft.values)
    except ValidationError as error:
        refused = schema_problems(error, draft.values)
    # Keys that are fine by themselves are checked even if others are not, so that one run names everything.
    values = _usable_values(draft.values, {problem.path for problem in refused})
    draft.problems += [*refused, *semantic_problems(values)]
    return cfg


def _spell_out(values: dict[str, Any]) -> None:
    """Put what may be written in short into the form of the schema: one length or size, and sizes as 832x480."""
    data = values.get("data")
    if not isinstance(data, dict):
        return
    if type(data.get("num_frames")) is int:
        data["num_frames"] = [data["num_frames"]]
    sizes = data.get("sizes")
    if isinstance(sizes, str) or (isinstance(sizes, list) and [type(side) for side in sizes] == [int, int]):
        sizes = [sizes]
    if isinstance(sizes, list):
        data["sizes"] = [_size(size) for size in sizes]


def _size(value: Any) -> Any:
    found = re.fullmatch(r"(\d+)x(\d+)", value) if isinstance(value, str) else None
    return [int(found[1]), int(found[2])] if found else value


def _usable_values(document: dict[str, Any], refused: Iterable[KeyPath]) -> dict[str, Any]:
    """Return dotted key to value or default, less the keys that the schema refused."""
    bad = {path[:2] for path in refused} | {path[:1] for path in refused if len(path) == 1}
    values = {}
    for section in TrainConfig.model_fields:
        given = document.get(section, {})
        if (section,) in bad or not isinstance(given, dict):
            continue
        for name, info in section_fields(section).items():
            if (section, name) in bad:
                continue
            if name in given or not info.is_required():
                values[f"{section}.{name}"] = given.get(name, info.get_default(call_default_factory=True))
    return values


def _where(draft: _Draft, path: KeyPath) -> str:
    """Return where the nearest enclosing key was set, else the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in draft.origins:
            return draft.origins[path[:length]]
    return draft.name

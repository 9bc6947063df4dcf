"""What pydantic finds wrong in a config, in words for the person who wrote it."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from wan_dist.config.schema import TrainConfig
from wan_dist.config.yaml_text import KeyPath, Problem, dotted

_PREFIX = "Input should be "
_PLAIN_WORDS = {
    "a valid boolean": "true or false",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid dictionary": "a mapping of keys",
    "a valid tuple": "a list",
}
_TOO_FEW = {"too_short": "a list of at least {min_length}", "string_too_short": "a text that is not empty"}


def schema_problems(error: ValidationError, document: dict[str, Any]) -> list[Problem]:
    """Return one problem for each key that pydantic refuses, in the order of the schema.

    Args:
        error: what validating `document` raised.
        document: the values that were validated.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    for detail in error.errors():
        grouped.setdefault(_real_path(detail["loc"], detail["type"], document), []).append(detail)
    return [Problem(path, _describe(path, details, document)) for path, details in grouped.items()]


def section_fields(section: str) -> dict[str, FieldInfo]:
    """Return the fields of a section by name; nothing for a key that is no section."""
    field = TrainConfig.model_fields.get(section)
    kind = field.annotation if field else None
    return dict(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def unknown_key(path: KeyPath) -> str:
    """Return the message for a key that the schema does not have, naming the key that was meant.

    Args:
        path: one or two keys.
    """
    *parents, key = (str(part) for part in path)
    known = [*section_fields(parents[0])] if parents else [*TrainConfig.model_fields]
    prefix = f"{parents[0]}." if parents else ""
    elsewhere = _keys_elsewhere(parents)
    if key in elsewhere:
        hint = f"it belongs elsewhere: use {' or '.join(elsewhere[key])}."
    elif near := _nearest(key, known, 0.6):
        hint = f"did you mean {prefix}{near}?"
    elif near := _nearest(key, elsewhere, 0.75):
        hint = f"did you mean {' or '.join(elsewhere[near])}?"
    else:
        hint = f"known {f'in {parents[0]}' if parents else 'at the top'} are {', '.join(known)}."
    return f"{dotted(path)} is not a known key; {hint}"


def show_value(value: Any) -> str:
    """Return a value as short text for a message."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys_elsewhere(parents: list[str]) -> dict[str, list[str]]:
    """Return every other section's keys, each with the dotted names it has."""
    found: dict[str, list[str]] = {}
    for section in TrainConfig.model_fields:
        names = section_fields(section)
        if not names and parents:
            found.setdefault(section, []).append(section)
        if [section] != parents:
            for name in names:
                found.setdefault(name, []).append(f"{section}.{name}")
    return found


def _nearest(key: str, known: Iterable[str], cutoff: float) -> str | None:
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None


def _real_path(loc: tuple[str | int, ...], kind: str, document: Any) -> KeyPath:
    """Return `loc` less the parts that pydantic adds for the members of a union, which name no key."""
    if kind == "missing":
        return loc
    path: list[str | int] = []
    for part in loc:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            break
        path.append(part)
    return tuple(path)


def _describe(path: KeyPath, details: list[Any], document: dict[str, Any]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return unknown_key(path)
    if first["type"] == "missing":
        return _missing(path, document)
    if first["type"] == "value_error":
        return f"{first['msg'].removeprefix('Value error, ')}."
    found = show_value(first["input"])
    allowed = [_allowed(detail) for detail in details]
    if all(text is not None for text in allowed):
        return f"{dotted(path)} = {found} is not allowed; use {' or '.join(str(text) for text in allowed)}."
    return f"{dotted(path)} = {found} is not allowed: {'; '.join(detail['msg'] for detail in details)}."


def _allowed(detail: dict[str, Any]) -> str | None:
    """Return what one pydantic error asks for; None where its message says it in another form."""
    if detail["type"] in ("model_type", "model_attributes_type"):
        return "a section of keys"
    if detail["type"] in _TOO_FEW:
        return _TOO_FEW[detail["type"]].format(**detail["ctx"])
    if not detail["msg"].startswith(_PREFIX):
        return None
    text = detail["msg"].removeprefix(_PREFIX)
    if text.startswith(("greater", "less")):
        return f"a number {text}"
    text = text.split(",")[0] if text.startswith("a valid integer,") else text
    return _PLAIN_WORDS.get(text, text)


def _missing(path: KeyPath, document: Any) -> str:
    """Return the message for a required key, with its description, or for a list that is too short."""
    for part in path[:-1]:
        document = document[part]
    if not isinstance(document, dict):
        return f"{dotted(path[:-1])} = {show_value(document)} has too few items."
    section, *rest = (str(part) for part in path)
    inner = section_fields(section)
    if inner and not rest:
        required = [name for name, field in inner.items() if field.is_required()]
        return f"{section} is missing; add it with at least {', '.join(required)}."
    field = inner[rest[0]] if rest else TrainConfig.model_fields[section]
    return f"{dotted(path)} is missing; set it. {field.description}"

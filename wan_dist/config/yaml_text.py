"""YAML text to plain values, by the rules of YAML 1.2, with the line of every key; and back to text."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a document.

    Attributes:
        path: keys and list indices that lead to it; empty for the document itself.
        text: what was found, what is allowed and what to do, without the place.
    """

    path: KeyPath
    text: str


@dataclass(frozen=True)
class YamlDocument:
    """What a YAML text holds.

    Attributes:
        value: plain dicts, lists, strings, numbers, booleans and None.
        lines: line of each key and list item, from 1.
        problems: duplicate keys, keys that are not text, tags; the value is without them.
    """

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class YamlSyntaxError(ValueError):
    """The text is not YAML.

    Attributes:
        line: where, from 1; None where the parser does not know.
    """

    def __init__(self, text: str, line: int | None) -> None:
        super().__init__(text)
        self.line = line


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")

# YAML 1.2's core schema, less .inf and .nan, which no setting takes. PyYAML follows YAML 1.1, which reads
# `no` and `on` as booleans, `1e-4` as text and `12:30:00` as the number 45000.
_RULES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), "~nN"),
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:str": str,
}


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by `_RULES` only."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  the base class declares it this way


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flow = not any(isinstance(value, dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


for _tag, _pattern, _first in _RULES:
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(_tag, _whole, [*_first, *([""] if _tag.endswith("null") else [])])
_Dumper.add_representer(list, _represent_list)


def parse_yaml(text: str) -> YamlDocument:
    """Return what one YAML document holds.

    Args:
        text: the document.
    Raises:
        YamlSyntaxError: the text is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlSyntaxError(what, mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise YamlSyntaxError(" ".join(str(error).split()), None) from error
    except RecursionError as error:
        raise YamlSyntaxError("it is nested too deeply", None) from error
    document = YamlDocument(value=None)
    if node is None:
        return document
    return YamlDocument(_build(node, (), document, ()), document.lines, document.problems)


def dump_yaml(value: dict[str, Any]) -> str:
    """Return YAML text that `parse_yaml` reads back as the same value.

    Args:
        value: plain dicts, lists, strings, numbers, booleans and None.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def dotted(path: KeyPath) -> str:
    """Return a key path as a user writes it, such as "data.sizes[0]"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _build(node: yaml.Node, path: KeyPath, document: YamlDocument, parents: tuple[yaml.Node, ...]) -> Any:
    """Return a node's value, noting lines and problems in `document`."""
    document.lines.setdefault(path, node.start_mark.line + 1)
    if any(node is parent for parent in parents):
        document.problems.append(Problem(path, f"{dotted(path)} contains itself through an alias; write it out."))
        return None
    if isinstance(node, yaml.ScalarNode):
        if node.tag not in _SCALARS:
            document.problems.append(
                Problem(path, f"{dotted(path)} has the tag {node.tag}; only plain values are read, remove the tag.")
            )
            return None
        return _scalar(node, path, document)
    inside = (*parents, node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), document, inside) for index, item in enumerate(node.value)]
    return _build_mapping(node, path, document, inside)


def _scalar(node: yaml.ScalarNode, path: KeyPath, document: YamlDocument) -> Any:
    """Return a scalar's value; an explicit tag such as !!int can contradict its text."""
    try:
        return _SCALARS[node.tag](node.value)
    except ValueError:
        document.problems.append(Problem(path, f"{dotted(path)} = {node.value} does not fit its tag {node.tag}."))
        return None


def _build_mapping(node: yaml.Node, path: KeyPath, document: YamlDocument, parents: tuple[yaml.Node, ...]) -> Any:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            document.problems.append(Problem(path, f"key {found!r} in line {line} is not text; put it in quotes."))
            continue
        key = key_node.value
        here = (*path, key)
        if key in values:
            document.problems.append(
                Problem(here, f"{dotted(here)} is set twice, in lines {document.lines[here]} and {line}; keep one.")
            )
            continue
        document.lines[here] = line
        values[key] = _build(value_node, here, document, parents)
    return values

"""Older config formats, brought up to date one version at a time."""

from collections.abc import Callable
from typing import Any

from wan_dist.config.schema import CONFIG_VERSION
from wan_dist.config.yaml_text import Problem

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version N to a function that turns a document of version N into one of version N + 1."""


def migrate(document: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a document in today's format, and what stood in the way.

    Args:
        document: a parsed config; without a `version` it is taken to be of today's.
    """
    version = document.get("version", CONFIG_VERSION)
    if not isinstance(version, int) or isinstance(version, bool):
        return document, []  # the schema names the wrong type
    if version > CONFIG_VERSION:
        text = f"version = {version} was written by a newer wan_dist; this one reads up to {CONFIG_VERSION}, update it."
        return {**document, "version": CONFIG_VERSION}, [Problem(("version",), text)]
    while version < CONFIG_VERSION:
        if version not in MIGRATIONS:
            oldest = min((known for known in MIGRATIONS), default=CONFIG_VERSION)
            text = f"version = {version} cannot be read; use {oldest} to {CONFIG_VERSION}."
            return {**document, "version": CONFIG_VERSION}, [Problem(("version",), text)]
        document = {**MIGRATIONS[version](document), "version": version + 1}
        version += 1
    return document, []

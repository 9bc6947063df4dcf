"""docs/data.md names every reason code and every option."""

import inspect
import re
from pathlib import Path

from data_tools.pack import pack
from wan_dist.data.probe import WARNINGS

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "data.md").read_text()

SHARD_CODES = {"bad_json", "no_media"}
"""Of reading shards as streams, not of packing."""


def test_every_reason_code_is_explained() -> None:
    code = "".join(path.read_text() for path in (ROOT / "wan_dist" / "data").glob("*.py"))
    found = set(re.findall(r'\b(?:Reject|MediaError)\(\s*"([a-z_]+)"', code)) - SHARD_CODES
    assert len(found) > 25
    assert not {name for name in found | set(WARNINGS) if f"`{name}`" not in DOCS}


def test_every_option_is_explained() -> None:
    renamed = {"source_format": "format", "as_json": "json"}
    names = [renamed.get(n, n) for n in inspect.signature(pack).parameters if n not in ("source", "out")]
    assert not [name for name in names if f"`--{name.replace('_', '-')}" not in DOCS]

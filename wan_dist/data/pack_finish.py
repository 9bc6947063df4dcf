"""Close a pack: the lists of what was left out or is worth a look, and last the manifest."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from wan_dist.core.errors import ConfigError, DataError
from wan_dist.data.index import MANIFEST_NAME, Manifest, shards_digest
from wan_dist.data.pack_state import JOURNAL_NAME, REJECTS_NAME, WARNINGS_NAME, DoneShard
from wan_dist.data.plan import PackPlan
from wan_dist.data.probe import WARNINGS, Reject
from wan_dist.data.same_content import same_content_warnings
from wan_dist.data.shard_format import write_file
from wan_dist.data.source_files import Listing

MAX_CAPTION_TOKENS: Final = 512
"""Where WAN's text encoder cuts a caption, its end mark included."""

_CHARACTERS_PER_TOKEN: Final = 4
"""Of ASCII text under UMT5's tokenizer, roughly; other characters are counted as a token each."""


def finish(
    out_dir: Path, plan: PackPlan, listing: Listing, shards: Sequence[DoneShard], tokenizer_path: Path | None
) -> Manifest:
    """Write rejects, warnings, the journal in order of shards, and last the manifest; return it.

    Raises:
        DataError: every clip was rejected.
    """
    rejects = [*listing.rejects, *(r for shard in shards for r in shard.rejects)]
    by_code = _write_list(out_dir / REJECTS_NAME, rejects)
    entries = tuple(shard.entry for shard in shards)
    num_clips = sum(e.num_clips for e in entries)
    if not num_clips:
        reasons = ", ".join(f"{count} {code}" for code, count in by_code.items())
        first = rejects[0]
        # Whoever mends the clips begins anew, and empty shards look like a data set.
        for shard in shards:
            for name in (shard.entry.name, shard.entry.index_name):
                (out_dir / name).unlink(missing_ok=True)
        (out_dir / JOURNAL_NAME).unlink(missing_ok=True)
        raise DataError(
            f"{out_dir}: every clip was rejected ({reasons}), so there is nothing to train on. First: {first.path}: "
            f"{first.hint}. All are in {out_dir / REJECTS_NAME}."
        )
    warnings = [
        *(w for shard in shards for w in shard.warnings),
        *same_content_warnings(out_dir, entries),
        *_long_captions(plan, tokenizer_path),
    ]
    warnings_by_code = _write_list(out_dir / WARNINGS_NAME, warnings)
    write_file(out_dir / JOURNAL_NAME, "".join(shard.to_json() for shard in shards).encode())
    manifest = Manifest(
        digest=shards_digest(entries),
        plan_digest=plan.digest,
        num_clips=num_clips,
        num_bytes=sum(e.num_bytes for e in entries),
        rejects=by_code,
        warnings=warnings_by_code,
        concepts=listing.concepts,
        shards=entries,
    )
    write_file(out_dir / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def _write_list(path: Path, found: Iterable[Reject]) -> dict[str, int]:
    """Write a line per reject or warning; return how many there are of each code."""
    rows = sorted(found, key=lambda r: (r.path, r.code, r.hint))
    write_file(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows).encode())
    return dict(sorted(Counter(r.code for r in rows).items()))


def _long_captions(plan: PackPlan, tokenizer_path: Path | None) -> list[Reject]:
    count = _token_counter(tokenizer_path)
    found: list[Reject] = []
    for source in (clip.source for shard in plan.shards for clip in shard):
        # A token is at least one byte of text, so most captions need no counting.
        longest = max(source.captions, key=len)
        if len(longest.encode()) < MAX_CAPTION_TOKENS:
            continue
        tokens = max(map(count, source.captions))
        if tokens > MAX_CAPTION_TOKENS:
            found.append(Reject("long_caption", source.path, f"about {tokens} tokens: {WARNINGS['long_caption']}"))
    return found


def _token_counter(tokenizer_path: Path | None) -> Callable[[str], int]:
    if tokenizer_path is None:
        return _estimated_tokens
    path = tokenizer_path
    if path.is_dir():
        inside = (path / "tokenizer.json", path / "tokenizer" / "tokenizer.json")
        path = next((p for p in inside if p.is_file()), inside[0])
    if not path.is_file():
        raise ConfigError(f"--tokenizer {tokenizer_path}: no tokenizer.json there; name a model folder or the file.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def _estimated_tokens(text: str) -> int:
    num_ascii = sum(character < "\x80" for character in text)
    return num_ascii // _CHARACTERS_PER_TOKEN + len(text) - num_ascii + 1

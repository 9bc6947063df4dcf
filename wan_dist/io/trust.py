"""Whose checkpoint it is: DeepSpeed's shards are pickles, so only what this user's runs wrote is loaded.

A checksum that comes with a checkpoint proves nothing, since a stranger supplies both. So each manifest is signed with
a key that never leaves the user's state folder.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_dist.core.errors import CheckpointError

SIGNATURE = "signature"
CONTENT_HASH = "content_sha256"
_KEY_BYTES = 32


def state_dir() -> Path:
    """Return the folder of the user's key: WAN_DIST_STATE_DIR, or wan_dist in the XDG state folder."""
    if chosen := os.environ.get("WAN_DIST_STATE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wan_dist"


def sign(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with its own hash and signature, the key made if there is none yet.

    Raises:
        OSError: the key can neither be read nor made.
    """
    hashed = {**manifest, CONTENT_HASH: _content_hash(manifest)}
    return {**hashed, SIGNATURE: _signature(hashed, _key())}


def is_intact(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest is as it was written: a flipped bit in it may still be JSON."""
    return manifest.get(CONTENT_HASH) == _content_hash(manifest)


def is_own(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest was signed with this user's key and not changed since."""
    path = _key_path()
    signature = manifest.get(SIGNATURE)
    if not isinstance(signature, str) or not path.is_file():
        return False
    return hmac.compare_digest(signature, _signature(manifest, path.read_bytes()))


def require_own(folder: Path, manifest: Mapping[str, Any], *, trusted: bool, option: str) -> None:
    """Return if the shards of a checkpoint may be loaded.

    Args:
        folder: the checkpoint, for the message.
        manifest: its manifest as read.
        trusted: the user vouches for it.
        option: what the user would give to vouch for it.

    Raises:
        CheckpointError: another user, or another machine, wrote it and nobody vouches for it.
    """
    if not trusted and not is_own(manifest):
        raise CheckpointError(
            f"{folder}: was not written by a run of this user (no valid signature with the key in {state_dir()}); "
            f"its shards are pickles, which run code when loaded. If you trust where it comes from, give {option}."
        )


def _key_path() -> Path:
    return state_dir() / "checkpoint.key"


def _key() -> bytes:
    path = _key_path()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as handle:
            handle.write(secrets.token_bytes(_KEY_BYTES))
            os.fsync(fd)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # of two runs that start together, one key stays
        finally:
            temporary.unlink()
    return path.read_bytes()


def _content_hash(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name not in (SIGNATURE, CONTENT_HASH)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _signature(manifest: Mapping[str, Any], key: bytes) -> str:
    content = {name: value for name, value in manifest.items() if name != SIGNATURE}
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()

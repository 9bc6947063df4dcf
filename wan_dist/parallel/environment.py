"""What must be in the process environment before DeepSpeed is imported, and DeepSpeed's build folder.

DeepSpeed compiles C++ operators at first use into TORCH_EXTENSIONS_DIR. torch guards each build with a plain
`lock` file that a killed build leaves behind, after which every later start waits for ever without a word
(https://github.com/pytorch/pytorch/issues/189245). So each environment gets a private folder, builds happen under
a lock that the kernel releases when its holder dies, and leftovers are removed while that lock is held.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan_dist.core.errors import LaunchError

logger = logging.getLogger(__name__)

_OWN_DIR_VARIABLE = "WAN_DIST_OWNS_EXTENSIONS_DIR"
_BUILD_LOCK = ".wan_dist_build.lock"
STALE_AFTER_S = 600.0
_TELL_AFTER_S = 5.0


def private_extensions_dir() -> Path:
    """Return the build folder of this Python environment and these torch and DeepSpeed versions."""
    parts = [sys.prefix, sys.version, *(importlib.metadata.version(p) for p in ("torch", "deepspeed"))]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "wan_dist" / "torch_extensions" / digest


def prepare_environment() -> None:
    """Set the variables that DeepSpeed reads at import; values that the user set are kept.

    Call once, from a command's entry, before anything imports DeepSpeed.
    """
    import torch

    # Known before DeepSpeed is imported: it would otherwise probe for an accelerator and may pick one without torch.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(private_extensions_dir())
        os.environ[_OWN_DIR_VARIABLE] = "1"
    # ninja comes with our dependencies; torch looks for the program, not for the package.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")


@contextmanager
def build_guard(*, builds: bool = True, wait_s: float = 1800.0) -> Iterator[None]:
    """Hold the exclusive right to build DeepSpeed operators on this machine, leftovers of killed builds removed.

    In a folder that the user shares with other programs (TORCH_EXTENSIONS_DIR was set) a leftover is not ours to
    delete: one older than `STALE_AFTER_S` is reported.

    Args:
        builds: whether something will be compiled; a leftover that nobody will wait for is not reported.
        wait_s: seconds to wait for another process that builds.

    Raises:
        LaunchError: another process kept the guard for `wait_s` seconds, or a foreign lock file looks stale.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _BUILD_LOCK).open("a") as handle:
        _lock(handle.fileno(), folder, wait_s)
        own = os.environ.get(_OWN_DIR_VARIABLE) == "1"
        if own or builds:
            _clear_leftovers(folder, own=own)
        yield


def _lock(fd: int, folder: Path, wait_s: float) -> None:
    started = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - started
            if waited_s > wait_s:
                raise LaunchError(
                    f"{folder}: another process has been building DeepSpeed operators for {wait_s:.0f} s; "
                    "end it, or set TORCH_EXTENSIONS_DIR to another folder."
                ) from None
            if not told and waited_s > _TELL_AFTER_S:
                logger.info("waiting for another process that builds DeepSpeed operators in %s", folder)
                told = True
            time.sleep(0.2)


def _clear_leftovers(folder: Path, *, own: bool) -> None:
    for lock in folder.glob("*/lock"):
        age_s = time.time() - lock.stat().st_mtime
        if own:
            # Every build in a private folder happens under the guard, which we hold: nobody is building.
            logger.warning("removed %s, left by a build that was killed %.0f s ago", lock, age_s)
            lock.unlink(missing_ok=True)
        elif age_s > STALE_AFTER_S:
            raise LaunchError(
                f"{lock}: left {age_s / 60:.0f} min ago by a build that was probably killed; every start would "
                "wait for it for ever. Delete it if nothing is compiling, or unset TORCH_EXTENSIONS_DIR."
            )

"""flake.nix against a stub of nixpkgs. That proves its structure, not that the named packages exist or build."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STUB = Path(__file__).parent / "nixpkgs_stub"

pytestmark = pytest.mark.skipif(shutil.which("nix") is None, reason="needs nix (Debian: apt-get install nix-bin)")


@pytest.fixture(scope="module")
def flake_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flake")
    shutil.copy(ROOT / "flake.nix", folder)
    return folder


@pytest.fixture(scope="module")
def nix(flake_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    # A store of its own: the machine's may belong to another user.
    state = tmp_path_factory.mktemp("nix")
    env = {**os.environ, "HOME": str(state), "NIX_REMOTE": ""}
    env |= {f"NIX_{name}_DIR": str(state / name.lower()) for name in ("STORE", "STATE", "LOG")}

    def run(verb: list[str], *arguments: str) -> str:
        command = ["nix", "--extra-experimental-features", "nix-command flakes", "--offline", *verb, *arguments]
        command += ["--override-input", "nixpkgs", f"path:{STUB}", "--no-write-lock-file"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_flake_evaluates_every_shell(nix, flake_dir: Path):
    nix(["flake", "check"], f"path:{flake_dir}", "--no-build")
    shells = nix(
        ["eval"],
        f"path:{flake_dir}#devShells.x86_64-linux",
        "--json",
        "--apply",
        "builtins.mapAttrs (_: shell: shell.drvPath)",
    )
    assert set(json.loads(shells)) == {"default", "cuda", "rocm"}


@pytest.mark.parametrize(
    ("shell", "wanted", "unwanted"),
    [
        ("default", "whl/cpu", "CUDA_HOME"),
        ("cuda", "CUDA_HOME", "PIP_EXTRA_INDEX_URL"),
        ("rocm", "whl/rocm", "CUDA_HOME"),
    ],
)
def test_each_shell_picks_its_torch(nix, flake_dir: Path, shell: str, wanted: str, unwanted: str):
    hook = nix(["eval"], f"path:{flake_dir}#devShells.x86_64-linux.{shell}.shellHook", "--raw")
    assert wanted in hook
    assert unwanted not in hook
    done = subprocess.run(["bash", "-n"], input=hook, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nixpkgs_is_pinned_to_a_commit():
    assert re.search(r'nixpkgs\.url = "github:NixOS/nixpkgs/[0-9a-f]{40}"', (ROOT / "flake.nix").read_text())

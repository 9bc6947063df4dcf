"""The environment of every test, and the skips of those that need an accelerator."""

import os
import shutil
import tempfile

import pytest


def pytest_configure() -> None:
    # Before anything imports torch: ranks of a distributed test share two cores, and nothing may reach the network.
    # Set here and not in a fixture so that the processes tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The key that signs checkpoints; the user's own is left alone.
    os.environ["WAN_DIST_STATE_DIR"] = tempfile.mkdtemp(prefix="wan-dist-tests-")

    from wan_dist.parallel.environment import prepare_environment

    # One TORCH_EXTENSIONS_DIR for all tests, so that DeepSpeed's operators are compiled once.
    prepare_environment()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["WAN_DIST_STATE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator, and torch finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

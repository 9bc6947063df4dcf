"""How well a run uses its hardware: tokens, operations against a stated peak, memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_dist.models.wan.flops import block_flops

# Dense bf16 peaks of the makers' data sheets, TFLOP/s; the longer name first where one holds the other.
PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI250": 362.1,
    "7900 XTX": 122.8,
}


def known_peak_tflops(device_name: str) -> float | None:
    """Return the bf16 peak of a GPU by its name, None if it is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into use of the hardware.

    Attributes:
        configs: diffusers configuration of each component's transformer.
        all_weights: every weight is trained.
        checkpointing: none, block or attention.
        peak_tflops: of one rank's device; None leaves MFU out.
    """

    configs: Mapping[str, Mapping[str, Any]]
    all_weights: bool
    checkpointing: str
    peak_tflops: float | None

    def flops(self, component: str, num_samples: int, num_tokens: int) -> tuple[float, float]:
        """Return the operations that samples of one shape need, and those done, recomputation included.

        Args:
            component: what is trained.
            num_samples: samples.
            num_tokens: tokens of them all.
        """
        if num_samples == 0:
            return 0.0, 0.0
        sample = block_flops(self.configs[component], num_tokens // num_samples)
        needed = num_samples * sample.training(all_weights=self.all_weights)
        return needed, needed + num_samples * sample.recomputed(self.checkpointing)

    def use(self, flops: float, seconds: float) -> float | None:
        """Return the share of the peak that `flops` operations of one device in `seconds` are."""
        if self.peak_tflops is None or seconds <= 0:
            return None
        return flops / seconds / (self.peak_tflops * 1e12)


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Return the device memory that was allocated at most since the last call, and the host memory now, GiB."""
    host = 0.0
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                host = int(line.split()[1]) / 2**20
    if device.type != "cuda":
        return 0.0, host
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak, host

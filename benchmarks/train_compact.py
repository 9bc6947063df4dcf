"""Image-to-video of ti2v-5B: two rows of modulation per sample against diffusers' row per token, forward and backward.

One block row of the real model's proportions. On an accelerator at full width and length, in bf16, with the memory that
the device's allocator counts; on a CPU small, in fp32, each run in a process of its own, with its resident memory.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from measure import hardware, versions

from wan_dist.models.wan.compact import bind_compact

TEXT = 64


def run(quick: bool) -> None:
    """Measure and print a table of times and memory, and their ratios to diffusers' image-to-video."""
    on_gpu = torch.cuda.is_available()
    heads, layers, latent = (24, 2, (31, 44, 80)) if on_gpu and not quick else (4, 2, (9, 24, 32))
    tokens = latent[0] * latent[1] * latent[2] // 4
    device = torch.cuda.get_device_name() if on_gpu else hardware()
    print(f"{device}; {versions('torch', 'diffusers')}; {layers} blocks of width {heads * 128}, {tokens} tokens")
    works = _works(heads, layers, latent, "cuda" if on_gpu else "cpu")
    rounds = 3 if quick else 7
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            measured[name].append(_on_gpu(work) if on_gpu else _apart(work))
    print("| contestant | s | of diffusers' | peak MiB above the model | of diffusers' |")
    print("|---|---|---|---|---|")
    reference = measured["image-to-video, diffusers: a row per token"]
    for name, results in measured.items():
        columns = [statistics.median(r[i] for r in results) for i in range(2)]
        ratios = [statistics.median(r[i] / o[i] for r, o in zip(results, reference, strict=True)) for i in range(2)]
        print(f"| {name} | {columns[0]:.3f} | {ratios[0]:.2f}x | {columns[1]:.0f} | {ratios[1]:.2f}x |", flush=True)


def _works(heads: int, layers: int, latent: tuple[int, int, int], device: str) -> dict[str, Callable[[], None]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = WanTransformer3DModel(
        num_attention_heads=heads,
        in_channels=48,
        out_channels=48,
        text_dim=TEXT,
        ffn_dim=heads * 128 * 14 // 3,
        num_layers=layers,
    )
    bind_compact(model.to(device, dtype))
    noisy = torch.randn(1, 48, *latent, device=device, dtype=dtype)
    text = torch.randn(1, 512, TEXT, device=device, dtype=dtype)
    per_frame = latent[1] * latent[2] // 4
    rest, first = torch.full((1,), 700.0, device=device), torch.zeros(1, device=device)
    per_token = torch.cat([first.expand(1, per_frame), rest.expand(1, per_frame * (latent[0] - 1))], dim=1)

    def step(timestep: torch.Tensor, **extra: Any) -> Callable[[], None]:
        def work() -> None:
            model(noisy, timestep, text, return_dict=False, **extra)[0].float().square().mean().backward()
            model.zero_grad()

        return work

    return {
        "text-to-video, diffusers: one row": step(rest),
        "image-to-video, diffusers: a row per token": step(per_token),
        "image-to-video, wan_dist: two rows": step(rest, first_timestep=first),
    }


def _on_gpu(work: Callable[[], None]) -> tuple[float, float]:
    """Return seconds and peak memory in MiB above what lay there, on the second of two runs."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**20


def _apart(work: Callable[[], None]) -> tuple[float, float]:
    """Return CPU-seconds and the growth of resident memory in MiB of a run in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        work()
        spent_s = time.process_time() - started
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, f"{spent_s} {grown_kib / 1024}".encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    answer = os.read(reader, 100).split()
    os.close(reader)
    if status or len(answer) != 2:
        raise SystemExit("a contestant failed; its message is above")
    return float(answer[0]), float(answer[1])

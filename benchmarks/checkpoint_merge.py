"""A LoRA into a model larger than a memory cap: `wan-dist lora merge` against peft's merge in memory."""

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from measure import hardware, versions
from safetensors.torch import save_file

from wan_dist.adapters.lora_files import LoraModule, LoraWeights
from wan_dist.adapters.lora_formats import lora_header, lora_tensors
from wan_dist.models.wan.keys import takes_lora
from wan_dist.models.wan.transformer import empty_transformer

CAP_MIB = 512
RANK = 16
PEFT = """import sys, torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
model = WanTransformer3DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
model.load_lora_adapter(load_file(sys.argv[2]), prefix="transformer")
model.fuse_lora()
model.unload_lora()
model.save_pretrained(sys.argv[3])"""


def run(quick: bool) -> None:
    """Measure and print a table."""
    num_layers = 6 if quick else 16
    print(f"{hardware()}; {versions('torch', 'diffusers', 'peft')}")
    with tempfile.TemporaryDirectory(prefix="wan-dist-benchmark-") as name:
        root = Path(name)
        size, lora_size = make_model(root / "model", root / "lora.safetensors", num_layers)
        print(f"model of {size / 2**20:.0f} MiB in bf16, LoRA of rank {RANK} with {lora_size / 2**20:.0f} MiB")
        print(f"cap: RLIMIT_DATA (private memory of the process, imports included) {CAP_MIB} MiB")
        print("| contestant | cap | result | CPU-s | peak of anonymous memory, MiB |")
        print("|---|---|---|---|---|")
        merge = [sys.executable, "-m", "wan_dist", "lora", "merge", root / "model"]
        for cap in (None, CAP_MIB):
            suffix = "capped" if cap else "free"
            words = [*merge, root / f"ours-{suffix}", "--lora", root / "lora.safetensors"]
            _show("wan-dist lora merge", words, cap)
            words = [sys.executable, "-c", PEFT, root / "model", root / "lora.safetensors", root / f"peft-{suffix}"]
            _show("peft, in memory", words, cap)


def make_model(folder: Path, lora: Path, num_layers: int) -> tuple[int, int]:
    """Write a transformer as wide as half of ti2v-5B in bf16 and a LoRA for it; return both sizes in bytes."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 48,
        "out_channels": 48,
        "ffn_dim": 7168,
        "num_layers": num_layers,
    }
    torch.manual_seed(0)
    model = empty_transformer(config).to(torch.bfloat16)
    modules = {}
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.02)
        stem = name.removesuffix(".weight")
        if name.startswith("blocks.") and name.endswith(".weight") and takes_lora(stem):
            out, width = parameter.shape
            modules[stem] = LoraModule(torch.randn(RANK, width) / 30, torch.randn(out, RANK) / 30, 1.0)
    model.save_pretrained(folder)  # type: ignore[operator]
    weights = LoraWeights(modules, "made")
    # Prefixed as diffusers wants it; the scale is 1, so neither side needs an alpha.
    save_file(lora_tensors(weights, "diffusers", torch.bfloat16), lora, lora_header(weights, "diffusers"))
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")), lora.stat().st_size


def _show(name: str, words: list[object], cap_mib: int | None) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, peak_mib = _run([str(word) for word in words], cap_mib)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = "merged" if status == 0 else "out of memory"
    cap = f"{cap_mib} MiB" if cap_mib else "none"
    print(f"| {name} | {cap} | {result} | {cpu_s:.1f} | {peak_mib:.0f} |", flush=True)


def _run(words: list[str], cap_mib: int | None) -> tuple[int, float]:
    def limit() -> None:
        if cap_mib:
            resource.setrlimit(resource.RLIMIT_DATA, (cap_mib << 20, cap_mib << 20))

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, env=environment, preexec_fn=limit)
        peak, done = [0.0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], _anonymous_mib(child.pid))
                time.sleep(0.01)

        thread = threading.Thread(target=watch)
        thread.start()
        status = child.wait()
        done.set()
        thread.join()
        log.seek(0)
        text = log.read().decode(errors="replace")
    if status and "memory" not in text.lower():
        raise SystemExit(f"{' '.join(words[:5])} failed otherwise than by memory:\n{text[-2000:]}")
    return status, peak[0]


def _anonymous_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0) / 1024

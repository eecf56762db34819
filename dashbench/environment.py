"""Where a row was measured: hardware, software, source, and what this machine can do at best."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dashbench.timing import TIMER_VERSION

# Packages whose version changes what is measured.
PACKAGES = ("torch", "triton", "flash-attn", "fa3-fwd", "fla-core", "adasplash", "transformers", "numpy")
# What decides whether two rows may stand side by side. Clocks, host names and our own commit do not.
KEY_FIELDS = (
    "device",
    "capability",
    "driver",
    "cuda",
    "cudnn",
    "torch",
    "triton",
    "python",
    "timer",
    "cpu",
    "threads",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit of the source tree that this package runs from; nulls when installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"commit": os.environ.get("DASHBENCH_COMMIT"), "dirty": None}

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD")[:12] or None,
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": None, "dirty": None}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str) -> dict[str, Any]:
    """Facts of this process's environment.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        JSON-ready facts. A fact that cannot be had is None; `gpu_id` tells boards of one kind apart without
        publishing their serial numbers.
    """
    out: dict[str, Any] = {
        "kind": device,
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "driver": None,
        "capability": None,
        "timer": TIMER_VERSION,
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": _cpu() if device == "cpu" else None,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "git": _git(),
        "memory_bytes": None,
        "l2_bytes": 0,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        out |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "gpu_id": hashlib.sha256(str(properties.uuid).encode()).hexdigest()[:8],
        }
        try:
            import pynvml

            pynvml.nvmlInit()
            driver = pynvml.nvmlSystemGetDriverVersion()
            out["driver"] = driver.decode() if isinstance(driver, bytes) else driver
        except Exception:  # the driver version is a nicety
            pass
    return out


def key(environment: dict[str, Any]) -> str:
    """8 hex digits: equal where rows may be compared (same GPU model, software and timer; any host or
    board)."""
    text = json.dumps({name: environment.get(name) for name in KEY_FIELDS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def ceilings(device: str, seconds: float = 0.3) -> dict[str, float]:
    """Measured best rates of this machine: the fastest of repeated calls, because a ceiling is not a median.

    On a GPU an 8192³ bf16 product of random data and a copy of 1 GiB; on a CPU a 1024³ product in fp32 or
    bf16, whichever is faster, and a copy of 64 MiB. A copy counts bytes read and bytes written.

    Args:
        device: `cpu` or `cuda`.
        seconds: to spend on each product and on the copy, once six calls are done.

    Returns:
        `{"matmul_tflops", "copy_tb_per_s"}`.
    """
    on_gpu = device == "cuda"
    size, dtypes = (8192, [torch.bfloat16]) if on_gpu else (1024, [torch.float32, torch.bfloat16])
    rates = []
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        rates.append(2 * size**3 / _best_s(partial(torch.matmul, a, b, out=product), device, seconds) / 1e12)
    source = torch.randn((1 << 30 if on_gpu else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / _best_s(partial(target.copy_, source), device, seconds) / 1e12
    return {"matmul_tflops": round(max(rates), 4), "copy_tb_per_s": round(copy, 4)}


def _best_s(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest call: of at least six, fewer once they took five times `seconds`, as bf16
    products do on CPUs without such instructions."""
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        spent = time.perf_counter() - begin
        if spent >= seconds and (len(times) > 5 or spent >= 5 * seconds):
            return min(times)

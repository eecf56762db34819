"""What this machine can measure, found without loading torch into this process."""

from __future__ import annotations

import importlib.util
import os
import platform
from functools import cache
from importlib import metadata
from typing import Any

from rich.table import Table

from dashbench.methods import Method, registry
from dashbench.plan import missing_requirement
from dashbench.tables import wide_console

SHOWN = (
    "torch",
    "triton",
    "fa3-fwd",
    "flash-attn",
    "fla-core",
    "transformers",
    "lm-eval",
    "pandas",
    "matplotlib",
)

CPU: dict[str, Any] = {"kind": "cpu", "device": "cpu", "capability": None, "memory_bytes": None}


@cache
def device_facts() -> dict[str, Any]:
    """Facts of the GPU that a worker would take, from NVML, or of the CPU; `dashbench.plan` judges by them.

    Workers obey DASHBENCH_DEVICE and CUDA_VISIBLE_DEVICES, so this does too.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if os.environ.get("DASHBENCH_DEVICE") == "cpu" or visible in ("", "-1"):
        return dict(CPU)
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
        name = pynvml.nvmlDeviceGetName(handle)
        driver = pynvml.nvmlSystemGetDriverVersion()
        return {
            "kind": "cuda",
            "device": name.decode() if isinstance(name, bytes) else name,
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "capability": list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            "count": pynvml.nvmlDeviceGetCount(),
        }
    except Exception:  # no driver, no GPU, no permission: all mean that there is none for us
        return dict(CPU)


def version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def verdict(method: Method, device: dict[str, Any]) -> tuple[bool, str]:
    """Whether a method can run on a device, and if not, what would enable it."""
    if device["kind"] not in method.devices:
        return False, "needs an NVIDIA GPU"
    if method.min_capability and device["capability"] and tuple(device["capability"]) < method.min_capability:
        return False, f"needs compute capability {'.'.join(map(str, method.min_capability))}"
    if requirement := missing_requirement(method):
        return False, f"pip install '{requirement}'"
    module = method.target.split(":")[0]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return False, f"its module {module} does not exist"
    return True, ""


def print_doctor() -> None:
    """Prints the machine, the versions and the methods."""
    console = wide_console()
    device = device_facts()
    if device["kind"] == "cuda":
        capability = ".".join(map(str, device["capability"]))
        memory = device["memory_bytes"] / 2**30
        console.print(f"GPU          {device['device']}, {memory:.0f} GiB, compute capability {capability}")
        console.print(f"driver       {device['driver']}")
    else:
        console.print("GPU          none found: methods that need one will be skipped")
    console.print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in SHOWN:
        console.print(f"{package:13}{version(package) or 'not installed'}")
    table = Table(header_style="bold", pad_edge=False)
    for column in ("method", "runs here", "to enable it"):
        table.add_column(column, no_wrap=column != "to enable it")
    for method in registry().values():
        able, what = verdict(method, device)
        table.add_row(method.name, "yes" if able else "no", what)
    console.print(table)

"""What every test gets: Triton's interpreter and one thread where there is no GPU, poisoned memory, and GPU
tests skipped with a reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton at import, so it must be set before any test module imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(Path(__file__).parent))
    from interpreter_numpy import allow_loop_bounds

    allow_loop_bounds()
    # Test processes beside each other share the cores, and threads that wait for one another spin: small
    # models train four times as fast with one. The variable is for the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


# torch lists the functions that `with torch.device(...)` redirects when it is first used. That must not be
# while `poisoned_empty` has replaced some of them: a model of 8 B parameters on the meta device would then
# take 33 GB of memory.
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin hand out NaN (or a large number), so that an output nobody wrote cannot
    pass."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            made = make(*args, **kwargs)
            with torch.no_grad():
                if made.is_floating_point():
                    made.fill_(float("nan"))
                elif made.dtype in (torch.int32, torch.int64):
                    made.fill_(2**30)
            return made

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def memory_given_back():
    """What a test's tensors took goes back to the GPU, which test processes beside each other share."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

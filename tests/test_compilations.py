"""What is compiled depends on shapes that matter, and not on length, batch or sparsity."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NEW = {
    # Another kernel for less than a chunk than for everything else on Hopper; the rest is per feature.
    "prefill 4096": {"summarize", "route", "attend_hopper"},
    "prefill 1": {"attend"},
    "prefill biased": {"route", "attend_hopper"},
    "packed": {"route"},
    "padded": {"summarize", "route", "attend"},
    "train 2048": {"backward_lists", "backward_query", "backward_chunk"},
    "decode 4096": {"decode_kernels"},
    "decode paged": {"decode_kernels"},
    "decode padded": {"decode_kernels"},
    "decode balanced": {"decode_kernels"},
    "decode balanced, 32 groups": {"decode_kernels"},  # sizes programs too, by powers of two
    "decode balanced, paged": {"decode_kernels"},
    "decode balanced, padded": {"decode_kernels"},
}
# The cache's capacity, not its length, sizes a program of the decode router: by powers of two.
ROUTE_TILES = {"decode 8192, batch 3", "decode paged otherwise"}


@pytest.fixture(scope="module")
def compiled():
    script = Path(__file__).parent / "compilations.py"
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_only_new_features_compile(compiled):
    for scenario, kernels in compiled.items():
        if scenario in ROUTE_TILES:
            assert kernels == ["decode_kernels.route_kernel"], scenario
        else:
            assert {kernel.split(".")[0] for kernel in kernels} == NEW.get(scenario, set()), scenario


def test_the_recorder_sees_kernels(compiled):
    """A recorder that saw nothing would pass the test above for all scenarios but these."""
    assert sum(map(len, compiled.values())) > 20

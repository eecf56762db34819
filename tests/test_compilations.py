"""What is compiled depends on shapes that matter, and not on length, batch or sparsity."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pending_products import overwritten, released_early

NEW = {
    # Another kernel for less than a chunk than for everything else on Hopper; the rest is per feature.
    "prefill 4096": {"summarize", "route_kernels", "attend_hopper"},
    "prefill biased": {"route_kernels", "attend_hopper"},
    "packed": {"route_kernels"},
    "padded": {"summarize", "route_kernels", "attend"},
    "train 2048": {"backward_lists", "backward_query", "backward_chunk"},
    "train biased": {"backward_query", "backward_chunk"},
    "train biased, deterministic": {"backward_query", "backward_chunk"},
    "train deterministic": {"backward_query", "backward_chunk"},
    "train nsa": {
        "compress",
        "band_hopper",
        "selection_hopper",
        "selection",
        "gated_sum",
        "band_backward",
        "backward_lists",
        "backward_query",
        "backward_chunk",
    },
    "train infllmv2": {"band", "selection", "selection_hopper"},
    "prefill nsa": {"band_hopper", "attend_hopper"},  # outputs are gated and summed in place
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


def run(*arguments):
    """What the script prints."""
    here = Path(__file__).parent
    command = [sys.executable, "-P", str(here / "compilations.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(here)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled():
    return run()


def test_only_new_features_compile(compiled):
    for scenario, kernels in compiled.items():
        if scenario in ROUTE_TILES:
            assert kernels == ["decode_kernels.route_kernel"], scenario
        else:
            assert {kernel.split(".")[0] for kernel in kernels} == NEW.get(scenario, set()), scenario


def test_the_recorder_sees_kernels(compiled):
    """A recorder that saw nothing would pass the test above for all scenarios but these."""
    assert sum(map(len, compiled.values())) > 20


def test_no_tile_is_loaded_over_one_that_a_product_still_reads():
    """Every backward kernel as compiled for an H200, and the rivals' forward ones."""
    kernels = [kernel for found in run("--compile", "train").values() for kernel in found]
    assert sum("backward_chunk._chunk_kernel" in kernel for kernel in kernels) == 5
    assert [kernel for kernel in kernels if " " in kernel] == []


def test_no_query_buffer_is_released_while_it_is_loaded_from():
    """The Hopper kernels, plain and with sums in place."""
    for scenario in ("prefill 4096", "prefill nsa"):
        (found,) = run("--compile", scenario).values()
        assert any("hopper" in kernel for kernel in found)
        assert [kernel for kernel in found if " " in kernel] == []


RELEASES = """
    %q = ttg.local_load %buffer : !ttg.memdesc<64x128xbf16> -> tensor<64x128xbf16>
    {between}
    ttng.arrive_barrier %free, 1, %true : !ttg.memdesc<1xi64>
"""


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ("%k = ttg.memdesc_index %ring[%slot] : x", ["%q"]),
        ("%s = ttng.warp_group_dot %q, %k, %zero, %false {isAsync = true} : x", []),
        ("%r = arith.addf %o, %q : x\n    ttg.local_store %r, %buffer : x", []),
        ("%r = arith.addf %o, %q : x\n    ttg.local_store %o, %buffer : x", ["%q"]),
    ],
)
def test_an_early_release_is_found(between, found):
    assert released_early(RELEASES.format(between=between)) == found


LOOP = """
    %tile = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x128xbf16, #shared, #smem, mutable>
    %sum:2 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %zero) -> (tensor<64x128xf32, #mma>) {{
      %slot = ttg.memdesc_index %tile[%c0] : !ttg.memdesc<{slots}x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      %rows = ttg.memdesc_reshape %slot : !ttg.memdesc<64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      %b = ttng.warp_group_dot %p, %rows, %a {{inputPrecision = 0 : i32, isAsync = true}} : tensor<64x128xf32>
      {wait}
      ttng.async_tma_copy_global_to_local %q[%c0, %i] %slot, %barrier, %true : !tt.tensordesc<x>
      scf.yield %b : tensor<64x128xf32, #mma>
    }}
"""


@pytest.mark.parametrize(
    ("slots", "pendings", "found"), [(1, None, ["%tile"]), (1, 0, []), (1, 1, ["%tile"]), (2, None, [])]
)
def test_a_load_without_a_wait_is_found(slots, pendings, found):
    wait = "" if pendings is None else f"%w = ttng.warp_group_dot_wait %b {{pendings = {pendings} : i32}} : x"
    assert overwritten(LOOP.format(slots=slots, wait=wait)) == found

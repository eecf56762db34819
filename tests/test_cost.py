"""Costs against multiply-adds counted by tiny loops that do the work."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench import cost
from dashbench.rows import Point, Shape

SHAPE = Shape(name="tiny", query_heads=4, kv_heads=2, head_dim=8)
H200 = {"matmul_tflops": 800.0, "copy_tb_per_s": 4.3}


def point(phase="prefill", context=48, batch=2, dtype="bfloat16", block=16, shape=SHAPE):
    return Point(
        method="m",
        phase=phase,
        context=context,
        batch=batch,
        shape=shape,
        dtype=dtype,
        routing="topics",
        cache="cold",
        launch="graph",
        block_size=block,
    )


class Counter:
    """Counts FLOPs of inner products."""

    def __init__(self):
        self.flops = 0

    def products(self, count, dim):
        for _ in range(count):
            for _ in range(dim):
                self.flops += 2


def counted_attention(asked, kept):
    """FLOPs of attention in which query i meets kept(i) keys: scores, then values."""
    counter = Counter()
    first = asked.context - 1 if asked.phase == "decode" else 0
    for _ in range(asked.batch * asked.shape.query_heads):
        for i in range(first, asked.context):
            counter.products(2 * kept(i), asked.shape.head_dim)
    return counter.flops


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["prefill", "decode"]), st.integers(1, 24), st.integers(1, 2))
def test_dense_flops_are_those_counted(phase, context, batch):
    asked = point(phase, context, batch)
    done = cost.work(asked, "dense", 0.0)
    assert done.flops == done.kept_flops == done.dense_flops == counted_attention(asked, lambda i: i + 1)


def test_kept_flops_are_those_counted_for_a_budget():
    asked = point()

    def kept(i):
        return min(i // 16, 1) * 16 + i % 16 + 1

    s_flop = 1 - sum(map(kept, range(48))) / sum(range(1, 49))
    done = cost.work(asked, "other", s_flop)
    assert done.flops == pytest.approx(counted_attention(asked, kept), rel=1e-12)
    assert done.kept_flops < done.dense_flops


def test_training_is_two_and_five_products():
    forward = cost.work(point("prefill"), "dense", 0.0).flops
    assert cost.work(point("train"), "dense", 0.0).flops == forward * (2 + 5) / 2


@pytest.mark.parametrize("family", ["dash", "infllmv2", "nsa"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_routing_flops_are_those_counted(family, phase):
    """Long against the block, so that borders do not matter; one head, one dimension."""
    length, block = 4096, 16
    shape = Shape(name="one", query_heads=1, kv_heads=1, head_dim=1)
    asked = point(phase, length, 1, block=block, shape=shape)
    stride, products = {
        "dash": (block, 1),
        "infllmv2": (block // 4, 2),
        "nsa": (block // 4, 3),
    }[family]
    counted = sum(
        2 * products * ((i + 1) // stride) for i in (range(length) if phase == "prefill" else [length - 1])
    )
    done = cost.work(asked, family, 0.5)
    assert done.flops - done.kept_flops == pytest.approx(counted, rel=0.01)


def test_published_routing_shares_at_block_64():
    assert cost.routing_share("dash", 64) == (1 / 128, 1 / 128)
    assert cost.routing_share("infllmv2", 64) == (1 / 16, 1 / 32)
    assert cost.routing_share("nsa", 64) == (1 / 16 + 1 / 32, 1 / 16)
    assert cost.routing_share("fa3", 64) == (0.0, 0.0)


def test_the_ideal_decode_speedups_of_dash():
    """Ideal ratio to dense at 128k and 50, 75, 87.5, 93.75 %: bytes alone, 1.97, 3.88, 7.53, 14.2."""
    shape = Shape(name="minicpm4-8b", query_heads=32, kv_heads=2, head_dim=128)
    asked = point("decode", 131072, 1, block=64, shape=shape)
    dense = cost.work(asked, "dense", 0.0).bytes
    found = [dense / cost.work(asked, "dash", s).bytes for s in (0.5, 0.75, 0.875, 0.9375)]
    assert found == pytest.approx([1.97, 3.88, 7.53, 14.2], rel=0.005)


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_bytes_are_those_of_the_tensors(dtype, element):
    batch, queries, heads, kv_heads, dim = 2, 48, 4, 2, 8
    query = output = batch * heads * queries * dim
    key = value = batch * kv_heads * queries * dim
    everything = (query + output + key + value) * element
    assert cost.problem_bytes(point(dtype=dtype)) == everything
    assert cost.work(point(dtype=dtype), "dense", 0.0).bytes == everything
    # Training: q, k, v, dO in, o, dq, dk, dv out.
    assert cost.problem_bytes(point("train", dtype=dtype)) == 2 * everything
    one = batch * heads * dim
    decode = (2 * one + key + value) * element
    assert cost.problem_bytes(point("decode", dtype=dtype)) == decode
    sparse = cost.work(point("decode", dtype=dtype), "other", 0.75).bytes
    assert sparse == (2 * one + (key + value) / 4) * element


def test_rates_and_the_ceiling_that_binds():
    done = cost.Work(flops=8e14, bytes=4.3e10, kept_flops=8e14, dense_flops=1e15)
    found = cost.rates(done, 2000.0, H200)
    assert found["tflops"] == pytest.approx(400.0)
    assert found["tb_per_s"] == pytest.approx(0.0215)
    assert found["percent_of_ceiling"] == pytest.approx(50.0)
    memory_bound = cost.Work(flops=1e9, bytes=4.3e9, kept_flops=1e9, dense_flops=1e9)
    assert cost.rates(memory_bound, 2.0, H200)["percent_of_ceiling"] == pytest.approx(50.0)
    assert cost.rates(done, 1.0, {})["percent_of_ceiling"] is None


def test_the_floor_is_flops_always_and_bytes_only_out_of_a_cold_cache():
    compute = cost.Work(flops=2e12, bytes=0.0, kept_flops=8e11, dense_flops=2e12)
    assert cost.floor_ms(compute, H200, cold=False, cache_bytes=0) == pytest.approx(cost.FLOOR_MARGIN * 1.0)
    memory = cost.Work(flops=0.0, bytes=4.35e9, kept_flops=0.0, dense_flops=0.0)
    cache = 50_000_000
    assert cost.floor_ms(memory, H200, True, cache) == pytest.approx(cost.FLOOR_MARGIN * 1.0)
    assert cost.floor_ms(memory, H200, False, cache) == 0.0
    assert cost.floor_ms(memory, H200, True, 4_000_000_000) == 0.0
    assert cost.floor_ms(memory, {}, True, 0) == 0.0


def test_planning_needs_no_torch():
    modules = "dashbench.cost, dashbench.routings, dashbench.timing_options"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

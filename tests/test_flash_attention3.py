"""FlashAttention-3: refusals where it cannot run, numbers and kernel names where it can."""

import pytest
import torch
from baseline_problems import make_problem, relative_error

from dashbench.baselines import flash_attention3
from dashbench.baselines.api import Unsupported
from dashbench.baselines.attention_reference import attention_rows

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
GPU = {"batch": 2, "group": 16, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize("prepare", [flash_attention3.prepare, flash_attention3.prepare_fp8])
def test_without_a_hopper_gpu_it_says_so(prepare):
    with pytest.raises(Unsupported, match="needs an NVIDIA Hopper GPU"):
        prepare(make_problem("prefill", 20))


def test_training_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="forward only"):
        flash_attention3.prepare(make_problem("train", 20))


def test_quantising_keeps_each_group_within_e4m3():
    x = make_problem("prefill", 50, kv_heads=2, group=3, dtype=torch.float32).query
    x[:, 3:] *= 1000
    copy, scale = flash_attention3.quantise(x, 2)
    assert copy.dtype == torch.float8_e4m3fn and scale.shape == (1, 2)
    back = flash_attention3._dequantised(copy.transpose(1, 2), scale)
    largest = x.reshape(1, 2, -1).abs().amax(-1).repeat_interleave(3, 1)[..., None, None]
    step = torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10)
    assert ((back - x).abs() <= step * 1.001).all(), "within half a step of e4m3, normal or subnormal"


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("length", [1, 63, 1000])
def test_output_equals_fp64(phase, length):
    problem = make_problem(phase, length, **GPU)
    operator = flash_attention3.prepare(problem)
    expected = operator.reference(torch.arange(problem.query.shape[2]), None).output
    for _ in range(3):  # the scheduler metadata is used again and again
        assert relative_error(operator.run(), expected) < 0.06


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_fp8_is_near_its_own_reference_and_the_exact_one(phase):
    problem = make_problem(phase, 777, **GPU)
    operator = flash_attention3.prepare_fp8(problem)
    rows = torch.arange(problem.query.shape[2], device="cuda")
    own = operator.reference(rows, None).output
    exact = attention_rows(problem.query, problem.key, problem.value, rows + problem.start)
    output = operator.run().double()
    assert output.isfinite().all()
    own_error, all_error = ((output - e).norm() / e.norm() for e in (own, exact))
    assert own_error < 0.08 and all_error < 0.15, (own_error, all_error)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("lengths", ["tensor", "full"])
def test_decode_can_be_captured_in_a_graph(lengths):
    operator = flash_attention3.prepare(make_problem("decode", 3000, **GPU), lengths=lengths)
    exact = operator.reference(torch.tensor([0]), None).output
    eager = operator.run().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator.run()
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, eager)
        assert relative_error(output, exact) < 0.06


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_kernel_that_runs_is_the_one_for_sm90(phase):
    operator = flash_attention3.prepare(make_problem(phase, 1000, **GPU))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        operator.run()
        torch.cuda.synchronize()
    kernels = " ".join(e.key for e in profile.key_averages())
    assert "FlashAttnFwdSm90" in kernels, kernels

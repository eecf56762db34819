"""Dense attention through SDPA: numbers against fp64, the backend really pinned, refusals worded."""

import pytest
import torch
from baseline_problems import make_problem, relative_error
from torch.nn.attention import SDPBackend

from dashbench.baselines import dense
from dashbench.baselines.api import Unsupported

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}
PREPARE = {"flash": dense.prepare_flash, "cudnn": dense.prepare_cudnn, "efficient": dense.prepare_efficient,
           "math": dense.prepare_math}  # fmt: skip


def check(problem, operator):
    """The operator's output, and its gradients when it trains, against fp64."""
    tolerance = TOLERANCE[problem.query.dtype]
    output = operator.run()
    expected = operator.reference(torch.arange(problem.query.shape[2]), None)
    assert output.shape == problem.query.shape and output.dtype == problem.query.dtype
    assert relative_error(output, expected.output) < tolerance
    if problem.phase == "train":
        grads, exact = operator.gradients(), operator.reference_gradients()
        for name in ("query", "key", "value"):
            assert grads[name].shape == getattr(problem, name).shape
            assert relative_error(grads[name], exact[name]) < 4 * tolerance, name


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_fp64(backend, group, phase, dtype):
    problem = make_problem(phase, 67, batch=2, group=group, dtype=dtype)
    check(problem, PREPARE[backend](problem))


def test_decode_equals_the_last_row_of_prefill():
    prefill = make_problem("prefill", 41)
    decode = make_problem("decode", 41)
    decode = type(decode)(
        "decode", prefill.query[:, :, -1:], prefill.key, prefill.value, prefill.summary_query
    )
    for prepare in (dense.prepare_flash, dense.prepare_math):
        torch.testing.assert_close(prepare(decode).run()[:, :, 0], prepare(prefill).run()[:, :, -1])


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_backend_without_a_kernel_here_is_unsupported_and_not_replaced(backend):
    with pytest.raises(Unsupported, match=r"SDPA backend .* refuses"):
        PREPARE[backend](make_problem("prefill", 20))


def test_other_errors_are_not_turned_into_a_skip():
    problem = make_problem("prefill", 20)
    broken = type(problem)(
        "prefill", problem.query[..., :3], problem.key, problem.value, problem.summary_query
    )
    with pytest.raises(RuntimeError):
        dense.prepare_math(broken).run()


def test_a_backend_that_refuses_grouped_heads_gets_expanded_ones_and_says_so(monkeypatch):
    problem = make_problem("train", 30, group=4)
    operator = dense._operator(problem, SDPBackend.MATH, enable_gqa=False)
    assert operator.notes["grouped_heads"] == "expanded"
    assert operator.notes["expanded"] == "inside the timed region"
    check(problem, operator)
    prefill = make_problem("prefill", 30, group=4)
    operator = dense._operator(prefill, SDPBackend.MATH, enable_gqa=False)
    assert operator.weights_bytes == 2 * 4 * prefill.key.numel() * 8
    check(prefill, operator)


def test_the_switches_are_left_as_they_were():
    names = ("flash", "mem_efficient", "math", "cudnn")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        before = [getattr(torch.backends.cuda, f"{n}_sdp_enabled")() for n in names]
        dense.prepare_flash(make_problem("prefill", 20)).run()
        with pytest.raises(Unsupported):
            dense.prepare_cudnn(make_problem("prefill", 20))
        assert [getattr(torch.backends.cuda, f"{n}_sdp_enabled")() for n in names] == before
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_on_a_gpu_the_reason_of_a_refusal_is_pytorchs(backend):
    with pytest.raises(Unsupported, match=r"refuses: Expected query, key and value to all be of dtype"):
        PREPARE[backend](make_problem("prefill", 64, head_dim=64, dtype=torch.float32, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("backend", list(PREPARE))
def test_on_a_gpu(backend, phase):
    problem = make_problem(phase, 333, batch=2, group=16, head_dim=128, dtype=torch.bfloat16, device="cuda")
    operator = PREPARE[backend](problem)
    check(problem, operator)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        operator.run()
        torch.cuda.synchronize()
    kernels = " ".join(e.key for e in profile.key_averages()).lower()
    own = {"flash": "flash_fwd", "cudnn": "cudnn", "efficient": "fmha", "math": "softmax"}[backend]
    assert own in kernels, kernels

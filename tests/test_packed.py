"""Packed sequences: every sequence comes out as if it were alone, forward and backward."""

import pytest
import torch
from test_dash import DEVICE, DTYPE, planted

from dashbench.kernels.dash import dash_attention
from dashbench.kernels.packed import packing
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.reference import dash_attention as specified

# Of the whole sequence in fp32 (interpreter) or of its bf16 output.
CLOSE = 1e-5 if torch.float32 == DTYPE else 2e-2


def pieces(x, lengths):
    return x.split(lengths, 2)


def bounds(lengths, device=DEVICE):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@pytest.mark.parametrize("lengths", [[33, 1, 70, 16, 0, 20], [5], [16, 48, 32]], ids=str)
@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_places_are_chunk_aligned_and_tables_name_the_sequence(lengths, device):
    found = packing(bounds(lengths, device), sum(lengths), 16, torch.device("cpu"))
    place = torch.arange(sum(lengths)) if found.place is None else found.place
    start = chunk = 0
    for length in lengths:
        assert place[start : start + length].tolist() == list(range(chunk * 16, chunk * 16 + length))
        chunks = -(-length // 16)
        for c in range(chunk, chunk + chunks):
            assert found.sequences[c].tolist() == [chunk, chunk * 16 + length]
        start, chunk = start + length, chunk + chunks
    for c in range(chunk, len(found.sequences)):
        assert found.sequences[c].tolist() == [c, 0]
    assert found.tokens == 16 * len(found.sequences)
    assert (found.place is None) == (device == "cpu" and all(n % 16 == 0 for n in lengths))


OPTIONS = [
    {},
    {"forced": "own_and_previous", "visibility": "completed", "bias_mode": "raw"},
    {"bias_mode": "centered", "sigma": 1.0, "alpha": 1.25},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_sequence_equals_itself_alone(options):
    lengths = [33, 1, 50, 16, 0, 20]
    q, k, v, s = planted(sum(lengths), seed=2)
    chosen = {"chunk_size": 16, "scaling_factor": 0.8, **options}
    out, active = dash_attention(q, k, v, s, cu_seqlens=bounds(lengths), return_active_blocks=True, **chosen)
    parts = zip(*(pieces(x, lengths) for x in (q, k, v, out)), active.split(lengths, 2), strict=True)
    for q1, k1, v1, ours, blocks in parts:
        if q1.shape[2] == 0:
            continue
        alone, own_blocks = dash_attention(q1, k1, v1, s, return_active_blocks=True, **chosen)
        assert torch.equal(blocks, own_blocks)
        assert float((ours.double() - alone.double()).abs().max()) < CLOSE
        exact, routing = specified(*(x.double() for x in (q1, k1, v1, s)), DashOptions(**chosen))
        if bool((routing.margin > 1e-4).all()):  # no chunk on the edge: the specification is unambiguous
            assert float((ours.double() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("on", [DEVICE, "cpu"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "nhd"])
def test_layouts_and_lengths_known_on_the_host(layout, on):
    lengths = [32, 17, 16]
    q, k, v, s = planted(sum(lengths), seed=5)
    want = dash_attention(q, k, v, s, chunk_size=16, cu_seqlens=bounds(lengths))
    if layout == "bnhd":
        stored = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        out = dash_attention(*stored, s, chunk_size=16, layout="bnhd", cu_seqlens=bounds(lengths, on))
        out = out.transpose(1, 2)
    elif layout == "nhd":
        stored = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
        out = dash_attention(*stored, s, chunk_size=16, cu_seqlens=bounds(lengths, on))
        out = out.transpose(0, 1)[None]
    else:
        out = dash_attention(q, k, v, s, chunk_size=16, cu_seqlens=bounds(lengths, on))
    assert torch.equal(out, want)


@pytest.mark.parametrize("lengths", [[21, 40, 3], [48, 32]], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_equal_those_of_the_sequences_alone(lengths, deterministic):
    """σ = 1 makes the routing's share visible; the summary query's gradient is summed over sequences."""
    chosen = {"chunk_size": 16, "scaling_factor": 0.5, "sigma": 1.0, "deterministic": deterministic}
    inputs = [x.requires_grad_() for x in planted(sum(lengths), seed=4, strength=1.0)]
    bound = bounds(lengths, "cpu" if deterministic else DEVICE)
    out = dash_attention(*inputs, cu_seqlens=bound, **chosen)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = torch.autograd.grad(out, inputs, g)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = zip(*(pieces(x, lengths) for x in exact[:3]), strict=True)
    options = DashOptions(16, 0.5, sigma=1.0)
    whole = torch.cat([specified(*part, exact[3], options)[0] for part in parts], 2)
    want = torch.autograd.grad(whole, exact, g.double())
    for mine, true in zip(ours, want, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < (1e-3 if torch.float32 == DTYPE else 2e-1)


def test_what_does_not_go_with_packed_sequences_is_named():
    q, k, v, s = planted(20)
    bound = bounds([20])
    with pytest.raises(ValueError, match="left_padding is not for packed"):
        dash_attention(q, k, v, s, cu_seqlens=bound, left_padding=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="batch is 2"):
        dash_attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), s, cu_seqlens=bound)
    with pytest.raises(ValueError, match="rise from 0 to 20"):
        dash_attention(q, k, v, s, cu_seqlens=torch.tensor([0, 21]))
    with pytest.raises(ValueError, match="need cu_seqlens"):
        dash_attention(q[0], k[0], v[0], s)

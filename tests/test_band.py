"""Band attention against a softmax written out in fp64: outputs, log-sum-exp and all gradients."""

import pytest
import torch

from dashbench.kernels.band import Band, band_attention, band_forward, kernel_for_band

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def expected(query, key, value, band, start):
    """(output, lse) in fp64; a row that sees nothing: 0 and +inf."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    position = torch.arange(start, start + query.shape[2], device=query.device)[:, None]
    t = torch.arange(key.shape[2], device=query.device)
    seen = t * band.stride + band.kernel - 1 <= position
    if band.window:
        seen &= t > position - band.window
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    empty = ~seen.any(-1)
    weights = torch.softmax(scores.masked_fill(empty[:, None], 0.0), -1) * seen
    return weights @ value.repeat_interleave(group, 1), lse.masked_fill(empty, torch.inf)


def inputs(batch, kv_heads, group, rows, keys, dim=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(rows + keys)

    def normal(heads, n):
        return (2 * torch.randn(batch, heads, n, dim, generator=draw)).to(DEVICE, dtype)

    return normal(kv_heads * group, rows), normal(kv_heads, keys), normal(kv_heads, keys)


CASES = {
    "compressed": (2, 2, 2, 70, Band(8, 4), 0),
    "no-key-yet": (1, 1, 4, 7, Band(8, 4), 0),
    "window": (1, 1, 4, 75, Band(window=9), 0),
    "later-rows": (1, 2, 3, 20, Band(32, 16), 50),
    "blocks-of-keys": (1, 1, 1, 150, Band(2, 1), 3),
}


@pytest.mark.parametrize("batch,kv_heads,group,rows,band,start", CASES.values(), ids=CASES)
def test_output_lse_and_gradients(batch, kv_heads, group, rows, band, start):
    tensors = inputs(batch, kv_heads, group, rows, band.count(start + rows))
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out, lse = band_attention(*leaves, band, start)
    wanted, wanted_lse = expected(*exact, band, start)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)
    alone = band_forward(tensors[0], tensors[1], None, band, start)[1]
    torch.testing.assert_close(alone, lse, rtol=1e-6, atol=1e-6)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = torch.autograd.grad(out, leaves, grad)
    for got, right in zip(found, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("band", [Band(8, 4), Band(window=9)], ids=str)
def test_a_gated_output_is_added_to_what_is_there(band):
    """Gates of every other row's stride; rows that see nothing leave what they find."""
    query, key, value = inputs(2, 2, 2, 40, band.count(40))
    gates = torch.rand(2, 4, 40, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    before = torch.randn(2, 40, 4, 64, generator=torch.Generator().manual_seed(4)).to(DEVICE).transpose(1, 2)
    wanted, wanted_lse = expected(query, key, value, band, 0)
    gated, _ = band_attention(query, key, value, band, gate=gates[..., 1])
    torch.testing.assert_close(gated.double(), wanted * gates[..., 1, None], rtol=1e-5, atol=1e-5)
    summed = before.clone()
    out, lse = band_attention(query, key, value, band, gate=gates[..., 1], onto=summed)
    assert out is summed
    torch.testing.assert_close(out.double(), before + wanted * gates[..., 1, None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)
    nothing = before.clone()
    band_forward(query, key[:, :, :0], value[:, :, :0], band, gate=gates[..., 1], onto=nothing)
    assert torch.equal(nothing, before)


@pytest.mark.parametrize("given", ["gate", "onto"])
def test_no_gradients_beside_gates(given):
    query, key, value = inputs(1, 1, 1, 20, 20)
    other = query[..., 0] if given == "gate" else query.clone()
    with pytest.raises(ValueError, match="use gated_sum"):
        band_attention(query.requires_grad_(), key, value, Band(window=4), **{given: other})


def test_what_the_hopper_kernels_take(monkeypatch):
    """One dtype, and strides and beginnings that the copy engine takes, of the output too."""
    query, key, value = (x.to(torch.bfloat16) for x in inputs(1, 2, 16, 20, 20, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert kernel_for_band(query, key, value) == "hopper"
    assert kernel_for_band(query, key, value, torch.empty_like(query)) == "hopper"
    assert kernel_for_band(query, key, None) == "portable"
    assert kernel_for_band(query, key, value.half()) == "portable"
    assert kernel_for_band(query, key.half(), value.half()) == "portable"
    shifted = torch.empty(query.numel() + 1, dtype=query.dtype, device=query.device)[1:].view_as(query)
    assert kernel_for_band(query, key, value, shifted) == "portable"
    odd = torch.empty(1, 2, 20, 132, dtype=query.dtype, device=query.device)[..., :128]
    assert kernel_for_band(query, odd, value) == "portable"


def test_strided_heads_first_or_last_give_the_same():
    query, key, value = inputs(2, 2, 2, 40, 33)
    out, _ = band_forward(query, key, value, Band(8, 1), 0)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert turned[0].stride() != query.stride()
    assert torch.equal(band_forward(*turned, Band(8, 1), 0)[0], out)


@pytest.mark.parametrize("given", [{"kernel": 0}, {"window": -1}, {"kernel": 8, "stride": 4, "window": 5}])
def test_impossible_bands_are_refused(given):
    with pytest.raises(ValueError):
        Band(**given)


def test_unsupported_shapes_are_named():
    query, key, value = inputs(1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="head dim"):
        band_forward(query[..., :16], key[..., :16], value[..., :16], Band())
    with pytest.raises(ValueError, match="multiple"):
        band_forward(query[:, :1].repeat(1, 3, 1, 1), key, value, Band())


@pytest.mark.gpu
@pytest.mark.parametrize("band", [Band(32, 16), Band(128, 64), Band(window=512)], ids=str)
def test_real_shapes_on_a_gpu(band):
    rows = 2000
    tensors = inputs(1, 2, 16, rows, band.count(rows), 128, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in tensors]
    exact = [x.double().requires_grad_() for x in tensors]
    out, _ = band_attention(*leaves, band)
    wanted, _ = expected(*exact, band, 0)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 5e-3
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    for got, right in zip(found, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        assert float((got.double() - right).norm() / right.norm()) < 1e-2


HOPPER_CASES = [
    # batch, KV heads, group, rows, first position, dtype
    (2, 2, 16, 1, 0, torch.bfloat16),
    (1, 2, 16, 100, 0, torch.bfloat16),
    (2, 1, 8, 1031, 0, torch.float16),
    (2, 2, 2, 777, 0, torch.bfloat16),
    (1, 2, 16, 513, 1500, torch.bfloat16),
    (1, 2, 16, 4096, 0, torch.bfloat16),  # more tiles than programs
]


@pytest.mark.gpu
@pytest.mark.parametrize("band", [Band(32, 16), Band(window=512), Band(window=9), Band()], ids=str)
@pytest.mark.parametrize("batch,kv_heads,group,rows,start,dtype", HOPPER_CASES)
def test_hopper_kernel_on_a_gpu(batch, kv_heads, group, rows, start, dtype, band):
    """Against fp64, plain and as the sum in place; every other case has heads inside."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    tensors = inputs(batch, kv_heads, group, rows, max(1, band.count(start + rows)), 128, dtype)
    if rows % 2:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert kernel_for_band(*tensors) == "hopper"
    wanted, wanted_lse = expected(*tensors, band, start)
    gate = torch.rand(*tensors[0].shape[:3], 3, device="cuda").to(dtype)[..., 1]
    before = torch.randn_like(tensors[0])
    size = wanted.norm().clamp_min(1e-3)
    out, lse = band_forward(*tensors, band, start)
    assert float((out.double() - wanted).norm() / size) < 5e-3
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-3)
    total = before.double() + wanted * gate.double()[..., None]
    out, lse = band_forward(*tensors, band, start, gate=gate, onto=before)
    assert out is before
    assert float((out.double() - total).norm() / total.norm()) < 5e-3
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_tiles_of_few_keys_do_not_see_each_others_queries_on_a_gpu():
    """As `test_operator_gpu`'s for chunks; right behind a kernel that leaves the queries in the L2 cache."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    query, key, value = inputs(1, 2, 16, 2048, 2048, 128, torch.bfloat16)
    band = Band(window=9)
    expected = band_forward(query, key, value, band, kernel="portable")[0].float()
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(300):
        band_forward(query, key, None, band)
        out = band_forward(query, key, value, band, kernel="hopper")[0].float()
        wrong += ((out - expected).norm(dim=-1) > 0.05 * expected.norm(dim=-1)).sum()
    assert int(wrong) == 0

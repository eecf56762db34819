"""The drop-in module: prefill, then token by token, equals one longer prefill row by row."""

import pytest
import torch
from test_dash import DTYPE, planted

from dashbench.kernels import DashAttention
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.reference import dash_attention as specified

TOLERANCE = 5e-3 if torch.float32 == DTYPE else 2e-2


@pytest.mark.parametrize("centred", [True, False])
def test_steps_after_a_prefill_equal_rows_of_a_longer_one(centred):
    q, k, v, s = planted(53, batch=2, kv_heads=1, seed=11)
    layer = DashAttention(chunk_size=16, estimate_diagonal=centred, return_active_blocks=True)
    options = DashOptions(chunk_size=16, bias_mode="centered" if centred else "raw")
    whole, routing = specified(*(x.double() for x in (q, k, v, s)), options)
    with torch.no_grad():
        out, active = layer(q[:, :, :30], k[:, :, :30], v[:, :, :30], s)
        assert float((out.double() - whole[:, :, :30]).abs().max()) < TOLERANCE
        for n in (31, 32, 33, 34, 49, 53):  # over chunk borders, and with several new tokens at a time
            new = n - 30 if n == 31 else 1
            out, active = layer(q[:, :, n - new : n], k[:, :, :n], v[:, :, :n], s)
            assert float((out.double() - whole[:, :, n - new : n]).abs().max()) < TOLERANCE, n
            assert torch.equal(active.long().cpu(), routing.active[:, :, n - new : n].sum(-1).cpu()), n


def test_a_new_prefill_forgets_the_old_sequence_and_room_grows():
    layer = DashAttention(chunk_size=16)
    for n, seed in ((80, 1), (40, 2)):
        q, k, v, s = planted(n + 1, kv_heads=1, seed=seed)
        with torch.no_grad():
            layer(q[:, :, :n], k[:, :, :n], v[:, :, :n], s)
            out = layer(q[:, :, n:], k, v, s)
        expected = dash_attention(q, k, v, s, chunk_size=16)[:, :, n:]
        assert float((out - expected).abs().max()) < TOLERANCE


def test_it_trains_like_the_function():
    q, k, v, s = (x.clone().requires_grad_() for x in planted(40, kv_heads=1, seed=3))
    DashAttention(chunk_size=16)(q, k, v, s).sum().backward()
    grads = [x.grad.clone() for x in (q, k, v, s)]
    for x in (q, k, v, s):
        x.grad = None
    dash_attention(q, k, v, s, chunk_size=16).sum().backward()
    for x, g in zip((q, k, v, s), grads, strict=True):
        torch.testing.assert_close(x.grad, g, atol=1e-6, rtol=1e-4)


def test_unequal_heads_need_gqa():
    q, k, v, s = planted(20)
    with pytest.raises(ValueError, match="enable_gqa=False needs equal heads, got 8 and 2"):
        DashAttention(chunk_size=16, enable_gqa=False)(q, k, v, s)


@pytest.mark.parametrize("dense_below", [None, 40])
def test_left_padded_batches_prefill_and_step_like_their_sequences(dense_below):
    """Chunks stay where padding puts them; dense prefill attends every real token."""
    q, k, v, s = planted(53, batch=3, kv_heads=1, seed=12)
    pads = torch.tensor([0, 5, 19], dtype=torch.int32, device=q.device)
    mask = (torch.arange(53, device=q.device) >= pads[:, None]).int()
    layer = DashAttention(chunk_size=16, dense_below=dense_below, return_active_blocks=True)
    options = DashOptions(chunk_size=16)
    double = [x.double() for x in (q, k, v, s)]
    whole, routing = specified(*double, options, left_padding=pads)
    with torch.no_grad():
        out, active = layer(q[:, :, :30], k[:, :, :30], v[:, :, :30], s, attention_mask=mask[:, :30])
        want, count = whole[:, :, :30], routing.active[:, :, :30].sum(-1)
        if dense_below:
            assert layer.info["path"] == "dense" and "torch" in layer.info["backend"]
            every = torch.ones_like(routing.active[:, :, :30])
            want = specified(*double, options, left_padding=pads, active=every, rows=torch.arange(30))[0]
            own = torch.arange(30, device=q.device) // 16
            count = (own - (pads // 16)[:, None, None] + 1).clamp_min(1).expand_as(count)
        else:
            assert layer.info["path"] == "sparse" and layer.info["kernel"] == "portable"
        assert float((out.double() - want).abs().max()) < TOLERANCE
        real = mask[:, None, :30].bool().expand_as(count)
        assert torch.equal(active.long()[real].cpu(), count[real].cpu())
        for n, given in ((31, True), (33, False), (49, True), (53, True)):
            new = {31: 1, 33: 2, 49: 16, 53: 4}[n]
            out, active = layer(
                q[:, :, n - new : n], k[:, :, :n], v[:, :, :n], s, mask[:, :n] if given else None
            )
            assert float((out.double() - whole[:, :, n - new : n]).abs().max()) < TOLERANCE, n
            assert torch.equal(active.long().cpu(), routing.active[:, :, n - new : n].sum(-1).cpu()), n


def test_padding_elsewhere_is_refused():
    q, k, v, s = planted(20)
    mask = torch.ones(1, 20)
    mask[0, 7] = 0
    with pytest.raises(ValueError, match="on the left"):
        DashAttention(chunk_size=16)(q, k, v, s, attention_mask=mask.to(q.device))
    with pytest.raises(ValueError, match=r"must be \(1, 20\)"):
        DashAttention(chunk_size=16)(q, k, v, s, attention_mask=mask[:, :5].to(q.device))

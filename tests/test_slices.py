"""Slices of tokens through the MLP and the norms: the same numbers, and less made on the way."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dashbench.models import slices
from dashbench.models.checkpoint import random_model
from dashbench.models.generate import new_sequences, read


@pytest.fixture(scope="module")
def model():
    return random_model("dense", "tiny")


@pytest.mark.parametrize("tokens", [(1, 32), (1, 33), (3, 64), (2, 95)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_no_bit(model, monkeypatch, tokens, dtype):
    layer = copy.deepcopy(model.model.layers[0]).to(dtype)
    hidden = torch.randn(*tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    monkeypatch.setattr(slices, "SLICE", 32)
    seen = []
    for module, own in ((layer.mlp, LlamaMLP), (layer.input_layernorm, LlamaRMSNorm)):
        monkeypatch.setattr(own, "forward", recorded(own.forward, seen))
        seen.clear()
        with torch.no_grad():
            found = module(hidden)
            parts = list(seen)
            whole = own.forward(module, hidden)
        assert torch.equal(found, whole) and found.shape == hidden.shape
        assert (
            sum(parts) == hidden[..., 0].numel() and max(parts) <= 32 and max(parts) - min(parts) < len(parts)
        )


def recorded(forward, seen):
    def run(self, hidden):
        seen.append(hidden[..., 0].numel())
        return forward(self, hidden)

    return run


def test_a_prompt_is_read_in_slices_as_at_once(model, monkeypatch):
    tokens = torch.randint(3, 250, (2, 90), generator=torch.Generator().manual_seed(1))
    whole = read(model, tokens, new_sequences(model, 2, 90))
    monkeypatch.setattr(slices, "SLICE", 60)
    assert torch.equal(read(model, tokens, new_sequences(model, 2, 90)), whole)


def test_gradients_are_those_of_the_stock_modules(model, monkeypatch):
    stock = LlamaForCausalLM(model.config)
    assert list(stock.state_dict()) == list(model.state_dict())
    monkeypatch.setattr(slices, "SLICE", 8)
    hidden = torch.randn(2, 20, 64, requires_grad=True)
    (found,) = torch.autograd.grad(model.model.layers[0].mlp(hidden).square().sum(), hidden)
    own = LlamaMLP.forward(model.model.layers[0].mlp, hidden)
    (expected,) = torch.autograd.grad(own.square().sum(), hidden)
    assert torch.equal(found, expected)


def test_what_is_made_on_the_way_stays_small(model, monkeypatch):
    """Bytes that the profiler sees allocated at once, less the result's."""
    mlp = model.model.layers[0].mlp
    hidden = torch.randn(1, 4096, 64)

    def peak():
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            mlp(hidden)
        held = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    whole = peak()
    monkeypatch.setattr(slices, "SLICE", 256)
    assert peak() < hidden.nbytes + whole / 8

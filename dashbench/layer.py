"""Phase `layer`: one training step of a whole decoder layer around a method's attention, which is what
adopting the method costs where it is trained.

A step is forward, backward and AdamW of RMSNorm, the four projections with RoPE, attention, RMSNorm and a
SwiGLU MLP, as in a Llama: width Hq · D, the MLP four times as wide (MiniCPM-4-8B's: 4096 and 16384).
Parameters, gradients and the optimizer's moments are fp32, products and the residual stream have the point's
dtype.

Attention sees the point's planted queries, keys and values, because the projections of random weights would
route unlike trained ones. The projections are computed, rotated and differentiated all the same; what they
give is dropped, and the planted tensors serve as its gradients. A method's training operator runs forward and
backward at once, so attention's backward comes before the MLP's: another order, the same work.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dashbench.baselines.api import Operator, Problem
from dashbench.cost import LAYER_WIDENING
from dashbench.miniature.llama import Layer, rotary, rotate
from dashbench.miniature.shape import LlamaShape
from dashbench.rows import Shape

RATE = 1e-6
"""Learning rate: the step is timed, nothing is to be learnt."""


class TrainedLayer:
    """A layer's parameters and their optimizer, shared by all points of a shape.

    Args:
        shape: of its attention.
        device: where.
        seed: of the parameters.
    """

    def __init__(self, shape: Shape, device: str, seed: int = 0):
        width = shape.query_heads * shape.head_dim
        sizes = LlamaShape(
            hidden_size=width, intermediate_size=LAYER_WIDENING * width, head_dim=shape.head_dim,
            num_attention_heads=shape.query_heads, num_key_value_heads=shape.kv_heads,
        )  # fmt: skip
        self.width, self.sizes = width, sizes
        with torch.device(device):
            self.layer = Layer(sizes)
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in self.layer.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=RATE, fused=device == "cuda")
        self.optimizer.step()  # makes its moments now, not while a point's memory is watched
        self.optimizer.zero_grad()


class LayerStep:
    """One step around a prepared attention.

    Args:
        trained: the layer.
        operator: a method's, prepared for `problem`.
        problem: of phase `train`.
    """

    def __init__(self, trained: TrainedLayer, operator: Operator, problem: Problem):
        self.trained, self.operator, self.problem = trained, operator, problem
        batch, _, length, _ = problem.query.shape
        like = {"dtype": problem.query.dtype, "device": problem.query.device}
        generator = torch.Generator(problem.query.device).manual_seed(problem.seed)
        shape = batch, length, trained.width
        self.hidden = torch.randn(shape, generator=generator, **like).requires_grad_()
        self.gradient = torch.randn(shape, generator=generator, **like)
        self.cos, self.sin = rotary(length, trained.sizes, **like)

    def run(self) -> Tensor:
        """The whole step; returns attention's output `[B, Hq, N, D]`, which a gate can judge."""
        return self._step(self.operator.run)

    def rest(self) -> Tensor:
        """The step without attention."""
        return self._step(lambda: self.problem.query)

    def _step(self, attend) -> Tensor:
        layer, problem, dtype = self.trained.layer, self.problem, self.hidden.dtype
        attention = layer.self_attn
        batch, _, length, dim = problem.query.shape
        normed = layer.input_layernorm(self.hidden).to(dtype)
        query, key, value = (
            project(normed).view(batch, length, -1, dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        output = attend()
        attended = output.detach().requires_grad_()
        hidden = self.hidden + attention.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden).to(dtype))
        planted = (x.detach() for x in (problem.query, problem.key, problem.value))
        torch.autograd.backward((hidden, query, key, value), (self.gradient, *planted))
        self.trained.optimizer.step()
        self.trained.optimizer.zero_grad()
        self.hidden.grad = None
        return output


def around(trained: TrainedLayer, operator: Operator, problem: Problem) -> Operator:
    """The operator of a layer's step: its stages are attention (forward and backward) and the rest."""
    step = LayerStep(trained, operator, problem)
    width, sizes = trained.width, trained.sizes
    notes = {
        **operator.notes,
        "layer": f"width {width}, MLP {sizes.intermediate_size}, AdamW with fp32 parameters and moments",
    }
    stages = {"attention": operator.run, "rest": step.rest}
    return replace(operator, run=step.run, stages=stages, notes=notes)

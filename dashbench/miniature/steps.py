"""One training step, captured in a CUDA graph: draw a batch, forward, backward, clip, update, count.

A model of 1.5 M parameters is bound by launches, so everything a step does, drawing the data included, is one
graph; the host only replays it. On a CPU the same function runs as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashbench.miniature.pieces import Pieces
from dashbench.miniature.rows import KINDS, Batch, Mix, draw_rows

WEIGHTS = (0.0, 1.0, 0.1, 0.1)
"""Weight of the loss by role of a token (`rows.Batch.answers`)."""


@dataclass
class Counts:
    """Sums on the device since the last reading: loss, weight, questions and exact answers by kind."""

    loss: Tensor
    questions: Tensor

    @classmethod
    def zeros(cls, device: str) -> Counts:
        """Nothing counted yet."""
        return cls(torch.zeros(3, device=device), torch.zeros(len(KINDS), 2, device=device))

    def read(self) -> dict[str, object]:
        """Means since the last reading; sets the sums to zero; waits for the device."""
        loss, questions = self.loss.tolist(), self.questions.tolist()
        self.loss.zero_()
        self.questions.zero_()
        exact = {k: (hit / n if n else None) for k, (n, hit) in zip(KINDS, questions, strict=True)}
        return {"loss": loss[0] / max(loss[1], 1), "grad_norm": loss[2] / max(loss[1], 1), "exact": exact}


def count_exact(batch: Batch, where: Tensor, right: Tensor) -> Tensor:
    """(kinds, 2) questions whose whole answer was in the row, and those answered without a mistake.

    Args:
        batch: of `draw_rows`.
        where: (rows, k) positions looked at.
        right: (rows, k) whether the token there was predicted.
    """
    rows = where.shape[0]
    role, owner = batch.answers.gather(1, where).long(), batch.question.gather(1, where).long()
    slots = owner.clamp(min=0)
    size = 65
    wrong = right.new_zeros(rows, size, dtype=torch.float32).scatter_add(
        1, slots, ((role == 1) & ~right).float()
    )
    whole = right.new_zeros(rows, size, dtype=torch.float32).scatter_add(1, slots, (role == 2).float())
    asked = (whole > 0).float()
    exact = asked * (wrong == 0)
    per_row = torch.stack([asked.sum(1), exact.sum(1)], -1)
    kinds = torch.zeros(len(KINDS), 2, device=where.device)
    return kinds.index_add(0, batch.kind, per_row)


def asked_positions(batch: Batch, share: int) -> tuple[Tensor, Tensor]:
    """Positions of up to `length // share` answer tokens of each row, and their weights (0: filler)."""
    role = batch.answers[:, 1:].float()
    score = torch.where(role == 1, 3.0, role)
    chosen = score.topk(batch.tokens.shape[1] // share, dim=1, sorted=False).indices
    role = batch.answers[:, 1:].gather(1, chosen)
    weight = torch.where(role == 1, WEIGHTS[1], torch.where(role > 0, WEIGHTS[2], 0.0))
    return chosen + 1, weight


def batch_loss(model: nn.Module, batch: Batch, share: int) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of the answers, and `count_exact` of them."""
    where, weight = asked_positions(batch, share)
    hidden = model(batch.tokens)
    before = (where - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    logits = model.logits(hidden.gather(1, before))
    target = batch.tokens.gather(1, where)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    right = logits.detach().argmax(-1) == target
    return (loss * weight).sum() / weight.sum().clamp(min=1.0), count_exact(batch, where, right)


def orthogonalise(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> their polar factors, roughly, by five Newton-Schulz steps.

    The odd polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5 maps singular values into about 0.7 to 1.2
    (K. Jordan, Muon, 2024).
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised, for the matrices of the layers; those of one shape are updated together."""

    def __init__(self, parameters: list[nn.Parameter], rate: Tensor, momentum: float = 0.95):
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.parts = [[p for p in parameters if tuple(p.shape) == s] for s in shapes]
        self.buffers = [torch.zeros(len(part), *part[0].shape, device=part[0].device) for part in self.parts]
        self.rate, self.momentum = rate, momentum

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for part, buffer in zip(self.parts, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in part])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            scale = self.rate * max(1.0, buffer.shape[-2] / buffer.shape[-1]) ** 0.5
            for parameter, change in zip(part, update, strict=True):
                parameter.sub_(change * scale)


@dataclass
class Trainer:
    """A model with its optimizer and what its steps count.

    Attributes:
        model: of `llama.Llama`.
        pieces: on the model's device.
        rate: 0-dim learning rate of AdamW, on the device; Muon's is `muon_ratio` times it.
        muon_ratio: 0: AdamW for everything.
        summary_ratio: rate of DashAttention's summary queries over `rate`. Their gradient is scaled by 1/σ,
            which Adam undoes, but for its ε: theirs is 1e-15.
        weight_decay: of AdamW, matrices only.
    """

    model: nn.Module
    pieces: Pieces
    rate: Tensor
    muon_ratio: float = 0.0
    weight_decay: float = 0.01
    summary_ratio: float = 1.0
    counts: Counts = field(init=False)

    def __post_init__(self) -> None:
        device = self.rate.device
        self.counts = Counts.zeros(str(device))
        named = list(self.model.named_parameters())
        inner = [p for n, p in named if p.dim() == 2 and ".layers." in n] if self.muon_ratio else []
        summaries = [p for n, p in named if n.endswith("indexer_q")]
        taken = {id(p) for p in (*inner, *summaries)}
        rest = [p for _, p in named if id(p) not in taken]
        self.summary_rate = torch.zeros_like(self.rate)
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        if summaries:
            own = {"lr": self.summary_rate, "eps": 1e-15, "weight_decay": 0.0}
            groups.append({"params": summaries, **own})
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=cuda)
        self.muon_rate = torch.zeros_like(self.rate)
        self.muon = Muon(inner, self.muon_rate) if inner else None
        self.parameters = [p for _, p in named]

    def step(self, mixture: Mix, rows: int, length: int) -> None:
        """Draws a batch and learns from it."""
        with torch.no_grad():
            batch = draw_rows(self.pieces, mixture, rows, length)
        loss, exact = batch_loss(self.model, batch, 4 if length <= 256 else 8)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        torch.mul(self.rate, self.summary_ratio, out=self.summary_rate)
        self.adam.step()
        if self.muon:
            torch.mul(self.rate, self.muon_ratio, out=self.muon_rate)
            self.muon.step()
        with torch.no_grad():
            self.counts.loss += torch.stack([loss.detach(), torch.ones_like(loss), norm])
            self.counts.questions += exact


def capture(trainer: Trainer, mixture: Mix, rows: int, length: int, stream, pool=None):
    """A CUDA graph of `trainer.step`; two real steps are taken on the way.

    Args:
        trainer: on a GPU.
        mixture: its tensors stay in use: fill them to change what later replays draw.
        rows: of a batch.
        length: of a row.
        stream: to capture and to replay on.
        pool: memory pool shared with other graphs that never run at the same time.
    """
    with torch.cuda.stream(stream):
        for _ in range(2):
            trainer.step(mixture, rows, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        trainer.step(mixture, rows, length)
    return graph

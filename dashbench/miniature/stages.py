"""The two stages of the small model's training: the base with its curriculum, and a continuation.

Both hand a report to their caller after every tenth, and keep a checkpoint at each, so that little is lost
when they are stopped. Equal seeds draw equal batches in every continuation on one kind of device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dashbench.miniature.checkpoints import load_checkpoint, save_checkpoint
from dashbench.miniature.continuation import alpha_at, summary_query_gradient, swap_attention
from dashbench.miniature.evaluation import evaluate, sweep
from dashbench.miniature.llama import Llama
from dashbench.miniature.pieces import Pieces, corpus, make_pieces
from dashbench.miniature.rows import mix
from dashbench.miniature.steps import Trainer, capture
from dashbench.miniature.tokenizer import train_tokenizer
from dashbench.rows_train import REPORTS
from dashbench.telemetry import Telemetry
from dashbench.train import Report

BURST = 25
"""Steps of one length before the next, and between two looks at how well it goes."""

Reporter = Callable[[Report], bool]


def tools(spec: Any) -> tuple[Tokenizer, Pieces, Pieces, str, torch.dtype]:
    """Tokenizer, pieces for training and held-out ones, device, and dtype of the matrix products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer(spec.model.vocab_size, *corpus())
    pieces = make_pieces(tokenizer, spec.pieces, 1, held_out=False).to(device)
    held_out = make_pieces(tokenizer, 1024, 2, held_out=True).to(device)
    return tokenizer, pieces, held_out, device, torch.bfloat16 if device == "cuda" else torch.float32


def mixture_of(entry: Any, device: str):
    """`rows.Mix` of a suite's mix."""
    kinds = (entry.single, entry.multiquery, entry.multivalue, entry.track)
    return mix(device, kinds, entry.short_form, entry.short_key, entry.needles_only, entry.few)


def wait(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class Meter:
    """Time spent in training, without evaluation and checkpoints, and the reports."""

    def __init__(
        self, device: str, save: Callable[[], str], score: Callable[[], dict[str, Any]], tell: Reporter
    ):
        self.device, self.save, self.score, self.tell = device, save, score, tell
        self.spent = self.told_at = 0.0
        self.tokens = self.told_tokens = self.told = 0
        self.start()

    def start(self) -> None:
        """Starts the clock."""
        wait(self.device)
        self.began = time.perf_counter()

    def stop(self) -> None:
        """Stops it."""
        wait(self.device)
        self.spent += time.perf_counter() - self.began

    def report(self, number: int, fields: dict[str, Any]) -> bool:
        """Evaluates, saves, reports; the clock stands meanwhile. False: stop here."""
        self.stop()
        scores = self.score()
        checkpoint = self.save()
        elapsed, tokens = self.spent - self.told_at, self.tokens - self.told_tokens
        self.told_at, self.told_tokens = self.spent, self.tokens
        lengths = list(scores["s_by_layer"])
        by_layer = scores["s_by_layer"][lengths[-1]]
        notes = {
            "questions": scores["questions"],
            "s_by_layer": scores["s_by_layer"],
            "other_processes": Telemetry().other_processes() if self.device == "cuda" else None,
            **fields.pop("notes", {}),
        }
        go_on = self.tell(
            Report(
                number,
                {
                    "tokens": self.tokens,
                    "gpu_s": round(self.spent, 3),
                    "tokens_per_s": round(tokens / max(elapsed, 1e-9), 1),
                    "exact_match": scores["exact_match"],
                    "s_by_layer": by_layer,
                    "s_flop": sum(by_layer) / len(by_layer),
                    "checkpoint": checkpoint,
                    "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None,
                    "notes": notes,
                    **fields,
                },
            )
        )
        self.start()
        return go_on


def train_base(spec: Any, seed: int, folder: Path, tell: Reporter) -> None:
    """Trains the base: dense attention, short contexts first, longer ones once the shorter are mastered.

    Args:
        spec: `suite_train.TrainSuite`.
        seed: of parameters and data.
        folder: of the checkpoint.
        tell: told after each tenth; False stops.
    """
    tokenizer, pieces, held_out, device, dtype = tools(spec)
    base = spec.base
    torch.manual_seed(seed)
    model = Llama(spec.model, dtype).to(device)
    rate = torch.zeros((), device=device)
    trainer = Trainer(model, pieces, rate, muon_ratio=base.muon_ratio)
    mixture = mixture_of(base.levels[0].mix, device)
    longest = max(base.levels[-1].lengths)
    meter = Meter(
        device,
        lambda: save_checkpoint(folder, model, tokenizer, "dense", {}, longest),
        lambda: evaluate(model, held_out, spec.evaluation.lengths, spec.evaluation.tokens, {}),
        tell,
    )
    graphs: dict[int, Callable[[], None]] = {}
    stream = torch.cuda.Stream() if device == "cuda" else None
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None

    def stepper(length: int) -> Callable[[], None]:
        rows = base_rows(base.tokens_per_step, length)
        if device != "cuda":
            return lambda: trainer.step(mixture, rows, length)
        return capture(trainer, mixture, rows, length, stream, pool).replay

    level = step = burst = 0
    streak: list[float] = []
    losses: list[dict[str, Any]] = []
    for length in base.levels[0].lengths:
        graphs[length] = stepper(length)
    trainer.counts.read()
    burst_steps = min(BURST, max(1, base.steps // (2 * REPORTS)))
    for number in range(1, REPORTS + 1):
        goal = base.steps * number // REPORTS
        while step < goal:
            lengths = base.levels[level].lengths
            length = [*lengths, lengths[-1]][burst % (len(lengths) + 1)]
            steps = min(burst_steps, goal - step)
            rate.fill_(base.rate * base_factor(step, base))
            wait(device)
            for _ in range(steps):
                if stream is None:
                    graphs[length]()
                else:
                    with torch.cuda.stream(stream):
                        graphs[length]()
            wait(device)
            step, burst = step + steps, burst + 1
            meter.tokens += steps * length * base_rows(base.tokens_per_step, length)
            found = trainer.counts.read()
            losses.append(found)
            if length == lengths[-1]:
                streak.append(found["exact"]["single"] or 0.0)
            falling = step > base.steps * (1 - base.decay)
            mastered = len(streak) > 1 and min(streak[-2:]) >= base.mastered
            if mastered and not falling and level + 1 < len(base.levels):
                level, streak = level + 1, []
                _refill(mixture, mixture_of(base.levels[level].mix, device))
                graphs = {n: graphs.get(n) or stepper(n) for n in base.levels[level].lengths}
                trainer.counts.read()
        fields = {
            "step": step,
            "loss": sum(f["loss"] for f in losses) / len(losses),
            "learning_rate": rate.item(),
            "notes": {"level": level, "training_exact": losses[-1]["exact"]},
        }
        losses = []
        if not meter.report(number, fields):
            return


def base_rows(tokens_per_step: int, length: int) -> int:
    """Rows of a batch: longer contexts get larger batches, because their answers are rarer."""
    tokens = tokens_per_step * (1 if length <= 256 else 2 if length <= 1024 else 4)
    return max(1, tokens // length)


def base_factor(step: int, base: Any) -> float:
    """Learning rate over its peak: linear warm-up, constant, linear fall to zero at the end."""
    return min(1.0, (step + 1) / max(1, base.warmup), (base.steps - step) / (base.decay * base.steps))


def _refill(mixture: Any, new: Any) -> None:
    for name in vars(mixture):
        getattr(mixture, name).copy_(getattr(new, name))


def train_continuation(spec: Any, method: str, seed: int, base: Path, folder: Path, tell: Reporter) -> None:
    """Continues the base with another attention; steps and batches are the same for every method.

    Args:
        spec: `suite_train.TrainSuite`.
        method: kind of attention.
        seed: of the data.
        base: checkpoint folder to start from.
        folder: of the new checkpoint.
        tell: told after each tenth; False stops.
    """
    tokenizer, pieces, held_out, device, dtype = tools(spec)
    plan = spec.continuation
    model, _, _ = load_checkpoint(base, dtype, device)
    torch.manual_seed(seed)
    settings = swap_attention(model, method, plan.settings.get(method))
    rate = torch.zeros((), device=device)
    trainer = Trainer(model, pieces, rate, summary_ratio=plan.summary_ratio)
    mixture = mixture_of(plan.mix, device)
    longest = max(plan.lengths)
    meter = Meter(
        device,
        lambda: save_checkpoint(folder, model, tokenizer, method, dict(settings), longest),
        partial(evaluate, model, held_out, spec.evaluation.lengths, spec.evaluation.tokens, settings),
        tell,
    )
    torch.manual_seed(seed + 1)  # the batches': whatever parameters a method drew before
    step = 0
    for number in range(1, REPORTS + 1):
        goal = plan.steps * number // REPORTS
        gradients: list[float] = []
        while step < goal:
            length = plan.lengths[step % len(plan.lengths)]
            warm = min(1.0, (step + 1) / max(1, plan.warmup))
            rate.fill_(plan.rate_of(method) * warm * min(1.0, (plan.steps - step) / (0.3 * plan.steps)))
            if method == "dash":
                settings["alpha"] = alpha_at(step / plan.steps)
            trainer.step(mixture, max(1, plan.tokens_per_step // length), length)
            step += 1
            meter.tokens += max(1, plan.tokens_per_step // length) * length
            if step == goal and method == "dash":
                gradients.append(summary_query_gradient(model) or 0.0)
        found = trainer.counts.read()
        fields = {
            "step": step,
            "loss": found["loss"],
            "learning_rate": rate.item(),
            "alpha": settings.get("alpha"),
            "summary_query_grad_norm": gradients[-1] if gradients else None,
            "notes": {
                "settings": dict(settings),
                "training_exact": found["exact"],
                "grad_norm": found["grad_norm"],
            },
        }
        if number == REPORTS and method in spec.evaluation.sweep:
            meter.stop()
            fields["notes"]["sweep"] = sweep(
                model,
                held_out,
                spec.evaluation.lengths,
                spec.evaluation.tokens,
                method,
                settings,
                spec.evaluation.sweep[method],
            )
            meter.start()
        if not meter.report(number, fields):
            return

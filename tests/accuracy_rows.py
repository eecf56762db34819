"""Rows as an accuracy suite stores them, made up: known chances of a right answer, known sparsities."""

import hashlib

import numpy as np

# method -> [(sparsity asked for, measured, chance of a right answer)]
STUDY = {
    "dense": [(None, 0.0, 0.92)],
    "dash": [(0.5, 0.51, 0.915), (0.75, 0.752, 0.90), (0.875, 0.874, 0.85), (0.9375, 0.936, 0.76)],
    "nsa": [(0.5, 0.50, 0.80), (0.75, 0.748, 0.70), (0.875, 0.876, 0.55), (0.9375, 0.938, 0.35)],
    "infllmv2": [(0.5, 0.505, 0.91), (0.75, 0.75, 0.86), (0.875, 0.872, 0.78), (0.9375, 0.94, 0.6)],
}


def accuracy_row(method, target, measured, score, document, task="niah_single_1", length=4096, **more):
    name = f"{method}/{target}/{task}/{length}/{document}"
    base = {
        "row_version": 1,
        "key": hashlib.sha256(name.encode()).hexdigest()[:16],
        "kind": "accuracy",
        "method": method,
        "suite": "accuracy@00000000",
        "seed": 0,
        "status": "ok",
        "reason": None,
        "checkpoint": f"miniature-{method}@1234",
        "attention": method,
        "preset": None,
        "knob": {} if target is None else {"scaling_factor" if method == "dash" else "top_k": 8},
        "sparsity_target": target,
        "s_flop": measured,
        "task": task,
        "length": length,
        "doc_id": document,
        "prompt_hash": f"{task}{document}",
        "prompt_tokens": length - 40,
        "score": float(score),
        "prompt_ms": 10.0,
        "environment": {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "driver": "580"},
        "environment_key": "6b1fa606",
        "timestamp": "2026-11-24T12:00:00+00:00",
    }
    return {**base, **more}


def study(documents=80, tasks=("niah_single_1", "niah_multikey_1"), lengths=(4096,), seed=0, plan=STUDY):
    """Rows of a whole study; a document's difficulty is the same for every configuration, as in truth."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        for task in tasks:
            for document in range(documents):
                shared = random.random()
                for method, settings in plan.items():
                    for target, measured, chance in settings:
                        own = random.random()
                        level = shared if random.random() < 0.7 else own
                        spread = 0.01 * random.standard_normal() if target else 0.0
                        right = level < chance
                        rows.append(
                            accuracy_row(method, target, measured + spread, right, document, task, length)
                        )
    return rows

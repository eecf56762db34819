"""Rows as a suite of kernels stores them, made up: as many fields as the analysis reads."""

import numpy as np


def row(method, context, samples, **more):
    base = {
        "status": "ok",
        "suite": "made-up@0",
        "timestamp": "2026-11-24T12:00:00+00:00",
        "environment_key": "e",
        "method": method,
        "phase": "prefill",
        "context": context,
        "batch": 1,
        "shape": {"name": "s"},
        "dtype": "bfloat16",
        "routing": "topics",
        "cache": "cold",
        "launch": "graph",
        "sparsity_target": None if method.startswith(("fa3", "dense")) else 0.75,
        "latency_ms": float(np.median(samples)),
        "samples": list(samples),
    }
    whole = {**base, **more}
    asked = ("phase", "batch", "shape", "routing", "routing_options", "cache", "launch", "sparsity_target")
    key = "/".join([method, str(context), *(str(whole.get(name)) for name in asked)])
    return {"key": key, **whole}


def noisy(rng, centre, count=30, spread=0.01):
    return centre * (1 + spread * rng.standard_normal(count))

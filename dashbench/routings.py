"""Names of the input generators of dashbench.inputs: what makes a query need a chunk. No torch here."""

from __future__ import annotations

from typing import Any

# name -> (what it is, default options)
ROUTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "topics": (
        "planted topics: runs of queries want some topics' chunks, most heads agree; the realistic default",
        {"segment": 64, "agreement": 0.95, "topics": 48, "zipf": 0.5, "persistence": 0.5},
    ),
    "uniform": (
        "every query wants its own random chunks: the scattered worst case for tiled kernels",
        {"segment": 1, "agreement": 1.0, "topics": 48, "zipf": 0.0, "persistence": 0.0},
    ),
    "clustered": (
        "topics come in long runs of neighbouring chunks, query segments are long",
        {"segment": 256, "agreement": 0.95, "topics": 48, "zipf": 0.5, "persistence": 0.95},
    ),
    "sink_local": ("every query wants the first chunk and its neighbourhood, fading with distance", {}),
    "flat": ("no chunk matches any query: routing logits are nearly equal, the densest and hardest case", {}),
    "adversarial": (
        "neighbouring queries want disjoint chunks, one topic each: the largest tile inflation",
        {"topics": 48},
    ),
    "captured": (
        "q, k, v replayed from a .safetensors or .pt file (option `path`, tensors `query`, `key`, `value`)",
        {},
    ),
    "iid": ("independent normal numbers: UNREALISTIC, nothing to route on; as some papers time it", {}),
}

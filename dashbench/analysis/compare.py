"""Two stores, point by point: FASTER, SLOWER, SAME or AMBIGUOUS, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import mannwhitneyu

from dashbench.analysis.points import finished
from dashbench.analysis.statistics import Interval, cliffs_delta, holm, ratio_of_rows
from dashbench.store import newest

Verdict = Literal["FASTER", "SLOWER", "SAME", "AMBIGUOUS"]

SIGNIFICANCE = 0.01
MINIMUM_SAMPLES = 5


@dataclass(frozen=True)
class Comparison:
    """One point in both stores.

    Attributes:
        before, after: the two rows.
        ratio: median after / median before, with a 95 % interval; below 1 means faster.
        p: Mann-Whitney p-value, Holm-adjusted over all points compared.
        effect: Cliff's delta; negative means faster.
        verdict, reason: what it amounts to and why.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    ratio: Interval
    p: float
    effect: float
    verdict: Verdict
    reason: str


def _judge(ratio: Interval, p: float, effect: float, samples: int, threshold: float) -> tuple[Verdict, str]:
    if samples < MINIMUM_SAMPLES:
        return "AMBIGUOUS", f"only {samples} samples on one side"
    if 1 - threshold <= ratio.low and ratio.high <= 1 + threshold:
        return "SAME", f"within ±{100 * threshold:g} %"
    if p < SIGNIFICANCE and abs(effect) >= 0.5:
        if ratio.high < 1 - threshold:
            return "FASTER", f"{1 / ratio.value:.3f}x, p = {p:.1g}"
        if ratio.low > 1 + threshold:
            return "SLOWER", f"{ratio.value:.3f}x the time, p = {p:.1g}"
        return "AMBIGUOUS", f"differs (p = {p:.1g}), but the interval reaches into ±{100 * threshold:g} %"
    return "AMBIGUOUS", f"interval {ratio.low:.3f} to {ratio.high:.3f} is too wide to tell"


def compare(
    before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]], threshold: float = 0.02
) -> list[Comparison]:
    """Matches rows by point key, in the same environment where there is one, and judges each pair.

    Args:
        before, after: rows of two stores.
        threshold: relative difference that nobody cares about.

    Returns:
        A comparison for each point that is finished in both, in the order of `before`.
    """
    exact, only = {}, {}
    for r in finished(newest(after)):
        exact[r["key"], r["environment_key"]] = r
        # A point measured in several environments has no one partner in a further one.
        only[r["key"]] = None if r["key"] in only else r
    matched = [
        (r, exact.get((r["key"], r["environment_key"])) or only.get(r["key"]))
        for r in finished(newest(before))
    ]
    pairs = [(b, a) for b, a in matched if a is not None]
    raw = [
        float(mannwhitneyu(b["samples"], a["samples"]).pvalue) if b["samples"] and a["samples"] else 1.0
        for b, a in pairs
    ]
    out = []
    for i, ((b, a), p) in enumerate(zip(pairs, holm(raw) if raw else [], strict=True)):
        ratio = ratio_of_rows(a, b, seed=i)
        effect = cliffs_delta(a["samples"], b["samples"])
        verdict, reason = _judge(ratio, p, effect, min(len(a["samples"]), len(b["samples"])), threshold)
        out.append(Comparison(b, a, ratio, p, effect, verdict, reason))
    return out

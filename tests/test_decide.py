"""Decisions: the fastest method that fits wins, and flips are where the arithmetic says."""

import pytest
from accuracy_rows import study
from kernel_rows import row

from dashbench.analysis.decide import decide, load_workload
from dashbench.analysis.points import AnalysisError

SHAPE = {"name": "s", "query_heads": 32, "kv_heads": 2, "head_dim": 128}
LENGTHS = (1024, 4096, 16384, 65536)


def kernel_rows():
    """Dense prefill N²; dash at 75 % costs 4 ms more and takes a quarter; decode alike, a thousandth."""
    rows = []
    for phase, scale in (("prefill", 1.0), ("decode", 1e-3)):
        for n in LENGTHS:
            dense = scale * (n / 4096) ** 2
            for method, ms, more in (
                ("fa3", dense, {}),
                ("dash", scale * 4 + dense / 4, {"s_flop": 0.75, "routing_options": {}}),
            ):
                key = f"{phase}/{method}/{n}"
                base = {"key": key, "phase": phase, "shape": SHAPE, "peak_bytes": 1 << 20}
                rows.append(row(method, n, [ms] * 9, **base, **more))
    return rows


def workload(folder, text):
    path = folder / "w.yaml"
    path.write_text(f"version: 1\nname: w\nlayers: 1\n{text}\n")
    return load_workload(path)


def test_the_fastest_wins_and_the_flip_is_where_both_take_equally_long(tmp_path):
    requests = "requests: [{share: 0.5, prompt: 1k, output: 0}, {share: 0.5, prompt: 16k, output: 0}]"
    found = decide(kernel_rows(), workload(tmp_path, requests))
    assert [c.label for c in found.candidates] == ["dash 75 %", "dense"]
    assert found.candidates[0].ms.value == pytest.approx(0.5 * (4 + 1 / 64) + 0.5 * (4 + 4))
    assert found.candidates[1].ms.value == pytest.approx(0.5 / 16 + 0.5 * 16)
    # dense is ahead by 3.953 ms at 1k and behind by 8 ms at 16k: equal at 66.9 % of short requests.
    assert any(
        f.startswith("switch to dense if more than 67 % of the requests are 1k + 0") for f in found.flips
    )
    assert found.certainty == 1.0


def test_output_tokens_cost_decode_steps_shared_by_the_batch(tmp_path):
    found = decide(kernel_rows(), workload(tmp_path, "requests: [{share: 1, prompt: 16k, output: 64}]"))
    dense = next(c for c in found.candidates if c.label == "dense")
    assert dense.ms.value == pytest.approx(16 + 64 * 16e-3, rel=0.02)
    with pytest.raises(AnalysisError, match="no decode rows at batch 8; measured: 1"):
        decide(kernel_rows(), workload(tmp_path, "batch: 8\nrequests: [{share: 1, prompt: 16k, output: 64}]"))


def test_a_floor_of_accuracy_and_memory_rule_methods_out(tmp_path):
    """In `study` dash at 75 % answers 90 % right, dense 92 %."""
    one = "requests: [{share: 1, prompt: 16k}]"
    rows = kernel_rows() + [r | {"environment_key": "e"} for r in study(documents=300)]
    kept = decide(rows, workload(tmp_path, f"accuracy_loss: 0.1\n{one}")).candidates
    assert kept[0].label == "dash 75 %" and kept[0].accuracy == pytest.approx(0.9, abs=0.03)
    floor = decide(rows, workload(tmp_path, f"accuracy_floor: 0.95\n{one}")).candidates
    assert floor[0].label == "dense" and "is below 0.950" in floor[1].obstacle
    with pytest.raises(AnalysisError, match="no accuracy rows here"):
        decide(kernel_rows(), workload(tmp_path, f"accuracy_floor: 0.95\n{one}"))
    with pytest.raises(AnalysisError, match=r"no method fits the workload: dash 75 %: needs 20\.0 GiB"):
        decide(kernel_rows(), workload(tmp_path, f"memory_gib: 16\nweights_gib: 20\n{one}"))


def test_nothing_is_claimed_beyond_the_lengths_measured(tmp_path):
    with pytest.raises(AnalysisError, match="no prefill rows at batch 1 on both sides of 131072 tokens"):
        decide(kernel_rows(), workload(tmp_path, "requests: [{share: 1, prompt: 128k}]"))


def test_a_bad_workload_is_one_sentence(tmp_path):
    with pytest.raises(
        AnalysisError, match=r"requests\.0\.promt: extra inputs are not permitted|prompt: field required"
    ):
        workload(tmp_path, "requests: [{share: 1, promt: 4k}]")

"""Claims: every verdict on planted rows, whose kernels are judged, and the file that comes with dashbench."""

import numpy as np
import pytest
from accuracy_rows import study
from kernel_rows import noisy, row

from dashbench.analysis.claims import check_claims, load_claims
from dashbench.analysis.points import AnalysisError
from dashbench.methods import registry

DECODE = {"phase": "decode", "s_flop": 0.75, "routing_options": {}}


def speedup_rows(ratio, spread, method="dash"):
    rng = np.random.default_rng(0)
    return [
        row("fa3", 98304, noisy(rng, 1.0, spread=spread), phase="decode"),
        row(method, 98304, noisy(rng, 1.0 / ratio, spread=spread), **DECODE),
    ]


def verdict_of(rows, identity, who="ours", claims=None):
    found = check_claims(rows, claims or load_claims())
    return [f for f in found if f.claim.id == identity and f.implementation == who]


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(2.5, 0.01, "REPRODUCED"), (1.2, 0.01, "CONTRADICTED"), (1.96 * 0.9, 0.2, "UNTESTED")],
)
def test_a_speedup_needs_its_whole_interval_on_one_side(ratio, spread, verdict):
    (found,) = verdict_of(speedup_rows(ratio, spread), "dash-decode-75")
    assert found.verdict == verdict and found.required == pytest.approx(1.96 * 0.9)
    assert found.measured.low < ratio * (1 + spread) and found.measured.high > ratio * (1 - spread)
    assert [key.partition("/")[0] for key in found.rows] == ["dash", "fa3"]


def test_other_peoples_kernels_are_judged_by_their_own_rows():
    rows = speedup_rows(2.5, 0.01, method="dash@fasa-org")
    assert verdict_of(rows, "dash-decode-75", "others'")[0].verdict == "REPRODUCED"
    (ours,) = verdict_of(rows, "dash-decode-75")
    assert ours.verdict == "UNTESTED" and "no rows of dash " in ours.reason


def test_another_sparsity_does_not_answer():
    rows = speedup_rows(2.5, 0.01)
    rows[1]["s_flop"] = 0.6
    assert verdict_of(rows, "dash-decode-75")[0].verdict == "UNTESTED"


def test_a_claim_about_a_setting_is_judged_at_that_setting():
    rng = np.random.default_rng(0)
    dense = row("dense@flash", 65536, noisy(rng, 12.0, spread=0.01), phase="decode")
    other = row("nsa", 65536, noisy(rng, 1.0, spread=0.01), **DECODE, knob={"top_k": 32, "window": 512})
    assert verdict_of([dense, other], "nsa-decode-64k")[0].verdict == "UNTESTED"
    theirs = {"top_k": 16, "window": 512, "block_size": 64}
    own = row("nsa", 65536, noisy(rng, 1.0, spread=0.01), **DECODE, knob=theirs)
    (found,) = verdict_of([dense, other | {"batch": 8}, own], "nsa-decode-64k")
    assert found.verdict == "REPRODUCED" and "batch 1" in found.setting


def test_checkpoints_of_other_people_are_known_by_their_names():
    rows = [{**r, "checkpoint": f"/models/MiniCPM-4-8B-{r['method']}"} for r in study(documents=30)]
    assert verdict_of(rows, "dash-frontier-nsa")[0].verdict == "UNTESTED"
    assert verdict_of(rows, "dash-frontier-nsa", "others'")[0].measured is not None


def test_accuracy_claims_follow_planted_chances():
    """In `study` dash loses about 2 points at 75 %, and has the better frontier."""
    rows = study(documents=400)
    (found,) = verdict_of(rows, "dash-accuracy-75")
    assert found.measured.low < -0.02 < found.measured.high and found.verdict == "UNTESTED"
    assert verdict_of(rows, "dash-frontier-nsa")[0].verdict == "REPRODUCED"
    assert verdict_of(rows, "dash-frontier-nsa", "others'")[0].verdict == "UNTESTED"


def test_the_packaged_claims_name_methods_that_exist():
    claims = load_claims()
    known = registry()
    for members in claims.implementations.values():
        assert {name for names in members.values() for name in names} <= set(known)
    assert len({c.id for c in claims.claims}) == len(claims.claims)
    assert all(c.source for c in claims.claims)


def test_a_bad_file_is_one_sentence(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("version: 1\nimplementations: {}\nothers_checkpoints: []\nclaims: [{id: x}]\n")
    with pytest.raises(AnalysisError, match=r"claims.yaml: claims\.0\.statement: field required"):
        load_claims(path)
    with pytest.raises(AnalysisError, match="cannot be read"):
        load_claims(tmp_path / "none.yaml")

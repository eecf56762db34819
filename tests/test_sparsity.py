"""Sparsity definitions against loops over single queries, and tile inflation against sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.baselines.api import Operator, Problem
from dashbench.sparsity import LATE, definitions, measure, percentiles, tile_inflation


def problem(length, rows, block=64, batch=1, kv_heads=1):
    query = torch.zeros(batch, 2 * kv_heads, rows, 4)
    key = torch.zeros(batch, kv_heads, length, 4)
    return Problem("prefill", query, key, key, torch.zeros(kv_heads, 4), block_size=block)


def operator(kept=None, selected=None, tile_union=None):
    return Operator(
        run=lambda: None,
        reference=lambda rows, chosen: None,
        kept=None if kept is None else lambda: kept,
        selected=selected,
        tile_union=tile_union,
    )


@st.composite
def counted(draw):
    block = draw(st.sampled_from([1, 3, 16, 64]))
    start, rows = draw(st.integers(0, 200)), draw(st.integers(1, 60))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kept = torch.tensor(
        [
            [[draw(st.integers(1, start + i + 1)) for i in range(rows)] for _ in range(heads)]
            for _ in range(batch)
        ]
    )
    return kept, start, start + rows, block


@settings(max_examples=30, deadline=None)
@given(counted())
def test_definitions_agree_with_a_loop_over_queries(case):
    kept, start, length, block = case
    used = could = own = blocks = queries = 0
    shares = 0.0
    for head in kept.flatten(0, 1).tolist():
        for i, n in enumerate(head, start=start):
            used, could, queries = used + n, could + i + 1, queries + 1
            own += len([t for t in range(i + 1) if t // block == i // block])
            shares += n / (i + 1)
            blocks += -(-n // block)
    found = definitions(kept, start, length, block)
    assert found["s_flop"] == 1 - used / could
    assert found["s_mean"] == pytest.approx(1 - shares / queries, abs=1e-12)
    assert found["s_up"] == pytest.approx(1 - blocks * block / queries / length, abs=1e-12)
    routable = could - own
    assert found["s_routed"] == (1 - (used - own) / routable if routable else 0.0)


def test_a_constant_budget_scores_as_published():
    """4096 tokens of 16384, queries from 4096 on: 75 % as the authors print it, 60 % of the work."""
    start, length = LATE, 16384
    own = torch.arange(start, length) % 64 + 1
    kept = (63 * 64 + own)[None, None]
    found = definitions(kept, start, length, 64)
    assert found["s_up"] == pytest.approx(0.75, abs=1e-12)
    assert found["s_flop"] == pytest.approx(0.60, abs=0.005)
    assert found["s_mean"] == pytest.approx(0.54, abs=0.005)


def test_dense_is_zero_but_not_in_the_authors_definition():
    found = measure(operator(), problem(8192, 8192, kv_heads=2))
    assert found["s_flop"] == found["s_mean"] == found["s_routed"] == 0.0
    blocks = sum(i // 64 + 1 for i in range(8192)) / 8192
    assert found["s_up"] == pytest.approx(1 - blocks * 64 / 8192, abs=1e-12)
    assert found["s_definitions"][f"s_flop_from_{LATE}"] == 0.0
    assert found["tile_inflation"] == {}
    assert found["s_spread"]["max"] == 8192


def test_late_definitions_leave_the_first_queries_out():
    visible = torch.arange(1, 5001)
    kept = torch.where(visible <= LATE, visible, visible // 2)[None, None]
    found = measure(operator(kept), problem(5000, 5000))
    expected = 1 - sum(i // 2 for i in range(LATE + 1, 5001)) / sum(range(LATE + 1, 5001))
    assert found["s_definitions"][f"s_flop_from_{LATE}"] == expected
    assert found["s_flop"] < found["s_definitions"][f"s_flop_from_{LATE}"]


def test_decode_definitions_coincide():
    decode = problem(6400, 1)
    found = measure(operator(torch.tensor([[[640]]])), decode)
    assert found["s_flop"] == found["s_mean"] == pytest.approx(0.9, abs=1e-12)
    assert found["s_up"] == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("count", [0, 9])
def test_impossible_counts_are_refused(count):
    kept = torch.full((1, 1, 8), count)
    kept[..., 1:] = 1
    with pytest.raises(ValueError, match="fewer than one or more than all"):
        measure(operator(kept), problem(8, 8))


def test_counts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="kept tokens in shape"):
        measure(operator(torch.ones(1, 2, 8, dtype=torch.long)), problem(8, 8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=200))
def test_percentiles_are_ranks(values):
    found = percentiles(torch.tensor(values))
    ordered = sorted(values)
    for name, share in {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}.items():
        at_most = sum(v <= found[name] for v in values) / len(values)
        below = sum(v < found[name] for v in values) / len(values)
        assert below <= share <= at_most + 1 / len(values)
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    assert found["mean"] == pytest.approx(sum(values) / len(values))


def test_tile_inflation_agrees_with_sets():
    rows, blocks = 32 * 16, 12
    routes = torch.rand(1, 2, rows, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    routes[..., 0] = True
    found = tile_inflation(operator(selected=lambda r: routes[:, :, r]), problem(rows, rows, kv_heads=2))
    one = sum(len(set(row.nonzero().flatten().tolist())) for head in routes[0] for row in head) / (2 * rows)
    for t in (1, 2, 4, 8, 16):
        unions = []
        for head in routes[0]:
            for tile in range(rows // t):
                union = set()
                for row in head[tile * t : (tile + 1) * t]:
                    union |= set(row.nonzero().flatten().tolist())
                unions.append(len(union))
        assert found[str(t)] == pytest.approx(sum(unions) / len(unions) / one, rel=1e-12)
    assert found["1"] == 1.0


def test_a_method_that_knows_its_tile_unions_is_believed():
    found = tile_inflation(operator(selected=lambda r: None, tile_union=lambda t: 1.0 + t), problem(512, 512))
    assert found == {"1": 2.0, "2": 3.0, "4": 5.0, "8": 9.0, "16": 17.0}

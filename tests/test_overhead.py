"""Overheads: parts add up to the whole, and what must go is what separates a method from dense."""

import pytest
from kernel_rows import row

from dashbench.analysis.overhead import LAUNCH, WRAPPER, overheads

STAGES = {"summarize": 1.0, "route": 3.0, "attend": 4.0}


def pair(latency, stages, dense=5.0, **more):
    return [row("fa3", 2048, [dense] * 9), row("dash", 2048, [latency] * 9, stages_ms=stages, **more)]


def test_parts_add_up_and_the_rest_is_between_the_stages():
    (found,) = overheads(pair(10.0, STAGES))
    assert sum(found.parts.values()) == pytest.approx(10.0) and found.parts[WRAPPER] == pytest.approx(2.0)
    assert found.ratio.value == pytest.approx(2.0) and found.lose == pytest.approx(0.5)
    assert found.lose_of["route"] == pytest.approx(5 / 3), "more than all of it: not enough by itself"
    assert found.lose_of["attend"] == pytest.approx(5 / 4)
    assert found.fusing == pytest.approx(0.2) and found.scaled == 1.0


def test_stages_that_overlap_are_scaled_into_the_whole():
    (found,) = overheads(pair(4.0, STAGES))
    assert found.scaled == pytest.approx(0.5) and sum(found.parts.values()) == pytest.approx(4.0)
    assert found.parts["route"] == pytest.approx(1.5) and found.lose == 0.0


def test_launching_from_python_is_a_part_of_its_own():
    rows = pair(20.0, STAGES, launch="eager", gpu_ms=9.0)
    rows[0]["launch"] = "eager"
    (found,) = overheads(rows)
    assert found.parts[LAUNCH] == pytest.approx(11.0) and found.parts[WRAPPER] == pytest.approx(1.0)
    assert found.fusing == pytest.approx(12 / 20)


def test_only_short_contexts_with_a_dense_row_beside_them():
    rows = pair(10.0, STAGES)
    assert overheads(rows, longest=1024) == []
    assert overheads(rows[1:]) == []
    assert overheads([rows[0], rows[1] | {"stages_ms": None}]) == []
    assert overheads([rows[0] | {"launch": "eager"}, rows[1]]) == []

"""The search of a knob: each value once, blocks exactly, factors by halving, and an honest miss."""

import pytest

from dashbench.find_knob import STEPS, find_knob
from dashbench.tasks.documents import TaskSkipped


def counted(sparsity):
    asked = []

    def measure(value):
        asked.append(value)
        return sparsity(value)

    return measure, asked


@pytest.mark.parametrize("wanted", [1, 2, 7, 63, 100])
def test_blocks_are_found_exactly_and_none_is_measured_twice(wanted):
    measure, asked = counted(lambda top_k: 1 - top_k / 100)
    assert find_knob(measure, "top_k", 100, 1 - wanted / 100, 1e-9) == wanted
    assert len(asked) == len(set(asked)) <= 9 and all(1 <= value <= 100 for value in asked)


def test_the_nearer_of_two_block_counts_is_taken():
    assert find_knob(lambda k: {1: 0.9, 2: 0.52, 3: 0.4}[k], "top_k", 3, 0.5, 0.05) == 2
    assert find_knob(lambda k: {1: 0.9, 2: 0.6, 3: 0.49}[k], "top_k", 3, 0.5, 0.05) == 3


@pytest.mark.parametrize("factor", [0.02, 1.0, 37.0, 900.0])
def test_factors_are_halved_until_half_the_tolerance(factor):
    measure, asked = counted(lambda value: value / (value + factor))
    found = find_knob(measure, "scaling_factor", 1, 0.5, 0.01)
    assert abs(found / (found + factor) - 0.5) <= 0.005 and len(asked) <= STEPS
    assert abs(asked[-1] / (asked[-1] + factor) - 0.5) <= 0.005, "it stops where it is near enough"


def test_what_cannot_be_reached_is_said():
    with pytest.raises(TaskSkipped, match=r"cannot reach s_flop 0.9 ± 0.01: nearest is 0.7000 at top_k 1"):
        find_knob(lambda k: 0.7 / k, "top_k", 9, 0.9, 0.01)

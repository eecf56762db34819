"""What the Hopper kernels work out with integers: which tiles a program has, which blocks of keys a tile has.

Gluon has no interpreter. These functions hold no tensors: their own source runs here, on Python's integers.
"""

import types

import pytest

from dashbench.kernels import band_hopper, hopper


class Integer(int):
    """A number that Gluon's casts leave alone."""

    def to(self, _):
        return int(self)


class Language:
    """The names of `gl` that these functions use, for program `number` of `count`."""

    int32 = None

    def __init__(self, number=0, count=1):
        self.number, self.count = number, count

    def program_id(self, _):
        return self.number

    def num_programs(self, _):
        return self.count

    @staticmethod
    def minimum(a, b):
        return min(a, b)

    @staticmethod
    def maximum(a, b):
        return max(a, b)


class Comparable(int):
    """An integer whose comparisons can be cast, as Gluon's can."""

    def __lt__(self, other):
        return Integer(int(self) < int(other))

    def __add__(self, other):
        return Comparable(int(self) + int(other))


def run(kernel, language, **more):
    """The Python function behind a Gluon one, with `language` for `gl`."""
    function = kernel.fn
    return types.FunctionType(function.__code__, {**function.__globals__, "gl": language, **more})


@pytest.mark.parametrize("count", [1, 2, 3, 132])
@pytest.mark.parametrize("total", [1, 2, 5, 131, 132, 133, 400, 1000])
def test_every_work_is_one_programs(total, count):
    heads, kv_heads = (5, 5) if total % 5 == 0 else (1, 1)
    programs = min(count, total)
    seen = []
    shares = []
    for number in range(programs):
        language = Language(Comparable(number), programs)
        works = run(hopper.work_count, language)(total)
        shares.append(works)
        place = run(hopper.place_of, Language(number, programs))
        for n in range(works):
            index, tile, batch, kv_head = place(n, heads, kv_heads, total // heads)
            assert index == batch * kv_heads + kv_head
            seen.append((index, tile))
    assert sorted(seen) == [(i, t) for i in range(heads) for t in range(total // heads)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("tile_queries,block", [(2, 4), (8, 4), (4, 16)])
@pytest.mark.parametrize(
    ("kernel", "stride", "window"),
    [(8, 4, 0), (4, 2, 0), (1, 1, 0), (1, 1, 1), (1, 1, 5), (1, 1, 9), (1, 1, 40)],
)
@pytest.mark.parametrize("start", [0, 3, 17])
def test_blocks_of_a_tile_hold_what_its_rows_see(tile_queries, block, kernel, stride, start, window):
    """Every key that a row sees lies in one of the tile's blocks; all rows see those without a mask whole."""
    language = Language()
    seen_by = run(band_hopper._seen, language)
    blocks_of = run(band_hopper._blocks, language, _seen=seen_by)
    rows = 21
    for count in (1, 7, (start + rows - kernel) // stride + 1 if start + rows >= kernel else 1):
        for tile in range(-(-rows // tile_queries)):
            last, blocks, upper, middle = blocks_of(
                tile, start, rows, count, window, tile_queries, block, kernel, stride, window > 0
            )
            assert 1 <= upper <= middle <= blocks
            mine = [last - j for j in range(blocks)]
            assert min(mine) >= 0
            for row in range(tile * tile_queries, min((tile + 1) * tile_queries, rows)):
                position = start + row
                visible = {
                    t
                    for t in range(count)
                    if stride * t + kernel - 1 <= position and (not window or t > position - window)
                }
                assert visible <= {t for b in mine for t in range(b * block, (b + 1) * block)}
                for b in mine[upper:middle]:
                    assert set(range(b * block, (b + 1) * block)) <= visible

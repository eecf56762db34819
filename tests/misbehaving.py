"""Methods that go wrong in every way a runner must survive; loaded by entry point in tests only."""

from dashbench.methods import Method


def _method(name: str) -> Method:
    return Method(
        name=f"bad@{name}",
        target=f"misbehaving:{name}",
        summary=name,
        devices=("cpu",),
        dtypes=("float32",),
        family="bad",
    )


SEGFAULT, WRONG, HOG, HANG, RAISES, LATE = (
    _method(n) for n in ("segfault", "wrong", "hog", "hang", "raises", "late")
)


def _operator(problem, run):
    from dashbench.baselines.api import Operator
    from dashbench.baselines.attention_reference import dense_expected

    return Operator(run=run, reference=lambda rows, selected: dense_expected(problem, rows))


def _right(problem):
    import torch

    group = problem.query.shape[1] // problem.key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        problem.query, *(x.repeat_interleave(group, 1) for x in (problem.key, problem.value)), is_causal=True
    )


def segfault(problem):
    import ctypes

    print("about to read address zero")
    return _operator(problem, lambda: ctypes.string_at(0))


def wrong(problem):
    return _operator(problem, lambda: _right(problem) * 1.02)


def hog(problem):
    import torch

    held = []

    def run():
        while True:
            held.append(torch.ones(1 << 26))  # 256 MiB, touched

    return _operator(problem, run)


def hang(problem):
    import time

    return _operator(problem, lambda: time.sleep(3600))


def raises(problem):
    raise RuntimeError("this method\nalways raises")


CALLS = {"late": 0}


def late(problem):
    """Right at the gate, twice to warm up and for the fewest samples; only the re-check sees it is not."""

    def run():
        CALLS["late"] += 1
        out = _right(problem)
        return out if CALLS["late"] < 7 else out + 0.5

    return _operator(problem, run)

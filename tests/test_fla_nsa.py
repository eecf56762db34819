"""NSA by flash-linear-attention: refusals where it cannot run, numbers where it can."""

from importlib import util

import pytest
import torch
from baseline_problems import make_problem, relative_error

from dashbench.baselines import fla_nsa
from dashbench.baselines.api import Problem, Unsupported
from dashbench.baselines.block_selection import Windows
from dashbench.baselines.nsa_reference import Nsa, NsaSettings

here = pytest.mark.skipif(
    not torch.cuda.is_available() or util.find_spec("fla") is None, reason="needs an NVIDIA GPU and fla-core"
)
GPU = {"group": 16, "head_dim": 128, "block_size": 64, "dtype": torch.bfloat16, "device": "cuda"}


def test_without_a_gpu_it_says_so():
    with pytest.raises(Unsupported, match="need a GPU"):
        fla_nsa.prepare(make_problem("prefill", 20))


def test_with_windows_equal_to_blocks_a_block_scores_what_its_window_does():
    """The specification that fla's output is judged by, by hand: one mean a block, one softmax, summed over
    the group.
    """
    problem = make_problem("prefill", 90, kv_heads=1, group=2, block_size=16)
    method = Nsa(problem, NsaSettings(top_k=4, window_blocks=0), windows=Windows(16, 16))
    (keys, _), positions = method.compress(problem.key, problem.value), torch.tensor([79, 80])
    scores, _ = method.score(problem.query[:, None, :, positions].double(), positions, (keys, keys), 6)
    means = torch.stack([problem.key[0, 0, 16 * j : 16 * j + 16].mean(0) for j in range(5)])
    for n in range(2):  # position 79 completes block 4, so both see five blocks
        expected = sum(
            torch.softmax(means @ problem.query[0, h, 79 + n] * problem.scale, 0) for h in range(2)
        )
        torch.testing.assert_close(scores[0, 0, n, :5], expected)
        assert scores[0, 0, n, 5] == 0


@pytest.mark.gpu
@here
def test_what_it_cannot_do_is_refused():
    with pytest.raises(Unsupported, match="at least 16 query heads"):
        fla_nsa.prepare(make_problem("prefill", 100, **(GPU | {"group": 4})))
    with pytest.raises(Unsupported, match="at most 32 blocks"):
        fla_nsa.prepare(make_problem("decode", 64 * 70, **GPU), top_k=33)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("phase,length,top_k", [
    ("prefill", 2100, 16), ("prefill", 2100, 12),
    ("decode", 2100, 16), ("decode", 2112, 12), ("train", 1500, 8),
])  # fmt: skip
def test_output_selection_and_gradients_equal_fp64(phase, length, top_k):
    problem = make_problem(phase, length, batch=2, **GPU)
    operator = fla_nsa.prepare(problem, top_k=top_k)
    rows = torch.arange(0, problem.query.shape[2], 37)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    own_blocks = (rows + problem.start) // 64 + 1
    assert (selected.sum(-1).cpu() == own_blocks.clamp(max=top_k)).all()
    output = operator.run()[:, :, rows.cuda()].double()
    assert relative_error(output, expected.output) < 0.15
    assert (output - expected.output).norm() / expected.output.norm() < 0.01
    if phase == "train":
        exact = operator.reference_gradients()
        for name, grad in operator.gradients().items():
            assert (grad.double() - exact[name]).norm() / exact[name].norm() < 0.02, name


@pytest.mark.gpu
@here
def test_decode_equals_the_last_row_of_prefill():
    prefill = make_problem("prefill", 2112, **GPU)
    last = prefill.query[:, :, -1:]
    decode = Problem("decode", last, prefill.key, prefill.value, prefill.summary_query)
    step, whole = (fla_nsa.prepare(p).run() for p in (decode, prefill))
    assert relative_error(step[:, :, 0], whole[:, :, -1]) < 0.05

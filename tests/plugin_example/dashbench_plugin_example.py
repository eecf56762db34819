"""A method for dashbench from outside its tree: attention as three lines of PyTorch.

`METHOD` is what the entry point names; `prepare` is what a worker calls. torch is imported inside, so that
`dashbench list` stays fast.
"""

from dashbench.methods import Method

METHOD = Method(
    name="example@sdpa",
    target="dashbench_plugin_example:prepare",
    summary="softmax attention in three lines, an example",
    devices=("cpu", "cuda"),
    phases=("prefill", "decode"),
    dtypes=("float32", "bfloat16", "float16"),
    family="dense",
)


def prepare(problem):
    """What is done here is not timed; what `run` does is."""
    import torch

    from dashbench.baselines.api import Operator
    from dashbench.baselines.attention_reference import dense_expected

    group = problem.query.shape[1] // problem.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (problem.key, problem.value))
    rows, length = problem.query.shape[2], key.shape[2]
    mask = torch.ones(rows, length, dtype=torch.bool, device=key.device).tril(length - rows)

    def run():
        scores = (problem.query @ key.mT * problem.scale).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(value.dtype) @ value

    return Operator(run=run, reference=lambda rows, selected: dense_expected(problem, rows))

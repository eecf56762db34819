"""What a decode step of a model costs the host: nothing is counted, copied or waited for needlessly, and the
counts and answers are those of the plain way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from dashbench.kernels.reference import DashOptions, dash_attention
from dashbench.models.attention import AttentionState, _dash_continued, dash_options
from dashbench.models.checkpoint import random_model
from dashbench.models.generate import new_sequences, read
from dashbench.models.kinds import KINDS, settings_of
from dashbench.models.sequence import Ledger, Sequences

SPARSE = {"top_k": 4, "local_blocks": 1, "init_blocks": 1, "block_size": 16}
KNOBS = {"dense": {}, "dash": {"chunk_size": 16}, "nsa": SPARSE, "infllmv2": SPARSE}
LAYERS, BATCH, KV_HEADS, BLOCK = 3, 2, 2, 16


class Operations(TorchDispatchMode):
    """Names of the operations that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def calls(steps, dense=False):
    """(layer, active, start, rows) of a prompt, a second piece of it, and steps after it."""
    generator, found = torch.Generator().manual_seed(0), []
    start = 0
    for rows in (40, 7, *[1] * steps):
        for layer in range(LAYERS):
            most = (torch.arange(start, start + rows) // BLOCK + 1).expand(BATCH, KV_HEADS, rows)
            drawn = torch.rand(most.shape, generator=generator)
            active = None if dense else (1 + (drawn * most).long()).clamp(max=most).int()
            found.append((layer, active, start, rows))
        start += rows
    return found


def by_hand(found):
    """The summary by its definitions, query by query."""
    sums = {}
    for layer, active, start, rows in found:
        phase = "prefill" if start == 0 else "decode"
        total = sums.setdefault(phase, torch.zeros(LAYERS, 5, dtype=torch.float64))
        for row in range(rows):
            position = start + row
            for sequence in range(BATCH):
                for head in range(KV_HEADS):
                    if active is None:
                        kept = whole = position + 1
                    else:
                        blocks = int(active[sequence, head, row])
                        kept, whole = (blocks - 1) * BLOCK + position % BLOCK + 1, blocks * BLOCK
                    visible = position + 1
                    one = [kept, visible, kept / visible, whole / (start + rows), 1]
                    total[layer] += torch.tensor(one, dtype=torch.float64)
    return {
        phase: {
            "s_flop": float(1 - t[:, 0].sum() / t[:, 1].sum()),
            "s_mean": float(1 - t[:, 2].sum() / t[:, 4].sum()),
            "s_up": float(1 - t[:, 3].sum() / t[:, 4].sum()),
            "s_flop_by_layer": (1 - t[:, 0] / t[:, 1]).tolist(),
        }
        for phase, t in sums.items()
    }  # fmt: skip


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("at_once", [256, 4])
def test_the_ledger_counts_as_by_hand(monkeypatch, dense, at_once):
    monkeypatch.setattr(Ledger, "STEPS", at_once)
    ledger, found = Ledger(LAYERS, KV_HEADS, "cpu"), calls(11, dense)
    for layer, active, start, rows in found:
        ledger.add("prefill" if start == 0 else "decode", layer, active, start, rows, BLOCK)
    expected = by_hand(found)
    for summary in (ledger.summary(), ledger.summary()):  # asking twice counts nothing twice
        assert summary.keys() == expected.keys()
        for phase, numbers in expected.items():
            for name, value in numbers.items():
                assert summary[phase][name] == pytest.approx(value, abs=1e-12), (phase, name)
    ledger.clear()
    assert ledger.summary() == {}


def test_a_step_repeated_at_one_place_counts_each_time():
    ledger, once = Ledger(1, 1, "cpu"), Ledger(1, 1, "cpu")
    for active in (1, 3):
        ledger.add("decode", 0, torch.full((1, 1, 1), active), 50, 1, BLOCK)
    once.add("decode", 0, torch.tensor([1, 3]).view(2, 1, 1), 50, 1, BLOCK)
    assert ledger.summary() == once.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_counts_without_an_operation_and_waits_for_nothing(kind):
    model = random_model(kind, "tiny", **KNOBS[kind])
    tokens = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    sequences = new_sequences(model, 2, 64)
    read(model, tokens, sequences)
    names = []
    for counting in (True, False):
        sequences.counting = counting
        with Operations() as operations:
            read(model, tokens[:, :1], sequences)
        names.append(operations.names)
    assert len(names[0]) == len(names[1])
    if kind == "dense":  # the specifications of the others read values on the host
        assert not [name for name in names[0] if "_local_scalar_dense" in name]
        assert len(names[0]) <= 90 * model.config.num_hidden_layers


class Layer(torch.nn.Module):
    """What `_dash_continued` needs of a layer's attention."""

    def __init__(self, index, state, generator):
        super().__init__()
        self.layer_idx, self.dashbench = index, state
        self.indexer_q = torch.nn.Parameter(torch.randn(KV_HEADS * 64, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_layers_share_a_steps_buffers_and_kernels_write_the_new_tokens(static):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    settings, _ = settings_of("dash", {}, "package", {"chunk_size": 16, "scaling_factor": 4.0})
    state = AttentionState("dash", settings, {}, torch.nn.Identity())
    dtype, prompt, length = torch.float32, 30, 35
    sequences = Sequences(2, BATCH, KV_HEADS, 64, 48, "dash", settings, dtype, device)
    layers = [Layer(index, state, generator).to(device) for index in range(2)]
    keys, values = (torch.randn(2, BATCH, KV_HEADS, length, 64, generator=generator).to(device) for _ in "kv")
    queries = torch.randn(2, BATCH, 4, length, 64, generator=generator).to(device)
    for layer, key, value, cache in zip(layers, keys, values, sequences.dash, strict=True):
        cache.append(key[:, :, :prompt], value[:, :, :prompt], layer.indexer_q.view(KV_HEADS, 64))
    for end in range(prompt + 1, length + 1):
        sequences.length = end - 1
        if static:
            sequences.restart_step()
        found = []
        for layer, query, key, value in zip(layers, queries, keys, values, strict=True):
            new, index = tuple(x[:, :, end - 1 : end] for x in (key, value)), layer.layer_idx
            sequences.extend(index, *new, write=False)
            own = query[:, :, end - 1 : end], new, sequences.dash[index]
            found.append(_dash_continued(layer, state, *own, sequences, end))
        for (out, active), layer, query, key, value in zip(found, layers, queries, keys, values, strict=True):
            options = DashOptions(**dash_options(settings))
            whole = query[:, :, :end], key[:, :, :end], value[:, :, :end]
            expected, routing = dash_attention(*whole, layer.indexer_q.view(KV_HEADS, 64), options)
            torch.testing.assert_close(out, expected[:, :, -1:], atol=2e-4, rtol=0)
            assert torch.equal(active.long(), routing.active.sum(-1)[..., -1:].long())
    for mine, given in ((sequences.keys, keys), (sequences.values, values)):
        assert all(torch.equal(x[:, :, :length], y) for x, y in zip(mine, given, strict=True))

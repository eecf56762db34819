"""Checkpoints of four kinds load strictly, generate like an uncached forward, and count what they keep."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from dashbench.baselines.selected_blocks import CompressedCache
from dashbench.models.checkpoint import load, make_checkpoint, random_model, read_config
from dashbench.models.generate import Generated, end_tokens, generate, new_sequences, read, rows_at_once
from dashbench.models.kinds import KINDS, CheckpointError, added_parameters, kind_of, settings_of

SPARSE = {"top_k": 4, "local_blocks": 1, "init_blocks": 1, "block_size": 16}
KNOBS = {
    "dense": {}, "dash": {"chunk_size": 16, "scaling_factor": 6.0}, "nsa": SPARSE, "infllmv2": SPARSE,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        make_checkpoint(root / kind, kind, **KNOBS[kind])
    return root


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (length,), generator=generator).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_caches_equals_whole_forwards(folders, kind):
    model = load(folders / kind)
    assert model.dashbench.kind == kind
    tokens = prompt(150)
    found = generate(model, tokens, 20)
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(len(found.tokens)):
            logits = model(input_ids=torch.tensor([expected]), use_cache=False).logits[0, -1]
            expected.append(int(logits.argmax()))
    assert found.tokens == expected[150:] and len(found.tokens) >= 4
    sparsity = found.sparsity["prefill"]["s_flop"]
    assert sparsity == 0 if kind == "dense" else 0.05 < sparsity < 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_prompt_equal_one_reading(folders, kind):
    model = load(folders / kind)
    tokens = torch.tensor([prompt(90)])
    whole = read(model, tokens, new_sequences(model, 1, 90))
    pieces = new_sequences(model, 1, 90)
    for start, end in ((0, 48), (48, 61), (61, 90)):
        last = read(model, tokens[:, start:end], pieces)
    torch.testing.assert_close(last, whole, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_equal_lengths_reads_like_its_rows(folders, kind):
    model = load(folders / kind)
    tokens = torch.tensor([prompt(70, seed) for seed in range(4)])
    together = read(model, tokens, new_sequences(model, 4, 70))
    alone = torch.cat([read(model, row[None], new_sequences(model, 1, 70)) for row in tokens])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_read_in_parts_goes_on_like_one_read_at_once(folders, kind, monkeypatch):
    """Seven prompts three at a time, the last part shorter, with planted states as latency suites have."""
    model = load(folders / kind)
    tokens = torch.tensor([prompt(70, seed) for seed in range(7)])
    generator = torch.Generator().manual_seed(5)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    model.dashbench.planted = tuple(
        torch.randn(7, h, 80, model.config.head_dim, generator=generator) for h in heads
    )
    found = []
    for at_once in (7 * 70, 3 * 70):
        monkeypatch.setattr("dashbench.models.generate.AT_ONCE", at_once)
        sequences = new_sequences(model, 7, 80)
        logits = [read(model, tokens, sequences)]
        for _ in range(6):  # a compressed window is completed on the way
            logits.append(read(model, logits[-1].argmax(-1, keepdim=True), sequences))
        found.append((torch.stack(logits), sequences.length, sequences.ledger.summary()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-4, rtol=0)
    assert found[0][1] == found[1][1] == 76
    assert found[1][2]["prefill"]["s_flop"] == pytest.approx(found[0][2]["prefill"]["s_flop"])


def test_parts_are_of_equal_size_and_one_prompt_at_least():
    assert [rows_at_once(8, n) for n in (1, 16384, 65536, 131072, 1 << 20)] == [8, 8, 2, 1, 1]
    assert rows_at_once(7, 40000) == 3


def test_a_batch_is_read_in_parts_from_its_beginning(folders):
    sequences = new_sequences(load(folders / "nsa"), 2, 30)
    read(load(folders / "nsa"), torch.tensor([prompt(20), prompt(20, 1)]), sequences)
    with pytest.raises(ValueError, match="not behind 20 tokens"):
        sequences.part(0, 1)
    shorter, longer = CompressedCache(), CompressedCache()
    shorter.seen(5, 5)
    longer.seen(6, 6)
    with pytest.raises(ValueError, match=r"parts of \[5, 6\] tokens"):
        CompressedCache().join([shorter, longer])


def test_padded_batches_are_refused(folders):
    model = load(folders / "dash")
    attention = model.model.layers[0].self_attn
    states = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)
    from dashbench.models.attention import attend

    with pytest.raises(ValueError, match="padded"):
        attend(attention, *states, torch.ones(1, 1, 3, 3))


def test_dense_equals_the_stock_model(folders):
    ours = load(folders / "dense")
    stock = LlamaForCausalLM.from_pretrained(folders / "dense", dtype=torch.float32).eval()
    tokens = torch.tensor([prompt(40)])
    with torch.no_grad():
        expected = stock(input_ids=tokens).logits
        torch.testing.assert_close(
            ours(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4, rtol=0
        )


def test_all_kinds_train(folders):
    for kind in KINDS:
        model = load(folders / kind).train()
        tokens = torch.tensor([prompt(80)])
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        names = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not names, f"{kind}: no gradient of {names[:3]}"
        added = [
            p.grad
            for n, p in model.named_parameters()
            if n.split("self_attn.")[-1] in added_parameters(kind, 2, 16)
        ]
        assert len(added) == 2 * len(added_parameters(kind, 2, 16))
        assert all(float(grad.norm()) > 0 for grad in added)


def test_the_knob_may_be_turned_at_any_time(folders):
    model = load(folders / "dash")
    found = []
    for gamma in (1.0, 20.0):
        model.dashbench.settings["scaling_factor"] = gamma
        found.append(generate(model, prompt(200), 1).sparsity["prefill"]["s_flop"])
    assert found[0] < found[1] - 0.1


def test_the_papers_summary_query_turns_with_the_position(folders):
    """With `rope_mean` a nonzero summary query gives other summaries than `plain`, in pieces as at once."""
    model = load(folders / "dash", summary_query_mode="rope_mean")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.indexer_q.normal_(0, 3.0, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([prompt(100)])
    whole = read(model, tokens, new_sequences(model, 1, 100))
    pieces = new_sequences(model, 1, 100)
    read(model, tokens[:, :64], pieces)
    torch.testing.assert_close(read(model, tokens[:, 64:], pieces), whole, atol=2e-4, rtol=0)
    model.dashbench.settings["summary_query_mode"] = "plain"
    assert not torch.allclose(read(model, tokens, new_sequences(model, 1, 100)), whole, atol=1e-3)


def test_sharded_and_pickled_weights_load_alike(folders, tmp_path):
    state = load_file(folders / "nsa" / "model.safetensors")
    names = sorted(state)
    half = len(names) // 2
    for form in ("sharded", "pickled"):
        shutil.copytree(folders / "nsa", tmp_path / form)
        (tmp_path / form / "model.safetensors").unlink()
    where = {}
    for number, part in enumerate((names[:half], names[half:])):
        file = f"model-{number}.safetensors"
        save_file({n: state[n] for n in part}, tmp_path / "sharded" / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    expected = generate(load(folders / "nsa"), prompt(60), 4).tokens
    for form in ("sharded", "pickled"):
        assert generate(load(tmp_path / form), prompt(60), 4).tokens == expected


def broken(folders, tmp_path, kind, change):
    folder = tmp_path / "broken"
    shutil.copytree(folders / kind, folder)
    state, config = load_file(folder / "model.safetensors"), read_config(folder)
    change(folder, state, config)
    if (folder / "model.safetensors").exists():
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if (folder / "config.json").exists() and config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


LAYER = "model.layers.0.self_attn"


def without(name):
    return lambda folder, state, config: state.pop(name)


def with_tensor(name, size):
    return lambda folder, state, config: state.update({name: torch.zeros(size)})


def with_config(**more):
    return lambda folder, state, config: config.update(more)


def without_file(name):
    def change(folder, state, config):
        (folder / name).unlink()
        if name == "config.json":
            config.clear()

    return change


def unchanged(folder, state, config):
    pass


BROKEN = {
    "missing": ("dash", without(f"{LAYER}.o_proj.weight"), "auto", "1 parameters are missing, first model"),
    "left over": ("dash", with_tensor("odd", 1), "auto", "1 parameters have no place, first odd"),
    "shape": ("dash", with_tensor(f"{LAYER}.indexer_q", 3), "auto", r"indexer_q is \[3\], expected \[32\]"),
    "wrong kind": ("dash", unchanged, "dense", "asked for dense attention, but the checkpoint has indexer_q"),
    "absent kind": ("dense", unchanged, "dash", "has no self_attn.indexer_q"),
    "multiplier": ("dense", with_config(scale_emb=12), "auto", "scale_emb, a multiplier of MiniCPM"),
    "family": ("dense", with_config(model_type="minicpm"), "auto", "only llama checkpoints"),
    "config": ("dense", without_file("config.json"), "auto", "no config.json"),
    "weights": ("dense", without_file("model.safetensors"), "auto", "no weights"),
    "unknown": ("dense", with_config(attention_kind="sparse"), "auto", "unknown attention 'sparse'"),
    "both": ("nsa", with_tensor(f"{LAYER}.indexer_q", 32), "auto", "both DashAttention and NSA"),
}


@pytest.mark.parametrize(("kind", "change", "attention", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_one_sentence(folders, tmp_path, kind, change, attention, message):
    folder = broken(folders, tmp_path, kind, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, attention)


def test_torn_weights_are_one_sentence(folders, tmp_path):
    shutil.copytree(folders / "dense", tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable as weights"):
        load(tmp_path / "torn")


def test_settings_come_from_the_caller_then_the_config_then_the_preset():
    told = {"chunk_size": 32, "estimate_diagonal": True, "scaling_factor": None}
    settings, source = settings_of("dash", told, "package", {"sigma": 5.0})
    assert (settings["chunk_size"], source["chunk_size"]) == (32, "config")
    assert (settings["bias_mode"], source["bias_mode"]) == ("centered", "config")
    assert (settings["sigma"], source["sigma"]) == (5.0, "given")
    assert (settings["scaling_factor"], source["scaling_factor"]) == (1.0, "package")
    with pytest.raises(CheckpointError, match="no setting 'gamma'"):
        settings_of("dash", {}, "package", {"gamma": 1})
    assert kind_of(["model.layers.0.self_attn.indexer_q"], {}) == "dash"


def test_ends_are_one_token_or_a_list(folders):
    model = load(folders / "dense")
    model.config.eos_token_id = [2, 7]
    assert end_tokens(model) >= {2, 7}
    assert isinstance(generate(model, prompt(10), 2), Generated)
    with pytest.raises(ValueError, match="do not fit a model of 4096"):
        generate(model, prompt(4000), 200)


def test_the_8b_shape_has_the_released_names_and_numbers():
    """On the meta device: 8.185 B parameters, and those that each kind adds."""
    from dashbench.models.checkpoint import SIZES, _skeleton

    config = {"model_type": "llama", **SIZES["8b"], "tie_word_embeddings": False}
    with torch.device("meta"):
        assert torch.empty(1).is_meta, "or the next line takes 33 GB"
        model = _skeleton(config, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.185e9, rel=1e-3)
    assert added_parameters("dash", 2, 128) == {"indexer_q": (256,)}
    tiny = random_model("nsa", **KNOBS["nsa"])
    wanted = {f"model.layers.1.self_attn.{n}": s for n, s in added_parameters("nsa", 2, 16, 16).items()}
    state = tiny.state_dict()
    assert {name: tuple(state[name].shape) for name in wanted} == wanted


def test_the_public_names_bring_torch_only_when_asked_for():
    command = (
        "import sys, dashbench.models as m; assert 'torch' not in sys.modules\n"
        "from dashbench.models import load; assert load.__module__ == 'dashbench.models.checkpoint'\n"
        "assert not hasattr(m, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tokenizer_reads_any_text(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "dash")
    text = "One of the special magic numbers is: 42.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

"""The small model's data say what they ask for, its Llama is transformers', every attention learns in it."""

import re

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dashbench.miniature.attentions import flop_sparsity
from dashbench.miniature.checkpoints import load_checkpoint, save_checkpoint
from dashbench.miniature.continuation import alpha_at, summary_query_gradient, swap_attention
from dashbench.miniature.llama import Llama
from dashbench.miniature.pieces import corpus, is_held_out, make_pieces
from dashbench.miniature.rows import KINDS, draw_rows, mix
from dashbench.miniature.shape import LlamaShape
from dashbench.miniature.steps import Trainer, batch_loss
from dashbench.miniature.tokenizer import train_tokenizer

TINY = LlamaShape(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
SMALL_BLOCKS = {
    "dense": {},
    "infllmv2": {"block_size": 16, "top_k": 4},
    "nsa": {"block_size": 16, "top_k": 4},
    "dash": {"chunk_size": 16, "scaling_factor": 4.0},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TINY.vocab_size, *corpus())


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return make_pieces(tokenizer, 1024, 1, held_out=False)


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return make_pieces(tokenizer, 1024, 2, held_out=True)


def rows_of(pieces, kind, rows=12, length=900, **shares):
    kinds = tuple(float(name == kind) for name in KINDS)
    torch.manual_seed(KINDS.index(kind))
    return draw_rows(pieces, mix("cpu", kinds, **shares), rows, length)


def questions(batch, row, tokenizer):
    """(text up to the answer, answer) of every whole question of a row."""
    tokens, role, owner = (getattr(batch, n)[row] for n in ("tokens", "answers", "question"))
    for number in owner[role == 2].tolist():
        mine = (owner == number) & (role == 1)
        first = mine.nonzero()[0].item()
        yield tokenizer.decode(tokens[:first].tolist()), tokenizer.decode(tokens[mine].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_what_the_text_says(kind, pieces, tokenizer):
    batch = rows_of(pieces, kind, short_key=0.3)
    asked = 0
    for row in range(batch.tokens.shape[0]):
        for before, answer in questions(batch, row, tokenizer):
            asked += 1
            if kind == "track":
                value = re.findall(r"assigned the value (\d+) in the text", before)[-1]
                chain, names = {}, []
                for name, meant in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d+)", before):
                    chain[name] = chain.get(meant, meant)
                    names += [name] if chain[name] == value else []
                assert answer.split() == names and len(names) == 5
            else:
                keys = re.findall(r"numbers? for (.+?) mentioned in the provided text", before)[-1]
                values = []
                for key in re.split(r", and |, ", keys):
                    values += re.findall(rf"numbers for {re.escape(key)} is: (\d+)", before)
                assert answer.split(", ") == values
                assert len(values) == (1 if kind == "single" else 4)
    assert asked > 10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_tokenised_as_their_text_would_be(kind, pieces, tokenizer):
    batch = rows_of(pieces, kind, short_form=0.3)
    for row in batch.tokens.tolist():
        assert tokenizer.encode(tokenizer.decode(row, skip_special_tokens=False)).ids == row


def test_nothing_is_learnable_by_position(pieces):
    batch = rows_of(pieces, "single", rows=200, length=256)
    first_answers = (batch.answers == 1).int().argmax(1)
    assert first_answers.float().std() > 20
    assert (batch.question.amax(1) + 1).unique().numel() >= 3


def test_held_out_keys_values_and_variables_are_never_trained_on(pieces, held_out, tokenizer):
    def texts(table, group):
        first, count = table.groups[group]
        return {
            tokenizer.decode(t[:n].tolist()).strip()
            for t, n in zip(
                table.tokens[first : first + count], table.lengths[first : first + count], strict=True
            )
        }

    for group in ("values", "variables", "short_values"):
        assert all(is_held_out(t) for t in texts(held_out, group))
        assert not any(is_held_out(t) for t in texts(pieces, group))
    for group in ("keys", "short_keys"):
        assert texts(held_out, group) and not texts(held_out, group) & texts(pieces, group)


def test_the_model_is_the_llama_of_transformers(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = Llama(TINY)
    save_checkpoint(tmp_path, model, tokenizer, "dense", {}, longest=512)
    stock = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mine, kind, _ = load_checkpoint(tmp_path, torch.float32, "cpu")
    tokens = torch.randint(0, TINY.vocab_size, (2, 77))
    with torch.no_grad():
        expected, got = stock(tokens).logits, mine.logits(mine(tokens))
    assert kind == "dense" and expected.abs().max() > 1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == TINY.rope_theta
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "One of the special magic numbers for tidy-mustache is: 1234567.\n"
    # A prompt begins as every row of training does.
    begin = tokenizer.token_to_id("<s>")
    assert loaded(text).input_ids == [begin, *tokenizer.encode(text).ids]
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", SMALL_BLOCKS)
def test_every_attention_learns(kind, pieces, tmp_path, tokenizer):
    torch.manual_seed(0)
    model = Llama(TINY)
    settings = swap_attention(model, kind, SMALL_BLOCKS[kind])
    trainer = Trainer(model, pieces, torch.tensor(5e-3))
    easy = mix("cpu", short_form=1.0, short_key=1.0, needles_only=1.0)
    torch.manual_seed(1)
    for _ in range(4):
        trainer.step(easy, 16, 96)
    before = trainer.counts.read()["loss"]
    for _ in range(36):
        trainer.step(easy, 16, 96)
    trainer.counts.read()
    for _ in range(4):
        trainer.step(easy, 16, 96)
    assert trainer.counts.read()["loss"] < before - 2.0
    own = {"dense": "q_proj", "infllmv2": "q_proj", "nsa": "compress_kv.kv_compress.0", "dash": "indexer_q"}
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if own[kind] in n
    )
    save_checkpoint(tmp_path, model, tokenizer, kind, settings, 96)
    again, found, _ = load_checkpoint(tmp_path, torch.float32, "cpu")
    assert found == kind and {n for n, _ in again.named_parameters()} == {
        n for n, _ in model.named_parameters()
    }


def test_the_summary_query_is_pushed_downhill(pieces):
    """Its gradient is the slope of the loss; sigma is one, so that the slope stands out of the rounding."""
    torch.manual_seed(0)
    model = Llama(TINY)
    swap_attention(model, "dash", {"chunk_size": 16, "sigma": 1.0, "scaling_factor": 1.0})
    batch = rows_of(pieces, "single", rows=8, length=192, short_key=1.0)
    batch_loss(model, batch, 8)[0].backward()
    queries = [layer.self_attn.indexer_q for layer in model.model.layers]
    norm = summary_query_gradient(model)
    assert norm > 1e-5
    step = 0.03 / norm  # more, and chunks enter and leave the support, where the loss jumps
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for query in queries:
                query.copy_(sign * step * query.grad)
            losses.append(batch_loss(model, batch, 8)[0].item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm**2, rel=0.05)


def test_summary_queries_have_a_rate_of_their_own(pieces):
    """Their first step is the rate however small σ makes the gradient: Adam's ε is far below it."""
    torch.manual_seed(0)
    model = Llama(TINY)
    swap_attention(model, "dash", {"chunk_size": 16, "sigma": 1e6, "scaling_factor": 4.0})
    trainer = Trainer(model, pieces, torch.tensor(1e-3), summary_ratio=10.0)
    trainer.step(mix("cpu", needles_only=1.0), 4, 128)
    moved = [p.detach().abs() for n, p in model.named_parameters() if n.endswith("indexer_q")]
    assert moved and all(abs(float(p[p > 0].median()) - 1e-2) < 1e-4 for p in moved)


def test_alpha_grows_to_its_end_and_stays():
    assert (alpha_at(0.0), alpha_at(0.4), alpha_at(0.8), alpha_at(1.0)) == (1.25, 1.375, 1.5, 1.5)


def test_sparsity_of_a_layer_counts_the_own_block_up_to_the_query():
    everything = (torch.arange(64) // 16 + 1).expand(1, 2, 64)
    assert flop_sparsity(everything, 16) == pytest.approx(0.0)
    own_only = torch.ones(1, 2, 64, dtype=torch.int32)
    kept = 4 * sum(range(1, 17))
    assert flop_sparsity(own_only, 16) == pytest.approx(1 - kept / sum(range(1, 65)))

"""Tokenizers of random checkpoints, so that they can read any text: of bytes, or of English words.

A prompt should have about as many tokens as it has for a trained model of the same shape: RULER's 16k prompts
are 23 to 72 kB, as many tokens of bytes but 10k to 23k of the words here (Llama's own: about 16k). The words
are wonderwords', which come with lm-eval's RULER, and their inflections; the endings that this gets wrong
cost a few merges nobody uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SPECIAL = ("<unk>", "<s>", "</s>")  # their places are `random_model`'s bos and eos
WORD_TOKENS = 1 << 16
ENDINGS = ("s", "ly", "er", "ed", "ing")


def write_tokenizer(folder: Path, vocabulary: int, longest: int) -> None:
    """Writes what `AutoTokenizer.from_pretrained(folder)` reads: words where the vocabulary has room for
    them, which takes some seconds, else bytes.

    Args:
        folder: of the checkpoint.
        vocabulary: tokens of the model.
        longest: context of the model in tokens.
    """
    if vocabulary < WORD_TOKENS:
        _write_bytes(folder, longest)
        return
    from dashbench.miniature.pieces import corpus
    from dashbench.miniature.tokenizer import save_tokenizer, train_tokenizer

    sentences, words = corpus()
    words += _inflected()
    save_tokenizer(train_tokenizer(WORD_TOKENS, sentences, words, SPECIAL), folder, longest)


def _inflected() -> Iterator[str]:
    """English words and their regular forms, each with the space before it."""
    import wonderwords

    categories = wonderwords.RandomWord()._categories.values()
    for word in sorted({word for category in categories for word in category if " " not in word}):
        stem = word.removesuffix("e")
        yield from (f" {word}", f" {word.capitalize()}")
        yield from (f" {stem if ending[0] in 'ei' else word}{ending}" for ending in ENDINGS)


def _write_bytes(folder: Path, longest: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **special)
    fast.save_pretrained(folder)

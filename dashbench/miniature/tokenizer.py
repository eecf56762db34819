"""The tokenizer of the small checkpoints: byte-level BPE in which a number is chunks of three digits.

Chunks of three digits make the values of RULER's needles three tokens long, nearly all different within one
context, so that copying one is an induction step. The merges of the words come from wonderwords' lists,
which lm-eval's RULER tasks draw their keys from.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<s>", "</s>")
PATTERN = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""A number is cut into threes from the left; the space before it stays apart, that before a word does not."""

REPEATS = 200
"""Weight of the sentences in the corpus, so that their words become one token each."""


def train_tokenizer(
    vocabulary_size: int, sentences: list[str], words: list[str], special: tuple[str, ...] = SPECIAL_TOKENS
) -> Tokenizer:
    """Trains the tokenizer.

    Args:
        vocabulary_size: number of tokens, special ones included; more than 1,400.
        sentences: texts whose words shall be one token (the templates of the tasks).
        words: texts whose pieces fill the rest of the vocabulary.
        special: tokens that no text becomes; the vocabulary begins with them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = ["".join(p) for n in (2, 3) for p in product("0123456789", repeat=n)]
    corpus = sentences * REPEATS + numbers * REPEATS + words
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Writes what `AutoTokenizer.from_pretrained(folder)` reads; it begins every prompt with `<s>`, as every
    row of training does (without it NSA answers nothing).

    Args:
        tokenizer: as trained.
        folder: of the checkpoint.
        longest: context length of the model in tokens.
    """
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)

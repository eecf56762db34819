"""The texts of RULER's tasks cut into pieces, tokenised once, so that a GPU can put rows together by itself.

A row of training data is a list of piece numbers; `rows.py` draws them and looks the tokens up. Words, values
and variables that training never sees are kept for the held-out rows.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import torch
from tokenizers import Tokenizer

LONGEST_PIECE = 32
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

TEMPLATES = {
    "nothing": "",
    "begin": "<s>",
    "end": ".</s>",
    "comma": ", ",
    "space": " ",
    "name_comma": ",",
    "name_and": ", and",
    "intro_one_a": "A special magic number is hidden within the following text.",
    "intro_some_a": "Some special magic numbers are hidden within the following text.",
    "intro_one_b": " Make sure to memorize it. I will quiz you about the number afterwards.",
    "intro_some_b": " Make sure to memorize it. I will quiz you about the numbers afterwards.",
    "needle": "\nOne of the special magic numbers for",
    "needle_inside": " One of the special magic numbers for",
    "needle_is": " is: ",
    "needle_end": ".",
    "short_end": "\n",
    "ask_one": "\nWhat is the special magic number for",
    "ask_some": "\nWhat are all the special magic numbers for",
    "answer_one": " mentioned in the provided text? The special magic number for",
    "answer_some": " mentioned in the provided text? The special magic numbers for",
    "is": " mentioned in the provided text is",
    "are": " mentioned in the provided text are",
    "short_is": " is:",
    "track_intro": "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "variable": " VAR",
    "equals": " = ",
    "equals_variable": " = VAR",
    "track_ask": "\nQuestion: Find all variables that are assigned the value ",
    "track_answer": " in the text above. Answer: According to the chain(s) of variable assignment",
    "track_count": " in the text above, 5 variables are assgined the value ",
    "track_are": ", they are:",
    "track_end": "</s>",
    "repeated": "\n" + REPEATED,
    "repeated_inside": " " + REPEATED,
    "repeated_track": " " + REPEATED + "\n",
}


@cache
def words() -> tuple[list[str], list[str]]:
    """Adjectives and nouns of which RULER's keys are made."""
    import wonderwords

    categories = wonderwords.RandomWord()._categories
    return sorted(set(categories["adjective"])), sorted(set(categories["noun"]))


def is_held_out(text: str) -> bool:
    """Whether a word, a value or a variable belongs to the tenth that training never sees."""
    return crc32(text.encode()) % 10 == 0


def corpus() -> tuple[list[str], list[str]]:
    """Sentences and words on which the tokenizer is trained."""
    adjectives, nouns = words()
    sentences = [t for t in TEMPLATES.values() if t] + [f" {w}." for w in COMMON.split()] + [" VAR"] * 3
    return sentences, [" " + a for a in adjectives for _ in range(4)] + ["-" + n for n in nouns]


COMMON = (
    "the of and to a in is that it was for on are as with they be at this have from or one had by but "
    "not what all were we when your can said there use an each which she do how their if will up other "
    "about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could people my than first water been call who oil its now find long down day "
    "did get come made may part over new sound take only little work know place year live me back give "
    "most very after thing our just name good sentence man think say great where help through much "
    "before line right too mean old any same tell boy follow came want show also around form three "
    "small set put end does another well large must big even such because turn here why ask went men "
    "read need land different home us move try kind hand picture again change off play spell air away "
    "animal house point page letter mother answer found study still learn should world"
)
"""Common English words, of which noise sentences are made."""


@dataclass(frozen=True)
class Pieces:
    """All pieces as one table.

    Attributes:
        tokens: (pieces, LONGEST_PIECE) int16 token ids.
        lengths: (pieces,) int16.
        template: name -> piece number.
        groups: name -> (first piece, count): keys, short_keys, values, short_values, variables, sentences;
            counts are powers of two.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    template: dict[str, int]
    groups: dict[str, tuple[int, int]]

    def to(self, device: str) -> Pieces:
        """The table on another device."""
        return Pieces(self.tokens.to(device), self.lengths.to(device), self.template, self.groups)


def make_pieces(tokenizer: Tokenizer, count: int, seed: int, held_out: bool) -> Pieces:
    """Draws and tokenises the pieces.

    Args:
        tokenizer: of `tokenizer.train_tokenizer`.
        count: keys, values and variables each, rounded down to a power of two.
        seed: of the draw.
        held_out: draw from what training never sees, and from nothing else.
    """
    draw = random.Random(seed)
    adjectives, nouns = ([w for w in part if is_held_out(w) == held_out] for part in words())
    common = COMMON.split()

    def several(make, keep=lambda text: True) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            text = make()
            if keep(text):
                found[text] = None
        return list(found)

    def value() -> str:
        return str(draw.randint(10**6, 10**7 - 1))

    def five() -> str:
        return str(draw.randint(10**4, 10**5 - 1))

    def variable() -> str:
        return " " + "".join(draw.choices(string.ascii_uppercase, k=5))

    def sentence() -> str:
        chosen = draw.choices(common, k=draw.randint(5, 14)) + draw.choices(nouns, k=draw.randint(0, 2))
        draw.shuffle(chosen)
        return " " + " ".join(chosen).capitalize() + "."

    def own(text: str) -> bool:
        return is_held_out(text.strip()) == held_out

    groups_of_text = {
        "keys": several(lambda: f" {draw.choice(adjectives)}-{draw.choice(nouns)}"),
        "short_keys": [" " + a for a in adjectives],
        "values": several(value, own),
        "short_values": several(five, own)
        if count < 8000
        else [str(v) for v in range(10**4, 10**5) if own(str(v))],
        "variables": several(variable, own),
        "sentences": several(sentence),
    }
    encoded = [_encode(tokenizer, text) for text in TEMPLATES.values()]
    template = {name: i for i, name in enumerate(TEMPLATES)}
    groups = {}
    for name, texts in groups_of_text.items():
        ids = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        ids = [i for i in ids if len(i) <= LONGEST_PIECE]
        groups[name] = (len(encoded), len(ids))
        encoded += ids
        groups[name] = (groups[name][0], 1 << (len(ids).bit_length() - 1))
    table = torch.zeros(len(encoded), LONGEST_PIECE, dtype=torch.int16)
    for row, ids in zip(table, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int16)
    lengths = torch.tensor([len(ids) for ids in encoded], dtype=torch.int16)
    return Pieces(table, lengths, template, groups)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) > LONGEST_PIECE:
        raise ValueError(f"a piece of {len(ids)} tokens, at most {LONGEST_PIECE} fit: {text!r}")
    return ids

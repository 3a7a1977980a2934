"""Arithmetic with written-out steps: endless problems, one token a number, an exact verifier.

A document is a chain of equal expressions, each one step closer to a single number:

    47 + 38 * 2 = 47 + 30 * 2 + 8 * 2 = 47 + 60 + 16 = 107 + 16 = 107 + 10 + 6 = 117 + 6 = 123

One step does one of three things: split the factors of all products into tens and ones, work out
all products, or work from the left through the sum, where a summand is split into hundreds, tens
and ones before it is added. So the facts to learn are few (`a ± d·10^k` and the products of round
numbers) and the rest is copying.

Problems are told apart by their numbers, whatever their order and operators: `held_out` hashes the
sorted numbers, training leaves those problems out, evaluation uses nothing else. Single steps are
shared, as they must be.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from deepzoo.recipes.parts.word_tokenizer import special_tokens, starts_with

LIMIT = 999  # every number in a problem and in its steps
OPERATORS = ("+", "-", "*", "=")
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

type Terms = list[tuple[str, tuple[int, ...]]]
"""A sum: sign and factors of every summand; the first sign is always "+"."""

_NUMBER = r"(?:0|[1-9][0-9]{0,2})"
_EXPRESSION = rf"{_NUMBER}(?: [-+*] {_NUMBER})*"
_CHAIN = re.compile(rf"{_EXPRESSION}(?: = {_EXPRESSION})*", re.ASCII)
_WORD = re.compile(rf"{_NUMBER}|[-+*]", re.ASCII)


def parse(expression: str) -> Terms:
    """Reads `a + b * c - d`; spaces do not matter.

    Raises:
        ValueError: anything but whole numbers from 0 to 999 joined by + - *.
    """
    words = re.findall(r"[0-9]+|\S", expression, re.ASCII)
    spaced = " ".join(words)
    if not re.fullmatch(_EXPRESSION, spaced, re.ASCII):
        raise ValueError(f"{expression!r} is not whole numbers from 0 to {LIMIT} joined by + - *")
    terms: Terms = [("+", (int(words[0]),))]
    for operator, number in zip(words[1::2], map(int, words[2::2]), strict=True):
        if operator == "*":
            sign, factors = terms.pop()
            terms.append((sign, (*factors, number)))
        else:
            terms.append((operator, (number,)))
    return terms


def text(terms: Terms) -> str:
    """`parse` backwards."""
    parts = [f"{sign} " + " * ".join(map(str, factors)) for sign, factors in terms]
    return " ".join(parts).removeprefix("+ ")


def value(expression: str) -> int:
    """Exact value of an expression, products first."""
    total = 0
    for sign, factors in parse(expression):
        product = 1
        for factor in factors:
            product *= factor
        total += product if sign == "+" else -product
    return total


def steps(expression: str) -> list[str]:
    """What the model is to write behind `expression =`; the last entry is the answer.

    Raises:
        ValueError: a product of more than two factors, or a number on the way outside 0 to 999.
    """
    terms, out = parse(expression), []
    if any(len(factors) > 2 for _, factors in terms):
        raise ValueError(f"{expression!r}: a product of more than two factors")
    while len(terms) > 1 or len(terms[0][1]) > 1:
        terms = _step(terms)
        if any(not 0 <= n <= LIMIT for _, factors in terms for n in factors):
            raise ValueError(f"{expression!r} leaves the numbers from 0 to {LIMIT}")
        out.append(text(terms))
    return out


def _digits(number: int) -> list[int]:
    """347 -> 300, 40, 7."""
    places = [int(d) * 10**k for k, d in enumerate(reversed(str(number)))]
    return [n for n in reversed(places) if n] or [0]


def _step(terms: Terms) -> Terms:
    products = [f for _, f in terms if len(f) == 2]
    split = [f for f in products if any(len(_digits(n)) > 1 for n in f)]
    out: Terms = []
    if split:
        for sign, f in terms:
            if f in split:  # the right factor first: 12 * 34 = 12 * 30 + 12 * 4
                a, b = f
                pairs = (
                    [(a, d) for d in _digits(b)]
                    if len(_digits(b)) > 1
                    else [(d, b) for d in _digits(a)]
                )
                out += [(sign, pair) for pair in pairs]
            else:
                out.append((sign, f))
    elif products:
        out = [(sign, (f[0] * f[1],) if len(f) == 2 else f) for sign, f in terms]
    elif len(_digits(terms[1][1][0])) > 1:
        for i, (sign, (n,)) in enumerate(terms):
            out += [(sign, (d,)) for d in _digits(n)] if i == 1 else [(sign, (n,))]
    else:
        (_, (a,)), (sign, (b,)) = terms[:2]
        out = [("+", (a + b if sign == "+" else a - b,)), *terms[2:]]
    return out


def answer(completion: str) -> int | None:
    """The answer in what was written behind `expression =`, or None if no chain ends in a number.

    Strict on purpose: ASCII digits, single spaces, no sign, no leading zero, nothing before or
    after.
    """
    if not _CHAIN.fullmatch(completion):
        return None
    last = completion.rsplit(" = ", 1)[-1]
    return int(last) if last.isdigit() else None


def is_right(expression: str, completion: str) -> bool:
    """Whether the completion ends in the exact value of the expression."""
    return answer(completion) == value(expression)


def steps_right(expression: str, completion: str) -> tuple[int, int]:
    """Of a chain's links, how many have the value of the one before, and how many there are."""
    if not _CHAIN.fullmatch(completion):
        return 0, 1
    values = [value(part) for part in (expression, *completion.split(" = "))]
    return sum(a == b for a, b in itertools.pairwise(values)), len(values) - 1


def held_out(expression: str) -> bool:
    """Whether these numbers, in any order, with any operators, are for evaluation (one in 20)."""
    numbers = sorted(int(n) for n in re.findall(r"[0-9]+", expression, re.ASCII))
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 20 == 0


def problems(*seed: int, held: bool = False, numbers: int | None = None) -> Iterator[str]:
    """Endless problems such as `47 + 38 * 2`; a pure function of the seed.

    Args:
        seed: any whole numbers from 0 on.
        held: those for evaluation instead of those for training.
        numbers: in each problem; 2 to 4 where it is None.
    """
    rng = np.random.default_rng([*seed, int(held)])
    while True:
        expression = _draw(rng, numbers)
        if held_out(expression) != held:
            continue
        try:
            written = steps(expression)
        except ValueError:
            continue
        if sum(len(step.split()) + 1 for step in written) <= 96:
            yield expression


def _draw(rng: np.random.Generator, numbers: int | None) -> str:
    words: list[str] = []
    count = int(rng.choice([2, 3, 4], p=[0.3, 0.4, 0.3])) if numbers is None else numbers
    while len(words) < 2 * count - 1:
        if len(words) < 2 * count - 3 or not words:
            times = count >= 2 and rng.random() < 0.35
        else:
            times = False
        room = count - (len(words) + 1) // 2
        if words:
            words.append("+" if rng.random() < 0.5 else "-")
        if times and room >= 2:
            small = int(rng.integers(2, 10 if rng.random() < 0.8 else 100))
            pair = [small, int(rng.integers(2, 100))]
            rng.shuffle(pair)
            words += [str(pair[0]), "*", str(pair[1])]
        else:
            top = (9, 99, LIMIT)[int(rng.choice(3, p=[0.2, 0.5, 0.3]))]
            words.append(str(int(rng.integers(1, top + 1))))
    return " ".join(words)


def tokenizer_files(limit: int = LIMIT) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`: one token a number up to `limit`.

    Whitespace is dropped before and a single space stands between tokens after, so `47+38=` and
    `47 + 38 =` are one text.
    """
    words = [PAD, BOS, EOS, *OPERATORS, *map(str, range(limit + 1))]
    vocab = {word: index for index, word in enumerate(words)}
    split = {
        "type": "Split",
        "pattern": {"Regex": "[0-9]+|[^0-9]"},
        "behavior": "Isolated",
        "invert": False,
    }
    tree = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": special_tokens((PAD, BOS, EOS), vocab),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split],
        },
        "post_processor": starts_with(BOS, vocab), "decoder": None,
        # No such token: the library then refuses a word that is not in the vocabulary.
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False,
        "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(tree, indent=1).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }

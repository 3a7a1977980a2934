"""Rewards from rules alone: exact maths, form, length, language.

A model writes whatever earns it reward. So an answer is compared as a whole, never searched for in
a text; nothing it wrote is evaluated; and every function takes linear time, whatever it is given.

Papers: accuracy and format, R1-Zero (arXiv 2501.12948, 2.2.2); language consistency, R1 (2.3.2);
the soft punishment of length, DAPO (arXiv 2503.14476, eq. 13).
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

LONGEST = 1000  # characters of an answer that is looked at
DIGITS = 300  # of a number, its exponent included
DEPTH = 8  # of parentheses and fractions in each other

THINK, THINK_END, ANSWER, ANSWER_END = "<think>", "</think>", "<answer>", "</answer>"
_FENCE = "```"
_BOX = "\\boxed{"


class Judged(NamedTuple):
    """reward: from 0 to 1. reason: why it is less than 1, in a few words; empty where it is 1."""

    reward: float
    reason: str


class Unreadable(ValueError):
    """A text that is no number, or one beyond the limits; the message is a reason."""


def maths(text: str, truth: str) -> Judged:
    """Whether the final answer of `text` is `truth`: equal as exact numbers, or as formulas.

    Numbers are whole, decimal, with an exponent, fractions of those (`3/4`, `\\frac{3}{4}`), with
    thousands separated, in percent. Anything else, such as `2\\sqrt{3}` or `(1, 2)`, is equal if
    its characters are, spaces and the size of brackets aside.

    Args:
        text: what the model wrote; see `final_answer`.
        truth: the right answer, in the same notations.
    """
    found, reason = final_answer(text)
    if found is None:
        return Judged(0.0, reason)
    if len(found) > LONGEST:
        return Judged(0.0, f"an answer of more than {LONGEST} characters")
    expected: Fraction | None = None
    try:
        expected = number(truth)
        value = number(found)
    except Unreadable as error:
        if expected is None and plain(found) == plain(truth) != "":
            return Judged(1.0, "")
        told = str(error) if expected is not None else "another formula"
        return Judged(0.0, told)
    return Judged(1.0, "") if value == expected else Judged(0.0, "another number")


def final_answer(text: str) -> tuple[str | None, str]:
    """(answer, "") or (None, reason): what `text` offers as its answer.

    Behind the thought, if there is one: the inside of the only <answer> pair, and in that (or in
    everything, without the tags) the inside of the last \\boxed{}; without either, all of it.
    """
    end = text.rfind(THINK_END)
    if end < 0 and THINK in text:
        return None, "the thought does not end"
    behind = text[end + len(THINK_END) :] if end >= 0 else text
    if ANSWER in behind or ANSWER_END in behind:
        if behind.count(ANSWER) != 1 or behind.count(ANSWER_END) != 1:
            return None, "not one pair of answer tags"
        begin, stop = behind.find(ANSWER) + len(ANSWER), behind.find(ANSWER_END)
        if stop < begin:
            return None, "answer tags in the wrong order"
        behind = behind[begin:stop]
    at = behind.rfind(_BOX)
    if at >= 0:
        inside = _braced(behind, at + len(_BOX) - 1)
        if inside is None:
            return None, "a box that is not closed, or very long"
        behind = inside
    answer = behind.strip()
    return (answer, "") if answer else (None, "no answer")


def vote(text: str) -> str | None:
    """The final answer, spelled so that equal ones are the same text; None without one."""
    found, _ = final_answer(text)
    if found is None or len(found) > LONGEST:
        return None
    try:
        return str(number(found))
    except Unreadable:
        return plain(found) or None


def _braced(text: str, at: int) -> str | None:
    """Inside of the braces that open at `at`, unless it is far too long."""
    depth = 0
    for match in _BRACE.finditer(text, at, at + 4 * LONGEST):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[at + 1 : match.start()]
    return None


_BRACE = re.compile(r"[{}]")
_SAME = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00b7": "*"})
_NOISE = re.compile(r"\s+|\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\$|\\[()\[\]]")


def plain(text: str) -> str:
    """A formula without what does not change its meaning: spaces, sizes, dollar signs."""
    text = _NOISE.sub("", text[:LONGEST].translate(_SAME))
    for long, short in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cdot", "*")):
        text = text.replace(long, short)
    return text.replace("\\times", "*").rstrip(".")


_APART = re.compile(r"[0-9.]\s+[0-9.]", re.ASCII)
_DECIMAL = re.compile(
    r"([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)?(\.[0-9]*)?"
    r"(?:(?:[eE]|\*10\^)(?:\{([-+]?[0-9]+)\}|([-+]?[0-9]+)))?",
    re.ASCII,
)


def number(text: str) -> Fraction:
    """The exact value of a number in one of the notations of `maths`.

    Raises:
        Unreadable: it is none, or has more than DIGITS digits or DEPTH levels.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"more than {LONGEST} characters")
    if _APART.search(text):
        raise Unreadable("no number")
    text = plain(text)
    if not text:
        raise Unreadable("no answer")
    value, at = _quotient(text, 0, 0)
    if text[at : at + 2] == "\\%" or text[at : at + 1] == "%":
        value, at = value / 100, at + (2 if text[at] == "\\" else 1)
    if at != len(text):
        raise Unreadable("no number")
    return value


def _quotient(text: str, at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _signed(text, at, depth)
    if text[at : at + 1] == "/":
        below, at = _signed(text, at + 1, depth)
        value = _divided(value, below)
    return value, at


def _signed(text: str, at: int, depth: int) -> tuple[Fraction, int]:
    if depth > DEPTH:
        raise Unreadable(f"more than {DEPTH} levels of brackets")
    sign = text[at : at + 1]
    if sign in ("+", "-"):
        at += 1
    value, at = _single(text, at, depth)
    return (-value if sign == "-" else value), at


def _single(text: str, at: int, depth: int) -> tuple[Fraction, int]:
    """A bracket, a \\frac or a decimal number."""
    if text.startswith("\\frac", at):
        above, at = _argument(text, at + 5, depth)
        below, at = _argument(text, at, depth)
        return _divided(above, below), at
    for left, right in (("(", ")"), ("{", "}")):
        if text.startswith(left, at):
            value, at = _quotient(text, at + 1, depth + 1)
            if not text.startswith(right, at):
                raise Unreadable("brackets that do not match")
            return value, at + 1
    match = _DECIMAL.match(text, at)
    assert match is not None
    whole, part = match[1] or "", (match[2] or "")[1:]
    if not whole and not part:
        raise Unreadable("no number")
    digits, power = re.sub(r"[,{}]", "", whole) + part, match[3] or match[4] or "0"
    if len(digits) > DIGITS or len(power) > 5 or abs(int(power)) > DIGITS:
        raise Unreadable(f"a number of more than {DIGITS} digits")
    return Fraction(int(digits)) * Fraction(10) ** (int(power) - len(part)), match.end()


def _argument(text: str, at: int, depth: int) -> tuple[Fraction, int]:
    """What \\frac takes: a group in braces, or one digit."""
    if text[at : at + 1] in tuple("0123456789"):
        return Fraction(int(text[at])), at + 1
    if not text.startswith("{", at):
        raise Unreadable("no number")
    return _single(text, at, depth)


def _divided(above: Fraction, below: Fraction) -> Fraction:
    if not below:
        raise Unreadable("a division by zero")
    return above / below


def form(text: str, *, opened: bool = False) -> Judged:
    """R1-Zero's form: `<think>` thought `</think>` `<answer>` answer `</answer>` and nothing else.

    Each tag stands there once, and neither thought nor answer is empty.

    Args:
        text: what the model wrote.
        opened: whether the prompt has opened the thought.
    """
    parts, reason = _between(f"{THINK}{text}" if opened else text, ANSWER, ANSWER_END)
    if reason:
        return Judged(0.0, reason)
    before, thought, between, answer, behind = parts
    if before or between or behind:
        return Judged(0.0, "text outside the tags")
    if not thought or not answer:
        return Judged(0.0, "nothing inside the tags")
    return Judged(1.0, "")


def chat_form(text: str) -> Judged:
    """The form of R1's answers in a chat: `<think>` thought `</think>` and an answer behind it.

    Each tag stands there once, nothing before the first, and neither thought nor answer is empty.

    Args:
        text: what the model wrote, with the opening tag even if the prompt ended with it.
    """
    parts, reason = _between(text)
    if reason:
        return Judged(0.0, reason)
    before, thought, answer = parts
    if before:
        return Judged(0.0, "text before the thought")
    if not thought or not answer:
        return Judged(0.0, "no thought" if not thought else "no answer")
    return Judged(1.0, "")


def _between(text: str, *more: str) -> tuple[list[str], str]:
    """What stands before, between and behind the thought's tags and `more`, or a reason."""
    tags = (THINK, THINK_END, *more)
    for tag in tags:
        if text.count(tag) != 1:
            return [], f"{tag} is not there once"
    places = [text.find(tag) for tag in tags]
    if places != sorted(places):
        return [], "tags in the wrong order"
    begins = [0, *(at + len(tag) for at, tag in zip(places, tags, strict=True))]
    return [text[a:b].strip() for a, b in zip(begins, [*places, None], strict=True)], ""


type Language = Literal["en", "zh", "ja", "ko", "ru", "el", "ar", "he", "hi", "th"]
_SCRIPTS: dict[str, str] = {
    "en": "a-zA-Z\u00c0-\u024f",
    "zh": "\u4e00-\u9fff\u3400-\u4dbf",
    "ja": "\u3040-\u30ff\u4e00-\u9fff",
    "ko": "\uac00-\ud7af",
    "ru": "\u0400-\u04ff",
    "el": "\u0370-\u03ff",
    "ar": "\u0600-\u06ff",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "th": "\u0e00-\u0e7f",
}
LANGUAGES = tuple(_SCRIPTS)
_UNSPACED = "\u3040-\u30ff\u4e00-\u9fff\u3400-\u4dbf\u0e00-\u0e7f"  # a character is a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]{{2,}}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def language(text: str, target: str = "en") -> float:
    """R1's language consistency: the share of words that are in the script of `target`.

    Letters alone (names of variables) and LaTeX commands are no words; without words it is 0.
    """
    words = _WORD.findall(_COMMAND.sub(" ", text))
    own = re.compile(rf"[{_SCRIPTS[target]}]+")
    return sum(own.fullmatch(w) is not None for w in words) / len(words) if words else 0.0


def program(text: str) -> str | None:
    """The program in an answer: its last block between lines of three backticks; None without one.

    As for `final_answer`, only what stands behind the thought counts.
    """
    end = text.rfind(THINK_END)
    if end < 0 and THINK in text:
        return None
    behind = text[end + len(THINK_END) :] if end >= 0 else text
    stop = behind.rfind(_FENCE)
    begin = behind.rfind(_FENCE, 0, max(stop, 0))
    if begin < 0:
        return None
    _, _, block = behind[begin:stop].partition("\n")  # the first line names the language
    return block if block.strip() else None


def overlong(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment (eq. 13): from 0 at `limit - buffer` tokens down to -1 at `limit`."""
    return -max(0, length - (limit - buffer)) / buffer if buffer else 0.0


def repeated(text: str) -> float:
    """Share of the lines that have stood there before; short ones do not count."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 10]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def components(
    verdicts: Sequence[Mapping[str, float]], weights: Mapping[str, float], group: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the reward of each answer is made of: float64 [C, P, G], and the weights [C].

    Components of weight 0, and those that the verdicts lack, are left out. An answer of which one
    component is NaN is NaN in all.

    Args:
        verdicts: of P*G answers, those of a group side by side.
        weights: component -> weight.
        group: G.
    """
    used = [name for name, weight in weights.items() if weight and name in verdicts[0]]
    parts = np.array([[v[name] for v in verdicts] for name in used], np.float64)
    parts += 0 * parts.sum(axis=0)
    return parts.reshape(len(used), -1, group), np.array([weights[name] for name in used])

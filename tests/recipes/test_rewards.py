"""Verdicts on answers, honest, odd and hostile; the hostile ones within 10 ms."""

import time
from fractions import Fraction

import pytest

from deepzoo.recipes.parts.rewards import (
    Unreadable,
    chat_form,
    final_answer,
    form,
    language,
    maths,
    number,
    overlong,
    program,
    repeated,
    vote,
)

RIGHT = [
    ("\\boxed{42}", "42"),
    ("so it is \\boxed{42}.", "42"),
    ("<think>1 or 2?</think><answer>42</answer>", "42"),
    ("<think>\\boxed{7}</think><answer>\\boxed{42}</answer>", "42"),
    ("first \\boxed{1}, no: \\boxed{42}", "42"),
    ("42", "42.0"),
    ("\\boxed{1,234,567}", "1234567"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{12\\,345}", "12345"),
    ("\\boxed{\\frac{3}{4}}", "0.75"),
    ("\\boxed{\\dfrac34}", "3/4"),
    ("\\boxed{-\\frac{6}{8}}", "-.75"),
    ("\\boxed{\\frac{-6}{8}}", "-3/4"),
    ("$\\boxed{\u22125}$", "-5"),
    ("\\boxed{(3)}", "3"),
    ("\\boxed{\\left(\\frac{\\frac{1}{2}}{2}\\right)}", "1/4"),
    ("\\boxed{1.5e3}", "1500"),
    ("\\boxed{1.5 \\times 10^{-2}}", "0.015"),
    ("\\boxed{50\\%}", "1/2"),
    ("\\boxed{2\\sqrt{3}}", "2 \\sqrt{3}"),
    ("\\boxed{\\left(1, 2\\right)}", "(1,2)"),
    ("0.1", "1/10"),
]
WRONG = [
    ("", "42", "no answer"),
    ("<answer></answer>", "42", "no answer"),
    ("<answer> </answer>", "", "no answer"),
    ("\\boxed{}", "42", "no answer"),
    ("\\boxed{4}", "42", "another number"),
    ("\\boxed{421}", "42", "another number"),
    ("\\boxed{42", "42", "a box that is not closed, or very long"),
    ("<think>\\boxed{42}", "42", "the thought does not end"),
    ("<answer>41</answer><answer>42</answer>", "42", "not one pair of answer tags"),
    ("</answer>42<answer>", "42", "answer tags in the wrong order"),
    ("the answer is 42", "42", "no number"),
    ("\\boxed{41 or 42}", "42", "no number"),
    ("\\boxed{42, 43}", "42", "no number"),
    ("\\boxed{42 43}", "42", "no number"),
    ("\\boxed{4 2}", "42", "no number"),
    ("\\boxed{\u0664\u0662}", "42", "no number"),  # Arabic digits
    ("\\boxed{\uff14\uff12}", "42", "no number"),  # full-width digits
    ("\\boxed{1/0}", "42", "a division by zero"),
    ("\\boxed{\\frac{1}{0}}", "42", "a division by zero"),
    ("\\boxed{6*7}", "42", "no number"),
    ("\\boxed{\\sqrt{2}}", "\\sqrt{3}", "another formula"),
    ("\\boxed{nan}", "42", "no number"),
    ("\\boxed{0x2A}", "42", "no number"),
    ("\\boxed{4_2}", "42", "no number"),
    ("\\boxed{0.33333}", "1/3", "another number"),
]
HOSTILE = {
    "a tower of powers": "\\boxed{9**9**9}",
    "a tower in LaTeX": "\\boxed{9^{9^{9}}}",
    "a power of ten": "\\boxed{10^{999999999}}",
    "an exponent": "\\boxed{1e999999}",
    "an exponent of many digits": "\\boxed{1e" + "9" * 900 + "}",
    "a million digits": "\\boxed{" + "7" * 10**6 + "}",
    "digits within the limit of characters": "\\boxed{" + "7" * 990 + "}",
    "brackets": "\\boxed{" + "(" * 10**5 + "1" + ")" * 10**5 + "}",
    "brackets within the limit": "\\boxed{" + "(" * 490 + "1" + ")" * 490 + "}",
    "fractions": "\\boxed{" + "\\frac{" * 90 + "1" + "}{1}" * 90 + "}",
    "nested boxes": "\\boxed{" * 10**5 + "41" + "}" * 10**5,
    "open boxes": "\\boxed{" * 10**5,
    "macros": "\\boxed{\\def\\a{\\a\\a}\\a}",
    "thoughts": "<think>" * (10**6 // 7),
    "answers": "<answer>" * (10**6 // 8),
    "spaces": "\\boxed{" + " " * 10**6 + "41}",
    "commas": "\\boxed{" + "1,234" * 199 + "}",
    "signs": "\\boxed{" + "-" * 900 + "42}",
    "NUL": "\\boxed{42\0}",
}


@pytest.mark.parametrize(("text", "truth"), RIGHT)
def test_right_answers(text, truth):
    assert maths(text, truth) == (1.0, "")


@pytest.mark.parametrize(("text", "truth", "reason"), WRONG)
def test_wrong_answers_have_a_reason(text, truth, reason):
    assert maths(text, truth) == (0.0, reason)


def least_seconds(call, tries=5):
    """CPU time of the shortest of some runs: the others measure the machine."""
    best = float("inf")
    for _ in range(tries):
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return best


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_worth_nothing_within_ten_milliseconds(name):
    text = HOSTILE[name]
    judged = maths(text, "42")
    assert judged.reward == 0.0
    assert judged.reason
    assert len(judged.reason) < 80
    assert least_seconds(lambda: maths(text, "42")) < 0.01


def test_an_answer_is_the_last_box_of_what_stands_behind_the_thought():
    assert final_answer("<think>a</think> b \\boxed{x{y}z} c") == ("x{y}z", "")
    assert final_answer("<think>a</think> b ") == ("b", "")


def test_equal_answers_have_one_vote():
    assert vote("\\boxed{0.5}") == vote("<answer>\\frac{1}{2}</answer>") == "1/2"
    assert vote("\\boxed{2 \\sqrt{3}}") == vote("\\boxed{2\\sqrt{3}}") == "2\\sqrt{3}"
    assert vote("\\boxed{}") is None
    assert vote("<think>") is None
    assert vote("7" * 2000) is None


def test_numbers_are_exact():
    assert number("0.1") + number("0.2") == number("0.3")
    assert number("\\frac{1}{3}") == Fraction(1, 3)
    assert number("1e300") == 10**300
    with pytest.raises(Unreadable, match="more than 300 digits"):
        number("1e301")
    with pytest.raises(Unreadable, match="more than 8 levels"):
        number("(" * 9 + "1" + ")" * 9)
    assert number("(" * 8 + "1" + ")" * 8) == 1


WELL = "<think>one and one</think>\n<answer>2</answer>"


def test_the_form_is_each_tag_once_in_order_and_nothing_outside():
    assert form(WELL) == (1.0, "")
    assert form(f"\n{WELL}\n") == (1.0, "")
    assert form(WELL.removeprefix("<think>"), opened=True) == (1.0, "")
    assert form(WELL, opened=True) == (0.0, "<think> is not there once")
    assert form(WELL.removeprefix("<think>")) == (0.0, "<think> is not there once")
    assert form(WELL + "2") == (0.0, "text outside the tags")
    assert form("so " + WELL) == (0.0, "text outside the tags")
    assert form("<think>a</think>or<answer>2</answer>") == (0.0, "text outside the tags")
    assert form("<think>a</think><answer></answer>") == (0.0, "nothing inside the tags")
    assert form("<answer>2</answer><think>a</think>") == (0.0, "tags in the wrong order")
    assert form(WELL + WELL) == (0.0, "<think> is not there once")
    assert form("") == (0.0, "<think> is not there once")


def test_the_form_of_a_chat_is_one_thought_and_an_answer_behind_it():
    assert chat_form("<think>\none and one\n</think>\n\nIt is **2**.") == (1.0, "")
    assert chat_form(WELL) == (1.0, "")
    for text, reason in {
        "It is 2.": "<think> is not there once",
        "<think>one and one": "</think> is not there once",
        "one</think>2": "<think> is not there once",
        "<think>a</think>2<think>b</think>2": "<think> is not there once",
        "<think>a</think>2</think>": "</think> is not there once",
        "</think>2<think>": "tags in the wrong order",
        "2<think>a</think>2": "text before the thought",
        "<think>one and one</think>\n": "no answer",
        "<think> \n</think>2": "no thought",
    }.items():
        assert chat_form(text) == (0.0, reason)


@pytest.mark.parametrize("piece", ["<think>", "<think><think>x", "</think><answer>", "<", " "])
def test_the_form_takes_linear_time(piece):
    text = piece * (10**6 // len(piece))
    assert form(text).reward == 0.0
    assert least_seconds(lambda: form(text)) < 0.02


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("We add two and three", "en", 1.0),
        ("We add \u4e24\u4e2a numbers", "en", 3 / 5),
        ("\u6211\u4eec\u52a0 two", "zh", 3 / 4),
        ("\u6211\u4eec\u52a0 \\frac{x}{y}", "zh", 1.0),
        ("\u0441\u043b\u043e\u0436\u0438\u043c two", "ru", 1 / 2),
        ("na\u00efve caf\u00e9", "en", 1.0),
        ("1 + 2 = 3", "en", 0.0),
        ("", "en", 0.0),
    ],
)
def test_language_is_the_share_of_words(text, target, share):
    assert language(text, target) == pytest.approx(share)


def test_language_takes_linear_time():
    text = "a\u4e2d\\" * 3 * 10**5
    assert least_seconds(lambda: language(text), 3) < 1.0


def test_a_program_is_the_last_block_behind_the_thought():
    block = "```python\nprint(1)\n```"
    assert program(f"so:\n{block}\ndone") == "print(1)\n"
    assert program(f"```\nprint(0)\n```\nbetter:\n{block}") == "print(1)\n"
    assert program(f"<think>{block}</think>") is None
    assert program(f"<think>{block}") is None
    assert program("print(1)") is None
    assert program("```python\nprint(1)") is None
    assert program("``````") is None
    assert least_seconds(lambda: program("```" * 300000)) < 0.05


def test_overlong_answers_lose_up_to_one():
    assert [overlong(n, 100, 20) for n in (0, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert overlong(100, 100, 0) == 0.0


def test_repeated_lines():
    assert repeated("a long enough line\n" * 4) == 0.75
    assert repeated("one long enough line\ntwo long enough line") == 0.0
    assert repeated("") == 0.0

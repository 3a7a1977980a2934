"""Arithmetic: exact answers, a strict verifier, a held-out share that training never touches."""

import itertools
import random
import re

import numpy as np
import pytest

from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.accuracy import held_out, wilson
from deepzoo.recipes.parts.problems import task
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.tokenizer import Tokenizer

TRAINING = list(itertools.islice(tasks.problems(0), 3000))
HELD_OUT = list(itertools.islice(tasks.problems(0, held=True), 500))


def document(problem: str) -> str:
    return " = ".join([problem, *tasks.steps(problem)])


def numbers(problem: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", problem))))


def reference(expression: str) -> int:
    """Value by another way than the module's: products first, by rewriting the words."""
    words = expression.split()
    while "*" in words:
        i = words.index("*")
        words[i - 1 : i + 2] = [str(int(words[i - 1]) * int(words[i + 1]))]
    total = int(words[0])
    for sign, word in itertools.batched(words[1:], 2):
        total += int(word) if sign == "+" else -int(word)
    return total


def test_training_and_held_out_problems_share_no_numbers():
    assert {numbers(p) for p in TRAINING}.isdisjoint({numbers(p) for p in HELD_OUT})
    assert all(tasks.held_out(p) for p in HELD_OUT)
    share = np.mean([tasks.held_out(f"{a} + {b}") for a in range(100) for b in range(a, 100)])
    assert 0.03 < share < 0.07  # one in 20


def test_an_evaluation_asks_each_problem_once():
    assert len(set(HELD_OUT)) < 500  # the stream repeats itself
    asked = held_out(task("arithmetic"), 500)
    assert len(asked) == len(set(asked)) == 500
    assert all(tasks.held_out(p.answer) for p in asked)
    assert asked[:100] == held_out(task("arithmetic"), 100)


def test_the_held_out_share_does_not_depend_on_order_or_operators():
    rng = random.Random(0)
    for problem in HELD_OUT[:100]:
        own = [str(n) for n in numbers(problem)]
        rng.shuffle(own)
        assert tasks.held_out(" * ".join(own))


def test_steps_are_equal_expressions_that_end_in_the_exact_value():
    for problem in TRAINING + HELD_OUT:
        steps = tasks.steps(problem)
        assert [reference(s) for s in steps] == [reference(problem)] * len(steps), problem
        assert steps[-1] == str(reference(problem))
        assert all(0 <= n <= tasks.LIMIT for s in steps for n in numbers(s)), problem


def test_problems_have_two_to_four_numbers_and_all_operators():
    counts = np.bincount([len(numbers(p)) for p in TRAINING], minlength=5)
    assert counts[2:].min() > 300
    assert counts[:2].sum() == 0
    for operator in "+-*":
        assert sum(operator in p for p in TRAINING) > 500


def test_problems_are_a_pure_function_of_the_seed():
    assert list(itertools.islice(tasks.problems(3, 7), 50)) == list(
        itertools.islice(tasks.problems(3, 7), 50)
    )
    assert next(tasks.problems(3, 7)) != next(tasks.problems(3, 8))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", 14), ("2 * 3 + 4", 10), ("20 - 3 * 4 - 5", 3), ("9-3-2", 4), ("47+38=", None)],
)
def test_value(expression: str, value: int | None):
    if value is None:
        with pytest.raises(ValueError, match="not whole numbers"):
            tasks.value(expression)
    else:
        assert tasks.value(expression) == value


RIGHT = "47 + 30 + 8 = 77 + 8 = 85"


def test_the_verifier_accepts_right_chains():
    assert tasks.is_right("47 + 38", RIGHT)
    assert tasks.is_right("47 + 38", "85")  # the answer without steps
    assert all(tasks.is_right(p, " = ".join(tasks.steps(p))) for p in HELD_OUT)


@pytest.mark.parametrize(
    "completion",
    [
        "", " ", "=", "8", "5", "850", "085", "+85", "-85", "85.0", "8 5", "85 ", " 85", "85\n",
        "\n85", "85\n86", "85 =", "= 85", "85 86", "86 = 85 = 86", "85 + 0", "84 or 85", "85!",
        "8\u0665", "\uff18\uff15", "the answer is 85",
        "⁸⁵", "85\u200b", "85\x00", "0x55", "8_5",
        "85 == 85", "85=85", "1e2", "47 + 38", "00085", "85 <eos>",
    ],
)  # fmt: skip
def test_the_verifier_refuses(completion: str):
    assert not tasks.is_right("47 + 38", completion)


def test_every_prefix_of_a_right_chain_is_wrong():
    for end in range(len(RIGHT)):
        assert not tasks.is_right("47 + 38", RIGHT[:end]), RIGHT[:end]
    # ... unless it ends after a link that already is the answer
    assert tasks.is_right("47 + 38", "85 = 85")


def test_random_damage_never_turns_a_wrong_answer_into_a_right_one():
    rng = random.Random(1)
    for problem in HELD_OUT[:200]:
        value = tasks.value(problem)
        completion = list(" = ".join(tasks.steps(problem)))
        for _ in range(5):
            completion[rng.randrange(len(completion))] = rng.choice("0123456789+-*= \n\u0660")
            text = "".join(completion)
            if tasks.is_right(problem, text):
                assert text == str(value) or text.endswith(f"= {value}")


def test_wrong_links_are_counted():
    assert tasks.steps_right("47 + 38", RIGHT) == (3, 3)
    assert tasks.steps_right("47 + 38", "47 + 30 + 8 = 76 + 8 = 84") == (2, 3)
    assert tasks.steps_right("47 + 38", "nonsense") == (0, 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tasks.tokenizer_files())


def test_one_token_a_number_and_text_comes_back(tokenizer: Tokenizer):
    assert len(tokenizer.encode("0 + 999 * 47 =")) == 6
    for problem in HELD_OUT[:50]:
        text = document(problem)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text.replace(" ", "")) == ids
    assert [tokenizer.bos_id, *tokenizer.eos_ids] == [1, 2]


@pytest.mark.parametrize(
    "text", ["what is 2 + 2", "2 / 3", "1000 + 1", "\uff12 + 3", "<eos>", "2 + <unk>"]
)
def test_text_outside_the_vocabulary_is_refused_not_dropped(tokenizer: Tokenizer, text: str):
    with pytest.raises(RequestError):
        tokenizer.encode(text)


def test_spaces_separate_numbers(tokenizer: Tokenizer):
    assert tokenizer.encode("1 2 + 3") != tokenizer.encode("12 + 3")


def test_wilson():
    # worked out by hand from the quadratic; 0 of 10 has the closed form z^2 / (10 + z^2)
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)

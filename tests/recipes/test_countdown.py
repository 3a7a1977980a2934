"""Countdown: a verifier that cannot be talked into anything, a held-out share that training never
touches, searches that are right line by line, a tokenizer that loses nothing."""

import ast
import dataclasses
import itertools
import re
from collections import Counter

import jinja2
import pytest

from deepzoo.recipes import pretrain
from deepzoo.recipes.parts import countdown, countdown_corpus, countdown_traces
from deepzoo.recipes.parts.accuracy import held_out
from deepzoo.recipes.parts.countdown_tokenizer import (
    LENGTH,
    TEMPLATE,
    UNKNOWN,
    VOCABULARY,
    tokenizer_files,
)
from deepzoo.recipes.parts.documents import completion_ids
from deepzoo.recipes.parts.problems import batch, task
from deepzoo.zoo.chat import render
from deepzoo.zoo.prompt import encode, sampling_defaults
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

TASKS = ("countdown", "countdown-4", "countdown-3-4", "countdown-unsolvable", "countdown-general")
TOKENIZER = Tokenizer(tokenizer_files())
ASKED = "Make 24 from 4, 6, 9."


def drawn(numbers, count=400, **options):
    return list(itertools.islice(countdown.problems(0, numbers=numbers, **options), count))


def value(formula: str) -> int:
    """By another way than the module's: the syntax tree of Python."""

    def of(node):
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return node.value
        left, right = of(node.left), of(node.right)
        made = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
        assert 0 <= made <= 99
        return made

    return of(ast.parse(formula, mode="eval").body)


def reachable(numbers) -> set[int]:
    """All that can be made, by replacing two of the numbers with a result, again and again."""
    found, open_states = set(), {tuple(sorted(numbers))}
    while open_states:
        state = open_states.pop()
        found |= set(state)
        for i, j in itertools.permutations(range(len(state)), 2):
            rest = [n for k, n in enumerate(state) if k not in (i, j)]
            for made in (state[i] + state[j], state[i] - state[j], state[i] * state[j]):
                if 0 <= made <= 99:
                    open_states.add(tuple(sorted([*rest, made])))
    return found


def said(answer: str) -> str:
    return f"<think>\nso\n</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "answer",
    ["4 * 6", "6*4", "(4*6)", " 6 * 4 ", "((6) * (4))", "4 * (6)"],
)
def test_what_is_right_is_right(answer):
    assert countdown.is_right(ASKED, said(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "", " ", "24", "none", "None", "4 * 6 = 24", "= 4 * 6", "4 * ", "4 * 6 +", "* 4 6", "4 6",
        "46", "12 + 12", "4 * 4 + 4 + 4", "4 * 6 * 9 - 192", "4 * 6 + 9 - 9", "6 * 4 + 0",
        "6 + 9 + 9", "3 * 8", "04 * 6", "4 * 6.0", "4.0 * 6", "4e0 * 6", "4 * 6 / 1", "4 ** 2 + 8",
        "9**9**9", "4 \u00d7 6", "\uff14 * 6", "\u0664 * 6", "4\u00b2 + 8", "4\u00a0* 6",
        "4 *\n6", "4 \t* 6", "+4 * 6", "-4 * -6", "(4 * 6", "4 * 6)", "()", "(4)(6)",
        "4 - 9 + 29", "9 * 6 * 4", "__import__('os')", "4 * 6 # yes", "a", "4 * 6 none",
        "4 * 6, 4 * 6", "(" * 8 + "4 * 6" + ")" * 9, "(" * 9 + "4 * 6" + ")" * 9,
        "(" * 5000 + "4 * 6" + ")" * 5000,
        "4 *" + " " * 100 + "6", "1" * 100_000, "9*" * 100_000 + "9",
    ],
)  # fmt: skip
def test_what_is_wrong_is_wrong(answer):
    assert not countdown.is_right(ASKED, said(answer))


@pytest.mark.parametrize(
    "text",
    [
        "", "4 * 6", "<answer>4 * 6</answer>", "<think>", "<think>4 * 6", "<think>4 * 6</think>",
        "<think>so</think>4 * 6", "<think>so</think><answer>4 * 6",
        "<think>so</think>4 * 6</answer>",
        "<think><answer>4 * 6</answer></think>", "<think>so<answer>4 * 6</answer>",
        "<think>so</think><answer>4 * 6</answer><answer>4 * 6</answer>",
        "<think>so</think><answer>4 + 6</answer> <answer>4 * 6</answer>",
        "<think>so</think><answer><answer>4 * 6</answer></answer>",
        "<think>so</think><answer>4 * 6</answer> or so",
        "<think>so</think>so <answer>4 * 6</answer>", "<think></think><answer>4 * 6</answer>",
        "<think>so</think></think><answer>4 * 6</answer>",
        "<think>a<think>so</think><answer>4 * 6</answer>",
        "<think>so</think></answer>4 * 6<answer>", "</think><think>so<answer>4 * 6</answer>",
        "<answer>4 * 6</answer><think>so</think>", "<think>so</think><ANSWER>4 * 6</ANSWER>",
        "<think>so</think><answer>" * 10_000, "<think>so</think><answer>4 * 6</answer>" * 2,
    ],
)  # fmt: skip
def test_the_form_is_part_of_an_answer(text):
    problem = task("countdown").problems(0)
    judged = task("countdown").judge(
        next(problem)._replace(prompt=ASKED, answer="4 * 6"), text, True
    )
    assert judged == {"accuracy": 0.0, "format": 0.0, "language": 0.0, "sound": 1.0}


def test_an_answer_that_was_cut_off_is_wrong():
    problem = next(task("countdown").problems(0))._replace(prompt=ASKED, answer="4 * 6")
    judge = task("countdown").judge
    for answer, finished, accuracy, form in (
        ("4 * 6", True, 1.0, 1.0), ("4 * 6", False, 0.0, 0.0), ("4 + 6", True, 0.0, 1.0),
    ):  # fmt: skip
        verdict = judge(problem, said(answer), finished)
        assert verdict == {"accuracy": accuracy, "format": form, "language": 0.0, "sound": 1.0}


def test_readable_lines_are_counted_once():
    text = countdown_traces.solution("Make 18 from 4, 6, 9.")
    assert countdown_traces.readable(text) == 1.0
    line = "4, 6: 10 2 24"
    for thought, share in (
        (f"{line}\n{line}", 1 / 2), (f"{line} 5\n", 0.0), (f"{line} {line}", 0.0), ("", 0.0),
        (f"{line}\nGive up.\n", 1.0), (f"{line}\n24 = 4 * 6\n24 = 4 *", 2 / 3),
    ):  # fmt: skip
        assert countdown_traces.readable(f"<think>\n{thought}</think>\n{line}") == share


@pytest.mark.parametrize("numbers", [3, 4])
def test_giving_up_is_right_where_there_is_no_answer_and_only_there(numbers):
    found = drawn(numbers, 150) + drawn(numbers, 50, unsolvable=1.0)
    solvable = [target in reachable(given) for target, given in found]
    assert 20 < sum(solvable) < len(found) - 20
    for (target, given), can in zip(found, solvable, strict=True):
        asked = countdown.prompt(target, given)
        assert countdown.is_right(asked, said("none")) is not can
        assert (countdown.answer(target, given) == "none") is not can
    assert all(t in reachable(given) for t, given in drawn(numbers, 100, held=True))


def test_votes_are_values():
    assert countdown.vote(said("4 * 6")) == countdown.vote(said("6*(4)")) == "24"
    assert countdown.vote(said("none")) == "none"
    assert countdown.vote(said("4 * x")) is countdown.vote("4 * 6") is None


def test_training_shows_no_numbers_that_are_held_out():
    held = {n: {tuple(sorted(given)) for _, given in drawn(n, 2000, held=True)} for n in (3, 4)}
    assert 100 < len(held[3]) < 200  # of 1540
    for numbers in (3, 4):
        for _, given in drawn(numbers, 3000):
            assert tuple(sorted(given)) not in held[numbers]
            for three in itertools.combinations(sorted(given), 3):
                assert three not in held[3]
    for text in itertools.islice(countdown_corpus.corpus(0), 5000):
        asked = [int(n) for n in re.findall("[0-9]+", text.prompt or text.completion.split("=")[0])]
        given = tuple(sorted(asked[1:] if text.prompt.startswith("Make") else asked))
        assert given not in held[3] | held[4], text


@pytest.mark.parametrize("numbers", [3, 4])
def test_every_search_is_right_complete_and_without_repeats(numbers):
    gave_up, longest = 0, 0
    for target, given in drawn(numbers) + drawn(numbers, 100, held=True):
        text = countdown_traces.solution(countdown.prompt(target, given))
        form = re.fullmatch(r"<think>\n(.+)\n</think>\n<answer>(.+)</answer>", text, re.DOTALL)
        assert form is not None
        *lines, last = form[1].split("\n")
        end = next((i + 1 for i, line in enumerate(lines) if line.endswith(" yes")), len(lines))
        lines, looked_up = lines[:end], lines[end:]
        for equation in looked_up:
            result, source = equation.split(" = ")
            assert value(source) == int(result)
        pairs = bool(re.search(r"\d\) . \(\d", last))
        assert len(looked_up) in ((2, 3) if pairs else (0,))  # 2 of one pair with itself
        assert len(set(lines)) == len(lines)
        for line in lines:
            origin, _, rest = line.partition(", ")
            first, _, source = origin.partition(" = ")
            assert not source or value(source) == int(first)
            assert source or int(first) in given
            for part in rest.removesuffix(" yes").split("; "):
                second, results = part.split(": ")
                a, b = int(first), int(second)
                wanted = [str(n) if n <= 99 else "over" for n in (a + b, abs(a - b), a * b)]
                assert results.split() == wanted[: len(results.split())]
                assert line.endswith(" yes") or len(results.split()) == 3
            assert line.endswith("yes") is (line is lines[-1] and form[2] != "none")
        longest = max(longest, len(completion_ids(TOKENIZER, text)))
        if form[2] == "none":
            gave_up += 1
            assert target not in reachable(given)
            assert last == "Give up."
            continue
        assert value(form[2]) == target
        used = Counter(int(n) for n in re.findall("[0-9]+", form[2]))
        assert used <= Counter(given)
        assert last.startswith(f"{target} = ") and last.endswith(f" = {form[2]}")
    assert 20 < gave_up < 100
    assert longest <= {3: 160, 4: LENGTH - 20}[numbers]


@pytest.mark.parametrize("name", TASKS)
def test_solutions_pass_their_own_verifier_and_problems_depend_on_the_seed_alone(name):
    found = task(name)
    asked = held_out(found, 100) + batch(found.problems, 100, 1, 2)
    assert asked == held_out(found, 100) + batch(found.problems, 100, 1, 2)
    assert asked[100:] != batch(found.problems, 100, 1, 3)
    assert found.solution is not None
    for problem in asked:
        text = found.solution(problem)
        assert set(found.judge(problem, text, True).values()) == {1.0}, problem
        assert countdown_traces.steps_right(text) == (n := countdown_traces.steps_right(text)[1], n)


def test_right_steps_are_counted():
    assert countdown_traces.steps_right("4, 6: 10 2 24 yes\n10, 9: 18 1 90; 2: 12") == (6, 7)
    assert countdown_traces.steps_right("4, 60: 64 56 over\n4 , 6: 1") == (3, 3)


@pytest.mark.parametrize(
    ("thought", "share"),
    [
        ("4, 6: 10 2 24\n24 = 4 * 6, 9: 33 15 over", 1.0),
        ("4, 6: 10 2 25", 2 / 3),
        ("24 = 4 * 7, 9: 33 15 over", 3 / 4),
        ("8 = 8 - 1, 9: 17 1 72 yes", 3 / 4),
        ("12 = (19 - 15) * 3, 9: 21 3 over", 1.0),
        ("12 = (19 - 15) * 4", 0.0),
        ("100 = 50 + 50", 0.0),  # beyond the limit
        ("Give up.", 1.0),
        ("", 1.0),
    ],
)
def test_what_a_thought_states_is_checked(thought, share):
    text = f"<think>{thought}\n</think>\n<answer>1 = 2 + 5</answer>"
    assert countdown_traces.sound(text) == share


def test_careless_searches_are_right_now_and_then():
    texts = list(itertools.islice(countdown_corpus.careless(0), 2000))
    assert texts == list(itertools.islice(countdown_corpus.careless(0), 2000))
    right = [countdown.is_right(t.prompt, t.completion) for t in texts if t.prompt.count(",") == 2]
    assert 0.2 < sum(right) / len(right) < 0.4


def test_what_is_looked_up_is_right_and_stands_above_once():
    searched = re.compile(r"[0-9]+, [0-9]+: ([0-9]+) ([0-9]+) ([0-9]+|over)")
    for text in itertools.islice(countdown_corpus.lookups(0), 1000):
        lines = text.completion.split("\n")
        above = [match for line in lines if (match := searched.fullmatch(line))]
        results = [int(n) for match in above for n in match.groups() if n != "over"]
        right, total = countdown_traces.steps_right("\n".join(lines[: len(above)]))
        assert right == total == 3 * len(above)
        for line in lines[len(above) :]:
            result, source = line.split(" = ")
            assert value(source) == int(result)
        last = lines[-1]
        pairs = re.findall(r"\((.+?)\)", last)
        origins = [f"{value(pair)} = {pair}" for pair in pairs]
        bare = re.sub(r"\((.+?)\)", lambda pair: str(value(pair[1])), last)
        ends = list(dict.fromkeys([bare, *origins]))  # 2 where a value comes from itself, times 1
        shown = lines[len(above) : -1 - len(ends)]
        assert lines[-1 - len(ends) : -1] == ends
        assert set(origins) <= set(shown)
        once = {n for n in results if n and results.count(n) == 1}
        assert sorted(int(line.split(" = ")[0]) for line in shown) == sorted(once)


def test_the_tokenizer_gives_texts_back_and_has_a_token_for_each_word():
    texts = list(itertools.islice(countdown_corpus.corpus(1), 1000))
    for text in texts:
        ids = completion_ids(TOKENIZER, text.completion)[:-1]
        assert TOKENIZER.decode(ids) == text.completion
        stream = TOKENIZER.decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == text.completion
        assert UNKNOWN not in TOKENIZER.decode(ids)
    assert TOKENIZER.decode(TOKENIZER.encode(ASKED)) == ASKED
    assert len(TOKENIZER.encode(ASKED)) == 9
    assert TOKENIZER.encode("Make 24 from 4,6,9.") == TOKENIZER.encode(ASKED)
    assert max(TOKENIZER.encode("Make 24 from 4")) < TOKENIZER.vocab_size <= VOCABULARY


def test_what_the_tokenizer_does_not_know_is_unknown_and_never_a_control_token():
    unknown = TOKENIZER.encode("zebra")
    assert len(unknown) == 1
    for word in ("100", "007", "\u0664", "make", "\U0001f600"):
        assert TOKENIZER.encode(word) == unknown
    for mark in TOKENIZER.control:
        assert set(TOKENIZER.encode(f"4 {mark} 6")).isdisjoint(TOKENIZER.control_ids)


def test_the_chat_template_is_that_of_r1():
    template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATE)
    turn = [{"role": "user", "content": ASKED}]
    reply = [{"role": "assistant", "content": said("4 * 6")}, {"role": "user", "content": "Why?"}]
    for messages in (turn, turn + reply, [{"role": "system", "content": "So"}, *turn]):
        bos, eos = TOKENIZER.bos_token, TOKENIZER.decode([TOKENIZER.eos_ids[0]])
        for opening in (True, False):
            made = template.render(
                messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=opening
            )
            assert made == render(messages, "r1", add_generation_prompt=opening)


def test_a_batch_is_a_pure_function_of_the_step_and_learns_what_follows_prompts():
    recipe = pretrain.PRESETS["r1_nano"]
    make = pretrain.countdown(TOKENIZER, recipe)
    one, again, other = make(3), make(3), make(4)
    assert all((one[k] == again[k]).all() for k in one)
    assert (one["tokens"] != other["tokens"]).any()
    model = Model(recipe.config, {}, TOKENIZER)
    found = re.findall("Make[^.]+[.]", TOKENIZER.decode(one["tokens"][0].tolist()))
    start = len(encode(model, found[0]).tokens)
    first = one["segments"][0] == one["segments"][0][one["weights"][0] == 0][0]
    assert one["weights"][0][first].sum() in (first.sum() - start, first.sum() - 1)
    assert one["weights"].mean() > 0.5
    assert one["tokens"].max() < recipe.config.vocab_size


def test_a_base_is_trained_saved_and_asked_in_r1s_format(tmp_path):
    preset = pretrain.PRESETS["student_nano"]
    config = dataclasses.replace(
        preset.config, hidden_size=16, intermediate_size=16, num_hidden_layers=1
    )
    recipe = dataclasses.replace(
        preset, config=config, rate=0.0, steps=1, rows=1, length=32, problems=0, sample_every=0
    )
    model = pretrain.train(recipe, tmp_path / "run")
    asked = encode(model, ASKED)
    assert asked.thought
    assert TOKENIZER.decode(asked.tokens) == render([{"role": "user", "content": ASKED}], "r1")
    assert encode(model._replace(source=None), ASKED) == asked
    assert sampling_defaults(model) == (0.6, 0.95)

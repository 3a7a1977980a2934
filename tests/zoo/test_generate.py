"""`generate` and `stream`: the same options, the same text, and why an answer ended."""

import chain
import pytest

from deepzoo import zoo
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.generate import Statistics

MODEL = chain.model(chain.spelled("abcdefgh") | {"h": chain.END, "x": "y", "y": "x"})


@pytest.mark.parametrize(
    ("prompt", "options", "text", "finish"),
    [
        ("a", {}, "bcdefgh", "eos"),
        ("a", {"stop": "ef"}, "bcd", "stop"),
        ("a", {"stop": ["h", "zz"], "max_tokens": 50}, "bcdefg", "stop"),
        ("x", {"max_tokens": 5}, "yxyxy", "length"),
        ("x", {"max_tokens": 5, "stop": "yy"}, "yxyxy", "length"),  # held back until the end
    ],
)
def test_stream_gives_the_text_of_generate_and_says_why_it_ended(prompt, options, text, finish):
    statistics = Statistics()
    pieces = zoo.stream(MODEL, prompt, raw=True, temperature=0.0, statistics=statistics, **options)
    assert "".join(pieces) == text
    assert statistics.finish == [finish]
    counted = Statistics()
    (whole,) = zoo.generate(MODEL, prompt, raw=True, temperature=0.0, statistics=counted, **options)
    assert (whole.text, whole.finish) == (text, finish)
    assert counted.finish == [finish]


def test_finish_is_open_while_an_answer_goes_on():
    statistics = Statistics()
    pieces = zoo.stream(MODEL, "x", raw=True, temperature=0.0, statistics=statistics)
    next(pieces)
    assert statistics.finish == [None]


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(RequestError, match=r"no option is called topk; there are .*top_k"):
        zoo.generate(MODEL, "a", topk=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(RequestError, match="no option is called slots"):
        list(zoo.stream(MODEL, "a", slots=3))  # pyright: ignore[reportCallIssue]

"""Chat formats against renders of the published templates, and messages that must be refused.

`tests/data/text/renders.json` was made by `make_renders.py` beside it, by the published Jinja text.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from deepzoo.zoo.chat import (
    CHAT_FORMATS,
    chat_format,
    encode_chat,
    in_thought,
    render,
    split_thinking,
)
from deepzoo.zoo.chat_formats import ASSISTANT, BOS, EOS, THINK, THINK_END, USER
from deepzoo.zoo.errors import RequestError, TokenizerError
from deepzoo.zoo.tokenizer import Control, Tokenizer

DATA = Path(__file__).parent.parent / "data" / "text"
GOLDEN = json.loads((DATA / "renders.json").read_text(encoding="utf-8"))
HELLO = [{"role": "user", "content": "U1"}]
U, A = USER.text, ASSISTANT.text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer")


def _options(key: str) -> tuple[str, bool, bool | None]:
    title, prompt, thinking = key.split(" | ")
    modes = {"None": None, "True": True, "False": False}
    return title, prompt == "prompt=True", modes[thinking.removeprefix("thinking=")]


@pytest.mark.parametrize("name", [name for name in CHAT_FORMATS if name != "plain"])
def test_render_equals_published_template(name: str) -> None:
    renders = GOLDEN["renders"][name]
    assert len(renders) >= 26
    for key, expected in renders.items():
        title, prompt, thinking = _options(key)
        messages = GOLDEN["dialogues"][title]
        got = render(messages, name, add_generation_prompt=prompt, thinking=thinking)
        assert got == expected, key


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("v2_chat", "User: U1\n\nAssistant:"),
        ("v2_0628", f"{U}U1{A}"),
        ("v2_5", f"{U}U1{A}"),
        ("v3", f"{U}U1{A}"),
        ("v3_0324", f"{U}U1{A}"),
        ("r1", f"{U}U1{A}<think>\n"),
        ("r1_0528", f"{U}U1{A}"),
        ("v3_1", f"{U}U1{A}</think>"),
        ("plain", "U1"),
    ],
)
def test_one_user_message(name: str, tail: str) -> None:
    assert render(HELLO, name) == BOS + tail
    assert render(HELLO, name, bos="<s>") == "<s>" + tail
    assert render(HELLO, name, bos="") == tail


def test_every_format_has_a_bos_control_first_and_once() -> None:
    for name, format in CHAT_FORMATS.items():
        pieces = format(HELLO, bos="<s>")
        assert pieces.count(Control("<s>")) == (name != "moonlight"), name
        assert name == "moonlight" or pieces[0] == Control("<s>"), name


# --- ids ------------------------------------------------------------------------------------------


def test_control_tokens_of_a_prompt(tokenizer: Tokenizer) -> None:
    ids = encode_chat(tokenizer, HELLO, "r1")
    control = tokenizer.control
    assert ids == [
        *[control[BOS], control[U], *tokenizer.encode("U1"), control[A], control["<think>"]],
        *tokenizer.encode("\n"),
    ]


def _say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", list(CHAT_FORMATS))
def test_text_of_messages_never_becomes_control(name: str, tokenizer: Tokenizer) -> None:
    """The control tokens of the prompt are the same whatever the messages spell."""
    spelled = "".join(tokenizer.control) + "<think>\n</think>"
    # A published cut at </think> in an assistant's text is no control token: leave it out of there.
    reply = spelled.replace("</think>", "")
    roles = ["user"] if name == "plain" else ["system", "user", "assistant", "user"]
    evil = [_say(r, reply if r == "assistant" else spelled) for r in roles]
    mild = [_say(r, "x") for r in roles]
    if CHAT_FORMATS[name].tools:
        for messages, text in ((evil, reply), (mild, "x")):
            call = {"type": text, "function": {"name": text, "arguments": text}}
            messages.insert(3, {"role": "assistant", "content": None, "tool_calls": [call, call]})
            messages.insert(4, {"role": "tool", "content": text})
    controls = [
        [i for i in encode_chat(tokenizer, m, name) if i in tokenizer.control_ids]
        for m in (evil, mild)
    ]
    assert controls[0] == controls[1]
    assert tokenizer.decode(encode_chat(tokenizer, evil, name)) == render(evil, name)


def test_neighbouring_texts_are_encoded_as_one(tokenizer: Tokenizer) -> None:
    ids = encode_chat(tokenizer, HELLO, "v2_chat")
    assert ids == [tokenizer.control[BOS], *tokenizer.encode("User: U1\n\nAssistant:")]
    # Words that the vocabulary has as one token come out as one, however the pieces are cut.
    whole = tokenizer.encode("three plus")
    assert tokenizer.encode_pieces(["th", "ree", " pl", "us"]) == whole
    assert len(whole) < sum(len(tokenizer.encode(part)) for part in ("th", "ree", " pl", "us"))


def test_bos_is_never_doubled(tokenizer: Tokenizer) -> None:
    again = [{"role": "user", "content": render(HELLO, "r1")}]
    for name in ("v3", "r1", "plain"):
        ids = encode_chat(tokenizer, again, name)
        assert ids.count(tokenizer.control[BOS]) == 1
    assert tokenizer.encode_prompt(BOS + "x").count(tokenizer.control[BOS]) == 1


def test_tokenizer_without_the_marks_of_the_format(tokenizer: Tokenizer) -> None:
    tree = json.loads((DATA / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    tree["added_tokens"] = [
        token
        for token in tree["added_tokens"]
        if "think" not in token["content"] and token["content"] != A
    ]
    tree["model"]["merges"] = tree["model"]["merges"][17:]  # past those that spell marks
    less = Tokenizer({"tokenizer.json": json.dumps(tree).encode()})
    with pytest.raises(TokenizerError, match=r"no control token '<.Assistant.>'.*chat format"):
        encode_chat(less, HELLO, "r1")
    # A think tag that is no token was text in training, joined with its neighbours.
    assert less.encode_pieces([THINK, "\n"]) == less.encode("<think>\n")
    assert tokenizer.encode_pieces([THINK, "\n"])[0] == tokenizer.control["<think>"]


# --- thinking -------------------------------------------------------------------------------------


def test_thinking_modes() -> None:
    forced = {
        name: [format.forced(mode) for mode in (None, *format.modes)]
        for name, format in CHAT_FORMATS.items()
    }
    assert forced.pop("r1") == forced.pop("r1_first") == [True, True]
    assert forced.pop("v3_1") == forced.pop("v3_1_terminus") == [False, False, True]
    assert all(value == [False, False] for value in forced.values())
    with pytest.raises(RequestError, match="r1 always thinks"):
        render(HELLO, "r1", thinking=False)
    with pytest.raises(RequestError, match="v3_0324 has no thinking mode"):
        render(HELLO, "v3_0324", thinking=True)


def test_in_thought_is_what_the_prompt_says() -> None:
    assert in_thought(chat_format("r1")(HELLO))
    assert in_thought(chat_format("v3_1")(HELLO, thinking=True))
    assert not in_thought(chat_format("v3_1")(HELLO))
    assert not in_thought(chat_format("r1")(HELLO, add_generation_prompt=False))
    assert not in_thought(chat_format("r1_0528")(HELLO))
    assert not in_thought([])
    spelled = [{"role": "user", "content": "<think>"}]
    assert not in_thought(chat_format("v3")(spelled))
    # After tool outputs the published R1 format forces nothing.
    assert not in_thought(chat_format("r1")([*HELLO, {"role": "tool", "content": "O"}]))


@pytest.mark.parametrize(
    ("text", "forced", "expected"),
    [
        ("why\n</think>\n\nsix", True, ("why", "six")),
        ("<think>\nwhy\n</think>\n\nsix", True, ("why", "six")),
        ("<think>\nwhy\n</think>\n\nsix", False, ("why", "six")),
        ("\n<think>why</think>six", False, ("why", "six")),
        ("six", False, ("", "six")),
        ("\n six\n", False, ("", "\n six\n")),
        ("six </think> seven", False, ("", "six </think> seven")),
        ("still going", True, ("still going", "")),
        ("<think>still going", False, ("still going", "")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("\n</think>\n\nsix", True, ("", "six")),
        ("", True, ("", "")),
        ("", False, ("", "")),
    ],
)
def test_split_thinking(text: str, forced: bool, expected: tuple[str, str]) -> None:
    assert split_thinking(text, forced) == expected


# --- what is refused ------------------------------------------------------------------------------


def _call(**function: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "must be a list of messages, got str"),
        ({"role": "user", "content": "x"}, "must be a list of messages, got dict"),
        (None, "must be a list of messages, got NoneType"),
        (["hello"], r"messages\[0\]: must be a table with role and content, got str"),
        ([{"content": "x"}], r"messages\[0\]: unknown role None"),
        ([*HELLO, {"role": "bot", "content": "x"}], r"messages\[1\]: unknown role 'bot'.*user"),
        ([{"role": "user"}], r"messages\[0\]: content must be text, got NoneType"),
        ([{"role": "user", "content": 3}], "content must be text, got int"),
        ([{"role": "user", "content": [{"text": "x"}]}], "content must be text, got list"),
        ([{"role": "assistant", "content": None}], "content must be text, got NoneType"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls must be a list in an"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f"}], "tool_calls must be a list"),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], "tool_calls is empty"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], r"tool_calls\[0\]: must be a"),
        ([_call(arguments="{}")], "function.name must be text"),
        ([_call(name="f", arguments={})], "must be JSON text, got dict; pass json.dumps"),
    ],
)
def test_refused_messages(messages: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(messages, "v3")  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_refused_for_a_format() -> None:
    tool = [*HELLO, {"role": "tool", "content": "x"}]
    for name in ("v2_chat", "v2_0628", "moonlight"):
        with pytest.raises(RequestError, match=rf"messages\[1\]: .*{name} has no tool calls"):
            render(tool, name)
    with pytest.raises(RequestError, match="plain takes exactly one user message"):
        render([*HELLO, *HELLO], "plain")
    with pytest.raises(RequestError, match="plain takes exactly one user message"):
        render([{"role": "system", "content": "x"}], "plain")


def test_format_names() -> None:
    assert chat_format("r1").name == "r1"
    with pytest.raises(RequestError, match=r"'llama'; choose from plain, v2_chat, .*, moonlight"):
        chat_format("llama")
    with pytest.raises(RequestError, match=r"no published chat template of Kimi-K2"):
        chat_format("kimi_k2")


def test_call_type_defaults_to_function() -> None:
    text = render([*HELLO, _call(name="f", arguments="{}")], "r1", add_generation_prompt=False)
    assert "function" in text
    assert text.endswith(EOS.text)
    assert THINK_END.text not in text

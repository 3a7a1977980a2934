"""The tokenizer: text stays text, streams never cut a character, damaged files are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from deepzoo.zoo import catalog
from deepzoo.zoo.errors import RequestError, TokenizerError
from deepzoo.zoo.tokenizer import Control, Tokenizer
from deepzoo.zoo.tokenizer_file import SIZE_LIMIT

HOME = Path(__file__).parent.parent / "data" / "text" / "tokenizer"
TREE = json.loads((HOME / "tokenizer.json").read_text(encoding="utf-8"))
SETTINGS = json.loads((HOME / "tokenizer_config.json").read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.load(HOME)
BAR = "\uff5c"  # FULLWIDTH VERTICAL LINE
BOS = f"<{BAR}begin\u2581of\u2581sentence{BAR}>"
# What a user may write: every control token, near misses in ASCII, halves of them.
SPELLED = [*TOKENIZER.control, "<|User|>", "<|Assistant|>", "<think", "think>", f"<{BAR}", "</"]


def _config(vocab_size: int = 512, bos: int | None = 0, eos: tuple[int, ...] = (1,)) -> Any:
    return SimpleNamespace(vocab_size=vocab_size, bos_token_id=bos, eos_ids=eos)


def _copy() -> dict[str, Any]:
    return json.loads(json.dumps(TREE))


def _made(tree: object, settings: object = None, config: Any = None) -> Tokenizer:
    files = {"tokenizer.json": json.dumps(tree).encode()}
    if settings is not None:
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    return Tokenizer(files, config)


# --- text never becomes control -------------------------------------------------------------------


def test_the_plain_library_would_inject() -> None:
    """The danger is real: the library's own switch leaves the tags that are not flagged special."""
    plain = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
    plain.encode_special_tokens = True
    assert TOKENIZER.control["<think>"] in plain.encode("a <think> b").ids


@pytest.mark.parametrize("spelled", SPELLED)
def test_spelled_control_is_text(spelled: str) -> None:
    for text in (spelled, f"a{spelled}b", f" {spelled}\n", spelled * 3):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.control_ids.isdisjoint(ids)
        assert TOKENIZER.decode(ids) == text


@given(st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=8)), max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_round_trips_without_control(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.control_ids.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text


def test_ordinary_text_is_encoded_as_the_library_does() -> None:
    plain = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
    for text in ("three plus four is seven", "User: why?\n\n", "h\u00e9 \u4f60\u597d \U0001f600"):
        assert TOKENIZER.encode(text) == plain.encode(text, add_special_tokens=False).ids
        assert plain.decode(TOKENIZER.encode(text)) == text


def test_a_prompt_is_encoded_as_the_library_encodes_its_render() -> None:
    """On text that spells nothing, pieces give what the joined string gives in the library. (Its
    ids skip the gaps of the file, so they are compared by spelling.)"""
    plain = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
    pieces = [Control(BOS), Control(f"<{BAR}User{BAR}>"), "what is", " three?", Control("<think>")]
    names = {id: name for name, id in TREE["model"]["vocab"].items()}
    names |= {id: name for name, id in TOKENIZER.control.items()}
    joined = plain.encode("".join(map(str, pieces)), add_special_tokens=False).tokens
    assert [names[i] for i in TOKENIZER.encode_pieces(pieces)] == joined


def test_added_words_and_ids_with_gaps() -> None:
    """Added words that are no marks stay usable, and every added token keeps the file's own id."""
    for token in TREE["added_tokens"]:
        ids = TOKENIZER.encode_pieces([Control(token["content"])] if _is_mark(token) else ["\xf8"])
        assert ids == [token["id"]] or not _is_mark(token)
    ordinary = {t["content"]: t["id"] for t in TREE["added_tokens"] if not _is_mark(t)}
    assert sorted(ordinary) == ["\xf7", "\xf8"]
    assert TOKENIZER.encode("a\xf8") == [*TOKENIZER.encode("a"), ordinary["\xf8"]]
    assert TOKENIZER.decode([ordinary["\xf8"]]) == "\xf8"


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        *[("<new>", True), ("</dsml:", True), ("[X]", True), (f"{BAR}DSML{BAR}", True)],
        *[("<<", False), ("<=", False), ("[]", False), ("new", False), ("\xf5", False)],
    ],
)
def test_which_added_tokens_are_control(text: str, mark: bool) -> None:
    for special in (False, True):
        tree = _copy()
        tree["added_tokens"].append({"content": text, "id": 500, "special": special})
        made = _made(tree, SETTINGS)
        assert (text in made.control) == (mark or special)
        assert (made.encode(text) == [500]) == (text not in made.control)
        assert made.decode(made.encode(text)) == text


def _is_mark(token: dict[str, Any]) -> bool:
    return token["content"] in TOKENIZER.control


def test_no_bos_is_added_and_a_prompt_has_one() -> None:
    with_post = _copy()
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    with_post["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    made = _made(with_post, SETTINGS)
    assert made.encode("x") == TOKENIZER.encode("x")
    assert made.encode("") == []
    assert made.encode_prompt("x") == [0, *made.encode("x")]
    assert _made(TREE, SETTINGS | {"add_bos_token": False}).encode_prompt("x") == made.encode("x")


SHIPPED = [name for name in catalog.models() if catalog.shipped_directory(name)]


@pytest.mark.parametrize("name", SHIPPED)
def test_other_programs_read_a_shipped_tokenizer_alike(name: str) -> None:
    directory = catalog.shipped_directory(name)
    assert directory is not None
    ours = Tokenizer.load(directory)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("", "12 + 7 * 3 =" if name.startswith("v2") else "Make 24 from 4,6,9."):
        assert theirs.encode(text).ids == ours.encode_prompt(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.mark.parametrize("text", [None, b"x", 3])
def test_encode_refuses_what_is_no_text(text: Any) -> None:
    with pytest.raises(RequestError, match="must be a string"):
        TOKENIZER.encode(text)


def test_encode_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(RequestError, match="surrogate pair at character 2"):
        TOKENIZER.encode("ab\ud83d")


def test_word_level_vocabulary_refuses_what_it_cannot_spell() -> None:
    words = {c: n for n, c in enumerate("0123456789+= ")} | {"<end>": 13}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<end>"])
    tree = json.loads(made.to_str())
    tree["model"]["unk_token"] = None
    small = _made(tree | {"model": {"type": "BPE", "vocab": words, "merges": []}})
    assert small.encode("1+2=") == [1, 10, 2, 11]
    with pytest.raises(RequestError, match=r"cannot spell 'x' \(U\+0078\)"):
        small.encode("1+x")
    with pytest.raises(RequestError, match="cannot spell '<'"):
        small.encode("<end>")
    assert small.encode_pieces(["1", Control("<end>")]) == [1, 13]


# --- decoding -------------------------------------------------------------------------------------


def test_decode_and_special_tokens() -> None:
    control = TOKENIZER.control
    ids = [control[BOS], control["<think>"], *TOKENIZER.encode("x"), control["</think>"], 1]
    assert TOKENIZER.decode(ids, skip_special=True) == "<think>x</think>"
    assert TOKENIZER.decode(ids).startswith(BOS)
    # A thought must stay recognisable even where a file flags its tags as special.
    tree = _copy()
    for token in tree["added_tokens"]:
        token["special"] = True
    assert _made(tree, SETTINGS).decode(ids, skip_special=True) == "<think>x</think>"


def test_decode_ids_outside_the_tokenizer() -> None:
    """A model's vocabulary is padded: its ids past the tokenizer's are no error and no text."""
    padded = Tokenizer.load(HOME, _config(vocab_size=10_000))
    assert padded.vocab_size < 10_000
    assert padded.decode([*padded.encode("x"), 9_999, padded.vocab_size]) == "x"
    with pytest.raises(TokenizerError, match="negative token id -1"):
        padded.decode([-1])


def test_decode_equals_the_library() -> None:
    plain = tokenizers.Tokenizer.from_file(str(HOME / "tokenizer.json"))
    known = range(len(TREE["model"]["vocab"]))  # past these the library's ids skip the gaps
    for start in range(0, len(known), 7):
        ids = [known[(start + 5 * n) % len(known)] for n in range(9)]
        assert TOKENIZER.decode(ids) == plain.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 5), max_size=30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_on_any_ids(ids: list[int], skip: bool) -> None:
    stream = TOKENIZER.decoder(skip_special=skip)
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOKENIZER.decode(ids, skip)


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_stream_never_cuts_a_character(text: str) -> None:
    stream = TOKENIZER.decoder()
    given_out = ""
    for id in TOKENIZER.encode(text):
        given_out += stream.push(id)
        assert text.startswith(given_out)
    assert given_out == text  # nothing is held back once a character is whole
    assert stream.flush() == ""


def test_stream_of_half_a_character() -> None:
    ids = TOKENIZER.encode("\U0001f600")
    assert len(ids) == 4
    stream = TOKENIZER.decoder()
    assert [stream.push(id) for id in ids] == ["", "", "", "\U0001f600"]
    assert [stream.push(id) for id in ids[:2]] == ["", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_stream_of_a_decoder_that_looks_back() -> None:
    """A vocabulary that is not made of bytes: word pieces with a space mark, and byte fallback."""
    tree = _copy()
    words = ["\u2581one", "\u2581two", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tree["added_tokens"] = [{"content": "<end>", "id": 300, "special": True}]  # past a gap
    tree["model"] = {
        "type": "BPE",
        "vocab": {word: id for id, word in enumerate(words)},
        "merges": [],
        "byte_fallback": True,
    }
    space = {"replacement": "\u2581", "prepend_scheme": "always", "split": False}
    parts = [{"type": "ByteFallback"}, {"type": "Metaspace", **space}, {"type": "Fuse"}]
    tree["decoder"] = {"type": "Sequence", "decoders": parts}
    tree["pre_tokenizer"] = {"type": "Metaspace", **space}
    made = _made(tree)
    ids = [0, 1, 2, *(3 + byte for byte in "\u00e9".encode()), 1]
    assert made.decode(ids) == "one twos\u00e9 two"
    assert made.decode([0, 1, 300]) == "one two<end>"
    stream = made.decoder()
    assert [stream.push(id) for id in ids] == ["one", " two", "s", "", "\u00e9", " two"]
    assert stream.push(3 + 0xE9) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


# --- the ends of a sequence -----------------------------------------------------------------------


def test_tokenizer_bos_wins_over_config() -> None:
    """The distilled Qwen students' config.json names the end token as bos."""
    made = Tokenizer.load(HOME, _config(bos=1, eos=(1,)))
    assert (made.bos_id, made.bos_token) == (0, BOS)


def test_bos_from_config_only_where_the_tokenizer_says_nothing() -> None:
    assert _made(TREE, None, _config(bos=0)).bos_token == BOS
    assert _made(TREE, {"bos_token": None}, _config(bos=0)).bos_id is None
    assert _made(TREE, None, _config(bos=7)).bos_id is None  # an ordinary word
    assert _made(TREE, None, _config(bos=None)).bos_id is None
    files = {
        "tokenizer.json": json.dumps(TREE).encode(),
        "special_tokens_map.json": json.dumps({"bos_token": {"content": BOS}}).encode(),
    }
    assert Tokenizer(files).bos_id == 0


def test_eos_ids_of_config_and_tokenizer() -> None:
    assert Tokenizer.load(HOME, _config(eos=(397, 402))).eos_ids == (397, 402, 1)
    assert Tokenizer.load(HOME, _config(eos=(1, 402))).eos_ids == (1, 402)
    assert Tokenizer.load(HOME).eos_ids == (1,)


def test_bos_must_be_an_added_token() -> None:
    with pytest.raises(TokenizerError, match=r"bos_token is '<s>'.*same checkpoint"):
        _made(TREE, {"bos_token": "<s>"})


def test_save_writes_the_same_bytes(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (HOME / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


# --- files that are refused -----------------------------------------------------------------------


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json; copy tokenizer\.json and"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"tiktoken\.model is not supported; convert it"):
        Tokenizer.load(tmp_path)


def test_size_limit_is_checked_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(SIZE_LIMIT + 1)  # a sparse file: nothing is written
    with pytest.raises(TokenizerError, match="67108865 bytes, over the limit of 64 MB"):
        Tokenizer.load(tmp_path)


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="not a regular file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read \(Not a directory"):
        Tokenizer.load(HOME / "tokenizer.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"\x1f\x8b\x08compressed", "not valid JSON"),
        (b'{"model": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must hold one JSON object"),
        (b"{}", "model.vocab must be a table"),
        (b'{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "model.vocab must be a table"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "'WordPiece' is not supported"),
        (b'{"model": {"type": "BPE", "vocab": {}}}', "the vocabulary is empty"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}}}', "'a' occurs twice"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "tokenizers library refuses it"),
    ],
)
def test_damaged_files(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer({"tokenizer.json": data})
    assert "\n" not in str(caught.value)


def _add(**token: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["added_tokens"].append(token)


def _word(text: str, id: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["model"]["vocab"].update({text: id})


def _many(tree: dict[str, Any]) -> None:
    tree["added_tokens"] += [{"content": f"<{n}>", "id": 1000 + n} for n in range(10_000)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_word("again", 5), r"id 5 is both '.*' and 'again'"),
        (_word("again", -1), "token 'again' has the id -1"),
        (_word("again", 1.5), r"token 'again' has the id 1\.5"),
        (_word("again", True), "token 'again' has the id True"),
        (_word("again", 1 << 40), "token 'again' has the id 1099511627776"),
        (_add(content="new", id=0), rf"id 0 is both '<{BAR}begin.*' and 'new'"),
        (_add(content="new", id=386), rf"id 386 is both '<{BAR}Assistant{BAR}>' and 'new'"),
        (_add(content="<think>", id=600), "added token '<think>' occurs twice"),
        (_add(content="what", id=600), r"'what' has the ids \d+ and 600"),
        (_add(content="x</think>", id=500), "'x</think>' hides the control token '</think>'"),
        (_add(content="", id=600), "an added token has no content"),
        (_add(id=600), "an added token has no content"),
        (_add(content="new"), "token 'new' has the id None"),
        (_many, "more than 10000 added tokens"),
        (_word("far", 4000), "token 'far' has id 4000, but the model's vocabulary ends at 511"),
        (_add(content="<far>", id=512), "token '<far>' has id 512, but the model's vocabulary"),
    ],
)
def test_contradicting_ids(change: Callable[[dict[str, Any]], None], message: str) -> None:
    tree = _copy()
    if "what" in message:
        tree["model"]["vocab"]["what"] = 500
    change(tree)
    with pytest.raises(TokenizerError, match=message) as caught:
        _made(tree, SETTINGS, _config())
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_the_file() -> None:
    with pytest.raises(TokenizerError, match=r"'<think>' has id 368, but 5 in tokenizer_config"):
        _made(TREE, {"added_tokens_decoder": {"5": {"content": "<think>"}}})
    with pytest.raises(TokenizerError, match=r"id 5 is both '.*' and '<new>'"):
        _made(TREE, {"added_tokens_decoder": {"5": {"content": "<new>"}}})
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder\['x'\] has no id"):
        _made(TREE, {"added_tokens_decoder": {"x": {"content": "<new>"}}})
    only_there = _made(TREE, {"added_tokens_decoder": {"500": {"content": "<new>"}}})
    assert only_there.encode_pieces([Control("<new>")]) == [500]
    assert 500 not in only_there.encode("<new>")


def test_a_panic_in_the_library_is_a_tokenizer_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A pattern that backtracks without end panics in Rust; Python sees a BaseException."""
    tree = _copy()
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    tree["pre_tokenizer"] = pattern | {"invert": False}
    made = _made(tree, SETTINGS)
    with pytest.raises(TokenizerError, match="encoding 61 characters failed"):
        made.encode("a" * 60 + "b")
    assert made.encode("b") == TOKENIZER.encode("b")  # still usable
    capfd.readouterr()  # the library writes its backtrace to stderr
    with pytest.raises(TokenizerError, match="tokenizers library refuses it"):
        _made(tree | {"pre_tokenizer": pattern | {"pattern": {"Regex": "("}}})


@pytest.mark.parametrize("whole_words", [False, True])
def test_no_merge_and_no_word_leads_to_control(whole_words: bool) -> None:
    """Where the pre-tokenizer does not split at "<", the vocabulary's own merges spell `<think>`;
    with `ignore_merges` (the Llama students) a whole word is looked up before any merge."""
    tree = _copy()
    tree["pre_tokenizer"]["use_regex"] = False
    tree["model"]["ignore_merges"] = whole_words
    tree["added_tokens"] = [t for t in tree["added_tokens"] if "think" not in t["content"]]
    reached = tokenizers.Tokenizer.from_str(json.dumps(tree)).encode("<think>").ids
    assert reached == [TOKENIZER.control["<think>"]]
    tree["added_tokens"] = _copy()["added_tokens"]
    made = _made(tree, SETTINGS)
    for text in ("<think>", "a<think></think>[BOS]b"):
        ids = made.encode(text)
        assert made.control_ids.isdisjoint(ids)
        assert made.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "word"),
    [("hello", "h"), ("12 + 1234 =", "1234"), ("1 / 2", "/"), ("\uff11", "\uff11")],
)
def test_a_vocabulary_of_words_names_the_word_it_lacks(text, word):
    tokenizer = Tokenizer.load(catalog.shipped_directory("v2-nano") or "")
    with pytest.raises(RequestError, match=f"cannot spell '{re.escape(word)}'"):
        tokenizer.encode(text)
    assert tokenizer.encode("47+38=") == tokenizer.encode(" 47 + 38 = ")

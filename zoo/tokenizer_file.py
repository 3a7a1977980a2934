"""What a `tokenizer.json` must be before the `tokenizers` library sees it.

The file comes from outside, so it is measured before it is read, and its ids are checked: one token
per id, one id per token, all within the model's vocabulary, no added token that hides a control
token. `without_control` then makes the version that encodes user text.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepzoo.zoo.errors import TokenizerError

SIZE_LIMIT = 64 << 20
ADDED_LIMIT = 10_000
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
THINK_TAGS = ("<think>", "</think>")
BAR = "\uff5c"  # FULLWIDTH VERTICAL LINE, within the role and tool marks of both families


@dataclass(frozen=True, slots=True)
class Parsed:
    """A checked tokenizer file. `tree` has every added token in its vocabulary under its own id."""

    name: str
    tree: dict[str, Any]
    settings: dict[str, Any]
    ids: dict[str, int]
    control: dict[str, int]
    special: frozenset[int]

    def named(self, key: str) -> str | None:
        """The token that the settings call `key` (such as "bos_token"), if they name one."""
        value = self.settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and text not in self.control:
            raise TokenizerError(
                f"{self.name}: {key} is {text!r}, which is not among the added tokens; "
                "tokenizer.json and tokenizer_config.json must come from the same checkpoint"
            )
        return text


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library throws into a `TokenizerError`.

    A panic in its Rust code (a pattern that backtracks too long) arrives as `PanicException`, which
    derives from BaseException and would pass every ordinary handler.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TokenizerError(f"{what} ({line})") from error
        raise


def read_files(directory: Path) -> dict[str, bytes]:
    """Reads those of FILES that exist, each at most SIZE_LIMIT bytes; tokenizer.json must exist."""
    found: dict[str, bytes] = {}
    for name in FILES:
        path = directory / name
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise TokenizerError(f"{path}: not a regular file")
        if status.st_size > SIZE_LIMIT:
            raise TokenizerError(
                f"{path}: {status.st_size} bytes, over the limit of {SIZE_LIMIT >> 20} MB; "
                "this is not a tokenizer of a supported model"
            )
        try:
            with path.open("rb") as file:
                found[name] = file.read(SIZE_LIMIT)
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    if "tokenizer.json" not in found:
        hint = "copy tokenizer.json and tokenizer_config.json from the published checkpoint"
        if (directory / "tiktoken.model").exists():
            hint = "its tiktoken.model is not supported; convert it to tokenizer.json first"
        raise TokenizerError(f"{directory}: no tokenizer.json; {hint}")
    return found


def parse(files: Mapping[str, bytes], vocab_size: int | None, name: str) -> Parsed:
    """Checks the files and returns them in one form. Ids must be below `vocab_size` if it is given.

    Raises:
        TokenizerError: naming the token or the id that cannot be right.
    """
    tree = _object(files["tokenizer.json"], name)
    settings: dict[str, Any] = {}
    for other in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
        if other in files:
            settings |= _object(files[other], f"{other} beside {name}")
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{name}: model.vocab must be a table of token to id (BPE, WordLevel)")
    kind = model.setdefault("type", "BPE" if "merges" in model else "WordLevel")
    if kind not in ("BPE", "WordLevel"):
        raise TokenizerError(f"{name}: model type {kind!r} is not supported, only BPE, WordLevel")

    vocab: dict[str, int] = model["vocab"]
    _check_vocab(vocab, name)
    added = _added(tree, settings, name)
    ids = dict(vocab)
    owners = {id: text for text, id in vocab.items()}
    for text, id in ((token["content"], token["id"]) for token in added):
        if ids.get(text, id) != id:
            raise TokenizerError(f"{name}: {text!r} has the ids {ids[text]} and {id}")
        if owners.get(id, text) != text:
            raise TokenizerError(f"{name}: id {id} is both {owners[id]!r} and {text!r}")
        ids[text], owners[id] = id, text
    if not ids:
        raise TokenizerError(f"{name}: the vocabulary is empty")
    if vocab_size is not None and max(owners) >= vocab_size:
        worst = max(owners)
        raise TokenizerError(
            f"{name}: token {owners[worst]!r} has id {worst}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; the tokenizer belongs to another model"
        )

    control = {t["content"]: t["id"] for t in added if _is_control(t, settings)}
    for text in (token["content"] for token in added):
        for hidden in control:
            if len(hidden) > 2 and hidden != text and hidden in text:
                raise TokenizerError(
                    f"{name}: the added token {text!r} hides the control token {hidden!r}"
                )
    special = frozenset(t["id"] for t in added if t.get("special"))
    # The library numbers added tokens by their order; those found in the vocabulary keep their id.
    tree = {**tree, "model": {**model, "vocab": ids}, "added_tokens": added}
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    return Parsed(name, tree, settings, ids, control, special)


def without_control(parsed: Parsed) -> dict[str, Any]:
    """The tree in which no text leads to a control token: not as an added token, not as a word of
    the vocabulary, not as the result of a merge. The unknown token stays reachable as such."""
    model = dict(parsed.tree["model"])
    gone = set(parsed.control) - {model.get("unk_token")}
    model["vocab"] = {text: id for text, id in parsed.ids.items() if text not in gone}
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if gone.isdisjoint(_merged(m))]
    added = [t for t in parsed.tree["added_tokens"] if t["content"] not in parsed.control]
    return {**parsed.tree, "model": model, "added_tokens": added}


def bytes_of_tokens(parsed: Parsed) -> dict[int, bytes] | None:
    """The bytes that each id stands for, if the file decodes at the byte level; otherwise None.

    Added tokens stand for what they are written as. (The library reads an added "\\xf8" as the byte
    F8, which is no character.)
    """
    decoder = parsed.tree.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    table = _byte_alphabet()
    made = {id: _token_bytes(text, table) for text, id in parsed.ids.items()}
    for token in parsed.tree["added_tokens"]:
        made[token["id"]] = token["content"].encode(errors="replace")
    return made


def is_byte_complete(parsed: Parsed) -> bool:
    """Whether every byte that occurs in UTF-8 has a token, so that any text can be spelled."""
    model = parsed.tree["model"]
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in parsed.ids for byte in range(256))
    # C0, C1 and F5 to FF never occur in UTF-8; the published vocabularies lack them.
    used = [c for c, b in _byte_alphabet().items() if b not in (0xC0, 0xC1) and b < 0xF5]
    return bytes_of_tokens(parsed) is not None and all(c in model["vocab"] for c in used)


def _object(data: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise TokenizerError(f"{name}: {twice!r} occurs twice")
        return made

    try:
        tree = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise TokenizerError(f"{name}: must hold one JSON object")
    return tree


def _check_vocab(vocab: dict[str, Any], name: str) -> None:
    owners: dict[int, str] = {}
    for text, id in vocab.items():
        _check_id(text, id, name)
        if id in owners:
            raise TokenizerError(f"{name}: id {id} is both {owners[id]!r} and {text!r}")
        owners[id] = text


def _check_id(text: str, id: object, name: str) -> None:
    if type(id) is not int or not 0 <= id < 1 << 31:
        raise TokenizerError(f"{name}: token {text!r} has the id {id!r}, expected a whole number")


def _added(tree: dict[str, Any], settings: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json, and those that only tokenizer_config.json lists."""
    added = tree.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, list) or not isinstance(decoder, dict):
        raise TokenizerError(f"{name}: added_tokens must be a list, added_tokens_decoder a table")
    if max(len(added), len(decoder)) > ADDED_LIMIT:
        raise TokenizerError(f"{name}: more than {ADDED_LIMIT} added tokens")
    flags = {k: False for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    made: dict[str, dict[str, Any]] = {}
    for token in added:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text:
            raise TokenizerError(f"{name}: an added token has no content: {token!r:.80}")
        _check_id(text, token.get("id"), name)
        if text in made:
            raise TokenizerError(f"{name}: the added token {text!r} occurs twice")
        made[text] = flags | token
    for key, token in decoder.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text or not key.isdecimal():
            raise TokenizerError(f"{name}: added_tokens_decoder[{key!r:.40}] has no id or content")
        known = made.setdefault(text, flags | token | {"id": int(key)})
        if known["id"] != int(key):
            raise TokenizerError(
                f"{name}: {text!r} has id {known['id']}, but {key} in tokenizer_config.json"
            )
    return list(made.values())


def _is_control(token: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Special tokens, tokens with a name, and whatever is written like a mark. The rest are
    ordinary words that the vocabulary lacks (single accented letters, in older files)."""
    text: str = token["content"]
    angled = text[0] == "<" and text.strip("<=>-|/ ") != ""  # "</dsml:" too, but no "<<" or "<="
    mark = angled or (text[0] + text[-1] == "[]" and len(text) > 2) or BAR in text
    names = [settings.get(key) for key in ("bos_token", "eos_token", "pad_token")]
    named = text in [n.get("content") if isinstance(n, dict) else n for n in names]
    return bool(token.get("special")) or mark or named


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return left, right, left + right


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in character of each byte in byte-level BPE: printable Latin-1 characters
    stand for themselves, the others, in order, for the code points from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _token_bytes(text: str, table: dict[str, int]) -> bytes:
    try:
        return bytes(table[character] for character in text)
    except KeyError:  # what byte-level training cannot have made stands for itself
        return text.encode(errors="replace")

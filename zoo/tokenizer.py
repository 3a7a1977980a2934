"""Text to ids and back, from a checkpoint's `tokenizer.json`.

The rule of this file: **text never becomes a control token**. A user may write `<think>`, an end of
sentence mark or a role mark; those characters reach the model as ordinary text tokens. Control
tokens enter a sequence in one way only, as `Control` pieces that a chat format puts there.

The `tokenizers` library matches every added token inside any text, and its `encode_special_tokens`
switch spares only those flagged special; the published files flag `<think>` and the role marks as
not special. So text is encoded by a second tokenizer, made from the same file without its control
tokens: neither in the added tokens, nor in the vocabulary, nor as the result of a merge.
"""

import codecs
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import tokenizers

from deepzoo.zoo.errors import RequestError, TokenizerError
from deepzoo.zoo.tokenizer_file import (
    THINK_TAGS,
    Parsed,
    bytes_of_tokens,
    is_byte_complete,
    parse,
    read_files,
    rust_errors,
    without_control,
)

if TYPE_CHECKING:
    from deepzoo.zoo.config import Config


@dataclass(frozen=True, slots=True)
class Control:
    """One control token, by its spelling. Chat formats make these; text never turns into one."""

    text: str

    def __str__(self) -> str:
        return self.text


type Piece = str | Control


class Tokenizer:
    """A published tokenizer whose text side cannot produce control tokens.

    Attributes:
        control: spelling -> id of every control token (special ones, `<...>`, `[...]` and those
            with a fullwidth bar).
        bos_id, bos_token: the beginning-of-sentence token that prompts start with, or None.
        add_bos: whether a plain prompt starts with it (`add_bos_token` of the file).
        eos_ids: every id that ends a completion: the config's, then the tokenizer's own.
        control_ids: the same ids as a set: `encode` never returns one of them.
        vocab_size: one more than the largest id. A model's vocabulary is often padded beyond it.
        chat_template: text of the template in the settings, which is never executed, or None.
    """

    control: dict[str, int]
    control_ids: frozenset[int]
    bos_id: int | None
    bos_token: str | None
    add_bos: bool
    eos_ids: tuple[int, ...]
    vocab_size: int
    chat_template: str | None

    def __init__(self, files: Mapping[str, bytes], config: "Config | None" = None, name: str = ""):
        """Builds from the bytes of `tokenizer.json` and, if there, `tokenizer_config.json` and
        `special_tokens_map.json` (keys of `files`).

        `config` supplies the model's vocabulary size to check against, its eos list, and a bos only
        where the tokenizer names none: the distilled Qwen students' config names a wrong one.

        Raises:
            TokenizerError: the file is damaged, contradicts itself or does not fit the model.
        """
        vocab_size = None if config is None else config.vocab_size
        parsed = parse(files, vocab_size, name or "tokenizer.json")
        self._files = dict(files)
        self._name = parsed.name
        self.control = parsed.control
        self.control_ids = frozenset(parsed.control.values())
        self.vocab_size = 1 + max(parsed.ids.values())
        self.add_bos = bool(parsed.settings.get("add_bos_token", True))
        template = parsed.settings.get("chat_template")
        self.chat_template = template if isinstance(template, str) else None
        with rust_errors(f"{parsed.name}: the tokenizers library refuses it"):
            self._full = _build(parsed.tree)
            self._text = _build(without_control(parsed))
        self._bytes = bytes_of_tokens(parsed)
        self._skip = parsed.special - {parsed.ids[t] for t in THINK_TAGS if t in parsed.ids}
        # Without the whole byte alphabet and without an unknown token, the library drops
        # characters silently; `encode` then checks each character it has not seen before.
        self._lossless = is_byte_complete(parsed) or parsed.tree["model"].get("unk_token")
        self._seen: set[str] = set()
        self._ends(parsed, config)

    def _ends(self, parsed: Parsed, config: "Config | None") -> None:
        bos = parsed.named("bos_token")
        if config is not None and "bos_token" not in parsed.settings:
            names = {id: text for text, id in self.control.items()}
            bos = None if config.bos_token_id is None else names.get(config.bos_token_id)
        self.bos_token = bos
        self.bos_id = None if bos is None else self.control[bos]
        eos = () if config is None else config.eos_ids
        own = parsed.named("eos_token")
        self.eos_ids = tuple(dict.fromkeys(eos if own is None else (*eos, self.control[own])))

    @classmethod
    def load(cls, directory: str | Path, config: "Config | None" = None) -> Self:
        """Reads the tokenizer files of a checkpoint directory.

        Raises:
            TokenizerError: a file is missing, over 64 MB, damaged or does not fit `config`.
        """
        return cls(read_files(Path(directory)), config, str(Path(directory) / "tokenizer.json"))

    def save(self, directory: str | Path) -> None:
        """Writes the files this tokenizer was made from, byte for byte, into `directory`."""
        for name, data in self._files.items():
            (Path(directory) / name).write_bytes(data)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. No bos is added, and no control token can come out of it.

        Raises:
            RequestError: `text` is no string, holds half a surrogate pair, or holds a character
                that this vocabulary cannot spell.
            TokenizerError: the library gave up (such as a pattern that backtracks without end).
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text holds half a surrogate pair at character {error.start}: it is not valid "
                "Unicode, decode the input again"
            ) from error
        if not self._lossless:
            self._check_characters(text)
        try:
            return self._encode(text)
        except TokenizerError as error:
            if "Missing [UNK]" not in str(error):
                raise
            raise RequestError(
                f"this model's vocabulary cannot spell {self._unknown_word(text)!r}; "
                "remove it from the text"
            ) from None

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of what a chat format produced. Neighbouring texts are joined before they are
        encoded, as the published templates do; only `Control` pieces become control tokens.

        A think tag that this tokenizer has no token for is written as text, as it was in training.

        Raises:
            TokenizerError: the tokenizer lacks another control token of the format.
        """
        ids: list[int] = []
        run: list[str] = []
        for piece in pieces:
            if isinstance(piece, str):
                run.append(piece)
            elif piece.text in self.control:
                ids += self.encode("".join(run))
                run.clear()
                ids.append(self.control[piece.text])
            elif piece.text in THINK_TAGS:
                run.append(piece.text)
            else:
                raise TokenizerError(
                    f"{self._name}: no control token {piece.text!r}, which this chat format needs; "
                    "choose the chat format of this model"
                )
        return ids + self.encode("".join(run))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt for a base model: bos, if the tokenizer adds one, and the text."""
        bos = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        return bos + self.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. Ids in the padding of the model's vocabulary give no text.

        With `skip_special` the tokens that the file flags special are left out, except the think
        tags, by which the thought is told from the answer.
        """
        kept = self._kept(ids, skip_special)
        data = self.decode_bytes(kept)
        if data is not None:
            return data.decode(errors="replace")
        with rust_errors(f"{self._name}: decoding failed"):
            return self._full.decode(kept, skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes | None:
        """The bytes of ids, which may end within a character; None unless the vocabulary is made
        of bytes (that of every released model is)."""
        if self._bytes is None:
            return None
        return b"".join(self._bytes.get(i, b"") for i in self._kept(ids, skip_special))

    def _kept(self, ids: Iterable[int], skip_special: bool) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise TokenizerError(f"cannot decode the negative token id {min(ids)}")
        return [i for i in ids if i < self.vocab_size and not (skip_special and i in self._skip)]

    def decoder(self, skip_special: bool = True) -> "Decoder":
        """A streaming decoder: see `Decoder`."""
        return Decoder(self, skip_special)

    def _encode(self, text: str) -> list[int]:
        with rust_errors(f"{self._name}: encoding {len(text)} characters failed"):
            return self._text.encode(text, add_special_tokens=False).ids

    def _unknown_word(self, text: str) -> str:
        """The first word of `text` that a vocabulary of whole words lacks."""
        splitter = self._text.pre_tokenizer
        words = [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        for word in words:
            try:
                self._encode(word)
            except TokenizerError:
                return word
        return text

    def _check_characters(self, text: str) -> None:
        for character in sorted(set(text) - self._seen):
            if not character.isspace() and not self._encode(character):
                raise RequestError(
                    f"this model's vocabulary cannot spell {character!r} (U+{ord(character):04X}); "
                    "remove it from the text"
                )
            self._seen.add(character)


class Decoder:
    """Decodes a stream of ids into pieces of text that never end within a character.

    The pieces of all `push` calls and of `flush`, joined, equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._before: list[int] = []  # what was given out last: some decoders look back one token
        self._held: list[int] = []  # ids whose text is not complete yet

    def push(self, id: int) -> str:
        """Takes one id; returns the text that became certain by it, often the empty string."""
        data = self._tokenizer.decode_bytes([id], self._skip_special)
        if data is not None:
            return self._utf8.decode(data)
        self._held.append(id)
        text = self._tail()
        # A character cut in half decodes to the replacement mark; more ids will complete it.
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._give(text)

    def flush(self) -> str:
        """The text still held back, with replacement marks for bytes that form no character."""
        return self._utf8.decode(b"", final=True) + self._give(self._tail())

    def _tail(self) -> str:
        known = self._tokenizer.decode(self._before, self._skip_special)
        whole = self._tokenizer.decode(self._before + self._held, self._skip_special)
        return whole[len(known) :]

    def _give(self, text: str) -> str:
        if text:
            self._before = self._held
            self._held = []
        return text


def _build(tree: dict[str, Any]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(json.dumps(tree))
    made.no_padding()
    made.no_truncation()
    return made

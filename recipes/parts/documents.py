"""Records to token ids: plain text, prompt and completion, conversations; fill-in-the-middle."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from deepzoo.recipes.parts.records import DataError, Records
from deepzoo.zoo.chat_formats import THINK, THINK_END
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.fingerprint import digest
from deepzoo.zoo.prompt import encode, tokenizer_of
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model


class Documents(NamedTuple):
    """Token ids of many documents in one array.

    Attributes:
        tokens: int32 [sum of lengths].
        starts: int64 [D + 1], where each document begins; the last entry is the end.
        given: int32 [D], how many of a document's first tokens are read but not learned.
        places: where each came from, for messages.
    """

    tokens: np.ndarray
    starts: np.ndarray
    given: np.ndarray
    places: Sequence[str]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D]."""
        return np.diff(self.starts)

    def prompt(self, number: int) -> list[int]:
        """What is read but not learned of a document, at least its first token; `number` may be
        any, they are counted round and round."""
        at = number % len(self.given)
        return self.tokens[self.starts[at] :][: max(self.given[at], 1)].tolist()

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the ids, of where documents begin, and of what is learned of each."""
        return digest({"tokens": self.tokens, "starts": self.starts, "given": self.given})


def documents(
    pairs: Sequence[tuple[list[int], int]], places: Sequence[str], vocabulary: int
) -> Documents:
    """Joins (tokens, given) pairs.

    Raises:
        DataError: no documents, an empty one, an id outside the vocabulary; with its place.
    """
    if not pairs:
        raise DataError("no documents: the data is empty")
    for (ids, _), place in zip(pairs, places, strict=True):
        if not ids:
            raise DataError(f"{place}: has no tokens")
        if min(ids) < 0 or max(ids) >= vocabulary:
            bad = next(i for i in ids if not 0 <= i < vocabulary)
            raise DataError(
                f"{place}: token id {bad} is outside the model's vocabulary of {vocabulary}"
            )
    starts = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    tokens = np.fromiter((i for ids, _ in pairs for i in ids), np.int32, int(starts[-1]))
    return Documents(tokens, starts, np.array([g for _, g in pairs], np.int32), places)


def encoded(model: Model, records: Records, *, format: str | None = None) -> Documents:
    """Documents of records; the fields of the first record say which kind they are.

    {"text"}: all of it is learned. {"prompt", "completion"}: the completion is. {"messages"}: the
    last message is, an assistant's; the others are its prompt in the model's chat format. A
    completion may begin with a thought, `<think>...</think>`: the tags become the model's control
    tokens (where the prompt itself opens the thought, the opening tag is not repeated).

    Args:
        model: for tokenizer, vocabulary and chat format.
        records: see `records.read`.
        format: name of a chat format instead of the model's; {"prompt", "completion"} without a
            chat format are joined as they are.

    Raises:
        DataError: a field is missing or no text, or a text cannot be spelled; with file and line.
    """
    tokenizer = tokenizer_of(model)
    first = records[0]
    kind = next((k for k in _KINDS if k in first), None)
    if kind is None:
        has = ", ".join(sorted(map(str, first)))
        raise DataError(
            f"{records.places[0]}: expected a record with text, prompt and completion, or messages;"
            f" it has {has}"
        )
    pairs = []
    for index in range(len(records)):
        try:
            pairs.append(_KINDS[kind](model, tokenizer, records, index, format))
        except RequestError as error:
            raise DataError(f"{records.places[index]}: {error}") from None
    return documents(pairs, records.places, model.config.vocab_size)


def completion_ids(tokenizer: Tokenizer, text: str, *, opened: bool = False) -> list[int]:
    """Ids of what a model shall write: think tags as control tokens, then the end token.

    Args:
        tokenizer: the model's.
        text: may begin with `<think>` and hold one `</think>`.
        opened: whether the prompt has opened the thought.
    """
    text = text.removeprefix(THINK.text).removeprefix("\n") if opened else text
    pieces = []
    if not opened and text.startswith(THINK.text):
        pieces.append(THINK)
        text = text.removeprefix(THINK.text)
    thought, tag, answer = text.partition(THINK_END.text)
    pieces += [thought, THINK_END, answer] if tag else [text]
    return [*tokenizer.encode_pieces([p for p in pieces if p != ""]), tokenizer.eos_ids[0]]


def _of_text(model, tokenizer, records: Records, index: int, format) -> tuple[list[int], int]:
    prompt = tokenizer.encode_prompt(records.field(index, "text"))
    return [*prompt, tokenizer.eos_ids[0]], 1 if tokenizer.add_bos else 0


def _of_pair(model, tokenizer, records: Records, index: int, format) -> tuple[list[int], int]:
    return pair(
        model, records.field(index, "prompt"), records.field(index, "completion"), format=format
    )


def pair(
    model: Model, prompt: str | Sequence, completion: str, *, raw: bool = False,
    format: str | None = None,
) -> tuple[list[int], int]:  # fmt: skip
    """(tokens, given) of a prompt, in the model's chat format unless `raw`, and its completion."""
    tokenizer = tokenizer_of(model)
    asked = encode(model, prompt, raw=raw, format=format)
    ids = completion_ids(tokenizer, completion, opened=asked.thought)
    return [*asked.tokens, *ids], len(asked.tokens)


def _of_messages(model, tokenizer, records: Records, index: int, format) -> tuple[list[int], int]:
    messages, place = records[index].get("messages"), records.places[index]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{place}: messages must be a list of at least two messages")
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise DataError(f"{place}: the last message must be the assistant's; it is what is learned")
    if not isinstance(last.get("content"), str) or not last["content"]:
        raise DataError(f"{place}: the last message has no content")
    return pair(model, messages[:-1], last["content"], format=format)


_KINDS: dict[str, Callable] = {"messages": _of_messages, "prompt": _of_pair, "text": _of_text}


def fill_in_the_middle(
    made: Documents, tokenizer: Tokenizer, *, rate: float, seed: int
) -> Documents:
    """Rewrites a share of the documents as prefix, suffix, middle (V3 report, 4.1; PSM).

    `<fim_begin>` prefix `<fim_hole>` suffix `<fim_end>` middle end: the two cuts are uniform; the
    first token (bos) and the last (end) stay outside.

    Args:
        made: documents that begin with bos and end with the end token.
        tokenizer: has the three control tokens of the V3 family.
        rate: V3 took 0.1.
        seed: of the choice and the cuts; each document's depend on (seed, its number) alone.

    Raises:
        DataError: the tokenizer has no such tokens.
    """
    names = [f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end")]
    if missing := [n for n in names if n not in tokenizer.control]:
        raise DataError(
            f"fill-in-the-middle needs the control tokens {', '.join(missing)}; this tokenizer"
            " does not have them: set the rate to 0"
        )
    begin, hole, end = ([tokenizer.control[n]] for n in names)
    pairs = []
    for number in range(len(made.given)):
        ids = made.tokens[made.starts[number] : made.starts[number + 1]].tolist()
        given = int(made.given[number])
        rng = np.random.default_rng([seed, number])
        inner = ids[given:-1]
        if rng.random() < rate and len(inner) >= 3:
            a, b = sorted(rng.integers(0, len(inner) + 1, 2).tolist())
            body = [*begin, *inner[:a], *hole, *inner[b:], *end, *inner[a:b]]
            ids = [*ids[:given], *body, ids[-1]]
        pairs.append((ids, given))
    starts = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    tokens = np.fromiter((i for ids, _ in pairs for i in ids), np.int32, int(starts[-1]))
    return made._replace(tokens=tokens, starts=starts)

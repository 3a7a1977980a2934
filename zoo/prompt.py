"""From what a person typed to token ids: which chat format a model speaks, and its sampling
defaults."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepzoo.zoo import catalog
from deepzoo.zoo.card import Card
from deepzoo.zoo.chat import ChatFormat, chat_format, in_thought
from deepzoo.zoo.errors import RequestError, TokenizerError
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

Messages = Sequence[Mapping[str, Any]]

# The makers' advice for the reasoning models; used where neither the files nor the card say more.
TEMPERATURE, TOP_P = 0.6, 0.95

# SHA-256 of the chat templates as published -> the format that renders the same. The last one is
# that of the models trained here, `recipes/parts/countdown_tokenizer.py`.
_TEMPLATES = {
    "4e09291d600218e4974c2ddc9d2c9748cba04919746626bea599488cd57ad075": "v2_chat",
    "dbeb539659c622cfa79c8316c07d97e4b887ddfc6024c27fb9d7d4950c648002": "v2_0628",
    "54d400beedcd17f464e10063e0577f6f798fa896266a912d8a366f8a2fcc0bca": "v2_5",
    "1abb11869cb1ab4f7003d1c40de7c11b046c7844da22a67e6154d29e7d14d994": "v3",
    "22e97ba043dacf9df1f071a9de9d2bb6b0757491f16e96e810834b86e1641286": "v3_0324",
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "r1_first",
    "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64": "r1",
    "53671bac29bcb3e1f95f51b8c77d85a6011b66dc38bd23dce64eef04384a976b": "r1_0528",
    "286513e15735aef4cf7ad5ba04a69b6d1e3597e99baa9fc04b99ca08bc8e7e8e": "v3_1",
    "53163748371ddd5efad7a4cb7d977cccab8f95c85b8b3a65d2c2c00527613051": "v3_1_terminus",
    "0af7f5845651f3ba85a82d70d8af968a1da0a60f4c7bb662a9c305cfc9cc224c": "moonlight",
    "0152f862a7efc0a4a703172df53256b5b7d72f5fa534e1a4c714f2b479fc84b1": "r1",
}


class Prompt(NamedTuple):
    """tokens: ids to continue. thought: whether the answer begins inside an open <think> block."""

    tokens: list[int]
    thought: bool


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        TokenizerError: it has none.
    """
    if model.tokenizer is None:
        raise TokenizerError(
            f"{model.name or 'this model'} has no tokenizer.json, so text cannot be encoded; put"
            " the"
            " one of its family beside config.json"
        )
    return model.tokenizer


def card_of(model: Model) -> Card | None:
    """The card of a released or shipped model, found by its name; None for any other directory."""
    name = model.name.rsplit("/", 1)[-1].lower()
    return catalog.card(name) if name in catalog.models() else None


def format_of(model: Model, name: str | None = None) -> ChatFormat:
    """The chat format to use: the one named, else the card's, else the one of the template in the
    files or of the tokenizer.

    Raises:
        RequestError: the directory has a template that is none of the published ones.
    """
    if name is not None:
        return chat_format(name)
    card = card_of(model)
    if card is not None:
        if card.chat_format is None:
            raise RequestError(
                f"the chat format of {card.name} is not known here; pass a format, or continue"
                " plain"
                " text (raw=True, --raw)"
            )
        return chat_format(card.chat_format)
    template = _template(model)
    if template is None:
        return chat_format("plain")
    digest = hashlib.sha256(template.encode()).hexdigest()
    if digest not in _TEMPLATES:
        raise RequestError(
            f"{model.name}: its chat template is none of the published ones and is not executed;"
            " name"
            " a format (format=, --format), or continue plain text (raw=True, --raw)"
        )
    return chat_format(_TEMPLATES[digest])


def _template(model: Model) -> str | None:
    """Text of the chat template: a file of its own in the model's directory, or in the settings of
    its tokenizer, which a model made in memory has, too."""
    if model.source is not None:
        if (own := model.source / "chat_template.jinja").is_file():
            return own.read_text()
        found = _json(model.source / "tokenizer_config.json").get("chat_template")
        return found if isinstance(found, str) else None
    return None if model.tokenizer is None else model.tokenizer.chat_template


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > 64 << 20:
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sampling_defaults(model: Model) -> tuple[float, float]:
    """Temperature and top-p: generation_config.json of the directory, else the card, else 0.6 and
    0.95."""
    found = _json(model.source / "generation_config.json") if model.source else {}
    if found.get("do_sample") is False:
        return 0.0, 1.0
    card = card_of(model)
    temperature = found.get("temperature", card.temperature if card else None)
    top_p = found.get("top_p", card.top_p if card else None)
    return (
        TEMPERATURE if temperature is None else float(temperature),
        TOP_P if top_p is None else float(top_p),
    )


def encode(
    model: Model,
    prompt: str | Messages,
    *,
    raw: bool = False,
    format: str | None = None,
    thinking: bool | None = None,
) -> Prompt:
    """Token ids of a prompt; text that spells a control token is encoded as text.

    Args:
        model: for its tokenizer and chat format.
        prompt: what the user says, or a list of {"role", "content"} messages.
        raw: continue a string as it is, after bos, without a chat format.
        format: name of a chat format instead of the model's.
        thinking: for formats with both modes.

    Raises:
        RequestError: messages with `raw`, an empty prompt, a malformed message, an unknown format.
        TokenizerError: the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    if not prompt:
        raise RequestError("the prompt is empty; give it some text")
    if raw:
        if not isinstance(prompt, str):
            raise RequestError("a raw prompt is a string; messages need a chat format")
        return Prompt(tokenizer.encode_prompt(prompt), False)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chosen = format_of(model, format)
    if not chosen.chat and isinstance(prompt, str):
        return Prompt(tokenizer.encode_prompt(prompt), False)
    pieces = chosen(messages, thinking=thinking, bos=tokenizer.bos_token or "")
    return Prompt(tokenizer.encode_pieces(pieces), in_thought(pieces))

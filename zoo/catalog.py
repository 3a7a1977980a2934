"""Every model the zoo knows by name: the released ones, and the ones that ship with the package.

A shipped model is a folder of `zoo/pretrained/` in the published layout: `config.json`, weights,
tokenizer, and `card.json` with the fields of `Card` (what it lacks is filled in).
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from deepzoo.zoo import files, r1, students, v2
from deepzoo.zoo.card import Card, Certainty
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import ConfigError

PRETRAINED = Path(__file__).parent / "pretrained"

_RELEASED = {card.name: (config, card) for config, card in v2.MODELS + r1.MODELS + students.MODELS}


def models() -> list[str]:
    """Names of every released model the zoo defines, then of the models that ship with it."""
    return [*_RELEASED, *_shipped()]


def config(name: str) -> Config:
    """The configuration of a model by name, such as "deepseek-r1" or "moonlight-16b-a3b".

    Raises:
        ConfigError: no such model; the message names the nearest ones.
    """
    if (directory := _shipped().get(_known(name))) is not None:
        return read_config(directory)
    return _RELEASED[_known(name)][0]


def card(name: str) -> Card:
    """What is published about a model, and how sure each value is.

    Raises:
        ConfigError: no such model; the message names the nearest ones.
    """
    if (directory := _shipped().get(_known(name))) is not None:
        return _shipped_card(_known(name), directory)
    return _RELEASED[_known(name)][1]


def shipped_directory(name: str) -> Path | None:
    """The folder of a model that ships with the package, or None for every other name."""
    return _shipped().get(name.lower())


def read_config(directory: Path) -> Config:
    """The configuration of a local model directory.

    Raises:
        ConfigError: `config.json` is missing, damaged, or not a model of these families.
    """
    try:
        return Config.from_hf(files.read_config(directory))
    except ConfigError as error:
        text = str(error)
        named = text if str(directory) in text else f"{directory / 'config.json'}: {text}"
        raise ConfigError(named) from None


def _known(name: str) -> str:
    lower = name.lower()
    names = models()
    if lower in names:
        return lower
    tail = lower.rsplit("/", 1)[-1]  # a hub id: the names here are repository names in lower case
    if tail != lower and tail in names:
        return tail
    near = [known for known in names if tail and tail in known]
    near += [n for n in difflib.get_close_matches(tail, names, n=3) if n not in near]
    hint = f"did you mean {', '.join(near[:3])}?" if near else "`deepzoo models` lists all"
    raise ConfigError(f"no model is called {name!r}; {hint}")


def _shipped() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(PRETRAINED.glob("*/config.json"))}


_CARD_FIELDS = {field.name for field in dataclasses.fields(Card)} - {"name", "repo"}


def _shipped_card(name: str, directory: Path) -> Card:
    path = directory / "card.json"
    values: dict[str, Any] = {
        "summary": "trained by this repository's own recipes",
        "parameters": "",
        "context": read_config(directory).max_position_embeddings,
        "licence": "Apache-2.0",
        "certainty": {},
    }
    if path.is_file():
        values |= files.read_json(directory, path.name, ConfigError)
    if unknown := set(values) - _CARD_FIELDS:
        fields = ", ".join(sorted(_CARD_FIELDS))
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}; a card has {fields}")
    # Made here, so everything is known unless the card says otherwise.
    values["certainty"] = Certainty(
        **{"config": "A", "sampling": "A", "chat": "A", **values["certainty"]}
    )
    for key in ("open", "sources"):
        values[key] = tuple(values.get(key, ()))
    training = values.get("training", {})
    values["training"] = tuple((key, str(value)) for key, value in training.items())
    return Card(name=name, repo=None, **values)

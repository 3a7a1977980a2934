"""Model cards: what was published about a model, and how sure each value is."""

import json
from dataclasses import dataclass
from typing import Any, Literal

type Grade = Literal["A", "B", "C"]
"""A: the model's own published file, or two independent sources agree. B: a sibling's file, with
the values that can differ confirmed, or the publisher's text elsewhere. C: recalled or inferred."""

GRADES = {
    "A": "read from the model's own published file, or confirmed by two independent sources",
    "B": "from a sibling's file or the publisher's own text; what can differ was confirmed",
    "C": "not confirmed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Certainty:
    """How sure each group of values is: the config, size and context, licence, sampling, chat."""

    config: Grade
    size: Grade = "A"
    licence: Grade = "A"
    sampling: Grade = "C"
    chat: Grade = "C"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What is published about one released model, in this project's words.

    Attributes:
        name: what `zoo.config` and the command line call it: the repository's name in lower case.
        repo: hub repository, or None for a model trained here.
        summary: one line: what it is and what it came from.
        parameters, active: sizes as published ("671B", "37B"); active is None for dense models.
        context: tokens the publisher claims, which is not `max_position_embeddings`.
        licence: of the weights.
        temperature, top_p: the publisher's sampling defaults, None where none is known.
        chat_format: name of the format in `deepzoo.zoo.chat`; "plain" for base models, None where
            the format is not known.
        forced_think: the generation prompt ends inside an open `<think>` block.
        certainty: how sure each group of values is.
        open: what is not confirmed, one sentence each.
        sources: where the values come from.
        training: for a model trained here: recipe, command, seed, wall time, scores.
        task: for a model trained here: what it answers, a task of the recipes.
    """

    name: str
    repo: str | None
    summary: str
    parameters: str
    active: str | None = None
    context: int
    licence: str
    temperature: float | None = None
    top_p: float | None = None
    chat_format: str | None = None
    forced_think: bool = False
    certainty: Certainty
    open: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    training: tuple[tuple[str, str], ...] = ()
    task: str | None = None

    @property
    def is_base(self) -> bool:
        """Pretrained only: it continues a text and knows no roles."""
        return self.chat_format == "plain"


def inert(base: tuple[tuple[str, str], ...] = (), **values: Any) -> tuple[tuple[str, str], ...]:
    """`Config.inert` with `values` added to `base`: keys that are only kept for `Config.to_hf`."""
    texts = {key: json.dumps(value, sort_keys=True) for key, value in values.items()}
    return tuple(sorted((dict(base) | texts).items()))

"""Decoding with the MTP layer's drafts against plain decoding: acceptance and speed.

Paper: DeepSeek-V3 (arXiv 2412.19437), 5.4.3: the second token predicted by the MTP layer is
accepted in 85 to 90% of the cases, which makes decoding 1.8 times as fast.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.generate import Statistics, generate
from deepzoo.zoo.types import Model


class Row(NamedTuple):
    """Of one temperature.

    drafted, accepted: drafts that were checked, and those of them that stood.
    plain, drafts: tokens a second without and with drafts, medians of the rounds.
    same: share of the prompts whose answers are equal with and without drafts; at temperature 0
        they may differ only where two tokens are nearly equally likely.
    """

    temperature: float
    drafted: int
    accepted: int
    plain: float
    drafts: float
    same: float

    @property
    def acceptance(self) -> float:
        """Share of drafts that stood."""
        return self.accepted / self.drafted

    @property
    def ratio(self) -> float:
        """Speed-up by drafts."""
        return self.drafts / self.plain


def bench(
    model: Model,
    prompts: Sequence[str],
    *,
    raw: bool,
    temperatures: Sequence[float] = (0.0, 0.6),
    top_p: float = 0.95,
    max_tokens: int = 256,
    rounds: int = 5,
    told: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Answers the prompts one after the other, plainly and with drafts, round by round in turn.

    Args:
        model: with a tokenizer and an MTP layer.
        prompts: what is asked.
        raw: whether prompts are continued as they are, without a chat format.
        temperatures: a row each; 0 for greedy.
        top_p: nucleus.
        max_tokens: of an answer.
        rounds: of each; the round before them, which compiles, is not counted.
        told: hears what is being done.

    Raises:
        RequestError: the model has no MTP layer, or wrote too little for a draft.
    """
    if not model.config.num_nextn_predict_layers:
        raise RequestError("this model has no MTP layer to draft with; name one that has")
    rows = []
    for temperature in temperatures:
        rates: dict[bool, list[float]] = {False: [], True: []}
        texts: dict[bool, list[str]] = {}
        found = Statistics()
        for round in range(rounds + 1):
            for drafts in (False, True):
                told(f"temperature {temperature:g}, round {round} of {rounds}")
                counted = found if drafts else Statistics()
                begin = time.perf_counter()
                made = generate(
                    model, prompts, slots=1, statistics=counted, raw=raw, max_tokens=max_tokens,
                    temperature=temperature, top_p=top_p, speculative=drafts,
                )  # fmt: skip
                if round:
                    rates[drafts].append(counted.tokens / (time.perf_counter() - begin))
                texts[drafts] = [answer.text for answer in made]
        if not found.drafted:
            raise RequestError("the answers are too short for a draft; ask something else")
        same = sum(map(str.__eq__, texts[False], texts[True])) / len(prompts)
        plain, drafted = (statistics.median(rates[drafts]) for drafts in (False, True))
        rows.append(Row(temperature, found.drafted, found.accepted, plain, drafted, same))
    return rows


HEADER = (
    "temperature", "drafts accepted", "plain, tokens/s", "with drafts, tokens/s", "ratio",
    "same answers",
)  # fmt: skip


def line(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    return (
        f"{row.temperature:g}", f"{row.accepted:,} of {row.drafted:,} = {row.acceptance:.1%}",
        f"{row.plain:.0f}", f"{row.drafts:.0f}", f"{row.ratio:.2f}", f"{row.same:.1%}",
    )  # fmt: skip

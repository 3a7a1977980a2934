"""Answers of the policy itself, with what reinforcement learning needs to know of each token.

P prompts  G answers of each  N = P*G answers  T positions of prompt and answer
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepzoo.recipes.parts.advantage import dead
from deepzoo.recipes.parts.problems import Verdict
from deepzoo.recipes.parts.step import Mean
from deepzoo.zoo.config import Config
from deepzoo.zoo.engine import Engine, Request
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params


class Trajectories(NamedTuple):
    """N answers in rows of T positions; answers of one prompt lie side by side.

    Attributes:
        tokens: int32 [N, T], prompt, answer, padding.
        mask: float32 [N, T], 1 where the token was written by the model, its end token included.
        logprobs: float32 [N, T], of those tokens, as the generator reported them (temperature 1).
        group: int32 [N], index of the prompt.
        truncated: bool [N], answers that reached the limit without an end token.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    group: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int [N], tokens of each answer."""
        return self.mask.sum(axis=1).astype(int)

    @property
    def ends(self) -> np.ndarray:
        """int [N], tokens of each row, prompt included; what follows is padding."""
        return self.tokens.shape[1] - (self.mask[:, ::-1] > 0).argmax(axis=1)

    def answer(self, row: int) -> list[int]:
        """Ids of one answer, its end token included."""
        return self.tokens[row][self.mask[row] > 0].tolist()

    def take(self, rows: np.ndarray | slice) -> "Trajectories":
        """Some of the rows."""
        return Trajectories(*(a[rows] for a in self))


def rollout(
    config: Config,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    answers: int,
    max_tokens: int,
    width: int,
    eos_ids: Sequence[int],
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 64,
) -> Trajectories:
    """Samples `answers` continuations of every prompt.

    Answer g of prompt p is drawn with a seed that depends on (seed, p, g) alone: the same call
    gives the same answers, whatever `slots` is.

    Args:
        config: the model.
        params: its parameters, router biases included.
        prompts: ids, at least one each.
        answers: of each prompt.
        max_tokens: of an answer.
        width: T, the same for all calls of a run, so that nothing is compiled again.
        eos_ids: ids that end an answer.
        seed: from (recipe's seed, step).
        temperature: of sampling; above 0.
        top_p: nucleus; below 1 the reported log-probabilities are still those of the whole
            distribution.
        slots: answers that are written together.

    Raises:
        RequestError: a prompt that leaves too little of `width` for an answer.
    """
    longest = max(map(len, prompts))
    if longest + max_tokens > width:
        raise RequestError(
            f"a prompt of {longest} tokens and answers of {max_tokens} do not fit in {width}"
            " positions; shorten one or raise the other"
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts) * answers)
    requests = [
        Request(list(prompt), max_tokens, temperature, top_p, seed=int(seeds[p * answers + g]))
        for p, prompt in enumerate(prompts)
        for g in range(answers)
    ]
    count = len(requests)
    engine = Engine(config, params, slots=min(slots, count), capacity=width, eos_ids=eos_ids)
    tokens = np.zeros((count, width), np.int32)
    mask, logprobs = (np.zeros((count, width), np.float32) for _ in range(2))
    truncated = np.zeros((count,), bool)
    at = np.array([len(r.tokens) for r in requests])
    for row, request in enumerate(requests):
        tokens[row, : at[row]] = request.tokens
    for event in engine.run(requests):
        row, new = event.request, len(event.tokens)
        place = slice(at[row], at[row] + new)
        tokens[row, place], logprobs[row, place], mask[row, place] = (
            event.tokens, event.logprobs, 1.0
        )  # fmt: skip
        at[row] += new
        truncated[row] |= event.finish == "length"
    group = np.repeat(np.arange(len(prompts), dtype=np.int32), answers)
    return Trajectories(tokens, mask, logprobs, group, truncated)


def replaced(
    made: Trajectories,
    verdicts: Sequence[Verdict],
    gone: np.ndarray,
    fresh: Trajectories,
    fresh_verdicts: Sequence[Verdict],
) -> tuple[Trajectories, list[Verdict]]:
    """Answers and their verdicts with whole groups replaced by others, in order.

    Args:
        made: P groups.
        verdicts: of its answers.
        gone: bool [P], groups to replace.
        fresh: as many groups as are True there.
        fresh_verdicts: of those answers.
    """
    each = len(verdicts) // len(gone)
    fields, out = [np.array(a) for a in made], list(verdicts)
    for i, p in enumerate(np.flatnonzero(gone).tolist()):
        place, source = (slice(at * each, at * each + each) for at in (p, i))
        for mine, theirs in zip(fields, fresh, strict=True):
            mine[place] = theirs[source]
        out[place] = fresh_verdicts[source]
    return Trajectories(*fields)._replace(group=made.group), out


def minibatches(batch: Mapping[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    """`batch` in `count` parts of as many whole groups, in the order they were sampled."""
    cuts = zip(*(np.split(a, count) for a in batch.values()), strict=True)
    return [dict(zip(batch, cut, strict=True)) for cut in cuts]


def figures(
    made: Trajectories, verdicts: Sequence[Verdict], rewards: np.ndarray
) -> dict[str, Mean]:
    """What a log shows of a rollout; answers without a verdict count in `dropped` alone.

    Args:
        made: N answers.
        verdicts: components of each one's reward; the first one names them all.
        rewards: float64 [P, G], NaN without a verdict.
    """

    def mean(values) -> Mean:
        values = np.asarray(values, np.float64)
        there = ~np.isnan(values)
        total: Any = np.where(there, values, 0).sum()
        return Mean(total, there.sum())

    told = {"reward": mean(rewards), "length": mean(made.lengths)}
    told |= {f"reward/{k}": mean([v[k] for v in verdicts]) for k in verdicts[0] if k != "accuracy"}
    told["accuracy"] = mean([v["accuracy"] for v in verdicts])
    told["truncated"] = mean(made.truncated)
    told["dead_groups"] = mean(dead(rewards))
    told["dropped"] = mean(np.isnan(rewards))
    return told


def step_seed(seed: int, step: int, use: int = 0) -> int:
    """A seed for one step of a run, and one use of it; a pure function, independent streams."""
    return int(np.random.SeedSequence([seed, step, use]).generate_state(1)[0])

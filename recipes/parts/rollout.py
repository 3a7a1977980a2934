"""Answers of the policy itself, with what reinforcement learning needs to know of each token.

P prompts  G answers of each  N = P*G answers  T positions of prompt and answer
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


def step_seed(seed: int, step: int, use: int = 0) -> int:
    """A seed for one step of a run, and one use of it; a pure function, independent streams."""
    return int(np.random.SeedSequence([seed, step, use]).generate_state(1)[0])

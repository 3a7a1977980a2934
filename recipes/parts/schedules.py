"""Learning rates and batch sizes over a run, as the papers set them.

A schedule gives the **factor** of the peak rate for a step, so that two optimisers with two peaks
share it: `scaled(2.4e-4, v2(steps))`. Where a paper counts in tokens and the batch grows, the share
of tokens that a step has behind it comes from `ramp`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

type Schedule = Callable[[Any], Any]
"""Step, an int or int32 [] -> factor or share, float32 []."""


def scaled(peak: float, factor: Schedule) -> Schedule:
    """The rate itself."""
    return lambda step: peak * factor(step)


def shares(steps: int) -> Schedule:
    """Share of the run that lies before a step, for a batch of constant size."""
    return lambda step: jnp.asarray(step, jnp.float32) / steps


def warmup_constant_decay(steps: int, warmup: float, decay: float) -> Schedule:
    """Up over the first share `warmup`, 1, down to 0 over the last share `decay`."""

    def factor(step):
        done = (step + 1) / steps
        up, down = done / max(warmup, 1e-9), (1 - done + 1 / steps) / max(decay, 1e-9)
        return jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return factor


def warmup_cosine(steps: int, warmup: int = 0, last: float = 0.1) -> Schedule:
    """Up over `warmup` steps, then half a cosine down to `last`, reached in the last step.

    R1's supervised stages and the distillations: to a tenth (Nature supplement B.4.2, B.4.3).
    """

    def factor(step):
        done = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
        down = last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < warmup, (step + 1) / max(warmup, 1), down)

    return factor


def v2(
    steps: int,
    warmup: int = 2000,
    drops: Sequence[float] = (0.6, 0.9),
    by: float = 0.316,
    share: Schedule | None = None,
) -> Schedule:
    """V2 (arXiv 2405.04434, 3.1.2): linear warm-up, then times `by` at each of two shares.

    V2-Lite: drops at 0.8 and 0.9 (appendix B).

    Args:
        steps: in all.
        warmup: steps.
        drops: shares of all tokens.
        by: factor of each drop.
        share: step -> share of all tokens before it; of steps by default.
    """
    share = share or shares(steps)

    def factor(step):
        fallen = sum(jnp.where(share(step) >= at, 1.0, 0.0) for at in drops)
        return jnp.minimum((step + 1) / max(warmup, 1), 1.0) * by**fallen

    return factor


# V3 (arXiv 2412.19437, 4.2), in tokens of 14.8T: constant to 10T, cosine over 4.3T to a tenth,
# constant for 333B, then 7.3e-6 of 2.2e-4 for the last 167B.
_V3_COSINE, _V3_LOW, _V3_LAST = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8


def v3(steps: int, warmup: int = 2000, share: Schedule | None = None) -> Schedule:
    """V3 (arXiv 2412.19437, 4.2): warm-up, constant, cosine to a tenth, two constants.

    Arguments as for `v2`.
    """
    share = share or shares(steps)

    def factor(step):
        at = share(step)
        done = jnp.clip((at - _V3_COSINE) / (_V3_LOW - _V3_COSINE), 0.0, 1.0)
        cosine = 0.1 + 0.9 * 0.5 * (1 + jnp.cos(jnp.pi * done))
        up = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        return up * jnp.where(at >= _V3_LAST, 7.3e-6 / 2.2e-4, cosine)

    return factor


def v3_bias_rate(gamma: float, share: Schedule) -> Schedule:
    """V3's gamma of eq. 16: as given up to 14.3T of 14.8T tokens, then 0."""
    return lambda step: jnp.where(share(step) < _V3_LOW, gamma, 0.0)


def v3_mtp_weight(share: Schedule, first: float = 0.3, last: float = 0.1) -> Schedule:
    """V3's lambda of eq. 25: 0.3 for 10T of 14.8T tokens, then 0.1."""
    return lambda step: jnp.where(share(step) < _V3_COSINE, first, last)


class Ramp(NamedTuple):
    """A batch that grows.

    Attributes:
        rows: step -> rows of its batch; what the data asks.
        tokens: step -> tokens of all steps before it.
        share: step -> the same as a share of all tokens; for schedules, works on traced steps.
        steps: of the whole run.
    """

    rows: Callable[[int], int]
    tokens: Callable[[int], int]
    share: Schedule
    steps: int


def ramp(first: int, last: int, until: float, total: float, length: int, multiple: int = 1) -> Ramp:
    """From `first` to `last` rows, linearly in tokens, over the first `until` tokens.

    V2: 2304 to 9216 over 225B of 8.1T tokens; V3: 3072 to 15360 over 469B of 14.8T.

    Args:
        first: rows of the first batch.
        last: rows from `until` on.
        until: tokens.
        total: tokens of the run.
        length: tokens of a row.
        multiple: rows are rounded down to a multiple of this (of devices, of micro-batches).
    """
    sizes, before = [], [0]
    while before[-1] < min(until, total):
        grown = first + (last - first) * before[-1] / until
        sizes.append(max(int(grown) // multiple * multiple, multiple))
        before.append(before[-1] + sizes[-1] * length)
    n, end, step_tokens = len(sizes), before[-1], last * length
    steps = n + math.ceil(max(total - end, 0) / step_tokens)
    table = np.asarray(before, np.float64) / total

    def rows(step: int) -> int:
        return sizes[step] if step < n else last

    def tokens(step: int) -> int:
        return before[step] if step <= n else end + (step - n) * step_tokens

    def share(step):
        step = jnp.asarray(step)
        early = jnp.asarray(table, jnp.float32)[jnp.clip(step, 0, n)]
        late = jnp.float32(table[-1]) + (step - n) * jnp.float32(step_tokens / total)
        return jnp.where(step <= n, early, late)

    return Ramp(rows, tokens, share, steps)

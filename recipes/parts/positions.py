"""Loss by the place of a token in its document: what a longer context is worth.

N rows  T positions  R ranges of places
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.losses import shifted
from deepzoo.zoo.config import Config
from deepzoo.zoo.model import Params

_Z = 1.959964  # of a normal, 95% within


class Held(NamedTuple):
    """Held-out rows, and where each target lies.

    Attributes:
        batch: arrays [N, T + 1], as a loss takes them.
        edges: R + 1 bounds of the ranges.
        share: float64 [R, N, T], what each target counts in a range; 0 outside.
    """

    batch: Mapping[str, np.ndarray]
    edges: list[int]
    share: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """Of all targets of a row in a range, float64 [N, R]."""
        return self.share.sum(axis=2).T

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        """(from, to) of each."""
        return itertools.pairwise(self.edges)


def held(batch: Mapping[str, np.ndarray], first: int) -> Held:
    """Sorts the targets of rows by how much of their document is before them.

    A place is the position of the last token that the model sees, from 0 on: in its document where
    those of a row do not see each other, else in the row. The first range is 0 to `first`, the old
    context, and each ends at twice the place of the one before, the last with the row.

    Args:
        batch: "tokens", "segments" and "weights" [N, T + 1].
        first: positions of the old context.
    """
    inside, length = batch["segments"], batch["segments"].shape[1] - 1
    begins = np.ones((len(inside), length), bool)
    begins[:, 1:] = inside[:, 1:-1] != inside[:, :-2]
    at = np.arange(length)
    place = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    edges = [0]
    while first < length:
        edges.append(first)
        first *= 2
    edges.append(length)
    weight = np.asarray(shifted(jax.tree.map(jax.numpy.asarray, dict(batch)), 1)[1], np.float64)
    which = np.digitize(place, edges[1:-1])
    return Held(batch, edges, np.stack([weight * (which == r) for r in range(len(edges) - 1)]))


@functools.partial(jax.jit, static_argnames="config")
def _logprobs(config: Config, params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return score(config, params, tokens, segments).logprobs


def measure(config: Config, params: Params, rows: Held, at_once: int) -> np.ndarray:
    """Negative log-probabilities in nats, summed over each row's targets in a range: [N, R].

    Args:
        config: the model.
        params: its parameters.
        rows: to measure on.
        at_once: rows of one pass, at most.
    """
    count, found = len(rows.batch["tokens"]), []
    some = math.gcd(count, at_once)  # passes of one shape
    for at in range(0, count, some):
        tokens, segments = (rows.batch[k][at : at + some] for k in ("tokens", "segments"))
        logprobs = processes.on_host(_logprobs(config, params, tokens, segments))
        found.append(logprobs.astype(np.float64))
    return -np.einsum("nt,rnt->nr", np.concatenate(found), rows.share)


def means(rows: Held, found: np.ndarray) -> np.ndarray:
    """Mean loss of each range, float64 [R]; NaN where there is no target."""
    weight = rows.weight.sum(axis=0)
    return np.where(weight > 0, found.sum(axis=0) / np.maximum(weight, 1e-9), np.nan)


def change(rows: Held, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference of two mean losses by range, and half the width of its 95% interval: [R] each.

    Rows are independent, targets within one are not: the interval is that of a ratio of two sums
    over rows, from what each row leaves over.
    """
    weight, apart = rows.weight, after - before
    mean = means(rows, apart)
    left, count = apart - weight * np.nan_to_num(mean), len(weight)
    error = np.sqrt(count / max(count - 1, 1) * (left**2).sum(axis=0))
    return mean, _Z * error / np.maximum(weight.sum(axis=0), 1e-9)


def compared(rows: Held, found: Sequence[np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each range that has targets: losses by name, and the change to the last.

    Args:
        rows: measured on.
        found: `measure` of several models, first to last.
        names: of them.
    """
    losses = [means(rows, f) for f in found]
    apart, half = change(rows, found[0], found[-1])
    weight = rows.weight.sum(axis=0)
    return [
        {"from": low, "to": high, "targets": int(weight[r])}
        | {name: float(loss[r]) for name, loss in zip(names, losses, strict=True)}
        | {"change": float(apart[r]), "interval": float(half[r])}
        for r, (low, high) in enumerate(rows.ranges)
        if weight[r]
    ]


def table(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The same as Markdown."""
    titles = ["tokens before", "targets", *names, "change (95% interval)"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in records:
        cells = [f"{r['from']:,} to {r['to']:,}", f"{r['targets']:,}"]
        cells += [f"{r[name]:.4f}" for name in names]
        cells.append(f"{r['change']:+.4f} ± {r['interval']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

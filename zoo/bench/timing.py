"""Times of device functions, without what starting them costs.

A loop inside one compiled program calls the function again and again; an optimisation barrier ties
each call's inputs to the result of the call before, so that no call can be moved out of the loop,
merged with another or cut down to the element that is read. Two trip counts are timed in turn, and
the time of a call is the slope between them: whatever a start or a synchronisation costs cancels.
Inputs are rotated so that they do not stay in the level-2 cache from one call to the next.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROTATED = 8  # copies of the inputs at most
LEAST = 0.02  # seconds that the shorter of the two loops should take


class Timing(NamedTuple):
    """Seconds of one call.

    seconds: the median. low, high: the smallest and the largest slope.
    calls: in the longer of the two loops.
    cold: whether the inputs, with their copies, are at least twice the cache.
    """

    seconds: float
    low: float
    high: float
    calls: int
    cold: bool


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copies(inputs: Any, cache: int) -> int:
    """How many sets of inputs fill the cache twice, at most `ROTATED`."""
    return max(1, min(ROTATED, -(-2 * cache // max(1, nbytes(inputs)))))


def repeated(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """(count, sets of inputs) -> float32 scalar, after `count` rounds of a call on every set."""

    def loop(count: jax.Array, sets: Sequence[tuple[Any, ...]]) -> jax.Array:
        def body(_: Any, token: jax.Array) -> jax.Array:
            for inputs in sets:
                inputs, token = jax.lax.optimization_barrier((inputs, token))
                result = jax.lax.optimization_barrier(function(*inputs))
                leaf = jax.tree.leaves(result)[0]
                # Added, not assigned: a token that the next call's overwrites would be dead, and
                # XLA takes dead elements out of a barrier, and with them the call.
                token = token + leaf[(0,) * leaf.ndim].astype(jnp.float32)
            return token

        return jax.lax.fori_loop(0, count, body, jnp.zeros((), jnp.float32))

    return loop


def measure(
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    *,
    cache: int = 0,
    rounds: int = 9,
    seconds: float = 30,
) -> Timing:
    """Median time of one call of `function`.

    Args:
        function: of the arrays of one set; compiled as a part of the loop.
        sets: equal sets of inputs, on the device.
        cache: bytes of the device's level-2 cache.
        rounds: pairs of loops.
        seconds: after which no further pair begins; at least three are measured.
    """
    loop = jax.jit(repeated(function))

    def timed(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(jnp.asarray(count, jnp.int32), sets))
        return time.perf_counter() - start

    timed(1)  # compiles
    count, least = 1, timed(1)
    while least < LEAST and count < 1 << 20:
        count *= 2 if least > LEAST / 4 else 4
        least = timed(count)
    begin, slopes = time.perf_counter(), []
    for n in range(rounds):
        if n >= 3 and time.perf_counter() - begin > seconds:
            break
        short, long = timed(count), timed(3 * count)
        slopes.append((long - short) / (2 * count * len(sets)))
    cold = nbytes(sets) >= 2 * cache
    return Timing(statistics.median(slopes), min(slopes), max(slopes), 3 * count * len(sets), cold)

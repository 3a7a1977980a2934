"""The compiled programs of generation: prefill into rows of a state, and loops of decode steps.

Shapes do not depend on lengths, so a process compiles the decode loop once for a few batch sizes
and a capacity, and the prefill once for a few bucket sizes.
B rows (slots)  T prompt bucket  S capacity  V vocabulary  N loop steps
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.zoo.cache import Cache
from deepzoo.zoo.cache import cache as empty_cache
from deepzoo.zoo.config import Config
from deepzoo.zoo.functional import bind
from deepzoo.zoo.model import Params
from deepzoo.zoo.sample import DRAFT, Sampling, choose, draw, log_distribution, verify

PREFILL_CHUNK = 512  # longer prompts go through in pieces, so that attention scores stay small


class Drafts(NamedTuple):
    """Speculative state: token int32 [B] proposed to follow `State.token`, and its log-distribution
    [B, V]."""

    token: jax.Array
    logp: jax.Array


class State(NamedTuple):
    """Everything a decode step reads and writes; arrays over B rows.

    cache: holds all tokens but the last.
    token: int32, the last token, not yet in the cache.
    step: int32, tokens generated so far.
    budget: int32, tokens the request may have.
    done: bool, ended or empty; such a row stands still.
    drafts: with speculative decoding.
    """

    cache: Cache
    token: jax.Array
    step: jax.Array
    budget: jax.Array
    done: jax.Array
    sampling: Sampling
    drafts: Drafts | None


def empty(
    config: Config, params: Params, slots: int, capacity: int, *, speculative: bool = False
) -> State:
    """`slots` rows of `capacity` tokens, none of them taken."""
    # A row that is done stands one token before its end at most, and is still written to; the
    # draft behind it would be the only one outside.
    spare = 1 if speculative else 0

    def rows(dtype: Any = jnp.int32, fill: float = 0) -> jax.Array:  # donated: no sharing
        return jnp.full((slots,), fill, dtype)

    real = jnp.float32
    logp = jnp.zeros((slots, config.vocab_size), real)
    return State(
        cache=empty_cache(config, slots, capacity + spare, stacked=False, dtype=_dtype(params)),
        token=rows(),
        step=rows(),
        budget=rows(),
        done=rows(bool, True),
        sampling=Sampling(rows(real), rows(real, 1), rows(), rows(real), rows(jnp.uint32)),
        drafts=Drafts(rows(), logp) if speculative else None,
    )


@jax.jit
def of_rows(state: State, rows: jax.Array) -> State:
    """Some of the rows, int32 [B']."""
    return jax.tree.map(lambda a: a[rows], state)


def _dtype(params: Params) -> Any:
    return params["embed_tokens"]["weight"].dtype


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: Config,
    params: Params,
    state: State,
    tokens: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    budget: jax.Array,
    sampling: Sampling,
    eos: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """Runs G prompts [G, T] from an empty cache and puts them into rows `slots` of the state.

    Returns:
        The state, and each prompt's first token and its log-probability, [G].
    """
    model = bind(config, params)
    count, bucket = tokens.shape
    own = empty_cache(config, count, bucket, stacked=False, dtype=_dtype(params))
    hidden = []
    for start in range(0, bucket, PREFILL_CHUNK):
        part = tokens[:, start : start + PREFILL_CHUNK]
        # Rows that have ended keep running on padding; only the lengths below say what counts.
        out = model(part, own._replace(lengths=jnp.full((count,), start)), logits=False)
        assert out.cache is not None
        own = out.cache
        hidden.append(out.hidden)
    hidden = jnp.concatenate(hidden, axis=1)
    rows = jnp.arange(count)
    logits = model.logits(hidden[rows, lengths - 1])
    step = jnp.zeros((count,), jnp.int32)
    token, logprob = choose(logits, sampling, step)
    own = own._replace(lengths=lengths)
    drafts = None
    if state.drafts is not None:
        shifted = jnp.roll(tokens, -1, axis=1).at[rows, lengths - 1].set(token)
        out = model.predict_next(
            hidden, shifted, own._replace(lengths=jnp.zeros_like(lengths)), logits=False
        )
        assert out.cache is not None
        own = own._replace(layers=out.cache.layers)
        logp = log_distribution(model.logits(out.hidden[rows, lengths - 1]), sampling)
        drafts = Drafts(draw(logp, sampling, step + 1, DRAFT), logp)

    def place(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slots].set(new, mode="drop")

    def place_cache(old: jax.Array, new: jax.Array) -> jax.Array:
        width = min(bucket, old.shape[1])
        return old.at[slots, :width].set(new[:, :width], mode="drop")

    done = (token[:, None] == eos).any(axis=-1) | (budget <= 1)
    state = State(
        Cache(
            jax.tree.map(place_cache, state.cache.layers, own.layers),
            place(state.cache.lengths, lengths),
        ),
        place(state.token, token),
        place(state.step, step + 1),
        place(state.budget, budget),
        place(state.done, done),
        jax.tree.map(place, state.sampling, sampling),
        jax.tree.map(place, state.drafts, drafts),
    )
    return state, token, logprob


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def decode(
    config: Config, params: Params, state: State, eos: jax.Array, limit: jax.Array, steps: int
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Up to `steps` tokens for every row; stops early when `limit` rows are done.

    Returns:
        The state, tokens int32 [N, B], log-probabilities [N, B], and which of them count, bool [N,
        B].
    """
    model = bind(config, params)
    batch = state.token.shape[0]

    def body(carry):
        n, state, tokens, logprobs, kept = carry
        going = ~state.done
        out = model(state.token[:, None], state.cache, going.astype(jnp.int32))
        assert out.cache is not None
        token, logprob = choose(out.logits[:, 0], state.sampling, state.step)
        step = state.step + going
        ended = (token[:, None] == eos).any(axis=-1) | (step >= state.budget)
        tokens, logprobs = tokens.at[n].set(token), logprobs.at[n].set(logprob)
        state = state._replace(
            cache=out.cache,
            token=jnp.where(going, token, state.token),
            step=step,
            done=state.done | ended,
        )
        return n + 1, state, tokens, logprobs, kept.at[n].set(going)

    return _looped(body, state, limit, (steps, batch))


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def decode_drafted(
    config: Config, params: Params, state: State, eos: jax.Array, limit: jax.Array, steps: int
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Like `decode`, one or two tokens a step: the MTP layer's draft is checked by the model
    itself.

    The model reads the last token and the draft together. If the draft stands, the token after it
    has been computed too; if not, the row keeps a token drawn so that the distribution is exactly
    the model's, and the draft's entry in the cache is forgotten by its length.

    Returns:
        As `decode`, with a trailing axis of 2.
    """
    model = bind(config, params)
    batch = state.token.shape[0]
    rows = jnp.arange(batch)

    def body(carry):
        n, state, tokens, logprobs, kept = carry
        drafts, sampling = state.drafts, state.sampling
        assert drafts is not None
        going = ~state.done
        pair = jnp.stack([state.token, drafts.token], axis=1)
        out = model(pair, state.cache, jnp.zeros((batch,), jnp.int32))
        assert out.cache is not None
        target = log_distribution(out.logits[:, 0], sampling)
        accepted, first = verify(drafts.token, drafts.logp, target, sampling, state.step)
        second = draw(log_distribution(out.logits[:, 1], sampling), sampling, state.step + 1)
        plain = jax.nn.log_softmax(out.logits, axis=-1)
        first_logprob, second_logprob = plain[rows, 0, first], plain[rows, 1, second]

        first_ends = (first[:, None] == eos).any(axis=-1) | (state.step + 1 >= state.budget)
        keep = jnp.stack([going, going & accepted & ~first_ends], axis=1)
        both = keep[:, 1]
        second_ends = (second[:, None] == eos).any(axis=-1) | (state.step + 2 >= state.budget)
        added = keep.sum(axis=1, dtype=jnp.int32)

        drafted = model.predict_next(
            out.hidden, jnp.stack([first, second], axis=1), out.cache, logits=False
        )
        assert drafted.cache is not None
        latest = drafted.hidden[rows, both.astype(jnp.int32)]
        logp = log_distribution(model.logits(latest), sampling)
        step = state.step + added
        cache = drafted.cache._replace(lengths=state.cache.lengths + added)
        state = state._replace(
            cache=cache,
            token=jnp.where(going, jnp.where(both, second, first), state.token),
            step=step,
            done=state.done | first_ends | (both & second_ends),
            drafts=Drafts(draw(logp, sampling, step, DRAFT), logp),
        )
        tokens = tokens.at[n].set(jnp.stack([first, second], axis=1))
        logprobs = logprobs.at[n].set(jnp.stack([first_logprob, second_logprob], axis=1))
        return n + 1, state, tokens, logprobs, kept.at[n].set(keep)

    return _looped(body, state, limit, (steps, batch, 2))


def _looped(body: Callable, state: State, limit: jax.Array, shape: tuple[int, ...]) -> Any:
    """Runs body(n, state, tokens, logprobs, kept) until `limit` rows are done, N times at most;
    `shape` is that of the last three, [N, B, ...]."""

    def more(carry):
        return (carry[0] < shape[0]) & (carry[1].done.sum() < limit)

    filled = (jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32, bool))
    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state, *filled))[1:]

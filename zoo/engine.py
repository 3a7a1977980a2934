"""Generation on token ids: prefill in buckets, decode in a loop on the device, rows refilled as
they end.

Shapes do not depend on lengths, so a process compiles the decode loop once for a few batch sizes
and a capacity, and the prefill once for a few bucket sizes. Finished rows leave and waiting
requests take their place; each row keeps its own seed, so its tokens do not depend on its
neighbours.
B rows (slots)  T prompt bucket  S capacity  V vocabulary  N loop steps
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo.cache import Cache
from deepzoo.zoo.cache import cache as empty_cache
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.fingerprint import named
from deepzoo.zoo.functional import bind, unstack
from deepzoo.zoo.model import Params
from deepzoo.zoo.sample import DRAFT, Sampling, choose, draw, log_distribution, verify

SMALLEST_BUCKET = 16
PREFILL_CHUNK = 512  # longer prompts go through in pieces, so that attention scores stay small
# When nobody waits and a quarter of the rows is left, they go on alone: a step costs what it has
# rows, and the longest answers are several times as long as most. Not below this many, where
# another program costs more than it saves.
FEWEST_ROWS = 16


class Request(NamedTuple):
    """One prompt and how to continue it.

    tokens: prompt ids, at least one.
    max_tokens: tokens to generate at most.
    temperature, top_p, top_k, min_p, seed: see `sample.Sampling`.
    """

    tokens: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


class Event(NamedTuple):
    """New tokens of one request.

    request: position of the request in the order given.
    tokens: the new ids; an end-of-sequence id is included.
    logprobs: of each, under the model itself (temperature 1, nothing excluded): what RL needs.
    finish: None while it goes on, then "eos" or "length".
    """

    request: int
    tokens: list[int]
    logprobs: list[float]
    finish: str | None


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


class Engine:
    """Runs many requests through `slots` rows of one cache.

    Args:
        config: the model.
        params: its parameters; stacked ones are unstacked, which copies them once.
        slots: rows decoded together.
        capacity: tokens a row can hold, prompt and answer.
        eos_ids: ids that end a sequence.
        speculative: draft with the MTP layer; output keeps its distribution.

    Raises:
        RequestError: `speculative` for a model without an MTP layer; or parameters that lie partly
            on devices of other processes.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        *,
        slots: int,
        capacity: int,
        eos_ids: Iterable[int] = (),
        speculative: bool = False,
    ):
        if speculative and not config.num_nextn_predict_layers:
            raise RequestError(
                "speculative decoding needs an MTP layer, which this model does not have"
                " (num_nextn_predict_layers is 0)"
            )
        for name, leaf in named(params).items():
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise RequestError(
                    f"{name} lies partly on devices of other processes; a process generates from"
                    " parameters on its own devices"
                )
        self.config = config
        self.params = unstack(params)
        self.capacity = capacity
        self.eos = jnp.asarray(sorted(set(eos_ids)) or [-1], jnp.int32)
        self.speculative = speculative
        self.drafted = self.accepted = 0
        self.slots = slots
        self._empty()

    def _empty(self) -> None:
        """All rows, none of them taken."""
        config, slots, speculative = self.config, self.slots, self.speculative
        # A row that is done stands one token before its end at most, and is still written to; the
        # draft behind it would be the only one outside.
        spare = 1 if speculative else 0

        def rows(
            dtype: Any = jnp.int32, fill: float = 0
        ) -> jax.Array:  # the state is donated: no sharing
            return jnp.full((slots,), fill, dtype)

        real = jnp.float32
        logp = jnp.zeros((slots, config.vocab_size), real)
        self.state = State(
            cache=empty_cache(
                config, slots, self.capacity + spare, stacked=False, dtype=_dtype(self.params)
            ),
            token=rows(),
            step=rows(),
            budget=rows(),
            done=rows(bool, True),
            sampling=Sampling(rows(real), rows(real, 1), rows(), rows(real), rows(jnp.uint32)),
            drafts=Drafts(rows(), logp) if speculative else None,
        )
        self.owner: list[int | None] = [None] * slots

    def _shrink(self) -> None:
        """Leaves out rows that have ended, if few are left."""
        taken = [row for row, owner in enumerate(self.owner) if owner is not None]
        size = len(self.owner)
        if not taken:
            return
        while size // 4 >= max(FEWEST_ROWS, len(taken)):
            size //= 4
        if size == len(self.owner):
            return
        ended = (row for row, owner in enumerate(self.owner) if owner is None)
        rows = [*taken, *itertools.islice(ended, size - len(taken))]
        self.state = _of_rows(self.state, jnp.asarray(rows, jnp.int32))
        self.owner = [self.owner[row] for row in rows]

    def run(self, requests: Iterable[Request], *, chunk: int = 32) -> Iterator[Event]:
        """Generates for all requests; events come as tokens do, in no order between requests.

        Args:
            requests: served in order as rows become free.
            chunk: decode steps between looks at the results: small to stream, large for speed.

        Raises:
            RequestError: a request that cannot be served; none has started then.
        """
        waiting = deque(enumerate(requests))
        for _, request in waiting:
            self._check(request)
        if len(self.owner) < self.slots:  # a run before this one has left few
            self._empty()
        while waiting or any(o is not None for o in self.owner):
            free = [row for row, owner in enumerate(self.owner) if owner is None]
            if waiting and free:
                yield from self._admit([waiting.popleft() for _ in free if waiting], free)
            if any(o is not None for o in self.owner):
                # With requests waiting, come back once a quarter of the rows can be refilled
                # together.
                rows = len(self.owner)
                yield from self._decode(chunk, max(1, rows // 4) if waiting else rows)
                if not waiting:
                    self._shrink()

    def release(self, index: int) -> None:
        """Ends a request early (a stop string was seen); its row becomes free."""
        row = self.owner.index(index)
        self.owner[row] = None
        self.state = self.state._replace(done=self.state.done.at[row].set(True))

    def _check(self, request: Request) -> None:
        length, vocabulary = len(request.tokens), self.config.vocab_size
        if not length:
            raise RequestError("a prompt has no tokens; give at least one")
        bad = [t for t in request.tokens if not 0 <= t < vocabulary]
        if bad:
            raise RequestError(
                f"token id {bad[0]} is outside the vocabulary of {vocabulary} (0 to"
                f" {vocabulary - 1})"
            )
        if request.max_tokens < 1 or length + request.max_tokens > self.capacity:
            raise RequestError(
                f"a prompt of {length} tokens and max_tokens {request.max_tokens} do not fit in"
                f" {self.capacity} tokens"
            )

    def _admit(self, batch: list[tuple[int, Request]], free: list[int]) -> Iterator[Event]:
        count = _bucket(len(batch), 1)
        bucket = _bucket(max(len(r.tokens) for _, r in batch), SMALLEST_BUCKET)
        if bucket > PREFILL_CHUNK:
            longest = max(len(r.tokens) for _, r in batch)
            bucket = -(-longest // PREFILL_CHUNK) * PREFILL_CHUNK
        tokens = np.zeros((count, bucket), np.int32)
        lengths = np.ones((count,), np.int32)
        slots = np.full((count,), len(self.owner), np.int32)  # spare rows fall off the end
        budget = np.ones((count,), np.int32)
        options = np.zeros((count, 4), np.float64)
        seeds = np.zeros((count,), np.uint32)
        for i, ((_, r), slot) in enumerate(zip(batch, free, strict=False)):
            tokens[i, : len(r.tokens)] = r.tokens
            lengths[i], slots[i], budget[i] = len(r.tokens), slot, r.max_tokens
            options[i] = r.temperature, r.top_p, r.top_k, r.min_p
            seeds[i] = r.seed % (1 << 32)
        temperature, top_p, top_k, min_p = options.T
        sampling = Sampling(
            jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32),
            jnp.asarray(top_k, jnp.int32), jnp.asarray(min_p, jnp.float32), jnp.asarray(seeds),
        )  # fmt: skip
        self.state, token, logprob = prefill(
            self.config, self.params, self.state, tokens, lengths, slots, budget, sampling, self.eos
        )
        token, logprob, done = (np.asarray(a) for a in (token, logprob, self.state.done))
        for i, ((index, _), slot) in enumerate(zip(batch, free, strict=False)):
            self.owner[slot] = index
            yield self._event(slot, [int(token[i])], [float(logprob[i])], bool(done[slot]))

    def _decode(self, chunk: int, limit: int) -> Iterator[Event]:
        loop = decode_drafted if self.speculative else decode
        self.state, tokens, logprobs, kept = loop(
            self.config, self.params, self.state, self.eos, jnp.asarray(limit, jnp.int32), chunk
        )
        done, kept = np.asarray(self.state.done), np.asarray(kept)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        if self.speculative:  # [N, B, 2]; a step that kept two had its draft accepted
            self.drafted += int(kept[..., 0].sum())
            self.accepted += int(kept[..., 1].sum())
        for row, owner in enumerate(self.owner):
            if owner is not None:
                mine = kept[:, row]
                yield self._event(
                    row,
                    tokens[:, row][mine].tolist(),
                    logprobs[:, row][mine].tolist(),
                    bool(done[row]),
                )

    def _event(self, row: int, tokens: list[int], logprobs: list[float], done: bool) -> Event:
        index = self.owner[row]
        assert index is not None
        finish = None
        if done:
            finish = "eos" if tokens and tokens[-1] in np.asarray(self.eos) else "length"
            self.owner[row] = None
        return Event(index, tokens, logprobs, finish)


@jax.jit
def _of_rows(state: State, rows: jax.Array) -> State:
    return jax.tree.map(lambda a: a[rows], state)


def _dtype(params: Params) -> Any:
    return params["embed_tokens"]["weight"].dtype


def _bucket(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())


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

    def more(carry):
        return (carry[0] < steps) & (carry[1].done.sum() < limit)

    start = (
        jnp.zeros((), jnp.int32),
        state,
        jnp.zeros((steps, batch), jnp.int32),
        jnp.zeros((steps, batch), jnp.float32),
        jnp.zeros((steps, batch), bool),
    )
    return jax.lax.while_loop(more, body, start)[1:]


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

    def more(carry):
        return (carry[0] < steps) & (carry[1].done.sum() < limit)

    start = (
        jnp.zeros((), jnp.int32),
        state,
        jnp.zeros((steps, batch, 2), jnp.int32),
        jnp.zeros((steps, batch, 2), jnp.float32),
        jnp.zeros((steps, batch, 2), bool),
    )
    return jax.lax.while_loop(more, body, start)[1:]

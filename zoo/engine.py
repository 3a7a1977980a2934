"""Generation on token ids: prefill in buckets, decode in a loop on the device, rows refilled as
they end.

Finished rows leave and waiting requests take their place; each row keeps its own seed, so its
tokens do not depend on its neighbours. The programs are those of `decode`.
B rows (slots)
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo import decode as programs
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.fingerprint import named
from deepzoo.zoo.functional import unstack
from deepzoo.zoo.model import Params
from deepzoo.zoo.sample import Sampling

SMALLEST_BUCKET = 16
# When nobody waits and a quarter of the rows is left, they go on alone: a step costs what it has
# rows, and the longest answers are several times as long as most. Not below this many, where
# another program costs more than it saves.
FEWEST_ROWS = 8
# On a CPU, this many rows and more are decoded in two halves, each in a thread of its own: the
# small products of a step leave half of two cores idle. It is two whatever the machine has, so
# that the same call makes the same sums everywhere.
ROWS_OF_TWO_LANES = 32


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


type Numbered = tuple[int, Request]


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
        self.ends = frozenset(self.eos.tolist())
        self.speculative = speculative
        halves = 2 if jax.default_backend() == "cpu" and slots >= ROWS_OF_TWO_LANES else 1
        self.lanes = [Lane(self, slots // halves + i * (slots % halves)) for i in range(halves)]
        self._released: set[int] = set()

    @property
    def drafted(self) -> int:
        """Drafts of the MTP layer that were checked."""
        return sum(lane.drafted for lane in self.lanes)

    @property
    def accepted(self) -> int:
        """Drafts that stood."""
        return sum(lane.accepted for lane in self.lanes)

    def run(self, requests: Iterable[Request], *, chunk: int = 32) -> Iterator[Event]:
        """Generates for all requests; events come as tokens do, in no order between requests.

        Args:
            requests: served in order as rows become free.
            chunk: decode steps between looks at the results: small to stream, large for speed.

        Raises:
            RequestError: a request that cannot be served; none has started then.
        """
        numbered = list(enumerate(requests))
        self._released.clear()
        for _, request in numbered:
            self._check(request)
        lanes = self.lanes
        # Shared out beforehand, so that no result depends on which lane is faster; by the parity of
        # the number's bits, for kinds of requests may alternate.
        for i, lane in enumerate(lanes):
            lane.begin(n for n in numbered if n[0].bit_count() % len(lanes) == i)
        if len(lanes) == 1:
            while lanes[0].busy:
                yield from lanes[0].turn(chunk)
            return
        with ThreadPoolExecutor(len(lanes)) as threads:

            def started(lane: Lane) -> Future[list[Event]]:
                return threads.submit(lambda: list(lane.turn(chunk)))

            running = {started(lane): lane for lane in lanes if lane.busy}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    lane = running.pop(future)
                    for event in future.result():  # one of a turn may release a row of the next
                        if event.request not in self._released:
                            yield event
                    if lane.busy:
                        running[started(lane)] = lane

    def release(self, index: int) -> None:
        """Ends a request early (a stop string was seen), on its event: it gets no more of them, and
        its row becomes free."""
        self._released.add(index)
        for lane in self.lanes:
            lane.release(index)

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


# Of a shape that no thread has run yet, one compiles and the others wait for it.
_compiled: set[tuple] = set()
_compiling = threading.Lock()


class Lane:
    """Rows that are decoded together, and the requests that wait for them."""

    def __init__(self, engine: Engine, slots: int):
        self.engine, self.slots = engine, slots
        self.drafted = self.accepted = 0
        self.waiting: deque[Numbered] = deque()
        self._empty()

    def _empty(self) -> None:
        engine = self.engine
        self.state = programs.empty(
            engine.config, engine.params, self.slots, engine.capacity,
            speculative=engine.speculative,
        )  # fmt: skip
        self.owner: list[int | None] = [None] * self.slots

    @property
    def busy(self) -> bool:
        """Whether a request waits or goes on."""
        return bool(self.waiting) or any(o is not None for o in self.owner)

    def begin(self, requests: Iterable[Numbered]) -> None:
        """Takes requests for the turns to come."""
        self.waiting = deque(requests)
        if len(self.owner) < self.slots:  # a run before this one has left few
            self._empty()

    def turn(self, chunk: int) -> Iterator[Event]:
        """Lets waiting requests in, and decodes up to `chunk` steps."""
        free = [row for row, owner in enumerate(self.owner) if owner is None]
        if self.waiting and free:
            yield from self._admit([self.waiting.popleft() for _ in free if self.waiting], free)
        if any(o is not None for o in self.owner):
            # With requests waiting, come back once a quarter of the rows can be refilled together.
            rows = len(self.owner)
            yield from self._decode(chunk, max(1, rows // 4) if self.waiting else rows)
            if not self.waiting:
                self._shrink()

    def release(self, index: int) -> None:
        """Ends a request early, if it is here and goes on."""
        if index in self.owner:
            row = self.owner.index(index)
            self.owner[row] = None
            self.state = self.state._replace(done=self.state.done.at[row].set(True))

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
        self.state = programs.of_rows(self.state, jnp.asarray(rows, jnp.int32))
        self.owner = [self.owner[row] for row in rows]

    def _admit(self, batch: list[Numbered], free: list[int]) -> Iterator[Event]:
        count = _bucket(len(batch), 1)
        longest = max(len(r.tokens) for _, r in batch)
        bucket, piece = _bucket(longest, SMALLEST_BUCKET), programs.PREFILL_CHUNK
        if bucket > piece:
            bucket = -(-longest // piece) * piece
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
        self.state, token, logprob = self._once(
            programs.prefill, (tokens, lengths, slots, budget, sampling, self.engine.eos),
            (count, bucket),
        )  # fmt: skip
        token, logprob, done = (np.asarray(a) for a in (token, logprob, self.state.done))
        for i, ((index, _), slot) in enumerate(zip(batch, free, strict=False)):
            self.owner[slot] = index
            yield self._event(slot, [int(token[i])], [float(logprob[i])], bool(done[slot]))

    def _decode(self, chunk: int, limit: int) -> Iterator[Event]:
        loop = programs.decode_drafted if self.engine.speculative else programs.decode
        self.state, tokens, logprobs, kept = self._once(
            loop, (self.engine.eos, jnp.asarray(limit, jnp.int32), chunk), (chunk,)
        )
        done, kept = np.asarray(self.state.done), np.asarray(kept)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        if self.engine.speculative:  # [N, B, 2]; a step that kept two had its draft accepted
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

    def _once(self, program, arguments: tuple, sizes: tuple):
        """Calls a program; two lanes do not compile the same one side by side."""
        engine = self.engine
        key = (program, engine.config, len(self.owner), engine.capacity, *sizes)
        if key in _compiled or len(engine.lanes) == 1:
            return program(engine.config, engine.params, self.state, *arguments)
        with _compiling:
            out = program(engine.config, engine.params, self.state, *arguments)
            _compiled.add(key)
        return out

    def _event(self, row: int, tokens: list[int], logprobs: list[float], done: bool) -> Event:
        index = self.owner[row]
        assert index is not None
        finish = None
        if done:
            finish = "eos" if tokens and tokens[-1] in self.engine.ends else "length"
            self.owner[row] = None
        return Event(index, tokens, logprobs, finish)


def _bucket(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())

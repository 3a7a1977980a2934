"""Whole models with random weights on one GPU: prefill, decode, a training step, one V3 layer.

Decode and prefill go through the programs that generation runs (`zoo.decode`). The share of the
memory floor compares a decode step with reading, once, every weight that its tokens need and every
cache entry that they see; how many experts a batch meets is the expectation for a uniform router.
Utilisation counts the multiplications of the model itself, no recomputation, against the GPU's
specified bfloat16 rate. B batch  T tokens  S context
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy
from deepzoo.kernels.targets import H200_BYTES_PER_S, TARGETS
from deepzoo.zoo import catalog, decode
from deepzoo.zoo.bench import gpu_peer, kernels
from deepzoo.zoo.config import Config, Quantization
from deepzoo.zoo.count import cache_bytes, count
from deepzoo.zoo.functional import abstract, apply
from deepzoo.zoo.model import Params
from deepzoo.zoo.sample import Sampling

Told = Callable[[str], None]
SPECIFIED = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # bf16, dense


class Size(NamedTuple):
    """What is measured. decode: batches. prefill: (batch, tokens). train: (batch, tokens)."""

    serve: Config
    context: int
    decode: tuple[int, ...]
    steps: int
    prefill: tuple[tuple[int, int], ...]
    train: Config
    train_batch: tuple[int, int]
    layer: Config
    layer_batches: tuple[tuple[int, int], ...]


class Row(NamedTuple):
    """One measurement.

    seconds: of a step. rate: tokens a second. floor: share of the memory floor. utilisation: of
    the specified arithmetic. peer: its tokens a second. ratio: of ours to the peer's.
    """

    name: str
    seconds: float | None = None
    rate: float | None = None
    floor: float | None = None
    utilisation: float | None = None
    peer: float | None = None
    ratio: float | None = None
    note: str = ""


def size(name: str) -> Size:
    """The models of a size: "full" for a GPU of 80 GB or more, "nano" for any machine."""
    lite, v3 = catalog.config("deepseek-v2-lite"), catalog.config("deepseek-v3")
    if name == "full":
        # All widths of V2-Lite, fewer layers: master weights, both moments and gradients in
        # float32 and the bfloat16 copy take 18 bytes a parameter.
        train = dataclasses.replace(lite, num_hidden_layers=5)
        layer = dataclasses.replace(
            v3, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0,
            vocab_size=1024, quantization_config=None,
        )  # fmt: skip
        return Size(
            lite, 4096, (1, 32, 128), 128, ((1, 4096), (4, 4096)), train, (4, 4096), layer,
            ((1, 4096), (128, 1)),
        )  # fmt: skip
    small = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }  # fmt: skip
    lite = dataclasses.replace(lite, **small)
    layer = dataclasses.replace(
        v3, **(small | {"num_hidden_layers": 1, "q_lora_rank": 32}), first_k_dense_replace=0,
        num_nextn_predict_layers=0, quantization_config=None, n_group=2, topk_group=1,
    )  # fmt: skip
    return Size(
        lite, 32, (4,), 4, ((1, 32),), lite, (2, 32), layer, ((4, 1),),
    )  # fmt: skip


def random_params(config: Config, seed: int = 0) -> Params:
    """Parameters with the published initialisation's spread, one sub-dict a layer.

    Unlike `init` it makes every leaf in its own dtype on the device: FP8 leaves and their scales
    are random numbers, not the rounding of others, so that no float32 copy is ever held.
    """

    def make(path: Any, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = str(getattr(path[-1], "key", path[-1]))
        if name == "weight_scale_inv":
            return jnp.full(leaf.shape, config.initializer_range / 32, leaf.dtype)
        if name == "e_score_correction_bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        spread = 32.0 if leaf.dtype == jnp.float8_e4m3fn else config.initializer_range
        return _normal(key, leaf.shape, leaf.dtype, spread)

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract(config, stacked=False))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, spread: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) * spread).astype(dtype)


def median(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds of `call`, whose result is waited for, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def step_bytes(config: Config, batch: int, context: int) -> float:
    """Bytes that a decode step must read: weights of a batch's tokens once, and its cache."""
    counted = count(config)
    width = jnp.dtype(config.dtype).itemsize
    chosen = 0.0
    if config.n_routed_experts:
        chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    dense = counted.main - counted.routed - config.vocab_size * config.hidden_size
    cached = batch * context * cache_bytes(config).stored
    return width * (dense + chosen * counted.routed) + cached


def token_flops(config: Config, context: float) -> float:
    """Multiply-adds times two of one token's forward pass that sees `context` tokens."""
    per_key = config.num_attention_heads * (config.head_size + config.v_head_dim)
    return 2 * (
        count(config).active_without_embedding + config.num_hidden_layers * context * per_key
    )


def _speed(kind: str) -> tuple[float | None, float | None]:
    """Reachable bytes a second and specified bf16 FLOP/s of a GPU of this kind."""
    name = next((n for n in SPECIFIED if n in kind), None)
    if name is None:
        return None, None
    bandwidth = TARGETS[name.lower()].bandwidth / TARGETS["h200"].bandwidth * H200_BYTES_PER_S
    return bandwidth, SPECIFIED[name]


def bench(
    which: str = "full",
    against: str | None = None,
    peer_python: str | None = None,
    rounds: int = 5,
    minutes: float = 30,
    told: Told = lambda _: None,
) -> Iterator[Row]:
    """Measures everything of a size; what does not run is a row that says why.

    Args:
        which: "full" or "nano".
        against: "transformers" or None; the peer runs first, in a process of its own, and leaves
            the GPU before anything of ours is on it.
        peer_python: Python of the peer's environment.
        rounds: measured rounds; medians count.
        minutes: after which no further measurement begins.
        told: is told what is being done.

    Raises:
        RequestError: an unknown peer, or one that does not start.
    """
    chosen = size(which)
    kind = jax.devices()[0].device_kind
    deadline = kernels.Deadline(minutes)
    theirs = gpu_peer.measure(
        against, peer_python, chosen.serve, chosen.prefill, chosen.decode, chosen.context,
        chosen.steps, rounds, told,
    )  # fmt: skip
    for part in (_serve, _train, _layer):
        if deadline.left() <= 0:
            yield Row(part.__name__.strip("_"), note=f"{minutes:g} minutes were over")
            continue
        for row in part(chosen, kind, rounds, told):
            other = theirs.get(row.name)
            if other is not None:
                peer, said = other
                row = row._replace(peer=peer, note="; ".join(filter(None, (row.note, said))))
                if peer and row.rate:
                    row = row._replace(ratio=row.rate / peer)
            yield row
        jax.clear_caches()


def _guarded(row: Row, run: Callable[[], Row]) -> Row:
    try:
        return run()
    except Exception as error:  # out of memory, above all
        return row._replace(note=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def prefill_name(batch: int, tokens: int) -> str:
    """Of a row."""
    return f"prefill, {batch} x {tokens} tokens"


def decode_name(batch: int, context: int) -> str:
    """Of a row."""
    return f"decode, batch {batch}, {context} tokens of context"


def _serve(chosen: Size, kind: str, rounds: int, told: Told) -> Iterator[Row]:
    config = chosen.serve
    told("random weights")
    params = random_params(config)
    bandwidth, peak = _speed(kind)
    for batch, tokens in chosen.prefill:
        row = Row(prefill_name(batch, tokens))
        told(row.name)

        def prefilled(row: Row = row, batch: int = batch, tokens: int = tokens) -> Row:
            seconds = _prefill(config, params, batch, tokens, rounds)
            rate = batch * tokens / seconds
            used = None if peak is None else token_flops(config, tokens / 2) * rate / peak
            return row._replace(seconds=seconds, rate=rate, utilisation=used)

        yield _guarded(row, prefilled)
    for batch in chosen.decode:
        row = Row(decode_name(batch, chosen.context))
        told(row.name)

        def decoded(row: Row = row, batch: int = batch) -> Row:
            seconds = _decode(config, params, batch, chosen.context, chosen.steps, rounds)
            least = None
            if bandwidth is not None:
                least = step_bytes(config, batch, chosen.context) / bandwidth / seconds
            return row._replace(seconds=seconds, rate=batch / seconds, floor=least)

        yield _guarded(row, decoded)


def _prefill(config: Config, params: Params, batch: int, tokens: int, rounds: int) -> float:
    state, eos = decode.empty(config, params, batch, tokens + 1), jnp.asarray([-1], jnp.int32)
    ids = jax.random.randint(jax.random.key(1), (batch, tokens), 0, config.vocab_size)
    lengths, budget = jnp.full((batch,), tokens), jnp.full((batch,), 2)
    slots = jnp.arange(batch)

    def call() -> Any:
        nonlocal state
        state, token, _ = decode.prefill(
            config, params, state, ids, lengths, slots, budget, _greedy(batch), eos
        )
        return token

    return median(call, rounds)


def _greedy(batch: int) -> Sampling:
    def rows(dtype: Any, value: float = 0) -> jax.Array:  # an array each: they are donated
        return jnp.full((batch,), value, dtype)

    real = jnp.float32
    return Sampling(rows(real), rows(real, 1), rows(jnp.int32), rows(real), rows(jnp.uint32))


def _decode(
    config: Config, params: Params, batch: int, context: int, steps: int, rounds: int
) -> float:
    """Seconds of one step, in a loop of `steps` on the device: what a start costs is lost in it."""
    state = decode.empty(config, params, batch, context + steps)
    fill = jax.jit(
        lambda cache: jax.tree.map(
            lambda a: jax.random.normal(jax.random.key(2), a.shape, a.dtype), cache
        ),
        donate_argnums=0,
    )
    state = state._replace(
        cache=state.cache._replace(layers=fill(state.cache.layers)), sampling=_greedy(batch)
    )
    eos, limit = jnp.asarray([-1], jnp.int32), jnp.asarray(batch, jnp.int32)

    def call() -> Any:
        nonlocal state
        start = state._replace(
            cache=state.cache._replace(lengths=jnp.full((batch,), context)),
            token=jnp.zeros((batch,), jnp.int32),
            step=jnp.ones((batch,), jnp.int32),
            budget=jnp.full((batch,), 1 << 20),
            done=jnp.zeros((batch,), bool),
        )
        state, tokens, _, _ = decode.decode(config, params, start, eos, limit, steps)
        return tokens

    return median(call, rounds) / steps


def _train(chosen: Size, kind: str, rounds: int, told: Told) -> Iterator[Row]:
    config, (batch, tokens) = chosen.train, chosen.train_batch
    total = count(config).main
    row = Row(f"training step, {total / 1e9:.2g}B parameters, {batch} x {tokens} tokens")
    told(row.name)

    def run() -> Row:
        seconds = train_seconds(config, batch, tokens, rounds)
        rate = batch * tokens / seconds
        peak = _speed(kind)[1]
        used = None if peak is None else 3 * token_flops(config, tokens / 2) * rate / peak
        return row._replace(seconds=seconds, rate=rate, utilisation=used)

    yield _guarded(row, run)


def train_seconds(config: Config, batch: int, tokens: int, rounds: int) -> float:
    """Median seconds of an AdamW step: float32 master weights, bfloat16 arithmetic, layers
    recomputed in the backward pass."""
    import optax

    from deepzoo.zoo.functional import stack

    tx = optax.adamw(1e-4)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), stack(random_params(config)))
    ids = jax.random.randint(jax.random.key(3), (batch, tokens + 1), 0, config.vocab_size)

    def loss(params: Params) -> jax.Array:
        low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        out = apply(config, low, ids[:, :-1], remat=True, logits=False)
        hidden = out.hidden.reshape(-1, config.hidden_size)
        total, _ = linear_cross_entropy(hidden, low["lm_head"]["weight"], ids[:, 1:].reshape(-1))
        return total / (batch * tokens)

    def step(params: Params, state: Any) -> tuple[Params, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value  # pyright: ignore[reportReturnType]

    run = jax.jit(step, donate_argnums=(0, 1))
    held = [params, tx.init(params)]
    del params

    def call() -> jax.Array:
        held[0], held[1], value = run(held[0], held[1])
        return value

    seconds = median(call, rounds)
    if not np.isfinite(float(call())):
        raise FloatingPointError("the loss is not finite")
    return seconds


def _layer(chosen: Size, kind: str, rounds: int, told: Told) -> Iterator[Row]:
    """One layer with experts in bfloat16 and in FP8; embedding and a small head included."""
    for batch, tokens in chosen.layer_batches:
        seconds: dict[str, float] = {}
        for name in ("bf16", "FP8"):
            config = chosen.layer
            if name == "FP8":
                config = dataclasses.replace(config, quantization_config=Quantization())
            row = Row(f"one {config.hidden_size}-wide V3 layer, {batch} x {tokens} tokens, {name}")
            told(row.name)

            def run(row: Row = row, config: Config = config, name: str = name) -> Row:
                params = random_params(config)
                found = _layer_seconds(config, params, batch, tokens, chosen.context, rounds)  # noqa: B023
                seconds[name] = found  # noqa: B023
                note = ""
                if found <= 0:
                    note = "noise is larger than the time"
                elif name == "FP8" and "bf16" in seconds:  # noqa: B023
                    note = f"{seconds['bf16'] / found:.2f} times as fast as bf16"  # noqa: B023
                return row._replace(seconds=found, rate=batch * tokens / found, note=note)  # noqa: B023

            yield _guarded(row, run)


def _layer_seconds(
    config: Config, params: Params, batch: int, tokens: int, context: int, rounds: int
) -> float:
    from deepzoo.zoo.bench.timing import measure
    from deepzoo.zoo.cache import cache as empty_cache

    ids = jax.random.randint(jax.random.key(4), (batch, tokens), 0, config.vocab_size)
    held = None
    if tokens == 1:
        held = empty_cache(config, batch, context + 1, stacked=False, dtype=jnp.bfloat16)
        held = held._replace(lengths=jnp.full((batch,), context))

    def forward(params: Params, ids: jax.Array, held: Any) -> jax.Array:
        return apply(config, params, ids, cache=held, logits=False).hidden

    return measure(forward, [(params, ids, held)], rounds=rounds).seconds


HEADER = ("measurement", "time", "tokens/s", "of the memory floor", "utilisation", "peer, tokens/s",
          "ratio", "remarks")  # fmt: skip


def line(row: Row) -> tuple[str, ...]:
    """A row as the table shows it."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.0f} %"

    return (
        row.name, kernels.microseconds(row.seconds), "" if row.rate is None else f"{row.rate:.0f}",
        percent(row.floor), percent(row.utilisation), "" if row.peer is None else f"{row.peer:.0f}",
        "" if row.ratio is None else f"{row.ratio:.2f}", row.note,
    )  # fmt: skip


def facts(which: str) -> dict[str, Any]:
    """Date, device, versions and the size that is measured."""
    return kernels.facts() | {"size": which}


def as_json(rows: list[Row], known: dict[str, Any]) -> str:
    """The rows and what was measured on what."""
    return json.dumps(known | {"rows": [row._asdict() for row in rows]}, indent=2)

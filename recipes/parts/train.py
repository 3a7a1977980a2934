"""The algebra of every recipe: a loss, a step made from it, and a for loop.

A loss returns **sums and weights, not means**, so that micro-batches, devices and packed rows of
any size add up to exactly the mean over all tokens. A step is pure. Randomness is `fold_in(key,
step)`. Router biases are state of their own: the optimiser never sees them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepzoo.zoo.errors import DeepzooError
from deepzoo.zoo.model import Params

type Batch = Any
type Loss = Callable[[Params, Batch, jax.Array], "Output"]
type Step = Callable[["State", Batch], tuple["State", dict[str, Any]]]
type Hook = Callable[["State", dict[str, Any]], None]

# Where the bias of V3's router (report eq. 16) lies in the parameters; in `State.bias` under the
# same first name.
_BIASES = {"moe": ("moe", "mlp", "gate"), "mtp": ("mtp", "block", "mlp", "gate")}
_BIAS = "e_score_correction_bias"


class Output(NamedTuple):
    """What a loss returns; everything is a sum over the batch.

    loss: float32 [], to be divided by `weight`.
    weight: float32 [], tokens (or whatever is counted) behind `loss`.
    metrics: nested dict of sums. "load" holds the tokens each expert got, {"moe": int32 [L, E],
        "mtp": [N, E]}.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, Any]


class State(NamedTuple):
    """Everything a run needs to go on.

    step: int32 [], batches seen, skipped ones included.
    params: what the optimiser trains.
    bias: router biases by stack, float32 [L, E]; empty for models without.
    opt_state: of the optimiser.
    key: folded with `step` for each batch.
    skipped: int32 [], batches whose loss or gradient was not finite.
    streak: int32 [], how many of them in a row, just now.
    """

    step: jax.Array
    params: Params
    bias: dict[str, jax.Array]
    opt_state: optax.OptState
    key: jax.Array
    skipped: jax.Array
    streak: jax.Array


class NonFiniteError(DeepzooError):
    """Several batches in a row gave no finite gradient."""


def start(params: Params, tx: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step."""
    trained, bias = split_bias(params)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, trained, bias, tx.init(trained), jax.random.key(seed), zero + 0, zero + 0)


def split_bias(params: Params) -> tuple[Params, dict[str, jax.Array]]:
    """Parameters without the router biases, and the biases."""
    bias = {}
    for name, path in _BIASES.items():
        if name in params and _BIAS in (gate := _get(params, path)):
            bias[name] = gate[_BIAS]
            params = _put(params, path, {k: v for k, v in gate.items() if k != _BIAS})
    return params, bias


def with_bias(params: Params, bias: Mapping[str, jax.Array]) -> Params:
    """`split_bias` backwards."""
    for name, value in bias.items():
        path = _BIASES[name]
        params = _put(params, path, _get(params, path) | {_BIAS: value})
    return params


def _get(tree: Params, path: tuple[str, ...]) -> Params:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str, ...], leaf: Params) -> Params:
    return tree | {path[0]: _put(tree[path[0]], path[1:], leaf) if path[1:] else leaf}


def balanced(bias: jax.Array, load: jax.Array, rate: jax.Array) -> jax.Array:
    """Auxiliary-loss-free balancing (V3 report, 2.1.2): an overloaded expert down, the others up.

    Args:
        bias: float32 [L, E].
        load: int32 [L, E], tokens of the whole batch.
        rate: the report's gamma.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    *,
    clip: float = 1.0,
    bias_rate: Callable[[jax.Array], Any] | None = None,
) -> Step:
    """A pure function (state, batch) -> (state, metrics).

    The gradient is tested **before** it is clipped (clipping by an infinite norm would make zeros
    of it, and by NaN spread it). If it or the loss is not finite, parameters, biases and optimiser
    state stay as they were, bit by bit.

    Args:
        loss: the loss.
        tx: the optimiser, without clipping.
        accumulate: micro-batches; the batch's arrays are cut along their first axis.
        clip: largest norm of the mean gradient.
        bias_rate: step -> gamma for the router biases; they stay as they are without it.
    """

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        def total(params: Params, batch: Batch, key: jax.Array):
            out = loss(with_bias(params, state.bias), batch, key)
            return out.loss, out

        def part(batch: Batch, key: jax.Array):
            (_, out), gradient = jax.value_and_grad(total, has_aux=True)(state.params, batch, key)
            return out, gradient

        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            out, gradient = part(batch, key)
        else:
            cut = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)
            first = jax.eval_shape(part, jax.tree.map(lambda a: a[0], cut), key)
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
            (out, gradient), _ = jax.lax.scan(
                lambda carry, x: (jax.tree.map(jnp.add, carry, part(*x)), None),
                zeros,
                (cut, jax.random.split(key, accumulate)),
            )
        weight = jnp.maximum(out.weight, 1e-9)  # a batch without a single token gives zeros
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(out.loss)
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-9))
        updates, opt_state = tx.update(
            jax.tree.map(lambda g: g * scale, gradient), state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        bias = state.bias
        if bias_rate is not None:
            rate = bias_rate(state.step)
            bias = {k: balanced(b, out.metrics["load"][k], rate) for k, b in bias.items()}
        old, new = (state.params, state.bias, state.opt_state), (params, bias, opt_state)
        params, bias, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)
        bad = 1 - finite.astype(jnp.int32)
        after = State(
            state.step + 1, params, bias, opt_state, state.key,
            state.skipped + bad, (state.streak + 1) * bad,
        )  # fmt: skip
        metrics = {"loss": out.loss / weight, "weight": out.weight, "norm": norm, "finite": finite}
        return after, metrics | {"sums": out.metrics}

    return step


def fit(
    step: Step,
    state: State,
    batches: Iterable[Batch],
    on: Iterable[Hook] = (),
    *,
    patience: int = 3,
) -> State:
    """One step a batch, then every hook with the new state and the metrics.

    Raises:
        NonFiniteError: `patience` batches in a row had no finite gradient; the state is the one
            before them.
    """
    hooks = tuple(on)
    for batch in batches:
        state, metrics = step(state, batch)
        if (streak := int(state.streak)) >= patience:
            last = int(state.step) - streak
            raise NonFiniteError(
                f"loss or gradient was not finite in {streak} batches in a row; the parameters are"
                f" those after batch {last}: lower the learning rate, or look at batch {last}"
            )
        for hook in hooks:
            hook(state, metrics)
    return state


def optimizer(params: Params, rate: float, adam_rate: float, decay: float, shape: optax.Schedule):
    """Muon (arXiv 2502.16982) for the layers' matrices; AdamW for embedding, head, router, norms.

    Each layer's and each expert's matrix is orthogonalised by itself. Weight decay is for the
    matrices only.

    Args:
        params: for names and shapes; without the router biases.
        rate: peak learning rate of Muon, 0 for AdamW throughout (with `decay` on the matrices
            then).
        adam_rate: of AdamW.
        decay: weight decay.
        shape: step -> factor of both rates.
    """

    def matrix(path, leaf):
        names = [entry.key for entry in path]
        plain = {"embed_tokens", "lm_head", "gate"}.isdisjoint(names)
        return plain and leaf.ndim - (names[0] in ("dense", "moe", "mtp")) >= 2

    is_matrix = jax.tree_util.tree_map_with_path(matrix, params)

    def scaled(peak: float) -> optax.Schedule:
        return lambda step: peak * shape(step)

    if not rate:
        return optax.adamw(scaled(adam_rate), b1=0.9, b2=0.95, weight_decay=decay, mask=is_matrix)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return optax.contrib.muon(
        scaled(rate),
        adam_learning_rate=scaled(adam_rate),
        adam_b1=0.9,
        adam_b2=0.95,
        weight_decay=decay,
        muon_weight_dimension_numbers=jax.tree.map(lambda m: numbers if m else None, is_matrix),
    )


def warmup_constant_decay(steps: int, warmup: float, decay: float) -> optax.Schedule:
    """Factor of the rate: up over the first share `warmup`, 1, down to 0 over the last `decay`."""

    def factor(step):
        done = (step + 1) / steps
        up, down = done / max(warmup, 1e-9), (1 - done + 1 / steps) / max(decay, 1e-9)
        return jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return factor

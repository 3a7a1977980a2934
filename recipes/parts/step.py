"""The algebra of every recipe: a loss, and a step made from it.

A loss returns **sums and weights, not means**, so that micro-batches, devices and packed rows of
any size add up to exactly the mean over all tokens. A step is pure. Randomness is `fold_in(seed,
step)`. Router biases are state of their own: the optimiser never sees them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from deepzoo.recipes.parts.bias import balanced, split_bias, with_bias
from deepzoo.zoo.fingerprint import named
from deepzoo.zoo.model import Params

type Batch = Any
type Metrics = dict[str, Any]
type Loss = Callable[[Params, Batch, jax.Array], "Output"]
type Step = Callable[["State", Batch], tuple["State", Metrics]]


class Mean(NamedTuple):
    """A metric with a denominator of its own; both are sums over the batch."""

    total: jax.Array
    weight: jax.Array


class Peak(NamedTuple):
    """A metric of which the largest value counts, not the sum."""

    value: jax.Array


class Output(NamedTuple):
    """What a loss returns; everything is a sum over the batch.

    Attributes:
        loss: float32 [], to be divided by `weight`.
        weight: float32 [], tokens (or whatever is counted) behind `loss`; 0 says that there is
            nothing to learn from this batch.
        metrics: name -> sum [], logged divided by `weight`; or `Mean`, or `Peak`. "load" holds the
            tokens each expert got, {"moe": int32 [L, E], "mtp": [N, E]}.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics


class State(NamedTuple):
    """Everything a run needs to go on; all of it is in a checkpoint.

    Attributes:
        step: int32 [], batches seen, skipped ones included.
        params: what the optimiser trains, without router biases.
        bias: router biases by stack, float32 [L, E]; empty for models without, or if frozen
            elsewhere.
        opt_state: of the optimiser.
        seed: int32 [], folded with `step` for each batch's randomness.
        skipped: int32 [], batches whose loss or gradient was not finite.
        streak: int32 [], how many of them in a row, just now.
        extra: arrays that a recipe carries along, such as a reference policy; `train_step` passes
            them through.
    """

    step: jax.Array
    params: Params
    bias: dict[str, jax.Array]
    opt_state: optax.OptState
    seed: jax.Array
    skipped: jax.Array
    streak: jax.Array
    extra: dict[str, Any]


def start(
    params: Params,
    tx: optax.GradientTransformation,
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> State:
    """The state before the first step."""
    trained, bias = split_bias(params)
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    seeded = jnp.asarray(seed, jnp.int32)
    return State(step, trained, bias, tx.init(trained), seeded, skipped, streak, dict(extra or {}))


def train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    *,
    clip: float = 1.0,
    bias_rate: Callable[[jax.Array], Any] | None = None,
    compute: str = "float32",
    combine: Callable[[Params, Params], Params] | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), or (state, batch, frozen) -> the same.

    The gradient is tested **before** it is clipped (clipping by an infinite norm would make zeros
    of it, and by NaN spread it). If it, the loss or the update is not finite, or the batch has
    weight 0, then parameters, biases and optimiser state stay as they were, bit by bit.

    Metrics: "loss" (the mean), "weight", "norm" of the mean gradient before clipping, "finite",
    "leaves" (bool [number of leaves of params]: whose gradient was finite), and "sums", which are
    the loss's own.

    Args:
        loss: the loss.
        tx: the optimiser, without clipping.
        accumulate: micro-batches; row r of the batch goes to micro-batch r mod `accumulate`, so
            that rows which are spread over devices stay where they are. Gradients are added in
            float32.
        clip: largest norm of the mean gradient.
        bias_rate: step -> gamma of V3's eq. 16 for the router biases; without it they are frozen.
        compute: dtype such as "bfloat16" in which the loss sees the parameters; those in `state`
            stay the float32 master copy, which it sees as it is with "float32". Router weights are
            not cast: their product is float32.
        combine: (params, frozen) -> parameters for the loss. With LoRA, `state.params` is the
            small tree, `frozen` the model; the loss need not know.
    """

    def step(state: State, batch: Batch, frozen: Params | None = None) -> tuple[State, Metrics]:
        def total(params: Params, batch: Batch, key: jax.Array):
            if compute != "float32":
                params = cast(params, compute)
            if combine is not None:
                params = combine(params, {} if frozen is None else frozen)
            out = loss(with_bias(params, state.bias), batch, key)
            return out.loss.astype(jnp.float32), out

        def part(batch: Batch, key: jax.Array):
            (_, out), gradient = jax.value_and_grad(total, has_aux=True)(state.params, batch, key)
            return out, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        out, gradient = (
            part(batch, key) if accumulate == 1 else _summed(part, batch, key, accumulate)
        )
        weight = jnp.maximum(out.weight, 1e-9)  # a batch without a single token gives zeros
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        squares = jnp.stack([jnp.square(g).sum() for g in jax.tree.leaves(gradient)])
        leaves, norm = jnp.isfinite(squares), jnp.sqrt(squares.sum())
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-9))
        updates, opt_state = tx.update(
            jax.tree.map(lambda g: g * scale, gradient), state.opt_state, state.params
        )
        finite = jnp.isfinite(norm) & jnp.isfinite(out.loss) & jnp.isfinite(out.weight)
        finite &= jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        bias = state.bias
        if bias_rate is not None:
            rate = bias_rate(state.step)
            bias = {k: balanced(b, out.metrics["load"][k], rate) for k, b in bias.items()}
        old, new = (state.params, state.bias, state.opt_state), (params, bias, opt_state)
        move = finite & (out.weight > 0)
        params, bias, opt_state = jax.tree.map(lambda a, b: jnp.where(move, b, a), old, new)
        bad = 1 - finite.astype(jnp.int32)
        after = state._replace(
            step=state.step + 1, params=params, bias=bias, opt_state=opt_state,
            skipped=state.skipped + bad, streak=(state.streak + 1) * bad,
        )  # fmt: skip
        metrics = {"loss": out.loss / weight, "weight": out.weight, "norm": norm}
        return after, metrics | {"finite": finite, "leaves": leaves, "sums": out.metrics}

    return step


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """A jitted step with its frozen parameters: called and lowered as one of (state, batch)."""

    step: Any
    frozen: Params

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        return self.step(state, batch, self.frozen)

    def lower(self, state: State, batch: Batch) -> Any:
        return self.step.lower(state, batch, self.frozen)


def jitted(
    step: Callable[..., tuple[State, Metrics]], state: State, frozen: Params | None = None
) -> Any:
    """The compiled step: it donates its state, and places the new one as `state` is placed.

    Under a mesh the compiler would else choose for itself, and the second step be another program.
    Metrics are then whole on every device, so that every process can read them.

    Args:
        step: from `train_step`.
        state: as all states will be placed.
        frozen: parameters that a step with `combine` takes besides; no constants of the program.
    """
    if frozen is not None:
        return Bound(jitted(step, state), frozen)
    placed = jax.tree.map(lambda a: a.sharding, state)
    mesh = getattr(placed.step, "mesh", None)
    if mesh is None:  # said aloud, one device's placement would itself make two programs of it
        return jax.jit(step, donate_argnums=0)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))


def several(step: Step) -> Step:
    """A step over a list of batches with one optimiser update each; it counts as one step.

    For reinforcement learning: one rollout, several mini-batches. Every update has randomness of
    its own. Metrics are those of the last update, with all updates' sums added up.
    """

    def run(state: State, batches: Sequence[Batch]) -> tuple[State, Metrics]:
        begin, seed, metrics = state.step + 0, state.seed + 0, None
        for i, batch in enumerate(batches):
            # Mixed by a large odd number, so that no update of another step has the same.
            state = state._replace(seed=seed + jnp.int32(i * 0x3C6EF35F % 0x7FFFFFFF))
            state = state._replace(step=begin + 0)
            state, found = step(state, batch)
            if metrics is not None:
                found["weight"] = found["weight"] + metrics["weight"]
                found["sums"] = merged(metrics["sums"], found["sums"])
                found["finite"] = found["finite"] & metrics["finite"]
                found["leaves"] = found["leaves"] & metrics["leaves"]
            metrics = found
        assert metrics is not None
        return state._replace(seed=seed, step=begin + 1), metrics

    return run


def culprits(state: State, metrics: Metrics) -> list[str]:
    """Names of the parameters whose gradient was not finite, such as "moe/mlp/gate/weight"."""
    return [n for n, fine in zip(named(state.params), metrics["leaves"], strict=True) if not fine]


def cast(params: Params, dtype: str) -> Params:
    """Floating-point leaves of 16 bits and more in `dtype`, all but the router's weights."""

    def change(path, leaf):
        wide = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1
        router = any(getattr(k, "key", None) == "gate" for k in path)
        return leaf.astype(dtype) if wide and not router else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def merged(a: Metrics, b: Metrics) -> Metrics:
    """Sums of two parts of a batch as those of the whole."""
    return jax.tree.map(
        lambda x, y: Peak(jnp.maximum(x.value, y.value)) if isinstance(x, Peak) else x + y,
        a, b, is_leaf=lambda x: isinstance(x, Peak),
    )  # fmt: skip


def _summed(part: Callable, batch: Batch, key: jax.Array, accumulate: int) -> Any:
    """(Output, gradient) of all micro-batches, one at a time."""
    cut = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0), batch)
    first = jax.eval_shape(part, jax.tree.map(lambda a: a[0], cut), key)

    def nothing(leaf):
        if isinstance(leaf, Peak):
            return Peak(jnp.full(leaf.value.shape, -jnp.inf, leaf.value.dtype))
        return jnp.zeros(leaf.shape, leaf.dtype)

    empty = jax.tree.map(nothing, first, is_leaf=lambda x: isinstance(x, Peak))
    return jax.lax.scan(
        lambda carry, x: (merged(carry, part(*x)), None),
        empty,
        (cut, jax.random.split(key, accumulate)),
    )[0]

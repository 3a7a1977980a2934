"""The loop: which batches it asks for, when it stops, what hooks see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo.recipes.parts.fit import NonFiniteError, fit
from deepzoo.recipes.parts.step import Output, start, train_step


def loss(params, batch, key) -> Output:
    """Its gradient is NaN for `b/c` where the batch says so."""
    del key
    bad = jnp.where(batch["bad"], jnp.nan, 0.0) * params["b"]["c"]
    total = params["a"] ** 2 + bad - jax.lax.stop_gradient(bad)
    return Output(total, jnp.ones(()), {"x": batch["x"]})


TX = optax.sgd(0.1)
STEP = jax.jit(train_step(loss, TX))


def begin(at: int = 0):
    state = start({"a": jnp.ones(()), "b": {"c": jnp.ones(())}}, TX, 0)
    return state._replace(step=jnp.asarray(at, jnp.int32))


def batch(step: int, bad: bool = False) -> dict:
    return {"x": np.float32(step), "bad": np.bool_(bad)}


def test_every_batch_is_asked_for_once_in_order_from_where_the_state_is():
    asked, seen = [], []

    def asking(step: int) -> dict:
        asked.append(step)
        return batch(step)

    state = fit(
        STEP, begin(3), asking, 7,
        [lambda s, m: seen.append((int(s.step), float(m["sums"]["x"])))],
    )  # fmt: skip
    assert asked == [3, 4, 5, 6]
    assert seen == [(4, 3.0), (5, 4.0), (6, 5.0), (7, 6.0)]
    assert int(state.step) == 7
    asked.clear()
    assert int(fit(STEP, state, asking, 7).step) == 7
    assert asked == []


def test_a_hook_can_end_the_loop_after_the_others_were_called():
    seen = []
    state = fit(
        STEP, begin(), batch, 100,
        [lambda s, m: int(s.step) == 3, lambda s, m: seen.append(int(s.step))],
    )  # fmt: skip
    assert (int(state.step), seen) == (3, [1, 2, 3])


def test_three_bad_batches_in_a_row_end_the_run_and_name_the_parameter():
    bad, hooked = (1, 2, 4, 5, 6), []
    with pytest.raises(NonFiniteError) as told:
        fit(
            STEP, begin(), lambda step: batch(step, step in bad), 9,
            [lambda s, m: hooked.append(bool(m["finite"]))],
        )  # fmt: skip
    assert "the gradient of b/c was not finite; 3 batches in a row" in str(told.value)
    assert "the parameters are those after step 4, batch 4 was the first" in str(told.value).lower()
    assert hooked == [True, False, False, True, False, False]

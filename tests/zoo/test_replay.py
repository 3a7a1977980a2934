"""A pass with the experts that another pass chose (routing replay)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import golden, whole

from deepzoo import zoo


@pytest.mark.parametrize("case", ["v2_lite_like", "v3_noq"])
@pytest.mark.parametrize("stacked", [True, False])
def test_the_pass_with_its_own_experts_is_itself(case, stacked):
    config, params, expected = golden(case)
    params = params if stacked else zoo.unstack(params)
    plain = whole(case)
    tokens = jnp.asarray(expected["tokens"])
    again = zoo.apply(config, params, tokens, experts=plain.routing.indices)
    np.testing.assert_array_equal(again.routing.indices, plain.routing.indices)
    np.testing.assert_allclose(again.logits, plain.logits, atol=2e-5)


def test_replay_holds_the_experts_and_not_the_weights():
    """Moved parameters choose other experts; replayed, the old ones stay and the scores are new."""
    config, params, expected = golden("v2_lite_like")
    plain = whole("v2_lite_like")
    tokens = jnp.asarray(expected["tokens"])

    def moved(leaf):
        key = jax.random.key(leaf.size)
        return leaf + 0.1 * leaf.std() * jax.random.normal(key, leaf.shape, leaf.dtype)

    other = jax.tree.map(moved, params)
    free = zoo.apply(config, other, tokens)
    assert (np.asarray(free.routing.indices) != np.asarray(plain.routing.indices)).any()
    held = zoo.apply(config, other, tokens, experts=plain.routing.indices)
    np.testing.assert_array_equal(held.routing.indices, plain.routing.indices)
    expected_weights = np.take_along_axis(
        np.asarray(held.routing.scores), np.asarray(plain.routing.indices), axis=-1
    )
    if config.norm_topk_prob:
        expected_weights /= expected_weights.sum(axis=-1, keepdims=True)
    ratio = np.asarray(held.routing.weights) / expected_weights
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-4)
    assert np.abs(np.asarray(held.logits - free.logits)).max() > 1e-3

    def loss(params):
        out = zoo.apply(config, params, tokens, experts=plain.routing.indices)
        return jax.nn.log_softmax(out.logits)[..., 0].mean()

    gradient = jax.jit(jax.grad(loss))(other)["moe"]["mlp"]["gate"]["weight"]
    assert np.abs(np.asarray(gradient)).max() > 0  # router logits stay live

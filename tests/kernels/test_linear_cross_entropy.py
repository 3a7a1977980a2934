"""Chunked linear cross entropy and its gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy, reference


@pytest.mark.parametrize("chunk", [4, 7, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_logprobs_and_gradients_equal_the_reference(chunk, z_loss):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((18, 6)).astype(np.float32), rng.standard_normal((11, 6))
    w = w.astype(np.float32)
    targets, weights = rng.integers(0, 11, 18), rng.integers(0, 3, 18).astype(np.float32)

    def loss(x, w):
        return linear_cross_entropy(x, w, jnp.asarray(targets), weights, z_loss=z_loss, chunk=chunk)

    (value, logprob), (to_x, to_w) = jax.value_and_grad(
        lambda x, w: loss(x, w), argnums=(0, 1), has_aux=True
    )(jnp.asarray(x), jnp.asarray(w))
    expected = reference.linear_cross_entropy(x, w, targets, weights, z_loss=z_loss)
    assert abs(float(value) - expected[0]) < 1e-5 * abs(expected[0])
    for got, want in zip((logprob, to_x, to_w), expected[1:], strict=True):
        assert np.abs(np.asarray(got) - want).max() < 2e-5
    plain, _ = loss(jnp.asarray(x), jnp.asarray(w))
    assert float(plain) == float(value)


def test_weights_default_to_ones_and_zero_weights_give_nothing():
    x, w = jnp.ones((3, 2)), jnp.asarray(np.eye(2, dtype=np.float32))
    value, _ = linear_cross_entropy(x, w, jnp.zeros(3, jnp.int32))
    assert abs(float(value) - 3 * np.log(2)) < 1e-6
    silent = jax.grad(lambda x: linear_cross_entropy(x, w, jnp.zeros(3, int), jnp.zeros(3))[0])(x)
    assert (np.asarray(silent) == 0).all()

"""Chunked linear cross entropy and its gradients against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.linear_cross_entropy import chunk_size, linear_cross_entropy, reference


def data(tokens, width, vocabulary, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)).astype(dtype)
    w = (rng.standard_normal((vocabulary, width)) / width**0.5).astype(dtype)
    return x, w, rng.integers(0, vocabulary, tokens).astype(np.int32)


def with_gradients(x, w, targets, weights=None, **options):
    return jax.value_and_grad(
        lambda x, w: linear_cross_entropy(x, w, targets, weights, **options),
        argnums=(0, 1),
        has_aux=True,
    )(x, w)


def distance(got, want):
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("chunk", [4, 7, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_logprobs_and_gradients_equal_the_reference(chunk, z_loss):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((18, 6)).astype(np.float32), rng.standard_normal((11, 6))
    w = w.astype(np.float32)
    targets, weights = rng.integers(0, 11, 18), rng.integers(0, 3, 18).astype(np.float32)
    (value, logprob), (to_x, to_w) = with_gradients(
        jnp.asarray(x), jnp.asarray(w), targets, weights, z_loss=z_loss, chunk=chunk
    )
    expected = reference.linear_cross_entropy(x, w, targets, weights, z_loss=z_loss)
    assert abs(float(value) - expected[0]) < 1e-5 * abs(expected[0])
    for got, want in zip((logprob, to_x, to_w), expected[1:], strict=True):
        assert np.abs(np.asarray(got) - want).max() < 2e-5
    plain, _ = linear_cross_entropy(x, w, targets, weights, z_loss=z_loss, chunk=chunk)
    assert float(plain) == float(value)


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(partial(with_gradients, z_loss=1e-3, chunk=8))


@given(seed=st.integers(0, 99), spread=st.floats(1e-3, 30), silent=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_any_logits_and_weights(compiled, seed, spread, silent):
    """Large and tiny logits, negative weights (advantages), tokens without weight."""
    x, w, targets = data(19, 5, 23, seed=seed)
    x = (x * spread).astype(np.float32)
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal(19) * (rng.random(19) >= silent)).astype(np.float32)
    anything = np.where(weights == 0, rng.integers(-(10**9), 10**9, 19), targets).astype(np.int32)
    (value, logprob), (to_x, to_w) = compiled(x, w, anything, weights)
    expected = reference.linear_cross_entropy(x, w, targets, weights, z_loss=1e-3)
    scale = 1e-5 * (1 + spread)
    assert abs(float(value) - expected[0]) < scale * (1 + np.abs(weights).sum() * spread)
    used = weights != 0
    assert np.abs(np.asarray(logprob)[used] - expected[1][used]).max(initial=0) < scale
    for got, want in ((to_x, expected[2]), (to_w, expected[3])):
        assert np.abs(np.asarray(got) - want).max() < scale * (1 + np.abs(want).max())
    assert (np.asarray(to_x)[~used] == 0).all()
    again = compiled(x, w, anything, weights)[1]
    assert all(np.array_equal(a, b) for a, b in zip(again, (to_x, to_w), strict=True))


def test_weights_default_to_ones_and_zero_weights_give_nothing():
    x, w = jnp.ones((3, 2)), jnp.asarray(np.eye(2, dtype=np.float32))
    value, _ = linear_cross_entropy(x, w, jnp.zeros(3, jnp.int32))
    assert abs(float(value) - 3 * np.log(2)) < 1e-6
    silent = jax.grad(lambda x: linear_cross_entropy(x, w, jnp.zeros(3, int), jnp.zeros(3))[0])(x)
    assert (np.asarray(silent) == 0).all()


def test_the_loss_can_be_scaled_after_it_was_made():
    x, w, targets = data(9, 4, 7)
    (_, _), once = with_gradients(x, w, targets)
    twice = jax.grad(lambda x, w: 3 * linear_cross_entropy(x, w, targets)[0], argnums=(0, 1))(x, w)
    for a, b in zip(once, twice, strict=True):
        assert np.allclose(3 * np.asarray(a), b, rtol=1e-6)


def whole(x, w, targets):
    """The same in one piece, in the arithmetic of a plain program."""
    logits = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return (lse - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]).sum()


def test_bfloat16_is_as_exact_as_a_plain_program():
    x, w, targets = data(256, 64, 500, ml_dtypes.bfloat16)
    expected = reference.linear_cross_entropy(x, w, targets, np.ones(256))
    (value, logprob), gradients = with_gradients(x, w, targets, chunk=64, accumulator="float32")
    assert abs(float(value) - expected[0]) < 1e-5 * expected[0]
    assert np.abs(np.asarray(logprob) - expected[1]).max() < 1e-4
    plain = jax.grad(whole, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets))
    for got, other, want in zip(gradients, plain, expected[2:], strict=True):
        assert got.dtype == jnp.bfloat16
        assert distance(got, want) < min(1.5 * distance(other, want), 1e-2)


def test_error_of_each_accumulator():
    """What the docstring says of the gradient to `w` in bfloat16."""
    for chunks in (4, 32):
        x, w, targets = data(chunks * 64, 64, 500, ml_dtypes.bfloat16)
        want = reference.linear_cross_entropy(x, w, targets, np.ones(len(x)))[3]
        error = {}
        for kept in ("bfloat16", "float32"):
            _, (_, to_w) = with_gradients(x, w, targets, chunk=64, accumulator=kept)
            error[kept] = distance(to_w, want)
        shown = ", ".join(f"{kept} {100 * e:.2f}%" for kept, e in error.items())
        print(f"gradient to w, {chunks} chunks: error {shown}")
        assert error["float32"] < 2.5e-3
        assert error["bfloat16"] < {4: 4e-3, 32: 8e-3}[chunks]
        _, (_, to_w) = with_gradients(x, w, targets, chunk=64)
        assert distance(to_w, want) == error["bfloat16" if chunks == 4 else "float32"]


def test_logits_are_never_held_whole():
    """Scratch of the compiled program does not grow with the tokens, and is that of one chunk."""

    def scratch(tokens):
        x, w, targets = data(tokens, 16, 5000)
        program = jax.jit(partial(with_gradients, chunk=128)).lower(x, w, targets).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    chunk = 128 * 5000 * 4
    # besides: one gradient to w, and the tokens themselves
    assert scratch(512) < 3.2 * chunk
    assert scratch(2048) - scratch(512) < 0.3 * chunk


def test_chunks_are_large_and_bounded():
    assert chunk_size(4096, 102400) == 1024 and chunk_size(4096, 129280) == 1024
    assert chunk_size(8192, 151936) == 512 and chunk_size(8192, 1000) == 4096
    assert chunk_size(100, 1000) == 100 and chunk_size(0, 1000) == 1


def test_no_tokens_lose_nothing():
    x, w, targets = data(0, 4, 7)
    (value, logprob), (to_x, to_w) = with_gradients(x, w, targets)
    assert float(value) == 0 and logprob.shape == (0,) and to_x.shape == (0, 4)
    assert (np.asarray(to_w) == 0).all()


def test_wrong_shapes_are_told():
    x, w, targets = data(9, 4, 7)
    with pytest.raises(ValueError, match=r"w \[V, D\], got \(9, 4\) and \(7, 3\)"):
        linear_cross_entropy(x, w[:, :3], targets)
    with pytest.raises(ValueError, match=r"\[M\] = \(9,\), got \(9,\) and \(8,\)"):
        linear_cross_entropy(x, w, targets, np.ones(8))
    with pytest.raises(ValueError, match="at least one token, got 0"):
        linear_cross_entropy(x, w, targets, chunk=0)

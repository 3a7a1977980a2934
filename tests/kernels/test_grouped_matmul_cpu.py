"""The grouped matmul's form for CPUs: against the float64 reference, the loops, and where it is
lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.grouped_matmul import cpu, loops, reference, xla


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# rows, sizes: few rows; few rows with spare ones; even; everything in one group, beyond its room;
# empty groups between; less than all rows.
CASES = [
    (6, [1, 0, 3, 2]),
    (8, [0, 2, 0, 3]),
    (64, [16, 16, 16, 16]),
    (64, [0, 64, 0, 0]),
    (100, [1, 60, 0, 39]),
    (100, [50, 0, 0, 7]),
]


@pytest.mark.parametrize("width", [48, 40])  # with and without whole lanes
@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_products_and_gradients_equal_the_reference(rows, sizes, width):
    x, w, g = normal(rows, width), normal(4, 24, width, seed=1), normal(rows, 24, seed=2)
    sizes, real = jnp.asarray(sizes, jnp.int32), sum(sizes)
    x[real:], g[real:] = np.nan, np.nan  # nobody's rows may hold anything
    out = np.asarray(jax.jit(cpu.rows_times_groups)(x, w, sizes))
    assert np.abs(out - reference.grouped_matmul(x, w, sizes)).max() < 2e-5
    assert (out[real:] == 0).all()
    back = np.asarray(cpu.rows_times_groups(jnp.asarray(g), w, sizes, transposed=True))
    assert np.abs(back - reference.grouped_matmul(g, w.swapaxes(1, 2), sizes)).max() < 2e-5
    assert (back[real:] == 0).all()
    to_w = np.asarray(cpu.group_outer(jnp.asarray(g), jnp.asarray(x), sizes, jnp.float32))
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        mine = slice(start, start + size)
        assert np.abs(to_w[e] - g[mine].T @ x[mine]).max() < 1e-4
        start += size


@pytest.mark.parametrize("rows", [6, 100])
def test_bfloat16_is_accumulated_in_float32(rows):
    """A sum of 2048 ones and one 2^8: bfloat16 sums would stay at 256."""
    x, w = jnp.ones((rows, 2048), jnp.bfloat16), jnp.ones((4, 16, 2048), jnp.bfloat16)
    x, w = x.at[:, 0].set(16), w.at[:, :, 0].set(16)
    out = cpu.rows_times_groups(x, w, jnp.asarray([rows, 0, 0, 0], jnp.int32))
    assert out.dtype == jnp.bfloat16
    assert np.asarray(out, np.float32).min() == np.asarray(out, np.float32).max() == 2304


@pytest.mark.parametrize("rows", [6, 100])
def test_only_cpus_get_it(rows):
    """Lowered for a CPU, the program of `xla` is this form's; for CUDA it is the loops'."""
    x, w, sizes = normal(rows, 48), normal(4, 24, 48), np.array([1, 2, 0, 3], np.int32)

    def text(f, platform):
        traced = jax.jit(f).trace(x, w, sizes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def chosen(x, w, sizes):
        return xla.rows_times_groups(x, w, None, sizes)

    def looped(x, w, sizes):
        return loops.rows_times_groups(x, w, None, sizes)

    def products(text):
        return sorted(line.split(" : ")[1] for line in text.splitlines() if "dot_general" in line)

    assert "while" in text(looped, "cuda")
    assert products(text(chosen, "cuda")) == products(text(looped, "cuda"))
    assert products(text(chosen, "cpu")) == products(text(cpu.rows_times_groups, "cpu"))
    assert products(text(chosen, "cpu")) != products(text(looped, "cpu"))

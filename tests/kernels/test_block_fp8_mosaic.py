"""FP8 x FP8 on Hopper: the Mosaic kernels in the GPU interpreter, which watches for races and fills
memory with NaN, and the list of tiles of the grouped one."""

import child
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepzoo.kernels.block_fp8 import (
    grouped_matmul_fp8,
    matmul_fp8,
    mosaic,
    mosaic_grouped,
    reference,
)
from deepzoo.kernels.block_fp8.mosaic import Config
from deepzoo.kernels.targets import TARGETS

WATCH = plgpu.InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def no_races(capsys):
    """The oldest jax prints a race and goes on."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def values(seed, *shape):
    x = np.random.default_rng(seed).standard_normal(shape) * 3
    return x.astype(ml_dtypes.float8_e4m3fn)


def scales(seed, *shape):
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def product(m, n, k):
    return (
        values(1, m, k),
        scales(2, m, k // 128),
        values(3, n, k),
        scales(4, -(-n // 128), k // 128),
    )


def experts(sizes, m, n, k):
    groups = len(sizes)
    w, w_scale = values(3, groups, n, k), scales(4, groups, -(-n // 128), k // 128)
    return values(1, m, k), scales(2, m, k // 128), w, w_scale, np.asarray(sizes, np.int32)


def distance(got, want):
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


ROUNDING = 1.8e-3  # of a bfloat16 result; what the same product in XLA has, too


@pytest.mark.parametrize(
    ("m", "n", "k", "cut"),
    [
        (200, 208, 384, Config(128, 128, 2, 1)),  # partial tiles of rows and columns
        (72, 104, 256, Config(64, 64, 3, 1)),  # consumers halve the columns
        (5, 40, 128, Config(64, 32, 2, 1)),  # fewer rows than TMA moves, one step
        (130, 256, 256, Config(128, 128, 2, 2)),  # two blocks share the rows
    ],
)
def test_dense_product_equals_the_reference(m, n, k, cut):
    arrays = product(m, n, k)
    want = reference.matmul_fp8(*arrays)
    out = mosaic.matmul(*map(jnp.asarray, arrays), jnp.bfloat16, interpret=WATCH, cut=cut)
    assert out.shape == (m, n)
    assert distance(out, want) < ROUNDING
    plain = matmul_fp8(*arrays, implementation="xla")
    assert distance(out, want) <= 1.5 * distance(plain, want)


@pytest.mark.parametrize(("m", "n", "k"), [(16, 192, 256)])
def test_public_entry_runs_the_kernel_and_reruns_give_the_same_bits(m, n, k):
    arrays = product(m, n, k)
    runs = [
        matmul_fp8(*arrays, dtype=jnp.float16, implementation="mosaic", interpret=True)
        for _ in range(2)
    ]
    assert runs[0].dtype == jnp.float16
    assert distance(runs[0], reference.matmul_fp8(*arrays)) < ROUNDING
    assert np.array_equal(*runs)


@pytest.mark.parametrize(
    ("sizes", "m", "n", "cut"),
    [
        ([10, 0, 75, 1], 100, 208, Config(64, 128, 2, 1)),  # rows of nobody, an empty group
        ([0, 0, 40, 0], 40, 256, Config(64, 128, 2, 2)),  # one group has all, in clusters
        ([130, 0, 5, 1], 140, 128, Config(128, 128, 2, 1)),  # tiles of 128 rows
        ([0, 0, 0], 9, 128, Config(64, 128, 2, 1)),  # nobody has any
    ],
)
def test_grouped_product_equals_the_reference(sizes, m, n, cut):
    x, x_scale, w, w_scale, sizes = experts(sizes, m, n, 256)
    want = reference.grouped_matmul_fp8(x, x_scale, w, w_scale, sizes)
    real = int(sizes.sum())
    x[real:], x_scale[real:] = np.nan, np.nan
    arrays = map(jnp.asarray, (x, x_scale, w, w_scale, sizes))
    out = np.asarray(mosaic_grouped.matmul(*arrays, jnp.bfloat16, interpret=WATCH, cut=cut))
    assert (out[real:] == 0).all()
    assert distance(out, want) < ROUNDING


@given(shares=st.lists(st.integers(0, 5), min_size=3, max_size=3), spare=st.integers(0, 2))
@settings(max_examples=4, deadline=None)
def test_grouped_product_of_any_sizes(shares, spare):
    edges = np.floor(np.cumsum(shares) / max(sum(shares), 1) * (30 - spare)).astype(np.int32)
    x, x_scale, w, w_scale, sizes = experts(np.diff(edges, prepend=0), 30, 128, 128)
    want = reference.grouped_matmul_fp8(x, x_scale, w, w_scale, sizes)
    out = grouped_matmul_fp8(x, x_scale, w, w_scale, sizes, implementation="mosaic", interpret=True)
    assert distance(out, want) < ROUNDING


UNSAFE = """
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from deepzoo.kernels.block_fp8 import mosaic
mosaic.plgpu.barrier_wait = lambda barrier: None
values, scales = jnp.ones((128, 384), jnp.float8_e4m3fn), jnp.ones((128, 3))
how, cut = plgpu.InterpretGPUParams(detect_races=True), mosaic.Config(64, 128, 2, 1)
arrays = values[:8], scales[:8], values, scales[:1], jnp.bfloat16
try:
    mosaic.matmul(*arrays, interpret=how, cut=cut).block_until_ready()
except Exception as error:
    print(error)
"""


def test_a_missing_wait_is_seen():
    """The interpreter's watch works: warpgroups that do not wait for each other are a race."""
    assert "RACE DETECTED" in child.run(UNSAFE).stdout


@pytest.fixture(scope="module")
def tiled():
    """One compiled program per tile height, so that hypothesis changes data only."""

    def both(group_sizes, height):
        starts, source = mosaic_grouped.layout(group_sizes, TOTAL)
        return source, mosaic_grouped.schedule(group_sizes, starts, TOTAL, height)

    return jax.jit(both, static_argnums=1)


TOTAL = 700


@given(
    shares=st.lists(st.integers(0, 150), min_size=5, max_size=5),
    spare=st.integers(0, 140),
    height=st.sampled_from([64, 128]),
)
@settings(max_examples=100, deadline=None)
def test_tiles_cover_every_row_once_with_its_own_group(tiled, shares, spare, height):
    edges = np.cumsum(shares) * (TOTAL - spare) // max(sum(shares), 1)
    sizes = np.diff(edges, prepend=0).astype(np.int32)
    source, table = jax.tree.map(np.asarray, tiled(sizes, height))
    assert len(source) % 8 == 0
    owner = np.repeat(np.arange(6), [*sizes, TOTAL - sizes.sum()])
    seen = np.zeros(TOTAL, int)
    for group, first, target, count, zeros in zip(*table, strict=True):
        mine = np.arange(target, target + count)
        seen[mine] += 1
        if count == 0:
            continue
        assert (owner[mine] == (5 if zeros else group)).all()
        if not zeros:
            assert first % 8 == 0
            assert np.array_equal(source[first : first + count], mine)
    assert (seen == 1).all()


@pytest.mark.parametrize("m", [1, 64, 65, 128, 513, 4096])
@pytest.mark.parametrize("n", [8, 576, 2112, 7168, 32768])
def test_tiles_fit_shared_memory_and_lie_in_one_scale_block(m, n):
    for cut in (mosaic.dense_config(m, n, 132), mosaic_grouped.grouped_config(m, n, 64)):
        shared = cut.stages * (cut.rows + cut.columns) * 128 + 2 * 64 * cut.mine * 2
        assert shared + 1024 <= TARGETS["h200"].shared_per_block
        assert 128 % cut.mine == 0 and cut.stages >= 4
        assert cut.cluster == 1 or n % (cut.columns * 2) == 0

"""Grouped matmul and fused SwiGLU in XLA and Triton (interpreted), forward and gradients, against
float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepzoo.kernels.block_fp8 import dequantize, quantize
from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.grouped_matmul import (
    cases,
    grouped_matmul,
    grouped_swiglu,
    reference,
    tiles,
)
from deepzoo.kernels.grouped_matmul import triton as kernels
from deepzoo.kernels.grouped_matmul.tiles import Tile

FORMS = {
    "xla": {"implementation": "xla"},
    "triton": {"implementation": "triton", "interpret": True},
}
GROUPS, WIDTH, INNER = 5, 40, 72  # neither width is a multiple of a tile
HEIGHTS = [6, 90]  # decode and prefill forms
EVERY = {"argnames": "form", "argvalues": FORMS}


def normal(*shape, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.array(jnp.asarray(values, dtype))  # a copy: tests write into it


def sizes_of(shares, real):
    """Group sizes in proportion to `shares`, `real` rows together; nobody's if all are zero."""
    if not any(shares):
        return np.zeros(len(shares), np.int32)
    ends = np.floor(np.cumsum(shares) / sum(shares) * real).astype(np.int32)
    return np.diff(ends, prepend=0).astype(np.int32)


def error(got, expected):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def matmul_program(form):
    def run(x, w, sizes, g):
        out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **FORMS[form]), x, w)
        return out, *back(g)

    return jax.jit(run)


def swiglu_program(form):
    def run(x, gate, up, sizes, g):
        def call(*a):
            return grouped_swiglu(*a, sizes, **FORMS[form])

        out, back = jax.vjp(call, x, gate, up)
        return call(x, gate, up), out, *back(g)

    return jax.jit(run)


@pytest.fixture(scope="module")
def programs():
    """One compiled program a form and shape, so that hypothesis only changes data."""
    return {
        "matmul": {form: matmul_program(form) for form in FORMS},
        "swiglu": {form: swiglu_program(form) for form in FORMS},
    }


GROUP_SIZES = {
    "rows": st.sampled_from(HEIGHTS),
    "shares": st.lists(st.integers(0, 9), min_size=GROUPS, max_size=GROUPS),
    "spare": st.integers(0, 3),
}


@pytest.mark.parametrize(**EVERY)
@given(**GROUP_SIZES)
@example(rows=90, shares=[0, 0, 1, 0, 0], spare=0)
@example(rows=90, shares=[0, 0, 0, 0, 0], spare=0)
@example(rows=90, shares=[1, 0, 0, 0, 9], spare=3)
@settings(max_examples=25)
def test_matmul_and_its_gradients_equal_the_reference(programs, form, rows, shares, spare):
    """Empty groups, one group with everything, nobody with anything, NaN in nobody's rows."""
    sizes = sizes_of(shares, rows - spare)
    real = sizes.sum()
    x, w, g = normal(rows, INNER, seed=rows), normal(GROUPS, WIDTH, INNER), normal(rows, WIDTH)
    expected = reference.grouped_matmul(x, w, sizes), *reference.gradients(x, w, sizes, g)
    x[real:], g[real:] = np.nan, np.nan
    out = programs["matmul"][form](x, w, sizes, g)
    for got, want in zip(out, expected, strict=True):
        assert error(got, want) < 2e-6
    assert (np.asarray(out[0])[real:] == 0).all()
    assert (np.asarray(out[1])[real:] == 0).all()
    assert (np.asarray(out[2])[sizes == 0] == 0).all()
    again = programs["matmul"][form](x, w, sizes, g)
    assert all(np.array_equal(a, b) for a, b in zip(out, again, strict=True))


@pytest.mark.parametrize(**EVERY)
@given(**GROUP_SIZES)
@example(rows=90, shares=[0, 0, 0, 0, 0], spare=0)
@settings(max_examples=15)
def test_swiglu_and_its_gradients_equal_the_reference(programs, form, rows, shares, spare):
    sizes = sizes_of(shares, rows - spare)
    real = sizes.sum()
    x, g = normal(rows, INNER, seed=rows), normal(rows, WIDTH, seed=1)
    gate, up = normal(GROUPS, WIDTH, INNER) / 8, normal(GROUPS, WIDTH, INNER, seed=2) / 8
    expected = reference.grouped_swiglu(x, gate, up, sizes)
    gradients = reference.swiglu_gradients(x, gate, up, sizes, g)
    x[real:], g[real:] = np.nan, np.nan
    out, kept, *found = programs["swiglu"][form](x, gate, up, sizes, g)
    assert np.array_equal(out, kept)
    assert error(out, expected) < 2e-6
    for got, want in zip(found, gradients, strict=True):
        assert error(got, want) < 2e-6
    assert (np.asarray(out)[real:] == 0).all() and (np.asarray(found[0])[real:] == 0).all()


@pytest.mark.parametrize("rows", HEIGHTS)
def test_triton_in_bfloat16_is_as_exact_as_xla(programs, rows):
    """Error against float64 at most 1.5 times that of XLA, and below 1e-2."""
    sizes = sizes_of([3, 0, 1, 9, 1], rows)
    x, w, g = (
        normal(*shape, seed=i, dtype=jnp.bfloat16)
        for i, shape in enumerate([(rows, INNER), (GROUPS, WIDTH, INNER), (rows, WIDTH)])
    )
    expected = reference.grouped_matmul(x, w, sizes), *reference.gradients(x, w, sizes, g)
    xla, triton = (programs["matmul"][form](x, w, sizes, g) for form in FORMS)
    up = normal(GROUPS, WIDTH, INNER, seed=5, dtype=jnp.bfloat16)
    gate, up = (np.asarray(a / 8) for a in (w, up))
    expected += (reference.grouped_swiglu(x, gate, up, sizes),)
    expected += reference.swiglu_gradients(x, gate, up, sizes, g)
    xla += programs["swiglu"]["xla"](x, gate, up, sizes, g)[1:]
    triton += programs["swiglu"]["triton"](x, gate, up, sizes, g)[1:]
    for ours, theirs, want in zip(triton, xla, expected, strict=True):
        assert error(ours, want) < 1.5 * error(theirs, want) + 1e-9
        assert error(ours, want) < 1e-2


TILES = {
    "decode": Tile(16, 64, 128, 4, 3, swapped=True),
    "v3": Tile(64, 128, 64, 8, 4),
    "v2_lite": Tile(128, 256, 64, 8, 4),
}


@pytest.fixture
def last_block_first(monkeypatch):
    """Blocks run in any order on a GPU, but one after another in the interpreter, which hides a
    block that writes beyond its own rows: the next one mends it, unless they run backwards."""
    ahead = kernels.pl.program_id
    monkeypatch.setattr(
        kernels.pl, "program_id", lambda axis: kernels.pl.num_programs(axis) - 1 - ahead(axis)
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.usefixtures("last_block_first")
def test_each_tile_of_the_triton_form(tile):
    """Tiles of real shapes, several across and along, at widths that they do not divide."""
    rows, groups, width, inner = 150, 3, 2 * TILES[tile].columns - 28, 2 * TILES[tile].depth - 20
    sizes = np.array([133, 0, 12], np.int32)
    x, w, g = (
        normal(*shape, seed=i, dtype=jnp.bfloat16)
        for i, shape in enumerate([(rows, inner), (groups, width, inner), (rows, width)])
    )
    options = {"interpret": True, "tile": TILES[tile]}

    def run(xs, ws, **more):
        return kernels.rows_times_groups(xs, ws, (None,) * len(ws), sizes, **options, **more)

    to_x, to_w = reference.gradients(x, w, sizes, g)
    assert error(run((g, g), (w, w), transposed=True), 2 * to_x) < 3e-3
    assert error(run((x,), (w,)), reference.grouped_matmul(x, w, sizes)) < 3e-3
    (h,) = kernels.swiglu(x, (w, w), (None, None), sizes, **options)
    assert error(h, reference.grouped_swiglu(x, w, w, sizes)) < 3e-3
    options["tile"] = TILES[tile]._replace(depth=32)
    assert error(kernels.group_outer(g, x, sizes, jnp.bfloat16, **options), to_w) < 3e-3


@pytest.mark.parametrize(**EVERY)
@pytest.mark.parametrize("rows", [4, 64])
def test_fp8_groups_are_multiplied_with_their_scales(form, rows):
    w, scale = quantize(jnp.asarray(normal(3, 130, 140)))
    up, up_scale = quantize(jnp.asarray(normal(3, 130, 140, seed=3)))
    sizes, x = np.array([1, 0, rows - 1], np.int32), normal(rows, 140, seed=1)
    dense, dense_up = (
        np.asarray(dequantize(*a, jnp.float32)) for a in ((w, scale), (up, up_scale))
    )
    g = normal(rows, 130, seed=2)

    def matmul(x):
        return grouped_matmul(x, w, sizes, scale, **FORMS[form])

    def swiglu(x):
        return grouped_swiglu(x, w, up, sizes, scale, up_scale, **FORMS[form])

    out, back = jax.vjp(matmul, jnp.asarray(x))
    assert error(out, reference.grouped_matmul(x, dense, sizes)) < 1e-6
    assert error(back(jnp.asarray(g))[0], reference.gradients(x, dense, sizes, g)[0]) < 1e-6
    out, back = jax.vjp(swiglu, jnp.asarray(x) / 8)
    assert error(out, reference.grouped_swiglu(x / 8, dense, dense_up, sizes)) < 1e-6
    to_x = reference.swiglu_gradients(x / 8, dense, dense_up, sizes, g)[0]
    assert error(back(jnp.asarray(g))[0], to_x) < 1e-6


def test_fp8_bits_are_read_exactly_without_the_type():
    """All 256 patterns; GPUs before sm_89 have no conversion."""
    bits = jnp.arange(256, dtype=jnp.uint8)
    values = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)
    found = kernels._from_bits(jax.lax.bitcast_convert_type(bits, jnp.int8), jnp.bfloat16)
    assert np.array_equal(np.asarray(found, np.float32), values, equal_nan=True)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    tile=st.sampled_from([16, 32]),
)
def test_the_static_count_of_tiles_is_enough_and_reached(sizes, tile):
    rows = sum(sizes)
    needed = sum(-(-s // tile) for s in sizes)
    assert needed <= tiles.count(rows, len(sizes), tile)
    used = min(rows, len(sizes))  # all but one group of one row each, the last has the rest
    worst = [1] * (used - 1) + [rows - used + 1] if used else []
    assert sum(-(-s // tile) for s in worst) == tiles.count(rows, len(sizes), tile)


def test_no_rows_give_nothing_and_zero_gradients():
    for options in FORMS.values():
        out, back = jax.vjp(
            lambda w, o=options: grouped_matmul(jnp.zeros((0, 3)), w, np.zeros(2, np.int32), **o),
            jnp.ones((2, 5, 3)),
        )
        assert out.shape == (0, 5)
        assert (back(out)[0] == 0).all()


def test_wrong_shapes_lonely_scales_and_impossible_forms_are_refused():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 5, 3)), jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match=r"group_sizes \[E\]"):
        grouped_matmul(x, w, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="together"):
        grouped_matmul(x, w, sizes, jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError, match=r"w_scale must be \(2, 1, 1\)"):
        grouped_matmul(x, w.astype(jnp.float8_e4m3fn), sizes, jnp.ones((2, 2, 1)))
    with pytest.raises(ValueError, match="integers"):
        grouped_matmul(x, w, jnp.zeros((2,)))
    with pytest.raises(ValueError, match="alike"):
        grouped_swiglu(x, w, jnp.zeros((2, 4, 3)), sizes)
    with pytest.raises(UnsupportedError, match=r"sm_90.*float32.*multiple of 128"):
        grouped_matmul(x, w, sizes, implementation="mosaic")
    with pytest.raises(UnsupportedError, match=r"tokamax.*no GPU is known"):
        grouped_matmul(x, w, sizes, implementation="tokamax")
    with pytest.raises(UnsupportedError, match="no implementation 'tokamax'"):
        grouped_swiglu(x, w, w, sizes, implementation="tokamax")


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.name.startswith(("V2-Lite", "V3 dec"))]
)
def test_the_xla_form_is_dense_on_no_platform(case):
    """Scratch memory of the program compiled for this platform; test_compiled.py asserts the same
    bounds in programs for GPUs."""
    compiled = jax.jit(case.bind("xla")).lower(*case.abstract()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < case.temp


def test_cases_measure_what_they_compare():
    """Each case's float64 reference against its XLA form, at its own sampled rows, where small."""
    small = [c for c in cases.CASES if c.name.startswith("nano")]
    assert len(small) > 3
    for case in small:
        inputs = case.inputs(0)
        out = case.outputs(np.asarray(case.bind("xla")(*inputs), np.float64))
        assert error(out, case.reference(*jax.tree.map(np.asarray, inputs))) < 1e-2

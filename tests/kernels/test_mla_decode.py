"""Latent decode attention: the XLA form, the public entry, and how splits are chosen and joined."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_inputs import Sizes, check, error
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.mla_decode import mla_decode, reference, xla
from deepzoo.kernels.mla_decode.splits import choose_splits, combine

SCALE = 0.3


def run(arrays, **options):
    return mla_decode(*arrays[:5], scale=SCALE, pages=arrays[5], latent_scale=arrays[6], **options)


def exact(clean):
    return reference.mla_decode(*clean[:5], scale=SCALE, pages=clean[5], latent_scale=clean[6])


XLA = {
    "one block": Sizes(heads=5, capacity=40, dtype=jnp.float32),
    "several blocks": Sizes(heads=5, capacity=600, queries=3, dtype=jnp.float32),
    "pages": Sizes(heads=5, capacity=600, queries=2, page=24, dtype=jnp.float32),
    "pages wider than a block": Sizes(heads=2, capacity=640, page=320, dtype=jnp.float32),
    "float8": Sizes(heads=4, capacity=300, fp8=True, dtype=jnp.float32),
    "float8 in pages": Sizes(heads=4, capacity=320, page=64, fp8=True, dtype=jnp.float32),
}


@pytest.mark.parametrize("name", XLA)
@settings(max_examples=8, deadline=None, database=None)
@given(data=st.data())
def test_xla_sees_exactly_its_lengths(name, data):
    sizes = XLA[name]
    count = sizes.batch * sizes.queries
    lengths = data.draw(st.lists(st.integers(0, sizes.capacity), min_size=count, max_size=count))
    arrays, clean = sizes.inputs(lengths, seed=data.draw(st.integers(0, 99)))
    result = run(arrays, implementation="xla")
    # Weights in float32 against values in float32: the only error is rounding of sums.
    check(result, exact(clean), bound=2e-6)
    again = run(arrays, implementation="xla")
    assert np.array_equal(np.asarray(result[0]), np.asarray(again[0]))


def test_xla_in_bfloat16_is_within_its_rounding():
    sizes = Sizes(batch=2, heads=4, capacity=300)
    arrays, clean = sizes.inputs([300, 111])
    check(run(arrays), exact(clean), bound=1e-2)


def test_a_length_of_a_row_is_that_of_all_its_queries():
    sizes = Sizes(batch=2, queries=2, dtype=jnp.float32)
    arrays, _ = sizes.inputs([[70, 70], [5, 5]])
    flat = (*arrays[:4], np.array([70, 5]), None, None)
    for a, b in zip(run(arrays), run(flat), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("page", [None, 16])
def test_more_than_the_capacity_is_all_of_it(implementation, page):
    sizes = Sizes(batch=2, heads=3, capacity=48, page=page, dtype=jnp.float32)
    arrays, clean = sizes.inputs([48, 48])
    over = (*arrays[:4], arrays[4] + np.array([[9], [70]], np.int32), *arrays[5:])
    result = run(over, implementation=implementation, interpret=implementation != "xla")
    check(result, exact(clean), bound=2e-6)


def test_pages_and_a_contiguous_cache_say_the_same():
    sizes = Sizes(batch=2, heads=3, capacity=128, page=64, dtype=jnp.float32)
    arrays, clean = sizes.inputs([128, 77])
    q_latent, q_rope, latent, k_rope, lengths, pages, _ = clean
    flat = (q_latent, q_rope, *(a[pages].reshape(2, 128, -1) for a in (latent, k_rope)), lengths)
    assert error(run(arrays)[0], run((*flat, None, None))[0]) < 1e-6


def test_queries_and_cache_of_several_dtypes_run_in_xla():
    arrays, clean = Sizes(dtype=jnp.float32).inputs([96, 3, 0])
    mixed = (*arrays[:2], *(jnp.asarray(a, jnp.bfloat16) for a in arrays[2:4]), *arrays[4:])
    exact_mixed = (*clean[:2], *(np.asarray(a) for a in mixed[2:4]), *clean[4:])
    check(run(mixed), exact(exact_mixed), bound=1e-2)
    with pytest.raises(UnsupportedError, match="one dtype, not bfloat16 and float32"):
        run(mixed, implementation="triton", interpret=True)


def test_there_is_no_gradient_and_the_error_says_what_to_do():
    arrays, _ = Sizes(dtype=jnp.float32).inputs([96, 3, 0])

    def loss(q_latent):
        return run((q_latent, *arrays[1:]))[0].sum()

    with pytest.raises(NotImplementedError, match=r"no gradient.*Train through mla_prefill"):
        jax.grad(loss)(jnp.asarray(arrays[0]))
    stopped = jax.grad(lambda q: loss(jax.lax.stop_gradient(q)) + q.sum())(jnp.asarray(arrays[0]))
    assert np.array_equal(stopped, np.ones(arrays[0].shape))


def _change(index, value):
    arrays, _ = Sizes(dtype=jnp.float32).inputs([96, 3, 0])
    arrays = list(arrays)
    arrays[index] = value(arrays[index]) if callable(value) else value
    return arrays


FAULTS = {
    "rank": (_change(2, lambda a: a[0]), r"needs q_latent \[B, T, H, C\]"),
    "latent width": (_change(2, lambda a: a[..., :31]), "31 wide, q_latent's are 32"),
    "rope width": (_change(3, lambda a: a[..., :8]), "k_rope is 8 wide, q_rope 16"),
    "heads": (_change(1, lambda a: a[:, :, :3]), r"differ in \[B, T, H\]"),
    "capacity": (_change(3, lambda a: a[:, :7]), "differ in their first two axes"),
    "batch": (_change(5, None)[:2] + [a[:2] for a in _change(5, None)[2:4]] + _change(5, None)[4:],
              "latent has 2 rows, q_latent 3"),
    "lengths": (_change(4, np.zeros((3, 2), np.int32)), r"lengths is \(3, 2\)"),
    "float lengths": (_change(4, np.zeros(3, np.float32)), "lengths is float32"),
    "pages": (_change(5, np.zeros((2, 1), np.int32)), r"must be \[B, N\] with B = 3"),
    "float pages": (_change(5, np.zeros((3, 1), np.float32)), "pages is float32"),
    "scale alone": (_change(6, np.ones((3, 96), np.float32)), "come together"),
    "float8 alone": (_change(2, lambda a: jnp.asarray(a, jnp.float8_e4m3fn)), "come together"),
    "integers": (_change(0, lambda a: a.astype(np.int32)), "q_latent is int32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_arguments_is_named(fault):
    arrays, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        run(arrays)


def test_scales_of_another_shape_are_refused():
    arrays, _ = Sizes(fp8=True).inputs([96, 3, 0])
    with pytest.raises(ValueError, match=r"latent_scale is float32 \(3, 95\)"):
        run((*arrays[:6], arrays[6][:, :95]))


def test_mosaic_lists_every_reason():
    arrays, _ = Sizes(page=16).inputs([96, 3, 0])
    with pytest.raises(UnsupportedError) as caught:
        run(arrays, implementation="mosaic", interpret=True)
    for reason in ("multiple of 64 heads, not 16", "512 \\+ 64", "pages of 64 tokens, not 16"):
        assert caught.match(reason)
    with pytest.raises(UnsupportedError, match="power of two, 16 or more tokens, not 24"):
        run(Sizes(page=24).inputs([96, 3, 0])[0], implementation="triton", interpret=True)


def test_a_kernel_named_on_a_cpu_is_refused_and_auto_is_xla():
    arrays, _ = Sizes().inputs([96, 3, 0])
    with pytest.raises(UnsupportedError, match="runs on NVIDIA GPUs only"):
        run(arrays, implementation="triton")
    for a, b in zip(run(arrays), run(arrays, implementation="xla"), strict=True):
        assert np.array_equal(a, b)


@settings(max_examples=60, deadline=None, database=None)
@given(
    programs=st.integers(1, 600), blocks=st.integers(1, 600), slots=st.sampled_from([108, 132, 264])
)
def test_splits_are_never_worse_than_none(programs, blocks, slots):
    def waves(splits):
        return -(-programs * splits // slots) * (-(-blocks // splits) + 4)

    splits = choose_splits(programs, blocks, slots, overhead=4)
    assert 1 <= splits <= max(1, min(blocks, slots))
    assert waves(splits) <= waves(1)
    if programs >= slots:  # a full GPU is not filled further by more than a last wave
        assert splits == 1 or waves(splits) < waves(1)


@pytest.mark.parametrize(
    ("programs", "blocks", "slots", "splits"),
    [
        (128, 128, 264, 2),  # V2-Lite, batch 128, 4096 tokens: two thread blocks a processor
        (256, 64, 132, 1),  # V3, batch 128: two waves as they are
        (64, 64, 132, 2),  # V3, batch 32
        (1, 4, 264, 4),
    ],
)
def test_splits_of_real_shapes(programs, blocks, slots, splits):
    assert choose_splits(programs, blocks, slots, overhead=4) == splits


def test_one_long_sequence_fills_the_gpu():
    assert choose_splits(1, 1024, 264, overhead=4) > 128


def test_combined_parts_are_the_whole():
    sizes = Sizes(batch=2, heads=3, capacity=90, dtype=jnp.float32)
    arrays, _ = sizes.inputs([90, 90])
    whole_out, whole_lse = run(arrays)
    parts = []
    for begin, end in ((0, 30), (30, 30), (30, 71), (71, 90)):  # the second is empty
        cache = [a[:, begin : max(end, begin + 1)] for a in arrays[2:4]]
        lengths = np.full((2, 1), end - begin, np.int32)
        parts.append(run((*arrays[:2], *cache, lengths, None, None)))
    out = jnp.stack([p[0].reshape(2, 3, -1) for p in parts], axis=1)
    lse = jnp.stack([p[1].reshape(2, 3) for p in parts], axis=1)
    mixed, total = combine(out, lse, jnp.float32)
    assert error(mixed, whole_out.reshape(2, 3, -1)) < 1e-6
    assert np.allclose(total, whole_lse.reshape(2, 3), atol=1e-6)
    nothing = combine(jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf), jnp.float32)
    assert not np.asarray(nothing[0]).any() and np.isneginf(nothing[1]).all()


def test_one_trace_for_layers_of_one_shape(monkeypatch):
    traced = []
    kept = xla.mla_decode
    monkeypatch.setattr(xla, "mla_decode", lambda *a, **k: traced.append(0) or kept(*a, **k))
    arrays, _ = Sizes(heads=7).inputs([96, 3, 0])

    @jax.jit
    def layers(arrays):
        return [partial(run, implementation="xla")(arrays) for _ in range(4)]

    layers(arrays)
    assert len(traced) == 1

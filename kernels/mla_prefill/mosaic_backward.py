"""Latent prefill attention on Hopper (sm_90): the backward pass, in Pallas Mosaic GPU.

Probabilities are recomputed from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2),
by two kernels in place of one with atomic additions: a second run is bit-equal. One holds 128
queries and walks over keys for dq; the other holds 128 keys and walks over queries, in transposed
scores, for dk and dv, with a partial sum of the shared rope key's gradient per head. What each
query subtracts (its log-sum-exp, and delta = d_out . out - d_lse) is where the products start from.

What the instructions say (arithmetic on the compiled code, not measured): the kernels multiply
640 + 512 where one would 832 (nope + rope + value units per pair), 1.24 TFLOP at 8192 tokens and 16
heads, causal: 1.57 ms at 790 TFLOP/s. Shared memory works for 79 % of the tensor cores' time in the
kernel for queries and for 93 % in the one for keys, where two sums of 64 registers leave none for
the rope key's gradient, kept in shared memory. exp2 takes 20 to 25 %. Within a warpgroup softmax
overlaps one product, the rest is left to the other warpgroup. At 60 to 65 % of the tensor cores
that is 2.4 to 2.6 ms.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepzoo.kernels.mla_prefill import mosaic
from deepzoo.kernels.mla_prefill.mosaic import (
    ACC,
    LOG2E,
    NOPE,
    ROPE,
    ROWS,
    TILE_K,
    TILE_Q,
    VALUE,
)  # fmt: skip

STEP = 64  # queries per step of the kernel for keys and values
STAGES = 2
BLOCK = 64  # keys per step of the kernel for queries
STAGES_Q = 3
_WGMMA = plgpu.Layout.WGMMA


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale: float, q_offset: int | jax.Array, interpret: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`; `interpret` as in `mosaic.forward`."""
    batch, queries, heads, _ = q_nope.shape
    keys = k_nope.shape[1]
    d_out = d_out.astype(v.dtype)
    rows = jnp.stack(_row_terms(out, lse, d_out, d_lse, scale), axis=1)  # [B, 2, H, T]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, -queries % TILE_Q)))
    # A padded query has lse 0 and a zero row of everything else: it adds zeros.
    segments = ()
    if q_segments is not None:
        segments = (mosaic.pad_rows(q_segments, TILE_Q), mosaic.pad_rows(k_segments, TILE_K))
    arrays = (q_nope, q_rope, k_nope, k_rope, v, d_out, rows, *segments)
    together = mosaic.heads_together(heads, max(keys, queries))
    static = {
        "scale": scale, "keys": keys, "heads": heads, "together": together,
        "marked": bool(segments), "in_smem": interpret,
    }  # fmt: skip
    options = {
        "num_threads": 3, "thread_name": "wg", "grid_names": ("block",),
        "compiler_params": plgpu.CompilerParams(approx_math=True),
        "interpret": mosaic.interpreter() if interpret else None,
    }  # fmt: skip
    bf16 = jnp.bfloat16

    bounds = mosaic.block_bounds(q_segments, k_segments, queries, keys, q_offset, batch, BLOCK)
    tiles = bounds.shape[1]
    dq = plgpu.kernel(
        partial(_queries, tiles=tiles, **static),
        out_type=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_nope, q_rope)),
        scratch_types=_present(
            q_nope=mosaic.smem((2, ROWS, NOPE), bf16),
            q_rope=mosaic.smem((2, ROWS, ROPE), bf16),
            d_out=mosaic.smem((2, ROWS, VALUE), bf16),
            k_nope=mosaic.smem((STAGES_Q, BLOCK, NOPE), bf16),
            k_rope=mosaic.smem((STAGES_Q, BLOCK, ROPE), bf16),
            v=mosaic.smem((STAGES_Q, BLOCK, VALUE), bf16),
            rows=plgpu.SMEM((2, 2, ROWS), jnp.float32),
            q_marks=plgpu.SMEM((2, ROWS), jnp.int32) if segments else None,
            k_marks=plgpu.SMEM((STAGES_Q, BLOCK), jnp.int32) if segments else None,
            ds=mosaic.smem((2, ROWS, BLOCK), bf16) if interpret else None,
            q_full=plgpu.Barrier(num_arrivals=6 if segments else 5, num_barriers=2),
            k_full=plgpu.Barrier(num_arrivals=4 if segments else 3, num_barriers=STAGES_Q),
            k_free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES_Q),
        ),
        grid=(batch * heads * tiles,),
        kernel_name="mla_prefill_backward_queries",
        **options,
    )(bounds, *arrays)

    bounds = step_bounds(q_segments, k_segments, queries, keys, q_offset, batch)
    tiles = bounds.shape[1]
    dk_nope, dk_rope, dv = plgpu.kernel(
        partial(_keys, tiles=tiles, **static),
        out_type=(
            jax.ShapeDtypeStruct(k_nope.shape, k_nope.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * TILE_K, ROPE), jnp.float32),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        scratch_types=_present(
            k_nope=mosaic.smem((2, ROWS, NOPE), bf16),
            k_rope=mosaic.smem((2, ROWS, ROPE), bf16),
            v=mosaic.smem((2, ROWS, VALUE), bf16),
            q_nope=mosaic.smem((STAGES, STEP, NOPE), bf16),
            q_rope=mosaic.smem((STAGES, STEP, ROPE), bf16),
            d_out=mosaic.smem((STAGES, STEP, VALUE), bf16),
            rows=plgpu.SMEM((STAGES, 2, STEP), jnp.float32),
            dk_rope=mosaic.smem((2, ROWS, ROPE), jnp.float32),
            q_marks=plgpu.SMEM((STAGES, STEP), jnp.int32) if segments else None,
            k_marks=plgpu.SMEM((2, ROWS), jnp.int32) if segments else None,
            p=mosaic.smem((2, ROWS, STEP), bf16) if interpret else None,
            ds=mosaic.smem((2, ROWS, STEP), bf16) if interpret else None,
            k_full=plgpu.Barrier(num_arrivals=4 if segments else 3, num_barriers=2),
            q_full=plgpu.Barrier(num_arrivals=6 if segments else 5, num_barriers=STAGES),
            q_free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        grid=(batch * heads * tiles,),
        kernel_name="mla_prefill_backward_keys",
        **options,
    )(bounds, *arrays)
    # One partial sum per head, added in the order of the heads: a second run is bit-equal.
    dk_rope = dk_rope[:, :, :keys].sum(axis=1).astype(k_rope.dtype)
    return (*dq, dk_nope, dk_rope, dv)


def _queries(
    bounds, q_nope_hbm, q_rope_hbm, k_nope_hbm, k_rope_hbm, v_hbm, d_out_hbm, rows_hbm, *rest,
    scale, keys, tiles, heads, together, marked, in_smem,
    q_nope, q_rope, d_out, k_nope, k_rope, v, rows, q_full, k_full, k_free,
    q_marks: Any = None, k_marks: Any = None, ds: Any = None,
):  # fmt: skip
    """dq of 128 queries: blocks of 64 keys pass by."""
    q_marks_hbm, k_marks_hbm = rest[:2]  # if marked
    dq_nope_hbm, dq_rope_hbm = rest[-2:]
    wg = lax.axis_index("wg")
    b, h, order = mosaic.place(lax.axis_index("block"), heads, tiles, together)
    tile = tiles - 1 - order

    @pl.when(wg == 2)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        first, end = bounds[b, tile, 0], bounds[b, tile, 3]

        def load(n, _):
            slot = lax.rem(n, STAGES_Q)
            here = pl.ds((end - 1 - n) * BLOCK, BLOCK)

            @pl.when(n >= STAGES_Q)
            def _():
                plgpu.barrier_wait(k_free.at[slot])

            plgpu.copy_gmem_to_smem(k_nope_hbm.at[b, here, h], k_nope.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope_hbm.at[b, here], k_rope.at[slot], k_full.at[slot])
            if marked:
                plgpu.copy_gmem_to_smem(k_marks_hbm.at[b, here], k_marks.at[slot], k_full.at[slot])

            plgpu.copy_gmem_to_smem(v_hbm.at[b, here, h], v.at[slot], k_full.at[slot])

        def drain(n, _):
            plgpu.barrier_wait(k_free.at[lax.rem(n, STAGES_Q)])

        count = end - first
        lax.fori_loop(0, count, load, None)
        lax.fori_loop(jnp.maximum(count - STAGES_Q, 0), count, drain, None)

    @pl.when(wg < 2)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        first, full, last_full, end, offset = (bounds[b, tile, i] for i in range(5))
        count = end - first
        start = tile * TILE_Q + wg * ROWS
        here = pl.ds(start, ROWS)
        arrived = q_full.at[wg]
        plgpu.copy_gmem_to_smem(q_nope_hbm.at[b, here, h], q_nope.at[wg], arrived)
        plgpu.copy_gmem_to_smem(q_rope_hbm.at[b, here, h], q_rope.at[wg], arrived)
        plgpu.copy_gmem_to_smem(d_out_hbm.at[b, here, h], d_out.at[wg], arrived)
        plgpu.copy_gmem_to_smem(rows_hbm.at[b, 0, h, here], rows.at[wg, 0], arrived)
        plgpu.copy_gmem_to_smem(rows_hbm.at[b, 1, h, here], rows.at[wg, 1], arrived)
        if marked:
            plgpu.copy_gmem_to_smem(q_marks_hbm.at[b, here], q_marks.at[wg], arrived)
        plgpu.barrier_wait(arrived)
        lse, delta = (plgpu.load(rows.at[wg, i], layout=_WGMMA.reduce(1)) for i in (0, 1))

        def masked(s, n, slot):
            begin = (end - 1 - n) * BLOCK
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_WGMMA.reduce(1))
            last = jnp.minimum(row + (start + offset), keys - 1) - begin
            col = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=_WGMMA)
            visible = col <= lax.broadcast_in_dim(last, s.shape, [0])
            if marked:
                ours = plgpu.load(q_marks.at[wg], layout=_WGMMA.reduce(1))
                theirs = plgpu.load(k_marks.at[slot], layout=_WGMMA.reduce(0))
                visible &= lax.broadcast_in_dim(ours, s.shape, [0]) == lax.broadcast_in_dim(
                    theirs, s.shape, [1]
                )
                plgpu.commit_smem()  # read before a copy overwrites it
            return jnp.where(visible, s, -jnp.inf)

        def gradients(dq_nope, dq_rope):
            def step(n, _, mask):
                slot = lax.rem(n, STAGES_Q)

                def score_gradients(s_ref, dp_ref):
                    if not in_smem:
                        s_ref[...] = lax.broadcast_in_dim(lse, s_ref.shape, [0])
                        dp_ref[...] = lax.broadcast_in_dim(delta, dp_ref.shape, [0])
                    plgpu.wgmma(s_ref, q_nope.at[wg], k_nope.at[slot].transpose((1, 0)))
                    plgpu.wgmma(s_ref, q_rope.at[wg], k_rope.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, d_out.at[wg], v.at[slot].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    if in_smem:
                        s += lax.broadcast_in_dim(lse, s.shape, [0])
                    if mask:
                        s = masked(s, n, slot)
                    weight = jnp.exp2(s * (scale * LOG2E))
                    dp = dp_ref[...]
                    if in_smem:
                        dp += lax.broadcast_in_dim(delta, dp.shape, [0])
                    return weight * dp

                plgpu.barrier_wait(k_full.at[slot])
                d_s = pl.run_scoped(
                    score_gradients,
                    ACC((ROWS, BLOCK), jnp.float32),
                    ACC((ROWS, BLOCK), jnp.float32),
                )
                d_s = d_s.astype(v.dtype)
                if in_smem:
                    ds[wg] = d_s
                    plgpu.commit_smem()
                    d_s = ds.at[wg]
                plgpu.wgmma(dq_nope, d_s, k_nope.at[slot])
                plgpu.wgmma(dq_rope, d_s, k_rope.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_free.at[slot])

            to_full, to_first = end - last_full, end - full
            lax.fori_loop(0, to_full, partial(step, mask=True), None)
            lax.fori_loop(to_full, to_first, partial(step, mask=False), None)
            lax.fori_loop(to_first, count, partial(step, mask=True), None)
            return dq_nope[...], dq_rope[...]

        dq = pl.run_scoped(
            gradients,
            ACC((ROWS, NOPE), jnp.float32),
            ACC((ROWS, ROPE), jnp.float32),
        )
        q_nope[wg], q_rope[wg] = ((a * scale).astype(v.dtype) for a in dq)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_nope.at[wg], dq_nope_hbm.at[b, here, h])
        plgpu.copy_smem_to_gmem(q_rope.at[wg], dq_rope_hbm.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)


def _keys(
    bounds, q_nope_hbm, q_rope_hbm, k_nope_hbm, k_rope_hbm, v_hbm, d_out_hbm, rows_hbm, *rest,
    scale, keys, tiles, heads, together, marked, in_smem,
    k_nope, k_rope, v, q_nope, q_rope, d_out, rows, dk_rope, k_full, q_full, q_free,
    q_marks: Any = None, k_marks: Any = None, p: Any = None, ds: Any = None,
):  # fmt: skip
    """dk and dv of 128 keys, in transposed scores: steps of 64 queries pass by."""
    q_marks_hbm, k_marks_hbm = rest[:2]  # if marked
    dk_nope_hbm, dk_rope_hbm, dv_hbm = rest[-3:]
    wg = lax.axis_index("wg")
    # The first keys are seen by the most queries: heavy tiles come first as they are.
    b, h, tile = mosaic.place(lax.axis_index("block"), heads, tiles, together)

    @pl.when(wg == 2)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        first, end = bounds[b, tile, 0], bounds[b, tile, 3]

        def load(n, _):
            slot = lax.rem(n, STAGES)
            here = pl.ds((first + n) * STEP, STEP)
            arrived = q_full.at[slot]

            @pl.when(n >= STAGES)
            def _():
                plgpu.barrier_wait(q_free.at[slot])

            plgpu.copy_gmem_to_smem(q_nope_hbm.at[b, here, h], q_nope.at[slot], arrived)
            plgpu.copy_gmem_to_smem(q_rope_hbm.at[b, here, h], q_rope.at[slot], arrived)
            plgpu.copy_gmem_to_smem(d_out_hbm.at[b, here, h], d_out.at[slot], arrived)
            plgpu.copy_gmem_to_smem(rows_hbm.at[b, 0, h, here], rows.at[slot, 0], arrived)
            plgpu.copy_gmem_to_smem(rows_hbm.at[b, 1, h, here], rows.at[slot, 1], arrived)
            if marked:
                plgpu.copy_gmem_to_smem(q_marks_hbm.at[b, here], q_marks.at[slot], arrived)

        def drain(n, _):
            plgpu.barrier_wait(q_free.at[lax.rem(n, STAGES)])

        count = end - first
        lax.fori_loop(0, count, load, None)
        lax.fori_loop(jnp.maximum(count - STAGES, 0), count, drain, None)

    @pl.when(wg < 2)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        first, full, last_full, end, offset = (bounds[b, tile, i] for i in range(5))
        start = tile * TILE_K + wg * ROWS
        here = pl.ds(start, ROWS)
        arrived = k_full.at[wg]
        plgpu.copy_gmem_to_smem(k_nope_hbm.at[b, here, h], k_nope.at[wg], arrived)
        plgpu.copy_gmem_to_smem(k_rope_hbm.at[b, here], k_rope.at[wg], arrived)
        plgpu.copy_gmem_to_smem(v_hbm.at[b, here, h], v.at[wg], arrived)
        if marked:
            plgpu.copy_gmem_to_smem(k_marks_hbm.at[b, here], k_marks.at[wg], arrived)
        plgpu.barrier_wait(arrived)

        def masked(s, n, slot):
            # Key start + row is visible from query column on; a key beyond the last, never.
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_WGMMA.reduce(1))
            since = jnp.where(row < keys - start, row + (start - offset - n * STEP), STEP)
            col = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=_WGMMA)
            visible = col >= lax.broadcast_in_dim(since, s.shape, [0])
            if marked:
                ours = plgpu.load(k_marks.at[wg], layout=_WGMMA.reduce(1))
                theirs = plgpu.load(q_marks.at[slot], layout=_WGMMA.reduce(0))
                visible &= lax.broadcast_in_dim(ours, s.shape, [0]) == lax.broadcast_in_dim(
                    theirs, s.shape, [1]
                )
            return jnp.where(visible, s, -jnp.inf)

        def across(i, slot):
            row = plgpu.load(rows.at[slot, i], layout=_WGMMA.reduce(0))
            return lax.broadcast_in_dim(row, (ROWS, STEP), [1])

        def products(slot, mask, n):
            """Weights and score gradients of one step, in bfloat16."""
            # Hides that the operands' addresses are the same in every step: kept from step to step
            # they would take more registers than there are.
            mine = lax.optimization_barrier(wg)

            def run(s_ref, dp_ref):
                if not in_smem:
                    s_ref[...], dp_ref[...] = across(0, slot), across(1, slot)
                plgpu.wgmma(s_ref, k_nope.at[mine], q_nope.at[slot].transpose((1, 0)))
                plgpu.wgmma(s_ref, k_rope.at[mine], q_rope.at[slot].transpose((1, 0)))
                plgpu.wgmma(dp_ref, v.at[mine], d_out.at[slot].transpose((1, 0)))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                if in_smem:
                    s += across(0, slot)
                if mask:
                    s = masked(s, n, slot)
                weight = jnp.exp2(s * (scale * LOG2E))
                dp = dp_ref[...]
                if in_smem:
                    dp += across(1, slot)
                return weight.astype(v.dtype), (weight * dp).astype(v.dtype)

            return pl.run_scoped(run, *[ACC((ROWS, STEP), jnp.float32)] * 2)

        def gradients(dk_nope_ref, dv_ref):
            def step(n, _, mask):
                slot = lax.rem(n - first, STAGES)
                plgpu.barrier_wait(q_full.at[slot])
                weight, d_s = products(slot, mask, n)
                if in_smem:
                    p[wg], ds[wg] = weight, d_s
                    plgpu.commit_smem()
                    weight, d_s = p.at[wg], ds.at[wg]

                def rope(dk_rope_ref):
                    plgpu.wgmma(dk_rope_ref, d_s, q_rope.at[slot])
                    plgpu.wgmma(dv_ref, weight, d_out.at[slot])
                    plgpu.wgmma(dk_nope_ref, d_s, q_nope.at[slot])
                    # There are no registers for a third sum.
                    dk_rope[wg] += plgpu.wgmma_accumulator_load(dk_rope_ref, wait_n=2)
                    plgpu.wgmma_wait(0)

                pl.run_scoped(rope, ACC((ROWS, ROPE), jnp.float32))
                plgpu.commit_smem()  # terms and marks are read before a copy overwrites them
                plgpu.barrier_arrive(q_free.at[slot])

            lax.fori_loop(first, full, partial(step, mask=True), None)
            lax.fori_loop(full, last_full, partial(step, mask=False), None)
            lax.fori_loop(last_full, end, partial(step, mask=True), None)
            return dk_nope_ref[...], dv_ref[...]

        dk_rope[wg] = plgpu.layout_cast(jnp.zeros((ROWS, ROPE), jnp.float32), _WGMMA)
        d_nope, d_v = pl.run_scoped(
            gradients,
            ACC((ROWS, NOPE), jnp.float32),
            ACC((ROWS, VALUE), jnp.float32),
        )
        k_nope[wg] = (d_nope * scale).astype(v.dtype)
        dk_rope[wg] *= scale
        v[wg] = d_v.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_nope.at[wg], dk_nope_hbm.at[b, here, h])
        plgpu.copy_smem_to_gmem(dk_rope.at[wg], dk_rope_hbm.at[b, h, here])
        plgpu.copy_smem_to_gmem(v.at[wg], dv_hbm.at[b, here, h])
        plgpu.wait_smem_to_gmem(0)


refusals = mosaic.refusals


def _present(**scratch):
    return {name: kind for name, kind in scratch.items() if kind is not None}


def _row_terms(out, lse, d_out, d_lse, scale):
    """What each query's products start from: p = exp(scale * (q . k + first)) and d score =
    p * (d_out . v + second), both [B, H, T]."""
    seen = lse > -jnp.inf
    delta = d_lse - (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    terms = (jnp.where(seen, -lse / scale, 0.0), jnp.where(seen, delta, 0.0))
    return tuple(a.swapaxes(1, 2) for a in terms)


def step_bounds(q_segments, k_segments, queries, keys, q_offset, batch):
    """Which steps of 64 queries each tile of 128 keys is read by: int32 [B, S / 128, 5].

    Columns: first step, first and end of the run that needs no mask (the first such run), end of
    the steps, and the query offset. No step at all is possible.
    """
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))[:, None]
    start = jnp.arange(pl.cdiv(keys, TILE_K), dtype=jnp.int32)[None] * TILE_K
    steps = pl.cdiv(queries, STEP)
    first = jnp.clip(start - offset, 0, steps * STEP) // STEP
    whole = jnp.clip(-((offset - start - TILE_K + 1) // STEP), first, steps)
    whole = jnp.where(start + TILE_K > keys, steps, whole)
    end = jnp.full_like(first, steps)
    if q_segments is None:
        columns = (first, whole, end, end)
    else:
        low_q, high_q = mosaic.ranges(q_segments, STEP)
        low_k, high_k = mosaic.ranges(k_segments, TILE_K)
        step = jnp.arange(steps, dtype=jnp.int32)
        meets = (low_q[:, None] <= high_k[:, :, None]) & (high_q[:, None] >= low_k[:, :, None])
        meets &= step >= first[..., None]
        alike = (low_q == high_q)[:, None] & (low_q[:, None] == low_k[:, :, None])
        alike &= (low_k == high_k)[:, :, None] & (step >= whole[..., None])
        end = jnp.max(jnp.where(meets, step + 1, 0), axis=-1)
        first = jnp.minimum(jnp.min(jnp.where(meets, step, steps), axis=-1), end)
        full = jnp.minimum(jnp.min(jnp.where(alike, step, steps), axis=-1), end)
        other = ~alike & (step >= full[..., None])
        last_full = jnp.minimum(jnp.min(jnp.where(other, step, steps), axis=-1), end)
        columns = (first, full, last_full, end)
    columns = [jnp.broadcast_to(c, (batch, start.shape[1])) for c in (*columns, offset)]
    return jnp.stack(columns, axis=-1).astype(jnp.int32)

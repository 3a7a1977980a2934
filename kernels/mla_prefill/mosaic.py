"""Latent prefill attention on Hopper (sm_90): the forward pass, in Pallas Mosaic GPU.

V2 report (arXiv 2405.04434), eq. 9-19, before absorption, with the structure of FlashAttention-3
(arXiv 2407.08608, sections 3.1 and 3.2): 128 queries a block, 64 to each of two warpgroups that
take turns at the tensor cores, and a third that loads keys and values. A score tile is the sum of
two chains of products, nope and rope, so that the heads share one copy of the rope key. While the
softmax of one key block runs, the tensor cores have the values of the block before and the other
warpgroup's products to multiply; probabilities stay in registers.

What the instructions say (arithmetic on the compiled code, not measured): per 128 x 128 tile the
tensor cores need 2560 cycles at their nominal rate, exp2 1024, all other instructions about 900 on
each scheduler, and operands are read from shared memory for 1660. The tensor cores are the limit,
and are meant to stay busy through the softmax; prologue, epilogue and the half-empty diagonal cost
some 6 % at 8192 tokens. With 85 to 90 % of the rest that is 500 to 550 us where the floor is 435.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NOPE, ROPE, VALUE = 128, 64, 128
ROWS = 64  # query rows of one warpgroup: wgmma's fixed M
TILE_Q = 2 * ROWS
TILE_K = 128
STAGES = 2
ACC = plgpu.WGMMAAccumulatorRef
LOG2E = math.log2(math.e)
_FLOOR = -1e38  # below every score, and finite: a row that has seen nothing keeps it as maximum
_L2 = 32 * 2**20  # bytes of keys and values that blocks running together may share


def forward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *,
    scale: float, q_offset: int | jax.Array, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out, lse), see `api`; `interpret` runs it in the GPU interpreter, with race detection."""
    batch, queries, heads, _ = q_nope.shape
    keys = k_nope.shape[1]
    tiles = pl.cdiv(queries, TILE_Q)
    bounds = block_bounds(q_segments, k_segments, queries, keys, q_offset, batch)
    segments = ()
    if q_segments is not None:
        segments = (pad_rows(q_segments, TILE_Q), pad_rows(k_segments, TILE_K))
    together = heads_together(heads, keys)
    body = partial(
        _forward, scale=scale, keys=keys, tiles=tiles, heads=heads, together=together,
        marked=bool(segments), p_in_smem=interpret,
    )  # fmt: skip
    bf16 = jnp.bfloat16
    scratch = {
        "q_nope": smem((2, ROWS, NOPE), bf16),
        "q_rope": smem((2, ROWS, ROPE), bf16),
        "k_nope": smem((STAGES, TILE_K, NOPE), bf16),
        "k_rope": smem((STAGES, TILE_K, ROPE), bf16),
        "v": smem((STAGES, TILE_K, VALUE), bf16),
        "lse": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_marks": plgpu.SMEM((2, ROWS), jnp.int32) if segments else None,
        "k_marks": plgpu.SMEM((STAGES, TILE_K), jnp.int32) if segments else None,
        "p": smem((2, ROWS, TILE_K), bf16) if interpret else None,
        "q_full": plgpu.Barrier(num_arrivals=3 if segments else 2, num_barriers=2),
        "k_full": plgpu.Barrier(num_arrivals=3 if segments else 2, num_barriers=STAGES),
        "v_full": plgpu.Barrier(num_barriers=STAGES),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, queries, heads, VALUE), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * TILE_Q), jnp.float32),
        ),
        scratch_types={name: kind for name, kind in scratch.items() if kind is not None},
        grid=(batch * heads * tiles,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name="mla_prefill_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter() if interpret else None,
    )(bounds, q_nope, q_rope, k_nope, k_rope, v, *segments)
    return out, lse[:, :, :queries].swapaxes(1, 2)


def _forward(
    bounds, q_nope_hbm, q_rope_hbm, k_nope_hbm, k_rope_hbm, v_hbm, *rest,
    scale, keys, tiles, heads, together, marked, p_in_smem,
    q_nope, q_rope, k_nope, k_rope, v, lse, q_full, k_full, v_full, k_free, v_free, turn,
    q_marks: Any = None, k_marks: Any = None, p: Any = None,
):  # fmt: skip
    q_marks_hbm, k_marks_hbm = rest[:2]  # if marked
    out_hbm, lse_hbm = rest[-2:]
    wg = lax.axis_index("wg")
    b, h, order = place(lax.axis_index("block"), heads, tiles, together)
    tile = tiles - 1 - order  # the longest rows first: the short ones fill the gaps at the end

    @pl.when(wg == 2)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        first, end = bounds[b, tile, 0], bounds[b, tile, 3]

        def load(n, _):
            slot = lax.rem(n, STAGES)
            here = pl.ds((end - 1 - n) * TILE_K, TILE_K)

            @pl.when(n >= STAGES)
            def _():
                plgpu.barrier_wait(k_free.at[slot])

            plgpu.copy_gmem_to_smem(k_nope_hbm.at[b, here, h], k_nope.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope_hbm.at[b, here], k_rope.at[slot], k_full.at[slot])
            if marked:
                plgpu.copy_gmem_to_smem(k_marks_hbm.at[b, here], k_marks.at[slot], k_full.at[slot])

            @pl.when(n >= STAGES)
            def _():
                plgpu.barrier_wait(v_free.at[slot])

            plgpu.copy_gmem_to_smem(v_hbm.at[b, here, h], v.at[slot], v_full.at[slot])

        def drain(n, _):  # every arrival is met by a wait
            plgpu.barrier_wait(k_free.at[lax.rem(n, STAGES)])
            plgpu.barrier_wait(v_free.at[lax.rem(n, STAGES)])

        count = end - first
        lax.fori_loop(0, count, load, None)
        lax.fori_loop(jnp.maximum(count - STAGES, 0), count, drain, None)

    @pl.when(wg < 2)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        first, full, last_full, end, offset = (bounds[b, tile, i] for i in range(5))
        count = end - first
        start = tile * TILE_Q + wg * ROWS
        here = pl.ds(start, ROWS)
        plgpu.copy_gmem_to_smem(q_nope_hbm.at[b, here, h], q_nope.at[wg], q_full.at[wg])
        plgpu.copy_gmem_to_smem(q_rope_hbm.at[b, here, h], q_rope.at[wg], q_full.at[wg])
        if marked:
            plgpu.copy_gmem_to_smem(q_marks_hbm.at[b, here], q_marks.at[wg], q_full.at[wg])

        @pl.when(wg == 1)
        def _():
            plgpu.barrier_arrive(turn.at[0])

        plgpu.barrier_wait(q_full.at[wg])

        def scores(s_ref, slot):
            plgpu.wgmma(s_ref, q_nope.at[wg], k_nope.at[slot].transpose((1, 0)))
            plgpu.wgmma(s_ref, q_rope.at[wg], k_rope.at[slot].transpose((1, 0)))

        def masked(s, n, slot):
            begin = (end - 1 - n) * TILE_K
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
            last = jnp.minimum(row + (start + offset), keys - 1) - begin
            col = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            visible = col <= lax.broadcast_in_dim(last, s.shape, [0])
            if marked:
                ours = plgpu.load(q_marks.at[wg], layout=plgpu.Layout.WGMMA.reduce(1))
                theirs = plgpu.load(k_marks.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                visible &= lax.broadcast_in_dim(ours, s.shape, [0]) == lax.broadcast_in_dim(
                    theirs, s.shape, [1]
                )
                plgpu.commit_smem()  # read before a copy overwrites it
            return jnp.where(visible, s, -jnp.inf)

        def softmax(s, top, total):
            """p, its row sums so far, the row maxima (times log2 e) and the old ones' decay."""
            new = jnp.maximum(top, s.max(axis=1) * (scale * LOG2E))
            decay = jnp.exp2(top - new)
            weight = jnp.exp2(s * (scale * LOG2E) - lax.broadcast_in_dim(new, s.shape, [0]))
            return weight, total * decay + weight.sum(axis=1), new, decay

        def await_keys(n):
            # Stands between a softmax and the wait for the values before it: the branch keeps the
            # compiler from moving that wait up, in front of the exponentials it is to overlap.
            @pl.when(n < count)
            def _():
                plgpu.barrier_wait(k_full.at[lax.rem(n, STAGES)])

        def start_row(s_ref):
            plgpu.barrier_wait(k_full.at[0])
            plgpu.barrier_wait(turn.at[wg])
            scores(s_ref, 0)
            plgpu.barrier_arrive(turn.at[1 - wg])
            s = masked(s_ref[...], 0, 0)
            plgpu.barrier_arrive(k_free.at[0])
            row = plgpu.layout_cast(
                jnp.full((ROWS,), _FLOOR, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
            )
            weight, total, top, _ = softmax(s, row, jnp.zeros_like(row))
            await_keys(1)
            return weight.astype(v.dtype), total, top

        def step(n, carry, mask):
            # Block n's scores and block n-1's values are both under way while the softmax of
            # block n runs; the other warpgroup's products fill what is left of the tensor cores.
            acc, weight, total, top = carry
            slot, slot_v = lax.rem(n, STAGES), lax.rem(n - 1, STAGES)

            def both(s_ref, o_ref):
                plgpu.barrier_wait(turn.at[wg])
                if p_in_smem:
                    p[wg] = weight
                    plgpu.commit_smem()
                else:
                    o_ref[...] = acc
                scores(s_ref, slot)
                plgpu.barrier_wait(v_full.at[slot_v])
                plgpu.wgmma(o_ref, p.at[wg] if p_in_smem else weight, v.at[slot_v])
                plgpu.barrier_arrive(turn.at[1 - wg])
                # With segments to compare, the probabilities' registers are needed before that.
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0 if mask and marked else 1)
                if mask:
                    s = masked(s, n, slot)
                plgpu.barrier_arrive(k_free.at[slot])
                s, new_total, new, decay = lax.optimization_barrier(softmax(s, top, total))
                await_keys(n + 1)
                o = o_ref[...]
                plgpu.barrier_arrive(v_free.at[slot_v])
                if p_in_smem:
                    o = acc + o
                o = o * lax.broadcast_in_dim(decay, o.shape, [0])
                return o, s.astype(v.dtype), new_total, new

            return pl.run_scoped(
                both,
                ACC((ROWS, TILE_K), jnp.float32),
                ACC((ROWS, VALUE), jnp.float32),
            )

        weight, total, top = pl.run_scoped(start_row, ACC((ROWS, TILE_K), jnp.float32))
        acc = plgpu.layout_cast(jnp.zeros((ROWS, VALUE), jnp.float32), plgpu.Layout.WGMMA)
        carry = (acc, weight, total, top)
        to_full = jnp.maximum(end - last_full, 1)
        to_first = jnp.maximum(end - full, 1)
        carry = lax.fori_loop(1, to_full, partial(step, mask=True), carry)
        carry = lax.fori_loop(to_full, to_first, partial(step, mask=False), carry)
        acc, weight, total, top = lax.fori_loop(to_first, count, partial(step, mask=True), carry)

        def finish(o_ref):
            slot_v = lax.rem(count - 1, STAGES)
            if p_in_smem:
                p[wg] = weight
                plgpu.commit_smem()
            else:
                o_ref[...] = acc
            plgpu.barrier_wait(v_full.at[slot_v])
            plgpu.wgmma(o_ref, p.at[wg] if p_in_smem else weight, v.at[slot_v])
            o = o_ref[...]
            plgpu.barrier_arrive(v_free.at[slot_v])
            return o

        o = pl.run_scoped(finish, ACC((ROWS, VALUE), jnp.float32))
        if p_in_smem:
            o = acc + o

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(turn.at[0])

        seen = total > 0
        o = o * lax.broadcast_in_dim(1 / jnp.where(seen, total, 1.0), o.shape, [0])
        q_nope[wg] = o.astype(out_hbm.dtype)  # the queries are done with
        lse[wg] = jnp.where(seen, top / LOG2E + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_nope.at[wg], out_hbm.at[b, here, h])
        plgpu.copy_smem_to_gmem(lse.at[wg], lse_hbm.at[b, h, here])
        plgpu.wait_smem_to_gmem(0)


def refusals(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *,
    scale: float, q_offset: int | jax.Array, interpret: bool = False,
) -> list[str]:  # fmt: skip
    """Why the Mosaic forms cannot take these arguments; the GPU itself is `dispatch`'s to judge."""
    del q_segments, k_segments, q_offset, interpret
    reasons = []
    dims = (q_nope.shape[-1], q_rope.shape[-1], v.shape[-1])
    if dims != (NOPE, ROPE, VALUE):
        reasons.append(f"needs nope, rope and value dimensions 128, 64, 128, got {dims}")
    if odd := sorted({str(a.dtype) for a in (q_nope, q_rope, k_nope, k_rope, v)} - {"bfloat16"}):
        reasons.append(f"needs bfloat16, got {', '.join(odd)}")
    if scale <= 0:
        reasons.append(f"needs a positive scale, got {scale}")
    return reasons


def block_bounds(q_segments, k_segments, queries, keys, q_offset, batch, tile_k=TILE_K):
    """Which key blocks each query tile reads: int32 [B, T / 128, 5].

    Columns: first block read, first and end of the run that needs no mask (the last such run), end
    of the blocks read, and the query offset. Between first and end, the rest is read masked;
    outside nothing is visible. At least one block is read.
    """
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))[:, None]
    start = jnp.arange(pl.cdiv(queries, TILE_Q), dtype=jnp.int32)[None] * TILE_Q
    stop = jnp.minimum(start + TILE_Q, queries)
    end = pl.cdiv(jnp.clip(stop + offset, 1, keys), tile_k)
    whole = jnp.clip(start + offset + 1, 0, keys) // tile_k
    if q_segments is None:
        zero = jnp.zeros_like(end)
        columns = (zero, zero, whole, end)
    else:
        low_q, high_q = ranges(q_segments, TILE_Q)
        low_k, high_k = ranges(k_segments, tile_k)
        block = jnp.arange(low_k.shape[1], dtype=jnp.int32)
        meets = (low_k[:, None] <= high_q[:, :, None]) & (high_k[:, None] >= low_q[:, :, None])
        meets &= block < end[..., None]
        alike = (low_k == high_k)[:, None] & (low_k[:, None] == low_q[:, :, None])
        alike &= (low_q == high_q)[:, :, None] & (block < whole[..., None])
        last = jnp.max(jnp.where(meets, block, -1), axis=-1)
        first = jnp.clip(jnp.min(jnp.where(meets, block, keys), axis=-1), 0, jnp.maximum(last, 0))
        end = jnp.maximum(last, 0) + 1
        last_full = jnp.max(jnp.where(alike, block + 1, 0), axis=-1)
        other = ~alike & (block < last_full[..., None])
        full = jnp.max(jnp.where(other, block + 1, 0), axis=-1)
        columns = (first, jnp.maximum(full, first), jnp.maximum(last_full, first), end)
    columns = [jnp.broadcast_to(c, (batch, start.shape[1])) for c in (*columns, offset)]
    return jnp.stack(columns, axis=-1).astype(jnp.int32)


def ranges(segments: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    parts = pad_rows(segments, size).reshape(segments.shape[0], -1, size)
    return parts.min(axis=-1), parts.max(axis=-1)


def pad_rows(a: jax.Array, size: int) -> jax.Array:
    """`a` [B, X] with its last column repeated up to a multiple of `size`."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge")


def place(block, heads: int, tiles: int, together: int):
    """(batch, head, tile) of a block of the grid: heads that share the L2 cache run side by side,
    tile by tile."""
    group, rest = lax.div(block, together * tiles), lax.rem(block, together * tiles)
    groups = heads // together
    head = lax.rem(group, groups) * together + lax.rem(rest, together)
    return lax.div(group, groups), head, lax.div(rest, together)


def heads_together(heads: int, keys: int) -> int:
    fits = max(1, _L2 // (keys * (NOPE + VALUE) * 2))
    return next(n for n in range(min(fits, heads), 0, -1) if heads % n == 0)


def smem(shape: tuple[int, ...], dtype: Any):
    """Shared memory in the layout of wgmma operands."""
    transforms = (
        plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def interpreter() -> plgpu.InterpretGPUParams:
    """Pallas's GPU interpreter as the tests want it: it watches for races and poisons memory."""
    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")

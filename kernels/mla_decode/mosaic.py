"""Latent decode attention on Hopper (sm_90) in Pallas Mosaic GPU, for 64 heads and more.

A thread block takes 64 rows (heads of one query) of one sequence and one split of its cache. Two
warpgroups hold one half of the output each (64 x 256 float32, 128 registers a thread): the first
also multiplies queries by keys and does the softmax, and hands its weights to the second through
shared memory; a third warpgroup loads. The two row tiles of 128 heads run side by side and
share the cache's bytes in L2.

Budget of shared memory (232,448 B): queries 64 x 576 bfloat16 73,728; two stages of 64 keys
147,456; weights 8,192; row factors and log-sum-exp, each padded to 1,024; barriers: 231,544. A
stage is loaded and given back in three parts, each as soon as its last reader is done: rope after
the scores, the two halves of the latents after the products they are values in.

Reckoned, not measured: 64 keys at full speed of the tensor cores (2048 multiply-adds a clock) are
1152 clocks of scores and 2 x 512 of values, together 2176; the softmax's about 400 in between are
not covered, since a second buffer of weights and a third stage have no room: 84% at most, 660 of
790 TFLOP/s. A part of a stage has 2000 clocks from being given back to its next use, about what
74 KB take to arrive.
Batch 128, 128 heads: 256 thread blocks on 132 multiprocessors are 2 waves, 97% full.
B batch  T query  H heads  R rows (T * H)  S cache capacity  C latent  Z splits
P pages of the pool  N pages a row
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepzoo.kernels.mla_decode.splits import choose_splits, combine, multiprocessors

LATENT, ROPE = 512, 64
HALF = LATENT // 2
ROWS = 64  # wgmma's fixed M
KEYS = 64  # of a block, and tokens of a page
STAGES = 2
_ACC = plgpu.WGMMAAccumulatorRef
_LOG2E = math.log2(math.e)
_FLOOR = -1e38  # below every score, and finite: a row that has seen nothing keeps it as maximum
_RIGHT = 1  # the warpgroup of the right half; 0 is the left half's, 2 loads


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    latent_scale: jax.Array | None = None,
    *,
    scale: float,
    interpret: bool = False,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of `api.mla_decode`, with lengths int32 [B, T]; see
    `api.mosaic_refusals`.

    interpret: runs in Pallas's GPU interpreter, with race detection and poisoned memory.
    splits: chosen by `splits.choose_splits` if None.
    """
    assert latent_scale is None
    batch, queries, heads, _ = q_latent.shape
    rows = queries * heads
    blocks = pl.cdiv(latent.shape[1], KEYS) if pages is None else pages.shape[1]
    if splits is None:
        programs = batch * (rows // ROWS)
        splits = choose_splits(programs, blocks, multiprocessors(), overhead=4)
    whole = splits == 1
    extra = () if pages is None else (pages,)
    scratch = {
        "q_left": _operand((1, ROWS, HALF)),
        "q_right": _operand((1, ROWS, HALF)),
        "q_rope": _operand((1, ROWS, ROPE)),
        "left": _operand((STAGES, KEYS, HALF)),
        "right": _operand((STAGES, KEYS, HALF)),
        "rope": _operand((STAGES, KEYS, ROPE)),
        "weights": _operand((ROWS, KEYS)),
        "factor": plgpu.SMEM((ROWS,), jnp.float32),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=3),
        "left_full": plgpu.Barrier(num_barriers=STAGES),
        "right_full": plgpu.Barrier(num_barriers=STAGES),
        "rope_full": plgpu.Barrier(num_barriers=STAGES),
        "left_free": plgpu.Barrier(num_barriers=STAGES),
        "right_free": plgpu.Barrier(num_barriers=STAGES),
        "rope_free": plgpu.Barrier(num_barriers=STAGES),
        "weights_full": plgpu.Barrier(),
        "weights_free": plgpu.Barrier(),
    }
    out, lse = plgpu.kernel(
        partial(
            _attend,
            scale=scale,
            heads=heads,
            splits=splits,
            paged=pages is not None,
            accumulate=not interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct(
                (batch, splits, rows, LATENT), q_latent.dtype if whole else jnp.float32
            ),
            jax.ShapeDtypeStruct((batch, splits, rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(rows // ROWS, splits, batch),
        grid_names=("tile", "split", "batch"),
        num_threads=3,
        thread_name="wg",
        kernel_name="mla_decode",
        # Reductions along the rows of wgmma results need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpreter() if interpret else None,
    )(
        q_latent.reshape(batch, rows, LATENT),
        q_rope.reshape(batch, rows, ROPE),
        latent,
        k_rope,
        lengths,
        *extra,
    )
    if whole:
        out, lse = out[:, 0], lse[:, 0]
    else:
        out, lse = combine(out, lse, q_latent.dtype)
    return out.reshape(q_latent.shape), lse.reshape(batch, queries, heads)


def _attend(
    q_latent_hbm, q_rope_hbm, latent_hbm, rope_hbm, lengths, *rest,
    scale, heads, splits, paged, accumulate,
    q_left, q_right, q_rope, left, right, rope, weights, factor, lse,
    q_full, left_full, right_full, rope_full, left_free, right_free, rope_free,
    weights_full, weights_free,
):  # fmt: skip
    pages: Any = rest[0] if paged else None
    out_hbm, lse_hbm = rest[-2:]
    wg = lax.axis_index("wg")
    tile, split, batch = (lax.axis_index(name) for name in ("tile", "split", "batch"))
    here = pl.ds(tile * ROWS, ROWS)
    # 64 divides the heads, so that the rows of a tile belong to one query and have one length.
    capacity = latent_hbm.shape[1] * (pages.shape[1] if paged else 1)
    length = jnp.minimum(lengths[batch, lax.div(tile * ROWS, heads)], capacity)
    blocks = lax.div(length + (KEYS - 1), KEYS)
    share = lax.div(blocks + (splits - 1), splits)
    first = split * share
    count = jnp.maximum(jnp.minimum(blocks - first, share), 0)
    # Only a sequence's last block may hold entries nobody sees; it is a loop of its own.
    plain = jnp.where(first + count == blocks, jnp.maximum(count - 1, 0), count)

    @pl.when(wg == 2)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        def block(n, _):
            slot = lax.rem(n, STAGES)
            if pages is None:
                owner, there = batch, pl.ds((first + n) * KEYS, KEYS)
            else:  # no entry of the table behind the last block is read
                owner, there = pages[batch, first + n], pl.ds(0, KEYS)

            def part(source, target, full, free):
                @pl.when(n >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

            part(rope_hbm.at[owner, there], rope, rope_full, rope_free)
            part(latent_hbm.at[owner, there, pl.ds(0, HALF)], left, left_full, left_free)
            part(latent_hbm.at[owner, there, pl.ds(HALF, HALF)], right, right_full, right_free)

        lax.fori_loop(0, count, block, None)

        def drain(n, _):  # every arrival is met by a wait
            for free in (rope_free, left_free, right_free):
                plgpu.barrier_wait(free.at[lax.rem(n, STAGES)])

        lax.fori_loop(jnp.maximum(count - STAGES, 0), count, drain, None)

    def values(acc, decay, slot, half):
        """acc * decay + weights @ values."""
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])

        def product(acc_ref):
            plgpu.wgmma(acc_ref, weights, half.at[slot])

        if accumulate:  # the interpreter lacks run_state on accumulators
            return pl.run_state(product)(_ACC.init(acc))

        def fresh(acc_ref):
            product(acc_ref)
            return acc_ref[...]

        return acc + pl.run_scoped(fresh, _ACC((ROWS, HALF), jnp.float32))

    def clear(half, slot, n):
        """Zeros entries nobody sees: as values they meet weights of 0, and 0 * NaN is NaN."""
        seen = length - (first + n) * KEYS
        row = plgpu.broadcasted_iota(jnp.int32, (KEYS, 64), 0, layout=plgpu.Layout.WGMMA)
        for column in range(0, HALF, 64):
            part = half.at[slot, :, pl.ds(column, 64)]
            held = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < seen, held, jnp.zeros_like(held))
        plgpu.commit_smem()

    def finish(acc, staging, column):
        part = out_hbm.at[batch, split, here, pl.ds(column, HALF)]
        if out_hbm.dtype == jnp.float32:
            part[...] = acc
        else:
            staging[...] = acc.astype(out_hbm.dtype)  # the queries are done with
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging, part)
            plgpu.wait_smem_to_gmem(0)

    zeros = jnp.zeros((ROWS, HALF), jnp.float32)

    @pl.when(wg == 0)
    def _left():
        plgpu.set_max_registers(240, action="increase")
        q = q_latent_hbm.at[batch, here]
        plgpu.copy_gmem_to_smem(q_rope_hbm.at[batch, here], q_rope.at[0], q_full)
        plgpu.copy_gmem_to_smem(q.at[:, pl.ds(0, HALF)], q_left.at[0], q_full)
        plgpu.copy_gmem_to_smem(q.at[:, pl.ds(HALF, HALF)], q_right.at[0], q_full)
        plgpu.barrier_wait(q_full)

        def step(n, carry, mask):
            acc, top, total = carry
            slot = lax.rem(n, STAGES)
            # An index the compiler does not see through: it would keep the 36 descriptors of the
            # queries' operands in registers all along the loop, and spill.
            zero = lax.optimization_barrier(jnp.int32(0))

            def scores(s_ref):
                plgpu.barrier_wait(rope_full.at[slot])
                plgpu.wgmma(s_ref, q_rope.at[zero], rope.at[slot].transpose((1, 0)))
                plgpu.barrier_wait(left_full.at[slot])
                plgpu.wgmma(s_ref, q_left.at[zero], left.at[slot].transpose((1, 0)))
                plgpu.barrier_wait(right_full.at[slot])
                plgpu.wgmma(s_ref, q_right.at[zero], right.at[slot].transpose((1, 0)))
                return s_ref[...]

            s = pl.run_scoped(scores, _ACC((ROWS, KEYS), jnp.float32))
            plgpu.barrier_arrive(rope_free.at[slot])
            if mask:
                key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
                s = jnp.where(key < length - (first + n) * KEYS, s, -jnp.inf)
            new = jnp.maximum(top, s.max(axis=1) * (scale * _LOG2E))
            decay = jnp.exp2(top - new)
            weight = jnp.exp2(s * (scale * _LOG2E) - lax.broadcast_in_dim(new, s.shape, [0]))
            total = total * decay + weight.sum(axis=1)

            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(weights_free)

            weights[...] = weight.astype(weights.dtype)
            factor[...] = decay
            plgpu.commit_smem()
            plgpu.barrier_arrive(weights_full)
            if mask:
                clear(left, slot, n)
            acc = values(acc, decay, slot, left)
            plgpu.barrier_arrive(left_free.at[slot])
            return acc, new, total

        layout = plgpu.Layout.WGMMA
        row = plgpu.layout_cast(jnp.full((ROWS,), _FLOOR, jnp.float32), layout.reduce(1))
        carry = (plgpu.layout_cast(zeros, layout), row, jnp.zeros_like(row))
        carry = lax.fori_loop(0, plain, partial(step, mask=False), carry)
        acc, top, total = lax.fori_loop(plain, count, partial(step, mask=True), carry)

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(weights_free)

        seen = total > 0
        inverse = 1 / jnp.where(seen, total, 1.0)
        factor[...] = inverse
        plgpu.barrier_arrive(weights_full)
        lse[...] = jnp.where(seen, top / _LOG2E + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse, lse_hbm.at[batch, split, here])
        finish(acc * lax.broadcast_in_dim(inverse, acc.shape, [0]), q_left.at[0], 0)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == _RIGHT)
    def _right():
        plgpu.set_max_registers(240, action="increase")

        def step(n, acc, mask):
            slot = lax.rem(n, STAGES)
            plgpu.barrier_wait(right_full.at[slot])
            plgpu.barrier_wait(weights_full)
            decay = plgpu.load(factor, layout=plgpu.Layout.WGMMA.reduce(1))
            if mask:
                clear(right, slot, n)
            acc = values(acc, decay, slot, right)
            plgpu.barrier_arrive(weights_free)
            plgpu.barrier_arrive(right_free.at[slot])
            return acc

        acc = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        acc = lax.fori_loop(0, plain, partial(step, mask=False), acc)
        acc = lax.fori_loop(plain, count, partial(step, mask=True), acc)
        plgpu.barrier_wait(weights_full)
        inverse = plgpu.load(factor, layout=plgpu.Layout.WGMMA.reduce(1))
        finish(acc * lax.broadcast_in_dim(inverse, acc.shape, [0]), q_right.at[0], HALF)


def _operand(shape: tuple[int, ...]) -> Any:
    """Shared memory in the layout of wgmma operands."""
    transforms = (
        plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def interpreter() -> plgpu.InterpretGPUParams:
    """Pallas's GPU interpreter as the tests want it: it watches for races and poisons memory.

    What a copy reads beyond an array (the last block of a capacity that is no multiple of 64) is
    poisoned too; the hardware fills it with zeros.
    """
    return plgpu.InterpretGPUParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )

"""Building sharded arrays from published tensors with little host memory.

Each device receives its own block of each leaf and nothing else. On the CPU the block is filled in
place: its buffer becomes the array without a copy. On an accelerator a large block is allocated
there and filled tensor by tensor, so the host holds a few pieces of at most 64 MB at a time.
"""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo.names import Leaf, Tensor

_PIECE = 64 << 20
_AHEAD = 4
_IN_PLACE = ("cpu",)  # platforms whose arrays can be numpy buffers

type Block = tuple[slice, ...]
type Device = Any  # jax.Device is a variable to type checkers
type Read = Callable[[Tensor, slice, slice, np.ndarray], None]


class Plan(NamedTuple):
    """Which block of a leaf goes to which devices of this host; None is the default device."""

    leaf: Leaf
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding | None
    blocks: tuple[tuple[Block, tuple[Device | None, ...]], ...]


def plan(leaf: Leaf, dtype: Any, sharding: jax.sharding.Sharding | None) -> Plan:
    """Groups the devices of this host by the block of the leaf that they hold."""
    whole = tuple(slice(0, n) for n in leaf.shape)
    if sharding is None:
        return Plan(leaf, np.dtype(dtype), None, ((whole, (None,)),))
    groups: dict[tuple[tuple[int, int], ...], list[Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        index = whole if index is None else index
        key = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        groups.setdefault(key, []).append(device)
    blocks = tuple((tuple(slice(a, b) for a, b in k), tuple(d)) for k, d in groups.items())
    return Plan(leaf, np.dtype(dtype), sharding, blocks)


def elements(plan: Plan) -> int:
    """How many elements this host reads; a block for several devices counts once."""
    return sum(_size(block) for block, _ in plan.blocks)


def build(plan: Plan, read: Read, pool: ThreadPoolExecutor) -> jax.Array:
    """Reads every block of the plan once and returns the global array."""
    arrays = []
    for block, devices in plan.blocks:
        first = _block(plan, block, devices[0], read, pool)
        arrays.append(first)
        arrays += [jax.device_put(first, device) for device in devices[1:]]
    if plan.sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(plan.leaf.shape, plan.sharding, arrays)


def threads() -> ThreadPoolExecutor:
    """Workers that read and check; each holds a few MB of scratch at most."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="deepzoo-read")


class _Job(NamedTuple):
    """Rows of one tensor, and where they go: the start of a region of the block with this shape."""

    tensor: Tensor
    rows: slice
    columns: slice
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def region(self) -> Block:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


def _block(
    plan: Plan, block: Block, device: Device | None, read: Read, pool: ThreadPoolExecutor
) -> jax.Array:
    shape = tuple(s.stop - s.start for s in block)
    size = _size(block) * plan.dtype.itemsize
    jobs = list(_jobs(plan, block))
    platform = jax.default_backend() if device is None else device.platform
    if platform in _IN_PLACE or size <= _PIECE:
        buffer = _aligned(shape, plan.dtype)
        _drain(_ordered(pool, lambda job: _fill(job, buffer[job.region], read), jobs))
        # An aligned buffer becomes a CPU array without a copy; nobody writes to it from here on.
        return jax.device_put(buffer, device)
    return _on_device(plan, shape, jobs, device, read, pool)


def _on_device(
    plan: Plan,
    shape: tuple[int, ...],
    jobs: list[_Job],
    device: Device | None,
    read: Read,
    pool: ThreadPoolExecutor,
) -> jax.Array:
    def fill(job: _Job) -> np.ndarray:
        return _fill(job, np.empty(job.shape, plan.dtype), read)

    array = jnp.zeros(shape, plan.dtype, device=device)
    for job, piece in zip(jobs, _ordered(pool, fill, jobs), strict=True):
        start = np.asarray(job.start, np.int32)
        array = _update(array, jax.device_put(piece, device), start)
        array.block_until_ready()  # otherwise the host would run ahead and keep every piece
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, tuple(start))


def _jobs(plan: Plan, block: Block) -> Iterator[_Job]:
    """The block as rows of single tensors, each at most _PIECE bytes."""
    leaf = plan.leaf
    lead = len(leaf.shape) - len(leaf.tensors[0].shape)
    by_index = {t.index: t for t in leaf.tensors}
    rows, columns = block[lead], block[lead + 1] if len(block) > lead + 1 else slice(0, 1)
    width = columns.stop - columns.start
    step = max(1, _PIECE // max(1, width * plan.dtype.itemsize))
    for index in itertools.product(*(range(s.start, s.stop) for s in block[:lead])):
        local = tuple(i - s.start for i, s in zip(index, block[:lead], strict=True))
        for row in range(rows.start, rows.stop, step):
            last = min(row + step, rows.stop)
            tail = (last - row, width)[: len(block) - lead]
            start = (*local, row - rows.start, 0)[: len(block)]
            yield _Job(by_index[index], slice(row, last), columns, start, (1,) * lead + tail)


def _fill(job: _Job, out: np.ndarray, read: Read) -> np.ndarray:
    height = job.rows.stop - job.rows.start
    read(job.tensor, job.rows, job.columns, out.reshape(height, -1))
    return out


def _ordered(
    pool: ThreadPoolExecutor, work: Callable[[_Job], np.ndarray], jobs: Iterable[_Job]
) -> Iterator[np.ndarray]:
    """Results in order, with a bounded number of jobs under way."""
    under_way: collections.deque[Any] = collections.deque()
    try:
        for job in jobs:
            under_way.append(pool.submit(work, job))
            if len(under_way) >= _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _drain(results: Iterator[np.ndarray]) -> None:
    for _ in results:
        pass


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _size(block: Block) -> int:
    size = 1
    for s in block:
        size *= s.stop - s.start
    return size

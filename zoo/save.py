"""`save_hf`: a model back into the published layout, bit for bit.

What was loaded without a cast comes out with the same names, dtypes and bytes: FP8 weights with
their scales, router biases in float32, norms in their own dtype, the copies of the embedding and
the head in MTP layers. The directory appears whole or not at all.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import TensorSpec, serialize_file

from deepzoo.zoo import assemble, atomic, files, names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError, WeightError
from deepzoo.zoo.functional import is_stacked
from deepzoo.zoo.names import Tensor
from deepzoo.zoo.progress import Progress, track
from deepzoo.zoo.target import check_params
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model
from deepzoo.zoo.weights import judge, non_finite

SHARD_BYTES = 5 * 10**9
COPIED = ("generation_config.json", "chat_template.jinja")

type Fetch = Callable[[Tensor], np.ndarray]
"""The values of a published tensor, C-contiguous, in its shape and dtype; from several threads."""


def save_hf(
    model: Model,
    directory: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = None,
) -> Path:
    """Writes a model in the published layout: safetensors, config.json, tokenizer.

    Parameters may be stacked or not, on one device or on many of this process. Values pass through
    the host one file at a time (on the CPU without a copy, unless a tensor is divided).

    Args:
        model: `config` must describe `params` exactly, as it does after `load` or `init`. The files
            of the tokenizer are written if there is one; generation_config.json and
            chat_template.jinja are copied if `source` has them.
        directory: must not exist, or be empty.
        max_shard_bytes: tensors of one file; a larger tensor gets a file of its own. Where all fit
            there is one model.safetensors, otherwise numbered files and an index.
        progress: see `progress.Progress`; a byte counts half when it is collected, half when it is
            written.

    Returns:
        The absolute path of the directory.

    Raises:
        RequestError: the directory is not empty, or max_shard_bytes is not positive.
        WeightError: params do not fit the config, hold NaN or infinity, or lie on devices of other
            processes; too little space; or the disk refuses. Nothing is left behind then.
    """
    fetch = from_params(model.config, model.params)
    finish = functools.partial(write_companions, model.tokenizer, model.source)
    return write(
        directory, model.config, fetch, finish, max_shard_bytes=max_shard_bytes, progress=progress
    )


def write(
    directory: str | Path,
    config: Config,
    fetch: Fetch,
    finish: Callable[[Path], None],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = None,
) -> Path:
    """Writes every tensor that `config` promises, wherever `fetch` gets it from.

    `finish` is called with the directory when all else is in it, before it becomes visible. The
    rest is as in `save_hf`.
    """
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number")
    path = atomic.check_destination(directory)
    shards = list(_shards(names.tensors(config), max_shard_bytes))
    total = sum(_size(t) for shard in shards for t in shard)
    # Headers take some hundred bytes a tensor, tokenizers some megabytes.
    needed = total + sum(len(shard) for shard in shards) * 400 + (8 << 20)
    with (
        atomic.new_directory(path, needed) as temporary,
        track(f"writing {path.name}", total, progress) as advance,
        assemble.threads() as pool,
    ):
        mapping = {}
        for i, shard in enumerate(shards, 1):
            name = files.SINGLE_NAME
            if len(shards) > 1:
                name = f"model-{i:05}-of-{len(shards):05}.safetensors"
            _write_shard(temporary / name, shard, fetch, pool, advance)
            mapping |= dict.fromkeys((t.name for t in shard), name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": mapping}
            _write_json(temporary / files.INDEX_NAME, index)
        _write_json(temporary / "config.json", config.to_hf())
        with files.open_checkpoint(temporary) as written:
            judge(written, config)
        finish(temporary)
    return path


def from_params(config: Config, params: dict[str, Any]) -> Fetch:
    """A `Fetch` out of our parameter tree.

    Raises:
        WeightError: the tree is not what the config describes, or not all of it is in reach.
    """
    check_params(config, params)
    leaves = dict(names.flatten(params))
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise WeightError(
                f"{'/'.join(path)} lies partly on devices of other processes; save with zoo.save,"
                " and convert that directory with one process"
            )
    places = names.tensors(config, stacked=is_stacked(params))

    def fetch(tensor: Tensor) -> np.ndarray:
        place = places[tensor.name]
        return take(leaves[place.path], place.index)

    return fetch


def take(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """`leaf[index]` on the host, C-contiguous; moves nothing else off the devices."""
    if not isinstance(leaf, jax.Array):
        return np.ascontiguousarray(leaf[index])
    shape, n = leaf.shape[len(index) :], len(index)
    out = None
    for shard in leaf.addressable_shards:
        bounds = [s.indices(size)[:2] for s, size in zip(shard.index, leaf.shape, strict=True)]
        inside = all(a <= i < b for i, (a, b) in zip(index, bounds[:n], strict=True))
        if shard.replica_id or not inside:
            continue
        local = tuple(i - a for i, (a, _) in zip(index, bounds[:n], strict=True))
        values = _host(shard.data, local)
        if values.shape == shape:
            return np.ascontiguousarray(values)
        out = np.empty(shape, leaf.dtype) if out is None else out
        out[tuple(slice(a, b) for a, b in bounds[n:])] = values
    assert out is not None, "every block has a replica 0 among the devices of this process"
    return out


def _host(block: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    if not index or next(iter(block.devices())).platform == "cpu":
        return np.asarray(block)[index]  # a view of the device's memory on the CPU
    return np.asarray(_select(block, index))


@jax.jit
def _select(block: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """`block[index]`; index is traced, or each layer and expert would be compiled anew."""
    return block[index]


def kept_files(source: Path | None) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of COPIED that a model's source has.

    Raises:
        WeightError: one is over 64 MB, no regular file, or a link out of the directory.
    """
    if source is None:
        return
    for name in COPIED:
        try:
            data = files.read_small(source, name)
        except FileNotFoundError:
            continue
        yield name, data


def write_companions(tokenizer: Tokenizer | None, source: Path | None, directory: Path) -> None:
    """Writes the files that come with the weights, byte for byte as they were read."""
    if tokenizer is not None:
        tokenizer.save(directory)
    for name, data in kept_files(source):
        (directory / name).write_bytes(data)


def _shards(tensors: dict[str, Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Tensors in the published order, as many to a file as fit."""
    shard, held = [], 0
    for tensor in tensors.values():
        if shard and held + _size(tensor) > limit:
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += _size(tensor)
    yield shard


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * _dtype(tensor).itemsize


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    return files.numpy_dtype(tensor.dtype)


def _write_shard(
    path: Path,
    shard: list[Tensor],
    fetch: Fetch,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> None:
    """One safetensors file, written by the library from the memory of the arrays."""

    def checked(tensor: Tensor) -> np.ndarray:
        values = fetch(tensor)
        if (values.shape, values.dtype) != (tensor.shape, _dtype(tensor)):
            raise TypeError(f"{tensor} was fetched as {values.dtype} {values.shape}")
        if non_finite(values) or (tensor.kind == "scale" and values.min() <= 0):
            raise WeightError(
                f"{tensor.name}: holds NaN, infinity or a scale that is not positive; no such"
                " weights are written, because none would be loaded"
            )
        advance(_size(tensor) // 2)
        return values

    arrays = list(pool.map(checked, shard))  # alive until the file is written
    specs = {
        t.name: TensorSpec(
            dtype=str(a.dtype), shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for t, a in zip(shard, arrays, strict=True)
    }
    path.touch()
    mode = path.stat().st_mode  # what the umask allows; safetensors lets nobody else read
    serialize_file(specs, path, metadata={"format": "pt"})
    path.chmod(mode)
    advance(sum(_size(t) - _size(t) // 2 for t in shard))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")

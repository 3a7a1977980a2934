"""Published checkpoints of any size, written without the code under test.

Every tensor is cut from one block of valid values of its dtype, from a place that its name decides,
so that any slice of any tensor can be predicted without reading the file.
"""

import functools
import json
import struct
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from deepzoo.zoo import names
from deepzoo.zoo.config import Config

CODES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
_BLOCK = 1 << 22


@functools.cache
def _block(dtype: str, kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    if dtype == "float8_e4m3fn":
        bits = rng.integers(0, 127, _BLOCK, np.uint8) | (rng.integers(0, 2, _BLOCK, np.uint8) << 7)
        return bits.view(ml_dtypes.float8_e4m3fn)
    values = rng.standard_normal(_BLOCK, np.float32)
    return np.abs(values) + 0.01 if kind == "scale" else values.astype(dtype)


def values(tensor: names.Tensor, start: int, count: int) -> np.ndarray:
    """Elements start .. start + count of a tensor, flat."""
    block = _block(tensor.dtype, tensor.kind)
    at = zlib.crc32(tensor.name.encode()) + start
    return np.take(block, np.arange(at, at + count), mode="wrap")


def pieces(tensor: names.Tensor):
    """A whole tensor in pieces of a few megabytes."""
    block = _block(tensor.dtype, tensor.kind)
    left = int(np.prod(tensor.shape))
    at = zlib.crc32(tensor.name.encode()) % _BLOCK
    while left:
        piece = block[at : at + left]
        yield piece
        left -= piece.size
        at = 0


def write(directory: Path, config: Config, shard_bytes: int) -> int:
    """Writes config.json, shards and index; returns the bytes of all tensors.

    MTP aliases are not supported: their values would follow their own names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    shards: list[list[names.Tensor]] = [[]]
    held = total = 0
    for tensor in names.tensors(config).values():
        assert not tensor.alias
        size = int(np.prod(tensor.shape)) * np.dtype(_block(tensor.dtype, "").dtype).itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
        total += size
    mapping = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / name, shard)
        mapping |= {t.name: name for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(path: Path, shard: list[names.Tensor]) -> None:
    header, at = {}, 0
    for tensor in shard:
        end = at + int(np.prod(tensor.shape)) * _block(tensor.dtype, tensor.kind).dtype.itemsize
        shape = list(tensor.shape)
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            for piece in pieces(tensor):
                file.write(piece.view(np.uint8))

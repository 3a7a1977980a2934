"""From published tensors to slices of our leaves: judged names, exact bytes, checked values.

`judge` proves that a checkpoint holds what its config promises, no more and no less. `Reader` then
fills any block of rows and columns of any tensor, straight from the file into the caller's buffer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from deepzoo.zoo import names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import WeightError
from deepzoo.zoo.files import DTYPES, Checkpoint, Entry, dtype_code, some
from deepzoo.zoo.names import BLOCK, Tensor

_SCRATCH = 2 << 20  # bytes on disk that are converted at a time, in each thread
_DIRECT = 16 << 20  # bytes that are read at a time where nothing needs converting
_ALL_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def judge(checkpoint: Checkpoint, config: Config, *, mtp: bool = True) -> Config:
    """Checks names, shapes and dtypes of an open checkpoint against its config.

    Returns:
        The config that describes the files exactly: with `norm_dtype` where norms have their own,
        and with no MTP layers if `mtp` is False (whether the files hold them or not).

    Raises:
        WeightError: a tensor is missing, left over, or has another shape or dtype than expected;
            up to ten are named, with the count.
    """
    entries = dict(checkpoint.entries)
    if (promised := names.count(config)) > 2 * len(entries) + 100_000:  # too many to list
        raise WeightError(
            f"{checkpoint.directory}: config.json promises {promised:,} tensors, but the files hold"
            f" {len(entries):,}; one of them belongs to another model"
        )
    wanted = names.tensors(config)
    if config.num_nextn_predict_layers:
        without = dataclasses.replace(config, num_nextn_predict_layers=0)
        extra = wanted.keys() - names.tensors(without).keys()
        held = extra & entries.keys()
        if not mtp:
            if held and held != extra:
                _complain(checkpoint, extra - held, set())
            config = without
            wanted = names.tensors(config)
            entries = {k: v for k, v in entries.items() if k not in extra}
        elif not held:
            first = config.num_hidden_layers
            raise WeightError(
                f"{checkpoint.directory}: config.json promises"
                f" {config.num_nextn_predict_layers} MTP layer(s), but no tensor of"
                f" model.layers.{first} is there (transformers leaves them out when it saves);"
                " to load the model without, pass mtp=False (--no-mtp)"
            )
    missing, left = wanted.keys() - entries.keys(), entries.keys() - wanted.keys()
    if missing or left:
        _complain(checkpoint, missing, left)
    config = _norm_dtype(checkpoint, config, wanted, entries)
    wrong = []
    for tensor in names.tensors(config).values():
        entry, code = entries[tensor.name], dtype_code(tensor.dtype)
        if (entry.code, entry.shape) != (code, tensor.shape):
            found = f"{entry.code} {list(entry.shape)}, expected {code} {list(tensor.shape)}"
            wrong.append(f"{tensor.name} is {found}")
    if wrong:
        shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise WeightError(
            f"{checkpoint.directory}: {len(wrong)} tensors do not fit config.json: {shown}"
        )
    return config


def _complain(checkpoint: Checkpoint, missing: set[str], left: set[str]) -> None:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors of this config are missing: {some(missing)}")
    if left:
        parts.append(f"{len(left)} tensors do not belong to this config: {some(left)}")
    raise WeightError(f"{checkpoint.directory}: {'; '.join(parts)}")


def _norm_dtype(
    checkpoint: Checkpoint, config: Config, wanted: dict[str, Tensor], entries: dict[str, Entry]
) -> Config:
    """Norm weights are bf16 in some releases, float32 in others; no key of config.json says."""
    by_code: dict[str, list[str]] = {}
    for tensor in wanted.values():
        if tensor.kind == "norm":
            by_code.setdefault(entries[tensor.name].code, []).append(tensor.name)
    if len(by_code) > 1:
        rare = min(by_code, key=lambda code: len(by_code[code]))
        raise WeightError(
            f"{checkpoint.directory}: norm weights have several dtypes"
            f" ({', '.join(sorted(by_code))}); {rare}: {some(by_code[rare])}"
        )
    (code,) = by_code
    if code not in ("F32", "BF16", dtype_code(config.dtype)):
        return config  # refused with the other wrong dtypes
    dtype = str(DTYPES[code])
    return dataclasses.replace(config, norm_dtype=None if dtype == config.dtype else dtype)


def non_finite(values: np.ndarray) -> bool:
    """Whether a float array has a NaN or an infinity; float8_e4m3fn has only NaN. Little memory."""
    width = values.dtype.itemsize
    bits = values.reshape(-1).view(f"u{width}")
    mask = _ALL_EXPONENT.get(str(values.dtype), 0x7F)
    step = (1 << 20) // width
    return any(
        int((bits[i : i + step] & bits.dtype.type(mask)).max()) == mask
        for i in range(0, bits.size, step)
    )


def float8_to_float32(values: np.ndarray) -> np.ndarray:
    """float8_e4m3fn -> float32, exactly, for finite values; several times faster than `astype`.

    The bits of e4m3 moved into a float16 mean 2^-8 of the value (exponent bias 15 instead of 7).
    """
    wide = values.view(np.int8).astype(np.int16)
    wide <<= 7
    wide &= np.int16(-0x4001)  # the sign, extended by the shift, must not reach the exponent
    out = wide.view(np.float16).astype(np.float32)
    out *= 256.0
    return out


class Reader:
    """Reads blocks of rows and columns of published tensors as the dtype that the caller wants.

    A tensor of one dimension counts as one column. Every value that passes is checked: weights must
    be finite, scales finite and positive.

    Args:
        checkpoint: open, and judged against `disk`.
        disk: the config that describes the files.
        advance: called with the number of bytes of each piece read; from several threads.
    """

    def __init__(self, checkpoint: Checkpoint, disk: Config, advance: Callable[[int], Any]):
        self._checkpoint = checkpoint
        self._scales = names.tensors(disk) if disk.quantization_config is not None else {}
        self._advance = advance

    def read(self, tensor: Tensor, rows: slice, columns: slice, out: np.ndarray) -> None:
        """Fills `out` [rows, columns], C-contiguous, converting to its dtype.

        An FP8 tensor read into another dtype is multiplied by its block scales in float32.

        Raises:
            WeightError: a value is not finite, a scale not positive, or the file was cut.
        """
        entry = self._checkpoint.entries[tensor.name]
        height, width = _matrix(entry.shape)
        top, bottom, _ = rows.indices(height)
        left, right, _ = columns.indices(width)
        dtype = DTYPES[entry.code]
        direct = (left, right) == (0, width) and dtype == out.dtype
        step = max(1, (_DIRECT if direct else _SCRATCH) // max(1, width * dtype.itemsize))
        for row in range(top, bottom, step):
            last = min(row + step, bottom)
            target = out[row - top : last - top]
            if direct:
                self._raw(entry, row, last, target)
                values = target
            else:
                whole = np.empty((last - row, width), dtype)
                self._raw(entry, row, last, whole)
                values = whole[:, left:right]
            self._check(tensor, np.ascontiguousarray(values))
            if not direct:
                if dtype.itemsize == 1 and out.dtype != dtype:
                    values = self._dequantise(tensor, values, row, last, left, right)
                target[...] = values.astype(out.dtype, copy=False)
            self._advance((last - row) * (right - left) * dtype.itemsize)

    def verify_alias(self, copy: Tensor, main: Tensor) -> None:
        """Checks that two tensors are the same bytes.

        Raises:
            WeightError: they differ, so that one of them would be lost.
        """
        a, b = (self._checkpoint.entries[t.name] for t in (copy, main))
        size = a.stop - a.start
        for start in range(0, size, _DIRECT):
            n = min(_DIRECT, size - start)
            one, other = np.empty(n, np.uint8), np.empty(n, np.uint8)
            a.shard.read(memoryview(one), a.start + start)
            b.shard.read(memoryview(other), b.start + start)
            if not np.array_equal(one, other):
                raise WeightError(
                    f"{a.shard.path}: {copy.name} differs from {main.name}; in these families it"
                    " is a copy, and only one of the two can be kept"
                )
            self._advance(n)

    def _raw(self, entry: Entry, top: int, bottom: int, out: np.ndarray) -> None:
        _, width = _matrix(entry.shape)
        start = entry.start + top * width * out.dtype.itemsize
        entry.shard.read(memoryview(out.reshape(-1).view(np.uint8)), start)

    def _check(self, tensor: Tensor, values: np.ndarray) -> None:
        if values.size == 0:
            return
        path = self._checkpoint.entries[tensor.name].shard.path
        if non_finite(values):
            raise WeightError(f"{path}: {tensor.name} holds NaN or infinity; the file is damaged")
        if tensor.kind == "scale" and values.min() <= 0:
            raise WeightError(f"{path}: {tensor.name} holds a scale that is zero or negative")

    def _dequantise(
        self, tensor: Tensor, values: np.ndarray, top: int, bottom: int, left: int, right: int
    ) -> np.ndarray:
        scale = self._scales[tensor.name + "_scale_inv"]
        first, last = top // BLOCK, -(-bottom // BLOCK)
        blocks = np.empty((last - first, scale.shape[1]), np.float32)
        entry = self._checkpoint.entries[scale.name]
        self._raw(entry, first, last, blocks)
        self._check(scale, blocks)
        out = float8_to_float32(values)
        by_row = np.arange(top, bottom) // BLOCK - first
        for block in range(left // BLOCK, -(-right // BLOCK)):
            low, high = max(block * BLOCK, left) - left, min((block + 1) * BLOCK, right) - left
            out[:, low:high] *= blocks[by_row, block, None]
        return out


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)

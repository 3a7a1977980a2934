"""`convert`: one checkpoint directory into another, in the other layout or another dtype."""

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from deepzoo.kernels.block_fp8 import reference as block_fp8
from deepzoo.zoo import atomic, catalog, checkpoint, files, names
from deepzoo.zoo.config import Config, Quantization
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.functional import is_stacked
from deepzoo.zoo.load import load, read_hf_config, read_tokenizer
from deepzoo.zoo.names import Tensor
from deepzoo.zoo.progress import Progress
from deepzoo.zoo.save import (
    SHARD_BYTES,
    Fetch,
    from_params,
    save_hf,
    write,
    write_companions,
)
from deepzoo.zoo.target import dtype_name, target_config
from deepzoo.zoo.types import Model
from deepzoo.zoo.weights import Reader, judge

DTYPES = ("bfloat16", "float32", "float8")


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["hf", "orbax"] = "hf",
    dtype: str | None = None,
    mtp: bool = True,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = None,
) -> Path:
    """Reads a model, checks all of it, and writes it as something else.

    From the published layout to the published layout tensors pass one file at a time, so the host
    needs `max_shard_bytes` and a little, not the model. To and from Orbax the model is in memory.

    Args:
        source: as in `load`: a shipped name, a published directory, or one that `save` wrote.
        destination: must not exist, or be empty.
        to: "hf", the published layout, or "orbax", this project's own.
        dtype: None leaves every bit as it is. "bfloat16" and "float32" cast, and multiply FP8
            weights out. "float8" rounds the tensors that published FP8 checkpoints have in FP8 (the
            linear layers of attention, MLPs and experts) to blocks of 128 x 128 with scales of
            amax / 448, and leaves the others in their dtype; FP8 sources pass unchanged.
        mtp: False leaves out the multi-token-prediction layers.
        max_shard_bytes: as in `save_hf`.
        progress: see `progress.Progress`.

    Returns:
        The absolute path of the directory.

    Raises:
        RequestError: an unknown `to` or `dtype`, float8 for a model whose family has none, a
            destination that is not empty.
        DeepzooError: as in `load` and `save_hf`. Nothing is left behind then.
    """
    if to not in ("hf", "orbax"):
        raise RequestError(f"to={to!r}: a model can be converted to hf or orbax")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r}: a model can be converted to {', '.join(DTYPES)}")
    destination = atomic.check_destination(destination)
    float8 = dtype == "float8"
    cast = None if float8 else dtype_name(dtype)
    if (directory := _published(source)) is not None:
        if float8:
            float8_config(read_hf_config(directory))  # to refuse before anything is read
        if to == "hf":
            emit = functools.partial(
                write, destination, max_shard_bytes=max_shard_bytes, progress=progress
            )
            _stream(directory, cast, float8, mtp, emit)
            return destination
    model = load(source, dtype=cast, quantized=cast is None, mtp=mtp, progress=progress)
    if float8:
        model = quantize(model)
    if to == "hf":
        return save_hf(model, destination, max_shard_bytes=max_shard_bytes, progress=progress)
    return checkpoint.save(model, destination, progress=progress)


def quantize(model: Model) -> Model:
    """The model with block FP8 weights where published FP8 checkpoints have them.

    A model that has them already is returned as it is. New leaves are on the default device; the
    others are shared with `model`.

    Raises:
        RequestError: the family has no FP8 form.
    """
    config = float8_config(model.config)
    if config == model.config:
        return model
    fetch = _quantising(from_params(model.config, model.params), model.config)
    old = dict(names.flatten(model.params))
    flat: dict[names.Path, Any] = {}
    for path, leaf in names.leaves(config, stacked=is_stacked(model.params)).items():
        if leaf.kind not in ("linear", "scale"):
            flat[path] = old[path]
            continue
        values = np.empty(leaf.shape, files.numpy_dtype(leaf.dtype))
        for tensor in leaf.tensors:
            values[tensor.index] = fetch(tensor)
        flat[path] = jax.device_put(values)
    return model._replace(config=config, params=names.nest(flat))


def float8_config(config: Config) -> Config:
    """The config of the same model in block FP8.

    Raises:
        RequestError: the family has no FP8 form.
    """
    if config.quantization_config is not None:
        return config
    if not config.is_mla:
        raise RequestError(
            f"float8: {config.model_type} models have no FP8 form, only the V2 and V3/R1 families"
        )
    return dataclasses.replace(config, quantization_config=Quantization())


def _published(source: str | Path) -> Path | None:
    """The directory, if `load` would read `source` as a directory in the published layout."""
    if isinstance(source, str) and catalog.shipped_directory(source) is not None:
        return None
    path = Path(source).expanduser()
    if not path.is_dir() or (path / checkpoint.MANIFEST).exists():
        return None
    return path.resolve()


def _stream(
    directory: Path, cast: str | None, float8: bool, mtp: bool, emit: Callable[..., Path]
) -> None:
    """Reads tensor by tensor as `emit(config, fetch, finish)` asks for them; see `save.write`."""
    promised = read_hf_config(directory)
    with files.open_checkpoint(directory) as opened:
        disk = judge(opened, promised, mtp=mtp)
        config = target_config(disk, cast, quantized=cast is None)
        tokenizer = read_tokenizer(directory, config)
        reader = Reader(opened, disk, lambda _: None)
        tensors = names.tensors(disk).values()
        mains = {t.path: t for t in tensors if not t.alias}
        for copy in tensors:
            if copy.alias:
                reader.verify_alias(copy, mains[copy.path])

        def fetch(tensor: Tensor) -> np.ndarray:
            out = np.empty(tensor.shape, files.numpy_dtype(tensor.dtype))
            reader.read(tensor, slice(None), slice(None), out.reshape(tensor.shape[0], -1))
            return out

        def finish(temporary: Path) -> None:
            write_companions(tokenizer, directory, temporary)
            opened.verify_unchanged()

        if float8 and config.quantization_config is None:
            emit(float8_config(config), _quantising(fetch, config), finish)
        else:
            emit(config, fetch, finish)


def _quantising(fetch: Fetch, config: Config) -> Fetch:
    """Fetches, once each, tensors of the FP8 form of a model whose `fetch` and `config` have none.

    Rounded by the NumPy reference: XLA may divide by 448 through its reciprocal, which moves scales
    by a unit in the last place, and a file should not depend on the machine that wrote it.
    """
    plain = names.tensors(config)
    halves: dict[str, Future[np.ndarray]] = {}
    lock = threading.Lock()

    def quantised(tensor: Tensor) -> np.ndarray:
        if tensor.kind not in ("linear", "scale"):
            return fetch(plain[tensor.name])
        name, part = tensor.name.removesuffix("_scale_inv"), int(tensor.kind == "scale")
        with lock:  # of a weight and its scales, whoever comes first leaves the other's half
            first = name not in halves
            other = halves.setdefault(name, Future()) if first else halves.pop(name)
        if not first:
            return other.result()
        try:
            both = block_fp8.quantize(fetch(plain[name]))
        except BaseException as error:
            other.set_exception(error)
            raise
        other.set_result(both[1 - part])
        return both[part]

    return quantised

"""What a loaded or saved tree must look like: its config after a cast, its sharding, its leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepzoo.zoo import functional, names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError, WeightError

DTYPES = ("bfloat16", "float32")


def dtype_name(dtype: Any) -> str | None:
    """The name of a dtype that models can be cast to, or None for None.

    Raises:
        RequestError: any other dtype.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype).name
    except TypeError:
        found = str(dtype)
    if found not in DTYPES:
        raise RequestError(f"dtype {found!r}: a model can be cast to {' or '.join(DTYPES)}")
    return found


def target_config(
    config: Config, dtype: str | None = None, quantized: bool = True, mtp: bool = True
) -> Config:
    """The config of the same model after a cast, after dequantising, without its MTP layers."""
    if not quantized:
        config = dataclasses.replace(config, quantization_config=None)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, norm_dtype=None)
    if not mtp:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def place(
    config: Config, mesh: Mesh | None, rules: Mapping[str, str] | None, stacked: bool
) -> dict[names.Path, jax.sharding.Sharding]:
    """The sharding of every leaf by path; empty without a mesh."""
    if mesh is None:
        if rules is not None:
            raise RequestError("rules say how to divide leaves over a mesh; pass mesh=, too")
        return {}
    return dict(names.flatten(functional.shardings(config, mesh, rules, stacked=stacked)))


def check_params(config: Config, params: dict[str, Any]) -> dict[names.Path, names.Leaf]:
    """Checks that `params` has exactly the leaves of `config`.

    Returns:
        The leaves of the layout that `params` has, in the published order.

    Raises:
        WeightError: a leaf is missing, left over, or has another shape or dtype; up to ten are
            named, with the count.
    """
    wanted = names.leaves(config, stacked=functional.is_stacked(params))
    given = dict(names.flatten(params))
    wrong = [f"{'/'.join(p)} is missing" for p in wanted if p not in given]
    wrong += [f"{'/'.join(p)} is not part of this config" for p in given if p not in wanted]
    for path, leaf in wanted.items():
        if path in given:
            found = (str(given[path].dtype), tuple(given[path].shape))
            if found != (leaf.dtype, leaf.shape):
                wrong.append(
                    f"{'/'.join(path)} is {found[0]}{list(found[1])}, expected"
                    f" {leaf.dtype}{list(leaf.shape)}"
                )
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise WeightError(
            f"{len(wrong)} leaves of params do not fit the config: {'; '.join(wrong[:10])}{more}"
        )
    return wanted

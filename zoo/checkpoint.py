"""Models in our own checkpoint directories: the tree `params` (see `trees`), config, tokenizer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepzoo.kernels import block_fp8
from deepzoo.zoo import names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import CheckpointError, ConfigError
from deepzoo.zoo.fingerprint import all_finite, named
from deepzoo.zoo.progress import Progress
from deepzoo.zoo.save import kept_files
from deepzoo.zoo.target import check_params, place, target_config
from deepzoo.zoo.trees import MANIFEST, Manifest, read_manifest, read_tree, write_tree
from deepzoo.zoo.types import Model


def save(model: Model, directory: str | Path, *, progress: Progress = None) -> Path:
    """Writes a model as an Orbax tree with its manifest; `load` reads it back and proves it.

    Raises:
        CheckpointError: a value is not finite, the directory is in use, or the disk is full.
        WeightError: params do not fit the config.
    """
    check_params(model.config, model.params)
    for name, leaf in named(model.params).items():
        if not all_finite(leaf):
            raise CheckpointError(f"{directory}: {name} holds NaN or infinity; it is not written")
    extra = {"model": {"config": model.config.to_hf(), "norm_dtype": model.config.norm_dtype}}

    def finish(temporary: Path) -> None:
        for name, data in kept_files(model.source):
            (temporary / name).write_bytes(data)
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)

    trees = {"params": model.params}
    return write_tree(directory, trees, extra, finish=finish, progress=progress)


def load(
    directory: Path,
    *,
    mesh: Mesh | None = None,
    rules: Mapping[str, str] | None = None,
    dtype: str | None = None,
    quantized: bool = True,
    mtp: bool = True,
    stacked: bool = False,
    progress: Progress = None,
) -> Model:
    """Reads the model in a directory that `save` or a training step wrote; see `zoo.load`.

    Raises:
        CheckpointError: anything missing, damaged, or not what the config says.
    """
    manifest = read_manifest(directory)
    config = read_config(manifest)
    stored_stacked = _stored_stacked(manifest)
    sharding = place(config, mesh, rules, stored_stacked)
    flat = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=sharding.get(path))
        for path, leaf in names.leaves(config, stacked=stored_stacked).items()
    }
    params = read_tree(manifest, "params", names.nest(flat), progress=progress)
    wanted = target_config(config, dtype, quantized, mtp)
    if not wanted.num_nextn_predict_layers:
        params.pop("mtp", None)
    for name, leaf in named(params).items():
        if not all_finite(leaf):
            raise CheckpointError(f"{directory}: params/{name} holds NaN or infinity")
    leaves = names.leaves(wanted, stacked=stored_stacked)
    held = dict(names.flatten(params))
    del params  # so that `held` alone keeps the leaves alive
    held = _converted(held, leaves)
    if stacked != stored_stacked:
        held = _relaid(held, wanted, stacked, place(wanted, mesh, rules, stacked))
    return Model(wanted, names.nest(held), None, directory.name, directory)


def read_config(manifest: Manifest) -> Config:
    """The model config in a manifest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    model = manifest.extra.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
        raise CheckpointError(f"{manifest.directory / MANIFEST}: holds no model config")
    try:
        config = Config.from_hf(model["config"])
        return dataclasses.replace(config, norm_dtype=model.get("norm_dtype"))
    except ConfigError as error:
        raise CheckpointError(f"{manifest.directory / MANIFEST}: {error}") from None


def _converted(
    flat: dict[names.Path, jax.Array], leaves: dict[names.Path, names.Leaf]
) -> dict[names.Path, jax.Array]:
    """Dequantised and cast leaf by leaf; each old leaf is freed as soon as the new one is there."""
    out = {}
    for path, leaf in leaves.items():
        value = flat.pop(path)
        if value.dtype == jnp.float8_e4m3fn and leaf.dtype != "float8_e4m3fn":
            scale = flat.pop((*path[:-1], "weight_scale_inv"))
            value = jax.jit(block_fp8.dequantize, static_argnums=2)(value, scale, leaf.dtype)
        out[path] = value if value.dtype == leaf.dtype else value.astype(leaf.dtype)
    return out


def _relaid(
    flat: dict[names.Path, jax.Array],
    config: Config,
    stacked: bool,
    sharding: Mapping[names.Path, jax.sharding.Sharding],
) -> dict[names.Path, jax.Array]:
    """The other layout, leaf by leaf: at no time are there two copies of the model."""
    out: dict[names.Path, jax.Array] = {}
    for path, leaf in names.leaves(config, stacked=True).items():
        if path[0] not in ("dense", "moe", "mtp"):
            out[path] = flat.pop(path)
            continue
        layers = [(path[0], str(i), *path[1:]) for i in range(leaf.shape[0])]
        if stacked:
            out[path] = jnp.stack([flat.pop(p) for p in layers])
        else:
            whole = flat.pop(path)
            out |= {p: _layer(whole, i) for i, p in enumerate(layers)}
    return {p: jax.device_put(x, sharding[p]) if sharding else x for p, x in out.items()}


@jax.jit
def _layer(whole: jax.Array, i: jax.Array) -> jax.Array:
    return whole[i]  # traced, or every layer would be compiled anew


def _stored_stacked(manifest: Manifest) -> bool:
    params = manifest.trees.get("params", {})
    return not any(name.split("/")[1] == "0" for name in params if name.count("/") > 1)

"""`load`: a shipped name, a published directory, one of ours, or a hub id, to a Model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from deepzoo.zoo import assemble, catalog, checkpoint, files, hub, names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import ConfigError, RequestError, WeightError
from deepzoo.zoo.progress import Progress, track
from deepzoo.zoo.target import dtype_name, place, target_config
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.tokenizer_file import FILES as TOKENIZER_FILES
from deepzoo.zoo.types import Model
from deepzoo.zoo.weights import Reader, judge


def load(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Mapping[str, str] | None = None,
    dtype: Any = None,
    quantized: bool = True,
    mtp: bool = True,
    stacked: bool = False,
    download: bool = False,
    revision: str | None = None,
    progress: Progress = None,
) -> Model:
    """Reads a model, checks all of it, and puts each part where it belongs.

    Every tensor that config.json promises must be there once, with its shape and dtype, and nothing
    else; values must be finite. There is no switch that makes this a warning. Nothing is written,
    no code is run, no file outside the directory is opened, and the network is not touched unless
    `download` is true.

    Args:
        source: name of a model that ships with the package ("r1-nano"; write "./r1-nano" for a
            directory of that name); a directory in the published layout or one that `save` wrote;
            with `download`, a hub id ("org/name") or the name of a released model.
        mesh: each device receives only its own blocks, by `functional.shardings`. Without a mesh
            everything goes to the default device.
        rules: logical axis -> mesh axis, instead of the default table.
        dtype: "bfloat16" or "float32": casts all floating-point leaves but FP8 weights, their
            scales and the router bias; the config follows.
        quantized: False multiplies FP8 weights by their scales while loading, into the config's
            dtype; the config then has no quantization_config.
        mtp: False leaves out the multi-token-prediction layers, whether the files have them or not.
        stacked: one leaf for all layers of a stack (training), instead of one sub-dict a layer
            (decoding); `zoo.stack` and `zoo.unstack` change it later, with a copy.
        download: fetch a hub id, checked by hash, into the hub's own cache.
        revision: of the hub repository; a commit hash pins it.
        progress: see `progress.Progress`.

    Raises:
        ConfigError: config.json is missing, damaged, or not of these families.
        WeightError: the weights are damaged or do not fit the config; the message names what and
            where.
        CheckpointError: the same for a directory that `save` wrote.
        TokenizerError: tokenizer.json is there and cannot be used.
        RequestError: an argument that cannot be served.
    """
    dtype = dtype_name(dtype)
    if revision is not None and not download:
        raise RequestError("revision is one of a hub repository; pass download=True, too")
    directory, name = _find(source, download, revision, progress)
    if os.path.lexists(directory / checkpoint.MANIFEST):
        model = checkpoint.load(
            directory, mesh=mesh, rules=rules, stacked=stacked, mtp=mtp, dtype=dtype,
            quantized=quantized, progress=progress,
        )  # fmt: skip
        config, params = model.config, model.params
    else:
        config, params = _load_hf(directory, mesh, rules, dtype, quantized, mtp, stacked, progress)
    return Model(config, params, read_tokenizer(directory, config), name, directory)


def read_hf_config(directory: Path) -> Config:
    """The Config of a directory in the published layout.

    Raises:
        ConfigError: with the path and the offending key.
    """
    found = files.read_config(directory)
    try:
        return Config.from_hf(found)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from None


def read_tokenizer(directory: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, None where it has no tokenizer.json.

    Raises:
        TokenizerError: the file is damaged or does not fit the model.
        WeightError: it is a link out of the directory, or no regular file.
    """
    if not os.path.lexists(directory / "tokenizer.json"):
        return None
    for name in TOKENIZER_FILES:
        if os.path.lexists(directory / name):
            with files.open_file(directory, name):
                pass
    return Tokenizer.load(directory, config)


def _find(
    source: str | Path, download: bool, revision: str | None, progress: Progress
) -> tuple[Path, str]:
    """The directory that `source` means, resolved once, and the model's name."""
    text = str(source)
    bare = isinstance(source, str) and not text.startswith((".", "/", "~")) and os.sep not in text
    if bare and (shipped := catalog.shipped_directory(text)) is not None:
        return shipped.resolve(), text.lower()
    path = Path(source).expanduser()
    if path.is_dir():
        resolved = path.resolve()
        return resolved, resolved.name
    if os.path.lexists(path):
        raise WeightError(f"{path}: is not a directory; pass the directory that holds config.json")
    repo = text if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else _released(text)
    if repo is None or not isinstance(source, str):
        shipped = [n for n in catalog.models() if catalog.shipped_directory(n)]
        raise WeightError(
            f"{path}: no such directory, and no model of that name ships with deepzoo (there:"
            f" {', '.join(shipped) or 'none'})"
        )
    if not download:
        raise WeightError(
            f"{text}: no such directory here; to fetch {repo} from the hub pass download=True"
            " (--download)"
        )
    fetched = hub.download(repo, revision=revision, progress=progress)
    return fetched.directory, repo


def _released(name: str) -> str | None:
    """Hub repository of a released model by the name it has here."""
    return catalog.card(name).repo if name.lower() in catalog.models() else None


def _load_hf(
    directory: Path,
    mesh: Mesh | None,
    rules: Mapping[str, str] | None,
    dtype: str | None,
    quantized: bool,
    mtp: bool,
    stacked: bool,
    progress: Progress,
) -> tuple[Config, dict[str, Any]]:
    promised = read_hf_config(directory)
    with files.open_checkpoint(directory) as opened:
        disk = judge(opened, promised, mtp=mtp)
        config = target_config(disk, dtype, quantized)
        on_disk = names.leaves(disk, stacked=stacked)
        placed = place(config, mesh, rules, stacked)
        plans = {
            path: assemble.plan(leaf, leaf.dtype, placed.get(path))
            for path, leaf in names.leaves(config, stacked=stacked).items()
        }
        published = names.tensors(disk)
        copies = [t for t in published.values() if t.alias]
        total = sum(
            assemble.elements(plan) * jnp.dtype(on_disk[path].dtype).itemsize
            for path, plan in plans.items()
        ) + sum(opened.entries[t.name].stop - opened.entries[t.name].start for t in copies)
        with track(f"loading {directory.name}", total, progress) as advance:
            reader = Reader(opened, disk, advance)
            mains = {leaf.tensors[0].path: leaf.tensors[0] for leaf in on_disk.values()}
            for copy in copies:
                reader.verify_alias(copy, mains[copy.path])
            with assemble.threads() as pool:
                flat = {p: assemble.build(plan, reader.read, pool) for p, plan in plans.items()}
        opened.verify_unchanged()
    return config, names.nest(flat)

"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / r * B A with W frozen.

The adapters are a small tree {"moe.self_attn.o_proj": {"a": [..., r, inputs], "b": [..., outputs,
r]}}, with the leading axes of the weight: layers, experts. That is what a step trains and a
checkpoint holds:

    step = train_step(loss, tx, combine=combine(alpha, rank))
    step = jitted(step, state, model.params)

The model adds x A^T B^T to the product with W, which is never touched: it may be FP8, and there is
neither a second copy of it nor a gradient of its size. The price is 2 r (inputs + outputs)
operations more for each token and layer, and r values of each token are kept for the backward pass.

r rank
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from deepzoo.kernels import block_fp8
from deepzoo.zoo import names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import CheckpointError, RequestError
from deepzoo.zoo.model import Params

type Target = Literal["attention", "dense_mlp", "shared_experts", "routed_experts"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def target_of(path: Sequence[str]) -> Target | None:
    """Which kind of linear map a weight's path is; None for router, norms, embedding, head, MTP."""
    if path[0] not in ("dense", "moe") or path[-1] != "weight":
        return None
    if path[1] == "self_attn":
        return "attention" if "_proj" in path[-2] else None
    if path[0] == "dense" and path[1] == "mlp":
        return "dense_mlp"
    if path[:3] == ("moe", "mlp", "shared_experts"):
        return "shared_experts"
    return "routed_experts" if path[:3] == ("moe", "mlp", "experts") else None


def init(
    config: Config, rank: int, targets: Sequence[Target], key: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """Adapters that change nothing yet, float32: A uniform within +-1 / sqrt(inputs), B zero.

    Raises:
        RequestError: a rank below 1, or targets that the model does not have.
    """
    if rank < 1:
        raise RequestError(f"the rank of the adapters is {rank}; expected 1 or more")
    leaves = names.leaves(config)
    kinds = {path: target_of(path) for path in leaves}
    if unknown := sorted(set(targets) - set(kinds.values())):
        has = ", ".join(sorted(k for k in set(kinds.values()) if k))
        raise RequestError(f"this model has no layers of the kind {unknown[0]}; it has {has}")
    chosen = sorted(path for path, kind in kinds.items() if kind in targets)
    made = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *leading, outputs, inputs = leaves[path].shape
        bound = 1 / math.sqrt(inputs)
        made[".".join(path[:-1])] = {
            "a": jax.random.uniform(one, (*leading, rank, inputs), jnp.float32, -bound, bound),
            "b": jnp.zeros((*leading, outputs, rank), jnp.float32),
        }
    return made


def combine(alpha: float, rank: int) -> Callable[[Params, Params], Params]:
    """(adapters, frozen parameters) -> parameters that `zoo.apply` takes: with `lora_a` and
    `lora_b` beside each adapted weight."""

    def both(lora: Params, frozen: Params) -> Params:
        for path, pair in lora.items():
            leaves = {"lora_a": pair["a"], "lora_b": pair["b"] * (alpha / rank)}
            frozen = _changed(frozen, path.split("."), lambda layer, new=leaves: layer | new)
        return frozen

    return both


def merge(config: Config, params: Params, lora: Params, alpha: float) -> Params:
    """The model's own parameters with alpha / r * B A added to the adapted weights.

    The sum is float32, rounded to the weight's dtype; FP8 weights are quantised again, which loses
    what is smaller than their step: keep the adapter, too.
    """

    def added(layer: Params, pair: Params) -> Params:
        rank = pair["a"].shape[-2]
        delta = (alpha / rank) * (pair["b"] @ pair["a"])
        weight = layer["weight"]
        if "weight_scale_inv" not in layer:
            return layer | {"weight": (weight.astype(jnp.float32) + delta).astype(weight.dtype)}
        assert config.quantization_config is not None
        ue8m0 = config.quantization_config.scale_fmt == "ue8m0"
        whole = block_fp8.dequantize(weight, layer["weight_scale_inv"], jnp.float32) + delta
        values, scales = block_fp8.quantize(whole, ue8m0=ue8m0)
        return layer | {"weight": values, "weight_scale_inv": scales}

    for path, pair in lora.items():
        params = _changed(params, path.split("."), lambda layer, new=pair: added(layer, new))
    return params


def export(config: Config, lora: Params, alpha: float, path: Path, base: str = "") -> None:
    """Writes a folder that the PEFT library opens: adapter_config.json and
    adapter_model.safetensors, one A and one B for each layer (and expert).

    transformers 5 joins the routed experts of a layer into one tensor, for which PEFT has no
    adapters of single experts: merge those before you leave.

    Args:
        config: the model.
        lora: the adapters.
        alpha: their factor, times the rank.
        path: the folder; made.
        base: name or directory of the model they belong to, for PEFT's own loading.
    """
    tensors, modules, rank = {}, set(), 0
    for name, pair in lora.items():
        rank = pair["a"].shape[-2]
        for tensor in names.leaves(config)[(*name.split("."), "weight")].tensors:
            stem = tensor.name.removesuffix(".weight")
            modules.add(stem.rsplit(".", 1)[-1] if "self_attn" in stem else stem)
            for letter, leaf in (("A", pair["a"]), ("B", pair["b"])):
                tensors[f"{_PREFIX}{stem}.lora_{letter}.weight"] = np.ascontiguousarray(
                    np.asarray(leaf, np.float32)[tensor.index]
                )
    path.mkdir(parents=True)
    save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "target_modules": sorted(modules),
    }  # fmt: skip
    (path / _CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def load(config: Config, path: str | Path) -> tuple[dict[str, dict[str, jax.Array]], float]:
    """(adapters, alpha) of a folder that `export` or the PEFT library wrote.

    Raises:
        CheckpointError: it is no plain LoRA of this model; with what is missing or different.
    """
    folder = Path(path).expanduser()
    try:
        told = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        found = load_file(folder / _WEIGHTS)
    except Exception as error:  # safetensors raises its own kinds
        what = str(error).split("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read as an adapter ({what})") from None
    for key, plain in {"peft_type": "LORA", "use_dora": False, "use_rslora": False}.items():
        if told.get(key, plain) != plain:
            raise CheckpointError(f"{folder / _CONFIG}: {key} is {told[key]!r}, expected {plain!r}")
    rank, alpha = told.get("r"), told.get("lora_alpha")
    lora: dict[str, dict[str, Any]] = {}
    left = set(found)
    for path_of, leaf in names.leaves(config).items():
        if target_of(path_of) is None:
            continue
        stems = [t.name.removesuffix(".weight") for t in leaf.tensors]
        first = f"{_PREFIX}{stems[0]}.lora_A.weight"
        if first not in found:
            continue
        *leading, outputs, inputs = leaf.shape
        pair = {}
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            keys = [f"{_PREFIX}{stem}.lora_{letter}.weight" for stem in stems]
            for key in keys:
                if key not in found or found[key].shape != shape:
                    has = list(found[key].shape) if key in found else "nothing"
                    raise CheckpointError(
                        f"{folder / _WEIGHTS}: {key} is {has}, expected {list(shape)}"
                    )
            left -= set(keys)
            joined = np.stack([found[k] for k in keys]).astype(np.float32)
            pair[letter.lower()] = jnp.asarray(joined.reshape(*leading, *shape))
        lora[".".join(path_of[:-1])] = pair
    if left or not lora:
        what = f"{min(left)} is no layer of this model" if left else "it has no adapters"
        raise CheckpointError(f"{folder / _WEIGHTS}: {what}")
    return lora, float(alpha)


def _changed(tree: Params, path: Sequence[str], change: Callable[[Params], Params]) -> Params:
    """The tree with `change` applied at a path; everything else is shared."""
    if not path:
        return change(tree)
    return tree | {path[0]: _changed(tree[path[0]], path[1:], change)}

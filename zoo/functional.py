"""Pure functions over (config, params): shapes, initial values, forward pass, sharding, layouts.

Parameters are a plain nested dict of arrays, either stacked (a leading layer axis under "dense",
"moe" and "mtp"; for training, run with a scan) or one sub-dict a layer ("dense" -> "0", "1", ...;
for decode, where a scan would copy each layer's weights every step). Every function takes both.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepzoo.zoo.cache import Cache
from deepzoo.zoo.config import Config
from deepzoo.zoo.model import Decoder, Output, Params

_LAYERED = ("dense", "moe", "mtp")

# Logical axis -> mesh axis; what is not listed, or does not divide, is replicated.
RULES: Mapping[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "expert_ffn": "tensor",
    "expert": "expert",
    "embed": "fsdp",
    "q_lora": "fsdp",
}


@functools.lru_cache(maxsize=64)
def _skeleton(config: Config, stacked: bool) -> tuple[Any, Any]:
    make = functools.partial(Decoder, config, stacked=stacked)
    return nnx.split(jax.eval_shape(lambda: make(nnx.Rngs(0))))


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether a parameter (or cache-layer) tree has a leading layer axis instead of one sub-dict a
    layer."""
    return not any("0" in params[name] for name in _LAYERED if name in params)


def abstract(config: Config, *, stacked: bool = True) -> Params:
    """Shapes and dtypes of all parameters, without memory: a nested dict of
    `jax.ShapeDtypeStruct`."""
    return nnx.to_pure_dict(_skeleton(config, stacked)[1])  # pyright: ignore[reportReturnType]


def init(config: Config, key: jax.Array, *, stacked: bool = True) -> Params:
    """Random parameters: normal with `initializer_range`, norms 1, biases 0; FP8 leaves where the
    config has them."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key), stacked=stacked)))  # pyright: ignore


def bind(config: Config, params: Params) -> Decoder:
    """A real `nnx.Module` holding these parameters, for people and for tools that want one.

    Low-rank adapters, leaves `lora_a` and `lora_b` beside a linear map's `weight`, may be there;
    `apply` and everything built on it then computes with them.

    Raises:
        ValueError: the tree does not have the config's parameters; up to ten paths are named.
    """
    graph, state = _skeleton(config, is_stacked(params))
    flat = dict(nnx.to_flat_state(state))
    given = {
        tuple(_key(k) for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    adapters = {p: given.pop(p) for p in list(given) if p[-1] in ("lora_a", "lora_b")}
    if missing := sorted("/".join(map(str, p)) for p in flat.keys() ^ given.keys()):
        raise ValueError(
            f"parameters do not fit the config, {len(missing)} paths differ:"
            f" {', '.join(missing[:10])}"
        )
    model = nnx.merge(graph, nnx.from_flat_state({p: v.replace(given[p]) for p, v in flat.items()}))
    for path, leaf in adapters.items():
        layer = model
        for key in path[:-1]:
            layer = layer[key] if isinstance(layer, nnx.Dict) else getattr(layer, key)
        setattr(layer, path[-1], nnx.Param(leaf))
    return model


def _key(entry: Any) -> Any:
    return getattr(entry, "key", getattr(entry, "name", entry))


@functools.partial(jax.jit, static_argnames=("config", "remat", "logits"))
def apply(
    config: Config,
    params: Params,
    tokens: jax.Array,
    *,
    cache: Cache | None = None,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    experts: jax.Array | None = None,
    remat: bool | str = False,
    logits: bool = True,
) -> Output:
    """Forward pass: tokens int32 [B, T] -> logits float32 [B, T, V], cache, routing, hidden.

    Rows are padded on the right; with causal attention the padding changes nothing before it. Ids
    outside the vocabulary are not checked here (a traced array has no values): `generate` and the
    data loaders check them on the host.

    Args:
        config: the model.
        params: its parameters, stacked or not.
        tokens: int32 [B, T].
        cache: continue from it; positions and visibility follow each row's length.
        lengths: int32 [B], real tokens of each row in this pass (all T by default); only moves the
            cache's lengths.
        segment_ids: int32 [B, T], without a cache: tokens see only their own segment and positions
            count from its start (packed documents; left padding as a segment of its own).
        positions: int32 [B, T], instead of the derived ones.
        experts: int32 [L, B, T, K], `Output.routing.indices` of another pass over these tokens: its
            choice of experts is taken, with weights from this pass's scores.
        remat: what the backward pass computes again instead of keeping it: "none" or False; "full"
            or True, each layer; "dots", each layer but its products with weights that all tokens
            share; or what a policy in `jax.checkpoint_policies` leaves, by its name.
        logits: False leaves out the head; `hidden` is then in `logits`' place too (losses that
            apply the head in chunks).
    """
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids go with whole sequences; a cache holds one sequence a row")
    if cache is not None and is_stacked(cache.layers) != is_stacked(params):
        wanted = is_stacked(params)
        raise ValueError(
            f"these parameters are {'' if wanted else 'not '}stacked, the cache is"
            f" {'not' if wanted else 'stacked'}; make it with zoo.cache(..., stacked={wanted})"
        )
    return bind(config, params)(
        tokens, cache, lengths, segment_ids, positions,
        experts=experts, remat=remat, logits=logits,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "depth", "logits"))
def apply_mtp(
    config: Config,
    params: Params,
    hidden: jax.Array,
    next_tokens: jax.Array,
    *,
    cache: Cache | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    depth: int = 0,
    logits: bool = True,
) -> Output:
    """One MTP depth: from the hidden state of token i and the id of token i+1, the logits of token
    i+2.

    V3 report, eq. 21-23. `hidden` is the main model's state after its final norm, as every
    published runtime feeds it.

    Args:
        config: a model with `num_nextn_predict_layers` > depth.
        params: its parameters.
        hidden: [B, T, D], `Output.hidden` of the main model or of the depth before.
        next_tokens: int32 [B, T], the tokens one to the right.
        cache: its "mtp" layers are read and written from `cache.lengths` on; the lengths stay as
            they are.
        segment_ids: as in `apply`.
        positions: as in `apply`.
        depth: 0 for the first.
        logits: as in `apply`.
    """
    model = bind(config, params)
    return model.predict_next(
        hidden, next_tokens, cache, segment_ids, positions, depth=depth, logits=logits
    )


def stack(params: Params) -> Params:
    """Per-layer parameters -> stacked ones."""
    if is_stacked(params):
        return params
    out = dict(params)
    for name in (n for n in _LAYERED if n in params):
        layers = [params[name][str(i)] for i in range(len(params[name]))]
        out[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return out


def unstack(params: Params) -> Params:
    """Stacked parameters -> one sub-dict a layer; copies, so keep only one of the two for a large
    model."""
    if not is_stacked(params):
        return params
    out = dict(params)
    for name in (n for n in _LAYERED if n in params):
        count = len(jax.tree.leaves(params[name])[0])
        out[name] = {str(i): jax.tree.map(lambda a, i=i: a[i], params[name]) for i in range(count)}
    return out


def axes(config: Config, *, stacked: bool = True) -> dict[str, Any]:
    """Logical axis names of every parameter, as tuples in the parameters' tree; stacked leaves
    begin with "layer"."""
    state = _skeleton(config, stacked)[1]
    named = {
        path: ("layer",) * (leaf.ndim - len(leaf.axes)) + leaf.axes
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.traversals.unflatten_mapping(named)


def shardings(
    config: Config, mesh: Mesh, rules: Mapping[str, str] | None = None, *, stacked: bool = True
) -> dict[str, Any]:
    """A `NamedSharding` for every parameter.

    Args:
        config: the model.
        mesh: device mesh; axes `data`, `fsdp`, `expert`, `tensor` where the default rules are used.
        rules: logical axis -> mesh axis, `RULES` by default. An axis that the mesh lacks, that is
            taken by an earlier dimension of the same leaf, or that does not divide the dimension,
            is left out.
    """
    table = RULES if rules is None else rules
    sizes = dict(mesh.shape)

    def place(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        spec: list[str | None] = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = table.get(name) if name else None
            ok = axis in sizes and axis not in spec and size % sizes[axis] == 0
            spec.append(axis if ok else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, abstract(config, stacked=stacked), axes(config, stacked=stacked))

"""The two-way table between published tensor names and our parameter tree.

Everything comes from the Config: which tensors a published checkpoint holds, with which shape and
dtype, and which slice of which of our leaves each of them is. Reading, writing, converting and
checking all walk this one table, so they cannot disagree.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from deepzoo.zoo.config import Config

type Path = tuple[str, ...]
type Kind = Literal["weight", "linear", "scale", "norm", "bias", "router_bias"]

BLOCK = 128
_GATED = ("gate_proj", "up_proj", "down_proj")


class Tensor(NamedTuple):
    """One tensor of the published layout.

    Attributes:
        name: the published name, such as `model.layers.3.mlp.experts.7.up_proj.weight`.
        path: keys of our leaf. `index` selects this tensor in it: (), (layer,), (expert,) or
            (layer, expert), depending on the leaf and on whether layers are stacked.
        shape, dtype: as on disk.
        kind: "linear" can be quantised, "scale" belongs to a quantised one; the rest says itself.
        alias: a second copy, on disk only, of a tensor that another name fills (MTP layers).
    """

    name: str
    path: Path
    index: tuple[int, ...]  # pyright: ignore[reportIncompatibleMethodOverride]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    alias: bool = False


class Leaf(NamedTuple):
    """One array of our tree: its whole shape, and the published tensors that fill it."""

    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    tensors: tuple[Tensor, ...]


class _Part(NamedTuple):
    """A parameter of one layer: its keys below the layer, and whether each expert has one."""

    path: Path
    shape: tuple[int, ...]
    kind: Kind
    expert: bool = False


def tensors(config: Config, *, stacked: bool = True) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint of `config`, by name, in the published order.

    The aliases of MTP layers are among them. With quantization_config each quantised `.weight` is
    followed by its `.weight_scale_inv` (float32, one value per 128 x 128 block).
    """
    return {t.name: t for t in _tensors(config, stacked)}


def count(config: Config) -> int:
    """How many tensors `tensors` lists; cheap even for a config that promises billions."""
    layers = ((False, config.num_dense_layers), (True, config.num_moe_layers))
    total = 2 + (not config.tie_word_embeddings)
    for moe, number in (*layers, (True, config.num_nextn_predict_layers)):
        if number:
            parts = list(_parts(config, moe))
            total += number * sum(config.n_routed_experts if p.expert else 1 for p in parts)
    return total + 6 * config.num_nextn_predict_layers


def leaves(config: Config, *, stacked: bool = True) -> dict[Path, Leaf]:
    """Every leaf of our parameter tree, by path, with the tensors that fill it in index order."""
    groups: dict[Path, list[Tensor]] = {}
    for tensor in _tensors(config, stacked):
        if not tensor.alias:
            groups.setdefault(tensor.path, []).append(tensor)
    found = {}
    for path, group in groups.items():
        group.sort(key=lambda t: t.index)
        last = group[-1]
        shape = tuple(i + 1 for i in last.index) + last.shape
        found[path] = Leaf(shape, last.dtype, last.kind, tuple(group))
    return found


def flatten(tree: dict[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a nested dict, in the dict's own order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def nest(flat: dict[Path, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` would take apart into `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the block scales of a weight [..., out, in]: [..., ceil(out/128), ceil(in/128)]."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def _tensors(c: Config, stacked: bool) -> Iterator[Tensor]:
    embedding = (c.vocab_size, c.hidden_size)
    norm = _dtype(c, "norm")
    yield Tensor(
        "model.embed_tokens.weight", ("embed_tokens", "weight"), (), embedding, c.dtype, "weight"
    )
    for layer in range(c.num_hidden_layers):
        if layer < c.num_dense_layers:
            yield from _layer(c, stacked, ("dense",), (), layer, layer, moe=False)
        else:
            yield from _layer(c, stacked, ("moe",), (), layer - c.num_dense_layers, layer, moe=True)
    for i in range(c.num_nextn_predict_layers):
        yield from _mtp_layer(c, stacked, i)
    yield Tensor("model.norm.weight", ("norm", "weight"), (), (c.hidden_size,), norm, "norm")
    if not c.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("lm_head", "weight"), (), embedding, c.dtype, "weight")


def _mtp_layer(c: Config, stacked: bool, i: int) -> Iterator[Tensor]:
    """An MTP layer lies on disk after the last layer, with copies of the embedding and the head."""
    d, number = c.hidden_size, c.num_hidden_layers + i
    embedding = (c.vocab_size, d)
    at = f"model.layers.{number}"
    head = ("embed_tokens" if c.tie_word_embeddings else "lm_head", "weight")

    def own(name: str, key: str, shape: tuple[int, ...], kind: Kind) -> Tensor:
        path, index = _place(stacked, ("mtp",), (), i, (key, "weight"))
        return Tensor(f"{at}.{name}.weight", path, index, shape, _dtype(c, kind), kind)

    def copy(name: str, path: Path) -> Tensor:
        return Tensor(f"{at}.{name}.weight", path, (), embedding, c.dtype, "weight", alias=True)

    yield copy("embed_tokens", ("embed_tokens", "weight"))
    yield own("enorm", "enorm", (d,), "norm")
    yield own("hnorm", "hnorm", (d,), "norm")
    yield own("eh_proj", "eh_proj", (d, 2 * d), "weight")
    yield from _layer(c, stacked, ("mtp",), ("block",), i, number, moe=True)
    yield own("shared_head.norm", "norm", (d,), "norm")
    yield copy("shared_head.head", head)


def _layer(
    c: Config, stacked: bool, stack: Path, below: Path, i: int, number: int, *, moe: bool
) -> Iterator[Tensor]:
    for part in _parts(c, moe):
        path, index = _place(stacked, stack, below, i, part.path)
        dtype = _dtype(c, part.kind)
        if not part.expert:
            name = f"model.layers.{number}.{'.'.join(part.path)}"
            yield Tensor(name, path, index, part.shape, dtype, part.kind)
            continue
        prefix = f"model.layers.{number}.mlp.experts"
        rest = ".".join(part.path[2:])
        for e in range(c.n_routed_experts):
            yield Tensor(f"{prefix}.{e}.{rest}", path, (*index, e), part.shape, dtype, part.kind)


def _place(
    stacked: bool, stack: Path, below: Path, i: int, path: Path
) -> tuple[Path, tuple[int, ...]]:
    if stacked:
        return stack + below + path, (i,)
    return (*stack, str(i), *below, *path), ()


def _dtype(c: Config, kind: Kind) -> str:
    if kind == "linear" and c.quantization_config is not None:
        return "float8_e4m3fn"
    if kind in ("scale", "router_bias"):
        return "float32"
    return c.norm_dtype or c.dtype if kind == "norm" else c.dtype


def _parts(c: Config, moe: bool) -> Iterator[_Part]:
    d = c.hidden_size
    yield _Part(("input_layernorm", "weight"), (d,), "norm")
    yield from _attention(c)
    yield _Part(("post_attention_layernorm", "weight"), (d,), "norm")
    if not moe:
        yield from _mlp(c, ("mlp",), c.intermediate_size)
        return
    yield _Part(("mlp", "gate", "weight"), (c.n_routed_experts, d), "weight")
    if c.router_bias:
        bias = ("mlp", "gate", "e_score_correction_bias")
        yield _Part(bias, (c.n_routed_experts,), "router_bias")
    yield from _mlp(c, ("mlp", "experts"), c.moe_intermediate_size, expert=True)
    if c.n_shared_experts:
        # The shared experts are one network, as wide as all of them together.
        width = c.n_shared_experts * c.moe_intermediate_size
        yield from _mlp(c, ("mlp", "shared_experts"), width)


def _attention(c: Config) -> Iterator[_Part]:
    d, heads, size = c.hidden_size, c.num_attention_heads, c.head_size
    at = ("self_attn",)
    if c.is_mla:
        if c.q_lora_rank is None:
            yield from _linear(c, (*at, "q_proj"), heads * size, d)
        else:
            yield from _linear(c, (*at, "q_a_proj"), c.q_lora_rank, d)
            yield _Part((*at, "q_a_layernorm", "weight"), (c.q_lora_rank,), "norm")
            yield from _linear(c, (*at, "q_b_proj"), heads * size, c.q_lora_rank)
        yield from _linear(c, (*at, "kv_a_proj_with_mqa"), c.kv_lora_rank + c.qk_rope_head_dim, d)
        yield _Part((*at, "kv_a_layernorm", "weight"), (c.kv_lora_rank,), "norm")
        expanded = heads * (c.qk_nope_head_dim + c.v_head_dim)
        yield from _linear(c, (*at, "kv_b_proj"), expanded, c.kv_lora_rank)
        yield from _linear(c, (*at, "o_proj"), d, heads * c.v_head_dim)
        return
    shared = c.num_key_value_heads
    for key, n in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
        yield from _linear(c, (*at, key), n * size, d)
        if c.qkv_bias:
            yield _Part((*at, key, "bias"), (n * size,), "bias")
    if c.qk_norm:
        yield _Part((*at, "q_norm", "weight"), (size,), "norm")
        yield _Part((*at, "k_norm", "weight"), (size,), "norm")
    yield from _linear(c, (*at, "o_proj"), d, heads * size)


def _mlp(c: Config, at: Path, width: int, expert: bool = False) -> Iterator[_Part]:
    for key in _GATED:
        out, into = (c.hidden_size, width) if key == "down_proj" else (width, c.hidden_size)
        yield from _linear(c, (*at, key), out, into, expert)


def _linear(c: Config, at: Path, out: int, into: int, expert: bool = False) -> Iterator[_Part]:
    yield _Part((*at, "weight"), (out, into), "linear", expert)
    if c.quantization_config is not None:
        yield _Part((*at, "weight_scale_inv"), scale_shape((out, into)), "scale", expert)

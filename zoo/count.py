"""How large a model is, from its config alone: parameters, bytes of weights, bytes of cache.

Everything is read off the abstract parameter tree (`zoo.abstract`), so a count cannot disagree with
what `zoo.load` fills in; nothing is allocated.
"""

import math
from collections import Counter
from dataclasses import dataclass

import jax

from deepzoo.zoo.config import Config
from deepzoo.zoo.functional import abstract

_ROUTED = "/mlp/experts/"
_SCALE = "weight_scale_inv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Sizes of one model. Parameters exclude the scales of FP8 weights; bytes include them.

    Attributes:
        main: parameters without the MTP layers.
        routed: those of `main` that are routed experts.
        active: `main` minus the routed experts that a token does not visit.
        active_without_embedding: `active` minus the input embedding, which is looked up, not
            multiplied; the same as `active` where the head is tied to it.
        mtp: parameters of the MTP layers as published, with their copies of embedding and head.
        mtp_unique: `mtp` without those copies.
        mtp_active: what one MTP step multiplies or looks up, with the shared embedding and head.
        elements: every stored number on disk: `main` + `mtp` + scales.
        bytes: bytes on disk by dtype name, with MTP and its copies.
    """

    main: int
    routed: int
    active: int
    active_without_embedding: int
    mtp: int
    mtp_unique: int
    mtp_active: int
    elements: int
    bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes on disk, all dtypes together."""
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBytes:
    """Bytes of cache per token over all layers, in bfloat16.

    Attributes:
        stored: what this project stores: kv_lora_rank + qk_rope_head_dim numbers per layer for
            latent attention, keys and values of the kv heads for the students.
        expanded: what keys and values of every head would cost; equals `stored` for the students.
    """

    stored: int
    expanded: int


def count(config: Config) -> Count:
    """Counts the parameters of a model and the bytes its published files take."""
    sizes: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    elements = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        size = math.prod(leaf.shape)
        elements += size
        stored[leaf.dtype.name] += size * leaf.dtype.itemsize
        if name.endswith(_SCALE):
            continue
        part = "mtp" if name.startswith("mtp/") else "main"
        sizes[part] += size
        if _ROUTED in name:
            sizes[f"{part} routed"] += size
    embedding = config.vocab_size * config.hidden_size
    copies = 2 * embedding * config.num_nextn_predict_layers
    elements += copies
    stored[config.dtype] += copies * jax.numpy.dtype(config.dtype).itemsize
    active = sizes["main"] - _idle(config, sizes["main routed"])
    mtp_active = 0
    if config.num_nextn_predict_layers:
        mtp_active = sizes["mtp"] - _idle(config, sizes["mtp routed"]) + copies
    return Count(
        main=sizes["main"],
        routed=sizes["main routed"],
        active=active,
        active_without_embedding=active - (0 if config.tie_word_embeddings else embedding),
        mtp=sizes["mtp"] + copies,
        mtp_unique=sizes["mtp"],
        mtp_active=mtp_active,
        elements=elements,
        bytes={name: size for name, size in stored.most_common() if size},
    )


def cache_bytes(config: Config, *, mtp: bool = False) -> CacheBytes:
    """Bytes of cache that one more token of one sequence takes, over all layers, in bfloat16.

    Args:
        config: the model.
        mtp: count the MTP layers too, as speculative decoding with them does.
    """
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    if not config.is_mla:
        numbers = 2 * config.num_key_value_heads * config.head_size
        return CacheBytes(stored=2 * layers * numbers, expanded=2 * layers * numbers)
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    per_head = config.head_size + config.v_head_dim
    return CacheBytes(
        stored=2 * layers * latent, expanded=2 * layers * config.num_attention_heads * per_head
    )


def _idle(config: Config, routed: int) -> int:
    """Routed parameters that one token does not visit."""
    if not routed:
        return 0
    return (
        routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    )

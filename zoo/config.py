"""Model configurations, read strictly from the published `config.json` and written back unchanged.

Field names are the published keys. Everything the forward pass depends on is a field and is
checked; keys that do not change the computation are on explicit lists, are kept as text in
`Config.inert`, and come back from `to_hf`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, Literal

from deepzoo.zoo.errors import ConfigError
from deepzoo.zoo.rope_scaling import RopeScaling

MLA_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
STUDENT_TYPES = ("qwen2", "qwen3", "llama")

_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Written by every program for its own bookkeeping; nothing in the forward pass reads them.
_BOOKKEEPING = {
    "architectures", "auto_map", "transformers_version", "use_cache", "_name_or_path", "id2label",
    "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions",
    "output_router_logits", "chunk_size_feed_forward", "is_encoder_decoder", "pad_token_id",
    # parallel layout and losses of the original training run
    "ep_size", "pretraining_tp", "aux_loss_alpha", "seq_aux",
    # window size: read only when use_sliding_window is true, which is refused below
    "sliding_window", "max_window_layers",
}  # fmt: skip

# Keys that would change the computation, with the only value the released models of these families
# use.
_FIXED: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "attention_bias": lambda v, _: v is False,
    "attention_dropout": lambda v, _: v == 0,
    "mlp_bias": lambda v, _: v is False,
    "hidden_act": lambda v, _: v == "silu",
    "moe_layer_freq": lambda v, _: v == 1,
    "use_sliding_window": lambda v, _: v is False,
    "use_mrope": lambda v, _: v is False,
    "rope_interleave": lambda v, _: v is True,
    "qk_head_dim": lambda v, j: v == j["qk_nope_head_dim"] + j["qk_rope_head_dim"],
    "layer_types": lambda v, j: v == ["full_attention"] * j["num_hidden_layers"],
    "mlp_layer_types": lambda v, j: (
        v
        == ["dense"] * j["first_k_dense_replace"]
        + ["sparse"] * (j["num_hidden_layers"] - j["first_k_dense_replace"])
    ),
}

_MLA_ONLY = {"moe_layer_freq", "rope_interleave", "qk_head_dim", "mlp_layer_types"}

_MLA_FIELDS = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "first_k_dense_replace", "n_group", "topk_group", "topk_method", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
_COMMON_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range",
)  # fmt: skip

# No released model comes near these; a larger number is a broken or hostile file, not a model.
_LIMITS = {"num_hidden_layers": 1000, "n_routed_experts": 65536, "vocab_size": 1 << 24}
_DEFAULT_LIMIT = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """Block FP8 weights: float8_e4m3fn with one float32 scale per `weight_block_size` block (V3
    report, 3.3.2)."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None

    def __post_init__(self) -> None:
        if self.weight_block_size != (128, 128):
            raise ConfigError(
                f"quantization_config.weight_block_size is {list(self.weight_block_size)}; only"
                " [128, 128] exists"
                " in these families"
            )
        if self.scale_fmt not in (None, "ue8m0"):
            raise ConfigError(
                f"quantization_config.scale_fmt is {self.scale_fmt!r}; expected absent or 'ue8m0'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One model of the V2 family, the V3/R1 family or the dense students; hashable, plain Python
    values only.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or contradicts another.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    head_dim: int | None = None
    # latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # experts
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    quantization_config: Quantization | None = None
    norm_dtype: str | None = None
    """dtype of the norm weights where it is not `dtype`: a property of the weight files, not of
    config.json."""
    inert: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def is_mla(self) -> bool:
        """True for the V2 and V3/R1 families (latent attention and experts), False for the dense
        students."""
        return self.model_type in MLA_TYPES

    @property
    def num_dense_layers(self) -> int:
        """Leading layers with an ordinary feed-forward network; all of them for the students."""
        return (
            min(self.first_k_dense_replace, self.num_hidden_layers)
            if self.is_mla
            else self.num_hidden_layers
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, the MTP layers not counted."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence (config.json may hold one or a list)."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def head_size(self) -> int:
        """Width of one query head: nope + rope for latent attention, `head_dim` or hidden/heads for
        the students."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 carries biases on q, k and v although no key of its config.json says so."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head."""
        return self.model_type == "qwen3"

    @property
    def router_bias(self) -> bool:
        """V3's bias for aux-loss-free balancing (`e_score_correction_bias`, V3 report eq. 16)."""
        return self.topk_method == "noaux_tc"

    @property
    def group_score(self) -> Literal["max", "top2"]:
        """How a group of experts is scored: V2 by its best expert, V3 by the sum of its best
        two."""
        return "top2" if self.topk_method == "noaux_tc" else "max"

    @property
    def grouped(self) -> bool:
        """Whether routing is restricted to the best `topk_group` groups."""
        return self.topk_method != "greedy" and self.n_group > 1

    @property
    def softmax_scale(self) -> float:
        """head_size^-1/2, times YaRN's squared mscale for latent attention (V2 report, 3.1.4)."""
        scale = self.head_size**-0.5
        if self.is_mla and self.rope_scaling is not None:
            scale *= self.rope_scaling.softmax_mscale() ** 2
        return scale

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Reads the contents of a published or transformers-written `config.json`; never follows
        `auto_map`.

        Raises:
            ConfigError: an unknown key, a missing key, or a value these families do not have; the
                key is named.
        """
        return _from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """The published form: `Config.from_hf(j).to_hf() == j` for every released file."""
        return _to_hf(self)


def _check(c: Config) -> None:
    if c.model_type not in MLA_TYPES + STUDENT_TYPES:
        known = ", ".join(MLA_TYPES + STUDENT_TYPES)
        raise ConfigError(f"model_type {c.model_type!r} is not one of the families here ({known})")
    for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
        _check_integer(c, name, 0)
    _check_integer(c, "num_hidden_layers", 1)  # first: the counts of layers below rely on it
    positive = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    ]
    positive += ["num_key_value_heads", "max_position_embeddings"]
    if c.is_mla:
        positive += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        if c.q_lora_rank is not None:
            positive.append("q_lora_rank")
        if c.num_moe_layers or c.num_nextn_predict_layers:
            positive += [
                "n_routed_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "n_group",
                "topk_group",
            ]
    elif c.head_dim is not None:
        positive.append("head_dim")
    for name in positive:
        _check_integer(c, name, 1)
    for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"):
        value = getattr(c, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (0 < value < math.inf)
        ):
            raise ConfigError(f"{name} is {value!r}; expected a positive finite number")
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if not isinstance(getattr(c, name), bool):
            raise ConfigError(f"{name} is {getattr(c, name)!r}; expected true or false")
    for name, allowed in (
        ("dtype", ("float32", "bfloat16", "float16")),
        ("norm_dtype", (None, "float32", "bfloat16", "float16")),
        ("topk_method", ("greedy", "group_limited_greedy", "noaux_tc")),
        ("scoring_func", ("softmax", "sigmoid")),
    ):
        if getattr(c, name) not in allowed:
            raise ConfigError(
                f"{name} is {getattr(c, name)!r}; expected one of {', '.join(map(str, allowed))}"
            )
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(c, name)
        ids = value if isinstance(value, tuple) else (value,)
        if any(
            i is not None and (isinstance(i, bool) or not isinstance(i, int) or i < 0) for i in ids
        ):
            raise ConfigError(f"{name} is {value!r}; expected a token id or a list of them")
    if c.is_mla:
        _check_experts(c)
        if c.num_key_value_heads != c.num_attention_heads:
            raise ConfigError(
                f"num_key_value_heads is {c.num_key_value_heads} but latent attention has as many"
                " as query heads"
                f" ({c.num_attention_heads})"
            )
        if c.qk_rope_head_dim % 2:
            raise ConfigError(
                f"qk_rope_head_dim is {c.qk_rope_head_dim}; rope needs an even number"
            )
    else:
        if c.num_attention_heads % c.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {c.num_attention_heads} is not a multiple of"
                " num_key_value_heads"
                f" {c.num_key_value_heads}"
            )
        if c.head_dim is None and c.hidden_size % c.num_attention_heads:
            raise ConfigError(
                f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads"
                f" {c.num_attention_heads}"
            )
        if c.head_size % 2:
            raise ConfigError(f"the head size is {c.head_size}; rope needs an even number")
        if c.quantization_config is not None:
            raise ConfigError(
                f"quantization_config: no {c.model_type} student was published in FP8"
            )
        if c.num_nextn_predict_layers:
            raise ConfigError(f"num_nextn_predict_layers: {c.model_type} models have no MTP layer")


def _check_integer(c: Config, name: str, low: int) -> None:
    value, limit = getattr(c, name), _LIMITS.get(name, _DEFAULT_LIMIT)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
        raise ConfigError(f"{name} is {value!r}; expected an integer from {low} to {limit}")


def _check_experts(c: Config) -> None:
    if not (c.num_moe_layers or c.num_nextn_predict_layers):
        return
    if c.n_routed_experts % c.n_group:
        raise ConfigError(
            f"n_group {c.n_group} does not divide n_routed_experts {c.n_routed_experts}"
        )
    if c.topk_group > c.n_group:
        raise ConfigError(f"topk_group {c.topk_group} is larger than n_group {c.n_group}")
    eligible = c.n_routed_experts // c.n_group * (c.topk_group if c.grouped else c.n_group)
    if c.num_experts_per_tok > eligible:
        raise ConfigError(
            f"num_experts_per_tok {c.num_experts_per_tok} exceeds the {eligible} experts that"
            " routing can reach"
        )
    if c.group_score == "top2" and c.grouped and c.n_routed_experts // c.n_group < 2:
        raise ConfigError(
            f"n_group {c.n_group} leaves one expert a group; the top-2 group score needs two"
        )
    v2 = c.model_type == "deepseek_v2"
    if v2 != (c.scoring_func == "softmax") or v2 == (c.topk_method == "noaux_tc"):
        raise ConfigError(
            f"{c.model_type} with scoring_func {c.scoring_func!r} and topk_method"
            f" {c.topk_method!r}: V2 routes by"
            " softmax with greedy or group_limited_greedy, V3 by sigmoid with noaux_tc"
        )


def _from_hf(hf: dict[str, Any]) -> Config:
    if not isinstance(hf, dict):
        raise ConfigError(f"config.json holds a {type(hf).__name__}; expected an object")
    if "model_type" not in hf:
        raise ConfigError("config.json has no model_type")
    model_type = hf["model_type"]
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"model_type {model_type!r} is not one of the families here"
            f" ({', '.join(_ARCHITECTURES)})"
        )
    mla = model_type in MLA_TYPES
    left = dict(hf)
    values: dict[str, Any] = {}
    for key in _COMMON_FIELDS + (_MLA_FIELDS if mla else ()):
        if key in left:
            values[key] = left.pop(key)
    if model_type == "deepseek_v2":
        values.setdefault("scoring_func", "softmax")
    elif mla:  # transformers leaves these two out, and there is only one V3 router
        values.setdefault("scoring_func", "sigmoid")
        values.setdefault("topk_method", "noaux_tc")
    for key in ("n_group", "topk_group"):  # transformers writes null where there are no groups
        if key in values and values[key] is None:
            values[key] = 1
    required = _COMMON_FIELDS[:8] + (
        tuple(k for k in _MLA_FIELDS if k != "q_lora_rank") if mla else ()
    )
    optional = {"num_key_value_heads"} | (
        {"norm_topk_prob"} if model_type == "deepseek_v2" else set()
    )
    if missing := [k for k in required if k not in values and k not in optional]:
        raise ConfigError(f"config.json of model_type {model_type} lacks {', '.join(missing)}")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if mla:
        values["num_nextn_predict_layers"] = left.pop("num_nextn_predict_layers", 0)
        if left.get("head_dim", values["qk_rope_head_dim"]) != values["qk_rope_head_dim"]:
            raise ConfigError(
                f"head_dim is {left['head_dim']}; transformers writes qk_rope_head_dim there"
            )
    else:
        values["head_dim"] = left.pop("head_dim", None)
    dtypes = [v for k in ("torch_dtype", "dtype") if (v := left.pop(k, None)) is not None]
    if dtypes and dtypes[0] != dtypes[-1]:
        raise ConfigError(f"torch_dtype is {dtypes[0]!r} but dtype is {dtypes[1]!r}; keep one")
    if dtypes:
        values["dtype"] = dtypes[0]
    values["bos_token_id"] = left.pop("bos_token_id", None)
    eos = left.pop("eos_token_id", None)
    values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else eos
    values |= RopeScaling.pop_from(left)
    if (quantization := left.pop("quantization_config", None)) is not None:
        values["quantization_config"] = _quantization(quantization)
    config = Config(**values)  # checks the values, so that the rules below may rely on them
    inert = {}
    for key, value in left.items():
        if key in _FIXED and (mla or key not in _MLA_ONLY):
            if not _FIXED[key](value, values):
                raise ConfigError(
                    f"{key} is {value!r}, which no released model of these families uses"
                )
        elif key not in _BOOKKEEPING and not (mla and key == "head_dim"):
            raise ConfigError(
                f"unknown key {key!r} in config.json: it may change the computation, so it is"
                " refused"
            )
        inert[key] = json.dumps(value, sort_keys=True)
    # sorted: two files that differ only in the order of their keys make equal configs
    return dataclasses.replace(config, inert=tuple(sorted(inert.items())))


def _quantization(q: Any) -> Quantization:
    if not isinstance(q, dict):
        raise ConfigError(f"quantization_config is {q!r}; expected an object")
    fixed = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    for key, value in q.items():
        if key in fixed and value != fixed[key]:
            raise ConfigError(f"quantization_config.{key} is {value!r}; expected {fixed[key]!r}")
        if key not in fixed and key not in ("weight_block_size", "scale_fmt"):
            raise ConfigError(f"unknown key 'quantization_config.{key}'")
    if q.get("quant_method") != "fp8" or not isinstance(q.get("weight_block_size"), list):
        raise ConfigError(
            "quantization_config needs quant_method 'fp8' and weight_block_size [128, 128]"
        )
    return Quantization(
        weight_block_size=tuple(q["weight_block_size"]), scale_fmt=q.get("scale_fmt")
    )


def _to_hf(c: Config) -> dict[str, Any]:
    hf: dict[str, Any] = {"architectures": [_ARCHITECTURES[c.model_type]], "hidden_act": "silu"}
    hf |= {k: getattr(c, k) for k in _COMMON_FIELDS + (_MLA_FIELDS if c.is_mla else ())}
    if c.model_type in ("deepseek_v3", "kimi_k2"):
        hf["num_nextn_predict_layers"] = c.num_nextn_predict_layers
    if c.head_dim is not None:
        hf["head_dim"] = c.head_dim
    hf["torch_dtype"] = c.dtype
    hf["bos_token_id"] = c.bos_token_id
    hf["eos_token_id"] = (
        list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    )
    hf["rope_theta"] = c.rope_theta
    if c.rope_scaling is not None:
        hf["rope_scaling"] = c.rope_scaling.to_hf()
    if (q := c.quantization_config) is not None:
        hf["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(q.weight_block_size),
        } | ({"scale_fmt": q.scale_fmt} if q.scale_fmt else {})
    return hf | {k: json.loads(v) for k, v in c.inert}

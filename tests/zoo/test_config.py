"""config.json read strictly: what these families do not have is refused, and named."""

import builtins
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepzoo.zoo import catalog
from deepzoo.zoo.config import Config, Quantization
from deepzoo.zoo.errors import ConfigError, DeepzooError
from deepzoo.zoo.rope_scaling import RopeScaling, inverse_frequencies

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
V2, R1, KIMI = "deepseek-v2", "deepseek-r1", "kimi-k2-instruct"
QWEN, LLAMA, QWEN3 = (
    "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-llama-70b",
    "deepseek-r1-0528-qwen3-8b",
)
ONE_OF_EACH = (V2, "deepseek-v2-lite", R1, KIMI, "moonlight-16b-a3b", QWEN, LLAMA, QWEN3)


def published(name: str) -> dict[str, Any]:
    """A released model's config.json, as a fresh dict."""
    return catalog.config(name).to_hf()


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (R1, {"sliding": 1}, "unknown key 'sliding'"),
        (R1, {"trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        (R1, {"index_topk": 2048}, "unknown key 'index_topk'"),  # V3.2's sparse attention
        (QWEN, {"kv_lora_rank": 512}, "unknown key 'kv_lora_rank'"),
        (R1, {"model_type": "deepseek_v32"}, "model_type 'deepseek_v32'"),
        (R1, {"model_type": "gpt2"}, "model_type 'gpt2'"),
        (R1, {"model_type": ["deepseek_v3"]}, "model_type"),
        (R1, {"hidden_size": "7168"}, "hidden_size is '7168'"),
        (R1, {"hidden_size": 7168.0}, "hidden_size is 7168.0"),
        (R1, {"hidden_size": True}, "hidden_size is True"),
        (R1, {"hidden_size": 0}, "hidden_size is 0"),
        (R1, {"hidden_size": None}, "hidden_size is None"),
        (R1, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (R1, {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        (R1, {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        (R1, {"n_routed_experts": 10**9}, "n_routed_experts is 1000000000"),
        (R1, {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers"),
        (R1, {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        (R1, {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        (R1, {"rope_theta": math.inf}, "rope_theta is inf"),
        (R1, {"rope_theta": 0}, "rope_theta is 0"),
        (R1, {"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan"),
        (R1, {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        (R1, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (R1, {"torch_dtype": "int8"}, "dtype is 'int8'"),
        (R1, {"dtype": "float32"}, "torch_dtype is 'bfloat16' but dtype is 'float32'"),
        (R1, {"eos_token_id": -1}, "eos_token_id is -1"),
        (R1, {"eos_token_id": [1, "2"]}, "eos_token_id"),
        (R1, {"bos_token_id": 0.5}, "bos_token_id is 0.5"),
        # routing
        (R1, {"n_group": 7}, "n_group 7 does not divide n_routed_experts 256"),
        (R1, {"topk_group": 9}, "topk_group 9 is larger than n_group 8"),
        (R1, {"num_experts_per_tok": 129}, "num_experts_per_tok 129 exceeds the 128"),
        (R1, {"n_group": 256, "topk_group": 8}, "top-2 group score needs two"),
        (R1, {"scoring_func": "softmax"}, "V3 by sigmoid with noaux_tc"),
        (V2, {"scoring_func": "sigmoid"}, "V2 routes by softmax"),
        (V2, {"topk_method": "noaux_tc"}, "V2 routes by softmax"),
        (R1, {"scoring_func": "sqrtsoftplus"}, "scoring_func is 'sqrtsoftplus'"),
        (R1, {"topk_method": "hash"}, "topk_method is 'hash'"),
        (R1, {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        # attention
        (R1, {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        (R1, {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        (R1, {"head_dim": 128}, "head_dim is 128"),
        (R1, {"rope_interleave": False}, "rope_interleave is False"),
        (R1, {"attention_bias": True}, "attention_bias is True"),
        (R1, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (R1, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        (QWEN, {"hidden_size": 3585}, "hidden_size 3585 is not a multiple"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN, {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (QWEN, {"layer_types": ["full_attention"] * 27}, "layer_types"),
        (QWEN, {"rope_interleave": True}, "unknown key 'rope_interleave'"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        # quantisation of another kind
        (QWEN, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method"),
        (R1, {"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        (R1, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        (R1, {"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
    ],
)
def test_refused_naming_the_key(name: str, change: dict[str, Any], told: str):
    with pytest.raises(ConfigError) as caught:
        Config.from_hf(published(name) | change)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"weight_block_size": [32, 32]}, "weight_block_size is [32, 32]"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"scale_fmt": "e4m3"}, "scale_fmt is 'e4m3'"),
        ({"modules_to_not_convert": []}, "quantization_config.modules_to_not_convert"),
    ],
)
def test_block_fp8_of_another_kind_is_refused(change: dict[str, Any], told: str):
    hf = published(R1)
    hf["quantization_config"] = hf["quantization_config"] | change
    with pytest.raises(ConfigError) as caught:
        Config.from_hf(hf)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (R1, {"factor": math.nan}, "rope_scaling.factor is nan"),
        (R1, {"factor": None}, "lacks factor"),
        (R1, {"type": ["yarn"]}, "rope_scaling names its rule"),
        (R1, {"factor": "40"}, "rope_scaling.factor is '40'"),
        (R1, {"mscale": -1.0}, "rope_scaling.mscale is -1.0"),
        (R1, {"type": "dynamic"}, "'dynamic'"),
        (R1, {"type": "linear", "mscale": 1.0}, "'linear'"),
        (R1, {"rope_type": "llama3"}, "rope_scaling names its rule"),
        (R1, {"low_freq_factor": 1.0}, "'rope_scaling.low_freq_factor'"),
        (R1, {"truncate": False}, "'rope_scaling.truncate'"),
        (LLAMA, {"beta_fast": 32}, "'rope_scaling.beta_fast'"),
        (LLAMA, {"high_freq_factor": None}, "high_freq_factor"),
    ],
)
def test_rope_scaling_is_refused_naming_the_key(name: str, change: dict[str, Any], told: str):
    hf = published(name)
    hf["rope_scaling"] = hf["rope_scaling"] | change
    with pytest.raises(ConfigError) as caught:
        Config.from_hf(hf)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_the_forward_pass_needs_is_required(name: str):
    hf = published(name)
    required = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    required += ["num_attention_heads", "max_position_embeddings"]
    if catalog.config(name).is_mla:
        required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        required += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"]
        required += ["n_shared_experts", "first_k_dense_replace", "routed_scaling_factor"]
        required += ["n_group", "topk_group"]
        required += ["norm_topk_prob"] if name != V2 and "lite" not in name else []
    for key in required:
        with pytest.raises(ConfigError, match=key):
            Config.from_hf({k: v for k, v in hf.items() if k != key})


@pytest.mark.parametrize("value", [None, [], "deepseek_v3", 3, [{"model_type": "deepseek_v3"}]])
def test_something_else_than_an_object_is_refused(value: Any):
    with pytest.raises(ConfigError, match="expected an object"):
        Config.from_hf(value)


def test_auto_map_is_kept_and_never_followed():
    imported: list[str] = []
    ordinary = builtins.__import__

    def watch(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name)
        return ordinary(name, *args, **kwargs)

    hf = published(R1) | {"auto_map": {"AutoConfig": "os.system", "AutoModel": "../../x.Y"}}
    builtins.__import__ = watch
    try:
        config = Config.from_hf(hf)
    finally:
        builtins.__import__ = ordinary
    assert imported == []
    assert replace(config, inert=()) == replace(catalog.config(R1), inert=())
    assert config.to_hf()["auto_map"] == hf["auto_map"]


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes_equals_what_was_published(case: str):
    """`rope_parameters` for `rope_scaling`, `dtype` for `torch_dtype`, and its own extra keys."""
    read = json.loads((GOLDEN / case / "config_published.json").read_text())
    written = json.loads((GOLDEN / case / "config.json").read_text())
    assert "rope_parameters" in written and "rope_parameters" not in read
    old, new = Config.from_hf(read), Config.from_hf(written)
    if old.rope_scaling is not None and new.rope_scaling is not None:
        new = replace(new, rope_scaling=replace(new.rope_scaling, type_key="type"))
        old = replace(old, rope_scaling=replace(old.rope_scaling, type_key="type"))
    if old.model_type == "llama":  # transformers writes out the head_dim it derived
        assert new.head_size == old.head_size
        new = replace(new, head_dim=old.head_dim)
    assert replace(new, inert=()) == replace(old, inert=())
    assert Config.from_hf(new.to_hf()) == new


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_both_rope_forms_are_one(name: str):
    hf = published(name)
    scaling = hf.pop("rope_scaling", None) or {"rope_type": "default"}
    hf["rope_parameters"] = scaling | {"rope_theta": hf.pop("rope_theta")}
    assert Config.from_hf(hf) == catalog.config(name)
    with pytest.raises(ConfigError, match="both rope_scaling and rope_parameters"):
        Config.from_hf(hf | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})


def test_keys_that_follow_from_the_model_type_may_be_left_out():
    hf = published(R1)
    del hf["scoring_func"], hf["topk_method"], hf["num_key_value_heads"]
    assert Config.from_hf(hf) == catalog.config(R1)
    hf = published("deepseek-v2-lite")
    del hf["scoring_func"]
    hf |= {"n_group": None, "topk_group": None}  # as transformers writes "no groups"
    assert Config.from_hf(hf) == catalog.config("deepseek-v2-lite")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_order_of_keys_does_not_matter(name: str):
    hf = published(name)
    assert Config.from_hf(dict(reversed(hf.items()))) == catalog.config(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("case", ["v2_like", "v3_fp8", "llama31_like", "qwen3_yarn"])
@pytest.mark.parametrize("file", ["config.json", "config_published.json"])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(case: str, file: str, data: st.DataObject):
    """Nothing but a ConfigError comes out of a damaged file, and what is read can be written."""
    hf = json.loads((GOLDEN / case / file).read_text())
    nested = [k for k, v in hf.items() if isinstance(v, dict)]
    at = data.draw(st.sampled_from([(), *((k,) for k in nested)]))
    place = hf[at[0]] if at else hf
    key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=4))
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        place.pop(key, None)
    try:
        config = Config.from_hf(hf)
    except DeepzooError as error:
        assert type(error) is ConfigError and str(error)
        return
    hash(config)
    written = json.dumps(config.to_hf(), sort_keys=True)
    assert json.dumps(Config.from_hf(config.to_hf()).to_hf(), sort_keys=True) == written


@pytest.mark.parametrize(
    ("name", "scale", "cos_sin"),
    [
        ("deepseek-v2-lite", 0.114721, 1.0),
        (V2, 0.114721, 1.0),
        ("deepseek-v2.5", 0.135234, 1.0),
        (R1, 0.135234, 1.0),
        ("moonlight-16b-a3b", 0.072169, 1.0),
        (KIMI, 0.130861, 1.0),
        (QWEN, 128**-0.5, 1.0),
        (LLAMA, 128**-0.5, 1.0),
        (QWEN3, 128**-0.5, 1.0),
    ],
)
def test_softmax_scale_and_rope_factor(name: str, scale: float, cos_sin: float):
    config = catalog.config(name)
    assert config.softmax_scale == pytest.approx(scale, abs=5e-7)
    factor = config.rope_scaling.cos_sin_factor() if config.rope_scaling else 1.0
    assert factor == pytest.approx(cos_sin, abs=1e-12)


def test_qwen3_without_its_attn_factor_scales_cos_and_sin():
    scaling = catalog.config(QWEN3).rope_scaling
    assert scaling is not None
    assert replace(scaling, attn_factor=None).cos_sin_factor() == pytest.approx(1.13862944)
    assert replace(scaling, attn_factor=None, attention_factor=1.0).cos_sin_factor() == 1.0


def test_derived_values():
    r1, v2, lite = (catalog.config(n) for n in (R1, V2, "deepseek-v2-lite"))
    assert (r1.num_dense_layers, r1.num_moe_layers, r1.head_size) == (3, 58, 192)
    assert (r1.group_score, r1.grouped, r1.router_bias) == ("top2", True, True)
    assert (v2.group_score, v2.grouped, v2.router_bias) == ("max", True, False)
    assert (lite.grouped, catalog.config(KIMI).grouped) == (False, False)
    qwen, llama, qwen3 = (catalog.config(n) for n in (QWEN, LLAMA, QWEN3))
    assert (qwen.num_dense_layers, qwen.num_moe_layers) == (28, 0)
    assert [c.qkv_bias for c in (qwen, llama, qwen3)] == [True, False, False]
    assert [c.qk_norm for c in (qwen, llama, qwen3)] == [False, False, True]
    assert llama.eos_ids == (128001, 128008, 128009)
    assert r1.eos_ids == (1,)


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="n_group 7"):
        replace(catalog.config(R1), n_group=7)
    with pytest.raises(ConfigError, match="no qwen2 student was published in FP8"):
        replace(catalog.config(QWEN), quantization_config=Quantization())
    with pytest.raises(ConfigError, match="low_freq_factor and high_freq_factor"):
        RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)


def test_slow_rope_pairs_are_stretched_and_fast_ones_kept():
    """YaRN at R1's numbers: the first pair turns as without it, the last 40 times slower."""
    config = catalog.config(R1)
    plain = inverse_frequencies(64, config.rope_theta, None)
    yarn = inverse_frequencies(64, config.rope_theta, config.rope_scaling)
    assert yarn[0] == plain[0]
    assert yarn[-1] == pytest.approx(plain[-1] / 40, rel=1e-6)

"""The V3/R1 family (arXiv 2412.19437, 2501.12948): one constant and one card per released model.

What makes a V3 model, against V2 in `v2.py`:

* the router takes a sigmoid per expert; a bias that balances the load without a loss
  (`e_score_correction_bias`, V3 report 2.1.2) is added for *choosing* only, and the weights are the
  unbiased scores, normalised over the chosen experts and multiplied by `routed_scaling_factor`;
* groups of experts are scored by the sum of their two best biased scores;
* one multi-token-prediction layer (`num_nextn_predict_layers`, V3 report 2.2) follows the main
  model; on disk it is layer `num_hidden_layers`;
* the published weights are block FP8 with one float32 scale per 128 x 128 block.

Moonlight (arXiv 2502.16982) and Kimi K2 (arXiv 2507.20534) are the same architecture with other
numbers: no MTP layer, one group, another rope base; Moonlight is bfloat16 with norm eps 1e-5.
"""

from dataclasses import replace

from deepzoo.zoo.card import Card, Certainty, inert
from deepzoo.zoo.config import Config, Quantization
from deepzoo.zoo.rope_scaling import RopeScaling

_YARN = RopeScaling(
    rope_type="yarn",
    type_key="type",
    factor=40,
    original_max_position_embeddings=4096,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)
_ARCHITECTURE = inert(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    hidden_act="silu",
    moe_layer_freq=1,
    use_cache=True,
)
_INERT = inert(_ARCHITECTURE, ep_size=1)
_MOONSHOT = inert(_ARCHITECTURE, aux_loss_alpha=0.001, pretraining_tp=1, seq_aux=True)

V3_BASE = Config(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    rope_scaling=_YARN,
    bos_token_id=0,
    eos_token_id=1,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    quantization_config=Quantization(),
    inert=inert(_INERT, transformers_version="4.33.1"),
)
V3 = V3_BASE

R1 = replace(V3, inert=inert(_INERT, transformers_version="4.46.3"))
R1_ZERO = R1
R1_0528 = R1
V3_0324 = R1
PROVER_V2_671B = R1

V3_1_BASE = replace(
    V3,
    quantization_config=Quantization(scale_fmt="ue8m0"),
    inert=inert(_INERT, transformers_version="4.44.2"),
)
V3_1 = V3_1_BASE
V3_1_TERMINUS = V3_1_BASE

KIMI_K2_BASE = replace(
    V3,
    model_type="kimi_k2",
    vocab_size=163840,
    num_attention_heads=64,
    num_key_value_heads=64,
    max_position_embeddings=131072,
    rope_theta=50000.0,
    rope_scaling=replace(_YARN, factor=32.0, beta_fast=1.0, beta_slow=1.0),
    bos_token_id=163584,
    eos_token_id=163585,
    n_routed_experts=384,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    inert=inert(_MOONSHOT, transformers_version="4.48.3"),
)
KIMI_K2_INSTRUCT = KIMI_K2_BASE

MOONLIGHT_16B_A3B = replace(
    V3,
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=50000.0,
    rope_scaling=None,
    bos_token_id=163584,
    eos_token_id=163585,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    num_nextn_predict_layers=0,
    quantization_config=None,
    inert=inert(_MOONSHOT, ep_size=1, transformers_version="4.46.3"),
)
MOONLIGHT_16B_A3B_INSTRUCT = replace(MOONLIGHT_16B_A3B, eos_token_id=163586)

_NO_GENERATION_CONFIG = "sampling defaults: generation_config.json was not seen"
_TEXT_KEYS = "bookkeeping keys of config.json (transformers_version); nothing numeric can differ"

_V3 = Card(
    name="deepseek-v3",
    repo="deepseek-ai/DeepSeek-V3",
    summary="V3-Base after supervised fine-tuning, reinforcement learning and distillation from R1",
    parameters="671B",
    active="37B",
    context=131072,
    licence="DeepSeek Model License (code: MIT)",
    temperature=0.6,
    top_p=0.95,
    chat_format="v3",
    certainty=Certainty(config="A", chat="A"),
    open=(_NO_GENERATION_CONFIG,),
    sources=("arXiv 2412.19437", "README of deepseek-ai/DeepSeek-V3"),
)
_V3_BASE = replace(
    _V3,
    name="deepseek-v3-base",
    repo="deepseek-ai/DeepSeek-V3-Base",
    summary="base model; pretrained on 14.8T tokens in FP8",
    chat_format="plain",
    certainty=Certainty(config="B", chat="A"),
)
_V3_0324 = replace(
    _V3,
    name="deepseek-v3-0324",
    repo="deepseek-ai/DeepSeek-V3-0324",
    summary="the March 2025 update of V3",
    licence="MIT",
    temperature=0.3,
    chat_format="v3_0324",
    certainty=Certainty(config="C", size="B", licence="B", chat="B"),
    open=(
        _TEXT_KEYS,
        "sampling defaults: 0.3 is the temperature its card names for the web service;"
        " generation_config.json was not seen",
    ),
    sources=("model card of DeepSeek-V3-0324", "arXiv 2412.19437"),
)
_R1 = replace(
    _V3,
    name="deepseek-r1",
    repo="deepseek-ai/DeepSeek-R1",
    summary="V3-Base after cold-start data, two fine-tuning and two reinforcement learning stages",
    licence="MIT",
    chat_format="r1",
    forced_think=True,
    certainty=Certainty(config="A", sampling="B", chat="A"),
    open=("sampling defaults: from the README; generation_config.json was not seen",),
    sources=("arXiv 2501.12948", "README of deepseek-ai/DeepSeek-R1"),
)
_R1_ZERO = replace(
    _R1,
    name="deepseek-r1-zero",
    repo="deepseek-ai/DeepSeek-R1-Zero",
    summary="V3-Base after reinforcement learning alone, without supervised data",
    certainty=Certainty(config="C", sampling="B", chat="B"),
    open=(
        _TEXT_KEYS,
        "chat format: it ships R1's files; the prompt it was trained with (in the paper) differs",
        *_R1.open,
    ),
)
_R1_0528 = replace(
    _R1,
    name="deepseek-r1-0528",
    repo="deepseek-ai/DeepSeek-R1-0528",
    summary="the May 2025 update of R1, with system prompts and deeper thinking",
    chat_format="r1_0528",
    forced_think=False,
    certainty=Certainty(config="C", size="B", licence="B"),
    open=(
        _TEXT_KEYS,
        "chat format: taken from its Qwen3-8B student",
        _NO_GENERATION_CONFIG,
    ),
    sources=("model card of DeepSeek-R1-0528", "arXiv 2501.12948"),
)
_V3_1 = replace(
    _V3,
    name="deepseek-v3.1",
    repo="deepseek-ai/DeepSeek-V3.1",
    summary="V3.1-Base after post-training; thinks or answers directly, as the prompt says",
    licence="MIT",
    chat_format="v3_1",
    certainty=Certainty(config="B", size="B", licence="B", chat="B"),
    open=(
        "the text of quantization_config",
        "dtype of the norm weights: bfloat16 as in R1, or float32",
        _NO_GENERATION_CONFIG,
    ),
    sources=("model card of DeepSeek-V3.1", "arXiv 2412.19437"),
)
_V3_1_BASE = replace(
    _V3_1,
    name="deepseek-v3.1-base",
    repo="deepseek-ai/DeepSeek-V3.1-Base",
    summary="base model; V3-Base with a longer context extension (630B + 209B tokens)",
    chat_format="plain",
)
_TERMINUS = replace(
    _V3_1,
    name="deepseek-v3.1-terminus",
    repo="deepseek-ai/DeepSeek-V3.1-Terminus",
    summary="the September 2025 update of V3.1",
    chat_format="v3_1_terminus",
    certainty=Certainty(config="B", size="B", licence="B"),
    open=("chat format: taken from V3.2-Exp", *_V3_1.open),
)
_PROVER = replace(
    _V3,
    name="deepseek-prover-v2-671b",
    repo="deepseek-ai/DeepSeek-Prover-V2-671B",
    summary="V3-Base trained to prove theorems in Lean 4",
    context=163840,
    temperature=None,
    top_p=None,
    chat_format="v3_0324",
    certainty=Certainty(config="C", size="C", chat="B"),
    open=(_TEXT_KEYS, "context: not stated; max_position_embeddings given", _NO_GENERATION_CONFIG),
    sources=("README of deepseek-ai/DeepSeek-Prover-V2",),
)
_MOONLIGHT = Card(
    name="moonlight-16b-a3b",
    repo="moonshotai/Moonlight-16B-A3B",
    summary="base model; pretrained on 5.7T tokens with the Muon optimizer",
    parameters="16B",
    active="3B",
    context=8192,
    licence="MIT",
    chat_format="plain",
    certainty=Certainty(config="C", licence="B"),
    open=("eos_token_id: the Instruct model has 163586", _NO_GENERATION_CONFIG),
    sources=("arXiv 2502.16982", "model card of Moonlight-16B-A3B"),
)
_MOONLIGHT_CHAT = replace(
    _MOONLIGHT,
    name="moonlight-16b-a3b-instruct",
    repo="moonshotai/Moonlight-16B-A3B-Instruct",
    summary="Moonlight after instruction tuning",
    chat_format="moonlight",
    certainty=Certainty(config="A", licence="B", chat="B"),
    open=(_NO_GENERATION_CONFIG,),
)
_KIMI = Card(
    name="kimi-k2-base",
    repo="moonshotai/Kimi-K2-Base",
    summary="base model; pretrained on 15.5T tokens with MuonClip",
    parameters="1T",
    active="32B",
    context=131072,
    licence="Modified MIT",
    chat_format="plain",
    certainty=Certainty(config="C"),
    open=(
        "every value: taken from Kimi-K2-Instruct",
        "the FP8 tensor list is derived, not compared with a real listing",
        _NO_GENERATION_CONFIG,
    ),
    sources=("arXiv 2507.20534", "README of MoonshotAI/Kimi-K2"),
)
_KIMI_CHAT = replace(
    _KIMI,
    name="kimi-k2-instruct",
    repo="moonshotai/Kimi-K2-Instruct",
    summary="Kimi K2 after post-training for tool use; answers without long thinking",
    chat_format=None,
    temperature=0.6,
    certainty=Certainty(config="A", sampling="B"),
    open=(
        "chat format: not known here",
        "the FP8 tensor list is derived, not compared with a real listing",
        "sampling defaults: temperature from the README; generation_config.json was not seen",
    ),
)

MODELS: tuple[tuple[Config, Card], ...] = (
    (V3_BASE, _V3_BASE),
    (V3, _V3),
    (V3_0324, _V3_0324),
    (R1_ZERO, _R1_ZERO),
    (R1, _R1),
    (R1_0528, _R1_0528),
    (V3_1_BASE, _V3_1_BASE),
    (V3_1, _V3_1),
    (V3_1_TERMINUS, _TERMINUS),
    (PROVER_V2_671B, _PROVER),
    (MOONLIGHT_16B_A3B, _MOONLIGHT),
    (MOONLIGHT_16B_A3B_INSTRUCT, _MOONLIGHT_CHAT),
    (KIMI_K2_BASE, _KIMI),
    (KIMI_K2_INSTRUCT, _KIMI_CHAT),
)
"""Every released model of the family with its card."""

"""The V2 family (DeepSeek-V2, arXiv 2405.04434): one constant and one card per released model.

What makes a V2 model, against V3/R1 in `r1.py`:

* the router takes a softmax over all experts, has no bias, and its weights are *not* normalised but
  multiplied by `routed_scaling_factor` (1 in Lite, 16 in the 236B models);
* Lite picks the best experts outright (`greedy`) and projects queries directly (`q_lora_rank`
  null); the 236B models first pick 3 of 8 groups by each group's best expert
  (`group_limited_greedy`) and compress queries to 1536;
* layer 0 is dense, there is no MTP layer, and the weights are bfloat16.

Inside the family `mscale` differs: 0.707 in V2-Lite, V2 and V2-Chat, 1.0 in Coder-V2 and V2.5,
which is a factor of 1.179 on every attention logit.
"""

from dataclasses import replace

from deepzoo.zoo.card import Card, Certainty, inert
from deepzoo.zoo.config import Config
from deepzoo.zoo.rope_scaling import RopeScaling

_YARN = RopeScaling(
    rope_type="yarn",
    type_key="type",
    factor=40,
    original_max_position_embeddings=4096,
    beta_fast=32,
    beta_slow=1,
    mscale=0.707,
    mscale_all_dim=0.707,
)
_INERT = inert(
    architectures=["DeepseekV2ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    aux_loss_alpha=0.001,
    hidden_act="silu",
    moe_layer_freq=1,
    pretraining_tp=1,
    seq_aux=True,
    transformers_version="4.33.1",
    use_cache=True,
)

V2_LITE = Config(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    rope_scaling=_YARN,
    bos_token_id=100000,
    eos_token_id=100001,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    inert=_INERT,
)
V2_LITE_CHAT = V2_LITE
CODER_V2_LITE_BASE = replace(V2_LITE, inert=inert(_INERT, transformers_version="4.39.3"))
CODER_V2_LITE_INSTRUCT = CODER_V2_LITE_BASE

V2 = replace(
    V2_LITE,
    hidden_size=5120,
    intermediate_size=12288,
    num_hidden_layers=60,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    n_routed_experts=160,
    moe_intermediate_size=1536,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
    inert=inert(_INERT, ep_size=1, transformers_version="4.39.3"),
)
V2_CHAT = V2
V2_CHAT_0628 = V2

CODER_V2_BASE = replace(V2, rope_scaling=replace(_YARN, mscale=1.0, mscale_all_dim=1.0))
CODER_V2_INSTRUCT = CODER_V2_BASE
CODER_V2_INSTRUCT_0724 = CODER_V2_BASE
V2_5 = CODER_V2_BASE
V2_5_1210 = CODER_V2_BASE

_SAMPLING = "sampling defaults: generation_config.json was not seen; the README's example uses 0.3"
_BY_DESCENT = (
    "mscale and mscale_all_dim: 1.0 by descent only; compare with the file before trusting logits"
)

_LITE = Card(
    name="deepseek-v2-lite",
    repo="deepseek-ai/DeepSeek-V2-Lite",
    summary="base model; the small V2, pretrained on 5.7T tokens",
    parameters="15.7B",
    active="2.4B",
    context=32768,
    licence="DeepSeek Model License (code: MIT)",
    temperature=0.3,
    top_p=0.95,
    chat_format="plain",
    certainty=Certainty(config="A", chat="A"),
    open=(_SAMPLING,),
    sources=("arXiv 2405.04434", "README of deepseek-ai/DeepSeek-V2"),
)
_LITE_CHAT = replace(
    _LITE,
    name="deepseek-v2-lite-chat",
    repo="deepseek-ai/DeepSeek-V2-Lite-Chat",
    summary="V2-Lite after supervised fine-tuning",
    chat_format="v2_chat",
)
_CODER_LITE = replace(
    _LITE,
    name="deepseek-coder-v2-lite-base",
    repo="deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
    summary="base model; V2-Lite further trained on code and mathematics",
    context=131072,
    certainty=Certainty(config="B", chat="A"),
    sources=("arXiv 2406.11931", "README of deepseek-ai/DeepSeek-Coder-V2"),
)
_CODER_LITE_CHAT = replace(
    _CODER_LITE,
    name="deepseek-coder-v2-lite-instruct",
    repo="deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
    summary="Coder-V2-Lite after instruction tuning",
    chat_format="v2_chat",
)
_V2 = replace(
    _LITE,
    name="deepseek-v2",
    repo="deepseek-ai/DeepSeek-V2",
    summary="base model; pretrained on 8.1T tokens",
    parameters="236B",
    active="21B",
    context=131072,
)
_V2_CHAT = replace(
    _V2,
    name="deepseek-v2-chat",
    repo="deepseek-ai/DeepSeek-V2-Chat",
    summary="V2 after supervised fine-tuning and reinforcement learning",
    chat_format="v2_chat",
)
_V2_CHAT_0628 = replace(
    _V2_CHAT,
    name="deepseek-v2-chat-0628",
    repo="deepseek-ai/DeepSeek-V2-Chat-0628",
    summary="the June 2024 update of V2-Chat, with role tokens",
    chat_format="v2_0628",
    certainty=Certainty(config="C", size="B", licence="B", chat="A"),
    open=(
        "mscale and mscale_all_dim: 0.707 assumed, 1.0 possible; compare with the file before"
        " trusting logits",
        _SAMPLING,
    ),
    sources=("model card of DeepSeek-V2-Chat-0628", "arXiv 2405.04434"),
)
_CODER = replace(
    _V2,
    name="deepseek-coder-v2-base",
    repo="deepseek-ai/DeepSeek-Coder-V2-Base",
    summary="base model; an intermediate V2 checkpoint further trained on 6T tokens of code and"
    " mathematics",
    certainty=Certainty(config="C", chat="A"),
    open=(_BY_DESCENT, _SAMPLING),
    sources=_CODER_LITE.sources,
)
_CODER_CHAT = replace(
    _CODER,
    name="deepseek-coder-v2-instruct",
    repo="deepseek-ai/DeepSeek-Coder-V2-Instruct",
    summary="Coder-V2 after instruction tuning and reinforcement learning",
    chat_format="v2_chat",
    certainty=Certainty(config="B", chat="A"),
    open=(_SAMPLING,),
)
_CODER_CHAT_0724 = replace(
    _CODER_CHAT,
    name="deepseek-coder-v2-instruct-0724",
    repo="deepseek-ai/DeepSeek-Coder-V2-Instruct-0724",
    summary="the July 2024 update of Coder-V2-Instruct",
    certainty=Certainty(config="C", size="B", licence="B"),
    open=(_BY_DESCENT, "chat format: taken from Coder-V2-Instruct; not seen", _SAMPLING),
)
_V2_5 = replace(
    _V2_CHAT,
    name="deepseek-v2.5",
    repo="deepseek-ai/DeepSeek-V2.5",
    summary="combines V2-Chat and Coder-V2-Instruct in one model",
    chat_format="v2_5",
    certainty=Certainty(config="A", size="B", licence="B", chat="B"),
    sources=("model card of DeepSeek-V2.5", "arXiv 2405.04434"),
)
_V2_5_1210 = replace(
    _V2_5,
    name="deepseek-v2.5-1210",
    repo="deepseek-ai/DeepSeek-V2.5-1210",
    summary="the December 2024 update of V2.5",
    certainty=Certainty(config="C", size="B", licence="B", chat="B"),
    open=(_BY_DESCENT, _SAMPLING),
    sources=("model card of DeepSeek-V2.5-1210", "arXiv 2405.04434"),
)

MODELS: tuple[tuple[Config, Card], ...] = (
    (V2_LITE, _LITE),
    (V2_LITE_CHAT, _LITE_CHAT),
    (V2, _V2),
    (V2_CHAT, _V2_CHAT),
    (V2_CHAT_0628, _V2_CHAT_0628),
    (V2_5, _V2_5),
    (V2_5_1210, _V2_5_1210),
    (CODER_V2_LITE_BASE, _CODER_LITE),
    (CODER_V2_LITE_INSTRUCT, _CODER_LITE_CHAT),
    (CODER_V2_BASE, _CODER),
    (CODER_V2_INSTRUCT, _CODER_CHAT),
    (CODER_V2_INSTRUCT_0724, _CODER_CHAT_0724),
)
"""Every released model of the family with its card."""

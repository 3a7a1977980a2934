"""The dense students that R1 taught (R1 report, arXiv 2501.12948, 2.4): constants and cards.

Ordinary decoders with grouped-query attention and half-split rope. What differs between their
three architectures:

* Qwen2 (the four Distill-Qwen): biases on q, k and v although no key of config.json says so;
* Qwen3 (0528-Qwen3-8B): no biases, an RMSNorm on every query and key head, YaRN with `attn_factor`;
* Llama (the two Distill-Llama): no biases, Llama 3.1's own rope rule.

None ties its head to the embedding, not even the 1.5B model whose Qwen base does.
"""

from dataclasses import replace

from deepzoo.zoo.card import Card, Certainty, inert
from deepzoo.zoo.config import Config
from deepzoo.zoo.rope_scaling import RopeScaling

_QWEN2 = inert(
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    hidden_act="silu",
    use_cache=True,
    use_sliding_window=False,
)
_MATH = inert(_QWEN2, sliding_window=4096, transformers_version="4.44.0", use_mrope=False)
_GENERAL = inert(_QWEN2, sliding_window=131072, transformers_version="4.43.1")

R1_DISTILL_QWEN_1_5B = Config(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    tie_word_embeddings=False,
    bos_token_id=151643,
    eos_token_id=151643,
    inert=inert(_MATH, max_window_layers=21),
)
R1_DISTILL_QWEN_7B = replace(
    R1_DISTILL_QWEN_1_5B,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    inert=inert(_MATH, max_window_layers=28),
)
R1_DISTILL_QWEN_14B = replace(
    R1_DISTILL_QWEN_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    inert=inert(_GENERAL, max_window_layers=48),
)
R1_DISTILL_QWEN_32B = replace(
    R1_DISTILL_QWEN_14B,
    intermediate_size=27648,
    num_hidden_layers=64,
    inert=inert(_GENERAL, max_window_layers=64),
)

_LLAMA = inert(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    hidden_act="silu",
    mlp_bias=False,
    pretraining_tp=1,
    transformers_version="4.43.0.dev0",
    use_cache=True,
)
R1_DISTILL_LLAMA_8B = Config(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    bos_token_id=128000,
    eos_token_id=128001,
    inert=_LLAMA,
)
R1_DISTILL_LLAMA_70B = replace(
    R1_DISTILL_LLAMA_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    head_dim=128,
    eos_token_id=(128001, 128008, 128009),
    inert=inert(_LLAMA, transformers_version="4.47.0.dev0"),
)

R1_0528_QWEN3_8B = Config(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    rope_scaling=RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=32768,
        attn_factor=0.8782488562869419,  # 1 / (0.1 ln 4 + 1): the factor on cos and sin becomes 1
    ),
    bos_token_id=151643,
    eos_token_id=151645,
    inert=inert(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        max_window_layers=36,
        sliding_window=None,
        transformers_version="4.51.0",
        use_cache=True,
        use_sliding_window=False,
    ),
)

_CONTEXT = (
    "context: max_position_embeddings; the publisher states only the 32,768 tokens it generated"
)
_WINDOW = "the sliding-window keys of config.json, which are switched off"
_FROM_README = "sampling defaults: from R1's README; generation_config.json was not seen"

_QWEN_1_5B = Card(
    name="deepseek-r1-distill-qwen-1.5b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    summary="Qwen2.5-Math-1.5B fine-tuned on 800k samples from R1",
    parameters="1.5B",
    context=131072,
    licence="MIT (derived from Qwen2.5, Apache-2.0)",
    temperature=0.6,
    top_p=0.95,
    chat_format="r1",
    forced_think=True,
    certainty=Certainty(config="A", size="B", sampling="A", chat="A"),
    open=(_CONTEXT,),
    sources=("arXiv 2501.12948", "README of deepseek-ai/DeepSeek-R1"),
)
_QWEN_7B = replace(
    _QWEN_1_5B,
    name="deepseek-r1-distill-qwen-7b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    summary="Qwen2.5-Math-7B fine-tuned on 800k samples from R1",
    parameters="7.6B",
    certainty=Certainty(config="B", size="B", sampling="B", chat="A"),
    open=(_CONTEXT, _WINDOW, _FROM_README),
)
_QWEN_14B = replace(
    _QWEN_7B,
    name="deepseek-r1-distill-qwen-14b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    summary="Qwen2.5-14B fine-tuned on 800k samples from R1",
    parameters="14.8B",
)
_QWEN_32B = replace(
    _QWEN_7B,
    name="deepseek-r1-distill-qwen-32b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    summary="Qwen2.5-32B fine-tuned on 800k samples from R1",
    parameters="32.8B",
)
_LLAMA_8B = replace(
    _QWEN_7B,
    name="deepseek-r1-distill-llama-8b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    summary="Llama-3.1-8B fine-tuned on 800k samples from R1",
    parameters="8.03B",
    licence="MIT (derived from Llama 3.1, Llama 3.1 Community License)",
    open=(_CONTEXT, "ids of the added tokens", _FROM_README),
)
_LLAMA_70B = replace(
    _LLAMA_8B,
    name="deepseek-r1-distill-llama-70b",
    repo="deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    summary="Llama-3.3-70B-Instruct fine-tuned on 800k samples from R1",
    parameters="70.6B",
    licence="MIT (derived from Llama 3.3, Llama 3.3 Community License)",
)
_QWEN3_8B = replace(
    _QWEN_7B,
    name="deepseek-r1-0528-qwen3-8b",
    repo="deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    summary="Qwen3-8B-Base post-trained on R1-0528's chains of thought",
    parameters="8.19B",
    licence="MIT (derived from Qwen3, Apache-2.0)",
    chat_format="r1_0528",
    forced_think=False,
    certainty=Certainty(config="A", size="B", licence="B", chat="B"),
    open=(
        "context: max_position_embeddings, which is 4 x 32,768",
        "ids of the role and think tokens",
        _FROM_README,
    ),
    sources=("model card of DeepSeek-R1-0528-Qwen3-8B", "arXiv 2501.12948"),
)

MODELS: tuple[tuple[Config, Card], ...] = (
    (R1_DISTILL_QWEN_1_5B, _QWEN_1_5B),
    (R1_DISTILL_QWEN_7B, _QWEN_7B),
    (R1_DISTILL_QWEN_14B, _QWEN_14B),
    (R1_DISTILL_QWEN_32B, _QWEN_32B),
    (R1_DISTILL_LLAMA_8B, _LLAMA_8B),
    (R1_DISTILL_LLAMA_70B, _LLAMA_70B),
    (R1_0528_QWEN3_8B, _QWEN3_8B),
)
"""Every released student with its card."""

"""What bites whoever writes or converts a given model: short sentences derived from its config.

Every sentence says what is true of this model, and what a program that gets it wrong does instead.
`tests/golden` measures most of them: the same mistakes made on purpose must fail there.
"""

import math

from deepzoo.zoo.card import Card
from deepzoo.zoo.config import Config

_LATENT_NORM_EPS = 1e-6


def traps(config: Config, card: Card | None = None) -> list[str]:
    """The traps of one model; a card adds those of its context and chat format."""
    found = (_latent(config) + _router(config)) if config.is_mla else _student(config)
    found += _files(config)
    return found + (_chat(config, card) if card else [])


def _latent(c: Config) -> list[str]:
    pairs = c.qk_rope_head_dim
    found = [
        f"rope is interleaved (pairs x0,x1) in the {pairs} rope dimensions of q and k; no key of"
        " config.json says so, and rotating halves is wrong unless the rows are permuted first"
    ]
    if c.rope_scaling is not None and c.rope_scaling.mscale_all_dim:
        m2 = c.rope_scaling.softmax_mscale() ** 2
        found.append(
            f"YaRN multiplies the softmax scale by {m2:.4f} (to {c.softmax_scale:.6f}) and leaves"
            f" cos and sin at {c.rope_scaling.cos_sin_factor():g}; some programs forget the former"
        )
        if c.model_type == "deepseek_v2" and c.n_routed_experts == 160:  # the 236B models
            here = c.rope_scaling.mscale_all_dim
            other = 1.0 if here != 1.0 else 0.707
            found.append(
                f"mscale is {here:g} here and {other:g} in siblings of the same shape: +17.9 % on"
                " every attention logit between them, so read the file, never the family"
            )
    if c.rms_norm_eps != _LATENT_NORM_EPS:
        found.append(
            f"the norms of the compressed q and kv use eps {_LATENT_NORM_EPS:g} always, not"
            f" rms_norm_eps {c.rms_norm_eps:g}"
        )
    found.append(
        f"num_key_value_heads {c.num_key_value_heads} is not a cache size: the cache holds"
        f" {c.kv_lora_rank} + {c.qk_rope_head_dim} numbers per token and layer"
    )
    if c.q_lora_rank is None:
        found.append("q_lora_rank is null: one q_proj, no q_a/q_b pair and no norm between")
    return found


def _router(c: Config) -> list[str]:
    found = []
    if c.grouped:
        score = {
            "max": "its best expert (softmax score)",
            "top2": "the sum of its two best biased scores",
        }[c.group_score]
        other = {"max": "V3 sums the best two", "top2": "V2 takes the best one"}[c.group_score]
        found.append(
            f"routing is limited to {c.topk_group} of {c.n_group} groups, a group scored by"
            f" {score}; {other}"
        )
    elif c.router_bias:
        found.append("topk_method is noaux_tc but n_group is 1: no group limit at all")
    if c.router_bias:
        found.append(
            "e_score_correction_bias (float32) chooses experts only; the weights are the unbiased"
            f" sigmoids, normalised, times {c.routed_scaling_factor:g}"
        )
    elif not c.norm_topk_prob:
        found.append(
            f"expert weights are softmax scores times {c.routed_scaling_factor:g}, not normalised"
            " over the chosen experts"
        )
    found.append("router logits are computed in float32")
    if c.n_shared_experts > 1:
        width = c.n_shared_experts * c.moe_intermediate_size
        found.append(f"the {c.n_shared_experts} shared experts are one MLP of width {width}")
    return found


def _student(c: Config) -> list[str]:
    found = ["rope rotates halves here, unlike the interleaved rope of the teacher"]
    if c.qkv_bias:
        found.append("q, k and v have biases although no key of config.json says so; o has none")
    if c.qk_norm:
        found.append("an RMSNorm runs over every query and key head before rope")
    tied_base = c.model_type == "qwen2" and c.hidden_size <= 2048  # Qwen2.5 ties below 7B
    if tied_base and not c.tie_word_embeddings:
        found.append("the head is not tied to the embedding, although it is in the Qwen base model")
    if c.model_type == "qwen2" and c.rms_norm_eps != 1e-6:
        found.append(f"rms_norm_eps is {c.rms_norm_eps:g}; the smaller Qwen students have 1e-06")
    if c.rope_scaling is not None and c.rope_scaling.attn_factor is not None:
        yarn = 0.1 * math.log(c.rope_scaling.factor) + 1.0
        found.append(
            f"attn_factor {c.rope_scaling.attn_factor:.5f} cancels YaRN's own {yarn:.5f}: cos and"
            f" sin stay at {c.rope_scaling.cos_sin_factor():.5f}; programs that do not know the key"
            f" scale them by {yarn:.5f}"
        )
    if c.rope_scaling is not None and c.rope_scaling.rope_type == "llama3":
        found.append(
            "rope_scaling is Llama 3.1's own rule, not YaRN: no factor on cos, sin or scale"
        )
    return found


def _files(c: Config) -> list[str]:
    found = []
    if c.quantization_config is not None:
        found.append(
            "FP8 weights are dequantised by multiplying with weight_scale_inv, whatever its name"
            " says; edge blocks are partial"
        )
        if c.quantization_config.scale_fmt == "ue8m0":
            found.append("scale_fmt ue8m0: the scales are powers of two, still stored as float32")
    if c.num_nextn_predict_layers:
        found.append(
            f"layer {c.num_hidden_layers} of the files is the MTP layer; its embedding and head are"
            " copies of the main ones"
        )
    if len(c.eos_ids) > 1:
        ids = ", ".join(map(str, c.eos_ids))
        found.append(f"a sequence ends at any of {len(c.eos_ids)} ids ({ids}), not only the first")
    return found


def _chat(c: Config, card: Card) -> list[str]:
    found = []
    if c.max_position_embeddings != card.context:
        found.append(
            f"max_position_embeddings {c.max_position_embeddings:,} is not the claimed context,"
            f" {card.context:,} tokens"
        )
    if c.model_type == "qwen2":
        found.append(
            f"bos_token_id {c.bos_token_id} of config.json is Qwen's leftover; the tokenizer's bos"
            " is 151646"
        )
    if card.forced_think:
        found.append(
            "the generation prompt ends in <think> and a line break, so a completion starts inside"
            " the thought and holds only </think>"
        )
    if card.chat_format in ("v3_1", "v3_1_terminus"):
        found.append(
            "the prompt chooses the mode: <think> to think, </think> to answer directly, without a"
            " line break after either"
        )
    if card.chat_format == "v2_chat":
        found.append("no space after the final `Assistant:`; one breaks the 16B models")
    if card.chat_format not in (None, "plain", "moonlight"):
        found.append("the chat format writes bos itself; a tokenizer that adds one doubles it")
    return found

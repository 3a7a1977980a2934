"""The golden cases: one published-form `config.json` per case, and how its weights are made.

Dimensions differ from one another where the architecture lets them (q/k head width != v head width,
latent ranks != hidden size), so that a transposed or swapped tensor cannot have the right shape.
"""

MLA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 8,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 12,
    "vocab_size": 128,
}
V2 = MLA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "seq_aux": True,
    "transformers_version": "4.39.3",
}
V3 = MLA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "model_type": "deepseek_v3",
    "n_group": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 24,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "transformers_version": "4.46.3",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
DENSE = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 128,
}
QWEN2 = DENSE | {
    "architectures": ["Qwen2ForCausalLM"],
    "max_window_layers": 3,
    "model_type": "qwen2",
    "rope_theta": 10000,
    "sliding_window": 4096,
    "transformers_version": "4.44.0",
    "use_mrope": False,
    "use_sliding_window": False,
}


def yarn(factor, mscale, beta_fast=32, beta_slow=1, original=32):
    """The published `rope_scaling` of the MLA models, with a context that the tests run past."""
    return {
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": original,
        "type": "yarn",
    }


CONFIGS = {
    "v2_lite_like": V2
    | {
        "max_position_embeddings": 1280,
        "n_group": 1,
        "n_routed_experts": 8,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "rope_scaling": yarn(40, 0.707),
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "v2_like": V2
    | {
        "ep_size": 1,
        "max_position_embeddings": 128,
        "n_group": 4,
        "q_lora_rank": 24,
        "rope_scaling": yarn(4, 1.0, beta_fast=4, beta_slow=0.25),
        "routed_scaling_factor": 16.0,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "v3_like": V3
    | {
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "max_position_embeddings": 1280,
        "rope_scaling": yarn(40, 1.0),
    },
    "v3_noq": V3
    | {
        "aux_loss_alpha": 0.001,
        "max_position_embeddings": 256,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "seq_aux": True,
        "topk_group": 1,
    },
    "v3_fp8": V3
    | {
        "hidden_size": 144,
        "intermediate_size": 136,
        "kv_lora_rank": 136,
        "max_position_embeddings": 1024,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "qk_nope_head_dim": 24,
        "quantization_config": FP8,
        "rope_scaling": yarn(32, 1.0, beta_fast=1, beta_slow=1),
        "rope_theta": 50000,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "v_head_dim": 20,
        "vocab_size": 64,
    },
    "v3_fp8_ue8m0": V3
    | {
        "hidden_size": 136,
        "intermediate_size": 48,
        "max_position_embeddings": 1280,
        "moe_intermediate_size": 8,
        "n_group": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "quantization_config": FP8 | {"scale_fmt": "ue8m0"},
        "rope_scaling": yarn(40, 1.0),
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "vocab_size": 64,
    },
    "v3_bf16": V3
    | {
        "hidden_size": 40,
        "max_position_embeddings": 1280,
        "num_hidden_layers": 2,
        "rope_scaling": yarn(40, 1.0),
        "torch_dtype": "bfloat16",
        "vocab_size": 64,
    },
    "qwen2_tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen2_untied": QWEN2
    | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "tie_word_embeddings": False},
    "llama31_like": DENSE
    | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": [1, 2],
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.43.0.dev0",
    },
    "qwen3_yarn": DENSE
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 24,
        "max_position_embeddings": 128,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "rope_scaling": {
            "attn_factor": 0.8782488562869419,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "yarn",
        },
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    },
}

# How weights are drawn: mean and deviation of the router bias, gain of the routed experts' output.
BIAS = {"v3_like": (0.0, 0.12), "v3_noq": (0.0, 0.12), "v3_bf16": (0.0, 0.12)}
# Mean below zero: chosen biased scores are negative, so masked groups filled with 0 would show.
BIAS |= {"v3_fp8": (-0.7, 0.12), "v3_fp8_ue8m0": (-0.7, 0.12)}
EXPERT_GAIN = {"v2_like": 1 / 8}
# Small embeddings, and latents before their norm, where the eps of a norm is 1e-5: so it shows.
EMBED_GAIN = {"v3_noq": 0.02, "qwen2_untied": 0.02, "llama31_like": 0.02}
LATENT_GAIN = {"v3_noq": (32, 0.02)}
SHARD_SIZE = {"v3_like": "250KB"}

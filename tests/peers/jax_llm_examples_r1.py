"""jax-llm-examples' DeepSeek R1: `python jax_llm_examples_r1.py MODEL CLONE`.

CLONE is a checkout of jax-ml/jax-llm-examples. Its model file is used as it is; only the weights
are handed over here, for its own converter needs torch and takes R1's RoPE scaling for granted.
Everything is in its dtype, bfloat16, without its int8, which would be other weights.
"""

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import wire


def main() -> None:
    channel = wire.Channel()
    import jax
    import numpy as np
    from jax import numpy as jnp

    directory, clone = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(clone / "deepseek_r1_jax"))
    from deepseek_r1_jax import model as peer

    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("x", "y", "z"), kinds)
    whole = config(peer, json.loads((directory / "config.json").read_text()), mesh)
    of = functools.cache(lambda capacity: dataclasses.replace(whole, max_seq_len=capacity))
    weights = handed(peer, whole, directory)
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    channel.say(**{"jax-llm-examples": commit, "its jax": importlib.metadata.version("jax")})
    for request in channel.requests():
        ids = np.asarray(request["ids"], np.int32)
        assert not (ids == peer.PAD_ID).any() and ids.shape[1].bit_count() == 1
        cfg = of(request["capacity"])
        cache = peer.KVCache.init(jax.random.key(0), cfg, len(ids), cfg.max_seq_len)
        jax.block_until_ready((weights, cache))
        start = wire.clock()
        best, logits, cache = peer.prefill(ids, weights, cache, cfg)
        token = best[:, -1:]
        tokens = np.asarray(token)[0].tolist()
        if request["operation"] == "decode":
            jax.block_until_ready(cache)
            made, start = [], wire.clock()
            for _ in range(request["tokens"]):
                token, cache = peer.decode_step(token, weights, cache, cfg)
                made.append(token)
            tokens = np.asarray(jnp.concatenate(made, axis=-1))[0].tolist()
        seconds = wire.clock() - start
        last = np.asarray(logits[0, -1], np.float32).tolist() if request.get("logits") else None
        channel.say(seconds=seconds, tokens=tokens, logits=last)


def config(peer, hf, mesh):
    """Its Config of a config.json, not quantised, without its kernels for TPUs."""
    scaling = hf["rope_scaling"]
    return peer.Config(
        embed=hf["hidden_size"], q_lora_rank=hf["q_lora_rank"], kv_lora_rank=hf["kv_lora_rank"],
        num_heads=hf["num_attention_heads"], qk_nope_head_dim=hf["qk_nope_head_dim"],
        qk_rope_head_dim=hf["qk_rope_head_dim"], v_head_dim=hf["v_head_dim"],
        vocab_size=hf["vocab_size"], num_layers=hf["num_hidden_layers"], mesh=mesh,
        use_decode_ragged_dot_kernel=False, rope_theta=hf["rope_theta"],
        rope_scaling_factor=scaling["factor"], rope_beta_fast=scaling["beta_fast"],
        rope_beta_slow=scaling["beta_slow"], rope_mscale=scaling["mscale"],
        rope_mscale_all_dim=scaling["mscale_all_dim"],
        rope_original_max_position_embeddings=scaling["original_max_position_embeddings"],
        quantize_moe=False, quantize_mlp=False, quantize_attn=False, quantize_cache=False,
        ffw_size=hf["intermediate_size"], first_k_dense=hf["first_k_dense_replace"],
        moe_ffw_size=hf["moe_intermediate_size"], n_routed_experts=hf["n_routed_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"], n_group=hf["n_group"],
        topk_group=hf["topk_group"], routed_scaling_factor=hf["routed_scaling_factor"],
        n_shared_experts=hf["n_shared_experts"],
    )  # fmt: skip


def handed(peer, cfg, directory):
    """Its Weights, from the published names; each has the shape and dtype that it declares."""
    import jax
    import numpy as np
    from jax import numpy as jnp
    from safetensors.flax import load_file

    read = {}
    for path in sorted(directory.glob("*.safetensors")):
        read |= load_file(path)
    read = {name: np.asarray(value) for name, value in read.items()}
    declared = peer.Weights.abstract(cfg)

    def fill(like, values):
        for name, value in values.items():
            field = getattr(like, name)
            assert field.shape == value.shape, (name, field.shape, value.shape)
            values[name] = jnp.asarray(value, field.dtype)
        return dataclasses.replace(like, **values)

    def layer(at, like):
        def get(name):
            value = read[f"model.layers.{at}.{name}.weight"]
            return value.T if value.ndim == 2 else value

        heads = cfg.num_heads
        kv = get("self_attn.kv_a_proj_with_mqa")
        up = get("self_attn.kv_b_proj").reshape(cfg.kv_lora_rank, heads, -1)
        attention = {
            "q_a": get("self_attn.q_a_proj"), "q_gamma": get("self_attn.q_a_layernorm"),
            "q_b": get("self_attn.q_b_proj").reshape(cfg.q_lora_rank, heads, -1),
            "kv_a": kv[:, : cfg.kv_lora_rank], "k_pe": kv[:, cfg.kv_lora_rank :],
            "kv_gamma": get("self_attn.kv_a_layernorm"),
            "k_b": up[..., : cfg.qk_nope_head_dim], "v_b": up[..., cfg.qk_nope_head_dim :],
            "o": get("self_attn.o_proj").reshape(heads, cfg.v_head_dim, cfg.embed),
        }  # fmt: skip
        parts = ("gate", "up", "down")
        if at < cfg.first_k_dense:
            mlp = {f"w_{p}": get(f"mlp.{p}_proj") for p in parts}
        else:
            mlp = {f"ws_{p}": get(f"mlp.shared_experts.{p}_proj") for p in parts}
            experts = range(cfg.n_routed_experts)
            for p in parts:
                mlp[f"we_{p}"] = np.stack([get(f"mlp.experts.{e}.{p}_proj") for e in experts])
            mlp["w_router"] = get("mlp.gate")
            mlp["b_router"] = read[f"model.layers.{at}.mlp.gate.e_score_correction_bias"]
        return dataclasses.replace(
            fill(like, {
                "gamma_pre_attn": get("input_layernorm"),
                "gamma_post_attn": get("post_attention_layernorm"),
            }),
            attn=fill(like.attn, attention), mlp=fill(like.mlp, mlp),
        )  # fmt: skip

    top = {
        "embedding": read["model.embed_tokens.weight"], "gamma_final": read["model.norm.weight"],
        "lm_head": read["lm_head.weight"].T,
    }  # fmt: skip
    whole = fill(declared, top)
    layers = [layer(at, like) for at, like in enumerate(declared.layers)]
    whole = dataclasses.replace(whole, layers=layers)
    return jax.tree.map(jax.device_put, whole, peer.Weights.shardings(cfg))


if __name__ == "__main__":
    main()

"""Make the golden checkpoints and their expected numbers with transformers and torch.

    python3.11 -m venv oracle
    oracle/bin/pip install torch==2.13.0 transformers==5.23.0
    oracle/bin/python tests/golden/make.py [CASE ...]

Each case becomes tests/golden/<case>/ with a checkpoint that transformers wrote (config.json is the
file transformers 5 writes, config_published.json the form the released models use) and
expected.npz. The seed of each case is the first whose decisions are far from ties; everything is
deterministic: running this twice on one machine gives the same bytes.
"""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import oracle
import torch
from cases import BIAS, CONFIGS, EMBED_GAIN, EXPERT_GAIN, LATENT_GAIN, SHARD_SIZE
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

HERE = Path(__file__).resolve().parent
LENGTH, PROMPTS, NEW, TAIL = 48, (37, 21), 16, 8
ROUTER_MARGIN, GREEDY_MARGIN, CHANGED = 1e-4, 1e-3, 0.05
QUANTISED = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
QUANTISED += ("gate_proj", "up_proj", "down_proj")


def published_names(c):
    """Every tensor name of a published checkpoint of config `c`, whatever transformers wrote."""
    names = {"model.embed_tokens", "model.norm"} | (
        set() if c["tie_word_embeddings"] else {"lm_head"}
    )
    mlp = ("gate_proj", "up_proj", "down_proj")
    extra = set()
    nextn = c.get("num_nextn_predict_layers", 0)
    for i in range(c["num_hidden_layers"] + nextn):
        at = f"model.layers.{i}."
        names |= {at + "input_layernorm", at + "post_attention_layernorm", at + "self_attn.o_proj"}
        if "kv_lora_rank" in c:
            q = ("q_a_proj", "q_a_layernorm", "q_b_proj") if c["q_lora_rank"] else ("q_proj",)
            attention = (*q, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
        else:
            attention = ("q_proj", "k_proj", "v_proj") + (
                ("q_norm", "k_norm") if c["model_type"] == "qwen3" else ()
            )
        names |= {f"{at}self_attn.{part}" for part in attention}
        if c["model_type"] == "qwen2":
            extra |= {f"{at}self_attn.{part}.bias" for part in attention}
        if i < c.get("first_k_dense_replace", c["num_hidden_layers"]):
            names |= {f"{at}mlp.{part}" for part in mlp}
        else:
            names |= {at + "mlp.gate"} | {f"{at}mlp.shared_experts.{part}" for part in mlp}
            names |= {
                f"{at}mlp.experts.{e}.{part}" for e in range(c["n_routed_experts"]) for part in mlp
            }
            if c["model_type"] == "deepseek_v3":
                extra.add(at + "mlp.gate.e_score_correction_bias")
        if i >= c["num_hidden_layers"]:
            names |= {at + part for part in ("embed_tokens", "enorm", "hnorm", "eh_proj")}
            names |= {at + "shared_head.norm", at + "shared_head.head"}
    if "quantization_config" in c:
        extra |= {n + ".weight_scale_inv" for n in names if n.rsplit(".", 1)[-1] in QUANTISED}
    return {n + ".weight" for n in names} | extra


def weights(published, seed, name):
    """The float32 tensors of the checkpoint, by the names that transformers gives them on disk."""
    nextn = published.get("num_nextn_predict_layers", 0)
    # The MTP layer holds a whole decoder layer: transformers builds it as one more ordinary layer.
    layers = published["num_hidden_layers"]
    changes = {"num_hidden_layers": layers + nextn, "quantization_config": None}
    config = AutoConfig.for_model(**copy.deepcopy(published) | changes)  # it edits rope_scaling
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = published["tie_word_embeddings"]
    gains = {
        "bias": BIAS.get(name, (0, 0)),
        "experts": EXPERT_GAIN.get(name, 1),
        "embed": EMBED_GAIN.get(name, published["hidden_size"] ** -0.5 if tied else 1),
        "latent": LATENT_GAIN.get(name, (0, 1)),
    }
    oracle.fill(model, seed, tied=tied, gains=gains)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        tensors = load_file(Path(tmp) / "model.safetensors")
    at, d = f"model.layers.{layers}.", published["hidden_size"]
    if nextn:
        for part, shape in (
            ("enorm", (d,)),
            ("hnorm", (d,)),
            ("shared_head.norm", (d,)),
            ("eh_proj", (d, 2 * d)),
        ):
            value = oracle.scaled(seed, at + part, shape, gains)
            tensors[f"{at}{part}.weight"] = torch.from_numpy(value).float()
        tensors[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[at + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def quantise(weight, ue8m0):
    """128 x 128 blocks -> (float8_e4m3fn, float32 scales, the float32 product of the two)."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    back = small.float() * scale[:, None, :, None]
    small, back = (x.reshape(padded.shape)[:rows, :columns].contiguous() for x in (small, back))
    return small, scale.contiguous(), back


def stored(tensors, published):
    """-> (tensors as they lie on disk, the float32 tensors they stand for)."""
    disk, meant = {}, {}
    fp8 = published.get("quantization_config")
    for name, x in tensors.items():
        if fp8 and name.endswith(".weight") and name.split(".")[-2] in QUANTISED:
            disk[name], scale, meant[name] = quantise(x, fp8.get("scale_fmt") == "ue8m0")
            disk[name + "_scale_inv"] = scale
        else:
            half = published["torch_dtype"] == "bfloat16" and not name.endswith(
                "e_score_correction_bias"
            )
            disk[name] = x.to(torch.bfloat16) if half else x
            meant[name] = disk[name].float()
    return disk, meant


def write(directory, tensors, shard_size="1GB"):
    """Shards and index the way transformers writes them."""
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file(
            {n: tensors[n].contiguous() for n in names}, directory / file, metadata={"format": "pt"}
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def oracle_config(path, published):
    """The config to compute with: transformers ignores attn_factor, the right product is 1."""
    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    scaling = published.get("rope_scaling") or published.get("rope_parameters") or {}
    if "attn_factor" in scaling:
        config.rope_parameters["attention_factor"] = 1.0
    return config


def numbers(model, published, seed):
    """Everything expected.npz holds, and the statistics that decide if this seed is good."""
    rng = np.random.default_rng([seed, 1])
    tokens = rng.integers(3, published["vocab_size"], (2, LENGTH)).astype(np.int32)
    logits, hidden, calls = oracle.forward(model, tokens)
    out = {"tokens": tokens, "logits": logits, "prompt_lengths": np.array(PROMPTS, np.int32)}
    runs = [oracle.greedy(model, row[:n], NEW) for row, n in zip(tokens, PROMPTS, strict=True)]
    out["greedy"] = np.stack([run[0] for run in runs])
    width = max(PROMPTS)
    padded, mask = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
    for i, n in enumerate(PROMPTS):
        padded[i, width - n :], mask[i, width - n :] = tokens[i, :n], 1
    positions = np.clip(np.cumsum(mask, -1) - 1, 0, None).astype(np.int32)
    tail = oracle.forward(model, padded, mask, positions)[0][:, -TAIL:]
    for i, n in enumerate(PROMPTS):
        worst = np.abs(tail[i] - logits[i, n - TAIL : n]).max()
        if worst > 1e-4:
            raise SystemExit(f"transformers' left padding is off by {worst}")
    out |= {
        "left_tokens": padded,
        "left_mask": mask,
        "left_positions": positions,
        "left_tail_logits": tail,
    }
    stats = {
        "seed": seed,
        "logits_std": float(logits.std()),
        "greedy_margin": min(run[1] for run in runs),
        "greedy_has_eos": bool(np.isin(out["greedy"], published["eos_token_id"]).any()),
        "greedy_distinct": min(len(set(row)) for row in out["greedy"].tolist()),
    }
    if not calls:
        return out, stats
    out["routing"] = np.stack([c[1].reshape(*tokens.shape, -1) for c in calls]).astype(np.int32)
    recorded = [calls] + [run[2] for run in runs]
    biases = [getattr(g, "e_score_correction_bias", None) for g in oracle.gates(model)]
    biases = [0.0 if bias is None else bias.numpy() for bias in biases]
    pairs = [pair for each in recorded for pair in zip(each, biases, strict=True)]
    if published.get("num_nextn_predict_layers"):
        out["hidden"] = hidden
        out["mtp_logits"], drafted = oracle.mtp(model, tokens, hidden)
        chosen = np.stack([c[1].reshape(2, LENGTH - 1, -1) for c in drafted])
        out["mtp_routing"] = chosen.astype(np.int32)
        stats["mtp_logits_std"] = float(out["mtp_logits"].std())
        pairs += zip(drafted, [model.mtp_bias], strict=True)
    return out, stats | routing_stats(published, pairs, len(calls))


def routing_stats(published, pairs, layers):
    """Margins over all (router call, bias) pairs; what mistakes change in the first `layers`."""
    margin = np.inf
    for (router_logits, chosen), bias in pairs:
        again, gap = oracle.choose(router_logits, bias, published)
        if not np.array_equal(again, chosen):
            raise SystemExit("the numpy router disagrees with transformers")
        margin = min(margin, gap)
    mistakes = {
        "bias ignored": {"use_bias": False},
        "groups ignored": {"groups": False},
        "max group score": {"top2": False},
        "masked groups filled with 0": {"fill": 0.0},
    }
    changed = {}
    for what, how in mistakes.items():
        wrong = [oracle.choose(c[0], b, published, **how)[0] != c[1] for c, b in pairs[:layers]]
        changed[what] = float(np.mean([w.any(-1).mean() for w in wrong]))
    used = [len(np.unique(c[1])) / published["n_routed_experts"] for c, _ in pairs[:layers]]
    return {"router_margin": margin, "experts_used": min(used), "changed": changed}


def good(stats, published):
    """Far from ties, and every mistake this config can show does change choices."""
    if stats["greedy_margin"] < GREEDY_MARGIN or not 0.6 < stats["logits_std"] < 1.6:
        return False
    if stats["greedy_has_eos"] or stats["greedy_distinct"] < 6:
        return False
    if "router_margin" not in stats:
        return True
    must = []
    if published["topk_method"] == "noaux_tc":
        must.append("bias ignored")
    if published["n_group"] > 1:
        must.append("groups ignored")
        if published["topk_method"] == "noaux_tc" and published["n_routed_experts"] > 4:
            must.append("max group score")
    enough = all(stats["changed"][what] >= CHANGED for what in must)
    return stats["router_margin"] >= ROUTER_MARGIN and stats["experts_used"] >= 0.9 and enough


def make(name, first=0, tries=300):
    """Write one case."""
    published = CONFIGS[name]
    for seed in range(first, first + tries):
        tensors = weights(published, seed, name)
        disk, meant = stored(tensors, published)
        if set(disk) != published_names(published):
            raise SystemExit(
                f"{name}: names differ: {sorted(set(disk) ^ published_names(published))[:10]}"
            )
        with tempfile.TemporaryDirectory() as tmp:
            path = Path(tmp)
            write(path, meant)
            (path / "config.json").write_text(json.dumps(published))
            model = oracle.load(path, oracle_config(path, published))
            bias = f"model.layers.{published['num_hidden_layers']}.mlp.gate.e_score_correction_bias"
            model.mtp_bias = meant[bias].numpy() if bias in meant else None
            out, stats = numbers(model, published, seed)
        if good(stats, published):
            break
    else:
        raise SystemExit(f"{name}: no good seed in {tries}")
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    write(target, disk, SHARD_SIZE.get(name, "1GB"))
    (target / "config_published.json").write_text(
        json.dumps(published, indent=2, sort_keys=True) + "\n"
    )
    (target / "config.json").write_text(transformers_config(published))
    np.savez_compressed(target / "expected.npz", stats=np.array(json.dumps(stats)), **out)
    check(target, published, out)
    size = sum(f.stat().st_size for f in target.iterdir())
    print(f"{name:14} {size / 1024:6.0f} KiB  {json.dumps(stats)}", flush=True)


def transformers_config(published):
    """The config.json transformers writes for a model that it read from the published form."""
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "config.json").write_text(json.dumps(published))
        config = AutoConfig.from_pretrained(tmp)
        fp8 = config.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, published["torch_dtype"])
        )
        model.save_pretrained(tmp)
        saved = json.loads((Path(tmp) / "config.json").read_text())
    if fp8 is not None:
        saved["quantization_config"] = fp8
    return json.dumps(saved, indent=2, sort_keys=True) + "\n"


def check(directory, published, out):
    """transformers opens what lies there, by either config file, and gives the same numbers."""
    for which in ("config.json", "config_published.json"):
        with tempfile.TemporaryDirectory() as tmp:
            for file in directory.iterdir():
                if "safetensors" in file.name:
                    shutil.copy(file, tmp)
            shutil.copy(directory / which, Path(tmp) / "config.json")
            if "quantization_config" in published:
                dequantise(Path(tmp))
            model = oracle.load(tmp, oracle_config(tmp, published))
            worst = np.abs(oracle.forward(model, out["tokens"])[0] - out["logits"]).max()
        if worst != 0:
            raise SystemExit(f"{directory.name}: reloading by {which} moves the logits by {worst}")


def dequantise(directory):
    """Replace FP8 shards by the float32 numbers they stand for, multiplied out by transformers.

    Its FP8 matmul needs a GPU, and its `dequantize=True` divides a tensor evenly by the number of
    its scales, which is wrong for partial blocks (576 rows under 5 scales: kv_a_proj_with_mqa).
    """
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        tensors[weight] = _dequantize_fp8_weight(tensors[weight], scale, [128, 128], torch.float32)
    write(directory, tensors)


if __name__ == "__main__":
    oracle.prepare()
    for case in sys.argv[1:] or CONFIGS:
        make(case)

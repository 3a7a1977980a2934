"""Losses of one step of GRPO, DPO and supervised fine-tuning, as TRL computes them.

    python3.11 -m venv oracle && oracle/bin/pip install torch==2.13.0
    oracle/bin/pip install trl==1.16.0
    oracle/bin/python tests/golden/trl/make.py    # writes expected.npz beside this file

The model is tests/golden/v2_lite_like, run by transformers in float32. `_compute_loss` of TRL's
trainers is called as it is, on a stand-in for the trainer that holds the settings; what it gets are
log-probabilities and entropies from the model's logits.
"""

import json
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, GRPOTrainer

HERE = Path(__file__).parent
PROMPT, ANSWER, GROUPS, EACH = 5, 11, 2, 3
LENGTHS = [11, 4, 7, 1, 9, 6]

GRPO = {
    "grpo": {"beta": 0.04},
    "r1": {"beta": 0.001, "epsilon_low": 10.0, "epsilon_high": 10.0},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "dual": {"delta": 1.3},
    "unbiased": {"beta": 0.3, "use_bias_correction_kl": True},
    "truncated": {"use_vllm": True},
    "off_policy": {"off_policy_mask_threshold": 0.05},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.1},
}


class Fused:
    """The model as TRL's trainers call it: log-probabilities of the labels, zero where ignored."""

    def __init__(self, model):
        self.model, self.training = model, True

    def __call__(self, input_ids, labels, **ignored):
        logits = self.model(input_ids=input_ids).logits[:, :-1]
        logp = torch.log_softmax(logits, dim=-1)
        target = labels[:, 1:]
        kept = target != -100
        found = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return types.SimpleNamespace(
            log_probs=torch.where(kept, found, 0.0),
            entropy=-(logp.exp() * logp).sum(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == target,
        )


class Accelerator:
    num_processes, sync_gradients, device, is_main_process = 1, True, "cpu", False

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def autocast(self):
        return torch.enable_grad()


def trainer(kind, **settings):
    args = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    args |= {k: settings.pop(k) for k in list(settings) if k in args}
    base = {
        "aux_loss_enabled": False, "accelerator": Accelerator(),
        "args": types.SimpleNamespace(**args), "_metrics": defaultdict(lambda: defaultdict(list)),
        "current_gradient_accumulation_steps": 1, "model": types.SimpleNamespace(training=True),
    }  # fmt: skip
    stand_in = types.SimpleNamespace(**base | settings)
    for name in ("_get_per_token_logps_and_entropies", "get_off_policy_mask"):
        if hasattr(kind, name):
            static = isinstance(vars(kind)[name], staticmethod)
            method = getattr(kind, name)
            setattr(stand_in, name, method if static else types.MethodType(method, stand_in))
    return stand_in


def grpo(model, inputs, settings):
    defaults = {
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": 0.0,
        "importance_sampling_level": "token", "loss_type": "grpo", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "use_vllm": False, "vllm_importance_sampling_correction": True,
        "max_completion_length": ANSWER, "_entropy_bonus_enabled": "entropy_coef" in settings,
        "use_adaptive_entropy": False, "num_iterations": 1,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer(GRPOTrainer, **defaults | settings), model, inputs)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    source = AutoModelForCausalLM.from_pretrained(HERE.parent / "v2_lite_like", dtype=torch.float32)
    source.eval()
    model = Fused(source)
    rng = np.random.default_rng(0)
    rows = GROUPS * EACH
    vocabulary = source.config.vocab_size
    prompts = rng.integers(0, vocabulary, (GROUPS, PROMPT)).repeat(EACH, axis=0)
    tokens = np.concatenate([prompts, rng.integers(0, vocabulary, (rows, ANSWER))], axis=1)
    mask = np.arange(ANSWER) < np.array(LENGTHS)[:, None]
    ids, kept = torch.tensor(tokens), torch.tensor(mask).long()
    with torch.no_grad():
        logprobs = model(ids, ids).log_probs[:, PROMPT - 1 :].numpy()
    near = {n: logprobs + rng.normal(0, s, logprobs.shape).astype(np.float32)
            for n, s in (("old", 0.2), ("reference", 0.4), ("rollout", 0.3))}  # fmt: skip
    advantages = rng.normal(0, 1, rows).astype(np.float32)
    weights = torch.tensor(near["old"] - near["rollout"]).exp().clamp(max=1.2)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:], "completion_mask": kept,
        "advantages": torch.tensor(advantages), "num_items_in_batch": kept.sum(),
        "old_per_token_logps": torch.tensor(near["old"]),
        "ref_per_token_logps": torch.tensor(near["reference"]),
        "importance_sampling_ratio": weights,
    }  # fmt: skip
    out = {"tokens": tokens, "mask": mask, "advantages": advantages, **near}

    def keep(name, loss):
        source.zero_grad()
        loss.backward()
        norm = torch.stack(
            [p.grad.norm() for p in source.parameters() if p.grad is not None]
        ).norm()
        out[f"{name}/loss"], out[f"{name}/norm"] = loss.item(), norm.item()
        print(f"{name:12} loss {loss.item():.7f}  gradient {norm.item():.7f}")

    for name, settings in GRPO.items():
        keep(name, grpo(model, inputs, dict(settings)))

    whole = torch.cat([torch.zeros(rows, PROMPT, dtype=torch.long), kept], dim=1)
    summed = torch.tensor((near["reference"] * mask).sum(axis=1))
    stand_in = trainer(
        DPOTrainer, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=0.1, label_smoothing=0.0,
        use_weighting=False, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    pairs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": whole,
        "ref_chosen_logps": summed[: rows // 2], "ref_rejected_logps": summed[rows // 2 :],
    }  # fmt: skip
    keep("dpo", DPOTrainer._compute_loss(stand_in, model, pairs, False))
    keep("sft", source(input_ids=ids, labels=ids.masked_fill(whole == 0, -100)).loss)
    out["versions"] = json.dumps({m.__name__: m.__version__ for m in (trl, transformers, torch)})
    np.savez_compressed(HERE / "expected.npz", **out)


if __name__ == "__main__":
    main()

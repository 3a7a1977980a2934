"""What make.py and check_saved.py share: fill a model, run it, record its routing and margins.

Runs only in the oracle environment (torch + transformers); nothing of deepzoo is imported here.
"""

import zlib

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

TORCH, TRANSFORMERS = "2.13.0", "5.23.0"


def prepare():
    """Fix threads and refuse other versions than the ones the numbers are filed under."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    have = torch.__version__.split("+")[0], transformers.__version__
    if have != (TORCH, TRANSFORMERS):
        raise SystemExit(f"golden numbers are made with {(TORCH, TRANSFORMERS)}, this is {have}")


def draw(seed, name, shape):
    """Standard normal numbers that depend on the seed and the tensor's name only."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)


def scaled(seed, name, shape, gains):
    """The value of one parameter: norms around 1, biases non-zero, logits of a deviation near 1.

    `gains`: mean and deviation of the router "bias", factors of the "experts"' output and of the
    "embed"ding, and of the "latent" rows of kv_a_proj_with_mqa (how many, factor).
    """
    x = draw(seed, name, shape)
    if "norm" in name:
        return np.clip(1 + 0.25 * x, 0.4, 1.8)
    if name.endswith("e_score_correction_bias"):
        return gains["bias"][0] + gains["bias"][1] * x
    if name.endswith(".bias"):
        return 0.5 * x
    if "embed_tokens" in name:
        return gains["embed"] * x
    gain = 1.0
    if "o_proj" in name or "down_proj" in name:
        gain = 0.7
    if ".experts." in name:
        gain *= 1.4 * (gains["experts"] if "down_proj" in name else 1.0)
    if any(part in name for part in ("q_proj", "q_b_proj", "k_proj")):
        gain = 1.4
    if name.endswith("mlp.gate.weight"):
        gain = 1.5  # well spread router choices
    if "kv_a_proj" in name:
        rows, factor = gains["latent"]
        x[:rows] *= factor
    return gain * x / shape[-1] ** 0.5


def fill(model, seed, *, tied, gains):
    """Overwrite every parameter and persistent buffer of `model` in place."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and tied:
                continue
            tensor.copy_(torch.from_numpy(scaled(seed, name, tuple(tensor.shape), gains)))


def load(directory, config=None):
    """Open a checkpoint directory in float32 with eager attention, leaving its MTP layer aside."""
    config = config or transformers.AutoConfig.from_pretrained(directory)
    mtp = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
    # transformers knows the MTP layer of the released models by the literal number 61.
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = mtp
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise SystemExit(f"{directory}: {what}: {sorted(info[what])[:10]}")
    return model.eval()


def gates(module):
    """The routers inside `module`, in layer order."""
    return [m for m in module.modules() if type(m).__name__.endswith("TopkRouter")]


class Routing:
    """Records (router logits [N, E], chosen experts [N, K]) of each router call, in layer order."""

    def __init__(self, module):
        self.calls = []
        self.handles = [gate.register_forward_hook(self.record) for gate in gates(module)]

    def record(self, module, inputs, output):
        self.calls.append((output[0].numpy().copy(), np.sort(output[2].numpy(), -1)))

    def close(self):
        for handle in self.handles:
            handle.remove()
        return self.calls


@torch.no_grad()
def forward(model, tokens, mask=None, positions=None):
    """-> (logits [B, T, V], last hidden states after the final norm [B, T, D], router calls)."""
    routing = Routing(model)
    out = model(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=None if mask is None else torch.from_numpy(mask).long(),
        position_ids=None if positions is None else torch.from_numpy(positions).long(),
        use_cache=False,
        output_hidden_states=True,
    )
    return out.logits.numpy(), out.hidden_states[-1].numpy(), routing.close()


@torch.no_grad()
def greedy(model, prompt, count):
    """By a full forward pass per token: -> (tokens [count], smallest margin, router calls)."""
    tokens, margin = list(map(int, prompt)), np.inf
    for _ in range(count):
        logits, _, calls = forward(model, np.array([tokens]))
        best = np.sort(logits[0, -1])[-2:]
        margin = min(margin, float(best[1] - best[0]))
        tokens.append(int(logits[0, -1].argmax()))
    cached = model.generate(
        torch.tensor([tokens[: len(prompt)]]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )[0].tolist()
    if (
        cached != tokens and 1 not in tokens[len(prompt) :]
    ):  # min_new_tokens forbids eos, a plain argmax does not
        raise SystemExit("transformers' cached generation differs from its full forward pass")
    return np.array(tokens[len(prompt) :], np.int32), margin, calls


@torch.no_grad()
def mtp(model, tokens, hidden):
    """One MTP step over h_0..h_{T-2} and t_1..t_{T-1}: -> (logits [B, T-1, V], router calls).

    `hidden` is the last hidden state after the final norm, as transformers itself hands over.
    """
    module = MtpModel.from_pretrained(model)
    module.eval()
    routing = Routing(module)
    batch, length = tokens[:, 1:].shape
    out = module.forward_layer(
        0,
        torch.from_numpy(hidden[:, :-1]),
        (torch.arange(length) + 1).expand(batch, -1),
        MtpCache(config=model.config.get_mtp_config()),
        input_ids=torch.from_numpy(tokens[:, 1:]).long(),
    )
    return module._project_to_logits(out).numpy(), routing.close()


def choose(logits, bias, config, *, use_bias=True, groups=True, top2=True, fill=-np.inf):
    """The router once more, in numpy float64, with its mistakes as options.

    -> (experts [N, K] sorted, smallest relative distance of any decision from a tie)
    """
    n, k = logits.shape[-1], config["num_experts_per_tok"]
    logits = logits.astype(np.float64)
    if config["scoring_func"] == "softmax":
        score = np.exp(logits - logits.max(-1, keepdims=True))
        score /= score.sum(-1, keepdims=True)
    else:
        score = 1 / (1 + np.exp(-logits))
        score = score + (bias if use_bias else 0)
    margin, softmax = np.inf, config["scoring_func"] == "softmax"

    def gap(values, k):
        if k == values.shape[-1]:
            return np.inf
        ordered = -np.sort(-values, -1)
        distance = ordered[:, k - 1] - ordered[:, k]
        return float((distance / ordered[:, k - 1] if softmax else distance).min())

    if groups and config["n_group"] > 1 and config["topk_method"] != "greedy":
        members = score.reshape(len(score), config["n_group"], -1)
        ordered = -np.sort(-members, -1)
        group = ordered[..., 0] if softmax or not top2 else ordered[..., :2].sum(-1)
        margin = gap(group, config["topk_group"])
        keep = np.zeros_like(group, bool)
        np.put_along_axis(keep, np.argsort(-group, -1)[:, : config["topk_group"]], True, -1)
        score = np.where(
            np.repeat(keep, n // config["n_group"], -1), score, 0.0 if softmax else fill
        )
        finite = config["topk_group"] * (n // config["n_group"])
        margin = min(margin, gap(score, k)) if k < finite else margin
    else:
        margin = gap(score, k)
    return np.sort(np.argsort(-score, -1)[:, :k], -1), margin

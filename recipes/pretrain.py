"""Pretraining of a V2 or V3 model, shown on arithmetic.

    python -m deepzoo.recipes.pretrain --preset nano --out DIR

Papers: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437).
* next-token cross entropy, plus for V3 the multi-token prediction loss, V3 eq. 21-25;
* V2: expert-level balance loss, eq. 23-25; V3: sequence-wise balance loss, eq. 17-20, and
  aux-loss-free biases, eq. 16.

Deviations:
* V2's device-level and communication losses (eq. 26-31) and its token dropping (2.2.4) are left
  out: they even out the traffic between devices, and there is one device here;
* Muon (arXiv 2502.16982) for the matrices instead of AdamW: clearly fewer steps at this size;
* warm-up, constant, linear decay to 0, instead of V2's two steps down and V3's cosine; constant
  batch size;
* packed documents do not see each other (the papers pack without a mask);
* the numbers of a problem are random: they are read, but only the written-out steps are learned;
* the balance loss takes a packed row for a "sequence".
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deepzoo import zoo
from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy
from deepzoo.kernels.router import Routing, expert_counts
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.evaluate import evaluate
from deepzoo.recipes.parts.log import Log
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.train import (
    Loss,
    Output,
    fit,
    optimizer,
    split_bias,
    start,
    train_step,
    warmup_constant_decay,
    with_bias,
)
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import DeepzooError, RequestError
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run: the model and how it is trained. Shares are of all steps."""

    config: Config
    steps: int = 2000
    rows: int = 8
    length: int = 256
    rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    decay: float = 0.3
    clip: float = 1.0
    balance: float = 0.003  # alpha_1 of V2, alpha of V3
    bias_rate: float = 0.0  # gamma of V3, 0 for the last tenth
    mtp: float = 0.0  # lambda of V3
    seed: int = 0


_V2 = Config(
    model_type="deepseek_v2",
    vocab_size=1007,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    dtype="float32",
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    routed_scaling_factor=2.0,
)
_V3 = dataclasses.replace(
    _V2, model_type="deepseek_v3", n_shared_experts=1, n_group=2, topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, num_nextn_predict_layers=1,
)  # fmt: skip
PRESETS = {
    "nano": Recipe(config=_V2),  # zoo/pretrained/v2-nano
    "v3_nano": Recipe(config=_V3, balance=1e-4, bias_rate=0.003, mtp=0.3),
}


def next_token(config: Config, *, balance: float = 0.0, mtp: float = 0.0) -> Loss:
    """The loss over batches {"tokens", "segments", "weights"} [B, T + 1]; see the file's head."""

    def loss(params, batch, key) -> Output:
        del key
        seen, inside = batch["tokens"][:, :-1], batch["segments"][:, :-1]
        head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]

        def cross_entropy(hidden, ahead: int):
            target, weight = shifted(batch, ahead)
            x = hidden.reshape(-1, hidden.shape[-1])
            nll, _ = linear_cross_entropy(x, head, target.reshape(-1), weight.reshape(-1))
            return nll, weight.sum()

        out = zoo.apply(config, params, seen, segment_ids=inside, logits=False)
        nll, weight = cross_entropy(out.hidden, 1)
        metrics, load, routings = {"nll": nll}, {}, []
        if out.routing is not None:
            routings.append(out.routing)
            load["moe"] = jax.vmap(lambda i: expert_counts(i, config.n_routed_experts))(
                out.routing.indices
            )
        extra, hidden = jnp.zeros(()), out.hidden
        for depth in range(config.num_nextn_predict_layers if mtp else 0):
            later, _ = shifted(batch, 1 + depth)
            deep = zoo.apply_mtp(
                config, params, hidden, later, segment_ids=inside, depth=depth, logits=False
            )
            hidden, routing = deep.hidden, jax.tree.map(lambda a: a[None], deep.routing)
            far, far_weight = cross_entropy(hidden, 2 + depth)
            # eq. 24-25: the mean over depths of each depth's mean over tokens
            extra += mtp / config.num_nextn_predict_layers * far / jnp.maximum(far_weight, 1)
            metrics |= {f"mtp{depth}": far, f"mtp{depth}_weight": far_weight}
            routings.append(routing)
            counts = expert_counts(routing.indices, config.n_routed_experts)[None]
            load["mtp"] = jnp.concatenate([load["mtp"], counts]) if "mtp" in load else counts
        uneven = sum((balance_loss(config, r) for r in routings), jnp.zeros(()))
        metrics |= {"balance": uneven * weight, "load": load}
        return Output(nll + (extra + balance * uneven) * weight, weight, metrics)

    return loss


def shifted(batch: dict[str, jax.Array], ahead: int) -> tuple[jax.Array, jax.Array]:
    """The token `ahead` places to the right of each of the first T, and its weight as a target.

    Batch arrays [B, T + 1] -> int32 [B, T], float32 [B, T]; the weight is 0 in another document
    and beyond the row's end.
    """
    beyond = ((0, 0), (0, ahead - 1))
    target, weight = (jnp.pad(batch[k][:, ahead:], beyond) for k in ("tokens", "weights"))
    segment = jnp.pad(batch["segments"][:, ahead:], beyond, constant_values=-1)
    return target, weight * (segment == batch["segments"][:, :-1])


def balance_loss(config: Config, routing: Routing) -> jax.Array:
    """V2 eq. 23-25, V3 eq. 17-20: f_i P_i summed over experts and layers, mean of sequences.

    f_i: share of the choices that went to expert i, times the number of experts; P_i: its mean
    affinity, normalised.
    1 for each layer that is perfectly even.

    Args:
        config: the model.
        routing: of the expert layers, [L, B, T, ...].
    """
    experts = config.n_routed_experts
    chosen = jax.nn.one_hot(routing.indices, experts).mean(axis=(2, 3)) * experts
    scores = routing.scores / routing.scores.sum(axis=-1, keepdims=True)
    return (chosen * scores.mean(axis=2)).sum(axis=-1).mean(axis=-1).sum()


def arithmetic(tokenizer: Tokenizer, recipe: Recipe) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch of training problems with their steps; never a held-out one."""
    assert tokenizer.bos_id is not None
    bos: list[int] = [tokenizer.bos_id]
    eos = [tokenizer.eos_ids[0]]

    def tokenize(problem: str) -> tuple[list[int], int]:
        given, written = tokenizer.encode(problem + " ="), " = ".join(tasks.steps(problem))
        return bos + given + tokenizer.encode(written) + eos, 1 + len(given)

    def make(step: int) -> dict[str, np.ndarray]:
        documents = (tokenize(p) for p in tasks.problems(recipe.seed, step))
        return pack(documents, recipe.rows, recipe.length)

    return make


def train(recipe: Recipe, out: Path) -> Model:
    """Trains; writes `out`/metrics.jsonl and, in the published layout and bfloat16, `out`/model."""
    if (out / "model").exists():
        raise RequestError(f"{out / 'model'} exists; give another directory")
    out.mkdir(parents=True, exist_ok=True)
    config = recipe.config
    tokenizer = Tokenizer(tasks.tokenizer_files(), config)
    params = zoo.init(config, jax.random.key(recipe.seed))
    shape = warmup_constant_decay(recipe.steps, recipe.warmup, recipe.decay)
    rates = recipe.rate, recipe.adam_rate, recipe.weight_decay
    tx = optimizer(split_bias(params)[0], *rates, shape)
    step = train_step(
        next_token(config, balance=recipe.balance, mtp=recipe.mtp),
        tx,
        clip=recipe.clip,
        bias_rate=lambda at: jnp.where(at < 0.9 * recipe.steps, recipe.bias_rate, 0.0),
    )
    batch = arithmetic(tokenizer, recipe)
    with Log(out / "metrics.jsonl", recipe.steps, recipe.rows * recipe.length) as log:
        state = fit(
            jax.jit(step, donate_argnums=0),
            start(params, tx, recipe.seed),
            map(batch, range(recipe.steps)),
            on=[log],
        )
    final = dataclasses.replace(config, dtype="bfloat16")
    params = with_bias(state.params, state.bias)
    params = jax.tree.map(lambda a, like: a.astype(like.dtype), params, zoo.abstract(final))
    save_hf(Model(final, params, tokenizer), out / "model")
    greedy = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": False,
    }
    (out / "model" / "generation_config.json").write_text(json.dumps(greedy, indent=2) + "\n")
    return zoo.load(out / "model", dtype="float32")


def report(model: Model, count: int) -> str:
    """Greedy and sampled accuracy on held-out problems."""
    greedy = evaluate(model, count, temperature=0.0)
    sampled = evaluate(model, count, temperature=1.0, top_p=1.0)
    return (
        f"greedy:        {greedy}\ntemperature 1: {sampled}\n"
        f"{greedy.tokens} tokens in {greedy.seconds:.0f} s (greedy)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Pretrain a small model on arithmetic, or evaluate one.

    Example: python -m deepzoo.recipes.pretrain --preset nano --out runs/v2-nano
    """

    preset: Literal["nano", "v3_nano"] = "nano"
    out: Path | None = None
    """Directory to write: metrics.jsonl and model/."""
    steps: int | None = None
    """Instead of the preset's."""
    seed: int | None = None
    """Instead of the preset's."""
    evaluate: str | None = None
    """A trained model (name or directory): print its accuracy instead of training."""
    problems: int = 500
    """Held-out problems to evaluate on."""


def main(arguments: Arguments) -> None:
    """Trains or evaluates, and prints the accuracy on held-out problems."""
    if arguments.evaluate is not None:
        print(report(zoo.load(arguments.evaluate, dtype="float32"), arguments.problems))
        return
    if arguments.out is None:
        raise RequestError("--out DIR says where to write; or --evaluate MODEL")
    given = {k: v for k in ("steps", "seed") if (v := getattr(arguments, k)) is not None}
    recipe = dataclasses.replace(PRESETS[arguments.preset], **given)
    wall, cpu = time.perf_counter(), time.process_time()
    model = train(recipe, arguments.out)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = recipe.steps * recipe.rows * recipe.length
    print(f"{tokens:,} tokens in {wall / 60:.1f} minutes ({cpu / 60:.1f} minutes of CPU time)")
    print(report(model, arguments.problems))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except DeepzooError as error:
        sys.exit(f"deepzoo: {error}")

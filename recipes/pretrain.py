"""Pretraining of a V2 or V3 model, shown on arithmetic.

    deepzoo train pretrain --preset nano --out DIR

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
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepzoo import zoo
from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy
from deepzoo.kernels.router import Routing, expert_counts
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.evaluate import evaluate
from deepzoo.recipes.parts.flops import flops_per_token
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.optim import adamw, muon
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.schedules import scaled, warmup_constant_decay
from deepzoo.recipes.parts.step import Loss, Mean, Metrics, Output, Step, jitted, start, train_step
from deepzoo.zoo.config import Config
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run: the model and how it is trained. Shares are of all steps."""

    config: Config
    """The model."""
    steps: int = 2000
    """Batches."""
    rows: int = 8
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    accumulate: int = 1
    """Micro-batches of a batch; its rows are cut into so many parts, which need less memory."""
    rate: float = 0.02
    """Peak learning rate of Muon; 0 for AdamW throughout."""
    adam_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Of the matrices."""
    warmup: float = 0.05
    """Share of the steps in which the rates rise."""
    decay: float = 0.3
    """Share of the steps in which they fall to 0."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    balance: float = 0.003
    """alpha_1 of V2, alpha of V3."""
    bias_rate: float = 0.0
    """gamma of V3, 0 for the last tenth of the steps."""
    mtp: float = 0.0
    """lambda of V3."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out problems; 0 for one at the end."""
    problems: int = 500
    """Held-out problems of an evaluation; 0 for none."""
    sample_every: int = 200
    """Steps between samples of text; 0 for none."""
    seed: int = 0
    """Of the initial values and of the data."""


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
        metrics: Metrics = {"nll": nll}
        load, routings = {}, []
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
            # eq. 24-25: the mean over depths; each is divided by the tokens of the main loss
            extra += mtp / config.num_nextn_predict_layers * far
            metrics[f"mtp{depth}"] = Mean(far, far_weight)
            routings.append(routing)
            counts = expert_counts(routing.indices, config.n_routed_experts)[None]
            load["mtp"] = jnp.concatenate([load["mtp"], counts]) if "mtp" in load else counts
        # each row counts as much as it has tokens to learn, so that micro-batches add up exactly
        share = shifted(batch, 1)[1].sum(axis=-1)
        uneven = sum((balance_loss(config, r) @ share for r in routings), jnp.zeros(()))
        metrics |= {"balance": uneven, "load": load}
        return Output(nll + extra + balance * uneven, weight, metrics)

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
    """V2 eq. 23-25, V3 eq. 17-20: f_i P_i summed over experts and layers, float32 [B].

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
    return (chosen * scores.mean(axis=2)).sum(axis=-1).sum(axis=0)


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


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Trains; writes `out`/model in the published layout and bfloat16, and returns it.

    Called again for the same directory, it goes on from the newest checkpoint.
    """
    config = recipe.config
    tokenizer = Tokenizer(tasks.tokenizer_files(), config)
    step, tx = learner(recipe)
    with Run(out, recipe, options, model=config, tokenizer=tokenizer) as run:

        def initial():
            return start(zoo.init(config, jax.random.key(recipe.seed)), tx, recipe.seed)

        def held_out(state):
            if not recipe.problems:
                return {}
            score = evaluate(trained(state), recipe.problems, temperature=0.0)
            return {"held_out": score.right / score.total, "held_out_steps": score.steps}

        def sample(state):
            problem = next(tasks.problems(recipe.seed, int(state.step), held=True))
            made = zoo.generate(trained(state), [f"{problem} ="], raw=True, max_tokens=96)
            return {"sample": f"{problem} = {made[0].text}"}

        def trained(state):
            return Model(config, with_bias(state.params, state.bias), tokenizer)

        state = run.state(initial)
        state = run.fit(
            jitted(step, state),
            state,
            arithmetic(tokenizer, recipe),
            recipe.steps,
            on=[
                run.every(recipe.evaluate_every, held_out, last=recipe.problems > 0),
                run.every(recipe.sample_every, sample),
            ],
            tokens=recipe.rows * recipe.length,
            flops=flops_per_token(config, recipe.length, mtp=bool(recipe.mtp)),
        )
        path = run.product("model", lambda path: export(trained(state), path))
    return zoo.load(path, dtype="float32")


def learner(recipe: Recipe) -> tuple[Step, optax.GradientTransformation]:
    """The step and its optimiser."""
    shape, _ = split_bias(zoo.abstract(recipe.config))
    factor = warmup_constant_decay(recipe.steps, recipe.warmup, recipe.decay)
    rate, adam_rate = scaled(recipe.rate, factor), scaled(recipe.adam_rate, factor)
    if recipe.rate:
        tx = muon(shape, rate, adam_rate, decay=recipe.weight_decay)
    else:
        tx = adamw(shape, adam_rate, decay=recipe.weight_decay)
    step = train_step(
        next_token(recipe.config, balance=recipe.balance, mtp=recipe.mtp),
        tx,
        recipe.accumulate,
        clip=recipe.clip,
        bias_rate=lambda at: jnp.where(at < 0.9 * recipe.steps, recipe.bias_rate, 0.0),
    )
    return step, tx


def export(model: Model, path: Path) -> None:
    """The model in the published layout and bfloat16, answering greedily unless told otherwise."""
    final = dataclasses.replace(model.config, dtype="bfloat16")
    cast = jax.tree.map(lambda a, like: a.astype(like.dtype), model.params, zoo.abstract(final))
    save_hf(Model(final, cast, model.tokenizer), path)
    greedy = {
        "bos_token_id": final.bos_token_id,
        "eos_token_id": final.eos_token_id,
        "do_sample": False,
    }
    (path / "generation_config.json").write_text(json.dumps(greedy, indent=2) + "\n")


def report(model: Model, count: int = 500) -> str:
    """Greedy and sampled accuracy on held-out problems."""
    greedy = evaluate(model, count, temperature=0.0)
    sampled = evaluate(model, count, temperature=1.0, top_p=1.0)
    return (
        f"greedy:        {greedy}\ntemperature 1: {sampled}\n"
        f"{greedy.tokens} tokens in {greedy.seconds:.0f} s (greedy)"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"] and len(sys.argv) == 3:  # a trained model, instead
        print(report(zoo.load(sys.argv[2], dtype="float32")))
    else:
        main(train, PRESETS, __doc__)

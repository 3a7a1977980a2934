"""Reinforcement learning from verifiable rewards: GRPO and what became of it.

    deepzoo train sft --preset nano --out COLD
    deepzoo train grpo --preset nano --model COLD/model --out DIR

Without the cold start, v2-nano is right so rarely that this refuses to start. From it, 40 rollouts
raised sampled answers to held-out problems from 16.6% to 24.6% (500 problems, 95% intervals 13.6%
to 20.1% and 21.0% to 28.6%) in ten minutes of CPU time; a rate of 1e-3 made it collapse.

Papers: GRPO, DeepSeekMath (arXiv 2402.03300, 4.1); R1-Zero and R1's two stages, DeepSeek-R1 (arXiv
2501.12948, eq. 1 to 3, and "Methods" of the article in Nature 645, 2025). Dr. GRPO, DAPO, GSPO and
CISPO are arguments (`recipes/parts/policy.py` names their papers); `modern` sets what later work
agrees on.

One step: sample `answers` answers of each of `prompts` problems, judge them by rules, compare each
with its group, and make one update for each of `minibatches` parts. Four functions, which a fork
replaces one by one: `rollout`, `judged`, `advantages`, `policy_loss`.

Tokens a second are those of the answers, over all of a step; utilisation counts the operations of
its updates alone, without those of rollouts, scoring and padding.

Deviations:
* R1 counts every update as a step: its 10,400 are 650 rollouts of 16 updates here;
* R1-Zero's clipping is not stated; the 10 of R1's first stage is used;
* the limit of R1-Zero's answers rises from 32,768 to 65,536 tokens at step 8,200: start a second
  run from the first one's model with the higher --max-tokens;
* the preference models of R1's second stage are not public: only its rule-based rewards are here;
* router biases stay as they are: rollouts and updates then choose experts alike;
* problems are drawn anew for each rollout instead of epoch by epoch;
* multi-token prediction is not trained: the layer is saved as it was.

Left out: replaying the experts of the generator (`replay` takes those of the trainer's own first
pass, which chooses alike); the mask of top-p sampling, for rollouts draw from the whole
distribution; entropy bonuses that adapt, and losses over the tokens of highest entropy alone.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepzoo import zoo
from deepzoo.kernels.router import expert_counts
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts import rewards as rules
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.advantage import Baseline, Scale, advantages, by_component, dead
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.flops import flops_of_rows
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.mtp import loaded, with_mtp
from deepzoo.recipes.parts.optim import Bytes, adamw
from deepzoo.recipes.parts.policy import Objective, policy_loss
from deepzoo.recipes.parts.problems import Problem, Task, Verdict
from deepzoo.recipes.parts.rollout import (
    Trajectories,
    figures,
    minibatches,
    replaced,
    rollout,
    step_seed,
)
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.recipes.parts.schedules import Schedule, scaled, warmup_constant_decay
from deepzoo.recipes.parts.shared_rows import scored, shared
from deepzoo.recipes.parts.step import (
    Loss,
    Metrics,
    State,
    Step,
    cast,
    jitted,
    several,
    start,
    train_step,
)
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params
from deepzoo.zoo.prompt import encode, tokenizer_of
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run of reinforcement learning."""

    model: str = "v2-nano"
    """Where it starts: a shipped model or a directory."""
    task: str = "arithmetic-long"
    """Problems and their verifier, see recipes/parts/problems.py."""
    data: str = ""
    """File or folder of problems, for task jsonl."""
    template: str = ""
    """Text around {prompt} that is continued as it is, for task jsonl and models without a chat
    format."""
    target_language: str = "en"
    """Of answers, where a problem of task jsonl names none."""
    steps: int = 40
    """Rollouts."""
    prompts: int = 32
    """Problems of a rollout."""
    answers: int = 16
    """Answers of each problem, its group."""
    minibatches: int = 1
    """Updates from one rollout."""
    max_tokens: int = 128
    """Longest answer."""
    prompt_tokens: int = 16
    """Longest prompt; with max_tokens it is the width of a batch."""
    temperature: float = 1.0
    """Of sampling."""
    accuracy: float = 1.0
    """Weight of a right answer in the reward."""
    format: float = 0.0
    """Weight of the form the answer has to have."""
    language: float = 0.0
    """Weight of language consistency (R1's second and later stages)."""
    combine: Literal["sum", "components"] = "sum"
    """Rewards are added and then compared within the group, or each component for itself (GDPO)."""
    scale: Scale = "group_std"
    """What advantages are divided by."""
    baseline: Baseline = "mean"
    """What an answer is compared with."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """Clipping, normalisation, divergence; see recipes/parts/policy.py."""
    old: Literal["rollout", "recomputed"] = "rollout"
    """Whose log-probabilities are pi_old: the generator's, or those of a pass of the trainer, which
    a correction of rollouts needs. The generator's are at temperature 1; at any other, and for
    `replay`, they are always computed again."""
    replay: bool = False
    """The updates use the experts that the trainer chose before the first of them (GSPO, arXiv
    2507.18071, 5.3), so that an update cannot move a token to other experts."""
    reference_every: int = 0
    """Rollouts after which the reference becomes the policy; 0: it stays the first model."""
    dynamic_sampling: int = 0
    """Further rounds of sampling to replace groups without variance (DAPO); 0: they stay."""
    overlong: Literal["wrong", "mask"] = "wrong"
    """An answer that was cut off is judged as it is, or left out of the loss (DAPO)."""
    overlong_tokens: int = 0
    """DAPO's soft punishment: the reward falls by up to 1 over the last so many tokens."""
    rate: float = 1e-4
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.95
    """AdamW's."""
    warmup: float = 0.05
    """Share of the updates in which the rate rises."""
    decay: float = 0.0
    """Share of the updates in which it falls to 0."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Micro-batches of an update."""
    packed: bool = False
    """Answers share the rows of an update, each seeing itself alone: the same sums in less time."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's arithmetic, rollouts included; parameters are kept in float32."""
    moments: Bytes = "float32"
    """Dtype of the optimiser's state."""
    slots: int = 256
    """Answers that are written together."""
    least: float = 0.05
    """Share of right answers below which it refuses to start: nearly every group would be dead."""
    evaluate_every: int = 20
    """Steps between evaluations on held-out problems; 0 for one at the end."""
    held_out: int = 500
    """Problems of an evaluation."""
    seed: int = 0
    """Of problems and sampling."""


_ZERO = Recipe(
    model="deepseek-v3-base", task="jsonl", data="problems.jsonl", template=tasks.R1_ZERO,
    steps=650, prompts=512, answers=16, minibatches=16, max_tokens=32768, prompt_tokens=4096,
    format=1.0, rate=3e-6, beta2=0.999, warmup=0.0,
    objective=Objective(clip_low=10.0, clip_high=10.0, beta=0.001),
    reference_every=25,  # 400 updates
    remat="full", compute="bfloat16", accumulate=512, slots=512, evaluate_every=50,
)  # fmt: skip
PRESETS = {
    "nano": Recipe(),
    "r1_zero": _ZERO,
    "r1_stage1": dataclasses.replace(
        _ZERO, model="runs/r1_cold_start/model", template="", language=1.0
    ),
    "r1_stage2": dataclasses.replace(
        _ZERO, model="runs/r1_sft/model", template="", language=1.0, temperature=0.7, steps=106
    ),
    "modern": dataclasses.replace(
        _ZERO,
        scale="none",
        objective=Objective(clip_high=0.28, norm="token"),
        reference_every=0,
        dynamic_sampling=3,
        overlong="mask",
    ),
}


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Trains; writes `out`/model in the published layout and returns it.

    Called again for the same directory, it goes on from the newest checkpoint.

    Raises:
        RequestError: the model answers too few problems right to learn from its own answers, or
            settings contradict each other.
        DataError: a problem cannot be used; with file and line.
        SandboxUnavailable: problems need programs to be run, which cannot be isolated here.
    """
    processes.only_one("grpo")
    mesh = mesh_of(options)
    model, aside = loaded(recipe.model, dtype="float32", quantized=False, mesh=mesh)
    _check(recipe, model)
    task = tasks.task(
        recipe.task, recipe.data, template=recipe.template, language=recipe.target_language
    )
    config = model.config

    def initial(params: Params) -> State:
        state = start(params, tx, recipe.seed)
        if recipe.objective.beta:
            return state._replace(extra={"reference": _reference(recipe, state.params)})
        return state

    tx = _optimiser(recipe, split_bias(zoo.abstract(config))[0])
    told = {
        "facts": {"problems": task.fingerprint}, "models": {"model": model.params | aside},
        "model": config, "tokenizer": model.tokenizer,
    }  # fmt: skip
    with Run(out, recipe, options, **told) as run:
        state = run.state(initial, model.params)
        step = learner(recipe, model, task, tx, state, run.ready)

        def whole(state: State) -> Model:
            return model._replace(params=with_bias(state.params, state.bias), source=None)

        if int(state.step) == 0:
            _check_learnable(recipe, model, task)

        def held_out(state: State) -> dict[str, Any]:
            found = measure(
                whole(state), task, recipe.held_out, max_tokens=recipe.max_tokens,
                temperature=recipe.temperature, top_p=1.0, slots=recipe.slots,
            )  # fmt: skip
            share = float(found.truncated.mean())
            sample = f"{found.problems[0].prompt} {found.completions[0][0].text}"
            return {"held_out": found.accuracy, "held_out_truncated": share, "sample": sample}

        def problems(at: int) -> list[Problem]:
            return tasks.batch(task.problems, recipe.prompts, recipe.seed, at)

        state = run.fit(
            step, state, problems, recipe.steps,
            on=[run.every(recipe.evaluate_every, held_out, last=True)],
        )  # fmt: skip
        trained = with_mtp(whole(state), aside)
        path = run.product("model", lambda path: zoo.save_hf(trained, path))
    return zoo.load(path, dtype="float32", mesh=mesh)


def learner(recipe: Recipe, model: Model, task: Task, tx, like: State, ready: Callable) -> Callable:
    """(state, problems) -> (state, metrics): one rollout and its updates.

    `like` is a state that is placed as all will be, `ready` is a run's, for the jitted update.
    """
    config, objective = model.config, recipe.objective
    width = recipe.prompt_tokens + recipe.max_tokens
    update = several(ready(jitted(updating(recipe, config, tx), like)))

    @functools.partial(jax.jit, static_argnames="temperature")
    def micro(params, tokens, temperature: float):
        found = score(config, params, tokens, temperature=temperature)
        experts = jnp.moveaxis(found.routing.indices, 1, 0) if found.routing else None
        return found.logprobs, experts if recipe.replay else None

    def reread(params, tokens, temperature: float = recipe.temperature):
        """Log-probabilities [N, T - 1] and, to be replayed, experts [N, L, T - 1, K]."""
        rows = recipe.prompts * recipe.answers // recipe.minibatches // recipe.accumulate
        cut = [tokens[i : i + rows] for i in range(0, len(tokens), rows)]
        found = [micro(params, part, temperature) for part in cut]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def policy(state: State) -> Params:
        return cast(with_bias(state.params, state.bias), recipe.compute)

    def recomputed(params, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`old`, and what the generator reported as `rollout`, at the same temperature."""
        old, experts = reread(params, batch["tokens"])
        reported = batch["old"]
        if recipe.temperature != 1.0:  # the difference at 1, where there is something to compare
            reported = old + reported - reread(params, batch["tokens"], 1.0)[0]
        found = {"old": old, "rollout": reported}
        return found if experts is None else found | {"experts": experts}

    def sample(state: State, problems: list[Problem], round: int) -> tuple[Trajectories, list]:
        made = rollout(
            config, policy(state),
            [encode(model, p.prompt, raw=p.raw).tokens for p in problems],
            answers=recipe.answers, max_tokens=recipe.max_tokens, width=width,
            eos_ids=tokenizer_of(model).eos_ids, temperature=recipe.temperature,
            seed=step_seed(recipe.seed, int(state.step), round), slots=recipe.slots,
        )  # fmt: skip

        def verdict(row: int) -> dict[str, float]:
            return judged(recipe, task, model, problems[made.group[row]], made, row)

        with ThreadPoolExecutor(os.cpu_count() if task.slow else 1) as pool:
            return made, list(pool.map(verdict, range(len(made.group))))

    def step(state: State, problems: list[Problem]) -> tuple[State, Metrics]:
        made, verdicts = sample(state, problems, 0)
        for round in range(1, recipe.dynamic_sampling + 1):
            gone = dead(_rewards(recipe, verdicts))
            if not gone.any():
                break
            at = int(state.step)
            fresh = tasks.batch(task.problems, int(gone.sum()), recipe.seed, at, round)
            made, verdicts = replaced(made, verdicts, gone, *sample(state, fresh, round))
        rewards = _rewards(recipe, verdicts)
        options: dict[str, Any] = {"scale": recipe.scale, "baseline": recipe.baseline}
        if recipe.combine == "sum":
            batch = _batch(recipe, made, rewards, advantages(rewards, **options))
        else:
            found = by_component(*_components(recipe, verdicts), **options)
            batch = _batch(recipe, made, rewards, found)
        if _recomputes(recipe):
            batch |= recomputed(policy(state), batch)
        if objective.beta:
            reference = with_bias(state.extra["reference"], state.bias)
            batch["reference"] = reread(reference, batch["tokens"])[0]
        parts = minibatches(batch | {"ends": made.ends}, recipe.minibatches)
        state, metrics = update(state, [shared(p, width, recipe.packed) for p in parts])
        every = recipe.reference_every
        if objective.beta and every and int(state.step) % every == 0:
            state = state._replace(extra={"reference": _reference(recipe, state.params)})
        metrics["sums"] |= figures(made, verdicts, rewards)
        metrics["sums"]["flops"] = flops_of_rows(config, made.ends)  # of the updates alone
        return state, metrics

    return step


def updating(recipe: Recipe, config: Config, tx: optax.GradientTransformation) -> Step:
    """(state, a mini-batch) -> (state, metrics)."""
    return train_step(
        learning(recipe, config), tx, recipe.accumulate, clip=recipe.clip,
        compute=recipe.compute,
    )  # fmt: skip


def learning(recipe: Recipe, config: Config) -> Loss:
    """The loss of an update, over batches of `_batch`, or of `shared`."""

    def loss(params, batch, key):
        del key
        found, counted = scored(
            config, params, batch, temperature=recipe.temperature, remat=recipe.remat
        )
        out = policy_loss(
            recipe.objective, found.logprobs, found.entropy, batch["old"], batch["advantages"],
            batch["mask"], longest=recipe.max_tokens, reference=batch.get("reference"),
            rollout=batch.get("rollout"),
        )  # fmt: skip
        if found.routing is not None:
            counts = functools.partial(expert_counts, experts=config.n_routed_experts, mask=counted)
            out.metrics["load"] = {"moe": jax.vmap(counts)(found.routing.indices)}
        return out

    return loss


def judged(
    recipe: Recipe, task: Task, model: Model, problem: Problem, made: Trajectories, row: int
) -> dict[str, float]:
    """Components of one answer's reward, from rules alone."""
    ids = made.answer(row)
    finished = not made.truncated[row]
    text = tokenizer_of(model).decode(ids[:-1] if finished else ids)
    opened = encode(model, problem.prompt, raw=problem.raw).thought
    verdict = dict(task.judge(problem, rules.THINK + text if opened else text, finished))
    if recipe.overlong_tokens:
        verdict["overlong"] = rules.overlong(len(ids), recipe.max_tokens, recipe.overlong_tokens)
    return verdict


def _components(recipe: Recipe, verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """Components of the reward, float64 [C, P, G], NaN in all where one is NaN; and weights [C]."""
    weights = {"accuracy": recipe.accuracy, "format": recipe.format, "language": recipe.language}
    return rules.components(verdicts, weights | {"overlong": 1.0}, recipe.answers)


def _rewards(recipe: Recipe, verdicts: Sequence[Verdict]) -> np.ndarray:
    """Sums of the weighted components, float64 [P, G]."""
    parts, weights = _components(recipe, verdicts)
    return np.tensordot(weights, parts, 1)


def _batch(
    recipe: Recipe, made: Trajectories, rewards: np.ndarray, advantage: np.ndarray
) -> dict[str, np.ndarray]:
    """Rows for the loss; position t is about token t + 1. Without a verdict, nothing counts."""
    mask = made.mask * ~np.isnan(rewards).reshape(-1, 1)
    if recipe.overlong == "mask":
        mask *= ~made.truncated[:, None]
    # Cut behind the longest answer, in large steps: few widths are compiled.
    width = min(made.tokens.shape[1], -(-int(made.ends.max()) // 64) * 64)
    return {
        "tokens": made.tokens[:, :width],
        "mask": mask[:, 1:width],
        "old": made.logprobs[:, 1:width],
        "advantages": advantage.reshape(-1),
    }


def _recomputes(recipe: Recipe) -> bool:
    """Whether pi_old is that of a pass of the trainer."""
    return recipe.old == "recomputed" or recipe.replay or recipe.temperature != 1.0


def _reference(recipe: Recipe, params: Params) -> Params:
    """A copy to compare with later; the policy's are donated to the next update."""
    return jax.tree.map(jnp.copy, cast(params, recipe.compute))


def _check(recipe: Recipe, model: Model) -> None:
    rows, parts, micro = recipe.prompts, recipe.minibatches, recipe.accumulate
    if rows % parts:
        raise RequestError(
            f"{rows} prompts do not form {parts} mini-batches of whole groups; take a multiple"
        )
    if rows // parts * recipe.answers % micro:
        raise RequestError(
            f"{rows // parts * recipe.answers} answers of a mini-batch do not form {micro}"
            " micro-batches; choose --accumulate so that it divides them"
        )
    if recipe.temperature <= 0:
        raise RequestError("the temperature must be above 0: greedy answers of a group are all one")
    if recipe.temperature != 1.0 and recipe.objective.correction != "none":
        raise RequestError(
            "the correction of rollouts needs temperature 1, at which the generator reports"
        )
    if recipe.objective.correction != "none" and not _recomputes(recipe):
        raise RequestError(
            "the correction of rollouts weighs the trainer's pi_old against the generator's, and"
            " --old rollout takes the latter for both; set --old recomputed"
        )
    if recipe.packed and (micro > 1 or recipe.replay):
        raise RequestError(
            "--packed puts an update's answers into rows of its own: no --accumulate, no --replay"
        )
    if recipe.replay and not model.config.num_moe_layers:
        raise RequestError(f"{recipe.model} has no experts to replay; leave out --replay")


def _check_learnable(recipe: Recipe, model: Model, task: Task) -> None:
    found = measure(
        model, task, min(recipe.held_out, 100), max_tokens=recipe.max_tokens,
        temperature=recipe.temperature, top_p=1.0, slots=recipe.slots, seed=recipe.seed,
    )  # fmt: skip
    if found.accuracy < recipe.least:
        raise RequestError(
            f"{recipe.model} answers {found.accuracy:.1%} of {len(found.problems)} problems right;"
            f" below {recipe.least:.0%} nearly every group of {recipe.answers} has no right answer"
            " and nothing is learned: fine-tune it first (deepzoo train sft), take easier problems,"
            " or set --least"
        )


def rate(recipe: Recipe) -> Schedule:
    """Update -> learning rate."""
    updates = recipe.steps * recipe.minibatches
    return scaled(recipe.rate, warmup_constant_decay(updates, recipe.warmup, recipe.decay))


def _optimiser(recipe: Recipe, params: Params) -> optax.GradientTransformation:
    """Of the policy; `params` are its parameters or shapes, without router biases."""
    return adamw(
        params, rate(recipe), decay=0.0, b1=recipe.beta1, b2=recipe.beta2, state=recipe.moments
    )


if __name__ == "__main__":
    main(train, PRESETS, __doc__)

"""Direct preference optimisation from pairs of answers, one better than the other.

    deepzoo train dpo --preset nano --out DIR

Paper: DPO (arXiv 2305.18290, eq. 7): with h = log pi - log pi_ref of a whole answer, the loss is
-log sigmoid(beta (h_chosen - h_rejected)). DeepSeek's own preference stages use reinforcement
learning with reward models that are not public (V2, arXiv 2405.04434, 4.2); this is the way to
learn from preferences without one.

Pairs come from records {"prompt", "chosen", "rejected"}, or, for a task with a verifier, from the
model's own answers to training problems: a right one and a wrong one of the same problem.

Deviations:
* `nll` adds the chosen answer's mean negative log-likelihood, which keeps its probability from
  falling with the other's (arXiv 2404.19733, eq. 1); 0, the default, is the paper's loss;
* the reference's log-probabilities are computed once, before the first step.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from deepzoo import zoo
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.documents import pair
from deepzoo.recipes.parts.flops import counted
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.mesh import spread
from deepzoo.recipes.parts.mtp import loaded, with_mtp
from deepzoo.recipes.parts.optim import adamw
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.rollout import rollout, step_seed
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.recipes.parts.sample import sample
from deepzoo.recipes.parts.schedules import Schedule, scaled, warmup_cosine
from deepzoo.recipes.parts.step import Loss, Output, State, Step, jitted, start, train_step
from deepzoo.zoo.config import Config
from deepzoo.zoo.fingerprint import digest
from deepzoo.zoo.model import Params
from deepzoo.zoo.prompt import encode, tokenizer_of
from deepzoo.zoo.types import Model

type Pairs = dict[str, np.ndarray]
"""tokens int32 [N, 2, T], mask float32 [N, 2, T - 1] of the answers' tokens as targets; index 0 is
the chosen one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run of preference optimisation."""

    model: str = "v2-nano"
    """Where it starts, and the reference: a shipped model or a directory."""
    data: str = ""
    """File or folder of records; instead of `task`."""
    task: str = "arithmetic"
    """Problems whose right and wrong answers are the pairs, where there is no `data`."""
    problems: int = 256
    """Training problems of `task` to answer."""
    answers: int = 8
    """Answers of each."""
    format: str | None = None
    """Chat format, instead of the model's own."""
    epochs: int = 1
    """Times that each pair is seen."""
    pairs: int = 8
    """Pairs of a batch."""
    length: int = 128
    """Tokens of prompt and answer."""
    beta: float = 0.1
    """How strongly the policy is held at the reference."""
    nll: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood."""
    rate: float = 1e-4
    """Peak learning rate of AdamW."""
    last: float = 0.1
    """Share of the peak that is left at the end of the cosine."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Micro-batches of a batch."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out problems of `task`; 0 for one at the end."""
    held_out: int = 200
    """Problems of an evaluation; 0 for none."""
    sample_every: int = 5
    """Steps between samples of text, behind held-out problems or prompts of `data`; 0 for none."""
    seed: int = 0
    """Of answers and order."""


PRESETS = {
    "nano": Recipe(),
    # The customary settings for a student of 7B: R1-Distill-Qwen-7B with preference records.
    "distill_qwen_7b": Recipe(
        model="deepseek-r1-distill-qwen-7b", data="data", task="", epochs=1, pairs=64, length=4096,
        rate=5e-7, accumulate=64, remat="full", held_out=0, sample_every=0,
    ),
}  # fmt: skip


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Trains; writes `out`/model in the published layout and returns it.

    Pairs of the model's own answers are kept in `out`/pairs.npz. Called again for the same
    directory, it goes on from the newest checkpoint.

    Raises:
        DataError: the data cannot be used; or the model's answers hold no pair.
    """
    mesh = mesh_of(options)
    model, aside = loaded(recipe.model, dtype="float32", quantized=False, mesh=mesh)
    config = model.config
    given = from_records(recipe, model) if recipe.data else None
    told: dict[str, Any] = {"models": {"model": model.params | aside}}
    if given is not None:
        told["facts"] = {"pairs": len(given["tokens"]), "data": digest(given)}
    with Run(out, recipe, options, model=config, tokenizer=model.tokenizer, **told) as run:
        made = own_pairs(recipe, run, model) if given is None else given
        count = len(made["tokens"])
        steps = -(-count * recipe.epochs // recipe.pairs)
        step, tx = learner(recipe, config, steps)
        reference = reference_logprobs(config, model.params, made, recipe.pairs, mesh)
        state = run.state(lambda params: start(params, tx, recipe.seed), model.params)

        def batch(at: int) -> dict[str, np.ndarray]:
            import grain

            order: Any = grain.MapDataset.source(range(count)).seed(recipe.seed).shuffle().repeat()
            rows = np.array([order[at * recipe.pairs + i] for i in range(recipe.pairs)])
            return {k: a[rows] for k, a in made.items()} | {"reference": reference[rows]}

        def whole(state: State) -> Model:
            return model._replace(params=with_bias(state.params, state.bias), source=None)

        def held_out(state: State) -> dict[str, Any]:
            found = measure(
                processes.local(whole(state)), tasks.task(recipe.task), recipe.held_out,
                max_tokens=recipe.length, temperature=1.0, top_p=1.0,
            )  # fmt: skip
            return {"held_out": found.accuracy}

        def look(state: State) -> dict[str, str]:
            at = int(state.step)
            ids, mask = made["tokens"][at % count, 0], made["mask"][at % count, 0]
            source = tasks.task(recipe.task) if recipe.task else ids[: mask.argmax() + 1].tolist()
            return sample(whole(state), source, recipe.seed, at, format=recipe.format)

        hooks = [run.every(recipe.sample_every, look)]
        if recipe.held_out and recipe.task:
            hooks.append(run.every(recipe.evaluate_every, held_out, last=True))
        state = run.fit(jitted(step, state), state, batch, steps, on=hooks)
        trained = processes.for_first(with_mtp(whole(state), aside))
        path = run.product("model", lambda path: zoo.save_hf(trained, path))
    return zoo.load(path, dtype="float32", mesh=mesh)


def rate(recipe: Recipe, steps: int) -> Schedule:
    """Step -> learning rate."""
    return scaled(recipe.rate, warmup_cosine(steps, round(recipe.warmup * steps), recipe.last))


def learner(
    recipe: Recipe, config: Config, steps: int
) -> tuple[Step, optax.GradientTransformation]:
    """The step and its optimiser, of a run of `steps`."""
    shape = zoo.abstract(dataclasses.replace(config, dtype="float32"))
    tx = adamw(split_bias(shape)[0], rate(recipe, steps), decay=0.0)
    loss = preference(config, beta=recipe.beta, nll=recipe.nll, remat=recipe.remat)
    return train_step(loss, tx, recipe.accumulate, clip=recipe.clip), tx


def preference(config: Config, *, beta: float, nll: float = 0.0, remat: bool | str = False) -> Loss:
    """DPO's loss over batches of `Pairs` with "reference" float32 [B, 2], summed log-probabilities.

    Metrics: accuracy, the share of pairs whose chosen answer gained more than the other; margin,
    beta (h_chosen - h_rejected); chosen and rejected, h of each; and those of `flops.counted`.
    """

    def loss(params, batch, key) -> Output:
        del key
        tokens, mask = batch["tokens"], batch["mask"]
        rows = tokens.reshape(-1, tokens.shape[-1])
        found = score(config, params, rows, remat=remat).logprobs.reshape(mask.shape)
        logprobs = (found * mask).sum(axis=-1)
        gained = logprobs - batch["reference"]
        margin = beta * (gained[:, 0] - gained[:, 1])
        total = -jax.nn.log_sigmoid(margin)
        if nll:
            total = total - nll * logprobs[:, 0] / jnp.maximum(mask[:, 0].sum(axis=-1), 1)
        metrics = {
            "accuracy": (margin > 0).sum(), "margin": margin.sum(),
            "chosen": gained[:, 0].sum(), "rejected": gained[:, 1].sum(),
        }  # fmt: skip
        # Padding lies behind the last token of each answer, which is a target.
        at = jnp.arange(rows.shape[1])
        last = (at[1:] * (mask > 0)).max(axis=-1).reshape(-1, 1)
        metrics |= counted(config, jnp.where(at <= last, 0, -1))
        return Output(total.sum(), jnp.float32(len(total)), metrics)

    return loss


def reference_logprobs(
    config: Config, params: Params, made: Pairs, rows: int, mesh: Mesh | None = None
) -> np.ndarray:
    """Summed log-probability of every answer under the reference, float32 [N, 2]."""

    @jax.jit
    def part(params, tokens, mask):
        found = score(config, params, tokens.reshape(-1, tokens.shape[-1])).logprobs
        return (found.reshape(mask.shape) * mask).sum(axis=-1)

    count = len(made["tokens"])
    spare = -count % rows
    padded = {k: np.concatenate([a, a[:1].repeat(spare, axis=0)]) for k, a in made.items()}
    cut = ({k: a[i : i + rows] for k, a in padded.items()} for i in range(0, count, rows))
    parts = [part(params, **(some if mesh is None else spread(some, mesh))) for some in cut]
    return np.concatenate([processes.on_host(a) for a in parts])[:count]


def from_records(recipe: Recipe, model: Model) -> Pairs:
    """Pairs of records {"prompt", "chosen", "rejected"}.

    Raises:
        DataError: a field is missing, or an answer does not fit into `length`; with file and line.
    """
    records = read(recipe.data)
    found = []
    for i in range(len(records)):
        prompt = records.field(i, "prompt")
        both = [
            pair(model, prompt, records.field(i, kind), format=recipe.format)
            for kind in ("chosen", "rejected")
        ]
        found.append((both, records.places[i]))
    return _padded(recipe, found)


def own_pairs(recipe: Recipe, run: Run, model: Model) -> Pairs:
    """Pairs of `from_answers`, kept in the run's directory: another mesh rounds in another way, and
    so might answer otherwise.

    Raises:
        DataError: see `from_answers`.
    """
    path = run.out / "pairs.npz"
    if not processes.decided(path.exists()):
        run.say(f"{recipe.model} answers {recipe.problems} problems")
        made = from_answers(recipe, model)
        processes.same({"pairs": digest(made)})  # each has written the answers itself

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **made)  # pyright: ignore[reportArgumentType]

        run.product(path.name, write)
    with np.load(path) as file:
        return dict(file)


def from_answers(recipe: Recipe, model: Model) -> Pairs:
    """Pairs of the model's own answers to training problems: the first right and first wrong one.

    Raises:
        DataError: no problem has both a right and a wrong answer.
    """
    task, tokenizer = tasks.task(recipe.task), tokenizer_of(model)
    asked = tasks.batch(task.problems, recipe.problems, recipe.seed)
    prompts = [encode(model, p.prompt, raw=p.raw, format=recipe.format).tokens for p in asked]
    longest = max(map(len, prompts))
    made = rollout(
        model.config, processes.local(model.params), prompts, answers=recipe.answers,
        max_tokens=recipe.length - longest, width=recipe.length, eos_ids=tokenizer.eos_ids,
        seed=step_seed(recipe.seed, 0),
    )  # fmt: skip
    found = []
    for p, problem in enumerate(asked):
        first: dict[bool, int] = {}
        for row in np.flatnonzero(made.group == p).tolist():
            if made.truncated[row]:
                continue
            text = tokenizer.decode(made.answer(row)[:-1])
            first.setdefault(task.judge(problem, text, True).get("accuracy") == 1.0, row)
        if len(first) == 2:
            both = [
                (prompts[p] + made.answer(row), len(prompts[p]))
                for row in (first[True], first[False])
            ]
            found.append((both, problem.prompt))
    if not found:
        raise DataError(
            f"no problem of {len(asked)} has a right and a wrong answer among {recipe.answers};"
            " take harder or easier problems, or more answers"
        )
    return _padded(recipe, found)


def _padded(recipe: Recipe, found: list) -> Pairs:
    tokens = np.zeros((len(found), 2, recipe.length), np.int32)
    mask = np.zeros((len(found), 2, recipe.length - 1), np.float32)
    for i, (both, place) in enumerate(found):
        for j, (ids, given) in enumerate(both):
            if len(ids) > recipe.length:
                raise DataError(
                    f"{place}: prompt and answer have {len(ids)} tokens, there is room for"
                    f" {recipe.length}; raise --length"
                )
            tokens[i, j, : len(ids)] = ids
            mask[i, j, given - 1 : len(ids) - 1] = 1
    return {"tokens": tokens, "mask": mask}


if __name__ == "__main__":
    main(train, PRESETS, __doc__)

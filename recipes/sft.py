"""Supervised fine-tuning on packed conversations, prompts with completions, or plain text.

    deepzoo train sft --preset nano --out DIR

Papers: V3's fine-tuning (arXiv 2412.19437, 5.1): 1.5M samples, 2 epochs, cosine from 5e-6 to 1e-6,
several samples in a row that do not see each other. R1 (arXiv 2501.12948; supplement B.4.2 of the
article in Nature 645, 2025): the cold start and the fine-tuning on 800K samples, cosine from 5e-5
to 5e-6, 32,768 tokens, batches of 128, two to three epochs from V3-Base.

Only completions are learned (`recipes/parts/documents.py` says what a record may hold). With
`lora_rank` only low-rank adapters are trained (`recipes/parts/lora.py`): they are written to
`out`/adapter, which PEFT opens, and merged into `out`/model.

Deviations:
* the papers do not say what happens with samples longer than a row: `overlong` asks;
* AdamW as in pretraining (betas 0.9 and 0.95); the papers do not name it for this stage.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from deepzoo import zoo
from deepzoo.recipes.parts import lora, processes
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.documents import Documents, documents, encoded, pair
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.mtp import loaded, with_mtp
from deepzoo.recipes.parts.optim import Bytes, adamw
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.rows import Overlong, Rows
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.recipes.parts.sample import sample
from deepzoo.recipes.parts.schedules import Schedule, scaled, warmup_cosine
from deepzoo.recipes.parts.step import State, jitted, start, train_step
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One fine-tuning."""

    model: str = "v2-nano"
    """Where it starts: a shipped model or a directory."""
    data: str = ""
    """File or folder of records; instead of `task`."""
    task: str = "arithmetic-long"
    """Problems whose written-out solutions are learned, where there is no `data`."""
    samples: int = 1024
    """Solutions of `task` to learn from."""
    format: str | None = None
    """Chat format, instead of the model's own."""
    epochs: int = 2
    """Times that each sample is seen."""
    rows: int = 8
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    split: bool = False
    """Cut the joined samples into full rows, instead of keeping each whole."""
    masked: bool = True
    """Samples of a row do not see each other."""
    overlong: Overlong = "error"
    """What to do with a sample that is longer than a row."""
    rate: float = 1e-3
    """Peak learning rate of AdamW."""
    last: float = 0.1
    """Share of the peak that is left at the end of the cosine."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """Of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Micro-batches of a batch."""
    mtp: float = 0.0
    """Weight of the loss of multi-token prediction; 0 leaves a model's MTP layers as they are."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's arithmetic; parameters are kept in float32."""
    moments: Bytes = "float32"
    """Dtype of the optimiser's state."""
    lora_rank: int = 0
    """Rank of low-rank adapters; 0 trains the whole model."""
    lora_alpha: float = 16.0
    """Their factor, times the rank."""
    lora_targets: tuple[lora.Target, ...] = ("attention",)
    """Linear layers that get one."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out problems of `task`; 0 for one at the end."""
    held_out: int = 200
    """Problems of an evaluation; 0 for none."""
    sample_every: int = 25
    """Steps between samples of text, behind held-out problems or prompts of `data`; 0 for none."""
    seed: int = 0
    """Of the order of samples."""


_R1 = Recipe(
    model="deepseek-v3-base", data="data", task="", epochs=2, rows=128, length=32768, rate=5e-5,
    warmup=0.0, weight_decay=0.1, accumulate=128, remat="full", compute="bfloat16", held_out=0,
    sample_every=0,
)  # fmt: skip
PRESETS = {
    "nano": Recipe(),
    "v3_sft": dataclasses.replace(_R1, rate=5e-6, last=0.2),
    "r1_cold_start": _R1,
    "r1_sft": _R1,
}


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Fine-tunes; writes `out`/model in the published layout and returns it.

    Called again for the same directory, it goes on from the newest checkpoint.

    Raises:
        DataError: the data cannot be used; with file and line.
        RequestError: `mtp` with low-rank adapters, or for a model without MTP layers.
    """
    if recipe.mtp and recipe.lora_rank:
        raise RequestError(
            f"--mtp {recipe.mtp}: low-rank adapters leave no MTP layer to train; use --mtp 0"
        )
    # Frozen parameters need no float32 master copy; FP8 weights and their scales stay as they are.
    dtype, frozen = recipe.compute if recipe.lora_rank else "float32", recipe.lora_rank > 0
    mesh = mesh_of(options)
    model, aside = loaded(recipe.model, recipe.mtp, dtype=dtype, quantized=frozen, mesh=mesh)
    config = model.config
    made = samples(recipe, model)
    rows = Rows(
        made, rows=recipe.rows, length=recipe.length, split=recipe.split, masked=recipe.masked,
        overlong=recipe.overlong, seed=recipe.seed,
    )  # fmt: skip
    steps = rows.steps(recipe.epochs)

    def adapters() -> Params:
        key = jax.random.key(recipe.seed)
        return lora.init(config, recipe.lora_rank, recipe.lora_targets, key)

    shapes = jax.eval_shape(adapters) if recipe.lora_rank else model.params
    tx = optimiser(recipe, shapes, steps)
    facts = {"tokens": int(made.starts[-1]), "data": made.fingerprint}
    told = {
        "facts": facts, "models": {"model": model.params | aside}, "tokenizer": model.tokenizer,
        "model": None if recipe.lora_rank else config,  # checkpoints hold the adapters alone
        "frozen": config if recipe.lora_rank else None,
    }  # fmt: skip
    with Run(out, recipe, options, **told) as run:
        if recipe.lora_rank:
            state = run.state(lambda: start(adapters(), tx, recipe.seed))
        else:
            state = run.state(lambda params: start(params, tx, recipe.seed), model.params)

        def whole(state: State) -> Model:
            params = with_bias(state.params, state.bias)
            if recipe.lora_rank:
                params = lora.merge(config, model.params, params, recipe.lora_alpha)
            return model._replace(params=params, source=None)

        def held_out(state: State) -> dict[str, Any]:
            found = measure(
                processes.local(whole(state)), tasks.task(recipe.task), recipe.held_out,
                max_tokens=recipe.length, temperature=0.0,
            )  # fmt: skip
            return {"held_out": found.accuracy, "held_out_truncated": float(found.truncated.mean())}

        def look(state: State) -> dict[str, str]:
            at = int(state.step)
            source = tasks.task(recipe.task) if recipe.task else made.prompt(at)
            return sample(whole(state), source, recipe.seed, at, format=recipe.format)

        hooks = [run.every(recipe.sample_every, look)]
        if recipe.held_out and recipe.task:
            hooks.append(run.every(recipe.evaluate_every, held_out, last=True))
        state = run.fit(learner(recipe, model, tx, state), state, rows, steps, on=hooks)
        complete = processes.for_first(with_mtp(whole(state), aside))
        path = run.product("model", lambda path: zoo.save_hf(complete, path))
        if recipe.lora_rank:
            adapter = functools.partial(
                lora.export, config, processes.for_first(state.params), recipe.lora_alpha,
                base=recipe.model,
            )  # fmt: skip
            run.product("adapter", adapter)
    return zoo.load(path, dtype="float32", mesh=mesh)


def rate(recipe: Recipe, steps: int) -> Schedule:
    """Step -> learning rate."""
    return scaled(recipe.rate, warmup_cosine(steps, round(recipe.warmup * steps), recipe.last))


def optimiser(recipe: Recipe, params: Params, steps: int) -> optax.GradientTransformation:
    """Of a run of `steps`; `params` may be shapes."""
    return adamw(
        split_bias(params)[0], rate(recipe, steps), decay=recipe.weight_decay, state=recipe.moments
    )


def learner(
    recipe: Recipe, model: Model, tx: optax.GradientTransformation, state: State
) -> Callable:
    """(state, batch) -> (state, metrics) of the whole model or of its adapters."""
    loss = next_token(model.config, mtp=recipe.mtp, remat=recipe.remat)
    combine = lora.combine(recipe.lora_alpha, recipe.lora_rank) if recipe.lora_rank else None
    step = train_step(
        loss, tx, recipe.accumulate, clip=recipe.clip, combine=combine,
        compute=recipe.compute,
    )  # fmt: skip
    return jitted(step, state, model.params if recipe.lora_rank else None)


def samples(recipe: Recipe, model: Model) -> Documents:
    """What is learned: records of `data`, or solutions of training problems of `task`."""
    if recipe.data:
        return encoded(model, read(recipe.data), format=recipe.format)
    task = tasks.task(recipe.task)
    if task.solution is None:
        raise DataError(f"task {recipe.task} has no written solutions; give --data")
    asked = tasks.batch(task.problems, recipe.samples, recipe.seed)
    pairs = [
        pair(model, p.prompt, task.solution(p), raw=p.raw, format=recipe.format) for p in asked
    ]
    return documents(pairs, [p.prompt for p in asked], model.config.vocab_size)


if __name__ == "__main__":
    main(train, PRESETS, __doc__)

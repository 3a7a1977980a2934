"""Steps of R1's preset `small`: programs for the compiler of an absent GPU, run by nobody."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.kernels.cases import Case
from deepzoo.recipes import grpo, pretrain, r1
from deepzoo.recipes.parts import countdown_tokenizer
from deepzoo.recipes.parts.bias import split_bias
from deepzoo.recipes.parts.step import State, start, train_step
from deepzoo.zoo.tokenizer import Tokenizer

STAGES = {s.name: s.settings for s in r1.plan(r1.PRESETS["small"], Path("out"))}
CONFIG = STAGES["base"].config


def _pretraining() -> Case:
    recipe = STAGES["base"]
    step, tx = pretrain.learner(recipe)
    tokenizer = Tokenizer(countdown_tokenizer.tokenizer_files(), CONFIG)

    def inputs(seed: int) -> tuple[Any, ...]:
        params = zoo.init(CONFIG, jax.random.key(seed))
        return start(params, tx, seed), pretrain.countdown(tokenizer, recipe)(0)

    return _case("pretraining", step, inputs)


def _reinforcement() -> Case:
    recipe = STAGES["rl-1"]
    tx = grpo._optimiser(recipe, split_bias(zoo.abstract(CONFIG))[0])
    step = train_step(grpo.learning(recipe, CONFIG), tx, recipe.accumulate, clip=recipe.clip)
    rows, width = recipe.prompts * recipe.answers, recipe.prompt_tokens + recipe.max_tokens

    def inputs(seed: int) -> tuple[Any, ...]:
        batch = {name: jnp.zeros((rows, width - 1)) for name in ("mask", "old")}
        batch |= {"advantages": jnp.zeros(rows), "tokens": jnp.zeros((rows, width), jnp.int32)}
        return start(zoo.init(CONFIG, jax.random.key(seed)), tx, seed), batch

    return _case("reinforcement", step, inputs)


def _case(name: str, step: Callable, inputs: Callable[[int], tuple[Any, ...]]) -> Case:
    def bind(form: str) -> Callable[..., Any]:
        def run(state: State, batch: dict[str, jax.Array]) -> Any:
            return step(state, batch)

        return run

    return Case("step", name, ("auto",), bind, inputs, 1.0, 1.0)


CASES = (_pretraining(), _reinforcement())

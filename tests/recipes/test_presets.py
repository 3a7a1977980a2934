"""The papers' presets at full size, by shapes alone: nothing is allocated, nothing is computed.

`uv run pytest tests/recipes/test_presets.py -rP` prints what a device holds. Pretraining's presets:
tests/recipes/test_pretrain.py.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from deepzoo import zoo
from deepzoo.recipes import distill, dpo, evaluate, extend, grpo, pretrain, r1, reject, sft
from deepzoo.recipes.parts.bias import split_bias
from deepzoo.recipes.parts.memory import planned
from deepzoo.recipes.parts.mesh import placements
from deepzoo.recipes.parts.step import State, Step, cast, start
from deepzoo.zoo.config import Config
from deepzoo.zoo.target import target_config
from deepzoo.zoo.types import Model

# Models that presets name but the zoo does not list -> one of the same architecture.
LIKE = {
    "Qwen2.5-Math-1.5B": "deepseek-r1-distill-qwen-1.5b",
    "Qwen2.5-Math-7B": "deepseek-r1-distill-qwen-7b",
    "Qwen2.5-14B": "deepseek-r1-distill-qwen-14b",
    "Qwen2.5-32B": "deepseek-r1-distill-qwen-32b",
    "Llama-3.1-8B": "deepseek-r1-distill-llama-8b",
    "Llama-3.3-70B-Instruct": "deepseek-r1-distill-llama-70b",
}
STEPS = 1000  # of runs whose length follows from the data


class Planned(NamedTuple):
    """A step: the model, the first state, batches by name, and (step, its rate)s of the paper."""

    config: Config
    step: Step
    state: State
    batches: dict[str, Any]
    rates: dict[int, float]
    rate: Any


def config_of(name: str, *, mtp: bool = False, dtype: str = "float32") -> Config:
    """Of the model that a recipe trains (float32) or samples from: not quantised."""
    if name.startswith("runs/v"):  # what a preset of pretraining made
        found = pretrain.PRESETS[name.split("/")[1]].config
    else:
        found = zoo.config("deepseek-v3-base" if name.startswith("runs/") else LIKE.get(name, name))
    return target_config(found, dtype, quantized=False, mtp=mtp)


def first(config: Config, tx, *, reference: bool = False) -> State:
    """The state before the first step."""

    def made(params) -> State:
        state = start(params, tx, 0)
        extra = {"reference": cast(state.params, "bfloat16")} if reference else {}
        return state._replace(extra=extra)

    return jax.eval_shape(made, zoo.abstract(config))


def rows(count: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `rows.Rows`."""
    shape = (count, length + 1)
    kinds = {"tokens": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}


def of_sft(preset: str) -> Planned:
    recipe = sft.PRESETS[preset]
    config = config_of(recipe.model, mtp=recipe.mtp > 0)
    tx = sft.optimiser(recipe, zoo.abstract(config), STEPS)
    state = first(config, tx)
    step = sft.learner(recipe, Model(config, zoo.abstract(config), None), tx, state)
    ends = {"v3_sft": (5e-6, 1e-6)}.get(preset, (5e-5, 5e-6))  # V3, 5.1; R1, B.4.2
    rates = {0: ends[0], 500: sum(ends) / 2, STEPS - 1: ends[1]}
    batch = {"": rows(recipe.rows, recipe.length)}
    return Planned(config, step, state, batch, rates, sft.rate(recipe, STEPS))


def of_distill(preset: str) -> Planned:
    recipe = distill.PRESETS[preset]
    config = config_of(recipe.student)
    tx = distill.optimiser(recipe, zoo.abstract(config), STEPS)
    state = first(config, tx)
    student = Model(config, zoo.abstract(config), None)
    step = distill.learner(recipe, tx, None, student, state)
    peak = {
        "r1_qwen_1_5b": 1e-4, "r1_qwen_7b": 8e-5, "r1_qwen_14b": 7e-5, "r1_qwen_32b": 6e-5,
        "r1_llama_8b": 5e-5, "r1_llama_70b": 2e-5,
    }[preset]  # fmt: skip
    rates = {0: peak, 500: 0.55 * peak, STEPS - 1: 0.1 * peak}  # R1, B.4.3, table 6
    batch = {"": rows(recipe.rows, recipe.length)}
    return Planned(config, step, state, batch, rates, distill.rate(recipe, STEPS))


def of_extend(preset: str) -> Planned:
    recipe = extend.PRESETS[preset]
    config = extend.extended(config_of(recipe.model, mtp=recipe.mtp > 0), recipe)
    step, tx = extend.learner(recipe, config)
    batches = {str(n): rows(b, n) for b, n in zip(recipe.rows, recipe.lengths, strict=True)}
    last = {"v2_32k": 2.4e-4 * 0.316**2, "v3_32k_128k": 7.3e-6}[preset]  # of pretraining; V3, 4.3
    end = sum(recipe.batches)
    rates = dict.fromkeys((0, end // 2, end - 1), last)
    return Planned(config, step, first(config, tx), batches, rates, extend.rate(recipe))


def of_grpo(preset: str) -> Planned:
    recipe = grpo.PRESETS[preset]
    config = config_of(recipe.model)
    tx = grpo._optimiser(recipe, split_bias(zoo.abstract(config))[0])
    state = first(config, tx, reference=recipe.objective.beta > 0)
    count = recipe.prompts * recipe.answers // recipe.minibatches
    width = recipe.prompt_tokens + recipe.max_tokens
    batch: dict[str, Any] = {"tokens": jax.ShapeDtypeStruct((count, width), jnp.int32)}
    told = ["mask", "old", *(["reference"] if recipe.objective.beta else [])]
    told += ["rollout"] if recipe.temperature != 1 else []
    batch |= {name: jax.ShapeDtypeStruct((count, width - 1), jnp.float32) for name in told}
    batch["advantages"] = jax.ShapeDtypeStruct((count,), jnp.float32)
    step = grpo.updating(recipe, config, tx)
    updates = recipe.steps * recipe.minibatches
    rates = dict.fromkeys((0, updates // 2, updates - 1), 3e-6)  # R1, Methods
    return Planned(config, step, state, {"": batch}, rates, grpo.rate(recipe))


def of_dpo(preset: str) -> Planned:
    recipe = dpo.PRESETS[preset]
    config = config_of(recipe.model)
    step, tx = dpo.learner(recipe, config, STEPS)
    shapes = {"tokens": (2, recipe.length), "mask": (2, recipe.length - 1), "reference": (2,)}
    batch = {
        k: jax.ShapeDtypeStruct((recipe.pairs, *n), jnp.int32 if k == "tokens" else jnp.float32)
        for k, n in shapes.items()
    }
    rates = {0: 5e-9, 99: 5e-7, STEPS - 1: 5e-8}
    return Planned(config, step, first(config, tx), {"": batch}, rates, dpo.rate(recipe, STEPS))


TRAINED = {
    (recipe.__name__.rpartition(".")[2], preset): make
    for recipe, make in (
        (sft, of_sft), (distill, of_distill), (extend, of_extend), (grpo, of_grpo), (dpo, of_dpo),
    )
    for preset in recipe.PRESETS if preset != "nano"
}  # fmt: skip


def kinds(tree: Any) -> Any:
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def on_a_fleet(config: Config, state: State) -> tuple[State, int]:
    """The state as it is divided: V3 over 2,048 GPUs, as it was trained; others over fewer."""
    sizes = (1, 16, 16, 8) if config.n_routed_experts else (1, 64, 1, 1)
    axes = ("data", "fsdp", "expert", "tensor")
    mesh: Any = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * 4)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        state,
        placements(state, config, mesh),
    ), math.prod(sizes)


@pytest.mark.parametrize(("recipe", "preset"), TRAINED)
def test_a_preset_makes_a_step_of_the_whole_model(recipe: str, preset: str):
    plan = TRAINED[recipe, preset](preset)
    found = {at: float(plan.rate(at)) for at in plan.rates}
    assert found == pytest.approx(plan.rates, rel=2e-3)
    for batch in plan.batches.values():
        after, metrics = jax.eval_shape(plan.step, plan.state, batch)
        assert kinds(after) == kinds(plan.state)
        assert (metrics["loss"].shape, metrics["loss"].dtype) == ((), jnp.float32)
    assert {a.dtype for a in jax.tree.leaves(plan.state.params)} == {jnp.dtype("float32")}
    whole = sum(a.size for a in jax.tree.leaves(plan.state.params))
    divided, devices = on_a_fleet(plan.config, plan.state)
    line = planned(divided)
    print(f"{recipe} {preset}: {whole / 1e9:.1f}B parameters on {devices} devices, {line}")
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(divided.params))
    # With experts, what lies behind the latents is divided by heads alone.
    assert (
        whole / devices <= held < (3.3 if plan.config.n_routed_experts else 1.1) * whole / devices
    )
    size, unit = re.findall(r"per device: ([0-9.]+) ([MG])iB and activations", line)[0]
    assert float(size) < {"M": 1024, "G": 80}[unit]


@pytest.mark.parametrize(
    ("name", "slots", "width", "cache"),
    [  # bytes a token: (512 + 64) * 61 layers; keys and values, 2 heads of 128, 28 layers
        ("reject", reject.PRESETS["r1_600k"].slots, 4096 + 32768, 2 * (512 + 64) * 61),
        ("evaluate", evaluate.PRESETS["aime_like"].slots, 4096 + 32768, 2 * 2 * 2 * 128 * 28),
    ],
)
def test_a_preset_that_samples_makes_a_step_of_decoding(name, slots, width, cache):
    recipe = {"reject": reject.PRESETS["r1_600k"], "evaluate": evaluate.PRESETS["aime_like"]}[name]
    config = config_of(recipe.model, dtype=recipe.dtype)
    params = zoo.abstract(config)
    assert params["embed_tokens"]["weight"].dtype == jnp.bfloat16
    empty = jax.eval_shape(lambda: zoo.cache(config, slots, width))
    tokens = jax.ShapeDtypeStruct((slots, 1), jnp.int32)
    out = jax.eval_shape(lambda p, t, c: zoo.apply(config, p, t, cache=c), params, tokens, empty)
    assert out.logits.shape == (slots, 1, config.vocab_size)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(empty.layers))
    assert held == slots * width * cache
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    print(f"{name}: {weights / 2**30:.0f} GiB of weights, {held / 2**30:.0f} GiB of cache")


def test_the_numbers_of_the_papers():
    """Batches, lengths and counts that are no rates: R1, Methods and B.4; V3, 5.1."""
    zero, one, two = (grpo.PRESETS[n] for n in ("r1_zero", "r1_stage1", "r1_stage2"))
    for recipe in (zero, one, two):
        assert (recipe.answers, recipe.max_tokens, recipe.objective.beta) == (16, 32768, 0.001)
        assert recipe.prompts * recipe.answers == 8192  # outputs of a rollout
        assert recipe.prompts * recipe.answers // recipe.minibatches == 512  # 32 questions
        assert recipe.reference_every * recipe.minibatches == 400
        assert recipe.compute == "bfloat16"
        assert (recipe.objective.clip_low, recipe.objective.clip_high) == (10, 10)
    assert zero.steps * zero.minibatches == 10_400
    assert two.steps * two.minibatches == pytest.approx(1700, abs=8)
    assert [r.temperature for r in (zero, one, two)] == [1.0, 1.0, 0.7]
    assert (zero.accuracy, zero.format, zero.language) == (1, 1, 0)
    assert (one.language, two.language) == (1, 1)
    for name in ("r1_cold_start", "r1_sft"):
        recipe = sft.PRESETS[name]
        assert (recipe.rows, recipe.length) == (128, 32768)
        assert recipe.epochs in (2, 3)
    assert sft.PRESETS["v3_sft"].epochs == 2
    assert sft.PRESETS["v3_sft"].masked
    for name, recipe in distill.PRESETS.items():
        if name != "nano":
            assert (recipe.rows, recipe.length) == (64, 32768)
            assert recipe.epochs in (2, 3)
    kept = reject.PRESETS["r1_600k"]
    assert kept.prompts * kept.per_problem == 600_000
    sampled = evaluate.PRESETS["aime_like"]
    assert (sampled.temperature, sampled.top_p, sampled.samples) == (0.6, 0.95, 64)
    assert (sampled.max_tokens, sampled.majorities) == (32768, (64,))
    paper = r1.PRESETS["paper"]
    assert 1 / (1 + 3) == paper.share  # 200K of 800K samples
    assert dataclasses.replace(paper.student_rl, rate=zero.rate) == paper.zero

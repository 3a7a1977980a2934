"""GRPO's recipe: rollouts that the trainer agrees with, groups, options, refusals, and that it
learns."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.recipes import grpo, sft
from deepzoo.recipes.grpo import PRESETS
from deepzoo.recipes.parts import log
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts import tasks as arithmetic
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.bias import split_bias
from deepzoo.recipes.parts.flops import flops_per_token
from deepzoo.recipes.parts.log import figures as figures_of
from deepzoo.recipes.parts.log import read_metrics
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.policy import Objective
from deepzoo.recipes.parts.rollout import Trajectories, figures, replaced, rollout
from deepzoo.recipes.parts.run import Options
from deepzoo.recipes.parts.shared_rows import shared
from deepzoo.recipes.parts.step import start
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.prompt import encode

TINY = dataclasses.replace(
    PRESETS["nano"], task="arithmetic", steps=2, prompts=4, answers=4, max_tokens=32,
    prompt_tokens=16, held_out=8, evaluate_every=0, slots=16,
)  # fmt: skip
QUIET = Options(log_every=1, tensorboard=False, quiet=True)


@pytest.fixture(scope="module")
def model():
    return zoo.load("v2-nano", dtype="float32", mtp=False, stacked=True)


@pytest.fixture(scope="module")
def made(model):
    """Answers to four problems, four each, so hot that they differ."""
    asked = tasks.batch(tasks.task("arithmetic").problems, 4, 0)
    prompts = [encode(model, p.prompt, raw=True).tokens for p in asked]
    found = rollout(
        model.config, model.params, prompts, answers=4, max_tokens=32, width=48,
        eos_ids=model.tokenizer.eos_ids, seed=0, slots=16, temperature=2.0,
    )  # fmt: skip
    return prompts, found


def test_rollouts_and_trainer_agree_on_every_log_probability(model, made):
    """Generator (a cache, one token at a time) and trainer (whole rows) are one model: 1e-4."""
    found = made[1]
    logprobs = score(model.config, model.params, found.tokens).logprobs
    off = np.abs(np.asarray(logprobs) - found.logprobs[:, 1:]) * found.mask[:, 1:]
    assert off.max() < 1e-4
    assert off.sum() / found.mask.sum() < 1e-5
    # They are far from other tokens' log-probabilities, so that the bound says something.
    assert np.abs(np.roll(np.asarray(logprobs), 1, axis=1) - found.logprobs[:, 1:]).max() > 1


def test_answers_lie_beside_those_of_their_group(model, made):
    prompts, found = made
    assert found.group.tolist() == [i for i in range(4) for _ in range(4)]
    for row, group in enumerate(found.group):
        prompt = prompts[group]
        assert found.tokens[row, : len(prompt)].tolist() == prompt
        assert not found.mask[row, : len(prompt)].any()
        length = found.lengths[row]
        assert found.mask[row, len(prompt) : len(prompt) + length].all()
        assert found.mask[row].sum() == length
        ended = found.answer(row)[-1] in model.tokenizer.eos_ids
        assert ended != found.truncated[row]
    assert len({tuple(found.answer(row)) for row in range(16)}) > 8


def test_rollouts_do_not_depend_on_the_slots(model, made):
    prompts, found = made
    again = rollout(
        model.config, model.params, prompts, answers=4, max_tokens=32, width=48,
        eos_ids=model.tokenizer.eos_ids, seed=0, slots=8, temperature=2.0,
    )  # fmt: skip
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_allclose(again.logprobs, found.logprobs, atol=1e-4)


def run(tmp_path, **changes):
    out = tmp_path / "run"
    grpo.train(dataclasses.replace(TINY, **changes), out, QUIET)
    return [r for r in read_metrics(out / "metrics.jsonl") if "loss" in r], out


def test_the_first_update_has_ratio_one_whatever_the_temperature(tmp_path, monkeypatch):
    """Nothing is clipped however narrow the clip, and the loss is minus the mean advantage, 0.

    Its tokens are those of the answers, its operations those of prompts and answers.
    """
    monkeypatch.setattr(log, "peak_flops", lambda: 1e12)
    narrow = Objective(clip_low=1e-3, clip_high=1e-3)
    rows, _ = run(
        tmp_path, temperature=2.0, objective=narrow, steps=1, overlong_tokens=30, least=0.0
    )
    assert rows[0]["clipped"] == 0
    assert abs(rows[0]["loss"]) < 1e-5
    assert rows[0]["dead_groups"] < 1
    assert rows[0]["norm"] > 1e-3
    assert rows[0]["mismatch_max"] < 1e-4
    row, full = rows[0], 16 * (16 + 32)  # with all padding
    assert row["step_tokens"] == pytest.approx(16 * row["length"])
    assert row["utilisation"] == pytest.approx(row["flops_per_second"] / 1e12 / jax.device_count())
    seconds = row["step_tokens"] / row["tokens_per_second"]
    tokens = row["flops_per_second"] * seconds / flops_per_token(zoo.config("v2-nano"), 32)
    assert row["step_tokens"] < tokens < full


def test_all_options_at_once(tmp_path):
    rows, out = run(
        tmp_path, minibatches=2, accumulate=2, old="recomputed", replay=True, format=0.5,
        combine="components", scale="batch_std", baseline="leave_one_out", dynamic_sampling=1,
        overlong="mask", overlong_tokens=8, reference_every=1, temperature=1.2,
        objective=Objective(
            beta=0.1, kl="unbiased", entropy=0.01, dual_clip=3.0, norm="token", off_policy=0.5
        ),
    )  # fmt: skip
    assert [r["step"] for r in rows] == [1, 2]
    assert all(np.isfinite(list(r.values())).all() for r in rows)
    assert rows[0]["kl"] < 1e-4  # the reference is the policy before the updates
    assert rows[0]["load"] > 1
    assert rows[0]["dead_experts"] >= 0
    assert {"reward/format", "reward/overlong", "truncated", "entropy", "dropped"} <= set(rows[0])
    notes = [r for r in read_metrics(out / "metrics.jsonl") if "held_out" in r]
    assert " = " in notes[-1]["sample"]


@pytest.fixture
def small(monkeypatch, model):
    """(changes) -> (state, step, problems): GRPO of a small model whose odd answers are right.

    It has a dense layer and, with layers=2, one with experts; it is as it was initialised, so that
    no two answers are alike.
    """
    config = dataclasses.replace(
        model.config, hidden_size=32, intermediate_size=32,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    monkeypatch.setattr(grpo, "judged", lambda *given: {"accuracy": float(given[-1] % 2)})

    def made(layers=1, **changes):
        here = dataclasses.replace(config, num_hidden_layers=layers)
        params = zoo.init(here, jax.random.key(0))
        own = model._replace(config=here, params=params, source=None)
        recipe = dataclasses.replace(TINY, max_tokens=16, rate=1e-2, warmup=0.0, **changes)
        tx = grpo._optimiser(recipe, split_bias(own.params)[0])
        state = start(own.params, tx, 0)
        if recipe.objective.beta:
            state = state._replace(extra={"reference": grpo._reference(recipe, state.params)})
        state = jax.tree.map(jnp.copy, state)  # the step donates it
        task = tasks.task("arithmetic")
        asked = tasks.batch(task.problems, recipe.prompts, 0)
        return state, grpo.learner(recipe, own, task, tx, state, lambda batch: batch), asked

    return made


def test_a_correction_of_rollouts_changes_the_loss(small):
    """Generator and trainer differ by more in bfloat16 than in float32: that is what it weighs.

    Without it the loss is minus the mean advantage, 0.
    """
    found = {}
    for correction in ("none", "mask"):
        objective = Objective(correction=correction, cap=1.001)
        state, step, asked = small(compute="bfloat16", old="recomputed", objective=objective)
        state, metrics = step(state, asked)
        assert 1e-4 < metrics["sums"]["mismatch_max"].value < 1
        found[correction] = float(metrics["loss"])
        assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert abs(found["none"]) < 1e-5
    assert abs(found["mask"]) > 1e-3


def test_a_refreshed_reference_is_the_policy(small):
    """Without it the divergence grows from the first update on; behind it, it is 0 again."""
    found = {}
    for every in (0, 2):
        state, step, asked = small(objective=Objective(beta=0.01), reference_every=every)
        found[every] = []
        for _ in range(3):
            state, metrics = step(state, asked)
            found[every].append(figures_of(state, metrics)["kl"])
    assert found[0][0] == pytest.approx(0, abs=1e-7)
    assert min(found[0][1:]) > 1e-4
    assert found[2][:2] == found[0][:2]
    assert found[2][2] == pytest.approx(0, abs=1e-7)


def test_experts_loads_are_those_of_the_tokens_that_count(small):
    state, step, asked = small(layers=2)
    _, metrics = step(state, asked)
    load = np.asarray(metrics["sums"]["load"]["moe"])
    assert load.shape == (1, 4)
    assert load.sum() == 2 * metrics["sums"]["length"].total


def test_a_replayed_update_keeps_the_experts(model, made):
    """`_check` aside: the recorded experts are those of the pass, and they enter the loss."""
    found = made[1]
    scored = score(model.config, model.params, found.tokens)
    moved = jax.tree.map(lambda a: a * 1.05, model.params)
    free = score(model.config, moved, found.tokens).routing
    held = score(model.config, moved, found.tokens, experts=scored.routing.indices).routing
    assert (np.asarray(free.indices) != np.asarray(scored.routing.indices)).any()
    np.testing.assert_array_equal(held.indices, scored.routing.indices)


def test_answers_that_share_rows_give_the_same_update(model, made):
    """Loss, gradient, metrics and loads of experts, whatever lies beside an answer."""
    found = made[1]
    recipe = dataclasses.replace(TINY, objective=Objective(level="sequence", norm="sequence"))
    rewards = np.linspace(0, 1, 16).reshape(4, 4)
    rewards[1, 2] = np.nan  # an answer that does not count
    apart = grpo._batch(recipe, found, rewards, np.linspace(-1, 1, 16).reshape(4, 4))
    together = shared(apart | {"ends": found.ends}, 160)
    apart = shared(apart | {"ends": found.ends}, 160, packed=False)
    filled = (together["segments"] >= 0).sum()
    assert filled == found.ends.sum()
    assert together["segments"].max() >= 1
    assert len(together["rows"]) < 16
    loss = grpo.learning(recipe, model.config)

    def run(batch):
        def total(params):
            out = loss(params, batch, jax.random.key(0))
            return out.loss / out.weight, out

        return jax.value_and_grad(total, has_aux=True)(model.params)

    ((a, one), gradient), ((b, other), same) = run(apart), run(together)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert one.weight == other.weight == 15
    np.testing.assert_array_equal(one.metrics["load"]["moe"], other.metrics["load"]["moe"])
    np.testing.assert_allclose(one.metrics["entropy"].total, other.metrics["entropy"].total, 1e-5)
    off = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, same))
    assert off < 1e-5 * optax.tree.norm(gradient)


def verdicts(*accuracies):
    return [{"accuracy": a, "format": 1.0, "language": 0.5} for a in accuracies]


def test_rewards_are_weighted_sums_and_no_verdict_is_no_reward():
    recipe = dataclasses.replace(TINY, answers=2, format=0.5, language=2.0)
    found = grpo._rewards(recipe, verdicts(1.0, 0.0, np.nan, 1.0))
    np.testing.assert_array_equal(found, [[2.5, 1.5], [np.nan, 2.5]])


def trajectories(count=4, width=12):
    mask = np.zeros((count, width), np.float32)
    mask[:, 3:8] = 1
    tokens = np.arange(count * width, dtype=np.int32).reshape(count, width)
    group = np.repeat(np.arange(count // 2, dtype=np.int32), 2)
    return Trajectories(tokens, mask, mask * -1.5, group, np.array([False] * (count - 1) + [True]))


def test_what_has_no_verdict_or_was_cut_off_is_not_in_the_loss():
    made = trajectories()
    rewards = np.array([[1.0, np.nan], [0.0, 1.0]])
    recipe = dataclasses.replace(TINY, answers=2)
    batch = grpo._batch(recipe, made, rewards, np.zeros((2, 2)))
    assert batch["mask"].sum(axis=1).tolist() == [5, 0, 5, 5]
    batch = grpo._batch(
        dataclasses.replace(recipe, overlong="mask"), made, rewards, np.zeros((2, 2))
    )
    assert batch["mask"].sum(axis=1).tolist() == [5, 0, 5, 0]
    assert made.mask.sum() == 20  # the rollout itself is as it was
    # Position t is about token t + 1: the first that counts is the last of the prompt.
    assert batch["mask"][0].tolist()[:8] == [0, 0, 1, 1, 1, 1, 1, 0]


def test_figures_of_a_rollout():
    rewards = np.array([[1.0, np.nan], [0.5, 0.5]])
    told = {
        k: m.total / m.weight
        for k, m in figures(trajectories(), verdicts(1.0, np.nan, 0.0, 0.0), rewards).items()
    }
    assert told == {
        "reward": pytest.approx(2 / 3), "length": 5.0, "reward/format": 1.0,
        "reward/language": 0.5, "accuracy": pytest.approx(1 / 3), "truncated": 0.25,
        "dead_groups": 1.0, "dropped": 0.25,
    }  # fmt: skip
    assert trajectories().ends.tolist() == [8] * 4


def test_dead_groups_are_replaced_and_the_others_stay():
    made, fresh = trajectories(), trajectories(2)
    fresh = fresh._replace(tokens=fresh.tokens + 1000)
    new, found = replaced(made, list("abcd"), np.array([False, True]), fresh, list("xy"))
    assert found == list("abxy")
    np.testing.assert_array_equal(new.tokens[:2], made.tokens[:2])
    np.testing.assert_array_equal(new.tokens[2:], fresh.tokens)
    assert new.group.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(made.tokens, trajectories().tokens)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"least": 1.1}, "fine-tune it first"),
        ({"minibatches": 3}, "4 prompts do not form 3 mini-batches"),
        ({"accumulate": 3}, "16 answers of a mini-batch do not form 3 micro-batches"),
        ({"packed": True, "accumulate": 2}, "no --accumulate"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"temperature": 0.7, "objective": Objective(correction="mask")}, "needs temperature 1"),
        ({"objective": Objective(correction="mask")}, "set --old recomputed"),
        ({"task": "jsonl"}, "needs --data"),
        ({"prompt_tokens": 2}, "do not fit in"),
    ],
)
def test_what_cannot_go_well_is_refused_before_anything_is_learned(tmp_path, changes, told):
    with pytest.raises(RequestError, match=told):
        run(tmp_path, **changes)
    assert not (tmp_path / "run" / "model").exists()


def test_problems_from_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    sums = [(a, b) for a in range(10, 40) for b in range(3)]
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in sums]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows, _ = run(tmp_path, task="jsonl", data=str(path), template="{prompt}", steps=1, held_out=2)
    assert 0 <= rows[0]["accuracy"] <= 1
    assert rows[0]["reward/format"] == 0


@pytest.mark.slow
def test_it_learns(tmp_path):
    """A cold start on solutions that mostly break off makes a model that gives up early; right
    answers alone then teach it to go on: held-out accuracy rises beyond both intervals."""
    rng, rows = np.random.default_rng(0), []
    for problem in itertools.islice(arithmetic.problems(7), 960):
        written = arithmetic.steps(problem)
        kept = 1 + next(i for i in itertools.count() if rng.random() > 0.7 or i == len(written) - 1)
        rows.append({"prompt": f"{problem} =", "completion": " = ".join(written[:kept])})
    data = tmp_path / "cold.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cold = dataclasses.replace(
        sft.PRESETS["nano"], task="", data=str(data), epochs=1, length=128, held_out=0
    )
    sft.train(cold, tmp_path / "sft", QUIET)
    recipe = dataclasses.replace(
        PRESETS["nano"], model=str(tmp_path / "sft" / "model"), task="arithmetic", steps=14,
        prompts=16, answers=8, max_tokens=96, prompt_tokens=16, held_out=100, evaluate_every=0,
        slots=128, rate=2e-4,
    )  # fmt: skip
    grpo.train(recipe, tmp_path / "grpo", QUIET)

    def measured(path):
        model = zoo.load(path, dtype="float32", mtp=False, stacked=True)
        task = tasks.task("arithmetic")
        options = {"max_tokens": 96, "temperature": 1.0, "top_p": 1.0, "slots": 100}
        return measure(model, task, 300, **options)

    before, after = (measured(tmp_path / name / "model") for name in ("sft", "grpo"))
    print(f"before: {before}\nafter: {after}")
    assert before.interval[1] < 0.5
    assert after.interval[0] > before.interval[1] + 0.1
    told = [r for r in read_metrics(tmp_path / "grpo" / "metrics.jsonl") if "mismatch_max" in r]
    assert max(r["mismatch_max"] for r in told) < 2e-3

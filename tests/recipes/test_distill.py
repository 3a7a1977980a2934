"""Distillation: both divergences against float64 references, what is kept of a teacher's answers,
and that a student learns."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import distill, pretrain
from deepzoo.recipes.parts import countdown_tokenizer, problems, tasks
from deepzoo.recipes.parts.divergence import divergence, head_divergence, with_teacher
from deepzoo.recipes.parts.documents import completion_ids, documents
from deepzoo.recipes.parts.rollout import Trajectories
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

KEY = jax.random.key(0)
TEACHER = dataclasses.replace(
    pretrain.PRESETS["v3_nano"].config, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=16,
    initializer_range=0.1, vocab_size=50, num_nextn_predict_layers=0,
)  # fmt: skip
STUDENT = zoo.Config(
    model_type="qwen2", vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    initializer_range=0.2, dtype="float32",
)  # fmt: skip


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batch(rows=2, length=9):
    rng = np.random.default_rng(1)
    shape = (rows, length + 1)
    return {
        "tokens": rng.integers(3, 50, shape).astype(np.int32),
        "segments": np.sort(rng.integers(0, 2, shape), axis=1).astype(np.int32),
        "weights": rng.integers(0, 2, shape).astype(np.float32),
    }


@functools.cache
def models():
    return zoo.init(STUDENT, KEY), zoo.init(TEACHER, jax.random.key(1))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_the_sum_of_the_equation(direction, temperature):
    (own, frozen), made = models(), batch()
    seen, inside = made["tokens"][:, :-1], made["segments"][:, :-1]
    logits = [
        np.asarray(zoo.apply(c, p, seen, segment_ids=inside).logits, np.float64)
        for c, p in ((STUDENT, own), (TEACHER, frozen))
    ]
    q, p = (log_softmax(x / temperature) for x in logits)
    plain = log_softmax(logits[0])
    total, weight, nll = 0.0, 0.0, 0.0
    for b, t in np.ndindex(*seen.shape):
        if made["segments"][b, t + 1] != made["segments"][b, t]:
            continue
        w = made["weights"][b, t + 1]
        one, other = (p[b, t], q[b, t]) if direction == "forward" else (q[b, t], p[b, t])
        total += w * sum(np.exp(a) * (a - c) for a, c in zip(one, other, strict=True))
        nll -= w * plain[b, t, made["tokens"][b, t + 1]]
        weight += w
    assert total > 0.5
    loss = divergence(STUDENT, TEACHER, direction, temperature=temperature)
    out = loss(with_teacher(own, frozen), made, KEY)
    assert float(out.weight) == weight
    assert float(out.loss) == pytest.approx(total * temperature**2, rel=1e-4)
    assert float(out.metrics["kl"]) == pytest.approx(total, rel=1e-4)
    assert float(out.metrics["nll"]) == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_its_gradient_in_chunks_is_the_derivative_by_hand(direction):
    """d KL(p || q) / d logits = q - p;  d KL(q || p) = q (log q - log p - KL)."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(5, 8)), rng.normal(size=(11, 8))
    other, other_head = rng.normal(size=(5, 6)), rng.normal(size=(11, 6))
    arrays = [jnp.asarray(a, jnp.float32) for a in (hidden, head, other, other_head)]
    targets = jnp.zeros(5, jnp.int32)

    def total(x):
        return head_divergence(x, *arrays[1:], targets, direction, 1.0, 2)[0].sum()  # pyright: ignore

    q, p = log_softmax(hidden @ head.T), log_softmax(other @ other_head.T)
    if direction == "forward":
        by_logits = np.exp(q) - np.exp(p)
    else:
        apart = (np.exp(q) * (q - p)).sum(-1, keepdims=True)
        by_logits = np.exp(q) * (q - p - apart)
    np.testing.assert_allclose(jax.grad(total)(arrays[0]), by_logits @ head, atol=2e-5)


def test_the_teacher_has_no_gradient():
    own, frozen = models()
    loss = divergence(STUDENT, TEACHER, "reverse")
    gradient = jax.grad(lambda f: loss(with_teacher(own, f), batch(), KEY).loss)(frozen)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
    same = divergence(TEACHER, TEACHER, "reverse")(with_teacher(frozen, frozen), batch(), KEY)
    assert float(same.loss) == pytest.approx(0.0, abs=1e-4)


NANO = dataclasses.replace(
    distill.PRESETS["nano"], problems=6, answers=2, max_tokens=48, hidden=16, layers=1, heads=2,
    rows=2, length=96, held_out=0, slots=8,
)  # fmt: skip


def test_the_traces_are_right_answers_and_the_student_learns_them(tmp_path):
    options = Options(quiet=True, tensorboard=False, log_every=1)
    recipe = dataclasses.replace(NANO, mode="logits", steps=12, rate=1e-2)
    model = distill.train(recipe, tmp_path, options)
    assert model.config.model_type == "qwen2"
    kept = [json.loads(x) for x in (tmp_path / "traces/traces.jsonl").read_text().splitlines()]
    assert 4 <= len(kept) <= 12
    for record in kept:
        begin, *_, end = f"{record['prompt']} {record['completion']}".split(" = ")
        assert tasks.value(begin) == int(end)
    assert len({(r["prompt"], r["completion"]) for r in kept}) == len(kept)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kl = [r["kl"] for r in rows if "kl" in r]
    assert np.mean(kl[-3:]) < np.mean(kl[:3]) - 1.0


def test_hard_labels_are_learned_with_the_teacher_and_then_without_it(tmp_path):
    """Its answers as text; and once they are written down, nobody asks the teacher again."""
    options = Options(quiet=True, tensorboard=False, log_every=1)
    recipe = dataclasses.replace(NANO, mode="hard", steps=12, rate=1e-2)
    distill.train(recipe, tmp_path / "first", options)

    def losses(run):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all("kl" not in row for row in rows)
        assert all(0 < row["step_tokens"] < 2 * 96 for row in rows)  # without padding
        return [row["nll"] for row in rows]

    first = losses("first")
    assert len(first) == 12
    assert first[0] == pytest.approx(np.log(1007), abs=0.5)
    assert np.mean(first[-3:]) < np.mean(first[:3]) - 1.0
    again = dataclasses.replace(
        recipe, teacher="nobody", student=str(tmp_path / "first/model"), task="",
        data=str(tmp_path / "first/traces"),
    )  # fmt: skip
    distill.train(again, tmp_path / "second", options)
    assert not (tmp_path / "second" / "traces").exists()
    second = losses("second")
    assert np.mean(second[:3]) < np.mean(first[-3:]) + 0.5
    assert np.mean(second[-3:]) < np.mean(second[:3]) - 0.5


def test_on_policy_asks_the_student_and_moves_it(tmp_path):
    options = Options(quiet=True, tensorboard=False, log_every=1)
    recipe = dataclasses.replace(
        NANO, mode="on_policy", steps=4, prompts=2, max_tokens=12, length=40, rate=1e-2
    )
    distill.train(recipe, tmp_path, options)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kl = [r["kl"] for r in rows if "kl" in r]
    assert len(kl) == 4
    assert kl[-1] < kl[0] - 0.3
    assert all(1 <= r["length"] <= 12 for r in rows if "length" in r)
    answers = [4 * r["length"] for r in rows if "length" in r]
    assert [r["step_tokens"] for r in rows if "kl" in r] == pytest.approx(answers)


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    for changes, told in (
        ({"mode": "on_policy"}, "--steps"),
        ({"data": "x.jsonl"}, "either --data or --task"),
    ):
        with pytest.raises(RequestError, match=told):
            distill.train(dataclasses.replace(NANO, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_token_ids_are_refused_where_logits_are_learned():
    teacher = zoo.load("v2-nano")
    student = distill.load_student(NANO, teacher)
    distill.check_vocabularies(teacher, student)
    smaller = student._replace(config=dataclasses.replace(student.config, vocab_size=1000))
    with pytest.raises(RequestError, match="1007 and 1000"):
        distill.check_vocabularies(teacher, smaller)


def test_prompts_of_data_are_what_is_not_learned():
    given = documents([([1, 2, 3, 4], 2), ([5, 6, 7], 1)], ["a", "b"], 50)
    recipe = dataclasses.replace(NANO, prompts=2)
    found = distill.prompts(recipe, None, given, 3)  # pyright: ignore[reportArgumentType]
    assert sorted(found) == [[1, 2], [5]]


def test_the_presets_are_the_papers():
    rates = [p.rate for n, p in distill.PRESETS.items() if n != "nano"]
    assert rates == [1e-4, 8e-5, 7e-5, 6e-5, 5e-5, 2e-5]
    for name, preset in distill.PRESETS.items():
        if name != "nano":
            assert (preset.rows, preset.length, preset.last) == (64, 32768, 0.1)


def test_a_thought_that_the_prompt_has_opened_is_judged_and_kept(monkeypatch):
    """Countdown's verifier wants the whole form, whose first tag stands in the prompt."""
    config = dataclasses.replace(STUDENT, vocab_size=countdown_tokenizer.VOCABULARY, bos_token_id=1,
                                 eos_token_id=2)  # fmt: skip
    tokenizer = Tokenizer(countdown_tokenizer.tokenizer_files(), config)
    teacher = Model(config, {}, tokenizer)
    recipe = distill.Recipe(task="countdown", problems=2, max_tokens=128)
    task = problems.task("countdown")
    first, second = problems.batch(task.problems, 2, recipe.seed)
    wrong = task.solution(second).replace("</answer>", " + 1</answer>")

    def made(config, params, prompts, **options):
        said = [completion_ids(tokenizer, t, opened=True) for t in (task.solution(first), wrong)]
        rows = np.zeros((2, 3, options["width"]))
        for i, (prompt, ids) in enumerate(zip(prompts, said, strict=True)):
            rows[i, 0, : len(prompt) + len(ids)] = [*prompt, *ids]
            rows[i, 1, len(prompt) : len(prompt) + len(ids)] = 1
        tokens, mask, logprobs = rows.swapaxes(0, 1)
        truncated = np.zeros(2, bool)
        return Trajectories(tokens.astype(int), mask, logprobs, np.arange(2), truncated)

    monkeypatch.setattr(distill, "rollout", made)
    (kept,) = distill.traces(recipe, teacher)
    completion = task.solution(first).replace("<think>\n", "<think>")  # the line was opened, too
    assert kept == {"prompt": first.prompt, "completion": completion, "raw": False}

"""DPO's loss against float64, its pairs, and its metrics."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import dpo
from deepzoo.recipes.parts.flops import flops_of_rows
from deepzoo.recipes.parts.records import DataError
from deepzoo.zoo.types import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return zoo.load("v2-nano", dtype="float32", stacked=True)


def records(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(dpo.PRESETS["nano"], data=str(path), length=16)


PAIR = {"prompt": "2 + 3 =", "chosen": "5", "rejected": "2 + 3 = 6"}


def answer_logprob(model, ids, given):
    logits = zoo.apply(model.config, model.params, jnp.asarray([ids[:-1]])).logits[0]
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return sum(logp[t - 1, ids[t]] for t in range(given, len(ids)))


def test_the_loss_is_that_of_the_paper(tmp_path, model):
    recipe = records(tmp_path / "a.jsonl", PAIR, {**PAIR, "chosen": "4 + 1 = 5"})
    made = dpo.from_records(recipe, model)
    reference = np.array([[-3.0, -7.5], [-4.0, -2.0]], np.float32)
    out = dpo.preference(model.config, beta=0.3)(
        model.params, made | {"reference": reference}, jax.random.key(0)
    )
    total, right, margins, lengths = 0.0, 0, 0.0, []
    for i in range(2):
        h = []
        for j in range(2):
            where = np.flatnonzero(made["mask"][i, j])
            given, end = int(where[0]) + 1, int(where[-1]) + 2
            h.append(answer_logprob(model, made["tokens"][i, j, :end].tolist(), given))
            lengths.append(end)
        margin = 0.3 * ((h[0] - reference[i, 0]) - (h[1] - reference[i, 1]))
        total += np.log1p(np.exp(-margin))
        right, margins = right + (margin > 0), margins + margin
    assert float(out.weight) == 2
    assert float(out.loss) == pytest.approx(total, rel=1e-4)
    assert float(out.metrics["margin"]) == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert int(out.metrics["accuracy"]) == right
    assert int(out.metrics["tokens"]) == sum(lengths) < made["tokens"].size
    flops = flops_of_rows(model.config, np.array(lengths))
    assert float(out.metrics["flops"]) == pytest.approx(flops, rel=1e-5)


def test_at_the_reference_the_loss_is_log_two_and_the_gradient_favours_the_chosen(tmp_path, model):
    made = dpo.from_records(records(tmp_path / "a.jsonl", PAIR), model)
    reference = dpo.reference_logprobs(model.config, model.params, made, 1)
    batch = made | {"reference": reference}
    loss = dpo.preference(model.config, beta=0.1)
    value, gradient = jax.value_and_grad(lambda p: loss(p, batch, None).loss)(model.params)  # pyright: ignore
    assert float(value) == pytest.approx(np.log(2), abs=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, model.params, gradient)
    after = loss(moved, batch, jax.random.key(0))
    assert float(after.metrics["chosen"]) > float(after.metrics["rejected"])
    assert float(after.loss) < np.log(2)


def test_only_the_answers_tokens_count(tmp_path, model):
    made = dpo.from_records(records(tmp_path / "a.jsonl", PAIR), model)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for j, text in enumerate((PAIR["chosen"], PAIR["rejected"])):
        targets = made["tokens"][0, j, 1:][made["mask"][0, j] > 0].tolist()
        assert targets == [*tokenizer.encode(text), tokenizer.eos_ids[0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 =", "chosen": "1"}, r"a.jsonl:1: field 'rejected' is missing"),
        ({**PAIR, "chosen": " = ".join(["1 + 1"] * 8)}, r"a.jsonl:1: .* tokens, there is room for"),
    ],
)
def test_bad_pairs_are_named(tmp_path, model, row, message):
    with pytest.raises(DataError, match=message):
        dpo.from_records(records(tmp_path / "a.jsonl", row), model)


def test_own_answers_give_pairs_of_a_right_and_a_wrong_one(model):
    recipe = dataclasses.replace(dpo.PRESETS["nano"], problems=24, answers=8, seed=5)
    made = dpo.from_answers(recipe, model)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    from deepzoo.recipes.parts import tasks

    for i in range(len(made["tokens"])):
        verdicts = []
        for j in range(2):
            targets = np.flatnonzero(made["mask"][i, j]) + 1
            ids = made["tokens"][i, j].tolist()
            question = tokenizer.decode(ids[1 : targets[0]]).removesuffix(" =")
            answer = tokenizer.decode(ids[targets[0] : targets[-1]])
            verdicts.append(tasks.is_right(question, answer))
        assert verdicts == [True, False]

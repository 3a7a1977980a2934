"""Samples of text while a model is trained: what is asked, and that training does not notice."""

import dataclasses

import jax
import numpy as np

from deepzoo import zoo
from deepzoo.recipes import sft
from deepzoo.recipes.parts import problems, tasks
from deepzoo.recipes.parts.documents import documents
from deepzoo.recipes.parts.log import TIMES, read_metrics
from deepzoo.recipes.parts.run import Options
from deepzoo.recipes.parts.sample import sample


def test_a_sample_is_a_held_out_problem_or_ids_and_what_follows():
    model, task = zoo.load("v2-nano", dtype="float32"), problems.task("arithmetic")
    (text,) = sample(model, task, 0, 5).values()
    assert tasks.held_out(text.partition(" =")[0])
    assert text.partition(" =")[2]
    assert sample(model, task, 0, 5) == {"sample": text} != sample(model, task, 0, 6)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode_prompt("1 + 2 = 3")
    short = dataclasses.replace(model.config, max_position_embeddings=len(ids) - 1)
    (text,) = sample(model._replace(config=short), ids, 0, 1).values()
    assert text.startswith("1 + 2")  # what the context cannot hold is left out


def test_a_prompt_is_what_is_read_but_not_learned():
    made = documents([([7, 8, 9], 2), ([4, 5], 0)], ["a", "b"], 10)
    assert [made.prompt(i) for i in range(3)] == [[7, 8], [4], [7, 8]]


def test_training_does_not_notice(tmp_path):
    recipe = dataclasses.replace(
        sft.PRESETS["nano"], task="arithmetic", samples=12, epochs=1, rows=1, length=96, held_out=0
    )
    found = []
    for every in (0, 1):
        out = tmp_path / str(every)
        options = Options(quiet=True, tensorboard=False, log_every=1)
        made = sft.train(dataclasses.replace(recipe, sample_every=every), out, options)
        rows = [
            {k: v for k, v in row.items() if k not in TIMES}
            for row in read_metrics(out / "metrics.jsonl")
        ]
        found.append(([r for r in rows if "loss" in r], made.params))
        samples = [row["sample"] for row in rows if "sample" in row]
        assert len(samples) == (len(found[-1][0]) if every else 0)
        assert all(tasks.held_out(text.partition(" =")[0]) for text in samples)
    assert len(found[0][0]) > 2 and found[0][0] == found[1][0]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found[0][1], found[1][1])))

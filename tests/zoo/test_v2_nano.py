"""The shipped model loads as for anybody, is as good as its card says, and uses all its experts."""

import functools
import itertools
import json
import re

import jax
import numpy as np

from deepzoo import zoo
from deepzoo.recipes.parts import tasks
from deepzoo.zoo import catalog
from deepzoo.zoo.generate import Completion
from deepzoo.zoo.types import Model

NAME = "v2-nano"
PROBLEMS = list(dict.fromkeys(itertools.islice(tasks.problems(11, held=True), 80)))[:60]
SAME = ("12+7*3=", "12 + 7 * 3 =", " 12 +7* 3=")


def directory():
    found = catalog.shipped_directory(NAME)
    assert found is not None
    return found


@functools.cache
def model() -> Model:
    return zoo.load(NAME)


@functools.cache
def answers() -> list[Completion]:
    """All prompts at once, with the model's own defaults: one compiled program for the file."""
    return zoo.generate(model(), [*(f"{p} =" for p in PROBLEMS), *SAME], max_tokens=128, slots=32)


def test_it_is_a_whole_v2_model_of_a_few_megabytes():
    config = zoo.config(NAME)
    assert (config.model_type, config.topk_method) == ("deepseek_v2", "group_limited_greedy")
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (4, 2, 2)
    assert (config.first_k_dense_replace, config.dtype) == (1, "bfloat16")
    assert config.q_lora_rank
    assert sum(path.stat().st_size for path in directory().iterdir()) < 4 << 20
    count = sum(leaf.size for leaf in jax.tree.leaves(zoo.abstract(config)))
    assert count == 1_351_936  # the card's number


def test_it_is_as_good_as_its_card_says():
    """The card says 96.9% at least; even then, more than 6 of 60 wrong has a chance below 1%."""
    pairs = list(zip(PROBLEMS, answers(), strict=False))
    wrong = [(p, a.text) for p, a in pairs if a.finish != "eos" or not tasks.is_right(p, a.text)]
    assert len(pairs) == 60
    assert len(wrong) <= 6, wrong


def test_spaces_do_not_matter_and_the_default_is_greedy():
    first, *others = answers()[len(PROBLEMS) :]
    assert all(other.tokens == first.tokens for other in others)
    assert first.finish == "eos"
    links = first.text.split(" = ")
    assert links[-1] == "33"
    assert all(tasks.value(link) == 33 for link in links)


def test_every_expert_is_used_and_none_takes_over():
    tokenizer = model().tokenizer
    assert tokenizer is not None
    texts = [" = ".join([p, *tasks.steps(p)]) for p in PROBLEMS]
    rows = [tokenizer.encode_prompt(text) for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    real = np.arange(tokens.shape[1]) < np.array([len(ids) for ids in rows])[:, None]
    routing = zoo.apply(model().config, zoo.stack(model().params), tokens).routing
    assert routing is not None
    layers = [layer[real].ravel() for layer in np.asarray(routing.indices)]
    shares = np.stack([np.bincount(layer, minlength=8) / layer.size for layer in layers])
    assert shares.shape == (3, 8)
    assert shares.min() > 0.03, shares
    assert shares.max() < 0.3, shares  # even would be 0.125


def test_the_card_tells_the_same_as_the_readme():
    card = json.loads((directory() / "card.json").read_text(encoding="utf-8"))
    text = (directory() / "README.md").read_text(encoding="utf-8")
    assert card["licence"] == "Apache-2.0"
    assert card["licence"] in text
    assert card["training"]["command"] in text
    for line in ("accuracy, greedy", "accuracy, temperature 1"):
        share, low, high = re.findall(r"[\d.]+%", card["training"][line])[-3:]
        assert re.search(rf"{line}.*{share}.*{low} to {high}", text), line

"""The shipped R1 models: of the kinds and as good as their cards say, and small together."""

import functools
import json

import jax
import pytest

from deepzoo import zoo
from deepzoo.recipes.parts import countdown, problems
from deepzoo.recipes.parts.accuracy import held_out, measure, wilson
from deepzoo.zoo import catalog, cli
from deepzoo.zoo.bench import speculative
from deepzoo.zoo.errors import RequestError

LADDER = ("r1-base-nano", "r1-zero-nano", "r1-nano", "r1-distill-nano")
ASKED = 64


@functools.cache
def model(name: str):
    return zoo.load(name, dtype="float32", stacked=False)


def directory(name: str):
    found = catalog.shipped_directory(name)
    assert found is not None
    return found


def training(name: str) -> dict[str, str]:
    return dict(catalog.card(name).training)


def test_they_are_small_together():
    files = [f for name in (*LADDER, "v2-nano") for f in directory(name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 12e6


@pytest.mark.parametrize("name", LADDER)
def test_their_kinds(name):
    config = zoo.config(name)
    assert config.dtype == "bfloat16"
    assert config.vocab_size == 136
    counted = sum(leaf.size for leaf in jax.tree.leaves(zoo.abstract(config)))
    assert catalog.card(name).parameters == f"{counted / 1e6:.2f}M"
    if name == "r1-distill-nano":
        assert config.model_type == "qwen2"
        return
    assert (config.model_type, config.scoring_func) == ("deepseek_v3", "sigmoid")
    assert config.topk_method == "noaux_tc" and config.n_shared_experts == 1
    gates = [layer["mlp"]["gate"] for layer in model(name).params["moe"].values()]
    assert len(gates) == 3 and all(abs(g["e_score_correction_bias"]).max() > 0.01 for g in gates)
    assert config.num_nextn_predict_layers == (1 if name == "r1-nano" else 0)


@pytest.mark.parametrize("name", LADDER)
def test_they_are_as_good_as_their_cards_say(name):
    """Other problems than the card's 500; 99.9% intervals of both must meet."""
    card = training(name)["accuracy, temperature 0.6"]
    right = int(card.split(" of ")[0])
    low, high = wilson(right, 500, z=3.29)
    found = measure(
        model(name), problems.task("countdown"), ASKED, max_tokens=192, seed=17, slots=64
    )
    least, most = wilson(float(found.right.sum()), ASKED, z=3.29)
    assert least <= high and low <= most, (card, str(found))


def told(name, line):
    """Share of 500 problems on a card."""
    return int(training(name)[line].split(" of ")[0]) / 500


def test_the_ladder():
    share = {n: told(n, "accuracy, temperature 0.6") for n in LADDER}
    assert told("r1-nano", "accuracy, greedy") >= 0.9
    assert told("r1-nano", "four numbers, temperature 0.6") >= 0.6
    assert share["r1-zero-nano"] >= share["r1-base-nano"] + 0.4
    assert share["r1-nano"] >= 0.95
    assert share["r1-distill-nano"] >= 0.9 * share["r1-nano"]


def test_it_thinks_tries_and_answers(capsys):
    assert cli.main(["generate", "r1-nano", "Make 24 from 4, 6, 9."]) == 0
    text = capsys.readouterr().out
    thought, _, answer = text.partition("</think>")
    assert "4, 6: 10 2 24 yes" in thought
    assert countdown.is_right("Make 24 from 4, 6, 9.", f"<think>{thought}</think>{answer.rstrip()}")


def test_it_gives_up_rather_than_inventing():
    asked = held_out(problems.task("countdown-unsolvable"), 32, 3)
    made = zoo.generate(model("r1-nano"), [p.prompt for p in asked], max_tokens=192, slots=32)
    said = [countdown.said(f"<think>{m.text}") for m in made]
    assert sum(s == "none" for s in said) >= 26


def test_a_conversation_goes_on():
    first = {"role": "user", "content": "Make 24 from 4, 6, 9."}
    reply = {"role": "assistant", "content": "<think>\n4, 6: 10 2 24 yes\n24 = 4 * 6\n</think>\n"
             "<answer>4 * 6</answer>"}  # fmt: skip
    asked = [p.prompt for p in held_out(problems.task("countdown"), 32, 5)]
    chats = [[first, reply, {"role": "user", "content": text}] for text in asked]
    made = zoo.generate(model("r1-nano"), chats, max_tokens=192, slots=32)
    right = [countdown.is_right(q, f"<think>{m.text}") for q, m in zip(asked, made, strict=True)]
    assert sum(right) >= 26


def test_drafts_are_mostly_accepted_and_change_nothing():
    asked = [p.prompt for p in held_out(problems.task("countdown"), 8, 4)]
    (row,) = speculative.bench(
        model("r1-nano"), asked, raw=False, temperatures=(0.0,), max_tokens=192, rounds=1
    )
    assert row.acceptance > 0.6
    assert row.same >= 7 / 8  # two tokens may be nearly equally likely
    assert row.drafted > 50 and row.plain > 0 and row.drafts > 0


def test_drafts_need_an_mtp_layer(capsys):
    with pytest.raises(RequestError, match="no MTP layer to draft with"):
        speculative.bench(model("r1-zero-nano"), ["Make 24 from 4, 6, 9."], raw=False)
    args = ["bench", "speculative", "--model", "r1-nano", "--problems", "2", "--rounds", "1"]
    assert cli.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["temperature"] for row in found["rows"]] == [0.0, 0.6]


def test_a_shipped_model_is_asked_what_it_can_do(capsys):
    args = ["evaluate", "r1-nano", "--problems", "8", "--samples", "1", "--passes", "1"]
    assert cli.main([*args, "--majorities", "--slots", "8", "--at-once", "8"]) == 0
    line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("| pass@1"))
    assert float(line.split("|")[2].strip().rstrip("%")) >= 75

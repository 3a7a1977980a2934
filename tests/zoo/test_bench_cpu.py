"""`deepzoo bench cpu` without a peer, at a tiny size: its table, and what its training step is."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes.parts import step
from deepzoo.recipes.parts.losses import next_token
from deepzoo.zoo import cli
from deepzoo.zoo.bench import cpu
from deepzoo.zoo.types import Model

TINY = dataclasses.replace(
    cpu.CONFIG, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    cases = [case._replace(length=8) for case in cpu.CASES]
    monkeypatch.setattr(cpu, "CONFIG", TINY)
    monkeypatch.setattr(cpu, "TOKENS", 4)
    monkeypatch.setattr(cpu, "CASES", cases)


def test_the_table_has_a_row_for_each_case(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "cpu", "--rounds", "2"]) == 0
    head, line, *rows, about = capsys.readouterr().out.splitlines()
    assert (head, line) == ("| case | deepzoo, tokens/s |", "| --- | --- |")
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [name for name, _ in cells] == [case.name for case in cpu.CASES]
    assert all(float(rate) > 0 for _, rate in cells)
    assert about.startswith("0M parameters, float32, medians of 2 rounds; ")


def test_its_json_says_the_same(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(cpu, "CASES", cpu.CASES[-1:])
    assert cli.main(["bench", "cpu", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["rate"] == pytest.approx(cpu.CASES[-1].tokens / row["seconds"])
    assert row["peer_rate"] is row["ratio"] is None
    assert found["rounds"] == 1 and found["parameters"] > 1000


def test_the_training_step_is_the_recipes(monkeypatch: pytest.MonkeyPatch):
    made, original = [], step.train_step
    monkeypatch.setattr(
        step, "train_step", lambda *args, **how: made.append(how) or original(*args, **how)
    )
    case = cpu.CASES[-1]
    model = Model(TINY, zoo.init(TINY, jax.random.key(0)))
    training = cpu.Training(model, case)
    assert made == [{"clip": float("inf")}]
    ids = cpu.prompt_ids(case, 64).astype(np.int32)
    batch = {"tokens": ids, "segments": 0 * ids, "weights": np.ones(ids.shape, np.float32)}
    out = next_token(TINY)(model.params, batch, jax.random.key(0))
    losses = [training.measure()[1] for _ in range(3)]
    assert losses[0] == pytest.approx(float(out.loss / out.weight), rel=1e-5)
    assert losses[0] > losses[1] > losses[2]
    assert int(training.state.step) == 3

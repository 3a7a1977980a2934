"""A run goes on with the data it was begun with, or not at all."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import faults
import jax
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import dpo, sft
from deepzoo.recipes.parts import main as line
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.log import read_metrics
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.step import State
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

RECORDS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(8)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "9"} for r in RECORDS]
FLAGS = "--task= --length 16 --held-out 0 --save-every 1 --log-every 1 --no-tensorboard --quiet"


class Ended(BaseException):
    """Ctrl-C, the power: whatever ends a run behind its first step."""


def write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def kept(out: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files of a run but the lock, which names the last process."""
    return {name: of for name, of in faults.snapshot(out).items() if name != ".lock"}


def ended(go: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until the first checkpoint is there."""
    saved = Run.save

    def save(run: Run, state: State) -> None:
        saved(run, state)
        raise Ended

    with monkeypatch.context() as patched, pytest.raises(Ended):
        patched.setattr(Run, "save", save)
        go()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of a few hundred weights that reads numbers."""
    config = Config(
        model_type="qwen2", vocab_size=1007, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    params = zoo.init(config, jax.random.key(0))
    path = tmp_path_factory.mktemp("models") / "small"
    zoo.save_hf(Model(config, params, Tokenizer(tasks.tokenizer_files(), config)), path)
    return path


@pytest.mark.parametrize(
    ("recipe", "records", "changes", "rows"),
    [
        (sft, RECORDS, {"completion": "7"}, "--rows 2 --epochs 2"),
        (dpo, PAIRS, {"rejected": "8"}, "--pairs 4 --epochs 2"),
    ],
    ids=["sft", "dpo"],
)
def test_a_run_whose_file_was_changed_does_not_go_on(
    recipe, records, changes, rows, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    words = f"--out {out} --model {model} --data {data} {rows} {FLAGS}".split()

    def go() -> None:
        line.run(recipe.train, recipe.PRESETS, recipe.__doc__, words, "train")

    write(data, records)
    ended(go, monkeypatch)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["00000001"]
    before = kept(out)
    # One record more, one of which a single token is another, one whose answer begins earlier.
    moved = {k: v if k == "prompt" else f"1 = {v}" for k, v in records[0].items()}
    moved |= {"prompt": records[0]["prompt"].removesuffix(" 1 =")}
    for first in (None, records[0] | changes, moved):
        other = [*records, records[0]] if first is None else [first, *records[1:]]
        write(data, other)
        with pytest.raises(RequestError) as told:
            go()
        assert f"{out}: was begun with other settings (" in str(told.value)
        found = str(told.value).partition(" (")[2].partition(")")[0]
        named = {part.partition(":")[0] for part in found.split("; ")}
        count = {"tokens" if recipe is sft else "pairs"} if len(other) != len(records) else set()
        assert named == {"data"} | count
        assert kept(out) == before
    write(data, records)
    go()
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 5))


def test_dpo_goes_on_with_the_answers_it_was_begun_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another mesh rounds in another way: there the model might answer otherwise."""
    answered = 0

    def answers(recipe: dpo.Recipe, model: Model) -> dpo.Pairs:
        nonlocal answered
        answered += 1
        rng = np.random.default_rng(answered)
        tokens = rng.integers(3, 1000, (8, 2, recipe.length)).astype(np.int32)
        return {"tokens": tokens, "mask": np.ones((8, 2, recipe.length - 1), np.float32)}

    monkeypatch.setattr(dpo, "from_answers", answers)
    recipe = dataclasses.replace(
        dpo.PRESETS["nano"], model=str(model), pairs=4, epochs=2, length=16, held_out=0,
        sample_every=0,
    )  # fmt: skip
    options = Options(save_every=1, log_every=1, tensorboard=False, quiet=True)
    made = {}
    for name in ("whole", "ended"):
        answered, out = 0, tmp_path / name
        if name == "ended":
            ended(lambda out=out: dpo.train(recipe, out, options), monkeypatch)
            answered = 6  # what it would answer now
        dpo.train(recipe, out, options)
        made[name] = [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert len(made["whole"]) == 4
    assert made["ended"] == made["whole"]
    assert answered == 6

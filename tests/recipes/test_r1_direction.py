"""R1's pipeline, shortened, from the shipped base: every way of learning beats the base clearly."""

import dataclasses

import pytest

from deepzoo.recipes import r1
from deepzoo.recipes.parts.run import Options


@pytest.mark.slow
def test_the_ladder_goes_up(tmp_path):
    nano = r1.PRESETS["nano"]
    steps = {"zero": 14, "rl_1": 2, "rl_2": 2}
    short = {k: dataclasses.replace(getattr(nano, k), steps=n) for k, n in steps.items()}
    recipe = dataclasses.replace(
        nano, base="r1-base-nano", until="rl-2", evaluated=(), problems=150, task="countdown",
        max_tokens=192,
        cold_start=dataclasses.replace(nano.cold_start, samples=3000, epochs=1, length=256),
        rejection=dataclasses.replace(nano.rejection, prompts=600, answers=1, max_tokens=192),
        fine_tuning=dataclasses.replace(nano.fine_tuning, epochs=2, length=256, mtp=0.0),
        zero=dataclasses.replace(short["zero"], max_tokens=192),
        rl_1=dataclasses.replace(short["rl_1"], max_tokens=192),
        rl_2=dataclasses.replace(short["rl_2"], max_tokens=192),
    )  # fmt: skip
    found = r1.train(recipe, tmp_path / "run", Options(quiet=True, tensorboard=False))
    shares = {stage: ways["countdown", "0.6"] for stage, ways in found.items()}
    told = {stage: str(share) for stage, share in shares.items()}
    assert list(shares) == ["base", "zero", "cold-start", "rl-1", "fine-tuning", "rl-2"]
    for better in ("zero", "cold-start", "rl-1", "fine-tuning", "rl-2"):
        assert shares[better].low > shares["base"].high, told

"""R1's pipeline, shortened, from the shipped base: RL and a cold start each beat it clearly."""

import dataclasses

import pytest

from deepzoo.recipes import r1
from deepzoo.recipes.parts.run import Options


@pytest.mark.slow
def test_the_ladder_goes_up(tmp_path):
    nano = r1.PRESETS["nano"]
    recipe = dataclasses.replace(
        nano, base="r1-base-nano", until="rl-1", evaluated=(), problems=150, task="countdown",
        max_tokens=192, zero=dataclasses.replace(nano.zero, steps=14, max_tokens=192),
        cold_start=dataclasses.replace(nano.cold_start, samples=3000, epochs=1, length=256),
        rl_1=dataclasses.replace(nano.rl_1, steps=2, max_tokens=192),
    )  # fmt: skip
    found = r1.train(recipe, tmp_path / "run", Options(quiet=True, tensorboard=False))
    shares = {stage: ways["countdown", "0.6"] for stage, ways in found.items()}
    told = {stage: str(share) for stage, share in shares.items()}
    assert list(shares) == ["base", "zero", "cold-start", "rl-1"]
    for better in ("zero", "cold-start", "rl-1"):
        assert shares[better].low > shares["base"].high, told

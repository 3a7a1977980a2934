"""Every check against numbers worked out by hand, or published by another."""

import math

import pytest

from deepzoo.recipes.parts.accuracy import wilson
from deepzoo.seeds import checks
from deepzoo.seeds.checks import CHECKS, Figure
from deepzoo.zoo.errors import ConfigError

# Without the input embedding; of V2 59 layers have 154 experts that are not chosen.
V2_ACTIVE = 235_741_434_880 - 59 * 154 * 3 * 5120 * 1536 - 102_400 * 5120
V3_ACTIVE = 36_625_618_432


@pytest.mark.parametrize(
    ("check", "inputs", "expected"),
    [
        ("parameters", {"model": "deepseek-v2"}, 235.74143488),
        ("parameters", {"model": "deepseek-r1"}, 671.0264192),
        ("active_parameters", {"model": "deepseek-v3"}, V3_ACTIVE / 1e9),
        (
            "active_parameters",
            {"model": "deepseek-v3", "embedding": True},
            (V3_ACTIVE + 129_280 * 7168) / 1e9,
        ),
        ("stored_numbers", {"model": "deepseek-r1"}, 684.531386),
        ("mtp_parameters", {"model": "deepseek-v3"}, 11.610068224),
        ("cache_kilobytes", {"model": "deepseek-v3"}, 576 * 61 * 2 / 1000),
        ("cache_kilobytes", {"model": "deepseek-v2", "bits": 6.0}, 25.92),
        (
            "cache_saving",
            {"model": "deepseek-v2", "bits": 6.0, "layers": 95, "kv_heads": 8, "head_size": 128},
            100 - 100 * 25_920 / 389_120,
        ),
        (
            "cache_saving",
            {"model": "deepseek-v2", "bits": 16.0, "layers": 95, "kv_heads": 8, "head_size": 128},
            100 - 100 * 69_120 / 389_120,
        ),
        ("cache_saving_over_own_heads", {"model": "deepseek-r1"}, 100 - 100 * 576 / (128 * 320)),
        ("cache_as_groups", {"model": "deepseek-v2"}, 2.25),
        ("context", {"model": "deepseek-v2"}, 160),
        ("context", {"model": "deepseek-r1-0528-qwen3-8b"}, 128),
        (
            "training_gigaflops",  # a head's 192 + 128 columns meet 2,048 positions on average
            {"model": "deepseek-v3", "length": 4096},
            6 * (V3_ACTIVE + 61 * 128 * 320 * 2048) / 1e9,
        ),
        (
            "utilisation",
            {"model": "deepseek-v3", "length": 4096, "trillion_tokens": 14.8}
            | {"thousand_hours": 2664.0, "teraflops": 989.0},
            100 * 250.456e9 * 14.8e12 / (2.664e6 * 3600 * 989e12),
        ),
        (
            "training_days",
            {"model": "deepseek-v2", "trillion_tokens": 8.1, "gpus": 10_000, "teraflops": 312.0}
            | {"efficiency": 30.0},
            6 * V2_ACTIVE * 8.1e12 / (10_000 * 312e12 * 0.3) / 86_400,
        ),
        ("total", {"parts": [2664.0, 119.0, 5.0]}, 2788),
        ("quotient", {"product": [64.0, 8.0, 198.0], "over": [1000.0]}, 101.376),
        ("percent_less", {"one": 172.8, "other": 300.6}, 42.51497005988024),
    ],
)
def test_a_figure_equals_the_one_by_hand(check: str, inputs: dict, expected: float):
    found = CHECKS[check](**inputs)
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_check_has_a_number_by_hand_or_is_of_measured_shares():
    tested = {mark.args[1][i][0] for mark in test_a_figure_equals_the_one_by_hand.pytestmark
              for i in range(len(mark.args[1]))}  # fmt: skip
    assert set(CHECKS) - tested == {"share", "gain"}


def test_a_difference_has_newcombes_interval():
    """56 of 70 against 48 of 80, the paper's first example: 0.0524 to 0.3339."""
    later, earlier = (
        Figure(100 * n / of, *(100 * x for x in wilson(n, of))) for n, of in ((56, 70), (48, 80))
    )
    found = checks.gain(later=later, earlier=earlier)
    assert found == pytest.approx((20.0, 5.24, 33.39), abs=0.005)
    back = checks.gain(later=earlier, earlier=later)
    assert back == pytest.approx((-20.0, -33.39, -5.24), abs=0.005)
    assert checks.share(of=later) is later


def test_a_model_that_a_check_is_not_for_is_named():
    with pytest.raises(ConfigError, match="distill-qwen-7b has no latent attention"):
        checks.cache_as_groups(model="deepseek-r1-distill-qwen-7b")
    with pytest.raises(ConfigError, match="moonlight-16b-a3b is not extended by YaRN"):
        checks.context(model="moonlight-16b-a3b")
    assert math.isclose(checks.parameters(model="DeepSeek-V2"), 235.74143488)

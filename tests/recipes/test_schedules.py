"""Rates and batch sizes against the numbers in the papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.recipes.parts import schedules


def test_the_nano_schedule_rises_stays_and_falls():
    factor = schedules.warmup_constant_decay(100, 0.1, 0.2)
    found = [float(factor(jnp.asarray(s))) for s in range(100)]
    assert found[0] == pytest.approx(0.1)
    assert found[4] == pytest.approx(0.5)
    assert found[10:80] == pytest.approx([1.0] * 70)
    assert 0 < found[99] < 0.06
    assert all(a >= b for a, b in itertools.pairwise(found[80:]))


def test_v2_two_drops():
    rate = schedules.scaled(2.4e-4, schedules.v2(100_000))
    at = [0, 999, 1999, 59_999, 60_000, 89_999, 90_000, 99_999]
    expected = [1.2e-7, 1.2e-4, 2.4e-4, 2.4e-4, 7.584e-5, 7.584e-5, 2.396544e-5, 2.396544e-5]
    assert [float(rate(s)) for s in at] == pytest.approx(expected, rel=1e-5)
    lite = schedules.v2(1000, warmup=0, drops=(0.8, 0.9))
    assert [float(lite(s)) for s in (0, 799, 800, 900)] == pytest.approx([1, 1, 0.316, 0.099856])


def test_v3_in_tokens():
    """A step is 0.01T of 14.8T tokens: 10T at step 1000, 14.3T at 1430, 14.633T at 1463.3."""
    rate = schedules.scaled(2.2e-4, schedules.v3(1480, warmup=20))
    assert float(rate(9)) == pytest.approx(1.1e-4, rel=1e-5)
    assert [float(rate(s)) for s in (19, 500, 1000)] == pytest.approx([2.2e-4] * 3, rel=1e-5)
    middle = (2.2e-4 + 2.2e-5) / 2
    assert float(rate(1215)) == pytest.approx(middle, rel=1e-3)
    assert [float(rate(s)) for s in (1430, 1463)] == pytest.approx([2.2e-5] * 2, rel=1e-5)
    assert [float(rate(s)) for s in (1464, 1479)] == pytest.approx([7.3e-6] * 2, rel=1e-5)
    share = schedules.shares(1480)
    gamma, weight = schedules.v3_bias_rate(0.001, share), schedules.v3_mtp_weight(share)
    assert [float(gamma(s)) for s in (0, 1429, 1431)] == pytest.approx([0.001, 0.001, 0.0])
    assert [float(weight(s)) for s in (0, 999, 1001)] == pytest.approx([0.3, 0.3, 0.1])


def test_r1_sft_ends_at_a_tenth():
    rate = schedules.scaled(5e-5, schedules.warmup_cosine(101))
    assert [float(rate(s)) for s in (0, 50, 100)] == pytest.approx([5e-5, 2.75e-5, 5e-6], rel=1e-5)
    warm = schedules.warmup_cosine(110, warmup=10, last=0.2)  # V3's SFT: 5e-6 to 1e-6
    assert [float(warm(s)) for s in (0, 9, 10, 109)] == pytest.approx([0.1, 1.0, 1.0, 0.2])


@pytest.mark.parametrize(
    ("first", "last", "until", "total"),
    [(2304, 9216, 225e9, 8.1e12), (3072, 15360, 469e9, 14.8e12)],
)
def test_the_batch_grows_as_in_the_papers(first: int, last: int, until: float, total: float):
    ramp = schedules.ramp(first, last, until, total, 4096, multiple=64)
    sizes = [ramp.rows(s) for s in range(0, 30_000, 50)]
    assert sizes[0] == first
    assert sizes[-1] == last
    assert sizes == sorted(sizes)
    assert all(size % 64 == 0 for size in sizes)
    end = next(s for s in range(30_000) if ramp.rows(s) == last and ramp.tokens(s) >= until)
    assert ramp.tokens(end) == pytest.approx(until, rel=2e-3)
    half = next(s for s in range(30_000) if ramp.tokens(s) >= until / 2)
    assert ramp.rows(half) == pytest.approx((first + last) / 2, abs=128)
    counted = list(itertools.accumulate(ramp.rows(s) * 4096 for s in range(end + 5)))
    assert [ramp.tokens(s + 1) for s in range(end + 5)] == counted
    assert ramp.tokens(ramp.steps - 1) < total <= ramp.tokens(ramp.steps)
    share = jax.jit(ramp.share)
    for step in (0, half, end, end + 1, ramp.steps // 2, ramp.steps):
        assert float(share(step)) == pytest.approx(ramp.tokens(step) / total, rel=1e-5, abs=1e-9)


def test_a_schedule_in_tokens_with_a_growing_batch():
    ramp = schedules.ramp(10, 100, 10_000, 100_000, 10)
    rate = jax.jit(schedules.v2(ramp.steps, warmup=0, share=ramp.share))
    found = np.array([float(rate(s)) for s in range(ramp.steps)])
    for share, factor in ((0.6, 0.316), (0.9, 0.316**2)):
        step = int(np.argmax(found <= factor * 1.001))
        assert ramp.tokens(step - 1) < share * 100_000 <= ramp.tokens(step)

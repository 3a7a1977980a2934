"""Advantages and the GRPO family against float64 references written from the papers' equations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.recipes.parts.advantage import advantages, by_component, dead
from deepzoo.recipes.parts.policy import Objective, policy_loss

LONGEST = 12


def answers(seed=0, count=6, length=9, spread=0.4):
    """Log-probabilities under four policies, advantages, mask with answers of unequal length."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (count, length))
    near = {k: logprobs + rng.normal(0, spread, logprobs.shape) for k in ("old", "ref", "roll")}
    lengths = rng.integers(1, length + 1, count)
    mask = (np.arange(length) < lengths[:, None]).astype(np.float32)
    advantage = rng.normal(0, 1, count)
    entropy = rng.exponential(1.0, logprobs.shape)
    return logprobs, entropy, near, advantage, mask


def reference_loss(o, logprobs, entropy, near, advantage, mask, *, kl, corrected):
    """Token by token, float64: (sum, weight), as the file's head states the objective."""
    total, weight = 0.0, 0.0
    for i in range(len(logprobs)):
        ids = np.flatnonzero(mask[i])
        if not len(ids):
            continue
        a = advantage[i]
        logratio = logprobs[i] - near["old"][i]
        gap = near["old"][i] - near["roll"][i]
        if o.level == "sequence":
            logratio = np.full_like(logratio, logratio[ids].mean())
            gap = np.full_like(gap, gap[ids].mean())
        left = (near["old"][i] - logprobs[i])[ids].mean()
        if o.off_policy and a < 0 and left > o.off_policy:
            each = [0.0 for _ in ids]
        else:
            each = []
            for t in ids:
                r = np.exp(logratio[t])
                c = min(max(r, max(0.0, 1 - o.clip_low)), 1 + o.clip_high)
                gain = c * a * logprobs[i, t] if o.form == "cispo" else min(r * a, c * a)
                if o.dual_clip and a < 0 and o.form == "clip":
                    gain = max(gain, o.dual_clip * a)
                if corrected and o.correction == "truncate":
                    gain *= min(np.exp(gap[t]), o.cap)
                if corrected and o.correction == "mask":
                    w = np.exp(gap[t])
                    gain *= w if 1 / o.cap <= w <= o.cap else 0.0
                value = -gain - o.entropy * entropy[i, t]
                if kl:
                    d = near["ref"][i, t] - logprobs[i, t]
                    k3 = np.exp(d) - d - 1
                    value += (
                        o.beta * {"k1": -d, "k2": d * d / 2, "k3": k3, "unbiased": r * k3}[o.kl]
                    )
                each.append(value)
        if o.norm == "token":
            total, weight = total + sum(each), weight + len(ids)
        else:
            by = len(ids) if o.norm == "sequence" else LONGEST
            total, weight = total + sum(each) / by, weight + 1
    return total, weight


FAMILY = {
    "grpo": Objective(beta=0.04),
    "r1_stage1": Objective(clip_low=10.0, clip_high=10.0, beta=0.001),
    "dr_grpo": Objective(norm="constant"),
    "dapo": Objective(clip_high=0.28, norm="token"),
    "gspo": Objective(level="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Objective(form="cispo", clip_low=1.0, clip_high=5.0, norm="token"),
    "dual": Objective(dual_clip=1.1, norm="token"),
    "k1": Objective(kl="k1", beta=0.3),
    "k2": Objective(kl="k2", beta=0.3),
    "unbiased": Objective(kl="unbiased", beta=0.3),
    "entropy": Objective(entropy=0.1),
    "truncated": Objective(correction="truncate", cap=1.2),
    "masked": Objective(correction="mask", cap=1.3),
    "sequence_masked": Objective(correction="mask", cap=1.1, level="sequence"),
    "off_policy": Objective(off_policy=0.05),
}


@pytest.mark.parametrize("name", FAMILY)
def test_each_member_equals_its_reference_with_its_gradient(name):
    o = FAMILY[name]
    logprobs, entropy, near, advantage, mask = answers()
    with_kl, corrected = bool(o.beta), o.correction != "none"

    def ours(logprobs):
        f = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
        return policy_loss(
            o, logprobs, f(entropy), f(near["old"]), f(advantage), f(mask), longest=LONGEST,
            reference=f(near["ref"]) if with_kl else None,
            rollout=f(near["roll"]) if corrected else None,
        )  # fmt: skip

    def exact(logprobs):
        options = {"kl": with_kl, "corrected": corrected}
        return reference_loss(o, logprobs, entropy, near, advantage, mask, **options)

    out = ours(jnp.asarray(logprobs, jnp.float32))
    total, weight = exact(logprobs)
    assert float(out.weight) == weight
    assert float(out.loss) == pytest.approx(total, rel=2e-5, abs=2e-5)
    if o.off_policy:  # at least one answer is left out, or this shows nothing
        gone = reference_loss(
            dataclasses.replace(o, off_policy=0.0), logprobs, entropy, near, advantage, mask,
            kl=False, corrected=False,
        )  # fmt: skip
        assert abs(gone[0] - total) > 1e-3
    gradient = np.asarray(jax.grad(lambda x: ours(x).loss)(jnp.asarray(logprobs, jnp.float32)))
    if o.form == "cispo":
        # The clipped ratio is a constant: the gradient is that weight times the advantage.
        ratio = np.exp(logprobs - near["old"])
        expected = -np.clip(ratio, 0, 6) * advantage[:, None] * mask
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        return
    for i, t in itertools.product(range(len(logprobs)), range(logprobs.shape[1])):
        ends = []
        for sign in (1, -1):
            moved = logprobs.copy()
            moved[i, t] += sign * 1e-6
            ends.append(exact(moved)[0])
        slope = (ends[0] - ends[1]) / 2e-6
        assert gradient[i, t] == pytest.approx(slope, rel=1e-3, abs=1e-4), (i, t)


def test_on_the_first_inner_step_the_ratio_is_one_and_the_gradient_that_of_reinforce():
    logprobs, entropy, _, advantage, mask = answers()
    f = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731

    def loss(x):
        return policy_loss(
            Objective(norm="token"), x, f(entropy), f(logprobs), f(advantage), f(mask),
            longest=LONGEST,
        )  # fmt: skip

    out = loss(f(logprobs))
    assert float(out.metrics["clipped"].total) == 0
    assert float(out.loss) == pytest.approx(-(advantage[:, None] * mask).sum(), rel=1e-5)
    gradient = jax.grad(lambda x: loss(x).loss)(f(logprobs))
    np.testing.assert_allclose(gradient, -advantage[:, None] * mask, rtol=1e-5)


def test_zero_advantages_give_a_zero_gradient_and_padding_may_hold_anything():
    logprobs, entropy, near, _, mask = answers()
    f = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    bad = np.where(mask > 0, near["old"], np.nan)

    def loss(x, advantage):
        return policy_loss(
            Objective(beta=0.1), x, f(np.where(mask > 0, entropy, np.nan)), f(bad), f(advantage),
            f(mask), longest=LONGEST, reference=f(logprobs),
        ).loss  # fmt: skip

    # The reference is the policy: no divergence, no gradient from it.
    gradient = jax.grad(loss)(f(logprobs), np.zeros(len(mask)))
    assert (np.asarray(gradient) == 0).all()
    gradient = np.asarray(jax.grad(loss)(f(logprobs), np.ones(len(mask))))
    assert np.isfinite(gradient).all()
    assert (gradient[mask == 0] == 0).all()


def test_an_empty_answer_adds_nothing():
    logprobs, entropy, near, advantage, mask = answers()
    mask[2] = 0
    f = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    for norm in ("sequence", "token", "constant"):
        out = policy_loss(
            Objective(norm=norm), f(logprobs), f(entropy), f(near["old"]), f(advantage), f(mask),
            longest=LONGEST,
        )  # fmt: skip
        rest = np.delete(np.arange(6), 2)
        some = [f(a[rest]) for a in (logprobs, entropy, near["old"], advantage, mask)]
        few = policy_loss(Objective(norm=norm), *some, longest=LONGEST)
        assert float(out.loss) == pytest.approx(float(few.loss), rel=1e-6)
        assert float(out.weight) == float(few.weight)


def test_a_divergence_without_reference_and_a_correction_without_rollout_are_refused():
    logprobs, entropy, near, advantage, mask = (jnp.ones((2, 3)) for _ in range(5))
    with pytest.raises(ValueError, match="needs reference="):
        policy_loss(Objective(beta=0.1), logprobs, entropy, near, advantage[:, 0], mask, longest=3)
    corrected = Objective(correction="mask")
    with pytest.raises(ValueError, match="correction 'mask' needs rollout="):
        policy_loss(corrected, logprobs, entropy, near, advantage[:, 0], mask, longest=3)


def test_advantages_sum_to_zero_in_each_group_and_have_deviation_one():
    rewards = np.random.default_rng(0).integers(0, 3, (5, 8)).astype(float)
    made = advantages(rewards)
    np.testing.assert_allclose(made.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(made.std(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(
        advantages(rewards, scale="none"), rewards - rewards.mean(axis=1, keepdims=True), atol=1e-6
    )
    whole = advantages(rewards, scale="batch_std")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(whole, centred / centred.std(), rtol=1e-4)


def test_leave_one_out_compares_with_the_others():
    rewards = np.array([[1.0, 0.0, 0.5, 0.0]])
    made = advantages(rewards, scale="none", baseline="leave_one_out")
    others = [(rewards.sum() - r) / 3 for r in rewards[0]]
    np.testing.assert_allclose(made[0], rewards[0] - others, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_groups_without_variance_teach_nothing(value):
    rewards = np.full((2, 7), value)
    rewards[1, 3] += 1
    assert (advantages(rewards)[0] == 0).all()
    assert dead(rewards).tolist() == [True, False]


def test_dropped_answers_count_for_nothing():
    rewards = np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, np.nan]])
    made = advantages(rewards)
    np.testing.assert_allclose(made[0], [1, 0, -1], atol=1e-4)
    assert (made[1] == 0).all()
    with pytest.raises(ValueError, match="infinite"):
        advantages(np.array([[np.inf, 0.0]]))


def test_components_are_normalised_before_they_are_added():
    parts = np.array([[[1.0, 0.0, 0.0, 1.0]], [[10.0, 10.0, -10.0, -10.0]]])
    made = by_component(parts, np.ones(2))
    np.testing.assert_allclose(made[0], np.array([2, 0, -2, 0]) / np.sqrt(2), atol=1e-4)
    # Added first, the larger one would decide alone.
    assert advantages(parts.sum(axis=0))[0, 1] > 0.8
    made = by_component(parts, np.array([3.0, 1.0]))
    np.testing.assert_allclose(made[0], np.array([4, -2, -4, 2]) / np.sqrt(10), atol=1e-4)
    assert (by_component(np.ones((2, 3, 4)), np.ones(2)) == 0).all()
    parts[:, 0, 1] = np.nan
    assert by_component(parts, np.ones(2))[0, 1] == 0

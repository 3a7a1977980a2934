"""Advantages of answers from the rewards of their group.

P prompts  G answers of each  C components of the reward
"""

from typing import Any, Literal

import numpy as np

type Scale = Literal["group_std", "batch_std", "none"]
type Baseline = Literal["mean", "leave_one_out"]


def advantages(
    rewards: np.ndarray, *, scale: Scale = "group_std", baseline: Baseline = "mean"
) -> np.ndarray:
    """A = (R - mean of the group) / deviation (DeepSeekMath, arXiv 2402.03300, 4.1.2).

    Args:
        rewards: [P, G]; NaN for an answer that was dropped (its verifier failed, not the model).
        scale: "group_std" divides by the group's deviation (GRPO), "batch_std" by that of all
            centred rewards (arXiv 2508.08221), "none" by nothing (Dr. GRPO, arXiv 2503.20783).
        baseline: "leave_one_out" compares with the mean of the others (RLOO, arXiv 2402.14740).

    Returns:
        float32 [P, G]; each group's sum is 0 with baseline "mean". A group whose rewards are all
        equal, and a dropped answer, get 0.

    Raises:
        ValueError: an infinite reward.
    """
    rewards = np.asarray(rewards, np.float64)
    if np.isinf(rewards).any():
        raise ValueError("advantages: a reward is infinite; rewards are finite, or NaN to drop one")
    there = ~np.isnan(rewards)
    count = np.maximum(there.sum(axis=1, keepdims=True), 1)
    filled = np.where(there, rewards, 0.0)
    centred = np.where(there, filled - filled.sum(axis=1, keepdims=True) / count, 0.0)
    # Rounding leaves 1e-17 of a group of equal rewards; divided by its deviation it would be noise.
    alive = ~dead(rewards)[:, None]
    centred = np.where(alive, centred, 0.0)
    if baseline == "leave_one_out":
        out = centred * count / np.maximum(count - 1, 1)
    else:
        out = centred
    if scale == "group_std":
        spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
        out = out / np.where(alive, spread + 1e-6, 1.0)
    elif scale == "batch_std":
        out = out / (np.sqrt((centred**2).sum() / max(int(there.sum()), 1)) + 1e-6)
    return out.astype(np.float32)


def by_component(parts: np.ndarray, weights: np.ndarray, **options: Any) -> np.ndarray:
    """Compares each component of the reward for itself, then adds (GDPO, arXiv 2601.05242).

    So that a component with a small range is not lost beside one with a large range. The sum is
    divided by its deviation over the whole batch: its size does not grow with the components.

    Args:
        parts: [C, P, G]; NaN as for `advantages`.
        weights: [C], of the components' advantages.
        options: as for `advantages`.

    Returns:
        float32 [P, G], of deviation 1; all 0 where every component of every group is dead.
    """
    each = [w * advantages(part, **options) for w, part in zip(weights, parts, strict=True)]
    total = np.sum(each, axis=0, dtype=np.float64)
    there = ~np.isnan(parts).any(axis=0)
    spread = np.sqrt((total**2).sum() / max(int(there.sum()), 1))
    return (np.where(there, total, 0.0) / (spread + 1e-6)).astype(np.float32)


def dead(rewards: np.ndarray) -> np.ndarray:
    """bool [P]: groups that teach nothing, because all their rewards are equal (or dropped)."""
    low = np.nanmin(np.where(np.isnan(rewards), np.inf, rewards), axis=1)
    high = np.nanmax(np.where(np.isnan(rewards), -np.inf, rewards), axis=1)
    return ~(high > low)

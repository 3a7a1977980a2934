"""Router written out token by token in float64, from the papers' equations."""

import numpy as np


def router(
    logits: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    k: int,
    scoring: str,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices int [M, K], best first, and weights float64 [M, K]; arguments as in
    `router.xla.router`."""
    logits = np.asarray(logits, np.float64)
    indices, weights = [], []
    for row in logits:
        if scoring == "softmax":
            score = np.exp(row - row.max())
            score /= score.sum()
        else:
            score = 1.0 / (1.0 + np.exp(-row))
        choice = score if bias is None else score + np.asarray(bias, np.float64)
        eligible = list(range(len(row)))
        if groups > 1:
            members = np.split(np.arange(len(row)), groups)
            best = [np.sort(choice[m])[::-1] for m in members]
            rank = [b[0] if group_score == "max" else b[0] + b[1] for b in best]
            kept = np.argsort(-np.array(rank), kind="stable")[:top_groups]
            eligible = sorted(int(i) for g in kept for i in members[g])
        chosen = sorted(eligible, key=lambda i: (-choice[i], i))[:k]
        weight = score[chosen]
        if normalise:
            weight = weight / weight.sum()
        indices.append(chosen)
        weights.append(weight * scale)
    return np.array(indices), np.array(weights)

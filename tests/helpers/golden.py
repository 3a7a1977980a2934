"""The golden cases (tests/golden) as the zoo loads them, and what transformers got from them."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepzoo import zoo

GOLDEN = Path(__file__).parents[1] / "golden"
LATENT = ["v2_lite_like", "v2_like", "v3_like", "v3_noq", "v3_fp8", "v3_fp8_ue8m0", "v3_bf16"]
DENSE = ["qwen2_tied", "qwen2_untied", "llama31_like", "qwen3_yarn"]
CASES = LATENT + DENSE
MTP = ["v3_like", "v3_fp8", "v3_fp8_ue8m0", "v3_bf16"]
BOUND, BOUND_DECODE = 5e-5, 2e-5  # logits have a deviation of 1
CAPACITY = 53  # one for all, so that programs are compiled once: 37 prompt tokens and 16 more
WRONG = 100 * BOUND  # a mistake has to move the logits by at least this


@functools.cache
def golden(case: str) -> tuple[zoo.Config, dict[str, Any], dict[str, np.ndarray]]:
    """(config, parameters, expected): float32 parameters, FP8 ones stay FP8; expected.npz."""
    model = zoo.load(GOLDEN / case, dtype="float32", stacked=True)
    with np.load(GOLDEN / case / "expected.npz") as file:
        return model.config, model.params, dict(file)


@functools.cache
def whole(case: str) -> zoo.Output:
    """One pass over the golden tokens."""
    config, params, expected = golden(case)
    return zoo.apply(config, params, jnp.asarray(expected["tokens"]))


def extend(
    config: zoo.Config, params: dict[str, Any], tokens: Any, cache: zoo.Cache, lengths: Any = None
) -> tuple[np.ndarray, zoo.Cache]:
    """One pass behind a cache: (logits, cache)."""
    if lengths is None:
        lengths = [tokens.shape[1]] * tokens.shape[0]
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
    out = zoo.apply(config, params, tokens, cache=cache, lengths=lengths)
    assert out.cache is not None
    return np.asarray(out.logits), out.cache


def distance(a: Any, b: Any) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


def choices(output: zoo.Output) -> np.ndarray:
    """Experts chosen, int32 [L, B, T, K], in ascending order."""
    assert output.routing is not None
    return np.sort(np.asarray(output.routing.indices), axis=-1)

"""A decode step of V2-Lite with four expert layers, its parameters stacked and a dict a layer:
programs for the compiler, run by nobody."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.kernels.cases import Case
from deepzoo.zoo.cache import cache as empty_cache
from deepzoo.zoo.functional import apply, init

CONFIG = dataclasses.replace(zoo.config("deepseek-v2-lite"), num_hidden_layers=5)
BATCH, CONTEXT = 32, 4096
# bfloat16 bytes of the routed experts of one layer: gate, up and down
LAYER = 3 * CONFIG.n_routed_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size * 2


def _case(stacked: bool) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        params = init(CONFIG, jax.random.key(seed), stacked=stacked)
        held = empty_cache(CONFIG, BATCH, CONTEXT, stacked=stacked)
        return params, jnp.zeros((BATCH, 1), jnp.int32), held

    def bind(form: str) -> Callable[..., Any]:
        return lambda params, tokens, held: apply(CONFIG, params, tokens, cache=held).logits

    name = "scanned" if stacked else "unrolled"
    return Case("decode", name, ("auto",), bind, inputs, 1.0, 1.0)


CASES = (_case(True), _case(False))

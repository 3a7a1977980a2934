"""The adapters that PEFT opened (tests/golden/peft) are those that `lora.export` writes today."""

from pathlib import Path

import faults
import jax
import numpy as np
import pytest
from golden import GOLDEN, golden
from safetensors.numpy import load_file

from deepzoo.recipes.parts import lora

PEFT = GOLDEN / "peft"
RANK, ALPHA = 3, 6.0
CASES = {"qwen2_untied": ("attention", "dense_mlp"), "v3_noq": ("attention",)}  # as in make.py


def exported(case: str, folder: Path) -> Path:
    """What `make.py export` writes: B is not zero."""
    config, _, _ = golden(case)
    key = jax.random.key(0)
    made = lora.init(config, RANK, CASES[case], key)
    keys = iter(jax.random.split(key, len(made)))
    made = {
        k: p | {"b": 0.1 * jax.random.normal(next(keys), p["b"].shape)} for k, p in made.items()
    }
    lora.export(config, made, ALPHA, folder / case)
    return folder / case


@pytest.mark.parametrize("case", CASES)
def test_what_peft_opened_is_what_is_written_today(case: str, tmp_path: Path):
    now, then = exported(case, tmp_path), PEFT / case
    assert sorted(p.name for p in now.iterdir()) == sorted(p.name for p in then.iterdir())
    config = "adapter_config.json"
    assert (now / config).read_bytes() == (then / config).read_bytes()
    weights = "adapter_model.safetensors"
    # Names, order, dtypes, shapes and metadata; random numbers may differ in their last bit.
    assert faults.read_shard(now / weights)[0] == faults.read_shard(then / weights)[0]
    ours, theirs = (load_file(folder / weights) for folder in (now, then))
    assert all(np.abs(tensor).max() > 0.01 for tensor in theirs.values())
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)

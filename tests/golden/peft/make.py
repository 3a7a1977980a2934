"""Adapters written by `recipes/parts/lora.py`, opened by PEFT: logits of both together.

    python tests/golden/peft/make.py export   # with deepzoo: writes the two folders here
    python tests/golden/peft/make.py          # with PEFT 0.21.2, transformers 5.24, torch 2.13

The adapters have rank 3, alpha 6 and a B that is not zero (`filled` in tests/recipes/test_lora.py).
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CASES = {"qwen2_untied": ("attention", "dense_mlp"), "v3_noq": ("attention",)}


def export():
    sys.path[:0] = [str(HERE.parents[1] / "helpers"), str(HERE.parents[1] / "recipes")]
    from golden import golden
    from test_lora import ALPHA, filled

    from deepzoo.recipes.parts import lora

    for case, targets in CASES.items():
        config, _, _ = golden(case)
        lora.export(config, filled(config, targets), ALPHA, HERE / case)


def ask():
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for case in CASES:
        base = AutoModelForCausalLM.from_pretrained(HERE.parent / case, dtype=torch.float32)
        tokens = np.load(HERE.parent / case / "expected.npz")["tokens"][:1, :12].astype(np.int64)
        model = PeftModel.from_pretrained(base, HERE / case)
        adapted = [n for n, _ in model.named_parameters() if "lora_A" in n]
        with torch.no_grad():
            found = model(torch.from_numpy(tokens)).logits.numpy()
            with model.disable_adapter():
                plain = model(torch.from_numpy(tokens)).logits.numpy()
        print(case, len(adapted), "adapters, logits moved by", np.abs(found - plain).max())
        np.savez_compressed(HERE / f"{case}.npz", tokens=tokens.astype(np.int32), logits=found)


if __name__ == "__main__":
    export() if sys.argv[1:] == ["export"] else ask()

"""A good directory to damage, and the check that a refusal is one line and changes nothing."""

from pathlib import Path
from typing import Any

import faults
import pytest

from deepzoo import zoo
from deepzoo.zoo.errors import DeepzooError, WeightError

ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
TOKENIZER = Path(__file__).parents[1] / "data" / "text" / "tokenizer"


def refused(source: Path, error: type[DeepzooError] = WeightError, **options: Any) -> str:
    """The one line of the refusal; the directory is as it was."""
    before = faults.snapshot(source.parent)
    with pytest.raises(error) as found:
        zoo.load(source, **options)
    assert faults.snapshot(source.parent) == before
    message = str(found.value)
    assert "\n" not in message and len(message) < 2000
    return message


def rename(header: faults.Header, old: str, new: str) -> None:
    header[:] = [(new if name == old else name, entry) for name, entry in header]


def update(header: faults.Header, name: str, **values: Any) -> None:
    dict(header)[name].update(values)

"""Distillation can be ended at any instant and gone on with."""

from pathlib import Path

from resumable import Resumable, check, rows

CASE = Resumable(
    source="""
        distill = copied("distill")
        recipe = dataclasses.replace(
            distill.PRESETS["nano"], mode="logits", problems=4, max_tokens=48, hidden=16, layers=1,
            heads=2, rows=2, length=96, steps=6, held_out=0, slots=4,
            sample_every=3,
        )
        train = distill.train
    """
)


def test_it_can_be_ended_and_gone_on_with(tmp_path: Path):
    check(CASE, tmp_path)
    assert (tmp_path / "broken" / "model" / "model.safetensors").is_file()
    assert any("sample" in row for row in rows(tmp_path / "broken"))

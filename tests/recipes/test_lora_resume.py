"""Fine-tuning with adapters can be ended at any instant and gone on with."""

from pathlib import Path

from resumable import Resumable, check, rows

CASE = Resumable(
    source="""
        sft = copied("sft")
        recipe = dataclasses.replace(
            sft.PRESETS["nano"], lora_rank=2, samples=24, epochs=1, rows=2, length=128, held_out=0,
            overlong="cut", sample_every=3,
        )
        train = sft.train
    """
)


def test_it_can_be_ended_and_gone_on_with(tmp_path: Path):
    check(CASE, tmp_path)
    assert (tmp_path / "broken" / "adapter" / "adapter_model.safetensors").is_file()
    assert any("sample" in row for row in rows(tmp_path / "broken"))

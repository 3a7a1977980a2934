"""Pretraining can be ended at any instant and gone on with."""

from pathlib import Path

from resumable import Resumable, check

CASE = Resumable(
    source="""
        pretrain = copied("pretrain")
        config = dataclasses.replace(
            pretrain.PRESETS["v3_nano"].config, hidden_size=16, intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
            moe_intermediate_size=8, vocab_size=1007,
        )
        recipe = dataclasses.replace(
            pretrain.PRESETS["v3_nano"], config=config, steps=6, rows=2, length=64, problems=0,
            sample_every=0, rate=0.0,
        )
        train = pretrain.train
    """
)


def test_it_can_be_ended_and_gone_on_with(tmp_path: Path):
    check(CASE, tmp_path)
    assert (tmp_path / "broken" / "model" / "model.safetensors").is_file()

"""Context extension can be ended at any instant, in its second phase too, and gone on with."""

import json
from pathlib import Path

import jax
import numpy as np
from resumable import Resumable, check, rows

from deepzoo import zoo

CASE = Resumable(
    source="""
        import jax
        from deepzoo import zoo
        from deepzoo.recipes import pretrain
        extend = copied("extend")
        from deepzoo.recipes.parts import tasks
        from deepzoo.zoo.tokenizer import Tokenizer
        from deepzoo.zoo.types import Model

        base = out.parent / "base"
        if not base.exists():
            config = dataclasses.replace(
                pretrain.PRESETS["v3_nano"].config, hidden_size=16, intermediate_size=16,
                num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
                moe_intermediate_size=8,
            )  # experts in the MTP layer alone, which is not trained: less to compile
            params = zoo.init(config, jax.random.key(0))
            zoo.save_hf(Model(config, params, Tokenizer(tasks.tokenizer_files(), config)), base)
        recipe = dataclasses.replace(
            extend.PRESETS["nano"], model=str(base), original=32, factor=4, lengths=(64, 128),
            rows=(2, 2), batches=(1, 5), held_rows=2, sample_every=3,
        )
        train = extend.train
    """
)


def test_it_can_be_ended_in_its_second_phase_and_gone_on_with(tmp_path: Path):
    """Saved at step 1, the end of the first phase; killed in the next save, once it is visible."""
    broken = check(CASE, tmp_path, ends=("visible", "instant"))
    assert (broken / "model" / "model.safetensors").is_file()
    saved = json.loads((broken / "checkpoints" / "00000006" / "manifest.json").read_text())
    assert saved["model"]["config"]["rope_scaling"]["factor"] == 4
    config = json.loads((broken / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["num_nextn_predict_layers"]) == (128, 1)
    layers = [zoo.load(path).params["mtp"] for path in (tmp_path / "base", broken / "model")]
    for old, new in zip(*map(jax.tree.leaves, layers), strict=True):  # not trained, not lost
        np.testing.assert_array_equal(old, new)
    ranges = json.loads((broken / "report.json").read_text())["ranges"]
    assert [r["to"] for r in ranges] == [32, 64, 128]
    assert any("sample" in row for row in rows(broken))

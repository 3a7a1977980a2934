"""Preference optimisation can be ended at any instant and gone on with."""

from pathlib import Path

from resumable import Resumable, check, rows

CASE = Resumable(
    source="""
        dpo = copied("dpo")
        data = out.parent / "pairs.jsonl"
        pairs = [
            {"prompt": f"{n} + 3 =", "chosen": str(n + 3), "rejected": str(n + 2)}
            for n in range(12)
        ]
        data.write_text("".join(json.dumps(pair) + "\\n" for pair in pairs))
        recipe = dataclasses.replace(
            dpo.PRESETS["nano"], data=str(data), task="", pairs=2, length=16, held_out=0,
            sample_every=3,
        )
        train = dpo.train
    """
)


def test_it_can_be_ended_and_gone_on_with(tmp_path: Path):
    check(CASE, tmp_path)
    assert (tmp_path / "broken" / "model" / "model.safetensors").is_file()
    assert any("sample" in row for row in rows(tmp_path / "broken"))

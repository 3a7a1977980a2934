"""Every released model: its config to the key, its tensors to the name, its size to the unit."""

import json
import os
from pathlib import Path

import digests
import pytest

from deepzoo.zoo import catalog, names
from deepzoo.zoo.card import Card
from deepzoo.zoo.chat import chat_format
from deepzoo.zoo.cli import models as models_command
from deepzoo.zoo.cli import show as show_command
from deepzoo.zoo.config import Config
from deepzoo.zoo.count import CacheBytes, cache_bytes, count
from deepzoo.zoo.errors import ConfigError
from deepzoo.zoo.functional import abstract
from deepzoo.zoo.traps import traps

CONFIGS: dict[str, str] = json.loads((digests.DATA / "configs.json").read_text())
LISTINGS: dict[str, dict] = json.loads((digests.DATA / "tensors.json").read_text())
RELEASED = list(CONFIGS)

# Published, with the figures computed by another program from the listing of every tensor:
# main, MTP with its copies, MTP without, routed experts, active with and without input embedding.
SIZES = {
    "deepseek_v2_lite": (15_706_484_224, 0, 0, 14_394_851_328, 2_661_150_208, 2_451_435_008),
    "deepseek_v2_236b": (235_741_434_880, 0, 0, 222_717_542_400, 21_375_800_320, 20_851_512_320),
    "deepseek_v3_r1_fp8": (
        671_026_419_200,
        13_463_426_304,
        11_610_068_224,
        653_908_770_816,
        37_552_297_472,
        36_625_618_432,
    ),
    "kimi_k2_fp8": (1_026_408_232_448, 0, 0, 1_014_686_023_680, 32_861_500_928, 31_687_095_808),
    "moonlight_16b": (15_960_110_208, 0, 0, 14_394_851_328, 2_914_776_192, 2_579_231_872),
    "distill_qwen_1.5b": (1_777_088_000, 0, 0, 0, 1_777_088_000, 1_543_714_304),
    "distill_qwen_7b": (7_615_616_512, 0, 0, 0, 7_615_616_512, 7_070_619_136),
    "distill_qwen_14b": (14_770_033_664, 0, 0, 0, 14_770_033_664, 13_991_465_984),
    "distill_qwen_32b": (32_763_876_352, 0, 0, 0, 32_763_876_352, 31_985_308_672),
    "distill_llama_8b": (8_030_261_248, 0, 0, 0, 8_030_261_248, 7_504_924_672),
    "distill_llama_70b": (70_553_706_496, 0, 0, 0, 70_553_706_496, 69_503_033_344),
    "distill_qwen3_8b": (8_190_735_360, 0, 0, 0, 8_190_735_360, 7_568_405_504),
}
MODELS_OF = [(name, listing) for name, entry in LISTINGS.items() for listing in entry["models"]]


def test_the_catalogue_holds_exactly_the_released_models():
    shipped = {path.parent.name for path in catalog.PRETRAINED.glob("*/config.json")}
    assert set(catalog.models()) - shipped == set(RELEASED)
    assert len(catalog.models()) == len(set(catalog.models()))
    assert len(RELEASED) == 33
    assert sorted(model for _, model in MODELS_OF) == sorted(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_config_equals_the_published_file_key_by_key(name: str):
    config = catalog.config(name)
    assert digests.digest_config(config.to_hf()) == CONFIGS[name]
    assert Config.from_hf(config.to_hf()) == config


def test_the_config_digest_sees_every_key():
    hf = catalog.config("deepseek-r1").to_hf()
    for key in hf:
        assert (
            digests.digest_config({k: v for k, v in hf.items() if k != key})
            != CONFIGS["deepseek-r1"]
        ), key
    assert digests.digest_config(hf | {"rope_theta": 10000.0}) != CONFIGS["deepseek-r1"]


@pytest.mark.parametrize(("architecture", "name"), MODELS_OF)
def test_size_equals_the_published_one_to_the_unit(architecture: str, name: str):
    counted = count(catalog.config(name))
    assert (
        counted.main,
        counted.mtp,
        counted.mtp_unique,
        counted.routed,
        counted.active,
        counted.active_without_embedding,
    ) == SIZES[architecture]
    assert counted.elements == LISTINGS[architecture]["elements"]


@pytest.mark.parametrize("architecture", LISTINGS)
def test_names_shapes_and_dtypes_equal_the_published_listing(architecture: str):
    entry = LISTINGS[architecture]
    ours: set[str] = set()
    for config in {catalog.config(model) for model in entry["models"]}:
        table = names.tensors(config)
        lines = {digests.line(t.name, t.shape, t.dtype) for t in table.values()}
        assert not ours or ours == lines
        ours = lines
    if listing := os.environ.get("DEEPZOO_LISTING"):  # the file digests.py made the table from
        published = json.loads(Path(listing).read_text())[architecture]["on_disk"]
        theirs = set(digests.tensor_lines(published))
        assert (sorted(ours - theirs)[:10], sorted(theirs - ours)[:10]) == ([], [])
    assert len(ours) == entry["tensors"]
    assert digests.digest_tensors(ours) == entry["sha256"], (
        "set DEEPZOO_LISTING to the listing to see which"
    )


@pytest.mark.parametrize("name", {catalog.config(name): name for name in RELEASED}.values())
def test_eval_shape_has_the_leaves_of_the_name_table(name: str):
    config = catalog.config(name)
    ours = {path: (leaf.shape, leaf.dtype.name) for path, leaf in names.flatten(abstract(config))}
    table = {path: (leaf.shape, leaf.dtype) for path, leaf in names.leaves(config).items()}
    assert ours == table


def test_bytes_by_dtype():
    r1 = count(catalog.config("deepseek-r1"))
    assert r1.bytes == {
        "float8_e4m3fn": 680_571_043_840,
        "bfloat16": 7_837_573_120,
        "float32": 166_222_400,
    }
    assert r1.total_bytes == 688_574_839_360
    assert r1.mtp_active == 2_541_458_688  # the report's 2.4B, by the shapes
    assert count(catalog.config("deepseek-r1-distill-qwen-1.5b")).bytes == {"bfloat16": 3554176000}


@pytest.mark.parametrize(
    ("name", "stored", "expanded"),
    [
        ("deepseek-v2-lite", 27 * 576 * 2, 27 * 16 * 320 * 2),
        ("deepseek-v2", 60 * 576 * 2, 60 * 128 * 320 * 2),
        ("deepseek-r1", 61 * 576 * 2, 61 * 128 * 320 * 2),
        ("kimi-k2-instruct", 61 * 576 * 2, 61 * 64 * 320 * 2),
        ("deepseek-r1-distill-qwen-7b", 28 * 2 * 4 * 128 * 2, 28 * 2 * 4 * 128 * 2),
        ("deepseek-r1-distill-llama-70b", 80 * 2 * 8 * 128 * 2, 80 * 2 * 8 * 128 * 2),
    ],
)
def test_cache_bytes_per_token(name: str, stored: int, expanded: int):
    config = catalog.config(name)
    assert cache_bytes(config) == CacheBytes(stored=stored, expanded=expanded)
    mtp = config.num_nextn_predict_layers
    assert cache_bytes(config, mtp=True).stored == stored + mtp * 576 * 2


def test_a_tied_head_is_counted_once():
    hf = catalog.config("deepseek-r1-distill-qwen-1.5b").to_hf() | {"tie_word_embeddings": True}
    counted = count(Config.from_hf(hf))
    assert counted.main == 1_543_714_304
    assert counted.active_without_embedding == 1_543_714_304


@pytest.mark.parametrize("name", RELEASED)
def test_card_agrees_with_its_config(name: str):
    card, counted = catalog.card(name), count(catalog.config(name))
    assert (card.name, (card.repo or "").rsplit("/")[-1].lower()) == (name, name)
    if name != "deepseek-r1-distill-qwen-1.5b":  # its name does not count the untied head
        assert _as_published(counted.main, card.parameters) == card.parameters
    assert (card.active is None) == (counted.routed == 0)
    if card.active:
        assert counted.active_without_embedding == pytest.approx(_number(card.active), rel=0.15)
    assert card.context <= catalog.config(name).max_position_embeddings
    if card.chat_format is not None:
        assert chat_format(card.chat_format).name == card.chat_format
        # V3.1 thinks only when asked; the models that always open the thought say so
        always = chat_format(card.chat_format).forced()
        assert card.forced_think == always
    assert card.sources
    unsure = {card.certainty.config, card.certainty.sampling, card.certainty.chat} - {"A"}
    assert bool(card.open) or not unsure


def _number(text: str) -> float:
    return float(text[:-1]) * {"B": 1e9, "T": 1e12}[text[-1]]


def _as_published(number: int, like: str) -> str:
    digits = len(like.partition(".")[2]) - 1 if "." in like else 0
    return f"{number / _number('1' + like[-1]):.{digits}f}{like[-1]}"


def test_what_is_not_confirmed_is_marked():
    """The doubts that would change numbers: mscale of four checkpoints, all of Kimi-K2-Base."""
    doubtful = {name for name in RELEASED if "mscale" in " ".join(catalog.card(name).open)}
    assert doubtful == {
        "deepseek-v2-chat-0628",
        "deepseek-v2.5-1210",
        "deepseek-coder-v2-base",
        "deepseek-coder-v2-instruct-0724",
    }
    assert {catalog.card(name).certainty.config for name in doubtful} == {"C"}
    assert catalog.card("kimi-k2-base").certainty.config == "C"


def test_names_are_forgiving_and_errors_helpful():
    assert catalog.config("DeepSeek-R1") == catalog.config("deepseek-ai/DeepSeek-R1")
    assert catalog.card("moonshotai/Kimi-K2-Instruct").name == "kimi-k2-instruct"
    with pytest.raises(ConfigError, match="'deepseek-r1-052'; did you mean deepseek-r1-0528"):
        catalog.config("deepseek-r1-052")
    with pytest.raises(ConfigError, match=r"did you mean .*deepseek-r1-distill-llama-8b"):
        catalog.config("llama-8b")
    with pytest.raises(ConfigError, match="no model is called 'zzz'; `deepzoo models` lists all"):
        catalog.card("zzz")
    with pytest.raises(ConfigError, match="no model is called ''"):
        catalog.config("")


def test_a_shipped_model_is_found_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path)
    folder = tmp_path / "tiny-r1"
    folder.mkdir()
    hf = catalog.config("moonlight-16b-a3b").to_hf() | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(hf))
    assert catalog.models()[-1] == "tiny-r1"
    assert catalog.config("tiny-r1").num_hidden_layers == 2
    assert catalog.card("tiny-r1").context == 8192
    assert catalog.shipped_directory("tiny-r1") == folder
    assert catalog.shipped_directory("deepseek-r1") is None
    text = {"parameters": "2M", "chat_format": "r1", "training": {"seed": 0, "accuracy": "95 %"}}
    (folder / "card.json").write_text(json.dumps(text))
    card = catalog.card("tiny-r1")
    assert (card.parameters, card.chat_format, card.repo) == ("2M", "r1", None)
    assert card.training == (("seed", "0"), ("accuracy", "95 %"))
    (folder / "card.json").write_text('{"paramters": "2M"}')
    with pytest.raises(ConfigError, match="unknown key 'paramters'"):
        catalog.card("tiny-r1")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "deepseek-v2-chat",
            ["interleaved", "mscale is 0.707 here and 1", "3 of 8", "best expert"],
        ),
        ("deepseek-v2.5", ["mscale is 1 here and 0.707", "+17.9 %", "times 16"]),
        ("deepseek-v2-lite-chat", ["no q_a/q_b pair", "32,768 tokens", "no space after"]),
        (
            "deepseek-r1",
            ["sum of its two best", "layer 61", "weight_scale_inv", "<think>", "0.1352"],
        ),
        ("deepseek-v3.1", ["ue8m0", "</think>", "131,072"]),
        ("moonlight-16b-a3b", ["eps 1e-06 always, not rms_norm_eps 1e-05", "n_group is 1"]),
        ("deepseek-r1-distill-qwen-1.5b", ["biases", "not tied", "151646"]),
        ("deepseek-r1-distill-qwen-14b", ["rms_norm_eps is 1e-05", "151646"]),
        ("deepseek-r1-distill-llama-70b", ["128001, 128008, 128009", "Llama 3.1's own rule"]),
        ("deepseek-r1-0528-qwen3-8b", ["attn_factor 0.87825", "1.13863", "every query and key"]),
    ],
)
def test_traps(name: str, told: list[str]):
    text = "\n".join(traps(catalog.config(name), catalog.card(name)))
    assert [words for words in told if words not in text] == []


def test_traps_do_not_cry_wolf():
    def text(name: str) -> str:
        return "\n".join(traps(catalog.config(name), catalog.card(name)))

    assert "mscale" not in text("deepseek-r1").replace("softmax", "")
    assert "FP8" not in text("deepseek-v2") + text("moonlight-16b-a3b")
    assert "not tied" not in text("deepseek-r1-distill-qwen-7b")
    assert "MTP" not in text("kimi-k2-instruct")
    assert "claimed context" not in text("moonlight-16b-a3b")
    assert "<think>" not in text("deepseek-r1-0528") + text("deepseek-v3")


def test_models_command(capsys: pytest.CaptureFixture[str]):
    assert models_command.run(models_command.Models(find="distill")) == 0
    rows = [row.split("\t") for row in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [name for name in catalog.models() if "distill" in name]
    assert len(rows) == 6 + 1  # six published students, and ours
    assert rows[0][1:4] == ["1.5B", "131,072", "r1"]
    assert models_command.run(models_command.Models(json=True)) == 0
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == catalog.models()
    r1 = next(card for card in cards if card["name"] == "deepseek-r1")
    assert (r1["temperature"], r1["certainty"]["sampling"]) == (0.6, "B")


def test_show_command(capsys: pytest.CaptureFixture[str]):
    assert show_command.run(show_command.Show(name="deepseek-r1")) == 0
    text = capsys.readouterr().out
    for words in (
        "total: 671,026,419,200 (671.03B)",
        "without input embedding: 36,625,618,432 (36.63B)",
        "MTP, copies left out: 11,610,068,224",
        "FP8 (e4m3): 680,571,043,840 bytes",
        "latent, bfloat16: 70,272 bytes (expanded: 4,997,120, 71.1 times)",
        "sampling: temperature 0.6, top-p 0.95 [B]",
    ):
        assert words in text, words
    assert "\x1b" not in text
    assert show_command.run(show_command.Show(name="deepseek-v2", json=True)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"]["main"] == 235_741_434_880
    assert digests.digest_config(shown["config"]) == CONFIGS["deepseek-v2"]


def test_show_command_on_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hf = catalog.config("deepseek-r1-distill-qwen-7b").to_hf()
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert show_command.run(show_command.Show(name=str(tmp_path))) == 0
    assert "total: 7,615,616,512 (7.62B)" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(hf | {"new_key": 1}))
    with pytest.raises(ConfigError, match=r"config\.json.*unknown key 'new_key'"):
        show_command.run(show_command.Show(name=str(tmp_path)))


def test_show_draws_tables_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    show_command.run(show_command.Show(name="deepseek-r1"))
    models_command.run(models_command.Models())
    text = capsys.readouterr().out
    assert "[A]" in text and "671,026,419,200" in text
    assert "moonlight-16b-a3b-instruct" in text


def test_cards_are_plain_values():
    for name in catalog.models():
        card = catalog.card(name)
        assert isinstance(card, Card) and hash(card) == hash(catalog.card(name))

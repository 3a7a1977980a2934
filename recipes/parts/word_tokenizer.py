"""What the `tokenizer.json` files of the built-in tasks have in common."""

from collections.abc import Iterable, Mapping
from typing import Any


def special_tokens(words: Iterable[str], vocab: Mapping[str, int]) -> list[dict[str, Any]]:
    """Entries of `added_tokens` for control tokens: found as they are, left out of texts."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": vocab[word], "content": word, **flags, "special": True} for word in words]


def starts_with(bos: str, vocab: Mapping[str, int]) -> dict[str, Any]:
    """A `post_processor` that puts `bos` before every text.

    Deepzoo goes by `add_bos_token` of `tokenizer_config.json`; transformers 5 does not, for a
    tokenizer without a class of its own, and takes what stands here.
    """
    single = [
        {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    ]  # fmt: skip
    return {
        "type": "TemplateProcessing", "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }  # fmt: skip

"""The tokenizer of Countdown's texts: one token for each whole number to 99, words, R1's marks.

Spaces are dropped before and put where they belong after, so `4,6,9` and `4, 6, 9` are one text. A
word or a number that is not in the vocabulary becomes [UNK]. The chat template renders R1's format,
as far as a conversation without tools goes.
"""

import json

from deepzoo.recipes.parts.countdown import LIMIT, NONE
from deepzoo.recipes.parts.rewards import ANSWER, ANSWER_END, THINK, THINK_END
from deepzoo.recipes.parts.word_tokenizer import special_tokens, starts_with
from deepzoo.zoo.chat_formats import ASSISTANT, BOS, EOS, USER

PAD, UNKNOWN = "<pad>", "[UNK]"
CONTROL = (PAD, BOS, EOS.text, USER.text, ASSISTANT.text, THINK, THINK_END)
MARKS = ("\n", ",", ".", ":", ";", "?", "+", "-", "*", "=", "(", ")", ANSWER, ANSWER_END)
WORDS = ("Make", "from", "What", "is", "yes", "over", "Give", "up", "So", "Cannot", "read", "this")
VOCABULARY = 136  # rows of the embedding: a multiple of 8
LENGTH = 576  # tokens of the longest text, a complete search of four numbers, and more

# Nothing of it is executed here: its hash names the chat format, see deepzoo/zoo/prompt.py.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '" + USER.text + "' +"
    " m.content }}{% elif m.role == 'assistant' %}{{ '" + ASSISTANT.text + "' +"
    " m.content.split('" + THINK_END + "')[-1] + eos_token }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT.text + THINK + "\\n' }}{% endif %}"
)


def tokenizer_files() -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`."""
    words = [*CONTROL, UNKNOWN, *MARKS, *WORDS, NONE, *map(str, range(LIMIT + 1))]
    assert len(words) == len(set(words)) <= VOCABULARY
    vocab = {word: index for index, word in enumerate(words)}
    tree = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": special_tokens(CONTROL, vocab),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                _split("[^\\S\\n]+", "Removed"),
                _split(f"{ANSWER}|{ANSWER_END}|[A-Za-z]+|[0-9]+|[^A-Za-z0-9]", "Isolated"),
            ],
        },
        "post_processor": starts_with(BOS, vocab),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "WordPiece", "prefix": "##", "cleanup": True},  # a space before each token
            {"type": "Fuse"},
            *(_replace(f" {mark}", mark) for mark in ("\n", ",", ".", ":", ";", "?", ")")),
            *(_replace(f" {mark}", mark) for mark in (*CONTROL, ANSWER_END)),
            *(_replace(f"{mark} ", mark) for mark in ("\n", "(", *CONTROL, ANSWER)),
        ]},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False,
        "bos_token": BOS, "eos_token": EOS.text, "pad_token": PAD, "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False, "model_max_length": LENGTH,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(tree, indent=1, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1, ensure_ascii=False).encode(),
    }


def _split(pattern: str, behavior: str) -> dict:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False,
    }  # fmt: skip


def _replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}

"""Makes the small tokenizer of the text tests, in the form of the published ones.

    python tests/data/text/make_tokenizer.py

Byte-level BPE over the 243 bytes that occur in UTF-8, the marks of every chat format with the flags
of the published files (role marks, tool marks and think tags are *not* special), gaps in the ids,
two ordinary added words, and merges that spell `<think>` and `[BOS]` out of pieces.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BAR, LOW = "\uff5c", "\u2581"  # FULLWIDTH VERTICAL LINE, LOWER ONE EIGHTH BLOCK
HERE = Path(__file__).parent / "tokenizer"
TEXT = [
    "what is three plus four? three plus four is seven, and seven minus two is five.",
    "the user asks a question, the assistant answers it: system, user, assistant, function.",
    "User: Assistant: <think> </think> [BOS] thinking, thinks, begin of sentence",
    '```json {"city": "Oslo"} ``` \n\n',
]


def mark(words: str) -> str:
    return f"<{BAR}{words.replace(' ', LOW)}{BAR}>"


def main() -> None:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in plain}
    table |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in plain)}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [table[b] for b in range(256) if b not in never]
    trained.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet)
    )
    trained.decoder = decoders.ByteLevel()
    tree = json.loads(trained.to_str())

    # As in the V3 file, the ends of a sentence stand in the vocabulary itself, at the front.
    words = sorted(tree["model"]["vocab"], key=lambda word: tree["model"]["vocab"][word])
    front = [mark("begin of sentence"), mark("end of sentence"), mark("▁pad▁")]
    vocab = {word: id for id, word in enumerate(front + words)}
    # Merges that build a control token out of its letters, as training on chat text leaves them;
    # first in rank, so that they win wherever the pre-tokenizer lets them.
    chains = []
    for text in ("<think>", "</think>", "[BOS]"):
        for end in range(2, len(text) + 1):
            chains.append([text[: end - 1], text[end - 1]])
            vocab.setdefault(text[:end], len(vocab))
    rest = [merge for merge in tree["model"]["merges"] if merge not in chains]
    tree["model"]["merges"] = chains + rest
    tree["model"]["vocab"] = vocab

    added = [(text, vocab[text], True) for text in [*front, "[BOS]"]]
    added += [("<think>", vocab["<think>"], False), ("</think>", vocab["</think>"], False)]
    following = len(vocab) + 5  # a gap, as left by reserved places
    marks = [mark("User"), mark("Assistant"), "<|EOT|>"]
    for group in ("calls", "call", "outputs", "output"):
        marks += [mark(f"tool {group} begin"), mark(f"tool {group} end")]
    marks += [mark("tool sep"), "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"]
    marks += ["<|im_middle|>", "[EOS]"]
    for text in marks:
        added.append((text, following, text.startswith("<|im") or text == "[EOS]"))
        following += 1
    added += [("\xf8", following + 3, False), ("\xf7", following + 4, False)]
    tree["added_tokens"] = [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": not special, "special": special}
        for text, id, special in sorted(added, key=lambda row: row[1])
    ]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": front[0], "normalized": True},
        "eos_token": {"__type": "AddedToken", "content": front[1], "normalized": True},
        "pad_token": front[1],
        "clean_up_tokenization_spaces": False,
    }
    HERE.mkdir(exist_ok=True)
    for name, content in (("tokenizer.json", tree), ("tokenizer_config.json", settings)):
        data = json.dumps(content, indent=None, separators=(",", ":"), ensure_ascii=False)
        (HERE / name).write_text(data + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

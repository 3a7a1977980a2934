"""A model whose every answer is known: each token has one successor, and nothing else counts.

The embedding is the identity, attention and MLP add zero, and row `b` of the head looks at the
place of token `a` for each pair a -> b. So text can be asserted to the letter, without training.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from deepzoo.zoo.config import Config
from deepzoo.zoo.functional import init
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.tokenizer import Control, Tokenizer
from deepzoo.zoo.types import Model

TOKENIZER = Path(__file__).parents[1] / "data" / "text" / "tokenizer"
END = "<END>"


def model(successors: Mapping[str, str], *, context: int = 512) -> Model:
    """A one-layer student that answers by `successors`: spelling of a token -> of the next one.

    The text tests' tokenizer is used; its control tokens are named by their spelling, `END` is the
    end of a sentence. What has no successor is followed by the end.
    """
    tokenizer = Tokenizer.load(TOKENIZER)
    config = Config(
        model_type="qwen2", vocab_size=416, hidden_size=416, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=context, rms_norm_eps=1e-6, rope_theta=10000.0,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_ids, dtype="float32",
    )  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, init(config, jax.random.key(0)))
    params["norm"]["weight"] = jnp.ones_like(params["norm"]["weight"])
    params["embed_tokens"]["weight"] = jnp.eye(416)
    end = tokenizer.eos_ids[0]
    head = jnp.zeros((416, 416)).at[end].set(1.0)
    for before, after in successors.items():
        head = head.at[_id(tokenizer, after), _id(tokenizer, before)].set(5.0)
    params["lm_head"]["weight"] = head
    return Model(config, params, tokenizer, "chain")


def save(directory: Path, successors: Mapping[str, str], *, context: int = 512) -> Path:
    """The same, written to `directory` in the published layout."""
    return save_hf(model(successors, context=context), directory)


def spelled(text: str) -> dict[str, str]:
    """Successors that spell `text`, whose letters must differ, from its first to its last."""
    if len(set(text)) != len(text):
        raise ValueError(f"{text!r}: a letter occurs twice, so its successor is not one")
    return dict(itertools.pairwise(text))


def _id(tokenizer: Tokenizer, text: str) -> int:
    if text == END:
        return tokenizer.eos_ids[0]
    if text in tokenizer.control:
        return tokenizer.control[text]
    ids = tokenizer.encode_pieces([Control(text)] if text in tokenizer.control else [text])
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, not one")
    return ids[0]

"""Small and true: a decoder of two layers, and rows packed by hand."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from itjax.base.records import PackedBatch, TokenizedExample
from itjax.base.schema import Lora
from itjax.models.config import ModelConfig
from itjax.models.model import NO_LORA, Model, Params, build

TINY = ModelConfig(
    vocab=96, layers=2, dim=32, heads=4, kv_heads=2, head_size=8, ffn=48, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip


@functools.cache  # so that tests share what is compiled
def tiny_model(
    config: ModelConfig = TINY,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    remat: str = "none",
    lora: Lora = NO_LORA,
    base: str = "float32",
) -> Model:
    return build(config, dtype=dtype, attention=attention, remat=remat, lora=lora, base=base)


@functools.cache
def tiny_params(config: ModelConfig = TINY, *, seed: int = 0, lora: Lora = NO_LORA, base: str = "float32") -> Params:
    """Drawn once; the same for every dtype, attention and remat. Not to be changed in place."""
    return tiny_model(config, lora=lora, base=base).init(jax.random.key(seed))


def example(seed: int, *, length: int, vocab: int = TINY.vocab) -> TokenizedExample:
    """Random tokens; the first third is asked, the rest answered."""
    tokens = np.random.default_rng(seed).integers(1, vocab, length + 1).astype(np.int32)
    weights = (np.arange(length) >= length // 3).astype(np.float32)
    return TokenizedExample(tokens[:-1], tokens[1:], weights)


def packed(rows: Sequence[Sequence[TokenizedExample]], *, length: int) -> PackedBatch:
    """Rows of examples, each padded to `length`; the source of an example is its number in the row."""
    shape = (len(rows), length)
    tokens, targets, segments, positions, source = (np.zeros(shape, np.int32) for _ in range(5))
    weights = np.zeros(shape, np.float32)
    for row, examples in enumerate(rows):
        start = 0
        for number, one in enumerate(examples):
            part = np.s_[row, start : start + len(one.tokens_T)]
            tokens[part], targets[part], weights[part] = one.tokens_T, one.targets_T, one.weights_T
            segments[part], positions[part], source[part] = number + 1, np.arange(len(one.tokens_T)), number
            start += len(one.tokens_T)
        assert start <= length, (start, length)
    return PackedBatch(tokens, targets, segments, positions, weights, source)

"""Presets: the numbers of published decoders, and of two small ones to train from nothing."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from itjax.base import schema
from itjax.base.freeze import nearest


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a Llama-style decoder."""

    vocab: int  # rows of the embedding
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    embed_scale: float = 1.0  # what embeddings are multiplied with before the first layer


# Vocabularies here are the published ones; `resolve` takes the tokenizer's.
# TODO: Llama 3.1 and 3.2 also stretch the low rotation frequencies for long contexts; until weights can be imported, a
# preset is only its shape, trained from nothing, and the plain frequencies serve.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab=1024, layers=3, dim=64, heads=4, kv_heads=4, head_size=16, ffn=160, rope_theta=1e4, norm_eps=1e-5,
        tie_embeddings=True, embed_scale=3.2,  # a small model copies words sooner when they enter louder
    ),
    "small": ModelConfig(
        vocab=8192, layers=4, dim=256, heads=8, kv_heads=4, head_size=32, ffn=704, rope_theta=1e4, norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama32_1b": ModelConfig(
        vocab=128256, layers=16, dim=2048, heads=32, kv_heads=8, head_size=64, ffn=8192, rope_theta=5e5, norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama31_8b": ModelConfig(
        vocab=128256, layers=32, dim=4096, heads=32, kv_heads=8, head_size=128, ffn=14336, rope_theta=5e5, norm_eps=1e-5,
        tie_embeddings=False,
    ),
}  # fmt: skip


def resolve(preset: str, overrides: schema.Architecture, *, vocab: int) -> ModelConfig:
    """The preset with its overrides, for ids below `vocab`. Raises ValueError naming the setting that does not fit."""
    if preset not in PRESETS:
        raise ValueError(
            f"model: preset {preset!r} is unknown.{nearest(preset, list(PRESETS))} Known: {', '.join(PRESETS)}"
        )
    given = {name: value for name, value in dataclasses.asdict(overrides).items() if value is not None}
    config = dataclasses.replace(PRESETS[preset], **{"vocab": vocab, **given})
    if ("dim" in given or "heads" in given) and "head_size" not in given:
        config = dataclasses.replace(config, head_size=_even_share(config))
    _check(config, vocab=vocab)
    return config


def _even_share(config: ModelConfig) -> int:
    if config.dim % config.heads:
        raise ValueError(
            f"architecture.heads: {config.heads} heads do not share a dim of {config.dim} evenly; "
            "change one of them or give architecture.head_size"
        )
    return config.dim // config.heads


def _check(config: ModelConfig, *, vocab: int) -> None:
    if config.heads % config.kv_heads:
        raise ValueError(
            f"architecture.kv_heads: {config.heads} heads cannot share {config.kv_heads} key/value heads evenly; "
            f"give a divisor of {config.heads}"
        )
    if config.head_size % 2:
        raise ValueError(
            f"architecture.head_size: {config.head_size} is odd, and rotary positions turn pairs; give an even number"
        )
    if config.vocab < vocab:
        raise ValueError(
            f"architecture.vocab: {config.vocab} is smaller than the tokenizer's {vocab} ids; give {vocab} or more"
        )


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied by: all kernels and the head, not the embedding's look-up."""
    attention = config.dim * config.head_size * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * config.dim * config.ffn) + config.dim * config.vocab


def train_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Useful FLOPs of forward and backward on examples of these lengths: nothing for padding, recomputation or other
    examples in the row; attention by the scores that causality leaves."""
    per_token = 6.0 * matmul_parameters(config)
    per_pair = 6.0 * config.layers * config.heads * config.head_size
    return sum(per_token * int(length) + per_pair * float(length) ** 2 for length in lengths)

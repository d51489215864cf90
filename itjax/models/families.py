"""Presets: the numbers of published decoders, and of two small ones to train from nothing."""

import dataclasses
from collections.abc import Iterable

from itjax.base import schema
from itjax.base.freeze import nearest
from itjax.models.config import ModelConfig, Rope

# Vocabularies here are the published ones; `resolve` takes the tokenizer's.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab=1024, layers=3, dim=64, heads=4, kv_heads=4, head_size=16, ffn=160, rope=Rope(theta=1e4), norm_eps=1e-5,
        tie_embeddings=True, embed_scale=3.2,  # a small model copies words sooner when they enter louder
    ),
    "small": ModelConfig(
        vocab=8192, layers=4, dim=256, heads=8, kv_heads=4, head_size=32, ffn=704, rope=Rope(theta=1e4), norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama32_1b": ModelConfig(
        vocab=128256, layers=16, dim=2048, heads=32, kv_heads=8, head_size=64, ffn=8192, rope=Rope(theta=5e5, scaling="llama3", factor=32.0, original_length=8192), norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "llama31_8b": ModelConfig(
        vocab=128256, layers=32, dim=4096, heads=32, kv_heads=8, head_size=128, ffn=14336, rope=Rope(theta=5e5, scaling="llama3", factor=8.0, original_length=8192), norm_eps=1e-5,
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
    config = PRESETS[preset]
    if theta := given.pop("rope_theta", None):
        given["rope"] = dataclasses.replace(config.rope, theta=theta)
    config = dataclasses.replace(config, **{"vocab": vocab, **given})
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
    """Parameters that every token is multiplied by: kernels and the head, not the embedding's look-up, and of experts
    those that one token is sent to."""
    attention = config.dim * config.head_size * (2 * config.heads + 2 * config.kv_heads)
    mlp = 3 * config.dim * config.ffn
    if config.experts:
        mlp = config.experts.chosen * mlp + config.dim * config.experts.number
    return config.layers * (attention + mlp) + config.dim * config.vocab


def train_flops(config: ModelConfig, lengths: Iterable[int], *, moving: float = 1.0) -> float:
    """Useful FLOPs of forward and backward on examples of these lengths: nothing for padding, recomputation or other
    examples in the row; attention by the scores that causality and windows leave.

    `moving` is the share of the kernels that is trained: frozen ones need no gradient of their own (adapters: 0, which
    leaves out the adapters' own few).
    """
    per_token = (4.0 + 2.0 * moving) * matmul_parameters(config)
    per_pair = 12.0 * config.heads * config.head_size
    windows = [config.pattern[layer % len(config.pattern)].window for layer in range(config.layers)]
    layers_by_window = {window: windows.count(window) for window in windows}

    def example(length: float) -> float:
        pairs = sum(layers * _pairs(length, window) for window, layers in layers_by_window.items())
        return per_token * length + per_pair * pairs

    return sum(example(float(length)) for length in lengths)


def _pairs(length: float, window: int) -> float:
    """Scores of one head: half a square, without the corner that a window cuts off."""
    cut = max(length - window, 0.0) if window else 0.0
    return (length**2 - cut**2) / 2

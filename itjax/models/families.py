"""Presets: the numbers of published decoders, and of two small ones to train from nothing.

They are those of the models' own config.json; `hub/configs.py` reads and writes such files.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from itjax.base import schema
from itjax.base.freeze import nearest
from itjax.models.config import Experts, Layer, ModelConfig, Rope


def _decoder(
    layers: int, dim: int, heads: int, kv_heads: int, head_size: int, ffn: int, shared: dict[str, Any], **own: Any
) -> ModelConfig:
    numbers = {"layers": layers, "dim": dim, "heads": heads, "kv_heads": kv_heads, "head_size": head_size, "ffn": ffn}
    return ModelConfig(**{**numbers, **shared, **own})


def _gemma(
    layers: int, dim: int, heads: int, kv_heads: int, head_size: int, ffn: int, shared: dict[str, Any], **own: Any
) -> ModelConfig:
    return _decoder(layers, dim, heads, kv_heads, head_size, ffn, shared, embed_scale=dim**0.5, **own)


# --- what the sizes of a family have in common ------------------------------------------------------------------------

_LLAMA2 = {"vocab": 32000, "norm_eps": 1e-5, "tie_embeddings": False, "rope": Rope(1e4), "max_length": 4096}
_LLAMA3 = {"vocab": 128256, "norm_eps": 1e-5, "tie_embeddings": False, "rope": Rope(5e5), "max_length": 8192}
_LLAMA31 = _LLAMA3 | {
    "rope": Rope(5e5, scaling="llama3", factor=8.0, original_length=8192),
    "max_length": 131072,
}
_LLAMA32 = _LLAMA31 | {
    "rope": Rope(5e5, scaling="llama3", factor=32.0, original_length=8192),
    "tie_embeddings": True,
}
_SMOLLM2 = {"vocab": 49152, "norm_eps": 1e-5, "tie_embeddings": True, "rope": Rope(1e5), "max_length": 8192}
_SMOLLM3 = {
    "family": "smollm3", "vocab": 128256, "norm_eps": 1e-6, "tie_embeddings": True, "rope": Rope(5e6),
    "max_length": 65536, "pattern": (Layer(), Layer(), Layer(), Layer(rope="none")),
}  # fmt: skip
_MISTRAL = {"family": "mistral", "norm_eps": 1e-5, "tie_embeddings": False, "rope": Rope(1e6), "max_length": 32768}
_MIXTRAL = _MISTRAL | {"family": "mixtral", "experts": Experts(number=8, chosen=2)}
_QWEN25 = {
    "family": "qwen2", "vocab": 152064, "norm_eps": 1e-6, "tie_embeddings": False, "rope": Rope(1e6),
    "max_length": 131072, "qkv_bias": True,
}  # fmt: skip
_QWEN25_SMALL = _QWEN25 | {"vocab": 151936, "tie_embeddings": True}
_QWEN3 = {
    "family": "qwen3", "vocab": 151936, "norm_eps": 1e-6, "tie_embeddings": False, "rope": Rope(1e6),
    "max_length": 40960, "qk_norm": "head",
}  # fmt: skip
_QWEN3_MOE = _QWEN3 | {"family": "qwen3_moe", "experts": Experts(number=128, chosen=8)}
_GEMMA = {
    "norm_eps": 1e-6, "tie_embeddings": True, "norms": "both", "norm_offset": 1.0, "activation": "gelu_tanh",
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "family": "gemma2", "vocab": 256000, "rope": Rope(1e4), "max_length": 8192,
    "pattern": (Layer(window=4096), Layer()), "attention_softcap": 50.0, "logit_softcap": 30.0,
}  # fmt: skip
_GEMMA3_SMALL = _GEMMA | {
    "family": "gemma3_text", "vocab": 262144, "rope": Rope(1e6), "local_rope": Rope(1e4), "max_length": 32768,
    "pattern": (Layer(window=512, rope="local"),) * 5 + (Layer(),), "qk_norm": "head",
}  # fmt: skip
_GEMMA3 = _GEMMA3_SMALL | {
    "vocab": 262208, "rope": Rope(1e6, scaling="linear", factor=8.0), "max_length": 131072,
    "pattern": (Layer(window=1024, rope="local"),) * 5 + (Layer(),),
}  # fmt: skip
_PHI3 = {
    "family": "phi3", "vocab": 32064, "norm_eps": 1e-5, "tie_embeddings": False, "rope": Rope(1e4), "max_length": 4096,
    "pattern": (Layer(window=2047),),
}  # fmt: skip
_OLMO2 = {
    "family": "olmo2", "vocab": 100352, "norm_eps": 1e-6, "tie_embeddings": False, "rope": Rope(5e5),
    "max_length": 4096, "norms": "post", "qk_norm": "all",
}  # fmt: skip
_GPT_OSS = {
    "family": "gpt_oss", "vocab": 201088, "norm_eps": 1e-5, "tie_embeddings": False, "max_length": 131072,
    "rope": Rope(1.5e5, scaling="yarn", factor=32.0, original_length=4096, truncate=False),
    "pattern": (Layer(window=128), Layer()), "sinks": True, "qkv_bias": True, "out_bias": True,
    "activation": "swiglu_clamped",
}  # fmt: skip


def _stretched(short: tuple[float, ...], long: tuple[float, ...], *, share: float = 1.0) -> Rope:
    """The rotations of the Phi models for 128k, from the divisors that were searched for each of them."""
    return Rope(1e4, share=share, scaling="longrope", factor=32.0, original_length=4096, short=short, long=long)


# fmt: off
_PHI3_MINI_LONG = _stretched(
    short=(
        1.1, 1.1, 1.1, 1.3000000000000003, 1.3500000000000003, 1.3500000000000003, 1.4000000000000004,
        1.5500000000000005, *(2.000000000000001,) * 17, *(2.0500000000000007,) * 6, 2.1000000000000005,
        2.1000000000000005, 2.1500000000000004, *(2.25,) * 5, 2.3999999999999995, 2.4499999999999993,
        2.499999999999999, 2.6999999999999984, 2.6999999999999984, 2.7499999999999982, 2.799999999999998,
        2.8999999999999977, 3.049999999999997,
    ),
    long=(
        1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979,
        1.7999999523162842, 2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268,
        6.950000286102295, 9.070000648498535, 9.930000305175781, 10.710000038146973, 11.130000114440918,
        14.609999656677246, 15.409998893737793, 19.809999465942383, 37.279998779296875, 38.279998779296875,
        38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516, 53.66000747680664,
        54.9373893737793, 56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781,
        60.887386322021484, 61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289,
        63.8173942565918, 63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906,
        64.11434936523438, 64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688,
        64.57435607910156, 64.69000244140625, 64.76000213623047,
    ),
)
_PHI35_MINI_LONG = _stretched(
    short=(
        1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *(1.0499999523162842,) * 5,
        1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094,
        1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378,
        1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903,
        1.9899996519088745, *(2.0199997425079346,) * 6, *(2.0299997329711914,) * 9, 2.0799996852874756,
        2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
        2.749999523162842, 2.8399994373321533,
    ),
    long=(
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ),
)
_PHI3_MEDIUM_LONG = _stretched(
    short=(
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.02, 1.02, 1.04, 1.04, 1.07, 1.07, 1.1, 1.3000000000000003,
        1.3000000000000003, 1.5000000000000004, 1.5700000000000005, 1.9000000000000008, 2.3100000000000014,
        2.759999999999992, 3.3899999999999784, 3.9399999999999666, 4.009999999999965, 4.289999999999959,
        4.349999999999958, 5.349999999999937, 6.659999999999909, 7.029999999999901, 7.51999999999989,
        8.00999999999988, 8.249999999999876, 8.279999999999875, 9.629999999999846, 9.89999999999984,
        10.589999999999826, 11.049999999999816, 11.7899999999998, 12.189999999999792, 12.889999999999777,
        13.129999999999772, 13.16999999999977, 13.20999999999977, 13.479999999999764, 13.539999999999763,
        13.779999999999758, 13.929999999999755, 14.429999999999744, 14.759999999999737, 15.149999999999729,
        15.419999999999723, 15.53999999999972, 15.659999999999718, 15.749999999999716, 15.759999999999716,
        15.799999999999715, 16.05999999999971, 16.079999999999714, 16.11999999999972, 16.11999999999972,
        16.18999999999973, 16.31999999999975, 16.539999999999786, 16.799999999999827,
    ),
    long=(
        *(1.0,) * 13, 1.25, 1.25, 1.5, 2.0, 2.75, 5.75, 5.75, 6.5, 9.25, 11.0, 13.25, 19.25, 19.75, 19.75, 21.25,
        21.5, 26.5, 30.0, 33.75, 35.25, 38.5, 42.0, 42.25, 46.0, 47.0, 50.0, 50.5, 51.0, 52.0, 52.75, 53.75, 54.75,
        57.0, 57.25, 58.5, 59.25, 59.5, 62.0, 62.5, 62.75, 63.25, 63.25, 63.25, 63.75, 64.0, 64.0, 64.25, 64.5, 64.5,
        65.0, 65.0,
    ),
)
_PHI4_MINI_LONG = _stretched(
    share=0.75,
    short=(1.0,) * 48,
    long=(
        1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
        2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
        6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
        16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
        32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
    ),
)
# fmt: on

# --- the presets ------------------------------------------------------------------------------------------------------

# The six numbers are layers, dim, heads, kv_heads, head_size and ffn. Vocabularies are the published ones; `resolve`
# takes the tokenizer's. Where a base model and its instruct variants differ it is the base model's, but for Mixtral 8x22B
# and what has no base (Phi, GPT-OSS).
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab=1024, layers=3, dim=64, heads=4, kv_heads=4, head_size=16, ffn=160, rope=Rope(theta=1e4), norm_eps=1e-5,
        tie_embeddings=True, embed_scale=3.2,  # a small model copies words sooner when they enter louder
    ),
    "small": ModelConfig(
        vocab=8192, layers=4, dim=256, heads=8, kv_heads=4, head_size=32, ffn=704, rope=Rope(theta=1e4), norm_eps=1e-5,
        tie_embeddings=True,
    ),

    "llama2_7b": _decoder(32, 4096, 32, 32, 128, 11008, _LLAMA2),
    "llama2_13b": _decoder(40, 5120, 40, 40, 128, 13824, _LLAMA2),
    "llama2_70b": _decoder(80, 8192, 64, 8, 128, 28672, _LLAMA2),
    "llama3_8b": _decoder(32, 4096, 32, 8, 128, 14336, _LLAMA3),
    "llama3_70b": _decoder(80, 8192, 64, 8, 128, 28672, _LLAMA3),
    "llama31_8b": _decoder(32, 4096, 32, 8, 128, 14336, _LLAMA31),
    "llama31_70b": _decoder(80, 8192, 64, 8, 128, 28672, _LLAMA31),
    "llama31_405b": _decoder(126, 16384, 128, 8, 128, 53248, _LLAMA31),
    "llama32_1b": _decoder(16, 2048, 32, 8, 64, 8192, _LLAMA32),
    "llama32_3b": _decoder(28, 3072, 24, 8, 128, 8192, _LLAMA32),
    "smollm2_135m": _decoder(30, 576, 9, 3, 64, 1536, _SMOLLM2),
    "smollm2_360m": _decoder(32, 960, 15, 5, 64, 2560, _SMOLLM2),
    "smollm2_1p7b": _decoder(24, 2048, 32, 32, 64, 8192, _SMOLLM2, rope=Rope(1.3e5)),
    "smollm3_3b": _decoder(36, 2048, 16, 4, 128, 11008, _SMOLLM3),

    "mistral_7b_v01": _decoder(
        32, 4096, 32, 8, 128, 14336, _MISTRAL, vocab=32000, rope=Rope(1e4), pattern=(Layer(window=4096),)
    ),
    "mistral_7b_v03": _decoder(32, 4096, 32, 8, 128, 14336, _MISTRAL, vocab=32768),
    "mistral_nemo_12b": _decoder(40, 5120, 32, 8, 128, 14336, _MISTRAL, vocab=131072, max_length=128000),
    "mixtral_8x7b": _decoder(32, 4096, 32, 8, 128, 14336, _MIXTRAL, vocab=32000),
    "mixtral_8x22b": _decoder(56, 6144, 48, 8, 128, 16384, _MIXTRAL, vocab=32768, max_length=65536),

    "qwen25_0p5b": _decoder(24, 896, 14, 2, 64, 4864, _QWEN25_SMALL, max_length=32768),
    "qwen25_1p5b": _decoder(28, 1536, 12, 2, 128, 8960, _QWEN25_SMALL),
    "qwen25_3b": _decoder(36, 2048, 16, 2, 128, 11008, _QWEN25_SMALL, max_length=32768),
    "qwen25_7b": _decoder(28, 3584, 28, 4, 128, 18944, _QWEN25),
    "qwen25_14b": _decoder(48, 5120, 40, 8, 128, 13824, _QWEN25, norm_eps=1e-5),
    "qwen25_32b": _decoder(64, 5120, 40, 8, 128, 27648, _QWEN25, norm_eps=1e-5),
    "qwen25_72b": _decoder(80, 8192, 64, 8, 128, 29568, _QWEN25, norm_eps=1e-5),
    "qwen3_0p6b": _decoder(28, 1024, 16, 8, 128, 3072, _QWEN3, tie_embeddings=True),
    "qwen3_1p7b": _decoder(28, 2048, 16, 8, 128, 6144, _QWEN3, tie_embeddings=True),
    "qwen3_4b": _decoder(36, 2560, 32, 8, 128, 9728, _QWEN3, tie_embeddings=True),
    "qwen3_8b": _decoder(36, 4096, 32, 8, 128, 12288, _QWEN3),
    "qwen3_14b": _decoder(40, 5120, 40, 8, 128, 17408, _QWEN3),
    "qwen3_32b": _decoder(64, 5120, 64, 8, 128, 25600, _QWEN3),
    "qwen3_30b_a3b": _decoder(48, 2048, 32, 4, 128, 768, _QWEN3_MOE),
    "qwen3_235b_a22b": _decoder(94, 4096, 64, 4, 128, 1536, _QWEN3_MOE),

    "gemma2_2b": _gemma(26, 2304, 8, 4, 256, 9216, _GEMMA2),
    "gemma2_9b": _gemma(42, 3584, 16, 8, 256, 14336, _GEMMA2),
    "gemma2_27b": _gemma(46, 4608, 32, 16, 128, 36864, _GEMMA2, query_scale=144**-0.5),
    "gemma3_270m": _gemma(18, 640, 4, 1, 256, 2048, _GEMMA3_SMALL),
    "gemma3_1b": _gemma(26, 1152, 4, 1, 256, 6912, _GEMMA3_SMALL),
    "gemma3_4b": _gemma(34, 2560, 8, 4, 256, 10240, _GEMMA3),
    "gemma3_12b": _gemma(48, 3840, 16, 8, 256, 15360, _GEMMA3),
    "gemma3_27b": _gemma(62, 5376, 32, 16, 128, 21504, _GEMMA3, query_scale=168**-0.5),

    "phi3_mini_4k": _decoder(32, 3072, 32, 32, 96, 8192, _PHI3),
    "phi3_mini_128k": _decoder(
        32, 3072, 32, 32, 96, 8192, _PHI3, rope=_PHI3_MINI_LONG, max_length=131072, pattern=(Layer(window=262144),)
    ),
    "phi35_mini": _decoder(
        32, 3072, 32, 32, 96, 8192, _PHI3, rope=_PHI35_MINI_LONG, max_length=131072, pattern=(Layer(window=262144),)
    ),
    "phi3_medium_4k": _decoder(40, 5120, 40, 10, 128, 17920, _PHI3),
    "phi3_medium_128k": _decoder(
        40, 5120, 40, 10, 128, 17920, _PHI3, rope=_PHI3_MEDIUM_LONG, max_length=131072, pattern=(Layer(window=131072),)
    ),
    "phi4_14b": _decoder(
        40, 5120, 40, 10, 128, 17920, _PHI3, vocab=100352, rope=Rope(2.5e5), max_length=16384, pattern=(Layer(),)
    ),
    "phi4_mini": _decoder(
        32, 3072, 24, 8, 128, 8192, _PHI3, vocab=200064, tie_embeddings=True, rope=_PHI4_MINI_LONG, max_length=131072,
        pattern=(Layer(window=262144),),
    ),

    "olmo2_1b": _decoder(16, 2048, 16, 16, 128, 8192, _OLMO2),
    "olmo2_7b": _decoder(32, 4096, 32, 32, 128, 11008, _OLMO2),
    "olmo2_13b": _decoder(40, 5120, 40, 40, 128, 13824, _OLMO2),
    "olmo2_32b": _decoder(64, 5120, 40, 8, 128, 27648, _OLMO2),

    "gpt_oss_20b": _decoder(24, 2880, 64, 8, 64, 2880, _GPT_OSS, experts=Experts(number=32, chosen=4, bias=True)),
    "gpt_oss_120b": _decoder(36, 2880, 64, 8, 64, 2880, _GPT_OSS, experts=Experts(number=128, chosen=4, bias=True)),
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
    if experts := _experts(given, preset):
        given["experts"] = experts
    if "dim" in given and config.embed_scale == config.dim**0.5:
        given["embed_scale"] = given["dim"] ** 0.5
    config = dataclasses.replace(config, **{"vocab": vocab, **given})
    if ("dim" in given or "heads" in given) and "head_size" not in given:
        config = dataclasses.replace(config, head_size=_even_share(config))
    _check(config, vocab=vocab)
    return config


def _experts(given: dict[str, Any], preset: str) -> Experts | None:
    """The preset's mixture with its overrides, which leave `given`; None without any."""
    names = {"experts": "number", "experts_per_token": "chosen"}
    numbers = {names[name]: given.pop(name) for name in names if name in given}
    if not numbers:
        return None
    mixture = PRESETS[preset].experts
    if mixture is None:
        mixtures = ", ".join(name for name, config in PRESETS.items() if config.experts)
        raise ValueError(f"architecture.experts: {preset} has no experts; leave it out, or take one of {mixtures}")
    mixture = dataclasses.replace(mixture, **numbers)
    if mixture.chosen > mixture.number:
        raise ValueError(
            f"architecture.experts_per_token: {mixture.chosen} of {mixture.number} experts cannot be chosen; "
            f"give {mixture.number} or less"
        )
    return mixture


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
    pairs = int(config.head_size * config.rope.share) // 2
    if config.rope.scaling == "longrope" and len(config.rope.long) != pairs:
        raise ValueError(
            f"architecture.head_size: {config.head_size} makes {pairs} pairs to turn, and the preset has divisors for "
            f"{len(config.rope.long)} of them; leave head_size, dim and heads as they are"
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

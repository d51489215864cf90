"""config.json of a published folder <-> the configuration of a decoder.

Every field of the file is used, known to leave what is computed alone, or refused by name: a switch that is overlooked is
a model that answers a little wrong. Fields that the file leaves out have the defaults of their model_type. Both styles are
read: `rope_theta` beside `rope_scaling` (transformers 4, and what is written here), and `rope_parameters` (transformers 5).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from itjax.base.freeze import nearest
from itjax.hub import patterns, rotations
from itjax.hub.fields import DEFAULTS, IMAGES, PLACE, Fields, short
from itjax.hub.names import FAMILIES
from itjax.models.config import Experts, ModelConfig

WRAPPERS = {"gemma3": "gemma3_text"}  # model_types that keep the decoder in a field text_config, beside one for images
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# What a family always is; `read` starts from it.
CONSTANT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
    "gemma2": {"norms": "both", "norm_offset": 1.0},
    "gemma3_text": {"norms": "both", "norm_offset": 1.0, "qk_norm": "head"},
    "phi3": {},
    "olmo2": {"norms": "post", "qk_norm": "all"},
    "smollm3": {},
    "gpt_oss": {"sinks": True, "activation": "swiglu_clamped"},
}


def read(fields: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a config.json describes. Raises one ValueError that names every field in the way."""
    kind = fields.get("model_type")
    if kind in WRAPPERS:
        return _read_wrapper(fields, WRAPPERS[str(kind)])
    if kind not in FAMILIES:
        known = sorted({*FAMILIES, *WRAPPERS})
        raise ValueError(
            f"{PLACE}: model_type = {kind!r}; this family is unknown here.{nearest(str(kind), known)} "
            f"Known: {', '.join(known)}"
        )
    return _read(Fields(fields, str(kind), place=""))


def write(
    config: ModelConfig,
    *,
    dtype: str,
    bos: int | None,
    eos: int | Sequence[int] | None,
    pad: int | None,
    length: int,
) -> dict[str, Any]:
    """config.json of a decoder whose weights are kept in `dtype`; `length` is the context it claims where the
    configuration does not know one. Raises ValueError naming what a folder of its family cannot say."""
    fields = _written(replace(config, max_length=config.max_length or length))
    again = _plain(read(fields))
    faults = [
        f"{PLACE}: {name} = {short(meant)}; a folder of model_type {config.family!r} would be read as "
        f"{short(getattr(again, name))}; choose another `family` or leave this as the family has it"
        for name, meant in ((field.name, getattr(_plain(config), field.name)) for field in fields_of(ModelConfig))
        if meant != getattr(again, name)
    ]
    if config.family in ("llama", "gemma2", "gemma3_text") and config.dim % config.heads:
        faults.append(
            f"{PLACE}: num_attention_heads = {config.heads}; transformers opens no {config.family!r} whose hidden_size "
            f"({config.dim}) they do not divide; give it as many heads that do"
        )
    if faults:
        raise ValueError("\n".join(faults))
    ids = {"bos_token_id": bos, "eos_token_id": list(eos) if isinstance(eos, Sequence) else eos, "pad_token_id": pad}
    return dict(sorted({**fields, **ids, "torch_dtype": dtype}.items()))


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_wrapper(fields: Mapping[str, Any], family: str) -> ModelConfig:
    """The decoder of a folder that sees images too."""
    outer = Fields(fields, family, place="")
    text = outer.take("text_config") or {}
    _check_head(outer)
    tied = outer.flag("tie_word_embeddings")
    for name in IMAGES:
        outer.take(name)
    inner = Fields({"tie_word_embeddings": tied, **text}, family, place="text_config.")
    if text.get("model_type", family) != family:
        inner.fault("model_type", text["model_type"], f"only {family} is read here; use a folder of that family")
    outer.pass_on(inner)
    return _read(inner)


def _read(fields: Fields) -> ModelConfig:
    family = fields.family
    _check_head(fields)
    _check_quantization(fields)
    dim, heads, layers = (fields.size(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    config = ModelConfig(
        vocab=fields.size("vocab_size"),
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", otherwise=heads),
        head_size=_head_size(fields, dim, heads),
        ffn=fields.size("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        norm_eps=fields.real("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        family=family,
        max_length=fields.size("max_position_embeddings"),
        pattern=patterns.shortest(patterns.read(fields, layers)),
        experts=_experts(fields),
    )
    config = replace(
        config, **CONSTANT[family], **_switches(fields, config), **rotations.read(fields, length=config.max_length)
    )
    _check_shapes(fields, config)
    fields.close()
    return config


def _check_head(fields: Fields) -> None:
    classes = fields.take("architectures") or []
    if classes and not any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in classes):
        fields.fault(
            "architectures", classes, "this folder has no head that predicts tokens; use the model it was made of"
        )


def _check_quantization(fields: Fields) -> None:
    settings = fields.take("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if settings and not (fields.family == "gpt_oss" and method == "mxfp4"):
        fields.fault(
            "quantization_config", settings, "quantised weights are not read; use the folder with full weights"
        )


def _head_size(fields: Fields, dim: int, heads: int) -> int:
    head_size = fields.size("head_dim", otherwise=max(dim // heads, 1))
    if fields.take("head_dim") is None and dim % heads:
        fields.fault("num_attention_heads", heads, f"a hidden_size of {dim} is not shared evenly; give head_dim")
    return head_size


def _check_shapes(fields: Fields, config: ModelConfig) -> None:
    if config.heads % config.kv_heads:
        fields.fault(
            "num_key_value_heads", config.kv_heads, f"{config.heads} heads cannot share these evenly; correct it"
        )
    if config.experts and config.experts.chosen > config.experts.number:
        fields.fault("num_experts_per_tok", config.experts.chosen, f"there are {config.experts.number}; correct it")
    pairs = int(config.head_size * config.rope.share) // 2
    for name, factors in (("short_factor", config.rope.short), ("long_factor", config.rope.long)):
        if config.rope.scaling == "longrope" and len(factors) != pairs:
            fields.fault(f"rope_scaling.{name}", factors, f"these are {len(factors)} for {pairs} pairs; correct it")


def _experts(fields: Fields) -> Experts | None:
    if fields.family not in ("mixtral", "qwen3_moe", "gpt_oss"):
        return None
    old = fields.family == "qwen3_moe" and "num_local_experts" not in fields
    return Experts(
        number=fields.size("num_experts" if old else "num_local_experts"),
        chosen=fields.size("num_experts_per_tok"),
        renormalize=fields.flag("norm_topk_prob") if fields.family == "qwen3_moe" else True,
        bias=fields.family == "gpt_oss",
    )


def _switches(fields: Fields, config: ModelConfig) -> dict[str, Any]:
    """What differs between models of a family, beside sizes."""
    family, defaults = config.family, DEFAULTS[config.family]
    found: dict[str, Any] = {}
    if "attention_bias" in defaults:
        found["qkv_bias"] = found["out_bias"] = fields.flag("attention_bias")
    if "mlp_bias" in defaults:
        found["mlp_bias"] = fields.flag("mlp_bias")
    if family in ("gemma2", "gemma3_text"):
        scalar = fields.real("query_pre_attn_scalar")
        found["query_scale"] = None if scalar == config.head_size else scalar**-0.5
        found["attention_softcap"] = fields.real("attn_logit_softcapping", otherwise=0.0)
        found["logit_softcap"] = fields.real("final_logit_softcapping", otherwise=0.0)
        found["embed_scale"] = config.dim**0.5
    if family != "gpt_oss":
        found["activation"] = _activation(fields)
    return found


def _activation(fields: Fields) -> str:
    gemma = fields.family in ("gemma2", "gemma3_text")
    name, usual = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    value = fields.take(name) if name in fields else usual
    if value not in ACTIVATIONS:
        fields.fault(name, value, f"only {', '.join(ACTIVATIONS)} are computed here; use a model that has one of them")
    return ACTIVATIONS.get(value, "silu")


# --- writing ----------------------------------------------------------------------------------------------------------


def _plain(config: ModelConfig) -> ModelConfig:
    """The same decoder in the one way that `read` says it, without what config.json has no word for."""
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.layers)]
    is_local = any(layer.rope == "local" for layer in layers)
    return replace(
        config,
        ids=0,
        max_length=0,
        pattern=patterns.shortest(layers),
        rope=rotations.plain(config.rope),
        local_rope=rotations.plain(config.local_rope) if config.local_rope and is_local else None,
        query_scale=None if config.query_scale == config.head_size**-0.5 else config.query_scale,
    )


def _written(config: ModelConfig) -> dict[str, Any]:
    family, defaults = config.family, DEFAULTS[config.family]
    gemma = family in ("gemma2", "gemma3_text")
    activation = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation), "silu")
    fields: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_activation" if gemma else "hidden_act": activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if "attention_bias" in defaults:
        fields["attention_bias"] = config.qkv_bias
    if "mlp_bias" in defaults:
        fields["mlp_bias"] = config.mlp_bias
    return fields | _written_gemma(config) | _written_experts(config) | rotations.write(config) | patterns.write(config)


def _written_gemma(config: ModelConfig) -> dict[str, Any]:
    if config.family not in ("gemma2", "gemma3_text"):
        return {}
    scalar = config.head_size if config.query_scale is None else config.query_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _written_experts(config: ModelConfig) -> dict[str, Any]:
    if not config.experts or config.family not in ("mixtral", "qwen3_moe", "gpt_oss"):
        return {}
    fields: dict[str, Any] = {"num_experts_per_tok": config.experts.chosen, "output_router_logits": False}
    match config.family:
        case "qwen3_moe":  # intermediate_size is that of layers without experts, of which there are none
            fields |= {"num_experts": config.experts.number, "norm_topk_prob": config.experts.renormalize}
            fields |= {"moe_intermediate_size": config.ffn, "intermediate_size": config.ffn * config.experts.chosen}
            fields |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        case "gpt_oss":
            fields |= {"num_local_experts": config.experts.number, "swiglu_limit": 7.0}
        case _:
            fields |= {"num_local_experts": config.experts.number}
    return fields

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
from itjax.hub.fields import DEFAULTS, IMAGES, PLACE, Fields, is_real, short
from itjax.hub.names import FAMILIES
from itjax.models.config import Experts, Layer, ModelConfig, Rope

WRAPPERS = {"gemma3": "gemma3_text"}  # model_types that keep the decoder in a field text_config, beside one for images
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"

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

# Of rotary positions: our fields and theirs, of all and of each scaling.
_ALWAYS = {"theta": "rope_theta", "share": "partial_rotary_factor"}
_SCALING: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "low": "low_freq_factor",
        "high": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow", "truncate": "truncate", "attention_factor": "attention_factor", "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {
        "factor": "factor", "original_length": "original_max_position_embeddings", "short": "short_factor",
        "long": "long_factor", "attention_factor": "attention_factor",
    },
}  # fmt: skip


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
        pattern=_shortest(_layers(fields, layers)),
        experts=_experts(fields),
    )
    config = replace(config, **CONSTANT[family], **_switches(fields, config), **_rotations(fields, config.max_length))
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


# --- reading: layers that differ --------------------------------------------------------------------------------------


def _layers(fields: Fields, number: int) -> list[Layer]:
    """What each layer attends to, and how it is turned."""
    match fields.family:
        case "mistral" | "mixtral" | "phi3":
            return [Layer(window=_window(fields))] * number
        case "qwen2" | "qwen3" | "qwen3_moe":
            return _qwen_layers(fields, number)
        case "gemma2" | "gpt_oss":
            return _by_type(fields, number, [SLIDING if layer % 2 == 0 else FULL for layer in range(number)])
        case "gemma3_text":
            every = fields.size("sliding_window_pattern")
            usual = [SLIDING if (layer + 1) % every else FULL for layer in range(number)]
            layers = _by_type(fields, number, usual)
            return [replace(layer, rope="local") if layer.window else layer for layer in layers]
        case "smollm3":
            return _smollm3_layers(fields, number)
    return [Layer()] * number


def _window(fields: Fields) -> int:
    """0 where there is none."""
    return 0 if fields.take("sliding_window") is None else fields.size("sliding_window")


def _by_type(fields: Fields, number: int, usual: list[str]) -> list[Layer]:
    """`layer_types` as layers, or what the family does where there are none."""
    kinds = usual if fields.take("layer_types") is None else fields.take("layer_types")
    if not isinstance(kinds, list) or len(kinds) != number or any(kind not in (FULL, SLIDING) for kind in kinds):
        fields.fault(
            "layer_types", kinds, f"this is not one of {FULL} and {SLIDING} for each of {number} layers; correct it"
        )
        kinds = [FULL] * number
    window = _window(fields)
    if SLIDING in kinds and not window:
        fields.fault("sliding_window", None, f"layer_types has {SLIDING}; say how far these layers see")
    return [Layer(window=window if kind == SLIDING else 0) for kind in kinds]


def _slides(fields: Fields) -> bool:
    """Whether a window is in use, where that has a switch of its own."""
    return fields.flag("use_sliding_window") and _window(fields) > 0


def _switched_by_type(fields: Fields, number: int, usual: list[str], *, slides: bool) -> list[Layer]:
    layers = _by_type(fields, number, usual)
    if not slides and any(layer.window for layer in layers):
        fields.fault("use_sliding_window", False, f"layer_types has {SLIDING}; set it to true or correct layer_types")
    return layers


def _qwen_layers(fields: Fields, number: int) -> list[Layer]:
    slides, window = _slides(fields), _window(fields)
    if fields.family == "qwen3_moe":
        return [Layer(window=window if slides else 0)] * number
    first = fields.take("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int):
        fields.fault("max_window_layers", first, "this is no whole number; copy the file again")
        first = number
    usual = [SLIDING if slides and layer >= first else FULL for layer in range(number)]
    return _switched_by_type(fields, number, usual, slides=slides)


def _smollm3_layers(fields: Fields, number: int) -> list[Layer]:
    slides, every = _slides(fields), fields.size("no_rope_layer_interval")
    turned = fields.take("no_rope_layers")  # 1 where a layer is turned, in spite of the name
    if turned is None:
        turned = [int((layer + 1) % every != 0) for layer in range(number)]
    if not isinstance(turned, list) or len(turned) < number or any(one not in (0, 1) for one in turned):
        fields.fault("no_rope_layers", turned, f"this is not 0 or 1 for each of {number} layers; correct it")
        turned = [1] * number
    usual = [SLIDING if slides and not turned[layer] else FULL for layer in range(number)]
    layers = _switched_by_type(fields, number, usual, slides=slides)
    return [replace(layer, rope="global" if turned[i] else "none") for i, layer in enumerate(layers)]


def _shortest(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern that repeats to these layers."""
    repeats = (
        size for size in range(1, len(layers) + 1) if all(one == layers[i % size] for i, one in enumerate(layers))
    )
    return tuple(layers[: next(repeats)])


# --- reading: rotary positions ----------------------------------------------------------------------------------------


def _rotations(fields: Fields, length: int) -> dict[str, Any]:
    theta = fields.real("rope_theta")
    name, settings = _settings(fields)
    if fields.family != "gemma3_text":
        return {"rope": _rope(fields, settings, name, theta=theta, length=length)}
    local = fields.real("rope_local_base_freq")
    if name == "rope_scaling":  # which is of the layers that see everything
        nested, places = {FULL: settings}, {FULL: name, SLIDING: name}
    else:
        nested, places = dict(settings), {FULL: f"{name}.{FULL}", SLIDING: f"{name}.{SLIDING}"}
    full, sliding = nested.pop(FULL, None), nested.pop(SLIDING, None)
    for stray, value in nested.items():
        fields.fault(f"{name}.{stray}", value, f"its fields are {FULL} and {SLIDING}; correct the file")
    return {
        "rope": _rope(fields, full, places[FULL], theta=theta, length=length),
        "local_rope": _rope(fields, sliding, places[SLIDING], theta=local, length=length),
    }


def _settings(fields: Fields) -> tuple[str, Any]:
    """The field that says how positions are turned, and its value."""
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    if new and "rope_scaling" in fields and old:
        fields.fault("rope_scaling", old, "rope_parameters says the same in another way; keep the one that is meant")
    if isinstance(new, Mapping) and new:
        return "rope_parameters", new
    if fields.family == "gpt_oss" and old is None:
        fields.fault(
            "rope_scaling", old, "readers take this for different things; leave the field out if it is the usual"
        )
    return "rope_scaling", old


def _rope(fields: Fields, settings: Any, place: str, *, theta: float, length: int) -> Rope:
    """One set of rotations. `length` is the context that the model claims."""
    if not isinstance(settings, Mapping | None):
        fields.fault(place, settings, "this is no object; copy the file again")
        settings = None
    left = {name: value for name, value in (settings or {}).items() if value is not None}
    kind = left.pop("rope_type", left.get("type", "default"))
    left.pop("type", None)
    scaling = _scaling_of(fields, kind, place)
    numbers: dict[str, Any] = {"theta": theta}
    for ours, theirs in (_ALWAYS | _SCALING[scaling]).items():
        if theirs in left:
            numbers[ours] = _number(fields, ours, left.pop(theirs), f"{place}.{theirs}")
    for stray, value in left.items():
        fields.fault(f"{place}.{stray}", value, f"it is not known what this changes in {kind}; correct the file")
    if fields.family == "phi3":
        numbers.setdefault("share", fields.real("partial_rotary_factor"))
        original = fields.size("original_max_position_embeddings")
        if scaling != "none":
            numbers["original_length"] = original  # beside the scaling, and it counts more than one within
    elif numbers.pop("share", 1) != 1:
        fields.fault(
            f"{place}.partial_rotary_factor", settings, "only phi3 turns a part of a head; use a model without"
        )
    if scaling in ("llama3", "yarn", "longrope"):
        numbers.setdefault("original_length", length)
    if scaling in ("yarn", "longrope"):
        numbers.setdefault("factor", length / numbers["original_length"])
    if scaling in ("linear", "llama3") and "factor" not in numbers:
        fields.fault(f"{place}.factor", None, f"{kind} needs it; copy the file again")
    return Rope(**numbers, scaling=scaling)


def _number(fields: Fields, name: str, value: Any, place: str) -> Any:
    """The value in the type that `Rope` has for it; where it is no such thing, a fault and something harmless."""
    if name in ("short", "long"):
        if isinstance(value, list) and all(is_real(one) and one > 0 for one in value):
            return tuple(float(one) for one in value)
    elif name == "truncate":
        if isinstance(value, bool):
            return value
    elif is_real(value) and (value > 0 or (value == 0 and name in ("mscale", "mscale_all_dim"))):
        return int(value) if name == "original_length" else float(value)
    fields.fault(place, value, "this is nothing that can be computed with; copy the file again")
    return () if name in ("short", "long") else 1


def _scaling_of(fields: Fields, kind: Any, place: str) -> str:
    if fields.family == "phi3" and kind in ("su", "yarn"):
        return "longrope"  # the names it had before
    known = {"default": "none"} | {name: name for name in _SCALING if name != "none"}
    if fields.family == "phi3":
        known = {"default": "none", "longrope": "longrope"}
    if kind not in known:
        fields.fault(f"{place}.rope_type", kind, f"only {', '.join(known)} are computed here; use a model that has one")
    return known.get(kind, "none")


# --- writing ----------------------------------------------------------------------------------------------------------


def _plain(config: ModelConfig) -> ModelConfig:
    """The same decoder in the one way that `read` says it, without what config.json has no word for."""
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.layers)]
    is_local = any(layer.rope == "local" for layer in layers)
    return replace(
        config,
        ids=0,
        max_length=0,
        pattern=_shortest(layers),
        rope=_plain_rope(config.rope),
        local_rope=_plain_rope(config.local_rope) if config.local_rope and is_local else None,
        query_scale=None if config.query_scale == config.head_size**-0.5 else config.query_scale,
    )


def _plain_rope(rope: Rope) -> Rope:
    """Without numbers that its scaling does not use."""
    used = {name: getattr(rope, name) for name in ("theta", "share", "scaling", *_SCALING[rope.scaling])}
    return Rope(**used)


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
    return fields | _written_gemma(config) | _written_experts(config) | _written_rope(config) | _written_layers(config)


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


def _written_rope(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": config.rope.theta, "rope_scaling": _written_scaling(config)}
    if config.family == "phi3":
        fields["partial_rotary_factor"] = config.rope.share
        fields["original_max_position_embeddings"] = config.rope.original_length or config.max_length
    if config.family == "gemma3_text" and config.local_rope:
        fields["rope_local_base_freq"] = config.local_rope.theta
    return fields


def _written_scaling(config: ModelConfig) -> dict[str, Any] | None:
    rope, phi = config.rope, config.family == "phi3"
    if rope.scaling == "none":  # where nothing is said, GPT-OSS is stretched
        return {"rope_type": "default"} if config.family == "gpt_oss" else None
    fields: dict[str, Any] = {"type" if phi else "rope_type": rope.scaling}
    for ours, theirs in _SCALING[rope.scaling].items():
        value = getattr(rope, ours)
        if value is None or (value == 0 and ours.startswith("mscale")):
            continue
        fields[theirs] = list(value) if isinstance(value, tuple) else value
    if phi:  # said beside it, and older readers want no further field in here
        fields.pop("original_max_position_embeddings", None)
        if rope.original_length and rope.factor == config.max_length / rope.original_length:
            fields.pop("factor", None)
    return fields


def _written_layers(config: ModelConfig) -> dict[str, Any]:
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.layers)]
    kinds = [SLIDING if layer.window else FULL for layer in layers]
    window = max(layer.window for layer in layers) or None
    match config.family:
        case "mistral" | "mixtral" | "phi3":
            return {"sliding_window": window}
        case "qwen2" | "qwen3" | "qwen3_moe":
            first = kinds.index(SLIDING) if window else config.layers
            switch = {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": first}
            return switch if config.family == "qwen3_moe" or not window else {**switch, "layer_types": kinds}
        case "gemma2" | "gpt_oss":
            return {"layer_types": kinds, "sliding_window": window or DEFAULTS[config.family]["sliding_window"]}
        case "gemma3_text":
            every = kinds.index(FULL) + 1 if FULL in kinds else config.layers + 1
            usual = DEFAULTS[config.family]["sliding_window"]
            return {"layer_types": kinds, "sliding_window": window or usual, "sliding_window_pattern": every}
        case "smollm3":
            turned = [int(layer.rope != "none") for layer in layers]
            switch = {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": kinds}
            return {**switch, "no_rope_layers": turned, "no_rope_layer_interval": 4}
    return {}

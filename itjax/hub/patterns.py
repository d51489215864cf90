"""Layers that differ, in config.json: how far each sees, and whether it is turned."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from itjax.hub.fields import DEFAULTS, FULL, SLIDING, Fields
from itjax.models.config import Layer, ModelConfig


def read(fields: Fields, number: int) -> list[Layer]:
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


def shortest(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern that repeats to these layers."""
    repeats = (
        size for size in range(1, len(layers) + 1) if all(one == layers[i % size] for i, one in enumerate(layers))
    )
    return tuple(layers[: next(repeats)])


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields that say what differs between layers."""
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.layers)]
    kinds = [SLIDING if layer.window else FULL for layer in layers]
    window = max(layer.window for layer in layers) or None
    match config.family:
        case "mistral" | "mixtral" | "phi3":
            return {"sliding_window": window}
        case "qwen2" | "qwen3" | "qwen3_moe":
            first = kinds.index(SLIDING) if window else config.layers
            switch: dict[str, Any] = {
                "use_sliding_window": bool(window),
                "sliding_window": window,
                "max_window_layers": first,
            }
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

"""Small models of every family as transformers makes them, with the switches of their configs in drawn positions."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SPREAD = 0.2  # of what is added to every number, so that none is where it begins: norms at 1, biases and sinks at 0
PLAINLY = {"attn_implementation": "eager", "experts_implementation": "eager"}
LONG = 128  # positions that a config claims

Fields = dict[str, Any]


@dataclass(frozen=True)
class Dials:
    """Switches in drawn positions: as many seeds in a row as a switch has positions show each of them once."""

    family: str
    seed: int

    def turn(self, switch: str, *positions: Any) -> Any:
        turns, place = divmod(self.seed, len(positions))
        order = random.Random(f"{self.family} {switch} {turns}").sample(range(len(positions)), len(positions))
        return positions[order[place]]


def model(family: str, seed: int) -> PreTrainedModel:
    """The family's model for text in float32, every number of it drawn."""
    make, fields = FAMILIES[family]
    torch.manual_seed(seed)
    drawn = make(**fields(Dials(family, seed)))
    built = transformers.AutoModelForCausalLM.from_config(drawn, **PLAINLY).float().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(SPREAD * torch.randn_like(parameter))
    built.generation_config.eos_token_id = None  # every answer is as long as it may be
    return built


# --- what families share ----------------------------------------------------------------------------------------------


def _shapes(dials: Dials) -> Fields:
    """Sizes of which no two are equal, so that none is taken for another; those of a seed are every family's."""
    tied, dials = dials.turn("tied", False, True), replace(dials, family="any")
    heads, kv_heads = dials.turn("heads", (4, 2), (6, 2), (3, 1), (4, 4))
    return {
        "vocab_size": dials.turn("vocab", 53, 64, 71),
        "hidden_size": heads * 12,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dials.turn("head_dim", 8, 16),
        "intermediate_size": dials.turn("ffn", 44, 28),
        "num_hidden_layers": 2,
        "max_position_embeddings": LONG,
        "rms_norm_eps": dials.turn("eps", 1e-5, 1e-6),
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES: tuple[Fields, ...] = (
    {"rope_type": "default"},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "beta_fast": 8.0, "beta_slow": 1.0, **STRETCHED},
    {"rope_type": "yarn", "truncate": False, "attention_factor": 1.3, **STRETCHED},
)


def _rope(dials: Dials, *positions: Fields) -> Fields:
    theta = dials.turn("theta", 1e4, 5e3)
    return {"rope_parameters": {"rope_theta": theta, **dials.turn("rope", *(positions or ROPES))}}


def _layers(dials: Dials, *, number: int) -> Fields:
    """What each layer sees, both kinds in turns: with an odd number one is behind the last whole period."""
    far, near = "full_attention", "sliding_attention"
    kinds = dials.turn("kinds", [near, far, near, far], [far, near, far, near])
    return {"num_hidden_layers": number, "layer_types": kinds[:number]}


# --- families ---------------------------------------------------------------------------------------------------------


def _llama(dials: Dials) -> Fields:
    biases = {"attention_bias": dials.turn("bias", False, True), "mlp_bias": dials.turn("mlp_bias", True, False)}
    return _shapes(dials) | _rope(dials) | biases


def _mistral(dials: Dials) -> Fields:
    return _shapes(dials) | _rope(dials) | {"sliding_window": dials.turn("window", None, 7)}


def _qwen2(dials: Dials) -> Fields:
    fields = _shapes(dials) | _rope(dials)
    del fields["head_dim"]  # its layers take hidden_size / heads
    return fields | _switched_window(dials)


def _switched_window(dials: Dials) -> Fields:
    slides = dials.turn("slides", True, False)
    return {"use_sliding_window": slides, "sliding_window": 9, "max_window_layers": dials.turn("first", 1, 0)}


def _qwen3(dials: Dials) -> Fields:
    return _shapes(dials) | _rope(dials) | _switched_window(dials) | {"attention_bias": dials.turn("bias", False, True)}


def _qwen3_moe(dials: Dials) -> Fields:
    experts = {
        "num_experts": dials.turn("experts", 5, 4),
        "num_experts_per_tok": dials.turn("chosen", 2, 3),
        "norm_topk_prob": dials.turn("renormalize", True, False),
        "moe_intermediate_size": dials.turn("moe ffn", 20, 36),
    }
    window = {name: value for name, value in _switched_window(dials).items() if name != "max_window_layers"}
    return _shapes(dials) | _rope(dials) | experts | window | {"attention_bias": dials.turn("bias", False, True)}


def _mixtral(dials: Dials) -> Fields:
    experts = {"num_local_experts": dials.turn("experts", 5, 4), "num_experts_per_tok": dials.turn("chosen", 2, 3)}
    return _shapes(dials) | _rope(dials) | experts | {"sliding_window": dials.turn("window", None, 11)}


def _gemma(dials: Dials) -> Fields:
    fields = _shapes(dials)
    return fields | {
        "attention_bias": dials.turn("bias", False, True),
        "query_pre_attn_scalar": dials.turn("scalar", fields["head_dim"], 12),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": dials.turn("window", 6, 13),
    }


def _gemma2(dials: Dials) -> Fields:
    caps = {
        "attn_logit_softcapping": dials.turn("attention cap", None, 1.5),
        "final_logit_softcapping": dials.turn("logit cap", 2.0, None),
    }
    return _gemma(dials) | _layers(dials, number=2) | _rope(dials) | caps


def _gemma3(dials: Dials) -> Fields:
    far = dials.turn("rope", {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0})
    ropes = {
        "full_attention": {"rope_theta": 5e4, **far},
        "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
    }
    return _gemma(dials) | _layers(dials, number=3) | {"rope_parameters": ropes}


def _phi3(dials: Dials) -> Fields:
    fields = _shapes(dials)
    head_size = fields.pop("head_dim")  # its folders never have one
    share = dials.turn("share", 0.75, 1.0)
    pairs = int(head_size * share) // 2
    original = dials.turn("original", 8, 96)  # shorter than every text, or longer
    stretched = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.25 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 2.0 * pair for pair in range(pairs)],
        "original_max_position_embeddings": original,
    }
    rope = dials.turn("longrope", stretched, {"rope_type": "default"}, stretched)
    return fields | {
        "hidden_size": fields["num_attention_heads"] * head_size,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": share, **rope},
        "original_max_position_embeddings": original,
        "sliding_window": dials.turn("window", None, 12),
    }


def _olmo2(dials: Dials) -> Fields:
    fields = _shapes(dials) | _rope(dials) | {"attention_bias": dials.turn("bias", False, True)}
    del fields["head_dim"]
    return fields


def _smollm3(dials: Dials) -> Fields:
    fields = _shapes(dials) | _rope(dials)
    window = dials.turn("window", None, 8)
    return fields | {
        "no_rope_layers": dials.turn("turned", [1, 0], [0, 1]),
        "attention_bias": dials.turn("bias", False, True),
        "mlp_bias": dials.turn("mlp_bias", True, False),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _gpt_oss(dials: Dials) -> Fields:
    return _shapes(dials) | {
        **_rope(dials, ROPES[0], ROPES[3], ROPES[4]),
        "num_local_experts": dials.turn("experts", 4, 5),
        "num_experts_per_tok": dials.turn("chosen", 2, 3),
        "sliding_window": dials.turn("window", 10, 5),
        **_layers(dials, number=2),
    }


FAMILIES: dict[str, tuple[type, Callable[[Dials], Fields]]] = {
    "llama": (transformers.LlamaConfig, _llama),
    "mistral": (transformers.MistralConfig, _mistral),
    "mixtral": (transformers.MixtralConfig, _mixtral),
    "qwen2": (transformers.Qwen2Config, _qwen2),
    "qwen3": (transformers.Qwen3Config, _qwen3),
    "qwen3_moe": (transformers.Qwen3MoeConfig, _qwen3_moe),
    "gemma2": (transformers.Gemma2Config, _gemma2),
    "gemma3_text": (transformers.Gemma3TextConfig, _gemma3),
    "phi3": (transformers.Phi3Config, _phi3),
    "olmo2": (transformers.Olmo2Config, _olmo2),
    "smollm3": (transformers.SmolLM3Config, _smollm3),
    "gpt_oss": (transformers.GptOssConfig, _gpt_oss),
}

"""Fields of config.json: their defaults, which of them leave what is computed alone, and a reader that forgets none."""

import math
from collections.abc import Mapping
from typing import Any

from itjax.base.freeze import nearest

PLACE = "config.json"
FULL, SLIDING = "full_attention", "sliding_attention"  # what layers may attend to

# --- tables ---------------------------------------------------------------------------------------------------------

# Defaults of fields that a file may leave out, in the order of `_COLUMNS`; what only some families have is below.
_COLUMNS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
)  # fmt: skip
_SHARED: dict[str, tuple[Any, ...]] = {
    "llama": (32000, 4096, 11008, 32, 32, None, None, 2048, 1e-6, False, 1e4),
    "mistral": (32000, 4096, 14336, 32, 32, 8, None, 131072, 1e-6, False, 1e4),
    "mixtral": (32000, 4096, 14336, 32, 32, 8, None, 131072, 1e-5, False, 1e6),
    "qwen2": (151936, 4096, 22016, 32, 32, 32, None, 32768, 1e-6, False, 1e4),
    "qwen3": (151936, 4096, 22016, 32, 32, 32, 128, 32768, 1e-6, False, 1e4),
    "qwen3_moe": (151936, 2048, 6144, 24, 32, 4, None, 32768, 1e-6, False, 1e4),
    "gemma2": (256000, 2304, 9216, 26, 8, 4, 256, 8192, 1e-6, True, 1e4),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 256, 131072, 1e-6, True, 1e6),
    "phi3": (32064, 3072, 8192, 32, 32, None, None, 4096, 1e-5, False, 1e4),
    "olmo2": (50304, 4096, 11008, 32, 32, None, None, 2048, 1e-5, False, 1e4),
    "smollm3": (128256, 2048, 11008, 36, 16, 4, None, 32768, 1e-6, True, 2e6),
    "gpt_oss": (201088, 2880, 2880, 36, 64, 8, 64, 131072, 1e-5, False, 1.5e5),
}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096}
_GEMMA = {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attention_bias": False}
_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {**_QWEN, "max_window_layers": 28},
    "qwen3": {**_QWEN, "max_window_layers": 28, "attention_bias": False},
    "qwen3_moe": {
        **_QWEN, "attention_bias": False, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        **_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    "olmo2": {"attention_bias": False},
    "smollm3": {
        "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": None,
        "no_rope_layer_interval": 4,
    },
    "gpt_oss": {
        "attention_bias": True, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4,
        "rope_scaling": _GPT_OSS_ROPE,
    },
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    family: dict(zip(_COLUMNS, _SHARED[family], strict=True)) | _OWN[family] for family in _SHARED
}

# Fields that leave what is computed alone, and why.
IRRELEVANT: dict[str, tuple[str, ...]] = {
    "where the file comes from": (
        "_name_or_path", "auto_map", "transformers_version", "transformers.js_config", "unsloth_fixed",
        "unsloth_version", "is_llama_config", "model_name",
    ),
    "how numbers are kept": ("torch_dtype", "dtype", "use_bfloat16"),
    "ids and settings of generation": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
        "prefix", "use_cache", "cache_implementation", "max_length", "min_length", "do_sample", "early_stopping",
        "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens",
    ),
    "how it was trained": (
        "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "classifier_dropout",
        "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    ),
    "how a library runs it": (
        "pretraining_tp", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
        "torchscript", "tie_encoder_decoder", "tf_legacy_loss", "gradient_checkpointing", "_attn_implementation",
        "attn_implementation", "_attn_implementation_autoset", "is_decoder", "cross_attention_hidden_size",
    ),
    "heads for other tasks": (
        "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    ),
}  # fmt: skip
UNREAD: dict[str, tuple[str, ...]] = {  # the same, of one family: its code never looks at them
    "qwen3_moe": ("intermediate_size", "max_window_layers"),
    "gemma2": ("hidden_act", "sliding_window_size"),
    "gemma3_text": ("hidden_act", "_sliding_window_pattern"),
    "smollm3": ("max_window_layers",),
    "gpt_oss": ("experts_per_token", "initial_context_length"),
}
IMAGES = (
    "vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index",
    "image_token_id", "boi_token_id", "eoi_token_id",
)  # fmt: skip

# Switches with one position that is computed here: the values that mean it.
FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "lm_head_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
FIXED_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2": {"attention_bias": (True,)},
    "qwen3_moe": {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    "gpt_oss": {"hidden_act": ("silu",), "swiglu_limit": (7,), "swiglu_alpha": (1.702,)},
}


# --- the reader -------------------------------------------------------------------------------------------------------


class Fields:
    """The fields of a file: each is asked for once, and `close` names all that are wrong or that nobody asked for."""

    def __init__(self, given: Mapping[str, Any], family: str, *, place: str) -> None:
        self.family, self._place = family, place
        self._given = dict(given)
        self._left = dict(given)
        self._defaults = DEFAULTS[family]
        self.faults: list[str] = []
        self._left.pop("model_type", None)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def take(self, name: str) -> Any:
        self._left.pop(name, None)
        return self._given.get(name, self._defaults.get(name))

    def fault(self, name: str, value: Any, why: str) -> None:
        self.faults.append(f"{PLACE}: {self._place}{name} = {short(value)}; {why}")

    def size(self, name: str, *, otherwise: int | None = None) -> int:
        """A whole number from 1; `otherwise` stands for null."""
        value = self.take(name)
        if value is None and otherwise is not None:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fault(name, value, "this is no whole number from 1; copy the file again")
            return 1
        return value

    def real(self, name: str, *, otherwise: float | None = None) -> float:
        """A number above 0; `otherwise` stands for null."""
        value = self.take(name)
        if value is None and otherwise is not None:
            return otherwise
        if not is_real(value) or value <= 0:
            self.fault(name, value, "this is no number above 0; copy the file again")
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            self.fault(name, value, "this is neither true nor false; copy the file again")
        return bool(value)

    def close(self) -> None:
        """Raises ValueError for all faults together, and for fields that nobody asked for and nobody may ignore."""
        self._check_left()
        if self.faults:
            raise ValueError("\n".join(self.faults))

    def pass_on(self, other: "Fields") -> None:
        """Gives everything that `close` would name to another reader."""
        self._check_left()
        other.faults += self.faults

    def _check_left(self) -> None:
        fixed = {**FIXED, **FIXED_IN.get(self.family, {})}
        harmless = {name for names in IRRELEVANT.values() for name in names} | set(UNREAD.get(self.family, ()))
        for name, value in self._left.items():
            if name in fixed:
                if value not in fixed[name]:
                    wanted = " or ".join(short(value) for value in fixed[name])
                    self.fault(name, value, f"only {wanted} is computed here; use a model that has it so")
            elif name not in harmless:
                close = nearest(name, sorted({*self._defaults, *harmless} - {name}))
                self.fault(
                    name,
                    value,
                    f"it is not known what this changes.{close} Remove it from the file if the model computes the same "
                    "without it",
                )


def is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

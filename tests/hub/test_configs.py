"""Published config.json files are the presets; what they could say that is not computed here is named."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings

from itjax.hub import configs
from itjax.models.config import Layer, ModelConfig, Rope
from itjax.models.families import PRESETS
from tests.hub.drawn import any_decoders

IDS: dict[str, Any] = {"bos": 1, "eos": [2, 7], "pad": None}


def written(config: ModelConfig) -> dict[str, Any]:
    return configs.write(config, dtype="bfloat16", length=99, **IDS)


# --- published files --------------------------------------------------------------------------------------------------

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def published(model_type: str, architecture: str, sizes: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    """What all such files have, beside what this one has."""
    return {
        "architectures": [architecture], "model_type": model_type, **dict(zip(SIZES, sizes, strict=False)),
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
        "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
        **fields,
    }  # fmt: skip


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
SWITCHES = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
QWEN_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
PHI = {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "pad_token_id": 32000, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "original_max_position_embeddings": 4096, "vocab_size": 32064,
}  # fmt: skip


LLAMA3_8B = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA31_8B = {
    "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, "head_dim": ...,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN25_SMALL = {"tie_word_embeddings": True, "vocab_size": 151936}


def gemma3_text(*sizes: int) -> dict[str, Any]:
    fields = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    return {"model_type": "gemma3_text", **fields, **dict(zip(SIZES, sizes, strict=True))}


def long(preset: str, kind: str) -> dict[str, Any]:
    rope = PRESETS[preset].rope
    return {"long_factor": list(rope.long), "short_factor": list(rope.short), "type": kind}


PUBLISHED = {
    "llama2_7b": published(
        "llama", "LlamaForCausalLM", (4096, 11008, 32, 32, 32), max_position_embeddings=4096, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, vocab_size=32000,
    ),
    "llama32_1b": published(
        "llama", "LlamaForCausalLM", (2048, 8192, 16, 32, 8), head_dim=64, max_position_embeddings=131072,
        rms_norm_eps=1e-05, rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192}, rope_theta=500000.0,
        tie_word_embeddings=True, vocab_size=128256, **SWITCHES,
    ),
    "smollm2_135m": published(
        "llama", "LlamaForCausalLM", (576, 1536, 30, 9, 3), is_llama_config=True, max_position_embeddings=8192,
        rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        vocab_size=49152, attention_bias=False, pretraining_tp=1,
    ),
    "smollm3_3b": published(
        "smollm3", "SmolLM3ForCausalLM", (2048, 11008, 36, 16, 4), max_position_embeddings=65536, max_window_layers=28,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, layer_types=["full_attention"] * 36,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False,
        vocab_size=128256, pretraining_tp=2, attention_bias=False, mlp_bias=False,
    ),
    "mistral_7b_v01": published(
        "mistral", "MistralForCausalLM", (4096, 14336, 32, 32, 8), max_position_embeddings=32768, rms_norm_eps=1e-05,
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000,
    ),
    "mistral_nemo_12b": published(
        "mistral", "MistralForCausalLM", (5120, 14336, 40, 32, 8), head_dim=128, max_position_embeddings=128000,
        rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, vocab_size=131072,
    ),
    "mixtral_8x7b": published(
        "mixtral", "MixtralForCausalLM", (4096, 14336, 32, 32, 8), max_position_embeddings=32768,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-05,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "qwen25_7b": published(
        "qwen2", "Qwen2ForCausalLM", (3584, 18944, 28, 28, 4), max_position_embeddings=131072, max_window_layers=28,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False,
        use_mrope=False, use_sliding_window=False, vocab_size=152064,
    ),
    "qwen3_0p6b": published(
        "qwen3", "Qwen3ForCausalLM", (1024, 3072, 28, 16, 8), head_dim=128, max_position_embeddings=40960,
        max_window_layers=28, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936, attention_bias=False,
    ),
    "qwen3_30b_a3b": published(
        "qwen3_moe", "Qwen3MoeForCausalLM", (2048, 6144, 48, 32, 4), head_dim=128, max_position_embeddings=40960,
        max_window_layers=48, moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8,
        output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936, attention_bias=False, **QWEN_MOE,
    ),
    "gemma2_27b": published(
        "gemma2", "Gemma2ForCausalLM", (4608, 36864, 46, 32, 16), attn_logit_softcapping=50.0,
        cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=128, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", max_position_embeddings=8192, query_pre_attn_scalar=144,
        rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096, sliding_window_size=4096, vocab_size=256000,
        attention_bias=False,
    ),
    "gemma3_1b": published(
        "gemma3_text", "Gemma3ForCausalLM", (1152, 6912, 26, 4, 1), attn_logit_softcapping=None,
        cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=256,
        rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, vocab_size=262144, attention_bias=False,
    ),
    "gemma3_4b": {  # whatever is not said has the default of its class
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "phi3_mini_4k": published(
        "phi3", "Phi3ForCausalLM", (3072, 8192, 32, 32, 32), max_position_embeddings=4096, rope_scaling=None,
        sliding_window=2047, **PHI,
    ),
    "phi35_mini": published(
        "phi3", "Phi3ForCausalLM", (3072, 8192, 32, 32, 32), max_position_embeddings=131072, sliding_window=262144,
        rope_scaling=long("phi35_mini", "longrope"), attention_bias=False, **PHI,
    ),
    "phi3_medium_128k": published(
        "phi3", "Phi3ForCausalLM", (5120, 17920, 40, 40, 10), max_position_embeddings=131072, sliding_window=131072,
        rope_scaling=long("phi3_medium_128k", "su"), attention_bias=False, **PHI,
    ),
    "phi4_mini": published(
        "phi3", "Phi3ForCausalLM", (3072, 8192, 32, 24, 8), max_position_embeddings=131072, sliding_window=262144,
        rope_scaling=long("phi4_mini", "longrope"), attention_bias=False, full_attn_mod=1, interpolate_factor=1,
        lm_head_bias=False, mlp_bias=False, partial_rotary_factor=0.75,
        **{**PHI, "tie_word_embeddings": True, "vocab_size": 200064},
    ),
    "olmo2_7b": published(
        "olmo2", "Olmo2ForCausalLM", (4096, 11008, 32, 32, 32), attention_bias=False, max_position_embeddings=4096,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, vocab_size=100352,
    ),
    "gpt_oss_20b": published(
        "gpt_oss", "GptOssForCausalLM", (2880, 2880, 24, 64, 8), attention_bias=True, experts_per_token=4, head_dim=64,
        initial_context_length=4096, layer_types=["sliding_attention", "full_attention"] * 12,
        max_position_embeddings=131072, num_experts_per_tok=4, num_local_experts=32, output_router_logits=False,
        quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}, rms_norm_eps=1e-05,
        rope_scaling={
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
        vocab_size=201088,
    ),
}  # fmt: skip


# The others, by what their files say otherwise than one above: the five sizes, and fields.
VARIANTS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "llama2_13b": ("llama2_7b", (5120, 13824, 40, 40, 40), {}),
    "llama2_70b": ("llama2_7b", (8192, 28672, 80, 64, 8), {}),
    "llama3_8b": ("llama2_7b", (4096, 14336, 32, 32, 8), LLAMA3_8B),
    "llama3_70b": ("llama2_7b", (8192, 28672, 80, 64, 8), LLAMA3_8B),
    "llama31_8b": ("llama32_1b", (4096, 14336, 32, 32, 8), LLAMA31_8B),
    "llama31_70b": ("llama32_1b", (8192, 28672, 80, 64, 8), LLAMA31_8B),
    "llama31_405b": ("llama32_1b", (16384, 53248, 126, 128, 8), LLAMA31_8B),
    "llama32_3b": ("llama32_1b", (3072, 8192, 28, 24, 8), {"head_dim": 128}),
    "smollm2_360m": ("smollm2_135m", (960, 2560, 32, 15, 5), {}),
    "smollm2_1p7b": ("smollm2_135m", (2048, 8192, 24, 32, 32), {"rope_theta": 130000}),
    "mistral_7b_v03": (
        "mistral_7b_v01", (4096, 14336, 32, 32, 8), {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
    ),
    "mixtral_8x22b": (
        "mixtral_8x7b", (6144, 16384, 56, 48, 8), {"max_position_embeddings": 65536, "vocab_size": 32768},
    ),
    "qwen25_0p5b": ("qwen25_7b", (896, 4864, 24, 14, 2), {**QWEN25_SMALL, "max_position_embeddings": 32768}),
    "qwen25_1p5b": ("qwen25_7b", (1536, 8960, 28, 12, 2), QWEN25_SMALL),
    "qwen25_3b": ("qwen25_7b", (2048, 11008, 36, 16, 2), {**QWEN25_SMALL, "max_position_embeddings": 32768}),
    "qwen25_14b": ("qwen25_7b", (5120, 13824, 48, 40, 8), {"max_window_layers": 48, "rms_norm_eps": 1e-05}),
    "qwen25_32b": ("qwen25_7b", (5120, 27648, 64, 40, 8), {"max_window_layers": 64, "rms_norm_eps": 1e-05}),
    "qwen25_72b": ("qwen25_7b", (8192, 29568, 80, 64, 8), {"max_window_layers": 80, "rms_norm_eps": 1e-05}),
    "qwen3_1p7b": ("qwen3_0p6b", (2048, 6144, 28, 16, 8), {}),
    "qwen3_4b": ("qwen3_0p6b", (2560, 9728, 36, 32, 8), {"max_window_layers": 36}),
    "qwen3_8b": ("qwen3_0p6b", (4096, 12288, 36, 32, 8), {"max_window_layers": 36, "tie_word_embeddings": False}),
    "qwen3_14b": ("qwen3_0p6b", (5120, 17408, 40, 40, 8), {"max_window_layers": 40, "tie_word_embeddings": False}),
    "qwen3_32b": ("qwen3_0p6b", (5120, 25600, 64, 64, 8), {"max_window_layers": 64, "tie_word_embeddings": False}),
    "qwen3_235b_a22b": ("qwen3_30b_a3b", (4096, 12288, 94, 64, 4), {"moe_intermediate_size": 1536}),
    "gemma2_2b": ("gemma2_27b", (2304, 9216, 26, 8, 4), {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma2_9b": ("gemma2_27b", (3584, 14336, 42, 16, 8), {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3_270m": (
        "gemma3_1b", (640, 2048, 18, 4, 1),
        {
            "_sliding_window_pattern": 6, "sliding_window_pattern": ..., "use_bidirectional_attention": False,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        },
    ),
    "gemma3_12b": ("gemma3_4b", (), {"text_config": gemma3_text(3840, 15360, 48, 16, 8)}),
    "gemma3_27b": (
        "gemma3_4b", (),
        {"text_config": {**gemma3_text(5376, 21504, 62, 32, 16), "head_dim": 128, "query_pre_attn_scalar": 168}},
    ),
    "phi3_mini_128k": ("phi35_mini", (), {"rope_scaling": long("phi3_mini_128k", "longrope")}),
    "phi3_medium_4k": ("phi3_mini_4k", (5120, 17920, 40, 40, 10), {}),
    "phi4_14b": (
        "phi3_mini_4k", (5120, 17920, 40, 40, 10),
        {
            "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000,
            "sliding_window": None, "vocab_size": 100352,
        },
    ),
    "olmo2_1b": ("olmo2_7b", (2048, 8192, 16, 16, 16), {}),
    "olmo2_13b": ("olmo2_7b", (5120, 13824, 40, 40, 40), {}),
    "olmo2_32b": ("olmo2_7b", (5120, 27648, 64, 40, 8), {}),
    "gpt_oss_120b": (
        "gpt_oss_20b", (2880, 2880, 36, 64, 8),
        {"layer_types": ["sliding_attention", "full_attention"] * 18, "num_local_experts": 128},
    ),
}  # fmt: skip


def change(preset: str, **fields: Any) -> dict[str, Any]:
    """The published file with some fields replaced; `...` takes one away."""
    return {name: value for name, value in {**PUBLISHED[preset], **fields}.items() if value is not ...}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_files_are_the_presets(preset):
    assert configs.read(PUBLISHED[preset]) == PRESETS[preset]


@pytest.mark.parametrize("preset", VARIANTS)
def test_so_are_those_of_their_siblings(preset):
    base, sizes, fields = VARIANTS[preset]
    assert configs.read(change(base, **dict(zip(SIZES, sizes, strict=False)), **fields)) == PRESETS[preset]


def test_no_preset_is_without_a_published_file():
    assert set(PRESETS) == {"tiny", "small", *PUBLISHED, *VARIANTS}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"tiny", "small"}))
def test_presets_return_from_what_is_written(preset):
    assert configs.read(written(PRESETS[preset])) == PRESETS[preset]


@settings(max_examples=150, deadline=None)
@given(any_decoders)
def test_every_switch_returns_from_what_is_written(config):
    again = configs.read(written(config))
    layers = [config.pattern[layer % len(config.pattern)] for layer in range(config.layers)]
    assert [again.pattern[layer % len(again.pattern)] for layer in range(config.layers)] == layers
    assert dataclasses.replace(again, pattern=()) == dataclasses.replace(config, pattern=())


def test_a_file_says_ids_dtype_and_length_too():
    fields = written(PRESETS["small"])
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, [2, 7], None)
    assert (fields["torch_dtype"], fields["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert fields["max_position_embeddings"] == 99
    assert written(PRESETS["llama31_8b"])["max_position_embeddings"] == 131072


# --- ways to say the same ---------------------------------------------------------------------------------------------


def test_both_styles_of_rotations_are_read():
    new = change(
        "llama32_1b", rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16",
        rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    )  # fmt: skip
    assert configs.read(new) == PRESETS["llama32_1b"]
    new = change(
        "gemma3_1b", rope_theta=..., rope_scaling=..., rope_local_base_freq=..., sliding_window_pattern=...,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    )  # fmt: skip
    assert configs.read(new) == PRESETS["gemma3_1b"]


def test_legacy_names_of_a_scaling_are_read():
    fields = change("llama2_7b", rope_scaling={"type": "linear", "factor": 2})
    assert configs.read(fields).rope == Rope(1e4, scaling="linear", factor=2.0)
    yarn = change("qwen25_7b", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    assert configs.read(yarn).rope == Rope(1e6, scaling="yarn", factor=4.0, original_length=32768)


def test_what_phi_says_beside_the_scaling_counts_more_than_what_it_says_within():
    scaling = {**long("phi4_mini", "longrope"), "original_max_position_embeddings": 512}
    assert configs.read(change("phi4_mini", rope_scaling=scaling)) == PRESETS["phi4_mini"]


def test_heads_share_the_width_where_their_size_is_not_said():
    assert configs.read(change("llama32_1b", head_dim=...)).head_size == 64
    assert configs.read(change("llama32_1b", head_dim=None)).head_size == 64
    assert configs.read(change("llama2_7b", num_key_value_heads=...)).kv_heads == 32
    assert configs.read(change("qwen3_0p6b", head_dim=...)).head_size == 128  # and not 1024 / 16


def test_qwens_last_layers_slide_where_they_are_told_to():
    fields = change("qwen25_7b", use_sliding_window=True, sliding_window=512, max_window_layers=26)
    assert configs.read(fields).pattern == (Layer(),) * 26 + (Layer(window=512),) * 2


def test_a_mistral_without_a_window_says_null():
    assert configs.read(change("mistral_7b_v01", sliding_window=...)).pattern == (Layer(window=4096),)
    assert configs.read(change("mistral_7b_v01", sliding_window=None)).pattern == (Layer(),)


def test_layers_without_rotations_follow_their_interval():
    fields = change("smollm3_3b", no_rope_layers=None, layer_types=..., no_rope_layer_interval=3)
    assert configs.read(fields).pattern == (Layer(), Layer(), Layer(rope="none"))


def test_gpt_oss_is_stretched_where_nothing_is_said():
    assert configs.read(change("gpt_oss_20b", rope_scaling=...)) == PRESETS["gpt_oss_20b"]
    plain = dataclasses.replace(PRESETS["gpt_oss_20b"], rope=Rope(1.5e5))
    assert configs.read(written(plain)) == plain


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, fields, message",
    [
        ("llama2_7b", {"model_type": "lama"}, r"model_type = 'lama'; .* Did you mean 'llama'"),
        ("llama2_7b", {"hidden_act": "relu"}, r"hidden_act = 'relu'; only silu"),
        ("llama2_7b", {"residual_multiplier": 0.2}, r"residual_multiplier = 0\.2; it is not known what this changes"),
        ("llama2_7b", {"rms_norm_epss": 1e-6}, r"rms_norm_epss = 1e-06; .* Did you mean 'rms_norm_eps'"),
        ("llama2_7b", {"hidden_size": "4096"}, r"hidden_size = '4096'; this is no whole number"),
        ("llama2_7b", {"rms_norm_eps": 0}, r"rms_norm_eps = 0; this is no number above 0"),
        ("llama2_7b", {"tie_word_embeddings": 1}, r"tie_word_embeddings = 1; this is neither true nor false"),
        ("llama2_7b", {"num_attention_heads": 30}, r"num_attention_heads = 30; a hidden_size of 4096"),
        ("llama2_7b", {"num_key_value_heads": 5}, r"num_key_value_heads = 5; 32 heads cannot share"),
        ("llama2_7b", {"rope_scaling": {"type": "dynamic", "factor": 2}}, r"rope_scaling\.rope_type = 'dynamic'"),
        ("llama2_7b", {"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor = None; linear needs it"),
        ("llama2_7b", {"rope_scaling": {"type": "linear", "factor": "2"}}, r"rope_scaling\.factor = '2'; this is nothing"),
        ("llama2_7b", {"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, r"rope_scaling\.x = 1; it is not known"),
        ("llama2_7b", {"rope_scaling": [1]}, r"rope_scaling = \[1\]; this is no object"),
        ("llama2_7b", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config = .*full weights"),
        ("llama2_7b", {"architectures": ["LlamaForSequenceClassification"]}, r"architectures = .*no head"),
        ("llama2_7b", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5; only 1"),
        ("mistral_7b_v01", {"attention_bias": True}, r"attention_bias = True; only False is computed here"),
        ("qwen3_30b_a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]; only \[\] or None"),
        ("qwen3_30b_a3b", {"decoder_sparse_step": 2}, r"decoder_sparse_step = 2; only 1"),
        ("qwen3_30b_a3b", {"num_experts_per_tok": 129}, r"num_experts_per_tok = 129; there are 128"),
        ("gemma3_1b", {"use_bidirectional_attention": True}, r"use_bidirectional_attention = True"),
        ("gemma3_1b", {"layer_types": ["full_attention"]}, r"layer_types = \['full_attention'\]; .* 26 layers"),
        ("gemma2_27b", {"sliding_window": None}, r"sliding_window = None; layer_types has sliding_attention"),
        ("gemma3_4b", {"text_config": {"model_type": "llama"}}, r"text_config\.model_type = 'llama'; only gemma3_text"),
        ("gemma3_4b", {"text_config": {"vocab": 5}}, r"text_config\.vocab = 5; it is not known"),
        ("gemma3_4b", {"audio_config": {}}, r"config\.json: audio_config = \{\}; it is not known"),
        ("phi35_mini", {"partial_rotary_factor": 0.5}, r"rope_scaling\.short_factor = .*48 for 24 pairs"),
        ("gpt_oss_20b", {"swiglu_limit": 5.0}, r"swiglu_limit = 5\.0; only 7"),
        ("gpt_oss_20b", {"rope_scaling": None}, r"rope_scaling = None; readers take this for different things"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_named(preset, fields, message):
    with pytest.raises(ValueError, match=message):
        configs.read(change(preset, **fields))


def test_all_that_is_in_the_way_is_one_error():
    with pytest.raises(ValueError, match="clip_qkv") as caught:
        configs.read(change("llama2_7b", hidden_act="relu", clip_qkv=8, rope_scaling={"type": "dynamic"}))
    assert [line.split(" = ")[0] for line in str(caught.value).split("\n")] == [
        "config.json: hidden_act",
        "config.json: rope_scaling.rope_type",
        "config.json: clip_qkv",
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_scale": 3.2}, r"embed_scale = 3\.2; a folder of model_type 'llama' would be read as 1\.0"),
        ({"family": "qwen2"}, r"qkv_bias = False; a folder of model_type 'qwen2' would be read as True"),
        ({"pattern": (Layer(window=8),)}, r"pattern = .*window=8"),
        ({"qk_norm": "head", "norms": "post"}, r"norms = 'post'[\s\S]*qk_norm = 'head'"),
        ({"heads": 3, "kv_heads": 3}, r"num_attention_heads = 3; transformers opens no 'llama'"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(changes, message):
    with pytest.raises(ValueError, match=message):
        written(dataclasses.replace(PRESETS["small"], **changes))

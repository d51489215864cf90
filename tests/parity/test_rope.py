"""Rotary positions are those of the transformers library, for the parameters that published models have."""

import jax.numpy as jnp
import numpy as np
import pytest

from itjax.models import rope
from itjax.models.config import Rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.phi3 import modeling_phi3  # noqa: E402

LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# As many divisors as pairs, of the sizes that Phi-3.5 and Phi-4-mini have.
SHORT, LONG = (tuple(float(x) for x in np.linspace(1.0, top, 48)) for top in (2.8, 64.0))
LONGROPE = {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG)}
PHI = Rope(scaling="longrope", factor=32.0, original_length=4096, short=SHORT, long=LONG)

# Name: head size, ours, and what the model's config.json says of it.
PUBLISHED = {
    "llama_2": (128, Rope(), {"rope_type": "default", "rope_theta": 1e4}),
    "llama_3_1": (
        128,
        Rope(5e5, scaling="llama3", factor=8.0, original_length=8192),
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, **LLAMA},
    ),
    "llama_3_2": (
        64,
        Rope(5e5, scaling="llama3", factor=32.0, original_length=8192),
        {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, **LLAMA},
    ),
    "gemma_3_global": (
        256,
        Rope(1e6, scaling="linear", factor=8.0),
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    ),
    "qwen_2_5": (
        128,
        Rope(1e6, scaling="yarn", factor=4.0, original_length=32768),
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    ),
    "gpt_oss": (
        64,
        Rope(150000.0, scaling="yarn", factor=32.0, original_length=4096, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "rope_theta": 150000.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "a_ramp_past_the_last_pair": (
        64,
        Rope(1e4, scaling="yarn", factor=4.0, original_length=131072),
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 131072},
    ),
    "deepseek_v2": (
        64,
        Rope(scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "phi_3_5_mini": (96, PHI, {"rope_theta": 1e4, "original_max_position_embeddings": 4096, **LONGROPE}),
    "phi_4_mini": (
        128,
        Rope(**{**vars(PHI), "share": 0.75}),
        {"rope_theta": 1e4, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, **LONGROPE},
    ),
}
LENGTHS = {
    name: (4096, 131072) if value.scaling == "longrope" else (4096,) for name, (_, value, _) in PUBLISHED.items()
}

each_model = pytest.mark.parametrize("name, length", [(name, n) for name in PUBLISHED for n in LENGTHS[name]])


def config_of(name):
    head_size, value, said = PUBLISHED[name]
    kind = transformers.Phi3Config if value.scaling == "longrope" else transformers.LlamaConfig
    return kind(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        head_dim=head_size,
        max_position_embeddings=131072,
        rope_parameters=dict(said),
        pad_token_id=0,
    )


def theirs(name, positions_BT):
    """Cosine and sine of theirs, each pair's twice."""
    module = modeling_phi3.Phi3RotaryEmbedding if "phi" in name else modeling_llama.LlamaRotaryEmbedding
    return module(config_of(name))(torch.zeros(1), torch.tensor(positions_BT))


@each_model
def test_speeds_and_factors_are_theirs(name, length):
    head_size, value, _ = PUBLISHED[name]
    ours, factor = rope.frequencies(value, head_size=head_size, length=length)
    if value.scaling == "none":
        speeds, times = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config_of(name))
    else:
        speeds, times = ROPE_INIT_FUNCTIONS[value.scaling](config_of(name), "cpu", seq_len=length)
    np.testing.assert_allclose(ours, speeds.numpy(), rtol=1e-6)  # theirs are computed in float32
    assert factor == pytest.approx(times, rel=1e-12)


@each_model
def test_cosines_and_sines_are_theirs_to_what_float32_can_say(name, length):
    head_size, value, _ = PUBLISHED[name]
    positions = np.linspace(0, length - 1, 200, dtype=np.int32)[None]
    turns = rope.angles(jnp.asarray(positions), value, head_size=head_size, length=length)
    pairs = turns.cos_BTP.shape[-1]
    for ours, of_theirs in zip(turns, theirs(name, positions), strict=True):
        off = np.abs(np.asarray(ours) - of_theirs.numpy()[..., :pairs])
        # Speeds may differ in their last place, by 1.2e-7, and then products by one of theirs.
        assert (off <= 1e-6 + 2.5e-7 * positions[..., None]).all(), off.max()


@pytest.mark.parametrize("name", ["llama_3_1", "gpt_oss", "phi_4_mini"])
def test_turned_heads_are_theirs(name):
    head_size, value, _ = PUBLISHED[name]
    positions = np.arange(50)[None]
    x_BTNH = np.random.default_rng(0).normal(size=(1, 50, 3, head_size)).astype(np.float32)
    turns = rope.angles(jnp.asarray(positions), value, head_size=head_size, length=50)
    module = modeling_phi3 if "phi" in name else modeling_llama
    x_BNTH = torch.tensor(x_BTNH).transpose(1, 2)
    turned, _ = module.apply_rotary_pos_emb(x_BNTH, x_BNTH, *theirs(name, positions))
    np.testing.assert_allclose(rope.turn(jnp.asarray(x_BTNH), turns), turned.transpose(1, 2).numpy(), atol=2e-5)

"""Small decoders of every family, with all the switches that its folders can say."""

from typing import Any

from hypothesis import strategies as st

from itjax.hub.configs import CONSTANT
from itjax.hub.names import FAMILIES
from itjax.models.config import Experts, Layer, ModelConfig, Rope

LLAMA3 = {"scaling": "llama3", "factor": 8.0, "original_length": 16, "low": 1.0, "high": 4.0}
YARN = {"scaling": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 16.0, "beta_slow": 2.0}
SCALINGS: tuple[dict[str, Any], ...] = (
    {},
    {"scaling": "linear", "factor": 2.5},
    LLAMA3,
    YARN,
    YARN | {"truncate": False, "attention_factor": 1.25},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
)


@st.composite
def decoders(draw: st.DrawFn, family: str) -> ModelConfig:
    """A decoder of the family, 1 to 7 layers of a few numbers each."""
    kv_heads, heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 3)]))
    dim = heads * draw(st.sampled_from([8, 12]))
    layers = draw(st.integers(1, 7))
    head_size = draw(st.sampled_from([8, 16]))
    config: dict[str, Any] = {
        "family": family,
        "vocab": draw(st.sampled_from([24, 40])),
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": dim // heads if family == "phi3" else head_size,
        "ffn": draw(st.sampled_from([20, 36])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_embeddings": draw(st.booleans()),
        "max_length": 64,
        "pattern": draw(patterns(family, layers)),
        "rope": draw(ropes(family, dim // heads)),
        "experts": draw(experts(family)),
        **CONSTANT[family],
    }
    if family in ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2", "smollm3", "gpt_oss"):
        config["qkv_bias"] = config["out_bias"] = draw(st.booleans())
    if family in ("llama", "smollm3"):
        config["mlp_bias"] = draw(st.booleans())
    if family in ("gemma2", "gemma3_text"):
        scalar = draw(st.sampled_from([None, 7, 24]))
        config |= {
            "embed_scale": dim**0.5,
            "activation": draw(st.sampled_from(["gelu_tanh", "silu"])),
            "query_scale": None if scalar is None else scalar**-0.5,
            "attention_softcap": draw(st.sampled_from([0.0, 20.0])),
            "logit_softcap": draw(st.sampled_from([0.0, 15.0])),
        }
    if family == "gemma3_text":
        config["local_rope"] = Rope(theta=draw(st.sampled_from([1e4, 2e4])))
    return ModelConfig(**config)


@st.composite
def patterns(draw: st.DrawFn, family: str, layers: int) -> tuple[Layer, ...]:
    """What layers of the family may differ in."""
    window = draw(st.sampled_from([3, 8]))
    near, far = Layer(window=window), Layer()
    match family:
        case "mistral" | "mixtral" | "phi3" | "qwen3_moe":
            return draw(st.sampled_from([(near,), (far,)]))
        case "qwen2" | "qwen3":
            return draw(st.sampled_from([(far,), (near,), (far,) * 2 + (near,) * (layers - 2), (near, far)]))
        case "gemma2" | "gpt_oss":
            return draw(st.sampled_from([(near, far), (far,), (near,), (near, near, far)]))
        case "gemma3_text":
            local = Layer(window=window, rope="local")
            return draw(st.sampled_from([(local,) * 5 + (far,), (local, far), (far, local), (far,), (local,)]))
        case "smollm3":
            bare = Layer(rope="none")
            return draw(st.sampled_from([(far,) * 3 + (bare,), (far,), (bare, far), (far, Layer(window, "none"))]))
    return (far,)


@st.composite
def ropes(draw: st.DrawFn, family: str, head_size: int) -> Rope:
    """Rotations that folders of the family can say."""
    theta = draw(st.sampled_from([1e4, 5e5]))
    if family != "phi3":
        return Rope(theta=theta, **draw(st.sampled_from(SCALINGS)))
    share = draw(st.sampled_from([1.0, 0.5]))
    if draw(st.booleans()):
        return Rope(theta=theta, share=share)
    pairs = int(head_size * share) // 2
    divisors = st.lists(st.sampled_from([1.0, 1.5, 8.25]), min_size=pairs, max_size=pairs)
    short, long = tuple(draw(divisors)), tuple(draw(divisors))
    original = draw(st.sampled_from([16, 64]))
    factor = 64 / original
    return Rope(theta, share, "longrope", factor=factor, original_length=original, short=short, long=long)


@st.composite
def experts(draw: st.DrawFn, family: str) -> Experts | None:
    if family not in ("mixtral", "qwen3_moe", "gpt_oss"):
        return None
    number = draw(st.sampled_from([2, 3]))
    renormalize = draw(st.booleans()) if family == "qwen3_moe" else True
    return Experts(number, chosen=draw(st.integers(1, number)), renormalize=renormalize, bias=family == "gpt_oss")


families = st.sampled_from(sorted(FAMILIES))
any_decoders = families.flatmap(decoders)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tree of parameters, written down once more."""
    L, D, N, K, H, F, V = (
        config.layers, config.dim, config.heads, config.kv_heads, config.head_size, config.ffn, config.vocab,
    )  # fmt: skip
    E = (config.experts.number,) if config.experts else ()
    mlp_bias = config.experts.bias if config.experts else config.mlp_bias
    found: dict[str, tuple[int, ...] | None] = {
        "attn/q/kernel": (D, N, H), "attn/k/kernel": (D, K, H), "attn/v/kernel": (D, K, H), "attn/o/kernel": (N, H, D),
        "attn/q/bias": (N, H) if config.qkv_bias else None,
        "attn/k/bias": (K, H) if config.qkv_bias else None,
        "attn/v/bias": (K, H) if config.qkv_bias else None,
        "attn/o/bias": (D,) if config.out_bias else None,
        "attn/q_norm/scale": {"none": None, "head": (H,), "all": (N, H)}[config.qk_norm],
        "attn/k_norm/scale": {"none": None, "head": (H,), "all": (K, H)}[config.qk_norm],
        "attn/sinks": (N,) if config.sinks else None,
        "attn_norm/scale": (D,) if config.norms != "post" else None,
        "mlp_norm/scale": (D,) if config.norms != "post" else None,
        "attn_post_norm/scale": (D,) if config.norms != "pre" else None,
        "mlp_post_norm/scale": (D,) if config.norms != "pre" else None,
        "mlp/router/kernel": (D, *E) if E else None,
        "mlp/router/bias": E if E and mlp_bias else None,
        "mlp/gate/kernel": (*E, D, F), "mlp/up/kernel": (*E, D, F), "mlp/down/kernel": (*E, F, D),
        "mlp/gate/bias": (*E, F) if mlp_bias else None,
        "mlp/up/bias": (*E, F) if mlp_bias else None,
        "mlp/down/bias": (*E, D) if mlp_bias else None,
    }  # fmt: skip
    layers = {f"layers/{path}": (L, *shape) for path, shape in found.items() if shape is not None}
    head = {} if config.tie_embeddings else {"head/kernel": (V, D)}
    return {"embed/kernel": (V, D), **layers, "final_norm/scale": (D,), **head}

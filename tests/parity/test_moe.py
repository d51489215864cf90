"""The mixtures of three published families, against `transformers`: values, and gradients of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itjax.base import tree
from itjax.models.config import Experts, ModelConfig
from itjax.models.layers import Draws, Options
from itjax.models.moe import Facts, Mixture

pytest.importorskip("transformers")
import torch
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

D, F, E, C = 16, 24, 6, 3
SIZES = {"hidden_size": D, "num_experts_per_tok": C}


def mixtral():
    return MixtralSparseMoeBlock(MixtralConfig(intermediate_size=F, num_local_experts=E, **SIZES))


def qwen3(norm_topk_prob: bool):
    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(moe_intermediate_size=F, num_experts=E, norm_topk_prob=norm_topk_prob, **SIZES)
    )


def gpt_oss():
    return GptOssMLP(GptOssConfig(intermediate_size=F, num_local_experts=E, **SIZES))


FAMILIES = {
    "mixtral": (mixtral, Experts(E, C), "silu"),
    "qwen3": (lambda: qwen3(True), Experts(E, C), "silu"),
    "qwen3 without renormalisation": (lambda: qwen3(False), Experts(E, C, renormalize=False), "silu"),
    "gpt_oss": (gpt_oss, Experts(E, C, bias=True), "swiglu_clamped"),
}


def ours(theirs: dict[str, np.ndarray], *, is_gpt_oss: bool) -> dict:
    """Their arrays, or the gradients of these, where ours are."""
    if is_gpt_oss:  # inputs first, gate and up take turns
        both, bias = theirs["experts.gate_up_proj"], theirs["experts.gate_up_proj_bias"]
        return {
            "router": {"kernel": theirs["router.weight"].T, "bias": theirs["router.bias"]},
            "gate": {"kernel": both[..., ::2], "bias": bias[:, ::2]},
            "up": {"kernel": both[..., 1::2], "bias": bias[:, 1::2]},
            "down": {"kernel": theirs["experts.down_proj"], "bias": theirs["experts.down_proj_bias"]},
        }
    both = theirs["experts.gate_up_proj"].swapaxes(1, 2)
    return {
        "router": {"kernel": theirs["gate.weight"].T},
        "gate": {"kernel": both[..., :F]},
        "up": {"kernel": both[..., F:]},
        "down": {"kernel": theirs["experts.down_proj"].swapaxes(1, 2)},
    }


@pytest.mark.parametrize("make, experts, activation", FAMILIES.values(), ids=FAMILIES)
def test_values_and_gradients_are_those_of_transformers(make, experts, activation):
    rng = np.random.default_rng(0)
    x_BTD, dy_BTD = rng.normal(size=(2, 2, 7, D)).astype(np.float32) * 2
    block = make()
    for parameter in block.parameters():
        parameter.data = torch.tensor(rng.normal(size=parameter.shape).astype(np.float32) / 2)
    x = torch.tensor(x_BTD, requires_grad=True)
    said = block(x)
    said = said[0] if isinstance(said, tuple) else said
    said.backward(torch.tensor(dy_BTD))
    named = dict(block.named_parameters())
    params, expected = (
        ours({name: of(p).numpy() for name, p in named.items()}, is_gpt_oss=experts.bias)
        for of in (lambda p: p.detach(), lambda p: p.grad)
    )

    config = ModelConfig(
        vocab=8, layers=1, dim=D, heads=1, kv_heads=1, head_size=8, ffn=F, norm_eps=1e-5, tie_embeddings=True,
        activation=activation, experts=experts,
    )  # fmt: skip
    graph, state = nnx.split(Mixture(config, iter(jax.random.split(jax.random.key(0), 4)), Options()))
    assert tree.flatten(nnx.to_pure_dict(state)).keys() == tree.flatten(params).keys()
    facts = Facts(jnp.ones((2, 7), jnp.int32), jnp.ones((2, 7)))

    @jax.jit
    def outcome(params, x_BTD):
        y_BTD, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, Draws(), facts)[0], params, x_BTD)
        return y_BTD, *pull(dy_BTD)

    y_BTD, grads, dx_BTD = outcome(params, x_BTD)
    np.testing.assert_allclose(y_BTD, said.detach().numpy(), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(dx_BTD, x.grad.numpy(), atol=1e-4, rtol=1e-5)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(tree.flatten(grads)[path], leaf, atol=2e-4, rtol=1e-5, err_msg=path)

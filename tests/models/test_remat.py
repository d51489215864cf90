"""What layers keep for the backward pass, counted from its residuals; what it costs; and that it changes no number."""

import functools
from itertools import pairwise

import jax
import numpy as np
import pytest

from itjax.base.schema import REMAT
from itjax.kernels import plain, splash, streamed
from itjax.models import remat
from tests import fakes

LENGTH = 64
BATCH = fakes.packed([[fakes.example(0, length=40), fakes.example(1, length=23)]] * 3, length=LENGTH)
TOKENS = 3 * LENGTH  # three rows, so that no dimension looks like that of the two layers


def loss_of(policy: str, attention: str, config=fakes.TINY):
    model = fakes.tiny_model(config, attention=attention, remat=policy)
    return lambda params: (model.features(params, BATCH).x_BTD ** 2).sum()


def kept(policy: str, config=fakes.TINY) -> float:
    """Numbers per token and layer that go from the forward to the backward pass, beside parameters."""
    params = fakes.tiny_params(config)
    residuals = jax.eval_shape(lambda params: jax.vjp(loss_of(policy, "streamed", config), params)[1], params)
    stacked = [x for x in jax.tree.leaves(residuals) if x.shape[:1] == (config.layers,)]
    numbers = sum(x.size for x in stacked) - sum(x.size for x in jax.tree.leaves(params["layers"]))
    return numbers / config.layers / TOKENS


@functools.cache
def compiled(policy: str):
    return jax.jit(jax.value_and_grad(loss_of(policy, "reference"))).lower(fakes.tiny_params()).compile()


def test_the_table_has_a_row_for_every_choice_of_the_schema():
    assert tuple(remat.POLICIES) == REMAT
    assert {module.ATTENDED for module in (plain, splash, streamed)} == {remat.ATTENDED}


@pytest.mark.parametrize("policy", REMAT[1:])
def test_the_loss_and_the_gradient_are_the_same(policy):
    loss, grads = compiled(policy)(fakes.tiny_params())
    wanted, wanted_grads = compiled("none")(fakes.tiny_params())
    assert loss == wanted
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), grads, wanted_grads)


def test_each_keeps_what_its_row_of_the_docstring_says():
    """D = 32, N·H = 32, K·H = 16, F = 48; a kernel leaves a number per head beside what it read."""
    D, NH, KH, F, heads = 32, 32, 16, 48, 4
    wanted = {
        "dots": D + (NH + 2 * KH) + NH + heads + D + 2 * F,
        "narrow": D + (NH + 2 * KH) + NH + heads + D,
        "attention": D + NH + heads,
        "full": D,
    }
    assert {policy: kept(policy) for policy in wanted} == pytest.approx(wanted, abs=1)
    assert kept("none") > 2 * wanted["dots"]


def test_who_keeps_less_computes_more():
    flops = [compiled(policy).cost_analysis()["flops"] for policy in REMAT[:-1]]
    assert all(less < more for less, more in pairwise(flops)), flops

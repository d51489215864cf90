"""Gates, against float64 numbers written out here."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from itjax.models.activations import gated
from itjax.models.config import ACTIVATIONS

GATE = np.array([-9.0, -1.0, 0.0, 0.5, 6.5, 9.0])
UP = np.array([2.0, -9.0, 3.0, 9.0, -0.5, 1.0])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


EXPECTED = {
    "silu": GATE * sigmoid(GATE) * UP,
    "gelu_tanh": 0.5 * GATE * (1 + np.tanh(math.sqrt(2 / math.pi) * (GATE + 0.044715 * GATE**3))) * UP,
    # gates above 7 act as 7, the other side stays between -7 and 7
    "swiglu_clamped": (gate := np.minimum(GATE, 7)) * sigmoid(1.702 * gate) * (np.array([2, -7, 3, 7, -0.5, 1]) + 1),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_are_the_published_formulas(activation):
    value = gated(jnp.float32(GATE), jnp.float32(UP), activation)
    np.testing.assert_allclose(value, EXPECTED[activation], rtol=2e-5, atol=1e-6)

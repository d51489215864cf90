"""Kernels in few bits: how far they are from what they stand for, how many bytes they take, and when they exist in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.models import quantize

W = jax.random.normal(jax.random.key(0), (128, 4, 16)) * 0.1


def both_ways(kernel, kind, contract):
    leaves = quantize.quantize(kernel, kind, contract=contract)
    return leaves, quantize.dequantize(leaves, jnp.float32)


def test_int8_is_within_half_a_step_of_the_largest_of_its_output():
    leaves, back = both_ways(W, "int8", 1)
    largest = np.abs(W).max(axis=0, keepdims=True)
    assert leaves["scales"].shape == (1, 4, 16)
    assert np.all(np.abs(back - W) <= largest / 254 + 1e-7)


def test_nf4_is_within_half_the_widest_gap_times_the_largest_of_64_inputs():
    leaves, back = both_ways(W, "nf4", 1)
    largest = np.abs(W).reshape(2, 64, 4, 16).max(axis=1, keepdims=True)
    error = np.abs(back - W).reshape(2, 64, 4, 16)
    widest = max(np.diff(quantize.NF4)) / 2
    assert leaves["scales"].shape == (2, 4, 16)
    assert np.all(error <= largest * (widest + 2**-8))  # scales are bfloat16
    assert np.sqrt(np.mean(np.square(back - W))) / np.std(W) < 0.1  # 9 % of normal numbers' spread


def test_the_sixteen_numbers_are_quantiles_of_the_normal_distribution():
    """Appendix E of the QLoRA paper, by its construction: eight quantiles below zero, nine from it, scaled to [-1, 1]."""
    normal = pytest.importorskip("scipy.stats").norm
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    above = normal.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -normal.ppf(np.linspace(offset, 0.5, 8)[:-1])
    numbers = np.sort(np.concatenate([above, [0], below])) / above.max()
    np.testing.assert_allclose(quantize.NF4, numbers, atol=2e-7)


def test_each_of_the_sixteen_numbers_is_its_own_code():
    kernel = jnp.tile(jnp.asarray(quantize.NF4), 4)[:, None]
    leaves, back = both_ways(kernel, "nf4", 1)
    np.testing.assert_array_equal(back, kernel)
    assert leaves["codes"][:2, 0].tolist() == [0x10, 0x32]  # the first of two neighbours has the low bits


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_codes_are_those_of_another_library(kind):
    qwix = pytest.importorskip("qwix")
    blocks = W.reshape(2, 64, 4, 16)
    kernel = (blocks / np.abs(blocks).max(axis=1, keepdims=True)).reshape(128, 64)  # scales that bfloat16 holds
    how = {"tiled_axes": {0: 64}} if kind == "nf4" else {}
    theirs = qwix.quantize(kernel, kind if kind == "nf4" else jnp.int8, channelwise_axes=(1,), **how)
    back = both_ways(kernel, kind, 1)[1]
    # int8: theirs divides by 127.5, so codes may differ by one
    np.testing.assert_allclose(back, qwix.dequantize(theirs), atol=1e-6 if kind == "nf4" else 1 / 127)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_stacked_kernels_are_kernels_one_after_the_other(kind):
    """Two layers of three experts with two dimensions of inputs, and one of them alone."""
    stacked = jax.random.normal(jax.random.key(1), (2, 3, 6, 16, 5))
    leaves = quantize.quantize(stacked, kind, contract=2, lead=2)
    alone = quantize.quantize(stacked[1, 2], kind, contract=2)
    for name in ("codes", "scales"):
        np.testing.assert_array_equal(leaves[name][1, 2], alone[name])
    np.testing.assert_array_equal(
        quantize.dequantize(leaves, jnp.float32)[1, 2], quantize.dequantize(alone, jnp.float32)
    )


@pytest.mark.parametrize("kind, bits", [("int8", 8.03125), ("nf4", 4.25)])
def test_bytes_on_the_device(kind, bits):
    kernel = jnp.ones((1024, 256))
    leaves, back = both_ways(kernel, kind, 1)
    assert sum(leaf.on_device_size_in_bytes() for leaf in leaves.values()) == kernel.size * bits / 8
    np.testing.assert_allclose(back, 1.0, rtol=1e-6)


def test_zeros_stay_zeros():
    for kind in quantize.KINDS:
        np.testing.assert_array_equal(both_ways(jnp.zeros((64, 3)), kind, 1)[1], 0.0)


def test_nf4_refuses_inputs_that_make_blocks_too_small():
    with pytest.raises(ValueError, match=r"multiple of 8, not \(6, 20\).*int8"):
        quantize.quantize(jnp.ones((6, 20, 8)), "nf4", contract=2)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_product_and_gradient_are_those_of_the_dequantised_kernel(kind):
    leaves, back = both_ways(W, kind, 1)
    x_RI = jax.random.normal(jax.random.key(2), (6, 128))

    def loss(x_RI, product):
        return jnp.sin(product(x_RI)).sum()

    ours = jax.value_and_grad(loss)(x_RI, lambda x: quantize.matmul(x, leaves, 1))
    theirs = jax.value_and_grad(loss)(x_RI, lambda x: x @ back.reshape(128, -1))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("remat", [False, True])
def test_kernels_exist_in_full_one_layer_at_a_time(kind, remat):
    """Eight layers through a scan, forward and backward: what is needed beside the arguments is that of one or two."""
    width, layers = 512, 8
    stack = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    leaves = jax.eval_shape(lambda kernel: quantize.quantize(kernel, kind, contract=1, lead=1), stack)

    def loss(x_RI, leaves):
        def layer(x_RI, leaves):
            return jnp.tanh(quantize.matmul(x_RI, leaves, 1)), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x_RI, leaves)[0].sum()

    x_RI = jax.ShapeDtypeStruct((8, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x_RI, leaves).compile()
    one_kernel = width * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * one_kernel

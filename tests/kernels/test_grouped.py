"""Products of many groups of rows: the same numbers as one group after the other, for any sizes of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itjax.kernels import grouped

ROWS = 40
SIZES = {
    "some": [3, 20, 0, 5],  # and 12 rows of no group
    "none": [0, 0, 0, 0],
    "all in one": [0, 0, 40, 0],
    "one row each": [1, 1, 1, 1],
    "full": [7, 13, 11, 9],
}


def numbers(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X_MI, KERNEL_EIO, DY_MO = numbers(ROWS, 6, seed=0), numbers(4, 6, 5, seed=1), numbers(ROWS, 5, seed=2)


def by_hand(sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product, and the gradients of Σ dy·y, in float64."""
    x, kernel, dy = (np.asarray(array, np.float64) for array in (X_MI, KERNEL_EIO, DY_MO))
    y, dx, dkernel = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    start = 0
    for group, size in enumerate(sizes):
        here = np.s_[start : start + size]
        y[here], dx[here] = x[here] @ kernel[group], dy[here] @ kernel[group].T
        dkernel[group] = x[here].T @ dy[here]
        start += size
    return y, dx, dkernel


@jax.jit
def outcome(sizes_E):
    y_MO, pull = jax.vjp(lambda x, kernel: grouped.product(x, kernel, sizes_E), X_MI, KERNEL_EIO)
    return y_MO, *pull(DY_MO)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients_are_those_of_every_group_alone(sizes):
    for got, expected in zip(outcome(jnp.array(sizes)), by_hand(sizes), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_instruction_of_tpus_means_the_same(sizes):
    y_MO, _, dkernel_EIO = by_hand(sizes)
    sizes_E = jnp.array(sizes)
    np.testing.assert_allclose(grouped._instruction(X_MI, KERNEL_EIO, sizes_E), y_MO, atol=1e-5)
    np.testing.assert_allclose(grouped._instruction_outer(X_MI, DY_MO, sizes_E), dkernel_EIO, atol=1e-5)
    np.testing.assert_allclose(grouped.reference(X_MI, KERNEL_EIO, sizes_E), y_MO, atol=1e-5)


def test_blocks_belong_to_one_group_each():
    group_G, start_G, blocks = grouped._plan(jnp.array([5, 0, 2]), 4, limit=5)
    assert blocks == 3
    assert group_G[:3].tolist() == [0, 0, 2]
    assert start_G[:3].tolist() == [0, 4, 5]


def test_most_blocks_that_sizes_can_need_fit_the_plan():
    for sizes in ([1, 1, 1, 37], [9, 9, 9, 13], [8, 8, 8, 16]):
        *_, blocks = grouped._plan(jnp.array(sizes), 8, limit=ROWS // 8 + 4)
        assert int(blocks) == sum(-(-size // 8) for size in sizes) <= ROWS // 8 + 4


def test_rows_of_no_group_are_zeros_whatever_is_in_them():
    x_MI = X_MI.at[28:].set(jnp.nan)
    y_MO, pull = jax.vjp(lambda x: grouped.product(x, KERNEL_EIO, jnp.array(SIZES["some"])), x_MI)
    assert not np.asarray(y_MO[28:]).any()
    assert not np.asarray(pull(DY_MO)[0][28:]).any()


def test_work_grows_with_rows_in_groups_and_not_with_groups():
    """A loop over blocks of the rows there are: the same products for 4 groups as for one, none for no rows."""
    assert [int(grouped._plan(jnp.array(sizes), 10, limit=9)[2]) for sizes in ([40, 0, 0, 0], [10] * 4, [0] * 4)] == [
        4,
        4,
        0,
    ]

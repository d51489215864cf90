"""Rotary positions, against rotations written out and what the papers say of them. Other libraries: tests/parity."""

import jax.numpy as jnp
import numpy as np
import pytest

from itjax.models import rope
from itjax.models.config import ROPE_SCALINGS, Rope

LLAMA_31 = Rope(theta=5e5, scaling="llama3", factor=8.0, original_length=8192, low=1.0, high=4.0)
GPT_OSS = Rope(theta=150000.0, scaling="yarn", factor=32.0, original_length=4096, truncate=False)
PHI = Rope(scaling="longrope", factor=32.0, original_length=4096, short=(1.0, 1.1), long=(2.0, 40.0))


def speeds(value, *, head_size, length=1):
    return rope.frequencies(value, head_size=head_size, length=length)[0]


def factor(value, *, head_size, length=1):
    return rope.frequencies(value, head_size=head_size, length=length)[1]


def turned(x, positions, value, *, length=1):
    x_BTNH, positions_BT = jnp.asarray(x, jnp.float32)[None, :, None], jnp.asarray(positions)[None]
    turns = rope.angles(positions_BT, value, head_size=x_BTNH.shape[-1], length=length)
    return np.asarray(rope.turn(x_BTNH, turns)[0, :, 0])


def test_a_pair_is_a_number_of_the_first_half_and_its_sibling_of_the_second():
    # theta 1/4 and two pairs: the second turns by theta^-1/2 = 2 radians per position.
    out = turned([[1, 0, 0, 0], [0, 1, 0, 0]], [1, 1], Rope(theta=0.25))
    np.testing.assert_allclose(out, [[np.cos(1), 0, np.sin(1), 0], [0, np.cos(2), 0, np.sin(2)]], atol=1e-6)


def test_position_0_is_left_alone():
    x = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    np.testing.assert_array_equal(turned(x, [0], Rope()), x)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 16))
    scores = [float(turned(q, [m], Rope())[0] @ turned(k, [n], Rope())[0]) for m, n in ((7, 3), (107, 103), (4, 0))]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)
    assert abs(float(turned(q, [7], Rope())[0] @ turned(k, [4], Rope())[0]) - scores[0]) > 0.01


def test_with_a_share_only_the_first_numbers_are_turned():
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    out = turned(x, range(5), Rope(share=0.75))
    np.testing.assert_array_equal(out[:, 12:], x[:, 12:])
    np.testing.assert_array_equal(out[:, :12], turned(x[:, :12], range(5), Rope()))  # as a head of 12 would be
    assert np.abs(out[1:, :12] - x[1:, :12]).min() > 0


def test_heads_keep_their_type_and_are_turned_in_float32():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8))
    turns = rope.angles(jnp.arange(3)[None], Rope(), head_size=8, length=3)
    assert turns.cos_BTP.dtype == turns.sin_BTP.dtype == jnp.float32
    narrow = jnp.asarray(x, jnp.bfloat16)
    out = rope.turn(narrow, turns)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rope.turn(narrow.astype(jnp.float32), turns).astype(jnp.bfloat16))


@pytest.mark.parametrize("theta, head_size", [(1e4, 64), (5e5, 128), (1e6, 256)])
def test_angles_are_off_by_what_float32_cannot_say(theta, head_size):
    positions = np.array([1, 100, 4095, 131071, 1048575])
    turns = rope.angles(jnp.asarray(positions)[None], Rope(theta=theta), head_size=head_size, length=1)
    exact = positions[:, None] * theta ** -(np.arange(0, head_size, 2) / head_size)
    bound = 1e-7 + 1.2e-7 * positions[:, None]  # half a unit in the last place of the speed, and of the product
    assert (np.abs(turns.cos_BTP[0] - np.cos(exact)) < bound).all()
    assert (np.abs(turns.sin_BTP[0] - np.sin(exact)) < bound).all()


def test_linear_slows_every_pair():
    plain = speeds(Rope(theta=1e6), head_size=256)
    np.testing.assert_allclose(speeds(Rope(theta=1e6, scaling="linear", factor=8.0), head_size=256) * 8, plain)


def test_llama3_leaves_fast_pairs_alone_and_slows_slow_ones_by_the_factor():
    plain, stretched = speeds(Rope(theta=5e5), head_size=128), speeds(LLAMA_31, head_size=128)
    turns = 8192 * plain / (2 * np.pi)  # within the context that was trained first
    np.testing.assert_array_equal(stretched[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(stretched[turns < 1] * 8, plain[turns < 1])
    between = (plain / stretched)[(turns > 1) & (turns < 4)]
    assert len(between) == 6
    assert (between > 1).all()
    assert (between < 8).all()
    assert (np.diff(between) > 0).all()


def test_yarn_leaves_fast_pairs_alone_and_slows_slow_ones_by_the_factor():
    plain, stretched = speeds(Rope(theta=150000.0), head_size=64), speeds(GPT_OSS, head_size=64)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_array_equal(stretched[turns > 32], plain[turns > 32])
    np.testing.assert_allclose(stretched[turns < 1] * 32, plain[turns < 1])
    assert (np.diff(plain / stretched) >= 0).all()


def test_yarn_without_whole_borders_is_another_ramp():
    whole = Rope(theta=150000.0, scaling="yarn", factor=32.0, original_length=4096)
    assert np.abs(speeds(GPT_OSS, head_size=64) / speeds(whole, head_size=64) - 1).max() > 0.01


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, 0.1 * np.log(32) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(32) + 1) / (0.1 * np.log(32) + 1)),
        ({"mscale": 2.0}, 0.1 * np.log(32) + 1),  # one alone counts as none, as elsewhere
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_multiplies_cosine_and_sine(given, expected):
    value = Rope(**({"scaling": "yarn", "factor": 32.0, "original_length": 4096} | given))
    assert factor(value, head_size=64) == pytest.approx(expected)
    turns = rope.angles(jnp.zeros((1, 1), jnp.int32), value, head_size=64, length=1)
    np.testing.assert_allclose(turns.cos_BTP, expected, rtol=1e-6)


def test_longrope_has_divisors_for_short_and_for_long_rows():
    plain = speeds(Rope(), head_size=4)
    np.testing.assert_allclose(speeds(PHI, head_size=4, length=4096), plain / [1.0, 1.1])
    np.testing.assert_allclose(speeds(PHI, head_size=4, length=4097), plain / [2.0, 40.0])


def test_longrope_has_one_factor_for_rows_of_any_length():
    expected = np.sqrt(1 + np.log(32) / np.log(4096))
    assert factor(PHI, head_size=4, length=10) == factor(PHI, head_size=4, length=10**5) == pytest.approx(expected)


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_a_factor_of_one_changes_nothing(scaling):
    value = Rope(scaling=scaling, factor=1.0, original_length=4096, short=(1.0,) * 8, long=(1.0,) * 8)
    frequencies, times = rope.frequencies(value, head_size=16, length=8192)
    np.testing.assert_allclose(frequencies, speeds(Rope(), head_size=16))
    assert times == 1.0


@pytest.mark.parametrize(
    "value, message",
    [
        (Rope(scaling="lama3"), r"rope\.scaling: 'lama3' is unknown; Did you mean 'llama3'\?"),
        (Rope(scaling="yarn", factor=4.0), r"rope\.original_length: 0; yarn needs"),
        (Rope(share=0.3), r"rope\.share: 0\.3 of 4 are 1 numbers"),
        (Rope(scaling="longrope", original_length=8, short=(1.0,) * 3), r"rope\.short: 3 divisors for 2 pairs"),
    ],
)
def test_what_cannot_be_turned_is_answered_with_what_is_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        rope.frequencies(value, head_size=4, length=1)


def test_every_scaling_of_the_config_is_known_here():
    assert set(rope.SCALINGS) == set(ROPE_SCALINGS)

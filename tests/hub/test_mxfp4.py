"""Four bits and a shared power of two are numbers again."""

import numpy as np
import pytest

from itjax.hub.mxfp4 import mxfp4


def test_the_low_half_of_a_byte_comes_first():
    blocks = np.full((1, 16), 0x42, np.uint8)  # 2 -> 1, 4 -> 2
    assert mxfp4(blocks, np.array([128], np.uint8))[:4].tolist() == [2.0, 4.0, 2.0, 4.0]


def test_every_code_is_a_number():
    blocks = np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, *[0] * 8]], np.uint8)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = mxfp4(blocks, np.array([127], np.uint8))
    assert numbers[:16].tolist() == positive + [-number for number in positive]


def test_groups_have_scales_of_their_own():
    blocks = np.full((2, 3, 16), 0x22, np.uint8)  # ones
    scales = np.array([[126, 127, 128], [0, 130, 127]], np.uint8)
    numbers = mxfp4(blocks, scales)
    assert numbers.shape == (2, 96)
    assert numbers[:, ::32].tolist() == [[0.5, 1.0, 2.0], [2.0**-127, 8.0, 1.0]]


def test_scales_that_do_not_belong_are_named():
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 16\) need scales of shape \(2,\), not \(3,\)"):
        mxfp4(np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8))

"""MXFP4, the four bits in which GPT-OSS is published: 32 numbers share a power of two.

Source: OCP Microscaling Formats specification 1.0, sections 5.2 and 5.3.3 (E8M0 scales, E2M1 elements),
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import numpy as np

POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the low three bits; the fourth is the sign
VALUES = np.array(POSITIVE + tuple(-value for value in POSITIVE), np.float32)
BIAS = 127  # of the scales' exponents


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 (..., G·32) of blocks (..., G, 16) and scales (..., G), both uint8.

    A byte holds two numbers, the first in its low half:  0x42 at scale 128  ->  [1, 2]·2^1  =  [2, 4]
    """
    if blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks of shape {blocks.shape} need scales of shape {blocks.shape[:-1]}, not {scales.shape}")
    numbers = np.empty((*blocks.shape, 2), np.float32)
    np.take(VALUES, blocks & 0xF, out=numbers[..., 0])
    np.take(VALUES, blocks >> 4, out=numbers[..., 1])
    groups = numbers.reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])
    groups *= np.ldexp(np.float32(1), scales.astype(np.int32) - BIAS)[..., None]
    return groups.reshape(*blocks.shape[:-2], -1)

"""The noise stream: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in NumPy.  Every other backend equals this.

Counter layout: ``(element // 4, draw, image_id, block)``, key ``(seed & 0xffffffff, seed >> 32)``.  ``element`` is the flat
index into the channel-first image (C, H, W).  Of a counter's four words (r0, r1, r2, r3) in block 0, r0 and r1 make the normals
of elements 4i and 4i + 1 (cosine, sine), r2 and r3 those of 4i + 2 and 4i + 3.  :mod:`advrad_fast.lattice` uses blocks 1 and 2,
:mod:`advrad_fast.tiles` block 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from advrad_fast.checks import integer
from advrad_fast.errors import ConfigError, expected

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

MAX_SEED = 2**64 - 1
MAX_WORDS = 2**34  #: of one (seed, draw, image, block)


def check_seed(seed: object) -> int:
    """``seed`` as an int in [0, 2**64), or a ConfigError."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(expected("seed", "an integer in [0, 2**64)", seed))
    return int(seed)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32.

    Args:
        counter: uint32 (N, 4).
        key: two 32-bit words.

    Returns:
        uint32 (N, 4); equal to Random123's ``philox4x32_R(10, ...)``.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _MASK
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def integers(count: int, *, seed: int, draw: int = 0, image_id: int = 0, block: int = 0) -> NDArray[np.uint32]:
    """The stream's first ``count`` 32-bit words for one (seed, draw, image, block): uint32 (count,).

    Args:
        count: in [0, 2**34].
        seed: in [0, 2**64).
        draw, image_id, block: in [0, 2**32).

    Raises:
        ConfigError: a number is out of range.
    """
    seed, count = check_seed(seed), integer("count", count, 0, MAX_WORDS)
    for name, value in (("draw", draw), ("image_id", image_id), ("block", block)):
        integer(name, value, 0, 2**32 - 1)
    groups = (count + 3) // 4
    counter = np.zeros((groups, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(groups, dtype=np.uint32)
    counter[:, 1] = draw
    counter[:, 2] = image_id
    counter[:, 3] = block
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:count]


def normals(count: int, *, seed: int, draw: int = 0, image_id: int = 0) -> NDArray[np.float32]:
    """Standard normals by Box-Muller in fp32: float32 (count,), |z| <= 5.77.

    The uniforms are exact in fp32, u1 = ((r >> 8) + 1) / 2**24 in (0, 1] and u2 = (r >> 8) / 2**24 in [0, 1), so two
    implementations can differ only by the rounding of log, sqrt, sin and cos.

    Raises:
        ConfigError: as :func:`integers`.
    """
    integer("count", count, 0, MAX_WORDS)
    words = integers((count + 3) // 4 * 4, seed=seed, draw=draw, image_id=image_id).reshape(-1, 2) >> np.uint32(8)
    scale = np.float32(2.0**-24)
    radius = np.sqrt(np.float32(-2.0) * np.log((words[:, 0] + np.uint32(1)).astype(np.float32) * scale))
    angle = words[:, 1].astype(np.float32) * scale * np.float32(2.0 * np.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]

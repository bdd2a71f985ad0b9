"""Writes ternary matrices as blocks of GGUF files, with loops over the weights of a block: the formulas.

For types that no Python package writes, and to compare what we write. `encode` does all blocks of a matrix at
once, one position in the block after the other.
"""

from collections.abc import Callable

import numpy as np

BLOCK = {
    "I2_S": 128,
    "I2_S_ARM": 64,
    "TQ1_0": 256,
    "TQ2_0": 256,
    "Q2_0": 64,
    "Q2_0_128": 128,
    "PQ2_0": 128,
    "PTQ1_0": 128,
    "IQ1_BN": 64,
    "IQ2_BN": 64,
}
"""Weights in a block."""

TENSOR_SCALE = {"I2_S", "I2_S_ARM"}
SCALE_IN_FRONT = {"Q2_0", "Q2_0_128", "PQ2_0"}
ROW_SCALE = {"IQ1_BN": np.float16, "IQ2_BN": np.float32}


def two_bits_place(name: str, j: int) -> tuple[int, int]:
    """The byte that holds weight ``j`` of a block, and the lower one of its two bits."""
    if name == "I2_S":
        return j % 32, 6 - 2 * (j // 32)
    if name == "I2_S_ARM":
        return j % 16, 6 - 2 * (j // 16)
    if name == "TQ2_0":
        half, j = divmod(j, 128)
        return 32 * half + j % 32, 2 * (j // 32)
    if name == "IQ2_BN":
        return j % 16, 2 * (j // 16)
    return j // 4, 2 * (j % 4)  # Q2_0, Q2_0_128, PQ2_0


def base3_place(name: str, j: int) -> tuple[int, int]:
    """The byte that holds weight ``j`` of a block, and which digit it is, 0 the highest of five."""
    if name == "IQ1_BN":
        group, j = divmod(j, 16)
        return (3 * group + j // 5, 4 - j % 5) if j < 15 else (12, 4 - group)
    first, second, third = (32, 16, 4) if name == "TQ1_0" else (16, 8, 2)
    if j < 5 * first:
        return j % first, j // first
    j -= 5 * first
    if j < 5 * second:
        return first + j % second, j // second
    j -= 5 * second
    return first + second + j % third, j // third


def encode_codes(name: str, codes: np.ndarray) -> np.ndarray:
    """The bytes of codes 0, 1, 2: from [blocks, weights of a block] to uint8 [blocks, bytes]."""
    base3 = name in ("TQ1_0", "PTQ1_0", "IQ1_BN")
    place: Callable[[str, int], tuple[int, int]] = base3_place if base3 else two_bits_place
    places = [place(name, j) for j in range(BLOCK[name])]
    numbers = np.zeros((len(codes), 1 + max(byte for byte, _ in places)), dtype=np.int64)
    for j, (byte, at) in enumerate(places):
        numbers[:, byte] += codes[:, j] * (3 ** (4 - at) if base3 else 1 << at)
    if base3:
        numbers = (256 * numbers + 242) // 243  # ceil(256 v / 243)
    return numbers.astype(np.uint8)


def encode(name: str, w: np.ndarray, scales: np.ndarray) -> bytes:
    """The bytes of a matrix.

    Args:
        name: of the type, a key of `BLOCK`.
        w: integers [N, K] in {-1, 0, 1}.
        scales: the multipliers [G, N], one for each block of a row; [1, N] with one for each row (IQ1_BN,
            IQ2_BN), all the same for `TENSOR_SCALE`.
    """
    codes = encode_codes(name, w.reshape(-1, BLOCK[name]).astype(np.int64) + 1)
    if name in TENSOR_SCALE:
        return codes.tobytes() + scales.astype("<f4").flat[0].tobytes() + bytes(28)
    if name in ROW_SCALE:
        in_front = scales[0].astype(ROW_SCALE[name])
        rows = zip(in_front, codes.reshape(len(w), -1), strict=True)
        return b"".join(scale.tobytes() + row.tobytes() for scale, row in rows)
    halves = scales.T.astype("<f2").reshape(-1, 1).view(np.uint8)
    parts = [halves, codes] if name in SCALE_IN_FRONT else [codes, halves]
    return np.concatenate(parts, axis=1).tobytes()

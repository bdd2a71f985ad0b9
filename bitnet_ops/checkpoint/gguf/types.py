"""The table of tensor types of GGUF files: their numbers, names and bytes.

A tensor is rows of K numbers. A row is blocks of ``block`` numbers, which take ``block_bytes`` each. Most
types are nothing but blocks; some have a scale in front of each row, or behind the last block::

    [row_bytes][block][block] ... [block]      row 0
    [row_bytes][block][block] ... [block]      row 1
    ...
    [tensor_bytes]

    bytes = rows * (row_bytes + K / block * block_bytes) + tensor_bytes

What a block holds is drawn in ternary/ and in dense/. Each fork of llama.cpp gives numbers as it likes, so
that number 42 means three types, told apart by their sizes, and numbers 36 to 39 mean others in other forks.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorType:
    """How the numbers of a tensor lie in a GGUF file.

    Attributes:
        number: in the file.
        name: as llama.cpp and its forks call it, but for "Q2_0_128", which they call Q2_0, too.
        block: numbers in a block.
        block_bytes: bytes of a block.
        row_bytes: bytes in front of each row.
        tensor_bytes: bytes behind the last block.
        ternary: whether the numbers are -1, 0 and 1 times a scale.
        refused: why a tensor of this type is not read; empty for those that are.
    """

    number: int
    name: str
    block: int
    block_bytes: int
    row_bytes: int = 0
    tensor_bytes: int = 0
    ternary: bool = False
    refused: str = ""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor.

        Args:
            shape: in PyTorch's order, [..., K]; of one number where it is empty.

        Raises:
            ValueError: a size is negative, or does not fit the blocks.

        Example:
            >>> types_of(36)[0].nbytes((2, 192))
            128
        """
        if any(size < 0 for size in shape):
            raise ValueError(f"expected sizes of 0 or more, got {list(shape)!r:.200}")
        count, columns = math.prod(shape), shape[-1] if shape else 1
        # Blocks of I2_S run over the ends of rows.
        fitted, what = (count, "number of weights") if self.tensor_bytes else (columns, "last size")
        if fitted % self.block:
            raise ValueError(
                f"expected a {what} that {self.block} divides, because {self.name} has blocks of as many, "
                f"got {fitted} in {list(shape)!r:.200}"
            )
        rows = math.prod(shape[:-1])
        return rows * self.row_bytes + count // self.block * self.block_bytes + self.tensor_bytes


_STQ1_0 = "STQ1_0 of Tencent's fork: three of four weights by table, not supported"

TYPES = (
    TensorType(0, "F32", 1, 4),
    TensorType(1, "F16", 1, 2),
    TensorType(30, "BF16", 1, 2),
    TensorType(2, "Q4_0", 32, 18),
    TensorType(3, "Q4_1", 32, 20),
    TensorType(6, "Q5_0", 32, 22),
    TensorType(7, "Q5_1", 32, 24),
    TensorType(8, "Q8_0", 32, 34),
    TensorType(12, "Q4_K", 256, 144),
    TensorType(13, "Q5_K", 256, 176),
    TensorType(14, "Q6_K", 256, 210),
    TensorType(34, "TQ1_0", 256, 54, ternary=True),
    TensorType(35, "TQ2_0", 256, 66, ternary=True),
    TensorType(36, "I2_S", 128, 32, tensor_bytes=32, ternary=True),
    TensorType(42, "Q2_0", 64, 18, ternary=True),
    TensorType(42, "Q2_0_128", 128, 34, ternary=True),
    TensorType(42, "STQ1_0", 256, 42, ternary=True, refused=_STQ1_0),
    TensorType(142, "PQ2_0", 128, 34, ternary=True),
    TensorType(143, "PTQ1_0", 128, 28, ternary=True),
    TensorType(134, "IQ1_BN", 64, 13, row_bytes=2, ternary=True),
    TensorType(135, "IQ2_BN", 64, 16, row_bytes=4, ternary=True),
)
"""Every type whose size is known; those without `TensorType.refused` are read."""

I2_S_ARM = TensorType(36, "I2_S_ARM", 64, 16, tensor_bytes=32, ternary=True)
"""What bitnet.cpp calls I2_S, too, where it was quantised on ARM since November 2025.

Nothing in a file says so. Hence it is not in `TYPES`, and only a user who knows can ask for it, with
``from_pretrained(..., arm_i2_s=True)``.
"""

REFUSED = {
    38: "TL1 of bitnet.cpp: its layout depends on the shape of the matrix and on the machine",
    39: "TL2 of bitnet.cpp, whose layout depends on the shape of the matrix, or MXFP4, which is not ternary",
    40: "NVFP4: 4 bits, not ternary",
    41: "Q1_0: binary, not ternary",
    43: _STQ1_0,
    335: "IQ2_BN_R4 of ik_llama.cpp: four rows interleaved for its kernels, not supported",
    **{
        number: f"{name}: not supported"
        for number, name in {
            9: "Q8_1",
            10: "Q2_K",
            11: "Q3_K",
            15: "Q8_K",
            16: "IQ2_XXS",
            17: "IQ2_XS",
            18: "IQ3_XXS",
            19: "IQ1_S",
            20: "IQ4_NL",
            21: "IQ3_S",
            22: "IQ2_S",
            23: "IQ4_XS",
            24: "I8",
            25: "I16",
            26: "I32",
            27: "I64",
            28: "F64",
            29: "IQ1_M",
            37: "I8_S",
        }.items()
    },
}
"""Types that are known and not read: from the number to the name and the reason."""


def types_of(number: int) -> tuple[TensorType, ...]:
    """The types of `TYPES` that a number in a file may mean: none, one, or several of different sizes."""
    return tuple(type for type in TYPES if type.number == number)

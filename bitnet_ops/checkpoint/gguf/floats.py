"""The one float format of metadata, and how its numbers become the decimals that people wrote."""

import struct


def decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32, of a number that was read as a float32.

    Example:
        >>> decimal(9.999999747378752e-06)
        1e-05
    """
    for digits in range(6, 10):
        candidate = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", candidate) == struct.pack("<f", value):
                return candidate
        except OverflowError:  # no float32
            break
    return float(value)

"""Safe replacements for numpy's classes, for `support.files.restricted_unpickle`.

numpy's own classes accept pickled states that crash numpy or ask for gigabytes. The replacements
are for pickles from third parties, and only accept what an array or a number needs.
"""

import numpy as np

NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


class Dtype:
    """Replaces numpy.dtype: keeps only the code and the byte order of a number's type."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in NUMBERS:
            raise ValueError(f"{code!r:.80} is not the type of a number")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"{state[1]!r:.80} is not a byte order")
        self.code = state[1] + self.code


class Array:
    """Replaces numpy.ndarray; `array` is the real numpy array.

    The array is made by np.frombuffer, so it takes no more memory than its bytes in the file.
    """

    def __init__(self, *_: object) -> None:
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, raw = state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
        self.array = np.frombuffer(raw, dtype.code).reshape(shape, order="F" if fortran else "C")


def scalar(dtype: Dtype, data: bytes) -> int | float | bool:
    """Replace numpy.core.multiarray.scalar: return a Python number."""
    return np.frombuffer(data, dtype.code)[0].item()

"""Values that a program may return to fool a verifier, each with a word of the reason that must be given."""

import numpy as np


class Lying(float):
    """Compares and converts as it likes."""

    def __float__(self):
        return 0.01

    def __gt__(self, other):
        return True

    __ge__ = __lt__ = __le__ = __gt__


class LyingArray(np.ndarray):
    """Pretends to be valid in comparisons."""

    def all(self, *_, **__):
        return np.True_


def nested(depth):
    value = [0.1]
    for _ in range(depth):
        value = [value]
    return value


NO_LISTS = {
    "None": None,
    "bool": True,
    "float": 2.63,
    "string": "2.63",
    "bytes": b"0123",
    "set": {0.1, 0.2},
    "dict": {"heights": [0.5]},
    "zero-dimensional": np.array(0.5),
    "generator": (x for x in [0.5]),
    "huge range": range(10**9),
    "array subclass": np.full(26, 0.01).view(LyingArray),
}
"""Instead of any list."""

NO_NUMBERS = {
    "NaN": (float("nan"), "finite"),
    "infinity": (float("inf"), "finite"),
    "minus infinity": (float("-inf"), "finite"),
    "None": (None, "None"),
    "bool": (True, "True"),
    "string": ("0.01", "str"),
    "complex": (0.01 + 0j, "complex"),
    "subclass": (Lying(5.0), "Lying"),
    "numpy subclass": (np.float64(0.01), "float64"),
    "list": ([0.01], "list"),
    "nested 1,000 deep": (nested(1000), "list"),
    "huge integer": (10**400, "int"),
    "huger integer": (10**10_000, "int"),
}
"""Instead of one number in a list."""


def arrays(shape):
    """Instead of an array of the shape: (value, word)."""
    cells = int(np.prod(shape))
    strided = np.lib.stride_tricks.as_strided(np.zeros(1), (10**9, *shape[1:]), (0,) * len(shape))
    values = {
        "complex array": (np.full(shape, 0.01 + 0j), "complex128"),
        "bool array": (np.ones(shape, bool), "bool"),
        "object array": (np.full(shape, 0.01, object), "object"),
        "string array": (np.full(shape, "0.01"), "<U4"),
        "half of a complex": (np.full(shape, 0.01, np.complex64), "complex64"),
        "dates": (np.zeros(shape, "datetime64[s]"), "datetime64"),
        "integers beyond 2^53": (np.full(shape, 2**62), "2^53"),
        "records": (np.zeros(shape, [("a", float)]), "float64"),
        "another shape": (np.full((cells, 1, 1), 0.01), "shape" if len(shape) == 1 else "length"),
        "10^9 elements": (strided, "length"),
        "NaN array": (np.full(shape, np.nan), "finite"),
        "infinite array": (np.full(shape, np.inf), "finite"),
    }
    if np.longdouble(0).itemsize > 8:
        values["long double array"] = (np.full(shape, 0.01, np.longdouble), str(np.dtype(np.longdouble)))
    return values

"""Values as bytes: every value comes back as it was, and no bytes do more than become plain data or a ValueError."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from discover_jax.execution import values

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
DTYPES = st.sampled_from(["?", "i1", "u2", "i8", "f2", "f4", "f8", "c8", "c16", ">f8"])


def round_trip(value):
    return values.decode(values.encode(value, 1 << 24))


@given(ANY)
def test_plain_values_come_back(value):
    assert repr(round_trip(value)) == repr(value)  # repr tells -0.0 from 0.0, and NaN equals itself


@given(DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))))
def test_arrays_come_back_bit_for_bit(array):
    found = round_trip([array, {"a": array.T}])
    for one, wanted in ((found[0], array), (found[1]["a"], array.T)):
        assert one.dtype == wanted.dtype.newbyteorder("=")
        assert one.shape == wanted.shape
        assert one.flags.writeable
        assert one.tobytes() == np.ascontiguousarray(wanted, wanted.dtype.newbyteorder("=")).tobytes()


def test_tuples_and_scalars_become_plain():
    found = round_trip((np.float64(0.1), np.int8(3), np.bool_(True), np.float32(0.5)))
    assert found == [0.1, 3, True, 0.5]
    assert [type(x) for x in found] == [float, int, bool, float]


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", {1: 2}, {3}, np.array([object()]), np.array(["text"]), np.datetime64("2026-01-01"), np.longdouble(1), range(3)],
    ids=range(9),
)
def test_other_types_are_refused(value):
    with pytest.raises(ValueError, match="it holds"):
        values.encode([value], 1 << 20)


def test_depth_and_size_are_limited():
    deep = []
    for _ in range(values.MOST_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        values.encode(deep, 1 << 20)
    for big in ("x" * 2000, np.zeros(200), [np.zeros(100), np.zeros(100)]):
        with pytest.raises(values.ValueTooBigError):
            values.encode(big, 1000)
    assert len(values.encode(np.zeros(100), 1000)) <= 1000


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b'{"array":0}\n\x93NUMPY\x01\x00' + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1",
        b"nonsense\n",
        b"\xff\n",
        b"1\n2",
        b'{"a":1}\n',
        b'{"array":0}\n',
        b'{"array":1}\n',
        b'{"array":true}\n',
        b'{"array":0,"b":1}\n',
        b'{"dict":[[1,2]]}\n',
        b'{"dict":[["a"]]}\n',
        b'{"dict":3}\n',
        b"[" * 100_000 + b"]" * 100_000 + b"\n",
        b"[" * 200 + b"]" * 200 + b"\n",
        b"1" * 5000 + b"\n",
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }", bytes(8)),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (True,), }", bytes(8)),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04K\x01."),
        npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", bytes(9)),
        npy("__import__('os').abort()"),
    ],
    ids=range(24),
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the reason: the message comes from json, numpy or this project
        values.decode(data)


def lists_in(x):
    """Number of lists inside a list, at all depths."""
    return sum(1 + lists_in(item) for item in x if isinstance(item, list))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**11, 0), "100,000,000,000 nested lists"),
        ((10**5, *[1] * 40), "4,000,000 nested lists"),
        ((2, 10**30, 0), "shape is not valid"),
    ],
    ids=["no columns", "many axes", "beyond 64 bits"],
)
def test_arrays_that_stand_for_too_many_lists_are_refused(shape, message):
    data = npy(f"{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}, }}".ljust(245), bytes(math.prod(shape)))
    with pytest.raises(ValueError, match=message):
        values.decode(data)


def test_the_bound_of_lists_counts_all_arrays_of_a_value():
    array = np.zeros((700, 0))
    assert lists_in(array.tolist()) == 700
    values.decode(values.encode(array, 1 << 20))
    with pytest.raises(ValueError, match=r"1,400 nested lists.*\(700, 0\)"):
        values.encode([array, array], 1 << 20)


@given(arrays.arrays("i1", arrays.array_shapes(min_dims=1, max_dims=6, min_side=0, max_side=8)))
def test_lists_are_bounded_by_bytes(array):
    try:
        data = values.encode(array, 1 << 24)
    except ValueError:
        assert lists_in(array.tolist()) > array.nbytes + 1000
    else:
        assert lists_in(values.decode(data).tolist()) <= len(data) + 1000


@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda text: json.dumps(text).encode() + b"\n"))
def test_random_bytes_become_data_or_a_value_error(data):
    try:
        value = values.decode(data)
    except ValueError:
        return
    assert value is None or isinstance(value, bool | int | float | str | list | dict | np.ndarray)
    assert not isinstance(value, float) or not math.isnan(value) or data.startswith(b"NaN")

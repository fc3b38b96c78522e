"""What each row contributes to a score. Verdicts keep it, so that two programs can be compared on the same rows.

A contribution is the score's influence function at the graded table (Hampel, 1974): it has mean 0, and the variance of the score from the
sampling of its R rows is `sum(influence_R ** 2) / R**2`. For a share of correct rows the influence of a row is 1 or 0 minus the share. The
difference of two scores on the same rows has the difference of the two influences (for shares of rows, the variance of McNemar's test; for
areas under the ROC curve, that of DeLong et al., 1988).
"""

import base64
import binascii
import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

_MOST_BITS, _MOST_NUMBERS = 65_536, 4_096
"""Rows that are kept: evenly spaced ones of larger tables. At most 8 KiB for each program."""
_LARGEST = 1e60


@dataclasses.dataclass(frozen=True)
class RowResults:
    """The influence of a table's rows on a score.

    Attributes:
      influence_R: float64, of the kept rows, in the score's unit; its mean is 0.
      rows: number of rows behind the score, at least that of the kept rows.
      share: whether the score is a share of correct rows.
    """

    influence_R: np.ndarray
    rows: int
    share: bool

    @property
    def variance(self) -> float:
        """The variance of the score from the sampling of its rows."""
        return float(np.mean(self.influence_R**2) / self.rows)


def difference_variance(a: RowResults, b: RowResults, difference: float) -> float:
    """The variance of the difference of two scores on the same rows.

    If only a part of the rows is kept, a share that differs by d differs on at least a part |d| of the rows, so the variance is at least
    (|d| - d^2) / rows, even if none of these rows is kept.

    Args:
      difference: of the scores.

    Raises:
      ValueError: the rows differ in number.
    """
    if a.rows != b.rows or len(a.influence_R) != len(b.influence_R):
        raise ValueError(f"two programs can be compared only on the same rows; got {a.rows} and {b.rows}")
    variance = RowResults(a.influence_R - b.influence_R, a.rows, a.share).variance
    if a.share and len(a.influence_R) < a.rows:
        return max(variance, (abs(difference) - difference**2) / a.rows)
    return variance


def encode(values_R: np.ndarray, *, share: bool) -> str:
    """The row results as text for JSON, with one bit a row for a share of rows, and 16 bits a row otherwise.

    Args:
      values_R: of all rows of a table: 1 or 0 for a share of correct rows; otherwise influences. Those beyond 1e60 are cut, so that their
        squares are finite.
      share: whether the score is the share of correct rows.
    """
    return _encode(np.asarray(values_R, np.float64), len(values_R), share)


def _encode(values_R: np.ndarray, rows: int, share: bool) -> str:
    kept_R = values_R[_kept(len(values_R), _MOST_BITS if share else _MOST_NUMBERS)]
    if share:
        return f"bits:{rows}:1:{_pack(np.packbits(kept_R > 0.5))}"
    kept_R = np.clip(np.nan_to_num(kept_R), -_LARGEST, _LARGEST)
    scale = float(np.abs(kept_R).max(initial=0.0)) or 1.0
    return f"float16:{rows}:{scale!r}:{_pack((kept_R / scale).astype('<f2'))}"


def decode(text: str) -> RowResults:
    """The row results of `encode`.

    Raises:
      ValueError: the text is not from `encode`.
    """
    try:
        values_R, rows, share = _decode(text)
        return RowResults(values_R - values_R.mean(), rows, share)
    except (ValueError, KeyError, binascii.Error, zlib.error) as error:
        raise ValueError(f"{text[:60]!r} are not the results of a table's rows ({error!r})") from error


def joined(parts: Sequence[str]) -> str:
    """The row results of a score that is the mean of the scores of several tables, weighted by their rows; "" if a part is missing.

    The influence of a row on such a mean is its influence on its own table's score. Of large tables of equal size, the kept rows of each
    are joined.
    """
    if not all(parts):
        return ""
    decoded = [_decode(part) for part in parts]
    rows = sum(rows for _, rows, _ in decoded)
    return _encode(np.concatenate([values_R for values_R, _, _ in decoded]), rows, share=decoded[0][2])


def _decode(text: str) -> tuple[np.ndarray, int, bool]:
    """Values of the kept rows, number of rows, and whether they are a share of correct rows."""
    kind, rows_text, scale_text, packed = text.split(":")
    rows, scale, share = int(rows_text), float(scale_text), kind == "bits"
    kept = len(_kept(rows, {"bits": _MOST_BITS, "float16": _MOST_NUMBERS}[kind]))
    data = _unpack(packed, -(-kept // 8) if share else 2 * kept)
    if share:
        return np.unpackbits(np.frombuffer(data, np.uint8), count=kept).astype(np.float64), rows, share
    return np.frombuffer(data, "<f2").astype(np.float64) * scale, rows, share


def _kept(rows: int, most: int) -> np.ndarray:
    """Indices of the kept rows."""
    if rows < 1:
        raise ValueError(f"a table has at least one row, not {rows}")
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most).astype(np.int64)


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def _unpack(text: str, size: int) -> bytes:
    """The bytes of `_pack`, which must be `size`. Never more than that are decompressed."""
    stream = zlib.decompressobj()
    data = stream.decompress(base64.b64decode(text, validate=True), size)
    if len(data) != size or not stream.eof:
        raise ValueError(f"{size} bytes were expected")
    return data

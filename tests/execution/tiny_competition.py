"""A competition with a few rows that can be worked out by hand, in a module that worker processes can import."""

import dataclasses
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from discover_jax.exceptions import DataError
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.types import Grade

ANSWERS = [1, 0, 1, 1]
GOOD = """
import pandas as pd
def run():
    frame = pd.read_csv("data/sample_submission.csv")
    frame["y"] = [1, 0, 1, 0]
    return frame
"""
GOOD_SCORE = 0.75  # three of the four answers
LIMITS = ResourceLimits(
    seconds=60,
    cores=1,
    memory_bytes=900 * MIB,
    scratch_bytes=64 * MIB,
    result_bytes=MIB,
    flood_bytes=4 * MIB,
    stdout_bytes=8192,
    processes=64,
)


@dataclasses.dataclass(frozen=True)
class TinyTask:
    public_dir: Path
    fingerprint: str = "tiny-1"
    calls: bool = False

    @property
    def public_dirs(self) -> list[Path]:
        return [self.public_dir]

    def prepare_grading(self) -> None:
        pass

    def sample(self, run: int) -> bytes:
        return (self.public_dir / "sample_submission.csv").read_bytes()

    def combine(self, grades: Sequence[Grade]) -> Grade:
        return grades[0]

    def grade(self, csv: bytes, run: int = 0) -> Grade:
        def invalid(reason: str) -> Grade:
            return Grade(False, reason, None, None)

        try:
            frame = pd.read_csv(io.BytesIO(csv))
        except Exception as error:
            return invalid(f"not a CSV: {error}")
        if list(frame.columns) != ["id", "y"] or frame["id"].tolist() != [10, 11, 12, 13]:
            return invalid(f"wrong columns or ids: {list(frame.columns)}")
        answers = pd.read_csv(self.public_dir.parent / "private" / "answers.csv")
        score = float((answers["y"] == frame["y"]).mean())
        return Grade(True, "", score, score)


class BrokenGrading(TinyTask):
    def grade(self, csv: bytes, run: int = 0) -> Grade:
        raise ZeroDivisionError("metric")


class FragileGrading(TinyTask):
    """A grading that misbehaves if the submission says so."""

    def grade(self, csv: bytes, run: int = 0) -> Grade:
        if csv == b"memory":
            bytearray(5 << 30)  # is not written to, so it takes none
        elif csv == b"exit":
            os._exit(9)
        elif csv == b"hang":
            time.sleep(60)
        elif csv == b"raise":
            raise KeyError("y")
        elif csv == b"digits":
            raise ValueError(10**5000)  # its text cannot be made
        return Grade(True, "", 1.0, 1.0)


class LostAnswers(TinyTask):
    def prepare_grading(self) -> None:
        raise DataError("The answers changed.")


class CannotBeUnpickled(TinyTask):
    def __reduce__(self):
        return (os._exit, (7,))


def make(folder: Path, kind: type[TinyTask] = TinyTask) -> TinyTask:
    """Writes the competition's files below `folder`."""
    public, private = folder / "public", folder / "private"
    public.mkdir(parents=True)
    private.mkdir()
    pd.DataFrame({"id": range(10), "x": range(10), "y": [0, 1] * 5}).to_csv(public / "train.csv", index=False)
    pd.DataFrame({"id": [10, 11, 12, 13], "x": range(4)}).to_csv(public / "test.csv", index=False)
    pd.DataFrame({"id": [10, 11, 12, 13], "y": 0}).to_csv(public / "sample_submission.csv", index=False)
    pd.DataFrame({"id": [10, 11, 12, 13], "y": ANSWERS}).to_csv(private / "answers.csv", index=False)
    # Writable by all, so that the sandbox must protect the files, not their modes.
    public.chmod(0o777)
    for file in public.iterdir():
        file.chmod(0o666)
    return kind(public)

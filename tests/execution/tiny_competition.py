"""A competition with a few rows that can be worked out by hand, in a module that worker processes can import."""

import csv
import dataclasses
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

from discover_jax.exceptions import DataError
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.types import Grade

ANSWERS = [1, 0, 1, 1]
PANDAS = """
import sys, types
class DataFrame(dict):
    def to_csv(self, file, index):
        for row in [self, *zip(*self.values())]:
            file.write(",".join(map(str, row)) + "\\n")
def read_csv(path):
    with open(path) as file:
        names, *rows = (line.rstrip("\\n").split(",") for line in file)
    return DataFrame(zip(names, map(list, zip(*rows))))
pd = sys.modules.setdefault("pandas", types.SimpleNamespace(DataFrame=DataFrame, read_csv=read_csv))
"""
"""In place of `import pandas as pd`, for programs that test something else: the import takes several times as long as the rest of such a
program. It has what these programs and the harness use. Where pandas is preloaded, `pd` is pandas."""
_RUN = """
def run():
    frame = pd.read_csv("data/sample_submission.csv")
    frame["y"] = [1, 0, 1, 0]
    return frame
"""
GOOD = PANDAS + _RUN
GOOD_WITH_PANDAS = "\nimport pandas as pd" + _RUN
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


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def _write(path: Path, *rows: Sequence[object]) -> None:
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))


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
            names, *rows = _rows(csv.decode())
            columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        except Exception as error:
            return invalid(f"not a CSV: {error}")
        if list(columns) != ["id", "y"] or columns["id"] != ("10", "11", "12", "13"):
            return invalid(f"wrong columns or ids: {list(columns)}")
        _, *answers = _rows((self.public_dir.parent / "private" / "answers.csv").read_text())
        score = sum(answer == y for (_, answer), y in zip(answers, columns["y"], strict=True)) / len(answers)
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
    ids = (10, 11, 12, 13)
    _write(public / "train.csv", ("id", "x", "y"), *((x, x, x % 2) for x in range(10)))
    _write(public / "test.csv", ("id", "x"), *zip(ids, range(4), strict=True))
    _write(public / "sample_submission.csv", ("id", "y"), *((name, 0) for name in ids))
    _write(private / "answers.csv", ("id", "y"), *zip(ids, ANSWERS, strict=True))
    # Writable by all, so that the sandbox must protect the files, not their modes.
    public.chmod(0o777)
    for file in public.iterdir():
        file.chmod(0o666)
    return kind(public)

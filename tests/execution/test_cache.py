"""What a file of the cache keeps of a submission, and files of earlier versions."""

import base64
import importlib.metadata
import json
import zlib
from pathlib import Path

import pytest

from discover_jax.execution.cache import VerdictCache, _checksum, packages, verdict_of, verdict_row
from discover_jax.execution.limits import MIB
from discover_jax.types import Execution, Grade, Outcome, Verdict

CSV = b"id,y\n" + b"".join(b"%d,1\n" % number for number in range(100_000))


def verdict_with(outcome: Outcome, result: bytes | None) -> Verdict:
    score = 0.5 if outcome is Outcome.OK else None
    return Verdict(outcome, Grade(score is not None, "", score, score), Execution(Outcome.OK, result, "out", "", 1.5))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_results_of_verdicts_that_are_not_ok_are_not_kept(tmp_path, outcome):
    """A hostile program can make each of them as long as the limit allows."""
    cache = VerdictCache(tmp_path, {})
    cache.put(cache.key("p"), verdict_with(outcome, bytes(8 * MIB)))
    (file,) = files(tmp_path)
    assert file.stat().st_size < 1000
    found = cache.get(cache.key("p"))
    assert found is not None
    assert (found.outcome, found.execution.result, found.execution.stdout) == (outcome, None, "out")


@pytest.mark.parametrize("result", [CSV, b"", b"\0\xff"], ids=len)
def test_results_that_count_are_compressed_and_come_back(tmp_path, result):
    cache = VerdictCache(tmp_path, {})
    cache.put(cache.key("p"), verdict_with(Outcome.OK, result))
    (file,) = files(tmp_path)
    assert file.stat().st_size < 1000 + len(result) / 2
    found = cache.get(cache.key("p"))
    assert found is not None
    assert found.execution.result == result


def test_files_of_earlier_versions_are_read(tmp_path):
    cache = VerdictCache(tmp_path, {})
    key = cache.key("p")
    for result in (CSV, b""):
        row = verdict_row(verdict_with(Outcome.OK, result))
        del row["execution"]["packed"]
        row["execution"]["csv"] = base64.b64encode(result).decode()
        path = tmp_path / key[:2] / f"{key}.json"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(json.dumps({"sha256": _checksum(key, row), "verdict": row}).encode())
        path.chmod(0o600)
        found = cache.get(key)
        assert found is not None
        assert found.execution.result == result


@pytest.mark.parametrize(
    "packed",
    [b"no zlib", zlib.compress(CSV)[:-9], zlib.compress(CSV) + b"x", zlib.compress(bytes(3 * MIB))],
    ids=["other bytes", "cut", "more bytes", "too long"],
)
def test_damaged_results_are_refused(monkeypatch, packed):
    monkeypatch.setattr("discover_jax.execution.cache._LARGEST_FILE", 2 * MIB)
    row = verdict_row(verdict_with(Outcome.OK, CSV))
    row["execution"]["packed"] = base64.b64encode(packed).decode()
    with pytest.raises(ValueError, match="cannot be unpacked"):
        verdict_of(row, cached=True)


@pytest.mark.parametrize(
    ("folder", "file", "text"),
    [
        ("a-1.dist-info", "METADATA", "Metadata-Version: 2.1\nName: A.b_c\nVersion: 1.0+local\n\nName: other\nVersion: 2\n"),
        ("a-1.dist-info", "METADATA", "metadata-version: 2.1\nname: a\nSummary: two\n lines\nVERSION: 1\n"),
        ("a-1.dist-info", "METADATA", "Metadata-Version: 2.1\r\nName: a\r\nVersion: 1\r\n\r\nVersion: 2\r\n"),
        ("a-1.egg-info", "PKG-INFO", "Metadata-Version: 1.0\nName: a\nVersion: 1\nName: b\n"),
        ("a-1.egg-info", "", "Metadata-Version: 1.0\nName: a\nVersion: 1\n"),
    ],
)
def test_packages_have_the_names_and_versions_of_their_metadata(tmp_path, folder, file, text):
    path = tmp_path / folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    (package,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert packages([str(tmp_path)])[2:] == [f"{package.name}=={package.version}"]

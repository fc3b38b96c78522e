"""The journal: round trips, incomplete and damaged lines, truncation, a failing disk."""

import dataclasses
import os

import pytest

from discover_jax.archive import journal as journal_module
from discover_jax.archive.journal import Journal, JournalReader, from_json, to_json
from discover_jax.exceptions import RunError
from discover_jax.types import Attempt, Outcome, StopReason


def attempt(number: int, **changes) -> Attempt:
    base = Attempt(
        id=f"0-0-{number}",
        parent_id="seed",
        task="boats",
        step=0,
        group=0,
        index=number,
        code="def run():\n    return 'ä\u2028'\n",
        outcome=Outcome.OK,
        detail="",
        stdout="line\r\n\ud800",  # a lone surrogate, as in a program's invalid output
        score=0.1 + 0.2,
        private_score=None,
        reward=0.1,
        adapter_step=3,
        tokens=7,
        stop=StopReason.STOP_TOKEN,
    )
    return dataclasses.replace(base, **changes)


def test_rows_round_trip(tmp_path):
    rows = [attempt(0), attempt(1, code=None, outcome=Outcome.FORMAT_ERROR, score=None, stop=StopReason.MAX_TOKENS)]
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    assert journal.position == 0
    journal.append(rows[:1])
    journal.append(rows[1:])
    assert journal.read() == rows
    assert journal.position == (tmp_path / "journal.jsonl").stat().st_size
    assert [from_json(to_json(row)) for row in rows] == rows
    assert to_json(rows[0]).startswith('{"id": "0-0-0", "parent_id": "seed", "task": "boats", "step": 0,')


def test_batches_do_not_change_the_bytes(tmp_path):
    rows = [attempt(n) for n in range(4)]
    Journal(tmp_path / "a").append(rows)
    for row in rows:
        Journal(tmp_path / "b").append([row])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_incomplete_last_line_is_skipped(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    Journal(path).append([attempt(n) for n in range(3)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert Journal(path).read() == [attempt(0), attempt(1)]


@pytest.mark.parametrize("line", ['{"id": 1}', "nonsense", "", "[]"])
def test_damaged_middle_line_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join([to_json(attempt(0)), line, to_json(attempt(2))]) + "\n")
    with pytest.raises(RunError, match=r"(?i)\bline 2\b"):
        Journal(path).read()


def test_unknown_outcome_is_refused():
    with pytest.raises(RunError, match="no_such_end"):
        from_json(to_json(attempt(0)).replace('"ok"', '"no_such_end"'))


@pytest.mark.parametrize("name", ["reward", "score", "private_score"])
def test_numbers_must_be_finite(tmp_path, name):
    path = tmp_path / "journal.jsonl"
    with pytest.raises(RunError, match=rf"\b{name}\b"):
        Journal(path).append([attempt(0), attempt(1, **{name: float("nan")})])
    assert not path.exists()


def test_truncate_sets_rows_aside(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([attempt(0)])
    position = journal.position
    for last in (1, 2):
        journal.append([attempt(last)])
        journal.truncate(position)
        assert journal.read() == [attempt(0)]
    journal.truncate(position)  # nothing to truncate
    assert Journal(tmp_path / "journal.discarded.jsonl").read() == [attempt(1), attempt(2)]


def test_truncate_terminates_an_incomplete_row(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append([attempt(0)])
    position = journal.position
    with path.open("ab") as file:
        file.write(b'{"id": "0-0')
    journal.truncate(position)
    assert (tmp_path / "journal.discarded.jsonl").read_bytes() == b'{"id": "0-0\n'


def test_truncate_refuses_a_mismatched_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([attempt(0)])
    with pytest.raises(RunError, match="journal"):
        journal.truncate(journal.position + 1)
    with pytest.raises(RunError, match="journal"):
        journal.truncate(journal.position - 1)
    assert journal.read() == [attempt(0)]


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([attempt(0)])
    write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) < 200:
            raise OSError(28, "No space left on device")
        return write(descriptor, bytes(data[: len(data) // 2]))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", half_then_full)
        with pytest.raises(RunError, match="No space left on device"):
            journal.append([attempt(1)])
    assert journal.read() == [attempt(0)]
    journal.append([attempt(2)])
    assert journal.read() == [attempt(0), attempt(2)]


def test_full_device():
    with pytest.raises(RunError, match="No space left on device"):
        Journal("/dev/full").append([attempt(0)])  # type: ignore[arg-type]


def test_reader_parses_only_new_rows(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    parsed = []
    monkeypatch.setattr(journal_module, "from_json", lambda line: parsed.append(line) or from_json(line))
    reader = JournalReader(path)
    assert reader.read() == []
    Journal(path).append([attempt(0), attempt(1)])
    assert reader.read() == [attempt(0), attempt(1)]
    with path.open("ab") as file:
        file.write(to_json(attempt(2)).encode())
    assert reader.read() == [attempt(0), attempt(1)]  # the last line is incomplete
    with path.open("ab") as file:
        file.write(b"\n")
    assert reader.read() == [attempt(0), attempt(1), attempt(2)]
    assert len(parsed) == 3
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(RunError, match=r"(?i)\bline 4\b"):
        reader.read()

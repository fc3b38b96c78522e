"""The report's data match the run's files, which the tests read independently. Missing data are reported, damaged files refused."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import DISCLOSURE, PROBLEM, attempt, edited, searched, write_run, write_seed_program

from discover_jax.exceptions import RunError
from discover_jax.report.page import NAME, ReportWriter, page_data, write_report
from discover_jax.report.program_table import pack
from discover_jax.report.progress import progress_of, tree_of
from discover_jax.report.record import read_record
from discover_jax.row_results import encode
from discover_jax.runs.attempts import SEED_PROGRAMS
from discover_jax.types import Outcome


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unpacked(page: str, id: str):
    """A packed part of a page, unpacked with Python's standard library."""
    text = page.split(f'id="{id}">')[1].split("</script>")[0]
    return json.loads(gzip.decompress(base64.b64decode(text, validate=True)))


def restored(packed: dict) -> list[str | None]:
    """The programs of a page, by attempt, restored by a second implementation of the format."""
    built: list[list[str]] = []
    for base, *ops in packed["programs"]:
        lines, ops = [], iter(ops)
        for op in ops:
            first = -op - 1
            lines += [packed["lines"][op]] if op >= 0 else built[base][first : first + next(ops)]
        built.append(lines)
    return ["\n".join(built[program]) if program >= 0 else None for program, _, _ in packed["rows"]]


@pytest.fixture(scope="module")
def copy(run, tmp_path_factory) -> Path:
    return Path(shutil.copytree(run, tmp_path_factory.mktemp("report") / "run"))


def test_a_run_writes_its_report_and_the_command_writes_the_same(copy):
    written = (copy / NAME).read_bytes()
    done = subprocess.run([sys.executable, "-m", "discover_jax.report", f"--workdir={copy}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(copy / NAME) in done.stdout
    # The run wrote its last report after all other files, so the input is the same.
    assert (copy / NAME).read_bytes() == written


def test_scores_rewards_and_outcomes_match_journal_and_metrics(copy):
    journal, metrics = rows(copy / "journal.jsonl"), rows(copy / "metrics.jsonl")
    grade = json.loads((copy / "best" / "grade.json").read_text())
    data = unpacked((copy / NAME).read_text(), "data")
    (run,) = data["runs"]
    (progress,) = run["competitions"]
    assert (run["kind"], run["planned"], run["missing"]) == ("train", 4, [])
    assert progress["steps"] == run["metric_steps"] == [0, 1, 2, 3]
    assert progress["best"] == [row["best/score"] for row in metrics]
    assert progress["reward_mean"] == pytest.approx([row["reward/mean"] for row in metrics])
    for outcome in Outcome:
        assert progress["outcomes"][outcome.value] == [row[f"outcome/{outcome.value}"] for row in metrics]
    for step, (mean, top) in enumerate(zip(progress["mean"], progress["top"], strict=True)):
        scores = [row["score"] for row in journal if row["step"] == step and row["score"] is not None]
        assert mean == (pytest.approx(sum(scores) / len(scores)) if scores else None)
        assert top == max(scores, default=None)
    assert progress["best_interval"][-1] == pytest.approx(grade["interval_95"])  # the run computed it from the submission
    assert progress["grade"]["interval_95"] == grade["interval_95"]
    counted = [sum(counts) + failed for counts, failed in zip(progress["rewards"]["counts"], progress["rewards"]["failed"], strict=True)]
    assert counted == [row["rollouts/count"] for row in metrics]
    assert progress["disclosed"]["rows"] == grade["rows"] == 70
    assert [row["id"] for row in json.loads((copy / "best" / "lineage" / "lineage.json").read_text())] == progress["lineage"]
    entropy = next(panel for panel in run["panels"] if panel["title"] == "Entropy")
    assert entropy["series"][0]["values"] == [row["entropy"] for row in metrics]
    parts = {part["label"]: part["values"] for part in next(panel for panel in run["panels"] if panel["form"] == "stack")["series"]}
    assert parts["wait for checkpoint"] == [row["time/checkpoint_wait_s"] for row in metrics]
    assert parts["checkpoint"] == [row["time/checkpoint_s"] for row in metrics[1:]] + [None]  # a row has the time of the step before


def test_tree_and_programs_match_the_journal(copy):
    journal = rows(copy / "journal.jsonl")
    page = (copy / NAME).read_text()
    (tree,) = unpacked(page, "data")["trees"].values()
    assert tree["id"] == [row["id"] for row in journal]
    assert tree["score"] == [row["score"] for row in journal]
    parents = [tree["id"][parent] if parent >= 0 else "seed" for parent in tree["parent"]]
    assert parents == [row["parent_id"] for row in journal]
    assert restored(unpacked(page, "programs")) == [row["code"] for row in journal]


def test_programs_survive_packing():
    """Repeated and empty lines, no final newline, carriage returns, lone surrogates; parents that come later or are missing."""
    codes = ["a\nb\na\nb\n\n\n", "b\na\n\n\nb\na", "", "\n", "a\r\nb", "x = '\ud800'\n", "a\nb\na\nb\n\n\n", "b\n" * 50 + "a"]
    attempts = [attempt(0, 0, i, "seed" if i == 0 else f"0000-000-{(i * 5) % 8:03d}", code, i / 10) for i, code in enumerate(codes)]
    attempts.append(attempt(1, 0, 0, "0009-000-000", None, None, outcome=Outcome.FORMAT_ERROR))
    assert restored(json.loads(json.dumps(pack(attempts, 10**6).to_json()))) == [*codes, None]


def test_omitted_programs_are_counted_and_the_best_are_kept():
    attempts = searched(8, 4, 6, edited(40, 0.3, 0.3))
    packed = pack(attempts, 20_000)
    kept = restored(packed.to_json())
    with_code = [each for each in attempts if each.code is not None]
    assert 0 < packed.left_out < len(with_code)
    best = max((each for each in attempts if each.score is not None), key=lambda each: each.reward)
    assert kept[attempts.index(best)] == best.code
    shown = [(each, code) for each, code in zip(attempts, kept, strict=True) if code is not None]
    assert all(each.code == code for each, code in shown)
    assert len(shown) >= len(with_code) - packed.left_out


def test_one_bad_program_does_not_stretch_the_range_of_rewards(tmp_path):
    attempts = [attempt(0, 0, i, "seed", f"{i}", score) for i, score in enumerate([0.1] + [0.8 + i / 1000 for i in range(39)])]
    progress = progress_of(read_record(write_run(tmp_path / "run", attempts)), "spaceship-titanic")["rewards"]
    assert progress["edges"][0] >= 0.8
    assert progress["below"] >= 1
    assert sum(progress["counts"][0]) == 40  # the bad one is in the lowest bin


def test_a_metric_that_is_not_a_share_of_rows_has_no_bands_and_the_best_has_the_highest_reward(tmp_path):
    disclosure = json.loads(json.dumps(DISCLOSURE))
    disclosure["competitions"][0]["metric"] = {"name": "RMSE", "higher_is_better": False, "share_of_rows": False}
    attempts = [attempt(0, 0, 0, "seed", "a", 60.0, reward=-4.1), attempt(1, 0, 0, "0000-000-000", "b", 55.0, reward=-4.0)]
    progress = progress_of(read_record(write_run(tmp_path / "run", attempts, disclosure=disclosure)), "spaceship-titanic")
    assert (progress["best"], progress["best_interval"], progress["mean_interval"]) == ([60.0, 55.0], [None, None], [None, None])
    disclosure["competitions"][0]["metric"]["share_of_rows"] = True
    record = read_record(write_run(tmp_path / "false", attempts, disclosure=disclosure))
    with pytest.raises(RunError, match=r"\b60\.0"):
        progress_of(record, "spaceship-titanic")


def test_missing_data_is_reported(tmp_path):
    run = write_run(
        tmp_path / "run", [attempt(0, 0, 0, "seed", "a", 0.7), attempt(1, 0, 0, "9999-000-000", "b", 0.8)], kind="search", disclosure=None
    )
    (run / "metrics.jsonl").unlink()
    record = read_record(run)
    assert len(record.missing) == 2
    assert all(name in line for name, line in zip(["disclosure.json", "metrics.jsonl"], record.missing, strict=True))
    (run_data,) = page_data([record])["runs"]
    (progress,) = run_data["competitions"]
    assert (progress["disclosed"], progress["best_interval"], progress["grade"]) == (None, [None, None], None)
    assert all(panel["absent"] for panel in run_data["panels"])
    assert len({panel["absent"] for panel in run_data["panels"]}) > 1  # reasons: no metrics, or a search run
    tree = tree_of(record, "spaceship-titanic")
    assert (tree["parent"], tree["lost"]) == ([-1, -1], [False, True])


def test_gains_over_the_seed_program_count(tmp_path):
    """It is the parent of all programs of a first step. One of them has all rows right, and the seed program half of them."""
    results = {share: encode(np.arange(100) < 100 * share, share=True) for share in (0.4, 0.5, 1.0)}
    programs = [attempt(0, 0, index, "seed", f"{index}", score, rows=results[score]) for index, score in enumerate((0.4, 1.0, 0.5))]
    run = write_run(tmp_path / "run", programs)
    assert progress_of(read_record(run), "spaceship-titanic")["gains"] == (0, 0)  # without it, nothing is known of their parent
    write_seed_program(run, "spaceship-titanic", 0.5, rows=results[0.5])
    assert progress_of(read_record(run), "spaceship-titanic")["gains"] == (1, 1)


def test_a_damaged_file_of_seed_programs_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [attempt(0, 0, 0, "seed", "a", 2.5, task="circles")], disclosure=PROBLEM)
    assert progress_of(read_record(run), "circles")["seed"] is None
    write_seed_program(run, "circles", 2.25)
    assert progress_of(read_record(run), "circles")["seed"] == 2.25
    for text in ("{", "[1]", '[{"task": "circles"}]'):
        (run / SEED_PROGRAMS).write_text(text)
        with pytest.raises(RunError, match=SEED_PROGRAMS):
            read_record(run)


def test_a_run_without_steps_has_a_report(tmp_path):
    run = write_run(tmp_path / "run", [])
    assert len(read_record(run).missing) == 2
    assert unpacked(write_report(run).read_text(), "data")["runs"][0]["competitions"][0]["steps"] == []


def test_incomplete_last_rows_are_skipped_and_damaged_rows_refused(tmp_path):
    run = write_run(tmp_path / "run", searched(2, 2, 2, edited(5, 0.2)))
    journal, metrics = run / "journal.jsonl", run / "metrics.jsonl"
    before = write_report(run).read_bytes()
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"id": "0002-000-000", "pare')
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 2, "rew')
    assert write_report(run).read_bytes() == before
    lines = whole.split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], lines[1][:-20], *lines[2:]]))
    with pytest.raises(RunError, match=r"(?i)\bline 2\b"):
        write_report(run)
    done = subprocess.run([sys.executable, "-m", "discover_jax.report", f"--workdir={run}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"(?i)error: .*\bline 2\b", done.stderr)
    assert (run / NAME).read_bytes() == before  # the old page is kept


def test_a_report_of_a_growing_run_equals_a_fresh_one(tmp_path):
    run = write_run(tmp_path / "run", searched(3, 2, 2, edited(5, 0.2)))
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    writer = ReportWriter(run)
    torn, replaced = lines[0] + lines[1][:20], run / "other"
    for content in (b"", torn, b"".join(lines[:4]), b"".join(lines), b"".join(lines[:5]), b"".join([*lines[:4], *lines[6:]])):
        journal.write_bytes(content)
        assert writer.write().read_bytes() == write_report(run, out=tmp_path / "fresh.html").read_bytes()
    replaced.write_bytes(b"".join(lines[6:]))
    replaced.replace(journal)  # a new file: the writer must not reuse rows of the old one
    assert writer.write().read_bytes() == write_report(run, out=tmp_path / "fresh.html").read_bytes()
    replaced.unlink(missing_ok=True)
    journal.unlink()
    assert writer.write().read_bytes() == write_report(run, out=tmp_path / "fresh.html").read_bytes()


@pytest.mark.parametrize("text", ["{", "[1]", '{"id": "0000-000-000", "interval_95": ["<b>", 1]}'])
def test_an_invalid_grade_is_reported_as_missing(tmp_path, text):
    """A run, too, continues without it."""
    run = write_run(tmp_path / "run", searched(1, 1, 2, edited(5, 0.2)))
    (run / "best").mkdir()
    (run / "best" / "grade.json").write_text(text)
    record = read_record(run)
    assert record.grades == {}
    (line,) = record.missing
    assert "best/" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", r"config\.json"),
        ("config.json", '{"kind": "dream", "config": {}}', r"config\.json"),
        ("disclosure.json", "[]", r"disclosure\.json"),
        ("disclosure.json", '{"isolation": {"isolated": true, "lines": []}, "competitions": [{"id": 3}]}', r"disclosure\.json"),
        ("metrics.jsonl", '{"step": 0, "entropy": "<b>"}\n', r"entropy\b.*\b0\b.*'<b>'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, text, message):
    run = write_run(tmp_path / "run", searched(1, 1, 2, edited(5, 0.2)))
    (run / name).write_text(text)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"config\.json"):
        write_report(tmp_path)


def test_compared_runs_have_distinct_names(tmp_path):
    """Runs are named by their kind, or by their folders if kinds are equal."""
    attempts = searched(2, 2, 2, edited(5, 0.2))
    a, b = write_run(tmp_path / "a", attempts), write_run(tmp_path / "b", attempts, kind="search")
    c = write_run(tmp_path / "c", attempts)
    page = write_report(a, [b])
    assert page == a / "comparison.html"
    assert [run["label"] for run in unpacked(page.read_text(), "data")["runs"]] == ["training", "search"]
    page = write_report(a, [b, c], tmp_path / "all.html")
    assert [run["label"] for run in unpacked(page.read_text(), "data")["runs"]] == ["a", "b", "c"]

"""Prepared folders: written once, checked at every use, with separate answers and held-out rows hidden among the test rows."""

import dataclasses
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Grade


def text_table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_built_in_competition(tmp_path):
    task = prepare_task("digits-parity", raw="", reward="grade", folder=tmp_path / "task")
    assert [(file.name, file.rows, len(file.columns)) for file in task.files] == [
        ("train.csv", 600, 66),
        ("test.csv", 1197, 65),
        ("sample_submission.csv", 1197, 2),
    ]
    assert (task.id, task.metric.name, task.metric.higher_is_better, task.failure_reward) == ("digits-parity", "accuracy", True, 0.0)
    train, test = pd.read_csv(task.public_dir / "train.csv"), pd.read_csv(task.public_dir / "test.csv")
    assert train["id"].str.fullmatch(r"d\d{4}").all()
    assert set(train["even"]) == {True, False}
    assert "even" not in test.columns
    assert not set(train["id"]) & set(test["id"])
    # The pixels are the digits that scikit-learn bundles, and the answers their parity.
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    parity = {tuple(row.astype(int)): digit % 2 == 0 for row, digit in zip(pixels, digits, strict=True)}
    assert len(parity) == 1797
    answers = pd.read_csv(task.folder / "private" / "test.csv")
    for table in (train, answers):
        columns = [name for name in table.columns if name.startswith("pixel_")]
        assert [parity[tuple(row)] for row in table[columns].to_numpy()] == table["even"].tolist()


def test_headroom_of_the_built_in_competition(tmp_path):
    """Weak and strong programs have very different scores."""
    from sklearn.naive_bayes import GaussianNB
    from sklearn.svm import SVC

    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    train, test = pd.read_csv(task.public_dir / "train.csv"), pd.read_csv(task.public_dir / "test.csv")
    scores = []
    for model in (GaussianNB(), SVC(gamma=0.001, C=10)):
        model.fit(train.drop(columns=["id", "even"]), train["even"])
        predictions = pd.DataFrame({"id": test["id"], "even": model.predict(test.drop(columns="id"))})
        scores.append(task.grade(predictions.to_csv(index=False).encode()).score)
    assert scores[0] < 0.85
    assert scores[1] > 0.97


def test_private_files_are_closed_to_others_for_any_umask(tmp_path, write_competition):
    old = os.umask(0o077)
    try:
        task = prepare_task(
            write_competition("(public / 'more').mkdir(); (public / 'more' / 'map.txt').touch()"),
            raw=None,
            reward="holdout",
            folder=tmp_path / "t",
        )
    finally:
        os.umask(old)
    modes = {str(path.relative_to(task.folder)): stat.S_IMODE(path.stat().st_mode) for path in task.folder.rglob("*")}
    assert {mode for name, mode in modes.items() if name.startswith("public") and "." in name} == {0o644}
    assert (modes["public"], modes["public/more"], modes["private"]) == (0o755, 0o755, 0o700)
    assert {mode for name, mode in modes.items() if name.startswith("private/")} == {0o600}
    assert stat.S_IMODE(task.folder.stat().st_mode) == 0o755
    assert [(file.name, file.rows) for file in task.files][-1] == ("more/map.txt", None)


def test_prepared_folder_is_reused_without_raw_data(tmp_path, write_competition):
    path = write_competition("assert raw is not None and raw.exists()")
    raw = tmp_path / "raw"
    raw.touch()
    first = prepare_task(path, raw=str(raw), reward="holdout", folder=tmp_path / "task", holdout_fraction=0.3, seed=4)
    raw.unlink()
    times = {file: file.stat().st_mtime_ns for file in first.folder.rglob("*")}
    assert prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task", holdout_fraction=0.3, seed=4) == first
    assert {file: file.stat().st_mtime_ns for file in first.folder.rglob("*")} == times


def test_fingerprints(tmp_path, write_competition):
    path = write_competition()

    def fingerprint(name, path=path, reward="grade", **settings):
        return prepare_task(path, raw=None, reward=reward, folder=tmp_path / name, **settings).fingerprint

    assert fingerprint("a") == fingerprint("b") == fingerprint("c", seed=3, holdout_fraction=0.7)
    others = [
        fingerprint("d", reward="holdout"),
        fingerprint("e", reward="holdout", seed=1),
        fingerprint("f", reward="holdout", holdout_fraction=0.3),
        fingerprint("g", path=write_competition(fields="failure_reward=-1.0")),
    ]
    assert len({fingerprint("a2", path=write_competition()), *others}) == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_holdout_moves_rows_unchanged(tmp_path, write_competition, seed):
    path = write_competition()
    whole = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "whole")
    task = prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task", holdout_fraction=0.25, seed=seed)
    assert (task.held_out_rows, task.private_rows, task.score_rows) == (25, 40, 25)
    old = {name: text_table(whole.public_dir / name) for name in ("train.csv", "test.csv", "sample_submission.csv")}
    new = {name: text_table(task.public_dir / name) for name in old}
    assert [len(new[name]) for name in old] == [75, 65, 65]
    assert [(file.rows, file.columns) for file in task.files] == [(len(table), tuple(table.columns)) for table in new.values()]

    # Every cell keeps its text: rows are only moved between the tables.
    def rows(*tables):
        return sorted(tuple(row) for table in tables for row in table.drop(columns="sinks", errors="ignore").to_numpy())

    assert rows(new["train.csv"], new["test.csv"]) == rows(old["train.csv"], old["test.csv"])
    kept = old["train.csv"][old["train.csv"]["key"].isin(new["train.csv"]["key"])]
    assert new["train.csv"].equals(kept.reset_index(drop=True))
    held = set(old["train.csv"]["key"]) - set(new["train.csv"]["key"])
    assert set(new["test.csv"]["key"]) == set(old["test.csv"]["key"]) | held
    assert new["sample_submission.csv"]["key"].tolist() == new["test.csv"]["key"].tolist()
    assert set(new["sample_submission.csv"]["sinks"]) == {"False"}
    # Held-out rows are shuffled among the test rows: neither first nor last.
    places = [place for place, key in enumerate(new["test.csv"]["key"]) if key in held]
    assert places[0] < 20
    assert places[-1] > 45
    assert places != list(range(places[0], places[0] + 25))
    # Programs cannot read their labels anywhere.
    assert not any(key in (task.public_dir / "train.csv").read_text() for key in held)


def scores(grade: Grade) -> tuple[float | None, float | None]:
    assert grade.valid
    return grade.score, grade.private_score


def test_holdout_grades_both_parts_separately(tmp_path, write_competition):
    path = write_competition()
    whole = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "whole")
    task = prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task", holdout_fraction=0.25)
    truth = pd.concat([pd.read_csv(whole.public_dir / "train.csv"), pd.read_csv(whole.folder / "private" / "test.csv")]).set_index("key")[
        "sinks"
    ]
    private = set(pd.read_csv(whole.public_dir / "test.csv")["key"])
    table = pd.read_csv(task.public_dir / "sample_submission.csv")
    table["sinks"] = truth[table["key"]].to_numpy()
    assert scores(task.grade(table.to_csv(index=False).encode())) == (1.0, 1.0)
    held = table.index[~table["key"].isin(private)]
    table.loc[held[:5], "sinks"] = ~table.loc[held[:5], "sinks"]
    assert scores(task.grade(table.to_csv(index=False).encode())) == (0.8, 1.0)
    table.loc[table.index[table["key"].isin(private)][:4], "sinks"] ^= True
    assert scores(task.grade(table.to_csv(index=False).encode())) == (0.8, 0.9)
    # A submission must have the private rows and the held-out rows.
    for rows in (table[table["key"].isin(private)], table.loc[held]):
        assert "it must have 65" in task.grade(rows.to_csv(index=False).encode()).reason


def test_disclosure(tmp_path, write_competition):
    path = write_competition()
    grade = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "a").disclosure
    assert (grade.reward, grade.rows, grade.private_rows) == ("grade", 40, 40)
    assert "optimised on the graded rows" in grade.text
    holdout = prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "b").disclosure
    assert (holdout.reward, holdout.rows, holdout.private_rows) == ("holdout", 20, 40)
    assert "held out of the public training table" in holdout.text
    assert "is only recorded" in holdout.text


def test_task_works_in_another_process(tmp_path, write_competition):
    task = prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "task")
    assert len(pickle.dumps(task)) < 4096
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(task))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "task = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(task.id, task.grade((task.public_dir / 'sample_submission.csv').read_bytes()).score, 'jax' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code, str(tmp_path / "task.pickle")], capture_output=True, text=True, check=True).stdout
    expected = task.grade((task.public_dir / "sample_submission.csv").read_bytes()).score
    assert output.split() == ["boats", str(expected), "False"]


def test_lower_is_better_by_negation(tmp_path, write_competition):
    # The answers are booleans: the sample's error is the square root of the fraction of True, here 18 of 40 rows.
    fields = "metric=metrics.RMSE, transform='negate', failure_reward=-10.0"
    task = prepare_task(write_competition(fields=fields), raw=None, reward="grade", folder=tmp_path / "task")
    sample = pd.read_csv(task.public_dir / "sample_submission.csv").astype({"sinks": float})
    score = task.grade(sample.to_csv(index=False).encode()).score
    assert score == round((pd.read_csv(task.folder / "private" / "test.csv")["sinks"].mean()) ** 0.5, 5)
    assert task.reward(score) == -score
    low, high = task.score_interval(score, sample.to_csv(index=False).encode()).bounds
    assert low < score < high
    assert "submission is missing" in task.score_interval(score, None).text


def test_remains_of_a_killed_preparation_are_not_used(tmp_path, write_competition):
    left = tmp_path / "task.preparing"
    (left / "private").mkdir(parents=True)
    (left / "private" / "stale.csv").touch()
    task = prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "task")
    assert sorted(path.name for path in (task.folder / "private").iterdir()) == ["test.csv"]
    assert not left.exists()


def test_failed_preparation_leaves_nothing(tmp_path, write_competition):
    (tmp_path / "task").mkdir()  # an empty folder is accepted
    with pytest.raises(DataError, match="No space left"):
        prepare_task(
            write_competition("import errno; raise OSError(errno.ENOSPC, 'No space left on device')"),
            raw=None,
            reward="grade",
            folder=tmp_path / "task",
        )
    assert list((tmp_path / "task").iterdir()) == []
    assert not (tmp_path / "task.preparing").exists()
    assert prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "task").private_rows == 40


def test_exception_in_prepare_is_reported(tmp_path, write_competition):
    with pytest.raises(DataError, match=r"boats\b.*KeyError: 'age'"):
        prepare_task(write_competition("train['age']"), raw=None, reward="grade", folder=tmp_path / "task")
    with pytest.raises(DataError, match=r"absent\.csv\b.*FileNotFoundError"):
        prepare_task(write_competition("raw.read_bytes()"), raw="absent.csv", reward="grade", folder=tmp_path / "task")
    assert not (tmp_path / "task").exists()


def alter(folder, what):
    if what == "answers":
        path = folder / "private" / "test.csv"
        path.write_text(path.read_text().replace("True", "False", 1))
    elif what == "added":
        (folder / "public" / "hint.csv").write_text("key,sinks\n")
    elif what == "removed":
        (folder / "public" / "train.csv").unlink()
    elif what == "record":
        (folder / "prepared.json").write_text("{}")
    elif what == "broken record":
        (folder / "prepared.json").write_text('{"settings"')
    elif what == "no record":
        (folder / "prepared.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("answers", r"\bprivate/test\.csv\b"),
        ("added", r"\bpublic/hint\.csv\b"),
        ("removed", r"\bpublic/train\.csv\b"),
        ("record", r"prepared\.json"),
        ("broken record", r"prepared\.json"),
        ("no record", "task"),
    ],
)
def test_altered_folder_is_refused(tmp_path, write_competition, what, message):
    path = write_competition()
    prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    alter(tmp_path / "task", what)
    with pytest.raises(DataError, match=message):
        prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")


def test_different_setting_is_refused_and_named(tmp_path, write_competition):
    path = write_competition()
    prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task", seed=1)
    with pytest.raises(DataError, match=r"\bseed\b.*\b1\b.*\b2\b"):
        prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task", seed=2)
    with pytest.raises(DataError, match=r"\breward\b.*'holdout'.*'grade'"):
        prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")


def test_answers_altered_during_a_run(tmp_path, write_competition):
    task = prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "task")
    moved = dataclasses.replace(task, folder=tmp_path / "moved")  # it has not loaded the answers yet
    shutil.copytree(task.folder, moved.folder)
    alter(moved.folder, "answers")
    with pytest.raises(DataError, match=r"private/test\.csv"):
        moved.grade(b"")
    (moved.folder / "private" / "test.csv").unlink()
    with pytest.raises(DataError, match=r"private/test\.csv"):
        moved.grade(b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("(public / 'test.csv').unlink()", r"public/test\.csv"),
        ("(private / 'test.csv').unlink()", r"private/test\.csv"),
        ("test.to_csv(public / 'test.csv', index=False)", r"'sinks'.*public/test\.csv"),
        ("train.drop(columns='sinks').to_csv(public / 'train.csv', index=False)", r"public/train\.csv.*\bsinks\b"),
        ("test[:-1].to_csv(private / 'test.csv', index=False)", "ids"),
        ("pd.concat([test, test]).to_csv(private / 'test.csv', index=False)", "repeat"),
        ("test.assign(sinks=None).to_csv(private / 'test.csv', index=False)", "missing"),
        ("test[:0].to_csv(private / 'test.csv', index=False)", r"\brows?\b"),
        (
            "test[['key']].assign(sinks='maybe').to_csv(public / 'sample_submission.csv', index=False)",
            r"sample_submission\.csv\b.*accuracy",
        ),
    ],
)
def test_inconsistent_competition_is_refused(tmp_path, write_competition, change, message):
    with pytest.raises(ConfigError, match=f"boats.*{message}"):
        prepare_task(write_competition(change), raw=None, reward="grade", folder=tmp_path / "task")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pd.concat([train, train]).to_csv(public / 'train.csv', index=False)", r"\bids\b.*\brepeat"),
        ("pd.concat([train, test]).to_csv(public / 'train.csv', index=False)", r"\bids\b.*\brepeat"),
        ("train.drop(columns='note').to_csv(public / 'train.csv', index=False)", r"\bnote\b"),
        ("train[:1].to_csv(public / 'train.csv', index=False)", "rows"),
        ("train.assign(sinks=None).to_csv(public / 'train.csv', index=False)", "target"),
    ],
)
def test_competition_without_possible_holdout_is_refused(tmp_path, write_competition, change, message):
    with pytest.raises(ConfigError, match=f"holdout.*{message}"):
        prepare_task(write_competition(change), raw=None, reward="holdout", folder=tmp_path / "task")


def test_failure_must_score_below_the_sample(tmp_path, write_competition):
    with pytest.raises(ConfigError, match=r"failure_reward = 0\.6\b.*\b0\.\d+"):
        prepare_task(write_competition(fields="failure_reward=0.6"), raw=None, reward="grade", folder=tmp_path / "task")


def test_md5_mismatch_is_refused(tmp_path, write_competition):
    with pytest.raises(DataError, match=r"public/test\.csv\b.*\b(?!0{32})\w{32}\b.*\b0{32}\b"):
        prepare_task(
            write_competition(fields=f"prepared_md5={{'public/test.csv': '{'0' * 32}'}}"), raw=None, reward="grade", folder=tmp_path / "t"
        )


@pytest.mark.parametrize(
    ("reward", "fraction", "message"),
    [("private", 0.2, "grade, holdout"), ("holdout", 0.0, "holdout_fraction"), ("holdout", 1.0, "holdout_fraction")],
)
def test_invalid_settings_are_refused(tmp_path, reward, fraction, message):
    with pytest.raises(ConfigError, match=message):
        prepare_task("digits-parity", raw=None, reward=reward, folder=tmp_path / "task", holdout_fraction=fraction)


def test_example_in_the_docs(tmp_path):
    """The file linked in docs/competitions.md can be prepared, solved and graded with both rewards."""
    docs = Path(__file__).parents[2] / "docs"
    example = docs / "examples" / "my_competition.py"
    assert "(examples/my_competition.py)" in (docs / "competitions.md").read_text()
    for reward in ("grade", "holdout"):
        task = prepare_task(str(example), raw="", reward=reward, folder=tmp_path / reward)
        train, test = pd.read_csv(task.public_dir / "train.csv"), pd.read_csv(task.public_dir / "test.csv")
        threshold = train.groupby("malignant")["worst_area"].mean().mean()
        submission = pd.DataFrame({"id": test["id"], "malignant": test["worst_area"] > threshold})
        grade = task.grade(submission.to_csv(index=False).encode())
        assert grade.score is not None
        assert 0.8 < grade.score < 1.0
        assert task.reward(grade.score) == grade.score
        assert json.loads((task.folder / "prepared.json").read_text())["settings"]["competition"] == "tumours"

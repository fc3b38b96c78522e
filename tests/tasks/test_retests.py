"""Retests: which rows they hold out, what programs see, and the scores of submissions by hand."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.retests import prepare_retests

SETTINGS = {
    "grade": {"reward": "grade"},
    "holdout": {"reward": "holdout", "holdout_fraction": 0.25},
    "selection": {"reward": "holdout", "holdout_fraction": 0.25, "selection_fraction": 0.25},
}
COUNT = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The competition without held-out rows."""
    return prepare_task("digits-parity", raw=None, folder=tmp_path_factory.mktemp("whole") / "task", reward="grade")


@pytest.fixture(scope="module", params=SETTINGS)
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    task = prepare_task("digits-parity", raw=None, folder=folder / "task", **SETTINGS[request.param])
    return task, prepare_retests(task, COUNT, folder=folder / "retests", seed=1)


def _ids(path: Path) -> list[str]:
    return pd.read_csv(path, dtype=str)["id"].tolist()


def test_rows(prepared, whole):
    """The retests hold out each row that gave no reward once, show all others with labels, and keep the private rows private."""
    task, retests = prepared
    labels = pd.read_csv(whole.public_dir / "train.csv", dtype=str).set_index("id")["even"]
    private = _ids(whole.folder / "private" / "test.csv")
    rewarded = {id for name, _ in task.splits[-1].answers[1:] for id in _ids(task.folder / "private" / name)}
    held = []
    for retest in retests:
        shown = pd.read_csv(retest.public_dir / "train.csv", dtype=str)
        mine = _ids(retest.folder / "private" / retest.splits[0].answers[1][0])
        held += mine
        assert retest.score_rows == len(mine)
        assert sorted([*shown["id"], *mine]) == sorted(labels.index)
        assert (labels[shown["id"]].to_numpy() == shown["even"].to_numpy()).all()
        for name in ("test.csv", "sample_submission.csv"):
            assert sorted(_ids(retest.public_dir / name)) == sorted([*mine, *private])
        assert "even" not in pd.read_csv(retest.public_dir / "test.csv").columns
    assert sorted(held) == sorted(set(labels.index) - rewarded)


def test_scores(prepared, whole):
    _, (first, second, _) = prepared
    truth = pd.concat([pd.read_csv(whole.folder / part) for part in ("public/train.csv", "private/test.csv")]).set_index("id")["even"]
    mine = _ids(first.folder / "private" / first.splits[0].answers[1][0])
    table = pd.read_csv(first.public_dir / "sample_submission.csv")
    table["even"] = [bool(truth[id]) ^ (id in mine[:7]) for id in table["id"]]
    grade = first.grade(table.to_csv(index=False).encode())
    assert grade.score == pytest.approx(1 - 7 / len(mine), abs=1e-5)
    assert grade.private_score == 1.0
    assert grade.rows
    assert not second.grade(table.to_csv(index=False).encode()).valid  # it has other rows
    assert first.grade(first.answers_as_submission()).score == 1.0


def test_verdicts_are_not_shared(prepared):
    task, retests = prepared
    assert len({each.fingerprint for each in (task, *retests)}) == COUNT + 1


def test_the_folder_is_checked_when_it_is_used_again(prepared):
    task, retests = prepared
    folder = task.folder.with_name("retests")
    assert prepare_retests(task, COUNT, folder=folder, seed=1) == retests
    for change in ({"seed": 2}, {"count": 2}):
        given = {"count": COUNT, "seed": 1, **change}
        with pytest.raises(DataError, match="other settings"):
            prepare_retests(task, folder=folder, **given)


def test_too_few_rows_are_refused_with_numbers(tmp_path):
    task = prepare_task("digits-parity", raw=None, folder=tmp_path / "task", reward="grade")
    with pytest.raises(ConfigError, match=r"config\.finalists\.retests = 64: 600 training rows .*\b9\b.*\b30\b"):
        prepare_retests(task, 64, folder=tmp_path / "retests", seed=0)
    assert not (tmp_path / "retests").exists()


def test_no_row_is_left_by_cross_validation(tmp_path):
    task = prepare_task("digits-parity", raw=None, folder=tmp_path / "task", reward="holdout", holdout_folds=2)
    with pytest.raises(ConfigError, match=r"config\.task\.holdout_folds"):
        prepare_retests(task, 2, folder=tmp_path / "retests", seed=0)


def test_only_noisy_problems_are_evaluated_again(tmp_path):
    exact = prepare_task("circle-packing-26", raw=None, folder=tmp_path / "exact", reward="grade")
    assert prepare_retests(exact, 2, folder=tmp_path / "retests", seed=0) == ()
    timed = prepare_task("counting-inversions", raw=None, folder=tmp_path / "timed", reward="grade")
    retests = prepare_retests(timed, 2, folder=tmp_path / "retests", seed=0)
    assert len({timed.fingerprint, *(each.fingerprint for each in retests)}) == 3
    assert all(dataclasses.replace(each, fingerprint=timed.fingerprint) == timed for each in retests)


def test_tables_that_cannot_be_split_again_are_refused(tmp_path):
    """With the reward `grade`, nothing else checks that training rows can become rows to predict."""
    source = Path(__file__).parents[2] / "discover_jax" / "tasks" / "competitions" / "digits_parity.py"
    text = source.read_text().replace('"""digits-parity', '"""broken', 1)
    broken = (
        text
        + """

def _broken(raw, public, private):
    COMPETITION_PREPARE(raw, public, private)
    train = pd.read_csv(public / "train.csv")
    pd.concat([train, train.iloc[:1]]).to_csv(public / "train.csv", index=False)


COMPETITION_PREPARE = COMPETITION.prepare
COMPETITION = dataclasses.replace(COMPETITION, id="broken", prepare=_broken, prepared_md5={})
"""
    )
    (tmp_path / "broken.py").write_text("import dataclasses\nimport pandas as pd\n" + broken)
    task = prepare_task(str(tmp_path / "broken.py"), raw=None, folder=tmp_path / "task", reward="grade")
    with pytest.raises(ConfigError, match=r"config\.finalists: ids repeat.*config\.finalists\.count = 0"):
        prepare_retests(task, 2, folder=tmp_path / "retests", seed=0)

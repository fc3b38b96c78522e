"""Rows of each class are held out in proportion."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import DataError
from discover_jax.tasks.holdout import deal, draw, strata
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.retests import prepare_retests

CLASSES = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(np.array)


@given(class_R=CLASSES, parts=st.integers(1, 7), seed=st.integers(0, 99))
def test_dealt_parts_have_their_share_of_each_class(class_R, parts, seed):
    part_R = deal(class_R, len(class_R), parts, np.random.RandomState(seed))
    for group in (np.ones(len(class_R), bool), *(class_R == number for number in set(class_R.tolist()))):
        sizes = np.bincount(part_R[group], minlength=parts)
        assert sizes.sum() == group.sum()
        assert sizes.max() - sizes.min() <= 1


@given(class_R=CLASSES, data=st.data(), seed=st.integers(0, 99))
def test_drawn_rows_have_their_share_of_each_class(class_R, data, seed):
    rows = len(class_R)
    open_N = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
    count = data.draw(st.integers(0, len(open_N)))
    drawn = draw(class_R, open_N, count, np.random.RandomState(seed))
    assert len(set(drawn.tolist())) == len(drawn) == count
    assert set(drawn.tolist()) <= set(open_N.tolist())
    for number, members in Counter(class_R[open_N].tolist()).items():
        share = members * count / len(open_N)
        assert math.floor(share) - 1 < (class_R[drawn] == number).sum() < math.ceil(share) + 1


def test_every_row_can_be_drawn():
    """Over many seeds, each row is drawn with the same frequency."""
    class_R = np.array([0] * 30 + [1] * 7 + [2] * 3)
    hits = sum(np.isin(np.arange(40), draw(class_R, np.arange(40), 10, np.random.RandomState(seed))) for seed in range(2000))
    assert np.abs(hits / 2000 - 0.25).max() < 0.05
    parts = np.array([deal(class_R, 40, 4, np.random.RandomState(seed)) for seed in range(2000)])
    assert np.abs((parts == 0).mean(axis=0) - 0.25).max() < 0.05


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"y": ["a", "b", "b"] * 20}, 2),
        ({"y": ["True", "False"] * 30}, 2),
        ({"y": ["0", "1", "2"] * 20}, 3),
        ({"y": ["0.0", "1.0", "1.0"] * 20}, 2),
        ({"y": ["NA", "None", "x"] * 20}, 3),
        ({"y": ["a", "b", "b"] * 20, "z": ["0", "1"] * 30}, 4),
        ({"y": ["0.5", "1.5"] * 30}, None),
        ({"y": ["1", "2.5"] * 30}, None),
        ({"y": [str(n) for n in range(60)]}, None),
        ({"y": [f"name {n}" for n in range(60)]}, None),
        ({"y": ["0", "1"] * 30, "z": ["0.25", "3"] * 30}, None),
    ],
)
def test_labels_that_are_classes(columns, classes):
    class_R = strata(pd.DataFrame(columns), list(columns))
    assert (None if class_R is None else len(set(class_R.tolist()))) == classes


RARE = """
    train['sinks'] = ['rare' if n % 20 == 0 else 'often' if n % 2 else 'common' for n in range(len(train))]
    test['sinks'] = ['often' for n in range(len(test))]
    train.to_csv(public / 'train.csv', index=False)
    test[['key']].assign(sinks='often').to_csv(public / 'sample_submission.csv', index=False)
    test.to_csv(private / 'test.csv', index=False)
"""
SETTINGS = {
    "a part": {"holdout_fraction": 0.2},
    "a part and one for selection": {"holdout_fraction": 0.2, "selection_fraction": 0.4},
    "folds": {"holdout_folds": 5},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SETTINGS)
def test_held_out_rows_have_their_share_of_each_class(tmp_path, write_competition, kind, seed):
    """5 of the 100 training rows are rare, 50 often and 45 common."""
    task = prepare_task(write_competition(RARE), raw=None, reward="holdout", folder=tmp_path / "task", seed=seed, **SETTINGS[kind])
    names = {name for split in task.splits for name, _ in split.answers[1:]}
    for name in names:
        labels = Counter(pd.read_csv(task.folder / "private" / name)["sinks"])
        fraction = 0.4 if name == "selection.csv" else 0.2
        assert abs(labels["rare"] - 5 * fraction) <= 1
        assert abs(labels["often"] - 50 * fraction) <= 1
        assert labels.total() == 100 * fraction
    assert ("stratified", True) in task.settings


def test_retests_are_stratified(tmp_path, write_competition):
    task = prepare_task(write_competition(RARE), raw=None, reward="grade", folder=tmp_path / "task")
    tables = [
        pd.read_csv(retest.folder / "private" / retest.splits[0].answers[1][0])
        for retest in prepare_retests(task, 2, folder=tmp_path / "retests", seed=0)
    ]
    assert sorted((table["sinks"] == "rare").sum() for table in tables) == [2, 3]


def test_folders_and_fingerprints_of_earlier_versions(tmp_path, write_competition):
    """Without `stratified`, the rows are those of earlier versions: pinned here by their ids."""
    settings = {"raw": None, "reward": "holdout", "holdout_fraction": 0.06, "seed": 3}
    path = write_competition(RARE)
    task = prepare_task(path, folder=tmp_path / "task", stratified=False, **settings)
    order = np.random.RandomState(3).permutation(100)
    held = pd.read_csv(task.folder / "private" / "holdout.csv")["key"]
    assert sorted(held) == sorted(f"{n:04d}_01" for n in order[:6])
    assert "stratified" not in dict(task.settings)
    kept = prepare_task(path, folder=tmp_path / "task", **settings)  # as a resumed run does, whose config has the default
    assert (kept.fingerprint, kept.settings) == (task.fingerprint, task.settings)
    new = prepare_task(path, folder=tmp_path / "new", **settings)
    assert new.fingerprint != task.fingerprint
    with pytest.raises(DataError, match="stratified: True there, 'absent' now"):
        prepare_task(path, folder=tmp_path / "new", stratified=False, **settings)


def test_regression_is_split_as_before(tmp_path, write_competition):
    change = RARE.replace("'rare'", "0.5").replace("'often'", "1.25").replace("'common'", "n / 8")
    fields = "metric=metrics.RMSE, transform='negate', failure_reward=-99.0"
    tables = []
    for stratified in (False, True):
        task = prepare_task(
            write_competition(change, fields), raw=None, reward="holdout", folder=tmp_path / str(stratified), stratified=stratified
        )
        tables.append((task.folder / "private" / "holdout.csv").read_bytes())
    assert tables[0] == tables[1]

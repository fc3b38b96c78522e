"""Spaceship Titanic: recognised by checksum, prepared and graded like MLE-bench. Wrong files are refused with advice."""

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from discover_jax.exceptions import DataError
from discover_jax.tasks.prepare import prepare_task

RAW_SHA256 = "17336d553f49ebdf6ecb266d2b5d3746e5dd308445f7c7864141c4f28d2a88d0"
MD5 = {
    "public/train.csv": "564a1614ecef9d9611cec4efdce4c412",
    "public/test.csv": "8186bd4048aece25f1ed45708f8f34e1",
    "public/sample_submission.csv": "5414b5da6ebcff454de1c9ed39b73774",
    "private/test.csv": "1cb99c65efecaba968128577722a83ef",
}


def prepare(raw, tmp_path, reward="grade"):
    return prepare_task("spaceship-titanic", raw=raw, reward=reward, folder=tmp_path / "task")


@pytest.fixture(scope="module")
def task(spaceship_raw, tmp_path_factory):
    return prepare(spaceship_raw, tmp_path_factory.mktemp("spaceship"))


def test_prepared_files_match_mle_bench(task):
    assert {name: hashlib.md5((task.folder / name).read_bytes()).hexdigest() for name in MD5} == MD5
    assert [file.rows for file in task.files] == [7823, 870, 870]
    assert (task.private_rows, len(task.thresholds)) == (870, 3)


def test_facts_of_the_competition(task):
    answers = pd.read_csv(task.folder / "private" / "test.csv")
    assert answers["Transported"].sum() == 432
    groups = pd.read_csv(task.public_dir / "train.csv")["PassengerId"].str[:4]
    assert answers["PassengerId"].str[:4].isin(groups).sum() == 355


def test_scores_of_known_submissions(task):
    assert task.grade((task.public_dir / "sample_submission.csv").read_bytes()).score == 0.50345
    answers = pd.read_csv(task.folder / "private" / "test.csv")[["PassengerId", "Transported"]]
    assert task.grade(answers.sample(frac=1, random_state=3).to_csv(index=False).encode()).score == 1.0
    wrong = answers.assign(Transported=answers["Transported"] ^ (np.arange(870) < 87))
    for values in (wrong["Transported"], wrong["Transported"].astype(int), wrong["Transported"].astype(str).str.upper()):
        assert task.grade(wrong.assign(Transported=values).to_csv(index=False).encode()).score == 0.9
    low, high = task.score_interval(0.81, None).bounds
    assert low < 0.785 < 0.834 < high


def test_baseline_has_its_known_score(task):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = pd.read_csv(task.public_dir / "train.csv"), pd.read_csv(task.public_dir / "test.csv")
    spending = ["RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]

    def features(table):
        categories = pd.get_dummies(table[["HomePlanet", "CryoSleep", "Destination"]].astype(str))
        return pd.concat([categories, table[["Age", *spending]].fillna(0)], axis=1)

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features(train), train["Transported"])
    submission = test[["PassengerId"]].assign(Transported=model.predict(features(test)))
    assert 0.75 < task.grade(submission.to_csv(index=False).encode()).score < 0.81


@pytest.mark.parametrize("form", ["zip", "zip in a folder", "folder"])
def test_other_forms_of_the_same_data(spaceship_raw, task, tmp_path, form):
    if form == "folder":
        raw = Path(spaceship_raw).parent
    else:
        raw = tmp_path / "spaceship-titanic.zip"
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(spaceship_raw, "train.csv" if form == "zip" else "spaceship-titanic/train.csv")
            archive.writestr("test.csv", "PassengerId\n")
    assert prepare(raw, tmp_path).fingerprint == task.fingerprint


def test_holdout_of_the_real_table(spaceship_raw, tmp_path):
    task = prepare(spaceship_raw, tmp_path, reward="holdout")
    assert [file.rows for file in task.files] == [6258, 2435, 2435]
    assert (task.held_out_rows, task.private_rows) == (1565, 870)
    assert task.grade((task.public_dir / "sample_submission.csv").read_bytes()).private_score == 0.50345


def check_refusal(raw, tmp_path, message):
    with pytest.raises(DataError, match=message) as raised:
        prepare(raw, tmp_path)
    for part in ("8,693 rows", RAW_SHA256, "kaggle.com/competitions/spaceship-titanic/data", "config.task.raw"):
        assert part in str(raised.value)
    assert not (tmp_path / "task").exists()


def test_missing_data(tmp_path):
    check_refusal("", tmp_path, r"config\.task\.raw\b")
    check_refusal(str(tmp_path / "absent.csv"), tmp_path, r"absent\.csv")
    check_refusal(str(tmp_path), tmp_path, re.escape(str(tmp_path)))


def test_wrong_data(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("PassengerId,HomePlanet\n0013_01,Earth\n")
    check_refusal(other, tmp_path, r"\b37 bytes\b.*\b2 lines\b.*'PassengerId,HomePlanet'.*\b\w{64}\b")
    other.write_bytes(b"PK\x03\x04 half a zip")
    check_refusal(other, tmp_path, r"other\.csv")


def test_zips_without_the_table_and_broken_zips(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("test.csv", "PassengerId\n")
    check_refusal(path, tmp_path, r"train\.csv\b.*\b0\b.*\btest\.csv")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.csv", "PassengerId\n" * 1000)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    check_refusal(path, tmp_path, "Bad CRC-32")


def test_altered_copy(spaceship_raw, tmp_path):
    copy = tmp_path / "train.csv"
    copy.write_bytes(Path(spaceship_raw).read_bytes().replace(b"\n", b"\r\n"))
    check_refusal(copy, tmp_path, r"\b8,694 lines\b")

"""Ids and labels that pandas reads as something other than their text: ids that become equal, and labels typed anew for each table."""

import io
import json
import logging

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError
from discover_jax.tasks import answer_types
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.retests import prepare_retests

MERGED = {
    "decimals": ["1.1", "1.10"],
    "leading zeros": ["7", "007"],
    "signs": ["5", "+5"],
    "zeros": ["0", "-0"],
    "spaces": ["3", " 3"],
    "exponents": ["100", "1e2"],
    "a float among integers": ["1", "1.0"],
    "beyond float64": ["9007199254740993", "9007199254740992.0"],
    "more digits than a float has": ["0.1", "0.10000000000000000001"],
    "infinities": ["inf", "Infinity"],
    "truth values": ["true", "True"],
    "missing values": ["NA", "null"],
}
KEPT = {
    "numbers": ["1", "2", "10"],
    "text": ["1.1", "1.10", "a"],
    "large integers": ["9007199254740993", "9007199254740992"],
    "larger ones": ["99999999999999999999", "99999999999999999998"],
    "one missing value among text": ["NA", "DE", "FR"],
    "case": ["a", "A"],
    "empty spaces": ["a", "a "],
}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_ids_are_found(kind):
    a, b = MERGED[kind]
    assert set(answer_types.merged_ids([a, b]) or ()) == {a, b}


@pytest.mark.parametrize("kind", KEPT)
def test_different_ids_are_not_called_merged(kind):
    assert answer_types.merged_ids(KEPT[kind]) is None


@given(ids=st.lists(st.text("01.+-eaN ", min_size=1, max_size=4), min_size=2, max_size=6, unique=True))
def test_ids_without_a_finding_stay_different_in_pandas(ids):
    data = pd.DataFrame({"id": ids, "y": 0}).to_csv(index=False)
    read = pd.read_csv(io.StringIO(data))["id"]
    assert (answer_types.merged_ids(ids) is None) == (read.nunique(dropna=False) == len(ids))


def with_ids(texts: str) -> str:
    """A line for prepare() that gives the private rows these ids, and the training rows others."""
    return f"""
    test['key'] = (lambda texts: [texts(n) for n in range(len(test))])({texts})
    train['key'] = [f'{{1000 + n}}' for n in range(len(train))]
    train.to_csv(public / 'train.csv', index=False)
    test.drop(columns='sinks').to_csv(public / 'test.csv', index=False)
    test[['key']].assign(sinks=False).to_csv(public / 'sample_submission.csv', index=False)
    test.to_csv(private / 'test.csv', index=False)
"""


@pytest.mark.parametrize("reward", ["grade", "holdout"])
@pytest.mark.parametrize("texts", ["lambda n: f'{n // 2}.1' + '0' * (n % 2)", "lambda n: f'{n:03d}' if n % 2 else str(n + 1)"])
def test_competition_whose_ids_merge_is_refused(tmp_path, write_competition, texts, reward):
    with pytest.raises(ConfigError, match=r"pandas reads the ids '\d+(\.1)?' and '\d+(\.10)?'.*same value|'key'"):
        prepare_task(write_competition(with_ids(texts)), raw=None, reward=reward, folder=tmp_path / "task")


def test_ids_that_merge_only_where_rows_are_held_out(tmp_path, write_competition):
    """The private ids alone are fine; with training rows among them, two are equal."""
    change = with_ids("lambda n: f'{1000 + n}.0' if n < 3 else str(5000 + n)")
    prepare_task(write_competition(change), raw=None, reward="grade", folder=tmp_path / "grade")
    with pytest.raises(ConfigError, match="same value"):
        prepare_task(write_competition(change), raw=None, reward="holdout", folder=tmp_path / "holdout")


def test_grader_that_pairs_merged_ids_keeps_its_verdicts_with_a_warning(tmp_path, write_competition, caplog):
    """As the real mlebench's graders do, which get the tables as pandas infers them."""
    fields = "judge=lambda submission, answers: 1.0, judge_version='a judge of ids'"
    with caplog.at_level(logging.WARNING):
        task = prepare_task(
            write_competition(with_ids("lambda n: f'{n // 2}.1' + '0' * (n % 2)"), fields), raw=None, reward="grade", folder=tmp_path / "a"
        )
    assert task.grade((task.public_dir / "sample_submission.csv").read_bytes()).score == 1.0
    assert "'0.1' and '0.10'" in caplog.text
    assert "a judge of ids" in caplog.text


# ---------------------------------------------------------------------- labels


def with_labels(train: list[str], private: list[str], sample: str | None = None, column: str = "sinks") -> str:
    return f"""
    labels = lambda table, texts: table.assign({column}=[texts[n % len(texts)] for n in range(len(table))])
    train, test = labels(train, {train}), labels(test, {private})
    train.to_csv(public / 'train.csv', index=False)
    test[['key']].assign({column}={(train[0] if sample is None else sample)!r}).to_csv(public / 'sample_submission.csv', index=False)
    test.to_csv(private / 'test.csv', index=False)
"""


def submission(task, labels: list[str], run: int = -1, *, constant: str | None = None) -> bytes:
    """The labels that `with_labels` gave the private rows; those of training rows are found in the original table."""
    sample = pd.read_csv(task.public_dirs[run] / "sample_submission.csv", dtype=str, keep_default_na=False)
    cells = [constant or labels[(int(key[:4]) - (100 if int(key[:4]) >= 100 else 0)) % len(labels)] for key in sample["key"]]
    return sample.assign(sinks=cells).to_csv(index=False).encode()


TEXT_LABELS = {
    "names of missing values": ["None", "NA", "null", "nan", "N/A"],
    "numbers and text": ["0", "1", "2", "3", "4+"],
    "truth values and text": ["True", "False", "Unknown"],
    "numbers and a name of a missing value": ["1", "2", "NA"],
    "codes": ["01", "1", "1.0", "x"],
}


@pytest.mark.parametrize("reward", ["grade", "holdout"])
@pytest.mark.parametrize("kind", TEXT_LABELS)
def test_text_labels_are_compared_as_text(tmp_path, write_competition, kind, reward):
    """Whatever classes a submission contains, it is valid, and its score is that of the texts."""
    labels = TEXT_LABELS[kind]
    if reward == "holdout" and not answer_types.is_text(labels):
        labels = [*labels, "other"]  # from the training table alone, NA in a column of numbers is a missing value
    path = write_competition(with_labels(labels, labels))
    task = prepare_task(path, raw=None, reward=reward, folder=tmp_path / "task", stratified=False)
    assert task.grade(submission(task, labels)).private_score == 1.0
    for label in labels:
        grade = task.grade(submission(task, labels, constant=label))
        assert grade.valid, grade.reason
        assert grade.private_score == round(labels.count(label) * (40 // len(labels) + (labels.index(label) < 40 % len(labels))) / 40, 5)
    assert task.grade(submission(task, labels, constant="unknown label")).private_score == 0.0
    missing = submission(task, labels).replace(f",{labels[0]}\n".encode(), b",\n", 1)
    assert "1 of the" in task.grade(missing).reason


@pytest.mark.parametrize(("labels", "hidden"), [(["None", "a"], "'None'"), (["1", "NA", "x"], "'NA'"), (["a", "b"], ""), (["", "a"], "")])
def test_labels_that_programs_lose_are_named(tmp_path, write_competition, caplog, labels, hidden):
    with caplog.at_level(logging.WARNING):
        prepare_task(
            write_competition(with_labels(labels, ["a", "x"], "a"), "failure_reward=-1.0"),
            raw=None,
            reward="grade",
            folder=tmp_path / "task",
        )
    assert ("keep_default_na" in caplog.text) == bool(hidden)
    assert hidden in caplog.text


@pytest.mark.parametrize("labels", [["True", "False", "None"], ["1", "2", "NA"], ["N/A", "null"], ["0.5", "1.5", "nan"]])
def test_classes_that_may_be_missing_values(tmp_path, write_competition, caplog, labels):
    """Among numbers of the training table, NA may be a class or a missing value. Rows of it are not held out."""
    path = write_competition(with_labels(labels, labels[:1], labels[0]), "metric=metrics.RMSE, transform='negate', failure_reward=-9.0")
    with pytest.raises(ConfigError, match=f"train.csv has the label '{labels[-1] if labels[0] != 'N/A' else 'N/A'}'.*rename"):
        prepare_task(path, raw=None, reward="holdout", folder=tmp_path / "task")
    if labels[0] != "N/A":
        with caplog.at_level(logging.WARNING):
            prepare_task(path, raw=None, reward="grade", folder=tmp_path / "grade")
        assert f"label {labels[-1]!r} in column 'sinks' of train.csv counts as missing" in caplog.text


@pytest.mark.parametrize("lacking", ["4+", "0"])
def test_validity_does_not_depend_on_the_classes_of_private_answers(tmp_path, write_competition, lacking):
    """Private answers that lack a class do not change how predictions are read."""
    labels = ["0", "1", "2", "3", "4+"]
    private = [label for label in labels if label != lacking]
    task = prepare_task(
        write_competition(with_labels(labels, private), "failure_reward=-1.0"), raw=None, reward="grade", folder=tmp_path / "task"
    )
    for label in labels:
        assert task.grade(submission(task, private, constant=label)).valid
    assert task.grade(submission(task, private)).score == 1.0
    assert json.loads((task.folder / "prepared.json").read_text())["text_predictions"] == ["sinks"]


def test_folds_and_retests_read_labels_alike(tmp_path, write_competition):
    """A fold or a retest whose rows lack a class has the same types."""
    labels = ["0"] * 60 + ["1", "4+"] * 20
    path = write_competition(with_labels(labels, ["0", "1"]))
    task = prepare_task(path, raw=None, reward="holdout", holdout_folds=4, folder=tmp_path / "folds")
    for run in range(len(task.splits)):
        for label in ("0", "1", "4+"):
            assert task.grade(submission(task, labels, run, constant=label), run).valid
    whole = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "whole")
    for retest in prepare_retests(whole, 3, folder=tmp_path / "retests", seed=0):
        assert retest.grade(submission(retest, labels, constant="4+")).valid


@pytest.mark.parametrize("metric", ["ROC_AUC", "LOG_LOSS, transform='negate', failure_reward=-50.0"])
@pytest.mark.parametrize(("labels", "sample"), [(["no", "yes"], "0.5"), (["no", "yes"], "0"), (["NA", "yes"], "0.25")])
def test_probabilities_of_text_labels_are_numbers(tmp_path, write_competition, metric, labels, sample):
    path = write_competition(with_labels(labels, labels, sample), fields=f"metric=metrics.{metric}")
    task = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    perfect = task.grade(submission(task, ["0.001", "0.999"]))
    assert task.reward(perfect.score) > task.reward(task.grade(submission(task, ["0.6", "0.5"])).score)


@pytest.mark.parametrize("labels", [["True", "False"], ["0", "1"], ["0.5", "1.25"], ["1", "2.0"]])
def test_numbers_and_truth_values_are_read_as_before(tmp_path, write_competition, labels):
    path = write_competition(with_labels(labels, labels), fields="metric=metrics.RMSE, transform='negate', failure_reward=-9.0")
    task = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    assert (task.text_columns.answers, task.text_columns.predictions) == ((), ())
    assert not any(name.startswith("text") for name, _ in task.settings)
    numbers = [str(float({"True": 1, "False": 0}.get(label, label))) for label in labels]
    assert task.grade(submission(task, numbers)).score == 0.0


def test_folders_of_earlier_versions_keep_their_rules(tmp_path, write_competition):
    """Without the entries, labels are typed for each table as before, with the fingerprint from before."""
    labels = ["a", "b", "NA"]
    path = write_competition(with_labels(labels, ["a", "b"]))
    task = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    record = json.loads((task.folder / "prepared.json").read_text())
    del record["text_answers"], record["text_predictions"]
    (task.folder / "prepared.json").write_text(json.dumps(record))
    old = prepare_task(path, raw=None, reward="grade", folder=tmp_path / "task")
    assert "missing" in old.grade(submission(task, ["a", "b"], constant="NA")).reason
    assert task.grade(submission(task, ["a", "b"], constant="NA")).score == 0.0
    assert old.fingerprint != task.fingerprint
    assert ("text_answers", "sinks") in task.settings

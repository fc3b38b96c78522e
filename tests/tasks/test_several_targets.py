"""Targets of several columns: probabilities of classes and several outputs, prepared, graded, held out and compared natively."""

import math
import textwrap

import numpy as np
import pandas as pd
import pytest

from discover_jax import row_results
from discover_jax.exceptions import ConfigError
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.metrics import ACCURACY, LOG_LOSS, MULTICLASS_LOG_LOSS, RMSE, ROC_AUC, mean_of_columns
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.retests import prepare_retests

_SOURCE = """
import numpy as np
import pandas as pd
from discover_jax.tasks.competition import Competition, Metric
from discover_jax.tasks.metrics import ACCURACY, LOG_LOSS, MULTICLASS_LOG_LOSS, RMSE, ROC_AUC, mean_of_columns

KINDS = ["oak", "NA", "1", "01"]


def table(start, rows):
    n = np.arange(start, start + rows)
    return pd.DataFrame({
        "id": [f"r{number}" for number in n], "size": n * 7 % 10, "kind": [KINDS[k] for k in n * n % 4 + n % 3 % 2],
        "height": n * 0.5, "width": n % 5 * 1.25, "wet": n % 3 == 0, "old": n * 5 % 7 < 3,
    })


def prepare(raw, public, private):
    train, test = table(0, 90), table(90, 40)
    train[["id", "size", *LABELS]].to_csv(public / "train.csv", index=False)
    test[["id", "size"]].to_csv(public / "test.csv", index=False)
    test[["id"]].assign(**SAMPLE).to_csv(public / "sample_submission.csv", index=False)
    test.to_csv(private / "test.csv", index=False)
    CHANGE


"""
FORMS = {
    "classes": """
        LABELS, SAMPLE = ["kind"], {"p_oak": 0.25, "p_na": 0.25, "p_1": 0.25, "p_01": 0.25}
        FIELDS = dict(target="kind", classes=dict(zip(KINDS, SAMPLE)), metric=MULTICLASS_LOG_LOSS)
    """,
    "classes by name": """
        LABELS, SAMPLE = ["kind"], dict.fromkeys(KINDS, 0.25)
        FIELDS = dict(target="kind", classes=KINDS, metric=MULTICLASS_LOG_LOSS)
    """,
    "outputs": """
        LABELS, SAMPLE = ["height", "width"], {"height": 30.0, "width": 2.0}
        FIELDS = dict(target=("height", "width"), metric=mean_of_columns(RMSE))
    """,
    "labels": """
        LABELS, SAMPLE = ["wet", "old"], {"wet": 0.5, "old": 0.5}
        FIELDS = dict(target=("wet", "old"), metric=mean_of_columns(LOG_LOSS))
    """,
}
_END = """
COMPETITION = Competition(**(dict(
    id="trees", description="Trees.", id_column="id", prepare=prepare, transform="negate", failure_reward=-99.0,
) | FIELDS | dict(MORE)))
"""
KINDS = ["oak", "NA", "1", "01"]


@pytest.fixture
def write(tmp_path):
    def write(form: str, change: str = "pass", more: str = "") -> str:
        path = tmp_path / "trees.py"
        source = _SOURCE.replace("CHANGE", change) + textwrap.dedent(FORMS[form]) + _END.replace("MORE", more)
        path.write_text(source)
        return str(path)

    return write


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def truth() -> pd.DataFrame:
    n = np.arange(130)
    return pd.DataFrame(
        {
            "id": [f"r{number}" for number in n],
            "kind": [KINDS[k] for k in n * n % 4 + n % 3 % 2],
            "height": n * 0.5,
            "width": n % 5 * 1.25,
            "wet": n % 3 == 0,
            "old": n * 5 % 7 < 3,
        }
    ).set_index("id")


def guesses(form: str, ids, seed: int = 0) -> pd.DataFrame:
    """Noisy predictions, in the columns of a submission."""
    rows, random = truth().loc[list(ids)], np.random.RandomState(seed)
    columns = {"classes": ["p_oak", "p_na", "p_1", "p_01"], "classes by name": KINDS}.get(form)
    if columns:
        noise = random.uniform(0.1, 1, (len(rows), 4)) + 2 * (rows[["kind"]].to_numpy() == np.array(KINDS))
        return pd.DataFrame(noise / noise.sum(axis=1, keepdims=True), columns=columns)
    targets = ["height", "width"] if form == "outputs" else ["wet", "old"]
    values = rows[targets].to_numpy(float)
    noisy = values + random.normal(size=values.shape) if form == "outputs" else np.clip(values, 0.2, 0.8) + random.uniform(-0.1, 0.1)
    return pd.DataFrame(noisy, columns=targets)


def expected(form: str, ids, table: pd.DataFrame) -> float:
    from sklearn.metrics import log_loss, root_mean_squared_error  # half a second that only the worker of this file needs

    rows, columns = truth().loc[list(ids)], list(table.columns)
    if form.startswith("classes"):
        order = np.argsort(KINDS)  # scikit-learn wants the columns in the order of the sorted labels
        return log_loss(rows["kind"], table.to_numpy()[:, order], labels=sorted(KINDS))
    score = root_mean_squared_error if form == "outputs" else log_loss
    return float(np.mean([score(rows[column], table[column]) for column in columns]))


def csv(ids, table: pd.DataFrame, seed: int = 1) -> bytes:
    """The submission, with its rows in another order."""
    return table.assign(id=list(ids)).sample(frac=1, random_state=seed).to_csv(index=False).encode()


@pytest.mark.parametrize("form", FORMS)
def test_grade_of_the_private_answers(tmp_path, write, form):
    task = prepare_task(write(form), raw=None, reward="grade", folder=tmp_path / "task")
    ids = read(task.public_dir / "test.csv")["id"]
    table = guesses(form, ids)
    grade = task.grade(csv(ids, table))
    assert grade.score == pytest.approx(expected(form, ids, table), abs=1e-5)
    perfect = task.grade(task.answers_as_submission())
    assert task.reward(perfect.score) > task.reward(grade.score) > task.reward(task.grade(csv(ids, guesses(form, ids[::-1]))).score)
    low, high = task.score_interval(grade.score, csv(ids, table)).bounds or (math.nan, math.nan)
    assert low < grade.score < high
    assert row_results.decode(grade.rows).rows == 40


@pytest.mark.parametrize("settings", [{"holdout_fraction": 0.3, "selection_fraction": 0.4}, {"holdout_folds": 3}], ids=["parts", "folds"])
@pytest.mark.parametrize("form", FORMS)
def test_held_out_rows(tmp_path, write, form, settings):
    """Held-out rows are graded as the private ones, by the same formula."""
    task = prepare_task(write(form), raw=None, reward="holdout", folder=tmp_path / "task", **settings)
    labels = {"classes": ["kind"], "classes by name": ["kind"], "outputs": ["height", "width"], "labels": ["wet", "old"]}[form]
    grades = []
    for run, (shown, split) in enumerate(zip(task.public_dirs, task.splits, strict=True)):
        ids = read(shown / "test.csv")["id"]
        assert not set(labels) & set(read(shown / "test.csv").columns)
        table = guesses(form, ids)
        grade = task.grade(csv(ids, table), run)
        grades.append(grade)
        for (name, _), score in zip(split.answers, (grade.private_score, grade.score, grade.selection_score), strict=False):
            answers = read(task.folder / "private" / name)
            assert {"id", *labels} <= set(answers.columns)
            mine = np.isin(ids.to_numpy(), answers["id"].to_numpy())
            assert score == pytest.approx(expected(form, ids[mine], table[mine]), abs=1e-5)
        assert task.grade(task.answers_as_submission(run), run).valid
    assert task.combine(grades).valid


@pytest.mark.parametrize("form", FORMS)
def test_retests(tmp_path, write, form):
    task = prepare_task(write(form), raw=None, reward="holdout", holdout_fraction=0.3, folder=tmp_path / "task")
    for retest in prepare_retests(task, 2, folder=tmp_path / "retests", seed=0):
        ids = read(retest.public_dir / "test.csv")["id"]
        mine = np.isin(ids.to_numpy(), read(retest.folder / "private" / retest.splits[0].answers[1][0])["id"].to_numpy())
        table = guesses(form, ids)
        assert retest.grade(csv(ids, table)).score == pytest.approx(expected(form, ids[mine], table[mine]), abs=1e-5)
        shown = read(retest.public_dir / "train.csv").set_index("id")
        for target in retest.competition.label_columns:
            assert shown[target].tolist() == [str(value) for value in truth().loc[shown.index, target]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop(columns="p_na"), "no column 'p_na'"),
        (lambda table: table.assign(p_1=[None, *table["p_1"][1:]]), "1 of the 40 predictions in column 'p_1' are missing"),
        (lambda table: table.assign(p_1=[np.inf, *table["p_1"][1:]]), "'p_1' holds infinite"),
        (lambda table: table.assign(p_oak="oak"), "multiclass log loss cannot be computed"),
        (lambda table: table.assign(p_oak=1.5), r"probabilities must lie in \[0, 1\]"),
        (lambda table: table.assign(p_oak=-0.1), r"probabilities must lie in \[0, 1\]"),
        (lambda table: table * 0, "40 rows have no probability greater than 0"),
    ],
)
def test_invalid_submissions_have_a_reason(tmp_path, write, change, reason):
    task = prepare_task(write("classes"), raw=None, reward="grade", folder=tmp_path / "task")
    ids = read(task.public_dir / "test.csv")["id"]
    grade = task.grade(csv(ids, change(guesses("classes", ids))))
    assert not grade.valid
    assert pd.Series([grade.reason]).str.contains(reason).all(), grade.reason


def test_probabilities_are_divided_by_their_sum(tmp_path, write):
    task = prepare_task(write("classes"), raw=None, reward="grade", folder=tmp_path / "task")
    ids = read(task.public_dir / "test.csv")["id"]
    table = guesses("classes", ids)
    assert task.grade(csv(ids, table / 3)).score == task.grade(csv(ids, table)).score


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("outputs", "test.to_csv(public / 'test.csv', index=False)", r"'height'.*public/test\.csv"),
        ("outputs", "test.drop(columns='width').to_csv(private / 'test.csv', index=False)", r"private/test\.csv without width"),
        ("outputs", "test.assign(width='').to_csv(private / 'test.csv', index=False)", "answers missing"),
        ("classes", "test[['id', 'kind']].to_csv(public / 'sample_submission.csv', index=False)", "without p_oak, p_na, p_1, p_01"),
        ("classes", "test.assign(kind='elm').to_csv(private / 'test.csv', index=False)", r"private/test\.csv with the label 'elm'"),
        ("classes", "train.assign(kind='elm').to_csv(public / 'train.csv', index=False)", r"public/train\.csv with the label 'elm'"),
    ],
)
def test_inconsistent_tables_are_refused(tmp_path, write, form, change, message):
    with pytest.raises(ConfigError, match=f"trees.*{message}"):
        prepare_task(write(form, change), raw=None, reward="grade", folder=tmp_path / "task")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": ()}, "target"),
        ({"target": ("y", "")}, "target"),
        ({"target": ("y", "y")}, "twice"),
        ({"target": ("y", "id")}, "id_column and target"),
        ({"target": ["y", "z"]}, "tuple"),
        ({"classes": ("a",)}, "at least two"),
        ({"classes": {"a": "p", "b": "p"}}, "different columns"),
        ({"classes": {"a": "p", "b": "id"}}, "id column"),
        ({"classes": ("a", 1)}, "non-empty strings"),
        ({"classes": "ab"}, "non-empty strings"),
        ({"classes": ("a", "b"), "target": ("y", "z")}, "single column"),
        ({"classes": ("a", "b"), "judge": lambda submission, answers: 0.0}, "no judge"),
    ],
)
def test_invalid_definitions_are_refused(fields, message):
    good = {"id": "trees", "description": "Trees.", "id_column": "id", "target": "y", "metric": ACCURACY, "prepare": lambda *_: None}
    with pytest.raises(ConfigError, match=message):
        Competition(**(good | fields))


def test_classes_and_targets_are_settings_of_the_fingerprint(tmp_path, write):
    tasks = [
        prepare_task(write(form, more=more), raw=None, reward="grade", folder=tmp_path / f"{number}")
        for number, (form, more) in enumerate([("classes", ""), ("classes by name", ""), ("outputs", ""), ("labels", "")])
    ]
    assert len({task.fingerprint for task in tasks}) == 4
    assert dict(tasks[0].settings)["classes"] == '{"oak": "p_oak", "NA": "p_na", "1": "p_1", "01": "p_01"}'
    assert dict(tasks[2].settings)["target"] == '["height", "width"]'
    assert prepare_task(write("outputs"), raw=None, reward="grade", folder=tmp_path / "2").folder == tasks[2].folder


def test_judge_of_several_columns(tmp_path, write):
    """A judge gets the tables of several columns, the held-out rows too."""
    more = "judge=lambda submission, answers: float(abs(submission['width'] - answers['width']).mean()), judge_version='mine'"
    task = prepare_task(write("outputs", more=more), raw=None, reward="grade", folder=tmp_path / "task")
    assert task.grade(task.answers_as_submission()).score == 0.0


# ---------------------------------------------------------------------- metrics of several columns


@pytest.mark.parametrize(
    ("metric", "score"),
    [(RMSE, "root_mean_squared_error"), (LOG_LOSS, "log_loss"), (ROC_AUC, "roc_auc_score"), (ACCURACY, "accuracy_score")],
)
def test_mean_of_columns(metric, score):
    """The mean of scikit-learn's scores; its influence has the variance of a jackknife, and counts give the scores of calls."""
    from sklearn import metrics

    score = getattr(metrics, score)
    random = np.random.RandomState(0)
    answers_RC = random.randint(0, 2, (60, 3))
    predictions_RC = np.clip(answers_RC * 0.4 + random.uniform(size=(60, 3)) * 0.6, 0.01, 0.99)
    if metric is ACCURACY:
        predictions_RC = (predictions_RC > 0.5).astype(int)
    several = mean_of_columns(metric)
    expected = np.mean([score(answers_RC[:, c], predictions_RC[:, c]) for c in range(3)])
    assert several.function(answers_RC, predictions_RC) == pytest.approx(expected)
    assert several.influence is not None
    kept = [np.arange(60) != row for row in range(60)]
    jackknife = np.array([several.function(answers_RC[rows], predictions_RC[rows]) for rows in kept])
    influence_R = several.influence(answers_RC, predictions_RC)
    assert np.corrcoef(influence_R, -jackknife)[0, 1] > 0.99
    if several.resampled is not None:
        counts_BR = random.multinomial(60, np.full(60, 1 / 60), 5)
        slow = [several.function(*(np.repeat(table, counts_R, axis=0) for table in (answers_RC, predictions_RC))) for counts_R in counts_BR]
        assert several.resampled(answers_RC, predictions_RC, counts_BR) == pytest.approx(slow)


def test_multiclass_log_loss_by_hand():
    answers_RC, predictions_RC = np.eye(3), np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.0], [0.0, 0.0, 1.0]])
    assert MULTICLASS_LOG_LOSS.function(answers_RC, predictions_RC) == pytest.approx((math.log(2) + math.log(2) + 0) / 3)
    assert MULTICLASS_LOG_LOSS.influence is not None
    assert MULTICLASS_LOG_LOSS.influence(answers_RC, predictions_RC).mean() == pytest.approx(0)


def test_metric_of_a_user(tmp_path, write):
    """A metric gets arrays of rows and columns, in the order of the targets."""
    more = "metric=Metric('error', False, lambda answers_RC, predictions_RC: float(abs(answers_RC - predictions_RC)[:, 1].mean()))"
    task = prepare_task(write("outputs", more=more), raw=None, reward="grade", folder=tmp_path / "task")
    ids = read(task.public_dir / "test.csv")["id"]
    table = guesses("outputs", ids)
    from sklearn.metrics import mean_absolute_error

    wanted = mean_absolute_error(truth().loc[ids, "width"], table["width"])
    assert task.grade(csv(ids, table)).score == pytest.approx(wanted, abs=1e-5)

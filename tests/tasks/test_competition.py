"""Competition definitions are validated on creation and found by id or by file."""

import math
import pickle

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.loading import load_competition, locate_definition
from discover_jax.tasks.metrics import ACCURACY, RMSE
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.rewards import TRANSFORMS, ranks

GOOD = {
    "id": "boats",
    "description": "Boats.",
    "id_column": "key",
    "target": "sinks",
    "metric": ACCURACY,
    "prepare": lambda raw, public, private: None,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../boats"}, r"'\.\./boats'.*\bid\b"),
        ({"id": ""}, r"''.*\bid\b"),
        ({"description": " "}, "description\\b.*' '"),
        ({"target": "key"}, r"'key'"),
        ({"metric": "accuracy"}, r"\bmetric\b.*discover_jax\.tasks\.metrics\.ACCURACY"),
        ({"transform": "square"}, "identity, negate, inverse, log, rank_in_group"),
        ({"transform": "negate"}, "accuracy.*'identity'.*'log'"),
        ({"metric": RMSE}, "'negate'"),
        ({"failure_reward": float("-inf")}, "failure_reward"),
    ],
)
def test_invalid_definitions_are_refused(changes, message):
    Competition(**GOOD)
    with pytest.raises(ConfigError, match=message):
        Competition(**(GOOD | changes))


@pytest.mark.parametrize(("name", "higher"), [(name, higher) for name, t in TRANSFORMS.items() for higher in t.directions])
@given(scores=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=5, unique=True))
def test_better_scores_have_higher_rewards(name, higher, scores):
    metric = ACCURACY if higher else RMSE
    competition = Competition(**(GOOD | {"metric": metric, "transform": name, "failure_reward": -1e7}))
    rewards = [competition.reward(score) for score in sorted(scores, reverse=not higher)]
    assert rewards == sorted(rewards)
    assert math.isfinite(competition.reward(0.0))
    signals = competition.signals(rewards)
    assert all((a < b) <= (x <= y) for a, b, x, y in zip(rewards, rewards[1:], signals, signals[1:], strict=False))


def test_transforms_by_hand():
    def reward(transform, score, metric=RMSE, failure=-100.0):
        return Competition(**(GOOD | {"metric": metric, "transform": transform, "failure_reward": failure})).reward(score)

    assert reward("negate", 3.5) == -3.5
    assert reward("inverse", 3.0) == 0.25
    assert reward("log", math.e) == pytest.approx(-1.0)
    assert reward("log", math.e, ACCURACY) == pytest.approx(1.0)
    # Halving an error gains the same at every scale.
    assert reward("log", 40.0) - reward("log", 80.0) == pytest.approx(reward("log", 0.04) - reward("log", 0.08))
    # Never below a failure.
    assert reward("negate", 1e9) == -100.0
    with pytest.raises(ConfigError, match=r"'inverse'.*-0\.5|-0\.5.*'inverse'"):
        reward("inverse", -0.5)


def test_ranks_in_a_group():
    assert ranks([5.0, -3.0, 8.0]) == [0.5, 0.0, 1.0]
    assert ranks([1.0, 1.0, 0.0, 2.0, 0.0]) == [0.625, 0.625, 0.125, 1.0, 0.125]
    assert ranks([7.0]) == [0.0]
    assert ranks([2.0, 2.0]) == [0.5, 0.5]
    competition = Competition(**(GOOD | {"transform": "rank_in_group"}))
    assert competition.signals([0.1, 0.9]) == competition.signals([1e-9, 2e9]) == [0.0, 1.0]
    assert Competition(**GOOD).signals([0.1, 0.9]) == [0.1, 0.9]


@pytest.mark.parametrize(
    ("name", "metric", "model"), [("breast-cancer", "log loss", 0.101), ("diabetes", "root mean squared error", 52.54534)]
)
def test_competitions_beyond_accuracy(tmp_path, name, metric, model):
    """A linear model fitted by hand beats the sample, which beats a failure."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    task = prepare_task(name, raw=None, reward="grade", folder=tmp_path / "task")
    assert (task.metric.name, task.metric.higher_is_better) == (metric, False)
    train, test = (pd.read_csv(task.public_dir / f"{part}.csv") for part in ("train", "test"))
    target = task.competition.target
    assert target not in test.columns
    features = [column for column in test.columns if column != "id"]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.3) if name == "breast-cancer" else Ridge())
    pipeline.fit(train[features], train[target])
    predicted = pipeline.predict_proba(test[features])[:, 1] if name == "breast-cancer" else pipeline.predict(test[features])
    grade = task.grade(test[["id"]].assign(**{target: predicted}).to_csv(index=False).encode())
    assert grade.score == pytest.approx(model, rel=0.01)
    assert task.reward(grade.score) > task.reward(task.competition.sample_score) > task.failure_reward


def test_built_in_competitions():
    for name in ("digits-parity", "spaceship-titanic"):
        assert locate_definition(name) == (name, "")
        competition = load_competition(name, "")
        assert (competition.id, competition.metric.name) == (name, "accuracy")
    assert [threshold.score for threshold in competition.thresholds] == [0.7957, 0.8027, 0.82815]
    assert competition.thresholds_source == "from the report, not from a leaderboard on this machine"
    assert "only indicative" in competition.thresholds_note


def test_thresholds_are_shown_with_their_source_or_are_unavailable(tmp_path, write_competition):
    """Thresholds are always shown with their source, so that they are not mistaken for a leaderboard on this machine."""
    for name, fields, expected in (
        ("none", "", "unavailable"),
        ("why", "thresholds_note='The file is a pointer.'", "unavailable. The file is a pointer."),
        (
            "some",
            "thresholds=(Threshold('best', 0.9), Threshold('median', 0.5)), thresholds_note='Of other rows.'",
            "from the competition's definition, not from a leaderboard on this machine: best 0.9, median 0.5. Of other rows.",
        ),
        ("named", "thresholds=(Threshold('best', 0.9),), thresholds_source='from a paper'", "from a paper: best 0.9"),
    ):
        task = prepare_task(write_competition(fields=fields), raw=None, reward="grade", folder=tmp_path / name)
        assert task.leaderboard == expected
    for name in ("digits-parity", "breast-cancer", "diabetes"):
        assert prepare_task(name, raw=None, reward="grade", folder=tmp_path / name).leaderboard == "unavailable"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "spaceship_titanic",
            r"spaceship-titanic.*\bautocorrelation-1\b.*\bbreast-cancer\b.*\bcircle-packing-26\b.*\bspaceship-titanic\b",
        ),
        ("boats", r"config\.task\.competition\b.*\bboats\b"),
        ("", r"config\.task\.competition\b.*''"),
        ("absent/boats.py", r"absent/boats\.py"),
    ],
)
def test_unknown_competitions(name, message):
    with pytest.raises(ConfigError, match=message):
        locate_definition(name)


def test_file_of_another_type_is_refused(tmp_path):
    (tmp_path / "boats.yaml").touch()
    with pytest.raises(ConfigError, match=r"boats\.yaml\b.*\.py\b"):
        locate_definition(str(tmp_path / "boats.yaml"))


def test_file_of_a_user(write_competition, monkeypatch, tmp_path):
    path = write_competition()
    source, digest = locate_definition(path)
    assert load_competition(source, digest).id == "boats"
    assert load_competition(source, digest) is load_competition(source, digest)
    monkeypatch.chdir(tmp_path)
    assert locate_definition("boats.py") == (source, digest)
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 +", "SyntaxError"),
        ("import nonexistent_module", "No module named 'nonexistent_module'"),
        ("x = 1", "COMPETITION"),
        ("COMPETITION = 3", r"COMPETITION\b.*\b3\b"),
        (
            "from discover_jax.tasks.competition import Competition\nCOMPETITION = Competition(id='a')",
            "missing 5 required positional arguments",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)mine\.py.*{message}") as raised:
        load_competition(*locate_definition(str(path)))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_file_that_changes_or_disappears_during_a_run(write_competition, tmp_path):
    path = write_competition()
    source, digest = locate_definition(path)
    write_competition("x = 1")
    with pytest.raises(DataError, match=r"boats\.py"):
        load_competition(source, digest)
    (tmp_path / "boats.py").unlink()
    with pytest.raises(DataError, match=r"boats\.py"):
        load_competition(source, digest)

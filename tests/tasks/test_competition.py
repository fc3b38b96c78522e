"""A competition's definition is checked when it is made, and found by id or by file."""

import pickle

import pytest

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.competition import TRANSFORMS, Competition
from discover_jax.tasks.loading import load_competition, locate_competition
from discover_jax.tasks.metrics import ACCURACY, RMSE

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
        ({"id": "../boats"}, "the id must be a word"),
        ({"id": ""}, "the id must be a word"),
        ({"description": " "}, "description = ' '"),
        ({"target": "key"}, "both 'key'"),
        ({"metric": "accuracy"}, r"must be a Metric, such as discover_jax\.tasks\.metrics\.ACCURACY"),
        ({"transform": "square"}, "allowed: identity, negate"),
        ({"transform": "negate"}, "does not fit accuracy, of which higher is better.*Use 'identity'"),
        ({"metric": RMSE}, "of which lower is better.*Use 'negate'"),
        ({"failure_reward": float("-inf")}, "must be finite"),
    ],
)
def test_definitions_that_are_not_allowed(changes, message):
    Competition(**GOOD)
    with pytest.raises(ConfigError, match=message):
        Competition(**(GOOD | changes))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_rewards_rise_as_scores_get_better(name):
    transform = TRANSFORMS[name]
    better, worse = (0.9, 0.2) if transform.of_higher else (0.2, 0.9)
    assert transform.function(better) > transform.function(worse)


def test_built_in_competitions():
    for name in ("digits-parity", "spaceship-titanic"):
        assert locate_competition(name) == (name, "")
        competition = load_competition(name, "")
        assert (competition.id, competition.metric.name) == (name, "accuracy")
    assert [threshold.score for threshold in competition.thresholds] == [0.7957, 0.8027, 0.82815]
    assert "only indicative" in competition.thresholds_note


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spaceship_titanic", r"did you mean 'spaceship-titanic'\?.*Allowed: digits-parity, spaceship-titanic, the path"),
        ("boats", "no built-in competition has that id"),
        ("", "no built-in competition has that id"),
        ("absent/boats.py", "there is no such file"),
    ],
)
def test_unknown_competitions(name, message):
    with pytest.raises(ConfigError, match=message):
        locate_competition(name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "boats.yaml").touch()
    with pytest.raises(ConfigError, match=r"not a \.py file"):
        locate_competition(str(tmp_path / "boats.yaml"))


def test_a_users_file(write_competition, monkeypatch, tmp_path):
    path = write_competition()
    source, digest = locate_competition(path)
    assert load_competition(source, digest).id == "boats"
    assert load_competition(source, digest) is load_competition(source, digest)
    monkeypatch.chdir(tmp_path)
    assert locate_competition("boats.py") == (source, digest)
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 +", "failed when it was loaded:\n.*SyntaxError"),
        ("import nonexistent_module", "No module named 'nonexistent_module'"),
        ("x = 1", "found nothing of that name"),
        ("COMPETITION = 3", "found COMPETITION = 3"),
        (
            "from discover_jax.tasks.competition import Competition\nCOMPETITION = Competition(id='a')",
            "missing 5 required positional arguments",
        ),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)mine\.py.*{message}") as raised:
        load_competition(*locate_competition(str(path)))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_file_that_changes_or_goes_during_a_run(write_competition, tmp_path):
    path = write_competition()
    source, digest = locate_competition(path)
    write_competition("x = 1")
    with pytest.raises(DataError, match="changed during the run"):
        load_competition(source, digest)
    (tmp_path / "boats.py").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_competition(source, digest)

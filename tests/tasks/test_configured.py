"""config.task names several competitions, their raw data and their seed programs; paths may contain commas."""

import types

import pytest

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.configured import named_competitions, prepare_tasks, seed_programs


def settings(competition: str, raw: str = "", **others):
    defaults = {
        "reward": "grade",
        "holdout_fraction": 0.2,
        "holdout_folds": 1,
        "selection_fraction": 0.0,
        "grader": "native",
        "reuse_output": "problem",
        "stratified": True,
        "seed_program": "",
    }
    return types.SimpleNamespace(**{**defaults, "competition": competition, "raw": raw, **others})


@pytest.mark.parametrize(
    ("competition", "raw", "expected"),
    [
        ("boats", "", [("boats", "")]),
        ("boats", "train.csv", [("boats", "train.csv")]),
        ("boats", "/data/a, b/train,v2.csv", [("boats", "/data/a, b/train,v2.csv")]),
        ("boats", r"/data/train\,v2.csv", [("boats", "/data/train,v2.csv")]),
        ("boats, houses", "a.csv, b.csv", [("boats", "a.csv"), ("houses", "b.csv")]),
        ("boats,houses", ",b.csv", [("boats", ""), ("houses", "b.csv")]),
        ("boats,houses", r"a\,1.csv,b\, c.csv", [("boats", "a,1.csv"), ("houses", "b, c.csv")]),
        (r"my\,boats.py", "a,b.csv", [("my,boats.py", "a,b.csv")]),
        (r"my\,boats.py,houses", "a.csv,", [("my,boats.py", "a.csv"), ("houses", "")]),
    ],
)
def test_lists_of_paths(competition, raw, expected):
    assert named_competitions(settings(competition, raw)) == expected


@pytest.mark.parametrize(("competition", "raw"), [("boats,houses", "a.csv"), ("boats,houses", "a,b,c.csv"), ("boats,houses", r"a\,b.csv")])
def test_wrong_numbers_of_paths(competition, raw):
    with pytest.raises(ConfigError, match=r"config\.task\.raw.*2 competitions.*\\,"):
        named_competitions(settings(competition, raw))


def test_paths_with_commas_are_used(tmp_path, write_competition):
    folder = tmp_path / "data, of 2024"
    folder.mkdir()
    raw, seed = folder / "a,b.csv", folder / "seed, best.py"
    raw.write_text("raw")
    seed.write_text("def run(): ...\n")
    path = write_competition("assert raw.read_text() == 'raw'")
    mine = settings(path, str(raw), seed_program=str(seed))
    tasks = prepare_tasks(mine, folder=tmp_path / "task", seed=0)
    assert seed_programs(mine, tasks) == ["def run(): ...\n"]
    several = settings(f"{path},digits-parity", str(raw).replace(",", r"\,") + ",", seed_program="," + str(seed).replace(",", r"\,"))
    tasks = prepare_tasks(several, folder=tmp_path / "tasks", seed=0)
    assert [task.id for task in tasks] == ["boats", "digits-parity"]
    assert seed_programs(several, tasks) == ["", "def run(): ...\n"]

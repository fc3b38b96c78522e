"""Problems as tasks: preparation, definitions in files, rewards, and what prompts show."""

import dataclasses
import pickle

import pytest

from discover_jax.exceptions import ConfigError, DataError
from discover_jax.tasks.configured import seed_programs
from discover_jax.tasks.loading import load_definition, locate_definition
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.problem import Evaluation, Problem, Record, Rejection
from discover_jax.tasks.problem_task import ProblemTask

FILE = """\
from discover_jax.tasks.problem import Evaluation, Problem, Record, Rejection


def evaluate(program):
    return Evaluation(float(program.call("run")))


PROBLEM = Problem(
    id="largest",
    description="Return a large number.",
    evaluate=evaluate,
    score_name="number",
    seed_program="def run():\\n    return 1.5\\n",
    records=(Record("Graham", 2.5, "a book"),),
    files={"hint.txt": "think big"},
    failure_reward=-1.0,
)
"""
BUNDLED = (
    "autocorrelation-1",
    "autocorrelation-2",
    "circle-packing-26",
    "circle-packing-32",
    "counting-inversions",
    "erdos-overlap",
    "online-bin-packing",
)


@pytest.fixture
def task(tmp_path) -> ProblemTask:
    (tmp_path / "largest.py").write_text(FILE)
    task = prepare_task(str(tmp_path / "largest.py"), raw=None, reward="grade", folder=tmp_path / "task")
    assert isinstance(task, ProblemTask)
    return task


def problem(**changes):
    return Problem(**{"id": "p", "description": "d", "evaluate": lambda program: Evaluation(0.0)} | changes)


def test_a_prepared_problem_shows_its_files_and_survives_pickling(task, tmp_path):
    (public,) = task.public_dirs
    assert {path.name: path.read_text() for path in public.iterdir()} == {
        "hint.txt": "think big",
        "problem.md": "# largest\n\nReturn a large number.\n",
    }
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    assert (copy.id, copy.metric.name, copy.leaderboard) == ("largest", "number", "Graham 2.5 (a book)")
    assert prepare_task(str(tmp_path / "largest.py"), raw=None, reward="grade", folder=tmp_path / "task") == task
    assert task.disclosure.reward == "evaluate"
    assert task.score_text(0.1 + 0.2) == "0.30000000000000004"
    assert task.reward(-5.0) == -1.0


def test_another_definition_is_another_task(task, tmp_path):
    (tmp_path / "largest.py").write_text(FILE + "# changed\n")
    with pytest.raises(DataError, match="definition_sha256"):
        prepare_task(str(tmp_path / "largest.py"), raw=None, reward="grade", folder=tmp_path / "task")
    other = prepare_task(str(tmp_path / "largest.py"), raw=None, reward="grade", folder=tmp_path / "other")
    assert other.fingerprint != task.fingerprint


def test_missing_packages_of_a_problem_are_named(tmp_path):
    (tmp_path / "largest.py").write_text(FILE.replace('id="largest"', 'id="largest", packages=("numpy", "no-such-package")'))
    with pytest.raises(ConfigError, match=r"'largest'.*pip install no-such-package`"):
        prepare_task(str(tmp_path / "largest.py"), raw=None, reward="grade", folder=tmp_path / "task")


def test_raw_data_are_refused(tmp_path):
    (tmp_path / "largest.py").write_text(FILE)
    with pytest.raises(ConfigError, match=r"config\.task\.raw\b"):
        prepare_task(str(tmp_path / "largest.py"), raw="train.csv", reward="grade", folder=tmp_path / "task")


@pytest.mark.parametrize(
    "text", ["x = 1\n", "PROBLEM = 3\n", FILE + "COMPETITION = 3\n", "COMPETITION = PROBLEM = None\n", "1 / 0\n"], ids=range(5)
)
def test_files_without_one_definition_are_refused(tmp_path, text):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.py"):
        load_definition(*locate_definition(str(path)))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_problems_are_found_by_their_id(name):
    source, digest = locate_definition(name)
    found = load_definition(source, digest)
    assert isinstance(found, Problem)
    assert found.id == name
    assert len(digest) == 64  # of the module, so that scores of another verifier are not taken for its own
    assert found.seed_program
    assert all(record.source for record in found.records)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": "a/b"}, "id"),
        ({"description": " "}, "description"),
        ({"score_name": ""}, "score_name"),
        ({"interface": ""}, "interface"),
        ({"evaluate": 3}, "evaluate"),
        ({"files": {"../x": ""}}, "files"),
        ({"packages": ("numpy>=2",)}, "packages"),
        ({"packages": "numpy"}, "packages"),
        ({"hidden_inputs": True, "reuse_output": True}, "reuse_output"),
        ({"evaluate_seconds": 0}, "evaluate_seconds"),
        ({"evaluate_gib": float("nan")}, "evaluate_gib"),
        ({"records": (Record("a", float("inf"), "b"),)}, "records"),
        ({"transform": "negate"}, "transform"),
        ({"transform": "cube"}, "transform"),
        ({"higher_is_better": False}, "transform"),
        ({"failure_reward": float("nan")}, "failure_reward"),
    ],
)
def test_mistakes_in_a_definition_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        problem(**changes)


def test_seed_programs_come_from_the_config_or_the_problem(task, tmp_path):
    @dataclasses.dataclass
    class Settings:
        seed_program: str

    assert seed_programs(Settings(""), [task]) == ["def run():\n    return 1.5\n"]
    (tmp_path / "mine.py").write_text("def run():\n    return 2\n")
    assert seed_programs(Settings(str(tmp_path / "mine.py")), [task]) == ["def run():\n    return 2\n"]
    for wrong in (f"{tmp_path / 'mine.py'}, b.py", str(tmp_path / "absent.py")):
        with pytest.raises(ConfigError, match=r"config\.task\.seed_program\b"):
            seed_programs(Settings(wrong), [task])


def test_rejection_carries_its_reason():
    assert str(Rejection("two circles overlap")) == "two circles overlap"

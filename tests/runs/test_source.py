"""Continuing another run: which state is inherited. Scores of other rows, in particular private ones, never are."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.config import default_config
from discover_jax.exceptions import RunError
from discover_jax.learning.train_state import adam, init_train_state
from discover_jax.runs.best import write_best
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.disclosure import Isolation, read_isolation, write_disclosure
from discover_jax.runs.host_state import HostState
from discover_jax.runs.rerun import rerun_script
from discover_jax.runs.restore import RunState, restore
from discover_jax.runs.reward_rows import check_reward_rows, reward_rows
from discover_jax.runs.source import find_source
from discover_jax.runs.workdir import open_workdir
from discover_jax.tasks.prepare import prepare_task
from discover_jax.typed_settings import rerun_settings
from discover_jax.types import Attempt, Outcome, StopReason

BESIDE = {"disclosure": b"{}\n", "rerun": "#!/bin/sh\n"}
SANDBOX = Isolation(True, ("bubblewrap 0.11",))


@pytest.fixture
def prepare(tmp_path):
    """Prepares a task once per combination of settings."""

    def prepare(name="digits-parity", reward="grade", **settings):
        folder = tmp_path / "-".join([name, reward, *(f"{key}={value}" for key, value in settings.items())])
        return prepare_task(name, raw=None, reward=reward, folder=folder, **settings)

    return prepare


def state_of(number):
    return init_train_state({"A": jnp.full(3, number, jnp.float32)}, adam())


def attempt(task, group, score, private_score):
    return Attempt(
        id=f"0000-{group:03d}-000",
        parent_id="seed",
        task=task.id,
        step=0,
        group=group,
        index=0,
        code=f"# {task.id} {score}",
        outcome=Outcome.OK,
        detail="",
        stdout="",
        score=score,
        private_score=private_score,
        reward=score,
        adapter_step=0,
        tokens=1,
        stop=StopReason.STOP_TOKEN,
    )


def config_of(tasks, resume_from=""):
    config = default_config()
    config.task.competition = ",".join(task.source for task in tasks)
    config.train.resume_from = str(resume_from)
    config.reuse.capacity = 10
    return config


def make_run(path, tasks, isolation=SANDBOX, earlier=()):
    """A run of one step. Each task has a program with the score 0.75, and the adapter holds the number 7."""
    with open_workdir(path, {}, "train") as workdir:
        write_disclosure(workdir, tasks, search={}, isolation=isolation)
        journal = Journal(workdir.journal_path)
        attempts = [attempt(task, group, 0.75, 0.75) for group, task in enumerate(tasks)]
        journal.append(attempts)
        for row in attempts:
            state = row.state()
            folder = workdir.best_dir if len(tasks) == 1 else workdir.best_dir / row.task
            write_best(folder, lineage=[state], submission=b"id\n", grade={"id": row.id, "competition": row.task, "score": 0.75}, **BESIDE)
        archive = Archive((), 10).add(row.state() for row in attempts)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=2, every=0)
        checkpoints.save(0, state_of(7), HostState.of(0, archive.to_json(), reward_rows(tasks, earlier), journal).to_json())
        checkpoints.close()
    return path


def continue_run(path, source, tasks, note=print) -> tuple[RunState, Isolation | None]:
    """Starts another run in `path`, as `main` does."""
    config = config_of(tasks, source)
    with open_workdir(path, {}, "train") as workdir:
        found = find_source(config.train.resume_from, tasks, workdir)
        isolation = SANDBOX if found is None else found.isolation.after(SANDBOX)
        write_disclosure(workdir, tasks, search={}, isolation=isolation, goes_on_from=found and found.disclosed())
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=2, every=0)
        journal = Journal(workdir.journal_path)
        scripts = {task.id: rerun_script(rerun_settings(config, number, stratified=False)) for number, task in enumerate(tasks)}
        starts = {task.id: Frontier.start(10) for task in tasks}
        standing = restore(tasks, workdir, checkpoints, journal, state_of(0), found, scripts, note, starts=starts)
        checkpoints.close()
        return standing, read_isolation(workdir.path)


def test_continued_run_inherits_state(tmp_path, prepare):
    task = prepare()
    source = make_run(tmp_path / "first", [task])
    standing, _ = continue_run(tmp_path / "next", source, [prepare()])
    assert (standing.first_step, standing.step) == (1, 1)
    np.testing.assert_array_equal(standing.train_state.lora["A"], [7, 7, 7])
    frontier = standing.frontiers[task.id]
    assert [state.score for state in frontier.archive.states] == [0.75]
    assert frontier.best.id == "0000-000-000"
    assert (tmp_path / "next" / "journal.jsonl").read_bytes() == (source / "journal.jsonl").read_bytes()
    for name in ("solution.py", "submission.csv", "grade.json", "lineage/lineage.json"):
        assert (tmp_path / "next" / "best" / name).read_bytes() == (source / "best" / name).read_bytes()
    assert "--competition=digits-parity" in (tmp_path / "next" / "best" / "rerun.sh").read_text()
    disclosed = json.loads((tmp_path / "next" / "disclosure.json").read_text())
    assert json.loads((tmp_path / "next" / "best" / "disclosure.json").read_text()) == disclosed
    assert disclosed["goes_on_from"] == {"run": str(source), "steps": 1, "rewards": {"digits-parity": "grade"}}


OTHER_ROWS = [
    ({"reward": "grade"}, {"reward": "holdout"}, [r"config\.task\.reward\b.*'grade'.*'holdout'", r"\bholdout_fraction\b"]),
    ({"reward": "holdout"}, {"reward": "grade"}, [r"config\.task\.reward\b.*'holdout'.*'grade'"]),
    ({"reward": "holdout"}, {"reward": "holdout", "seed": 3}, [r"config\.seed\b.*\b0\b.*\b3\b"]),
    (
        {"reward": "holdout"},
        {"reward": "holdout", "holdout_fraction": 0.3},
        [r"config\.task\.holdout_fraction\b.*\b0\.2\b.*\b0\.3\b"],
    ),
    (
        {"reward": "holdout", "holdout_folds": 2},
        {"reward": "holdout", "holdout_folds": 3},
        [r"config\.task\.holdout_folds\b.*\b2\b.*\b3\b"],
    ),
]


@pytest.mark.parametrize(("there", "here", "said"), OTHER_ROWS, ids=[" ".join(case[2][:1]) for case in OTHER_ROWS])
def test_scores_of_other_rows_are_refused_before_anything_is_copied(tmp_path, prepare, there, here, said):
    source = make_run(tmp_path / "first", [prepare(**there)])
    with pytest.raises(RunError) as caught:
        continue_run(tmp_path / "next", source, [prepare(**here)])
    for part in (*said, re.escape(str(source)), r"config\.train\.resume_from\b", "--workdir"):
        assert re.search(part, str(caught.value)), part
    assert not (tmp_path / "next" / "journal.jsonl").exists()
    assert not (tmp_path / "next" / "best").exists()
    assert not any((tmp_path / "next" / "checkpoints").iterdir())


def test_other_data_with_equal_settings_are_refused(tmp_path, prepare):
    task = prepare()
    source = make_run(tmp_path / "first", [dataclasses.replace(task, fingerprint="0" * 64)])
    with pytest.raises(RunError, match="digits-parity"):
        continue_run(tmp_path / "next", source, [task])


def test_continue_one_of_several_competitions_then_add_another(tmp_path, prepare):
    """A run records the rows behind all scores in its journal, also for competitions that it no longer has."""
    tasks = [prepare("digits-parity", "holdout"), prepare("diabetes", "holdout"), prepare("breast-cancer", "holdout")]
    several = make_run(tmp_path / "several", tasks[:2])
    standing, _ = continue_run(tmp_path / "alone", several, tasks[:1])
    assert set(standing.frontiers) == {"digits-parity"}
    assert standing.frontiers["digits-parity"].best.task == "digits-parity"
    grade = json.loads((tmp_path / "alone" / "best" / "grade.json").read_text())
    assert grade["competition"] == "digits-parity"
    assert {row["task"] for row in standing.rewards} == {"digits-parity", "diabetes"}

    alone = make_run(tmp_path / "further", tasks[:1], earlier=standing.rewards)
    joined, _ = continue_run(tmp_path / "joined", alone, [tasks[0], tasks[2]])
    assert joined.frontiers["breast-cancer"].best is None
    assert (tmp_path / "joined" / "best" / "digits-parity" / "grade.json").exists()
    with pytest.raises(RunError, match=r"diabetes.*config\.task\.reward\b.*'holdout'.*'grade'"):
        continue_run(tmp_path / "back", alone, [prepare("diabetes", "grade")])
    continue_run(tmp_path / "back too", alone, [tasks[1]])


def test_programs_without_recorded_rows_are_refused(prepare):
    task = prepare()
    for rows, message in (
        ([], task.id),
        ([{"task": task.id}], r"\bfingerprint\b"),
        ([reward_rows([task])[0] | {"fingerprint": 7}], r"\bfingerprint\b.*\b7\b"),
        ([reward_rows([task])[0] | {"fingerprint": "7", "settings": [1, [2], {}, [[], 4]]}], r"\[\].*\b4\b"),
    ):
        with pytest.raises(RunError, match=message):
            check_reward_rows(rows, [{"task": task.id}], [task], what="It", remedy="Begin anew.")
    check_reward_rows([], [{"task": "another"}], [task], what="It", remedy="")


def test_weaker_isolation_is_inherited(tmp_path, prepare):
    """Also along a chain of runs. A run without recorded isolation cannot be continued."""
    task = prepare()
    weak = Isolation(False, ("unsafe-subprocess: NO ISOLATION",))
    source = make_run(tmp_path / "first", [task], isolation=weak)
    _, isolation = continue_run(tmp_path / "next", source, [task])
    assert isolation == Isolation(False, (*weak.lines, *SANDBOX.lines))
    (source / "disclosure.json").unlink()
    with pytest.raises(RunError, match=r"disclosure\.json"):
        continue_run(tmp_path / "third", source, [task])
    (source / "disclosure.json").write_text("{}")
    with pytest.raises(RunError, match=r"disclosure\.json"):
        continue_run(tmp_path / "third", source, [task])


def test_run_with_checkpoints_does_not_need_its_source(tmp_path, prepare):
    """And the record of its source stays."""
    task = prepare()
    source = make_run(tmp_path / "first", [task], isolation=Isolation(False, ("none",)))
    continue_run(tmp_path / "next", source, [task])
    with open_workdir(tmp_path / "next", {}, "train") as workdir:
        journal = Journal(workdir.journal_path)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=2, every=0)
        checkpoints.save(1, state_of(8), HostState.of(1, [], reward_rows([task]), journal).to_json())
        checkpoints.close()
    source.rename(tmp_path / "gone")
    standing, isolation = continue_run(tmp_path / "next", source, [task])
    assert (standing.first_step, standing.step) == (1, 2)
    assert isolation == Isolation(False, ("none", *SANDBOX.lines))
    assert json.loads((tmp_path / "next" / "disclosure.json").read_text())["goes_on_from"]["run"] == str(source)


def test_resumed_run_detects_a_task_prepared_from_other_data(tmp_path, prepare):
    task = prepare()
    path = make_run(tmp_path / "run", [task])
    standing, _ = continue_run(path, "", [task])
    assert standing.step == 1
    with pytest.raises(RunError, match=r"heckpoint 0\b(?s:.)*digits-parity"):
        continue_run(path, "", [dataclasses.replace(task, fingerprint="0" * 64)])


def test_missing_best_program_of_the_source_is_reported(tmp_path, prepare):
    task = prepare()
    source = make_run(tmp_path / "first", [task])
    (source / "best" / "grade.json").write_text('{"id": "0009-000-000", "competition": "digits-parity"}')
    notes = []
    continue_run(tmp_path / "next", source, [task], notes.append)
    assert not (tmp_path / "next" / "best").exists()
    (note,) = notes
    assert "0000-000-000" in note
    assert str(source) in note

"""Reuse of constructions: programs that improve the value of their parent, through the stages of a loop with scripted replies."""

import dataclasses
import hashlib
import json
import types

import numpy as np
import pytest

from discover_jax import preparation, stages
from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import from_json, to_json
from discover_jax.archive.ranking import NO_MEASUREMENTS
from discover_jax.config import default_config
from discover_jax.exceptions import ConfigError, RunError
from discover_jax.execution import Executor, sandbox_spec, values
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.hosts.processes import ALONE
from discover_jax.runs.best import grade_of, read_best, write_best
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.outputs import MOST_BYTES, Outputs, output_of
from discover_jax.runs.recorder import NullRecorder
from discover_jax.runs.reward_rows import check_reward_rows, reward_rows
from discover_jax.tasks.configured import prepare_tasks
from discover_jax.tasks.prepare import prepare_task
from discover_jax.text.chat import Rendered
from discover_jax.text.prompts import PromptSettings, build_prompt
from discover_jax.text.reply import Extracted
from discover_jax.types import PARENT_OUTPUT, SEED, Execution, Grade, Outcome, Rollout, RunKind, StopReason, Verdict

PROBLEM = """\
from discover_jax.tasks.problem import Evaluation, Problem, Rejection


def evaluate(program):
    value = program.call("run")
    if not isinstance(value, list) or not all(x == 1 for x in value):
        raise Rejection("run() must return a list of ones")
    return Evaluation(float(len(value)))


PROBLEM = Problem(
    id="ones", description="Return many ones.", evaluate=evaluate, seed_program="def run():\\n    return [1]\\n", reuse_output=True
)
"""
LONGER = f"""\
import json, os

def run():
    return [1, *(json.load(open("{PARENT_OUTPUT}")) if os.path.exists("{PARENT_OUTPUT}") else [])]
"""


class Chat:
    """A chat format of one token per character."""

    names = ()

    def render(self, user, developer=""):
        text = f"{developer}\n{user}"
        return Rendered(tuple(range(len(text))), text)


class Scripted:
    """A sampler whose replies are empty: the test replaces `stages.extracted`."""

    def sample(self, frozen, lora, prompts, group_size, *, seed, step, on_progress):
        for group in range(len(prompts)):
            for index in range(group_size):
                empty = np.zeros(1, np.int32)
                yield Rollout(group, index, empty, empty, np.zeros(1, np.float32), np.ones(1, bool), StopReason.STOP_TOKEN)


def prepared(tmp_path, text=PROBLEM, **settings):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "ones.py").write_text(text)
    return prepare_task(str(tmp_path / "ones.py"), raw=None, reward="grade", folder=tmp_path / "task", **settings)


@dataclasses.dataclass
class Loop:
    """The stages of a search that touch returned values, without a model."""

    run: types.SimpleNamespace
    frontier: Frontier
    journal: list[str]

    def step(self, step: int, recorder: "Keeper") -> None:
        policy = types.SimpleNamespace(frozen=None, lora=None, chat=Chat(), optimizer_steps=0)
        task = self.run.tasks[0]
        groups = stages.select_parents(self.run, {task.id: self.frontier}, step)
        prompts = stages.write_prompts(self.run, policy, groups, step)
        sampled = stages.sample_and_submit(self.run, policy, groups, prompts, step)
        graded = stages.grade(self.run, groups, sampled, step, range(len(groups)))
        self.frontier = stages.archive_attempts(self.run, policy, {task.id: self.frontier}, graded.attempts)[task.id]
        self.journal += map(to_json, graded.attempts)
        recorder.keep(self.frontier, graded)


class Keeper:
    """Stores values as `RunRecorder` does."""

    def __init__(self, outputs):
        self.outputs = outputs

    def keep(self, frontier, graded):
        archived = {state.id for state in frontier.archive.states}
        for attempt in graded.attempts:
            if attempt.id in archived:
                self.outputs.put(graded.verdicts[attempt.group, attempt.index].execution.result)


@pytest.mark.sandbox
def test_scores_climb_over_steps_and_a_resumed_search_repeats_them(tmp_path, monkeypatch):
    task = prepared(tmp_path)
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    replies = [Extracted(LONGER), Extracted(f"{LONGER}# 1\n")]
    monkeypatch.setattr(stages, "extracted", lambda rollout, chat, edits_of, names: replies[rollout.index])
    config = default_config()
    config.task.competition, config.groups, config.group_size = task.source, 2, 2
    config.reuse.sampler, config.reuse.epsilon = "greedy", 0.0
    limits = ResourceLimits(seconds=20.0, cores=1, memory_bytes=400 * MIB)
    with Executor([task], limits, workers=1, cache_dir=tmp_path / "cache") as executor:

        def loop(outputs):
            seeds = preparation.run_seed_programs(config.task, [task], executor, ALONE, outputs.parent / "seeds.json", Outputs(outputs))
            parts = {"config": config, "tasks": [task], "executor": executor, "slots_H": [1], "processes": ALONE, "sampler": Scripted()}
            parts["checkpoints"] = Checkpoints(outputs.parent / "checkpoints", keep=1, every=0)
            settings = PromptSettings("full", 20_000)
            run = types.SimpleNamespace(
                **parts, kind=RunKind.SEARCH, recorder=NullRecorder(), outputs=Outputs(outputs), prompt_settings=settings
            )
            return Loop(run, Frontier(Archive((), 10), seed=seeds[task.id]), [])

        (tmp_path / "unbroken").mkdir()
        unbroken = loop(tmp_path / "unbroken" / "outputs")
        checkpoints = []
        for step in range(3):
            unbroken.step(step, Keeper(unbroken.run.outputs))
            checkpoints.append((unbroken.frontier.archive.to_json(), list(unbroken.journal)))
        resumed = loop(tmp_path / "unbroken" / "outputs")
        rows = json.loads(json.dumps(checkpoints[0][0]))
        attempts = [from_json(row) for row in checkpoints[0][1]]
        resumed.frontier = dataclasses.replace(Frontier.resumed(Archive.from_json(rows, 10), attempts), seed=resumed.frontier.seed)
        resumed.journal = list(checkpoints[0][1])
        for step in (1, 2):
            resumed.step(step, Keeper(resumed.run.outputs))
    journal = [from_json(row) for row in unbroken.journal]
    assert [attempt.score for attempt in journal] == [2.0] * 4 + [3.0] * 4 + [4.0] * 4
    assert {attempt.code for attempt in journal} == {LONGER, f"{LONGER}# 1\n"}  # the cache and the archive tell their parents apart
    assert len({attempt.output for attempt in journal}) == 3
    assert resumed.journal == unbroken.journal
    assert [len(state.code) for state in unbroken.frontier.archive.states if state.score == 4.0] == [len(LONGER), len(LONGER) + 4]


def test_the_prompt_names_the_file_only_if_the_parent_has_a_value(tmp_path):
    task = prepared(tmp_path)
    parent = dataclasses.replace(SEED, id="a", parent_id="seed", code="x = 1", score=1.0, value=1.0, output="0" * 64)

    def text(state):
        return build_prompt(task, state, (), PromptSettings("full", 20_000), Chat(), 0, 0).text

    assert f'json.load(open("{PARENT_OUTPUT}"))' in text(parent)
    assert PARENT_OUTPUT not in text(dataclasses.replace(parent, output="")) + text(SEED)


def test_output_is_recorded_only_where_children_may_read_it(tmp_path):
    def verdict(result, outcome=Outcome.OK):
        return Verdict(outcome, Grade(True, "", 1.0, 1.0), Execution(Outcome.OK, result, "", "", 1.0))

    task = prepared(tmp_path)
    assert len(output_of(task, verdict(b"[1]\n"))) == 64
    off = dataclasses.replace(task, reuse_output=False)
    ignored = [(off, verdict(b"[1]\n")), (task, verdict(b"")), (task, verdict(None))]
    ignored.append((task, verdict(b"[1]\n", Outcome.INVALID_SUBMISSION)))
    assert {output_of(*each) for each in ignored} == {""}
    longest = b"1" * MOST_BYTES
    assert output_of(task, verdict(longest)) == hashlib.sha256(longest).hexdigest()
    assert output_of(task, verdict(longest + b"1")) == "too-long:" + hashlib.sha256(longest + b"1").hexdigest()


def test_values_that_are_too_long_tell_programs_apart_but_are_not_stored(tmp_path):
    task = prepared(tmp_path)
    states = [
        dataclasses.replace(SEED, id=id, parent_id="seed", code="x = 1", score=score, value=score, output=f"too-long:{id * 64}")
        for id, score in (("a", 1.0), ("b", 2.0))
    ]
    assert [state.id for state in Archive((), 10).add(states).states] == ["b", "a"]
    assert NO_MEASUREMENTS.add(states).places == {"a": 0, "b": 1}
    outputs = Outputs(tmp_path / "outputs")
    assert outputs.for_all(ALONE, states) == {}
    outputs.check(states)
    outputs.bring(Outputs(tmp_path / "other"), states)
    assert not (tmp_path / "outputs").exists()
    assert PARENT_OUTPUT not in build_prompt(task, states[0], (), PromptSettings("full", 20_000), Chat(), 0, 0).text


def test_the_config_decides_and_the_score_depends_on_it(tmp_path):
    on, off = prepared(tmp_path / "on"), prepared(tmp_path / "off", reuse_output="off")
    assert (on.reuse_output, off.reuse_output) == (True, False)
    assert "reuse_output" in dict(on.settings)
    assert "reuse_output" not in dict(off.settings)  # as in versions without it
    assert "value that its parent returned" in on.disclosure.text
    assert "parent" not in off.disclosure.text
    with pytest.raises(ConfigError, match=r"config\.task\.reuse_output\b.*hidden_inputs"):
        prepared(tmp_path / "hidden", PROBLEM.replace("reuse_output", "hidden_inputs"), reuse_output="on")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"competition": "digits-parity", "reuse_output": "on"}, "reuse_output = 'on'"),
        ({"competition": "digits-parity", "reuse_output": "off"}, "reuse_output = 'off'"),
        ({"reward": "holdout"}, "reward = 'holdout'"),
        ({"reward": "holdout", "holdout_folds": 3}, "reward = 'holdout'.*holdout_folds"),
        ({"reward": "holdout", "selection_fraction": 0.1}, "reward = 'holdout'.*selection_fraction"),
        ({"holdout_folds": 3}, "holdout_folds"),
        ({"selection_fraction": 0.1}, "selection_fraction"),
    ],
)
def test_settings_without_an_effect_are_refused(tmp_path, changes, name):
    (tmp_path / "ones.py").write_text(PROBLEM)
    config = default_config()
    config.task.update({"competition": str(tmp_path / "ones.py"), **changes})
    with pytest.raises(ConfigError, match=rf"config\.task\.{name}"):
        prepare_tasks(config.task, folder=tmp_path / "task", seed=0)
    assert not (tmp_path / "task").exists()


def test_settings_may_affect_one_task_of_several(tmp_path):
    (tmp_path / "ones.py").write_text(PROBLEM)
    config = default_config()
    config.task.competition, config.task.reuse_output, config.task.reward = f"digits-parity,{tmp_path / 'ones.py'}", "off", "holdout"
    digits, ones = prepare_tasks(config.task, folder=tmp_path / "task", seed=0)
    assert (digits.reward_source, ones.reuse_output) == ("holdout", False)


def test_another_choice_is_named_where_scores_are_compared(tmp_path):
    on, off = prepared(tmp_path / "on"), prepared(tmp_path / "off", reuse_output="off")
    with pytest.raises(RunError, match=r"config\.task\.reuse_output: .*not used in this run"):
        check_reward_rows(reward_rows([on]), [], [off], what="It", remedy="")
    changed = prepared(tmp_path / "changed", PROBLEM + "# changed\n")
    with pytest.raises(RunError, match=r"SHA-256 of the definition's file: "):
        check_reward_rows(reward_rows([on]), [], [changed], what="It", remedy="")


def test_missing_and_damaged_values_are_errors(tmp_path):
    outputs = Outputs(tmp_path / "outputs")
    outputs.put(b"value")
    outputs.put(b"value")
    (path,) = (tmp_path / "outputs").iterdir()
    state = dataclasses.replace(SEED, output=path.stem)
    assert outputs.for_all(ALONE, [state, state, SEED]) == {path.stem: b"value"}
    other = Outputs(tmp_path / "other")
    other.bring(outputs, [state])
    path.write_bytes(b"Value")
    with pytest.raises(RunError, match=f"{path.stem}.*checksum mismatch"):
        outputs.check([state])
    path.unlink()
    with pytest.raises(RunError, match=rf"{path.stem}.*Restore"):
        outputs.for_all(ALONE, [state])
    assert other.get(path.stem) == b"value"


def test_the_bundle_of_the_best_program_has_the_value_that_it_read(tmp_path):
    task = prepared(tmp_path)
    best = dataclasses.replace(SEED, id="0000-000-000", parent_id="seed", code=LONGER, score=2.0, value=2.0, task=task.id)
    verdict = Verdict(Outcome.OK, Grade(True, "", 2.0, 2.0), Execution(Outcome.OK, b"[1,1]\n", "", "", 1.0))
    grade = grade_of(task, best, verdict, 0, b"[1]\n")
    files = {"disclosure": b"{}\n", "rerun": "", "calls": True}
    write_best(tmp_path / "best", lineage=[best], submission=b"[1,1]\n", grade=grade, parent_output=b"[1]\n", **files)
    assert read_best(tmp_path / "best", best, task.id) == (grade, b"[1,1]\n", b"[1]\n")
    (tmp_path / "best" / "parent_output.value").write_bytes(b"[2]\n")
    assert read_best(tmp_path / "best", best, task.id) is None
    assert "parent_output_sha256" not in grade_of(task, best, verdict, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 0.1, float("inf"), "a", None], '[1, 0.1, Infinity, "a", null]'),
        ({"x": np.array([[0.1, 2.0]])}, '{"x": [[0.1, 2.0]]}'),
        (np.array([1 + 2j]), "[[1.0, 2.0]]"),
        (np.array(3, np.uint8), "3"),
    ],
    ids=["plain", "array", "complex", "scalar"],
)
def test_values_are_json_for_programs(value, text):
    assert values.to_json(values.decode(values.encode(value, 1000))) == text

"""The stages of a step with a scripted policy that answers with edits: prompts, programs, verdicts and the journal."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).with_name("faults")))

from remainders_problem import ROWS, SEED_PROGRAM

from discover_jax import config as settings
from discover_jax import preparation, stages, typed_settings
from discover_jax.archive.archive import Archive
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.execution import Executor, sandbox_spec
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.hosts.processes import ALONE
from discover_jax.policy import APPRENTICE, Policy
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.recorder import NullRecorder
from discover_jax.sampling.schedule import Progress
from discover_jax.tasks.configured import prepare_tasks
from discover_jax.text.harmony import Harmony
from discover_jax.text.tokenizer import load_tokenizer
from discover_jax.types import Outcome, Rollout, RunKind, StopReason

PROBLEM = Path(__file__).with_name("faults") / "remainders_problem.py"


def block(search, new):
    return f"<<<<<<< SEARCH\n{search}\n=======\n{new}\n>>>>>>> REPLACE\n"


ONES, ZEROS = f"    return [1] * {ROWS}", f"    return [0] * {ROWS}"
EXACT = f"    return [int(row % 7 < 3) for row in range({ROWS})]"
PRINTS = "    print('all ones')"
WHOLE = f"def run():\n    return [1, 0] * {ROWS // 2}"
REPLIES = (
    (
        f"Zeros are more frequent.\n\n```\n{block(ONES, ZEROS)}```\n",
        f"```python\n{WHOLE}\n```",
        block("    return 1", ""),
        "I give up.",
    ),
    (block(PRINTS, "    print('zeros')") + block("print('zeros')", "print('exact')") + block(ZEROS, EXACT), block(ONES, ZEROS)),
    (block("def run():", "def run():") + block("xyz", ""), block(EXACT, EXACT)),
    ("no more",),
)
"""The answers of each step."""


class Scripted:
    """A sampler that answers as the script says."""

    def __init__(self, chat):
        self._chat = chat

    def sample(self, frozen, lora, prompts, group_size, *, seed, step, on_progress):
        tokenizer = self._chat.tokenizer
        opening = [tokenizer.special("<|channel|>"), *tokenizer.encode("final"), tokenizer.special("<|message|>")]
        for index, reply in enumerate(REPLIES[step]):
            tokens = np.asarray([*opening, *tokenizer.encode(reply), *self._chat.stop_ids], np.int32)
            shape = len(tokens)
            yield Rollout(0, index, prompts[0].tokens_P, tokens, np.zeros(shape, np.float32), np.ones(shape, bool), StopReason.STOP_TOKEN)
            on_progress(Progress(index + 1, group_size, 1, 1.0))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The prompt and the attempts of each step, as the journal has them."""
    folder = tmp_path_factory.mktemp("steps")
    config = settings.default_config()
    config.name, config.task.competition = "edits", str(PROBLEM)
    config.prompt.answer, config.sampling.max_prompt_tokens = "edits", 20_000
    config.groups, config.group_size, config.reuse.epsilon = 1, 4, 0.0
    chat = Harmony(load_tokenizer(APPRENTICE))
    policy = Policy(None, None, chat)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_spec, "PRELOAD", ())
        tasks = prepare_tasks(config.task, folder=folder / "task", seed=0)
        limits = ResourceLimits(seconds=60, cores=1, memory_bytes=900 * MIB)
        with Executor(tasks, limits, workers=1, cache_dir=folder / "cache") as executor:
            parts = {
                "sampler": Scripted(chat),
                "updater": None,
                "checkpoints": Checkpoints(folder / "checkpoints", keep=1, every=0),
                "recorder": NullRecorder(),
                "executor": executor,
                "all_tasks": tasks,
                "retests": {},
            }
            outputs = Outputs(folder / "outputs")
            run = stages.Run(
                config, RunKind.SEARCH, ALONE, tasks, slots_H=[1], prompt_settings=typed_settings.prompt_settings(config), outputs=outputs,
                first_step=0, last_step=len(REPLIES), **parts,
            )  # fmt: skip
            seeds = preparation.run_seed_programs(config.task, tasks, executor, ALONE, folder / "seeds.json", outputs)
            frontiers = {"labels": Frontier(Archive((), 100), seed=seeds["labels"])}
            journal = Journal(folder / "journal.jsonl")
            for step, replies in enumerate(REPLIES):
                groups = stages.select_parents(run, frontiers, step)
                prompts = stages.write_prompts(run, policy, groups, step)
                sampled = stages.sample_and_submit(run, policy, groups, prompts, step)
                graded = stages.grade(run, groups, sampled, step, range(1))
                journal.append(graded.attempts)
                frontiers = stages.archive_attempts(run, policy, frontiers, graded.attempts)
                found.append((prompts[0].text, journal.read()[-len(replies) :], sampled.shown()))
    return found


def test_the_journal_has_the_programs_after_their_edits(steps):
    (_, first, shown), (_, second, _), (_, third, _), _ = steps
    zeros = SEED_PROGRAM.replace(ONES, ZEROS).strip()
    assert [attempt.code for attempt in first] == [zeros, WHOLE, None, None]
    assert [attempt.outcome for attempt in first] == [Outcome.OK, Outcome.OK, Outcome.FORMAT_ERROR, Outcome.FORMAT_ERROR]
    assert (shown.failures[Outcome.FORMAT_ERROR], shown.programs_total) == (2, 2)
    assert first[2].detail == "Edit 1 of 1: its SEARCH text occurs 0 times in the program; its first line is 'return 1'."
    assert "neither an edit" in first[3].detail
    # The next step edits the best program, not the seed.
    exact = zeros.replace(PRINTS, "    print('exact')").replace(ZEROS, EXACT)
    assert [(attempt.parent_id, attempt.code) for attempt in second] == [(first[0].id, exact), (first[0].id, None)]
    assert (second[0].score, second[0].stdout) == (1.0, "exact\n")
    assert "Edit 1 of 1" in second[1].detail
    assert {attempt.parent_id for attempt in third} == {second[0].id}
    assert "Edit 2 of 2" in third[0].detail
    assert third[1].detail == "The edits change nothing."


def test_prompts_ask_for_edits_and_show_why_the_last_ones_failed(steps):
    prompts = [prompt for prompt, _, _ in steps]
    for prompt in prompts:
        assert "<<<<<<< SEARCH" in prompt
        assert "Answer with edits of your last program." in prompt
    assert SEED_PROGRAM in prompts[0]
    assert EXACT in prompts[2]
    assert "failed" not in "".join(prompts[:3])
    assert "The last attempt to improve it failed:\n\n```\nformat error\nThe edits change nothing.\n```" in prompts[3]

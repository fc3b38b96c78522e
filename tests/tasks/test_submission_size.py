"""The limit of submissions follows from the competition's sample, and every honest submission is below it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from discover_jax import config as settings
from discover_jax import typed_settings
from discover_jax.exceptions import ConfigError
from discover_jax.execution.limits import ResourceLimits
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.submission_size import LEAST_BYTES, MIB, needed_bytes, result_bytes, stated_bytes
from discover_jax.text.prompts import _contract


def test_the_least_limit_is_that_of_the_sandbox():
    assert ResourceLimits().result_bytes == LEAST_BYTES


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("columns", [1, 5, 100])
@pytest.mark.parametrize("value", [-1.2345678901234567e-100, 0.1 + 0.2, np.float64(1e300) / 3, np.nan, 123456789012345678])
def test_honest_submissions_have_room(tmp_path, rows, columns, value):
    ids = {"id": [f"row-{number}" for number in range(rows)]}
    sample, submission = (pd.DataFrame(ids | {f"class {c}": v for c in range(columns)}) for v in (0, value))
    sample.to_csv(tmp_path / "sample.csv", index=False)
    assert len(submission.to_csv(index=False).encode()) <= needed_bytes(tmp_path / "sample.csv")


@pytest.fixture
def task_with(write_competition, tmp_path):
    """A task with a sample submission of so many rows and columns of predictions."""
    task = prepare_task(write_competition(), raw=None, reward="grade", folder=tmp_path / "task")

    def make(rows: int, columns: int = 1):
        folder = tmp_path / f"{rows}-{columns}"
        (folder / "public").mkdir(parents=True)
        line = f"{10**9},{','.join('0' * columns)}\n"
        names = ",".join(f"c{column}" for column in range(columns))
        (folder / "public" / "sample_submission.csv").write_text(f"id,{names}\n" + line * rows)
        return dataclasses.replace(task, folder=folder)

    return make


@pytest.mark.parametrize(
    ("rows", "columns", "limit", "stated"),
    [(40, 1, 8, False), (30_000, 1, 8, False), (60_000, 1, 8, True), (400_000, 1, 23, True), (20_000, 50, 35, True)],
)
def test_limit_follows_from_the_sample(task_with, rows, columns, limit, stated):
    task = task_with(rows, columns)
    assert result_bytes([task], 0) == limit * MIB
    assert stated_bytes([task], 0) == (limit * MIB if stated else 0)


def test_limit_of_several_tasks_is_that_of_the_largest(task_with):
    assert result_bytes([task_with(40), task_with(400_000)], 0) == 23 * MIB


def test_setting_overrides_the_derived_limit_and_prompts_state_it(task_with):
    task = task_with(40)
    config = settings.default_config()
    assert typed_settings.program_limits(config, [task]) == ResourceLimits()  # also the key of cached verdicts
    prompt = _contract(task, typed_settings.prompt_settings(config, (), [task]), edits=False)
    assert "MiB" not in prompt
    config.execution.result_mib = 64
    assert typed_settings.program_limits(config, [task]).result_bytes == 64 * MIB
    assert "no GPU, no network, a submission of at most 64 MiB as CSV.\n" in _contract(
        task, typed_settings.prompt_settings(config, (), [task]), edits=False
    )


def test_limit_below_the_sample_is_refused(task_with):
    with pytest.raises(ConfigError, match=r"execution\.result_mib = 1\b.*'boats'"):
        result_bytes([task_with(400_000)], 1)

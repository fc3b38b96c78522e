"""Test-time training on competitions or problems: `python -m discover_jax.main --config=configs/quickstart.py`.

Prepares a run, then loops over its steps, each as in section 4.1 of *Applying Discover (Test-Time Training) to
MLE-Bench*: select parents, write prompts, sample rollouts and execute their programs, grade, estimate advantages, update the adapter,
archive, record. `discover_jax.search` is the same loop without the update. `discover_jax.preparation` prepares, and
`discover_jax.stages` has the stages.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from discover_jax import cli, dry_run
from discover_jax import config as settings
from discover_jax.archive.frontier import Frontier
from discover_jax.hosts.processes import ALONE, Processes
from discover_jax.policy import Policy
from discover_jax.preparation import check_agreement, prepared
from discover_jax.runs.compilations import cache_compilations
from discover_jax.runs.console import Console, QuietConsole, make_console
from discover_jax.runs.recorder import StepRecord
from discover_jax.runs.tracking import WandbSettings, open_trackers
from discover_jax.runs.workdir import open_shared_workdir
from discover_jax.stages import (
    Graded,
    Run,
    archive_attempts,
    begin_checkpoint,
    choose_best,
    estimate,
    finish_checkpoint,
    grade,
    join_estimates,
    sample_and_submit,
    select_parents,
    stage_metrics,
    waves,
    write_prompts,
)
from discover_jax.types import RunKind
from discover_jax.waves import add_wave, begin_update, finish_update


def run(config: Any, folder: Path, processes: Processes = ALONE, *, kind: RunKind = RunKind.TRAIN, console: Console | None = None) -> None:
    """Runs or resumes a whole run.

    Args:
      config: validated (`discover_jax.config.validate`).
      folder: the run directory; docs/run_folder.md lists its files.
      processes: of the run, one a host; all call this alike (see docs/scaling.md). The first writes the run directory and the console.
      kind: training, or the search baseline, whose policy stays the base model.
      console: where progress is shown; by default what fits the terminal.

    Raises:
      DiscoverError: what went wrong and what to do. The run can be resumed from its last checkpoint.
    """
    cache_compilations()
    console = (console or make_console()) if processes.leads else QuietConsole()
    try:
        check_agreement(processes, config, kind)
        with (
            open_shared_workdir(folder, settings.flatten(config), kind.value, processes, console.note) as workdir,
            open_trackers(workdir, _wandb(config, kind), leads=processes.leads) as trackers,
            prepared(config, workdir, processes, kind, console, trackers) as (started, policy, frontiers),
        ):
            discover(started, policy, frontiers)
    finally:
        console.close()


def _wandb(config: Any, kind: RunKind) -> WandbSettings | None:
    tracking = config.tracking
    if tracking.wandb == "off":
        return None
    return WandbSettings(tracking.wandb, tracking.project, tracking.entity, config.name, kind.value, settings.flatten(config))


def discover(run: Run, policy: Policy, frontiers: Mapping[str, Frontier]) -> None:
    """The loop over the steps of a run. However it ends, the checkpoint that is being written is finished first."""
    try:
        _run_steps(run, policy, frontiers)
    except BaseException:
        _finish_last_checkpoint(run)
        raise


def _run_steps(run: Run, policy: Policy, frontiers: Mapping[str, Frontier]) -> None:
    recorder = run.recorder
    if run.first_step > run.last_step - run.config.train.steps and _chooses_after(run, run.first_step - 1):
        recorder.choose(choose_best(run, frontiers))  # a kill may have come before or within it
    for step in range(run.first_step, run.last_step):
        recorder.begin_step(step)
        groups = select_parents(run, frontiers, step)
        prompts = write_prompts(run, policy, groups, step)
        sampled = sample_and_submit(run, policy, groups, prompts, step)  # programs start while others are written
        written = finish_checkpoint(run)  # of the step before: it was written during this step's sampling
        update = begin_update(run, policy, sampled.rollouts)
        graded_W, estimates_W = [], []
        for wave in waves(run, len(groups)):  # one by default; with several, the programs of later ones run during the update
            graded_W.append(grade(run, groups, sampled, step, wave))
            estimates_W.append(estimate(run, groups, graded_W[-1].attempts, frontiers, step, wave))
            add_wave(run, update, sampled.rollouts, estimates_W[-1].advantages)
        graded, estimates = Graded.joined(graded_W), join_estimates(run, estimates_W)
        policy, learned = finish_update(run, policy, update, sampled.rollouts)
        frontiers = archive_attempts(run, policy, frontiers, graded.attempts)
        recorder.record(
            StepRecord(
                step,
                prompts,
                [group.parent_output for group in groups],
                sampled.rollouts,
                graded.verdicts,
                estimates.advantages,
                graded.attempts,
                frontiers,
                metrics=stage_metrics(run, sampled, graded.verdicts) | estimates.metrics | learned | written,
            )
        )
        begin_checkpoint(run, policy, frontiers, step)
        recorder.end_step()
        if _chooses_after(run, step):
            finish_checkpoint(run)
            recorder.choose(choose_best(run, frontiers))
    finish_checkpoint(run)
    recorder.choose(choose_best(run, frontiers))
    recorder.finish()


def _chooses_after(run: Run, step: int) -> bool:
    """Whether the best program is chosen by retests after this step, besides the choice at the end of the run."""
    every = run.config.finalists.every
    return every > 0 and (step + 1) % every == 0 and step + 1 < run.last_step


def _finish_last_checkpoint(run: Run) -> None:
    """Finishes the checkpoint that is being written, after an error, which matters more than another one: the caller raises it again."""
    step = run.checkpoints.writing
    if step is None:
        return
    try:
        try:
            run.recorder.note(
                f"finishing the checkpoint of step {step + 1}. Ctrl-C leaves it unfinished; the next start then repeats the step."
            )
        finally:  # even if standard output was closed
            run.checkpoints.finish()
    except KeyboardInterrupt:
        logging.warning("The checkpoint of step %d is left unfinished.", step + 1)
    except Exception as error:
        logging.error("While the checkpoint of step %d was finished: %s", step + 1, error)


if __name__ == "__main__":
    cli.launch(run, dry_run.run)

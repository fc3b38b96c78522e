"""The stages of a step. `main` calls them in order; each takes the run and the results of earlier stages.

The stages unpack the config: each passes plain values to the folder that does the work.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from discover_jax.archive.frontier import Frontier, states_of
from discover_jax.archive.selectors import ReuseSettings, kept_children, step_rng
from discover_jax.archive.selectors import select_parents as selected_parents
from discover_jax.execution.executor import Executor
from discover_jax.hosts.executions import StepExecutions
from discover_jax.hosts.processes import Processes
from discover_jax.learning.advantages import least_rollouts
from discover_jax.learning.estimates import Estimates, GradedGroup, estimate_step
from discover_jax.learning.signals import Diversity, results_of
from discover_jax.learning.update import Update
from discover_jax.policy import Policy
from discover_jax.runs.attempts import attempt_of
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import StepProgress
from discover_jax.runs.finalists import Choice, choose
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.recorder import Recorder
from discover_jax.sampling.sampler import Sampler
from discover_jax.sampling.schedule import PAGE, Progress
from discover_jax.tasks.prepare import AnyTask
from discover_jax.text.code import entry_names
from discover_jax.text.prompts import PromptSettings, asks_for_edits, build_prompt, choose_inspirations, program_fits
from discover_jax.text.reply import Extracted, extracted
from discover_jax.typed_settings import objective_of_step
from discover_jax.types import Attempt, Outcome, Prompt, Rollout, RolloutKey, RunKind, State, Verdict


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that does not change during a run, in this process.

    Attributes:
      config: validated.
      kind: training, or search without an update.
      processes: the run's processes, one per host.
      tasks: the competitions; groups take turns.
      all_tasks: those of the executor: the competitions, then their retests.
      retests: competition id -> numbers of its retests in `all_tasks`; empty without finalists.
      executor: runs programs on this host.
      slots_H: number of programs that each host runs at the same time.
      sampler, updater: the jitted parts.
      prompt_settings: style and limits of prompts.
      checkpoints: checkpoints in the run directory. All processes save and restore together.
      recorder: writes files and shows progress. All processes except the first have a null recorder.
      outputs: values that programs returned, for their children.
      first_step, last_step: range of the steps to run; `last_step` is excluded.
    """

    config: Any
    kind: RunKind
    processes: Processes
    tasks: Sequence[AnyTask]
    all_tasks: Sequence[AnyTask]
    retests: Mapping[str, Sequence[int]]
    executor: Executor
    slots_H: Sequence[int]
    sampler: Sampler
    updater: Update
    prompt_settings: PromptSettings
    checkpoints: Checkpoints
    recorder: Recorder
    outputs: Outputs
    first_step: int
    last_step: int


@dataclasses.dataclass(frozen=True)
class Group:
    """The competition and the parent of one group of rollouts.

    Attributes:
      task: the competition.
      parent: the state whose program the rollouts improve.
      failures: the last attempts on the parent, if all of them failed.
      inspirations: other programs that the prompt shows.
      parent_output: the value that the parent returned, if the programs may read it; otherwise empty.
    """

    task: AnyTask
    parent: State
    failures: Sequence[Attempt]
    inspirations: Sequence[State] = ()
    parent_output: bytes = b""


@dataclasses.dataclass
class Sampled:
    """The rollouts of a step. Their programs run while other rollouts are still being sampled.

    Attributes:
      total: number of rollouts that the step samples.
      executions: executions of the programs, over all hosts.
      adapter_step: optimiser steps that the adapter had seen.
      rollouts: finished rollouts.
      programs: the program of each finished rollout, or why it has none.
      progress: the sampler's last progress.
    """

    total: int
    executions: StepExecutions[RolloutKey]
    adapter_step: int
    rollouts: dict[RolloutKey, Rollout] = dataclasses.field(default_factory=dict)
    programs: dict[RolloutKey, Extracted] = dataclasses.field(default_factory=dict)
    progress: Progress | None = None

    def shown(self) -> StepProgress:
        """The current progress, for the console."""
        outcomes: Counter[Outcome] = self.executions.outcomes
        outcomes[Outcome.FORMAT_ERROR] += sum(program.code is None for program in self.programs.values())
        speed = self.progress.tokens / max(self.progress.seconds, 1e-9) if self.progress is not None else 0.0
        return StepProgress(len(self.programs), self.total, self.executions.done, self.executions.here, speed, outcomes)


@dataclasses.dataclass(frozen=True)
class Graded:
    """The graded rollouts of a step, or of one of its waves: `attempts` in the order of their keys, and the verdict on each program."""

    attempts: Sequence[Attempt]
    verdicts: Mapping[RolloutKey, Verdict]

    @classmethod
    def joined(cls, waves: "Sequence[Graded]") -> "Graded":
        """Those of a step from those of its waves, in order."""
        verdicts = {key: verdict for wave in waves for key, verdict in wave.verdicts.items()}
        return cls([attempt for wave in waves for attempt in wave.attempts], verdicts)


def select_parents(run: Run, frontiers: Mapping[str, Frontier], step: int) -> list[Group]:
    """The competition and the parent of each group. Competitions take turns across steps, so that all get equally many groups."""
    config = run.config
    tasks_G = [run.tasks[(step * config.groups + group) % len(run.tasks)] for group in range(config.groups)]
    reuse = ReuseSettings(
        config.reuse.sampler, config.reuse.epsilon, config.reuse.exploration, fresh=config.reuse.fresh, distinct=config.reuse.distinct
    )
    parents_G = selected_parents([task.id for task in tasks_G], frontiers, reuse, step_rng(config.seed, step))
    values = run.outputs.for_all(run.processes, parents_G)
    groups = []
    for task, parent in zip(tasks_G, parents_G, strict=True):
        frontier = frontiers[task.id]
        others = choose_inspirations(frontier.archive.states, parent, config.prompt.inspirations)
        groups.append(Group(task, parent, frontier.failures(parent), others, values.get(parent.output, b"")))
    return groups


def write_prompts(run: Run, policy: Policy, groups: Sequence[Group], step: int) -> list[Prompt]:
    """One prompt for each group."""
    shortened: list[str] = []
    prompts_G = [
        build_prompt(
            group.task, group.parent, group.failures, run.prompt_settings, policy.chat, number, step, shortened.append, group.inspirations
        )
        for number, group in enumerate(groups)
    ]
    if shortened:
        run.recorder.prompts_shortened(shortened, len(groups), run.prompt_settings.max_tokens)
    return prompts_G


def sample_and_submit(run: Run, policy: Policy, groups: Sequence[Group], prompts: Sequence[Prompt], step: int) -> Sampled:
    """Samples all rollouts. Each program is submitted as soon as its rollout ends; those of earlier waves of the update start first."""
    run.recorder.phase("sampling")
    executions = StepExecutions[RolloutKey](run.executor, run.slots_H, run.processes)
    sampled = Sampled(len(prompts) * run.config.group_size, executions, policy.optimizer_steps)
    wave_of = {group: number for number, wave in enumerate(waves(run, len(groups))) for group in wave}

    def follow(progress: Progress) -> None:
        run.checkpoints.check()  # rather than sample on for an hour
        sampled.progress = progress
        run.recorder.progress(sampled.shown())

    for rollout in run.sampler.sample(
        policy.frozen, policy.lora, prompts, run.config.group_size, seed=run.config.seed, step=step, on_progress=follow
    ):
        key = rollout.group, rollout.index
        sampled.rollouts[key] = rollout
        group = groups[rollout.group]
        edits_of = group.parent.code if asks_for_edits(run.prompt_settings, group.parent) else ""
        sampled.programs[key] = program = extracted(rollout, policy.chat, edits_of, entry_names(group.task.interface))
        if program.code is not None:
            executions.submit(key, program.code, run.tasks.index(group.task), group.parent_output, wave_of[rollout.group])
    return sampled


def waves(run: Run, groups: int) -> list[range]:
    """The numbers of the groups in each wave of the update, in order. The sizes differ by at most one; larger waves come first.

    A search run, which has no update, has one wave.
    """
    count = run.config.train.waves if run.kind.learns else 1
    sizes = [groups // count + (wave < groups % count) for wave in range(count)]
    return [range(sum(sizes[:wave]), sum(sizes[: wave + 1])) for wave in range(count)]


def grade(run: Run, groups: Sequence[Group], sampled: Sampled, step: int, wave: Sequence[int]) -> Graded:
    """Waits for the programs of the groups of a wave, and for their grades. All processes must call this for the same waves in order."""
    run.recorder.phase("running programs")
    keys = {key for key in sampled.rollouts if key[0] in wave}
    verdicts = sampled.executions.verdicts(lambda: run.recorder.progress(sampled.shown()), keys)
    attempts = []
    for key in sorted(keys):
        group, rollout = groups[key[0]], sampled.rollouts[key]
        program, verdict = sampled.programs[key], verdicts.get(key)
        attempts.append(attempt_of(group.task, step, group.parent, rollout, program.code, verdict, sampled.adapter_step, program.reason))
    return Graded(attempts, verdicts)


def estimate(
    run: Run, groups: Sequence[Group], attempts: Sequence[Attempt], frontiers: Mapping[str, Frontier], step: int, wave: range
) -> Estimates:
    """The advantages of the rollouts of a wave, from its attempts. `frontiers` are those before the step."""
    train, diversity = run.config.train, run.config.diversity
    objective = objective_of_step(train, step - (run.last_step - train.steps))
    known = {id: {results_of(state) for state in (frontier.seed, *frontier.archive.states)} for id, frontier in frontiers.items()}
    graded = [
        GradedGroup(
            [attempt for attempt in attempts if attempt.group == number],
            group.task.signals,
            known[group.task.id],
            group.task.failure_reward,
            _best_value(frontiers[group.task.id]) if train.frontier_base == "best" else None,
        )
        for number, group in ((number, groups[number]) for number in wave)
    ]
    means = Diversity(diversity.novelty_bonus, diversity.duplicates, diversity.copies, diversity.copy_tolerance)
    return estimate_step(graded, objective=objective, diversity=means, first=wave.start)


def join_estimates(run: Run, waves: Sequence[Estimates]) -> Estimates:
    """The estimates of a step from those of its waves. Notes the groups that are too small."""
    estimates = Estimates.joined(waves)
    if run.kind.learns and estimates.too_few:
        name, k = estimates.objective.estimator, estimates.objective.k
        run.recorder.note(
            f"{estimates.too_few} of {len(estimates.groups)} groups have too few different programs for config.train.advantage ="
            f" {name!r}, which needs at least {least_rollouts(name, k)}. The update skips them."
        )
    return estimates


def _best_value(frontier: Frontier) -> float | None:
    """The best reward so far, as measured, of the seed program or of an attempt; None before the first."""
    states = [frontier.best, frontier.seed] if frontier.ranking is None else [each.state for each in frontier.measurements.programs]
    return max((state.value for state in states if state is not None and state.value is not None), default=None)


def archive_attempts(run: Run, policy: Policy, frontiers: Mapping[str, Frontier], attempts: Sequence[Attempt]) -> dict[str, Frontier]:
    """The frontier of each competition after the step. A program that is too long for a prompt cannot become a parent."""
    children = kept_children(run.config.reuse.sampler, run.config.reuse.children)
    after = {}
    for task in run.tasks:
        own = [attempt for attempt in attempts if attempt.task == task.id]
        states = states_of(own)
        reusable = {state.id for state in states if program_fits(task, state, run.prompt_settings, policy.chat)}
        if len(reusable) < len(states):
            run.recorder.note(
                f"{len(states) - len(reusable)} programs do not fit a prompt of {run.prompt_settings.max_tokens:,} tokens"
                " (config.sampling.max_prompt_tokens), so they cannot be parents. The journal and best/ include them."
            )
        after[task.id] = frontiers[task.id].after(own, reusable=reusable, children=children)
    return after


def begin_checkpoint(run: Run, policy: Policy, frontiers: Mapping[str, Frontier], step: int) -> None:
    """Starts to write the checkpoint of the step in the background. All processes must call this."""
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.train_state)) / 1e6
    run.recorder.phase("checkpoint", f"{megabytes:,.0f} MB of adapter and optimiser" if run.kind.learns else "")
    run.checkpoints.begin(step, policy.train_state, run.recorder.host_state(frontiers))


def finish_checkpoint(run: Run) -> dict[str, float | None]:
    """Waits until the last checkpoint is complete. Returns metrics. All processes must call this.

    It must come before the next update, which donates the buffers that the checkpoint is copied from, and before anything of the next step
    is written: the journal may be at most one step ahead of the checkpoints.
    """
    run.recorder.phase("waiting for the checkpoint")
    return {"time/checkpoint_write_s": run.checkpoints.finish()}


def choose_best(run: Run, frontiers: Mapping[str, Frontier]) -> dict[str, Choice]:
    """The best program of each competition by retests of the best ones; empty without finalists. All processes call this."""
    if not run.retests:
        return {}

    def run_programs(programs: Sequence[tuple[str, int]]) -> list[Verdict]:
        run.recorder.phase("testing finalists", f"{len(programs)} programs")
        executions = StepExecutions[int](run.executor, run.slots_H, run.processes)
        for key, (program, task) in enumerate(programs):
            executions.submit(key, program, task)
        verdicts = executions.verdicts(while_waiting=lambda: None)
        return [verdicts[key] for key in range(len(programs))]

    return choose(run.tasks, frontiers, run.retests, run.all_tasks, run_programs, count=run.config.finalists.count)


def stage_metrics(run: Run, sampled: Sampled, verdicts: Mapping[RolloutKey, Verdict]) -> dict[str, float | None]:
    """Metrics of sampling and of the programs' executions; see `metrics.SCHEMA`."""
    assert sampled.progress is not None, "the sampler reports progress after each launch"
    executions = [verdict.execution for verdict in verdicts.values()]
    return {
        "sample/utilisation": sampled.progress.utilisation,
        "sample/set_aside": sampled.progress.set_aside,
        "sample/draft_accepted_frac": _ratio(sampled.progress.accepted, sampled.progress.drafted),
        "sample/draft_tokens_per_pass": _ratio(sampled.progress.passes + sampled.progress.accepted, sampled.progress.passes),
        "sample/cache_tokens": sampled.progress.pages * PAGE,
        "sample/compilations": run.sampler.compilations,
        "sample/forced_frac": sum(not rollout.chosen_T.all() for rollout in sampled.rollouts.values()) / sampled.total,
        "programs/seconds": sum(execution.seconds for execution in executions if not execution.cached),
        "programs/retried": sampled.executions.retried,
        "programs/cached_frac": sum(execution.cached for execution in executions) / max(len(executions), 1),
        **_waits(sampled.executions),
    }


def _waits(executions: StepExecutions[RolloutKey]) -> dict[str, float | None]:
    """How long the update waited for programs; empty without waves, where `time/execute_s` says all."""
    if len(executions.waits) == 1:
        return {}
    return {"time/execute_first_s": executions.waits[0], "time/programs_s": executions.tail_seconds}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

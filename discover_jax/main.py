"""Test-time training on one competition: `python -m discover_jax.main --config=configs/quickstart.py`.

`run` sets up and then loops over the steps of the report's section 4.1: select parents, write prompts, sample and execute at once, grade,
advantages, update, archive, checkpoint. `discover_jax.search` is the same loop without the update.
"""

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from discover_jax import __version__, cli, dry_run
from discover_jax import config as settings
from discover_jax.archive.archive import lineage
from discover_jax.archive.frontier import Frontier, states_of
from discover_jax.archive.journal import Journal
from discover_jax.archive.selectors import SELECTORS, diversify_parents, kept_children, step_rng
from discover_jax.engine import build_optimizer, build_sampler, build_update, row_tokens
from discover_jax.execution.cache import packages
from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import resource_limits
from discover_jax.hosts.executions import StepExecutions
from discover_jax.hosts.processes import ALONE, Processes, least
from discover_jax.learning.advantages import LEAST_ROLLOUTS, Advantages, advantage_metrics, estimate_groups, is_constant
from discover_jax.learning.packing import Batch, pack, pack_substeps
from discover_jax.learning.signals import Diversity, Signals, diversity_metrics, group_signals
from discover_jax.learning.train_state import TrainState, init_train_state
from discover_jax.learning.update import Update
from discover_jax.machines import device_memory
from discover_jax.policy import Policy, load_policy
from discover_jax.report.page import write_report
from discover_jax.runs.attempts import attempt_of, rollout_rows
from discover_jax.runs.best import bundle_dir, grade_of, write_best
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.compilations import cache_compilations
from discover_jax.runs.console import Console, Improvement, QuietConsole, StepProgress, make_console
from discover_jax.runs.disclosure import NAME as DISCLOSURE
from discover_jax.runs.disclosure import Isolation, write_disclosure
from discover_jax.runs.host_state import HostState
from discover_jax.runs.metrics import MetricsWriter, read_metrics
from discover_jax.runs.rerun import rerun_script
from discover_jax.runs.restore import RunState, restore
from discover_jax.runs.rollouts import write_rollouts
from discover_jax.runs.source import find_source
from discover_jax.runs.summary import Result, closing_lines, opening_lines, scale_warning, step_row
from discover_jax.runs.tracking import Trackers, open_trackers
from discover_jax.runs.workdir import Workdir, open_shared_workdir
from discover_jax.sampling.decoding import SecondPhase
from discover_jax.sampling.schedule import PAGE, Progress
from discover_jax.tasks.prepare import prepare_tasks
from discover_jax.tasks.task import Task
from discover_jax.text.harmony import answer_forced, answer_opening
from discover_jax.text.prompts import PromptSettings, build_prompt, installed_packages, program_fits
from discover_jax.text.reply import program_of
from discover_jax.types import Outcome, Rollout, RolloutKey, State, Verdict


def run(config: Any, folder: Path, processes: Processes = ALONE, *, learn: bool = True, console: Console | None = None) -> None:
    """Runs or resumes a whole run.

    Args:
      config: validated (`discover_jax.config.validate`).
      folder: of the run; see README for what it holds.
      processes: all call this alike (see docs/scaling.md). Each goes through every step, with its devices and its cores; the first alone
        writes journal, metrics, best/ and the console.
      learn: False for the search baseline: the adapter stays as it is, which is the base model.
      console: where progress is shown; by default what fits the terminal.

    Raises:
      DiscoverError: what went wrong and what to do; the run can be resumed from its last checkpoint.
    """
    cache_compilations()
    console = (console or make_console()) if processes.leads else QuietConsole()
    kind = "train" if learn else "search"
    try:
        _check_agreement(processes, config, kind)
        with (
            open_shared_workdir(folder, settings.flatten(config), kind, processes) as workdir,
            open_trackers(config, workdir, kind, leads=processes.leads) as trackers,
        ):
            _discover(config, workdir, processes, learn, console, trackers)
    finally:
        console.close()


def _discover(config: Any, workdir: Workdir, processes: Processes, learn: bool, console: Console, trackers: Trackers) -> None:
    # ------------------------------------------------------------------ the tasks, and the workers that run programs for them
    tasks = processes.first_then_others(lambda: prepare_tasks(config.task, folder=workdir.task_dir, seed=config.seed))
    processes.agree("the prepared tables and answers", [task.fingerprint for task in tasks], "Give all hosts the same raw data.")
    source = find_source(config, tasks, workdir, processes)
    limits = resource_limits(config.execution.seconds, config.execution.cores, config.execution.memory_gib)
    with Executor(
        tasks,
        limits,
        workers=config.execution.workers,
        cache_dir=config.execution.cache or workdir.cache_dir,
        backend=config.execution.backend,
        allow_weaker=config.execution.allow_weaker,
        ray_address=config.execution.ray_address,
        leads=processes.leads,
    ) as executor:
        search = {"learned": learn, "advantage": config.train.advantage if learn else None, "reuse": config.reuse.sampler}
        hosts = processes.gather({"slots": executor.slots, "isolated": executor.isolated, "way": executor.describe()})
        ways = tuple(dict.fromkeys(host["way"] for host in hosts if host["slots"]))
        isolation = Isolation(all(host["isolated"] for host in hosts), ways)
        if source is not None:
            isolation = source.isolation.after(isolation)
        goes_on_from = source.disclosed() if source is not None else None
        if processes.leads:
            write_disclosure(workdir, tasks, search=search, isolation=isolation, goes_on_from=goes_on_from)

        # -------------------------------------------------------------- the policy, and the jitted functions that sample and learn
        policy = load_policy(config, console.loading)
        second_phase = _second_phase(config, policy)
        memory = least(processes, device_memory())
        sampler = build_sampler(config, policy.model, policy.stop_ids, second_phase, memory=memory, learn=learn)
        optimizer = build_optimizer(config)
        update = build_update(config, policy.model, optimizer)
        prompt_settings = _prompt_settings(config)
        diversity = Diversity(config.diversity.novelty_bonus, config.diversity.duplicates)
        children = kept_children(config.reuse.sampler, config.reuse.children)

        # -------------------------------------------------------------- where the run stands
        journal = Journal(workdir.journal_path)
        metrics = MetricsWriter(workdir.metrics_path)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=config.checkpoint.keep, every=config.checkpoint.every, processes=processes)
        train_state = init_train_state(policy.init_lora(config.seed), optimizer) if learn else None
        stand = restore(config, tasks, workdir, checkpoints, journal, train_state, source, console, processes)
        if processes.leads:
            metrics.truncate(stand.step)
            trackers.begin(stand.step)
        train_state, frontiers = stand.train_state, dict(stand.frontiers)
        last_step = stand.first_step + config.train.steps
        rows: list[dict[str, Any]] = read_metrics(workdir.metrics_path)
        title = f"{config.name}: {', '.join(task.id for task in tasks)}, {'test-time training' if learn else 'search without training'}"
        if processes.leads:
            console.start(title, _opening_lines(config, workdir, tasks, ways, policy, stand))
        if learn and (warning := scale_warning(tasks, config.train.advantage)):
            console.note(warning)

        checkpoint_seconds: float | None = None
        report = write_report(workdir.path) if processes.leads else None

        for step in range(stand.step, last_step):
            console.step(step, last_step)
            started = time.monotonic()
            adapter_step = int(train_state.step) if train_state is not None else 0
            lora = train_state.lora if train_state is not None else None

            # ---------------------------------------------------------- select parents, write their prompts
            tasks_G = _tasks_of_groups(config, tasks, step)
            parents_G = _select_parents(config, tasks_G, frontiers, step)
            shortened: list[str] = []
            prompts_G = [
                build_prompt(
                    task, parent, frontiers[task.id].failures(parent), prompt_settings, policy.tokenizer, group, step, shortened.append
                )
                for group, (task, parent) in enumerate(zip(tasks_G, parents_G, strict=True))
            ]
            if shortened:
                console.note(_of_the_shortened(shortened, prompt_settings, config.groups))

            # ---------------------------------------------------------- sample; each program starts as soon as it is written
            console.phase("sampling")
            rollouts: dict[RolloutKey, Rollout] = {}
            codes: dict[RolloutKey, str | None] = {}
            programs = StepExecutions[RolloutKey](executor, [host["slots"] for host in hosts], processes)
            total = config.groups * config.group_size

            stands: list[Progress] = []

            def show(tokens_per_s: float, codes=codes, programs=programs, total=total) -> None:
                outcomes = programs.outcomes
                outcomes[Outcome.FORMAT_ERROR] += sum(code is None for code in codes.values())
                console.progress(StepProgress(len(codes), total, programs.done, programs.here, tokens_per_s, outcomes))

            def follow(progress: Progress, stands=stands, show=show) -> None:
                stands.append(progress)
                show(progress.tokens / max(progress.seconds, 1e-9))

            for rollout in sampler.sample(
                policy.frozen,
                lora,
                prompts_G,
                config.group_size,
                seed=config.seed,
                step=step,
                on_progress=follow,
            ):
                place = rollout.group, rollout.index
                rollouts[place] = rollout
                codes[place] = program_of(rollout, policy.tokenizer)
                if (code := codes[place]) is not None:
                    programs.submit(place, code, tasks.index(tasks_G[rollout.group]))
            sampled = time.monotonic()

            # ---------------------------------------------------------- wait for the programs and their grades
            console.phase("running programs")
            speed = sum(len(r.tokens_T) for r in rollouts.values()) / (sampled - started)
            verdicts = programs.verdicts(while_waiting=functools.partial(show, speed))
            attempts = [
                attempt_of(tasks_G[g], step, parents_G[g], rollouts[g, i], codes[g, i], verdicts.get((g, i)), adapter_step)
                for g, i in sorted(rollouts)
            ]
            attempts_GK = [[attempt for attempt in attempts if attempt.group == group] for group in range(config.groups)]
            executed = time.monotonic()

            # ---------------------------------------------------------- advantages, update
            signals_G = [group_signals(a_K, task.signals, diversity) for a_K, task in zip(attempts_GK, tasks_G, strict=True)]
            estimated_G = estimate_groups([s.values_K[s.included_K] for s in signals_G], config.train.advantage, beta=config.train.beta)
            advantages = _by_place(signals_G, estimated_G)
            if learn and (too_few := _too_few(signals_G, config.train.advantage)):
                console.note(
                    f"{too_few} of {config.groups} groups have too few different programs for config.train.advantage ="
                    f" {config.train.advantage!r}, which needs {LEAST_ROLLOUTS[config.train.advantage]}; they are left out of the update."
                )
            train_state, update_metrics = _learn(config, policy, update, train_state, rollouts, advantages, console)
            updated = time.monotonic()

            # ---------------------------------------------------------- archive, journal, best/, checkpoint
            console.phase("saving")
            if processes.leads:
                journal.append(attempts)
            previous, improved = frontiers, []
            frontiers = {}
            for task in tasks:
                mine = [attempt for attempt in attempts if attempt.task == task.id]
                states = states_of(mine)
                reusable = {state.id for state in states if program_fits(task, state, prompt_settings, policy.tokenizer)}
                if len(reusable) < len(states):
                    console.note(
                        f"{len(states) - len(reusable)} programs are too long for a prompt of {prompt_settings.max_tokens:,} tokens, so"
                        " they are not reused as parents; the journal and best/ take them all the same."
                    )
                frontiers[task.id] = previous[task.id].after(mine, reusable=reusable, children=children)
                best = frontiers[task.id].best
                if processes.leads and best is not None and best != previous[task.id].best:
                    _write_best(config, workdir, tasks, task, journal, best, verdicts)
                improved.append(Improvement(task.id if len(tasks) > 1 else "", best, previous[task.id].best))
            if processes.leads:
                shown = rollout_rows(rollouts, prompts_G, attempts, advantages, verdicts, policy.tokenizer)
                write_rollouts(workdir.rollouts_dir, step, shown)
            saved = time.monotonic()

            # The row comes before the checkpoint: a kill between the two repeats the step, and `truncate` then drops the row.
            timings = {
                "time/sample_s": sampled - started,
                "time/execute_s": executed - sampled,
                "time/update_s": updated - executed,
                "time/save_s": saved - updated,
                "time/checkpoint_s": checkpoint_seconds,
                "time/step_s": saved - started,
                "prompt/shortened": len(shortened),
                "sample/utilisation": stands[-1].utilisation,
                "sample/set_aside": stands[-1].set_aside,
                "sample/cache_tokens": stands[-1].pages * PAGE,
                "sample/compilations": sampler.compilations,
                "sample/forced_frac": sum(not r.chosen_T.all() for r in rollouts.values()) / total,
                "programs/seconds": sum(v.execution.seconds for v in verdicts.values() if not v.execution.cached),
                "programs/retried": programs.retried,
                "programs/cached_frac": sum(v.execution.cached for v in verdicts.values()) / max(len(verdicts), 1),
            }
            row = step_row(
                step,
                attempts,
                best={id: frontier.best for id, frontier in frontiers.items()},
                timings=timings,
                learning_metrics=advantage_metrics(estimated_G) | diversity_metrics(attempts_GK) | update_metrics,
            )
            if processes.leads:
                metrics.write(row)
                trackers.write(row)
            archived = [state for frontier in frontiers.values() for state in frontier.archive.to_json()]
            host_state = HostState.of(stand.first_step, archived, stand.rewards, journal).to_json() if processes.leads else {}
            megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(train_state)) / 1e6
            console.phase("checkpoint", f"{megabytes:,.0f} MB of adapter and optimiser" if learn else "")
            checkpoints.save(step, train_state, host_state)
            if processes.leads:
                write_report(workdir.path)
            checkpoint_seconds = time.monotonic() - saved
            rows.append(row)
            console.step_done(row, improved)

        if processes.leads:
            results = _results(tasks, frontiers, journal)
            console.finish([*closing_lines(results, rows, workdir=workdir, learn=learn), f"report       {report}"])


# ---------------------------------------------------------------------- before the first step


def _check_agreement(processes: Processes, config: Any, kind: str) -> None:
    """All processes must be about to do the same: what one did otherwise would show only as a hang, or not at all."""
    for what, value, remedy in (
        ("their config", {"kind": kind, **settings.flatten(config)}, "Start all by the same command, but for --process_id."),
        ("their versions of Python or packages", [__version__, *packages()], "Install the same on all hosts: scores depend on them."),
    ):
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        processes.agree(f"{what} (SHA-256)", digest, remedy)


def _opening_lines(config: Any, workdir: Workdir, tasks: Sequence[Task], ways: Sequence[str], policy: Policy, stand: RunState) -> list[str]:
    sizes = policy.model.config
    where = f"{config.model.dtype} on {len(jax.devices())} x {jax.devices()[0].device_kind}"
    if (count := jax.process_count()) > 1:
        where += f" of {count} processes"
    return [
        f"model    {config.model.weights}: {sizes.num_layers} layers, width {sizes.width}, {sizes.num_experts} experts, {where}",
        f"step     {config.groups} groups x {config.group_size} rollouts, {config.train.steps} steps; {stand.origin}",
        *(f"programs {way}" for way in ways),
        *opening_lines([Result(task, stand.frontiers[task.id].best, None) for task in tasks], workdir),
        f"folder   {workdir.path}",
    ]


def _second_phase(config: Any, policy: Policy) -> SecondPhase | None:
    if not config.sampling.thinking_tokens:
        return None
    forced = answer_forced(config.sampling.thinking_closing, policy.tokenizer)
    return SecondPhase(config.sampling.thinking_tokens, answer_opening(policy.tokenizer), forced)


def _prompt_settings(config: Any) -> PromptSettings:
    return PromptSettings(
        style=config.prompt.style,
        max_tokens=config.sampling.max_prompt_tokens,
        reasoning_effort=config.prompt.reasoning_effort,
        seconds=config.execution.seconds,
        cores=config.execution.cores,
        memory_gib=config.execution.memory_gib,
        packages=installed_packages(),
        ideas_shown=config.prompt.ideas,
        stdout_chars=config.prompt.stdout_chars,
        error_chars=config.prompt.error_chars,
    )


# ---------------------------------------------------------------------- parts of a step


def _tasks_of_groups(config: Any, tasks: Sequence[Task], step: int) -> list[Task]:
    """The task of each group: in turn, going on from step to step, so that all get their share however few groups a step has."""
    return [tasks[(step * config.groups + group) % len(tasks)] for group in range(config.groups)]


def _select_parents(config: Any, tasks_G: Sequence[Task], frontiers: Mapping[str, Frontier], step: int) -> list[State]:
    """The parent of each group, from its task's archive."""
    rng = step_rng(config.seed, step)
    of_task: dict[str, Iterator[State]] = {}
    for id in dict.fromkeys(task.id for task in tasks_G):
        frontier = frontiers[id]
        parents = SELECTORS[config.reuse.sampler](
            frontier.archive,
            sum(task.id == id for task in tasks_G),
            rng,
            epsilon=config.reuse.epsilon,
            exploration=config.reuse.exploration,
            expansions=frontier.expansions,
        )
        of_task[id] = iter(diversify_parents(parents, frontier.archive, fresh=config.reuse.fresh, distinct=config.reuse.distinct))
    return [next(of_task[task.id]) for task in tasks_G]


def _of_the_shortened(shortened: Sequence[str], prompt_settings: PromptSettings, groups: int, told: int = 3) -> str:
    """One line on all prompts of a step that were shortened; rollouts/ has their texts."""
    others = f" And {len(shortened) - told} more." if len(shortened) > told else ""
    count = f"{len(shortened)} of {groups} prompts were shortened to {prompt_settings.max_tokens:,} tokens"
    return f"{count} (config.sampling.max_prompt_tokens). {' '.join(shortened[:told])}{others}"


def _too_few(signals_G: Sequence[Signals], estimator: str) -> int:
    """How many groups lost so many copies that the estimator has too little left to compare, though it differs."""
    counted_G = [signals.values_K[signals.included_K] for signals in signals_G]
    return sum(not is_constant(counted_K) and len(counted_K) < LEAST_ROLLOUTS[estimator] for counted_K in counted_G)


def _by_place(signals_G: Sequence[Signals], estimated_G: Sequence[Advantages | None]) -> dict[RolloutKey, float]:
    """Advantages of the rollouts that take part in the update, by group and index."""
    return {
        (group, int(index)): float(value)
        for group, (signals, estimated) in enumerate(zip(signals_G, estimated_G, strict=True))
        if estimated is not None
        for index, value in zip(np.flatnonzero(signals.included_K), estimated.values_K, strict=True)
    }


def _learn(
    config: Any,
    policy: Policy,
    update: Update,
    train_state: TrainState | None,
    rollouts: Mapping[RolloutKey, Rollout],
    advantages: Mapping[RolloutKey, float],
    console: Console,
) -> tuple[TrainState | None, dict[str, float]]:
    """The update on the groups that carry a signal; where nothing is learned, the log-probability gap is measured all the same."""
    shape = {"row_tokens": row_tokens(config), "rows": config.train.rows, "lengths": config.train.row_lengths}
    phase = "learning" if train_state is not None else "measuring"
    if train_state is not None and advantages:
        learned = sorted(advantages)
        substeps = pack_substeps(
            [rollouts[place] for place in learned], [advantages[place] for place in learned], substeps=config.train.num_substeps, **shape
        )
        console.phase(phase, _of_the_batches(len(learned), [batch for batches in substeps for batch in batches]))
        return update.update_in_substeps(policy.frozen, train_state, substeps, console.passes)
    batches = pack([rollouts[place] for place in sorted(rollouts)], [0.0] * len(rollouts), **shape)
    console.phase(phase, _of_the_batches(len(rollouts), batches))
    lora = train_state.lora if train_state is not None else None
    return train_state, update.measure(policy.frozen, lora, batches, console.passes) | {"update/skipped": 1.0}


def _of_the_batches(rollouts: int, batches: Sequence[Batch]) -> str:
    """How much there is to learn from, or to measure."""
    if not batches:
        return "no rollout"
    rows, length = batches[0].mask_BT.shape
    return f"{rollouts} rollouts in {len(batches)} microbatch{'es' if len(batches) > 1 else ''} of {rows} x {length:,} tokens"


def _write_best(
    config: Any, workdir: Workdir, tasks: Sequence[Task], task: Task, journal: Journal, best: State, verdicts: Mapping[RolloutKey, Verdict]
) -> None:
    """The bundle of a program that this step found: in best/, or in a folder below it where a run has several tasks."""
    verdict = verdicts[tuple(int(part) for part in best.id.split("-")[1:])]  # type: ignore[index]
    folder = bundle_dir(workdir.best_dir, task.id, alone=len(tasks) == 1)
    write_best(
        folder,
        lineage=lineage(journal.read(), best.id),
        submission=verdict.execution.csv or b"",
        grade=grade_of(task, best, verdict, config.seed),
        disclosure=(workdir.path / DISCLOSURE).read_bytes(),
        rerun=rerun_script(config, tasks.index(task)),
    )


def _results(tasks: Sequence[Task], frontiers: Mapping[str, Frontier], journal: Journal) -> list[Result]:
    """What the run came to. Private scores are read from the journal now that all choices have been made."""
    private = {attempt.id: attempt.private_score for attempt in journal.read()}
    bests = [frontiers[task.id].best for task in tasks]
    return [Result(task, best, private.get(best.id) if best is not None else None) for task, best in zip(tasks, bests, strict=True)]


if __name__ == "__main__":
    cli.launch(run, dry_run.run)

"""Test-time training on one competition: `python -m discover_jax.main --config=configs/quickstart.py`.

`run` sets up and then loops over the steps of the report's section 4.1: select parents, write prompts, sample and execute at once, grade,
advantages, update, archive, checkpoint. `discover_jax.search` is the same loop without the update.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from discover_jax import cli, dry_run
from discover_jax import config as settings
from discover_jax.archive.archive import Archive, best_of, lineage
from discover_jax.archive.journal import Journal
from discover_jax.archive.samplers import SAMPLERS, step_rng
from discover_jax.engine import build_optimizer, build_sampler, build_update, row_tokens
from discover_jax.exceptions import RunError
from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import GIB, Limits
from discover_jax.learning.advantages import advantage_metrics, estimate_groups
from discover_jax.learning.packing import pack
from discover_jax.learning.train_state import TrainState, init_train_state
from discover_jax.learning.update import Update
from discover_jax.policy import Policy, load_policy
from discover_jax.runs.best import write_best
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import Console, make_console
from discover_jax.runs.disclosure import write_disclosure
from discover_jax.runs.host_state import HostState
from discover_jax.runs.metrics import MetricsWriter, read_metrics
from discover_jax.runs.rollouts import write_rollouts
from discover_jax.runs.summary import closing_lines, step_row
from discover_jax.runs.workdir import Workdir, open_workdir, write_atomic
from discover_jax.sampling.sampler import SecondPhase
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.task import Task
from discover_jax.text.harmony import answer_forced, answer_opening
from discover_jax.text.prompts import PromptSettings, build_prompt, installed_packages, program_fits
from discover_jax.text.reply import program_of
from discover_jax.types import Attempt, Outcome, Prompt, Rollout, State, Verdict

STDOUT_CHARS = 4000
"""Of a program's output, so much of the end goes into the journal."""


def run(config: Any, folder: Path, *, learn: bool = True, console: Console | None = None) -> None:
    """Runs or resumes a whole run.

    Args:
      config: validated (`discover_jax.config.validate`).
      folder: of the run; see README for what it holds.
      learn: False for the search baseline: the adapter stays as it is, which is the base model.
      console: where progress is shown; by default what fits the terminal.

    Raises:
      DiscoverError: what went wrong and what to do; the run can be resumed from its last checkpoint.
    """
    _cache_compilations()
    console = console or make_console()
    try:
        with open_workdir(folder, settings.flatten(config), "train" if learn else "search") as workdir:
            _discover(config, workdir, learn, console)
    finally:
        console.close()


def _discover(config: Any, workdir: Workdir, learn: bool, console: Console) -> None:
    # ------------------------------------------------------------------ the task, and the workers that run programs for it
    task = prepare_task(
        config.task.competition,
        raw=config.task.raw,
        reward=config.task.reward,
        folder=workdir.task_dir,
        holdout_fraction=config.task.holdout_fraction,
        holdout_folds=config.task.holdout_folds,
        grader=config.task.grader,
        seed=config.seed,
    )
    limits = Limits(seconds=config.execution.seconds, cores=config.execution.cores, memory_bytes=int(config.execution.memory_gib * GIB))
    with Executor(
        [task],
        limits,
        workers=config.execution.workers,
        cache_dir=workdir.cache_dir,
        backend=config.execution.backend,
        allow_weaker=config.execution.allow_weaker,
    ) as executor:
        search = {"learned": learn, "advantage": config.train.advantage if learn else None, "reuse": config.reuse.sampler}
        write_disclosure(workdir, task, search=search, isolation=executor.describe(), isolated=executor.isolated)

        # -------------------------------------------------------------- the policy, and the jitted functions that sample and learn
        policy = load_policy(config, console.loading)
        sampler = build_sampler(config, policy.model, policy.stop_ids, _second_phase(config, policy))
        optimizer = build_optimizer(config)
        update = build_update(config, policy.model, optimizer)
        prompt_settings = PromptSettings(
            style=config.prompt.style,
            max_tokens=config.sampling.max_prompt_tokens,
            reasoning_effort=config.prompt.reasoning_effort,
            seconds=config.execution.seconds,
            cores=config.execution.cores,
            memory_gib=config.execution.memory_gib,
            packages=installed_packages(),
        )

        # -------------------------------------------------------------- where the run stands
        journal = Journal(workdir.journal_path)
        metrics = MetricsWriter(workdir.metrics_path)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=config.checkpoint.keep, every=config.checkpoint.every)
        train_state = init_train_state(policy.init_lora(config.seed), optimizer) if learn else None
        stand = _restore(config, workdir, checkpoints, journal, train_state, console)
        metrics.truncate(stand.step)
        train_state, archive, best, last_children = stand.train_state, stand.archive, stand.best, stand.last_children
        last_step = stand.first_step + config.train.steps
        rows: list[dict[str, Any]] = read_metrics(workdir.metrics_path)
        title = f"{config.name}: {task.id}, {'test-time training' if learn else 'search without training'}"
        console.start(title, _opening_lines(config, workdir, task, executor, policy, stand))

        checkpoint_seconds: float | None = None

        for step in range(stand.step, last_step):
            console.step(step, last_step)
            started = time.monotonic()
            adapter_step = int(train_state.step) if train_state is not None else 0
            lora = train_state.lora if train_state is not None else None

            # ---------------------------------------------------------- select parents, write their prompts
            parents = SAMPLERS[config.reuse.sampler](archive, config.groups, step_rng(config.seed, step), epsilon=config.reuse.epsilon)
            prompts = [
                build_prompt(task, parent, _failures(last_children, parent), prompt_settings, policy.tokenizer, group)
                for group, parent in enumerate(parents)
            ]

            # ---------------------------------------------------------- sample; each program starts as soon as it is written
            console.phase("sampling")
            rollouts: dict[tuple[int, int], Rollout] = {}
            codes: dict[tuple[int, int], str | None] = {}
            futures: dict[tuple[int, int], concurrent.futures.Future[Verdict]] = {}
            total = config.groups * config.group_size

            def show(tokens_per_s: float, rollouts=rollouts, futures=futures, total=total) -> None:
                console.progress(len(rollouts), total, sum(f.done() for f in futures.values()), len(futures), tokens_per_s)

            for rollout in sampler.sample(
                policy.frozen,
                lora,
                prompts,
                config.group_size,
                seed=config.seed,
                step=step,
                on_progress=lambda progress: show(progress.tokens / max(progress.seconds, 1e-9)),
            ):
                place = rollout.group, rollout.index
                rollouts[place] = rollout
                codes[place] = program_of(rollout, policy.tokenizer)
                if (code := codes[place]) is not None:
                    futures[place] = executor.submit(code)
            sampled = time.monotonic()

            # ---------------------------------------------------------- wait for the programs and their grades
            console.phase("running programs")
            speed = sum(len(r.tokens_T) for r in rollouts.values()) / (sampled - started)
            waiting = set(futures.values())
            while waiting:
                show(speed)
                _, waiting = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
            verdicts = {place: future.result() for place, future in futures.items()}
            places = sorted(rollouts)
            attempts = [
                _attempt(task, step, parents[place[0]], rollouts[place], codes[place], verdicts.get(place), adapter_step)
                for place in places
            ]
            executed = time.monotonic()

            # ---------------------------------------------------------- advantages, update
            console.phase("learning" if learn else "measuring")
            rewards_GK = [[a.reward for a in attempts if a.group == group] for group in range(config.groups)]
            advantages = estimate_groups(rewards_GK, config.train.advantage, beta=config.train.beta)
            train_state, update_metrics = _learn(config, policy, update, train_state, [rollouts[p] for p in places], advantages)
            updated = time.monotonic()

            # ---------------------------------------------------------- archive, journal, best/, checkpoint
            console.phase("saving")
            states = _states(attempts)
            fitting = [state for state in states if program_fits(task, state, prompt_settings, policy.tokenizer)]
            if len(fitting) < len(states):
                console.note(
                    f"{len(states) - len(fitting)} programs are too long for a prompt of {prompt_settings.max_tokens:,} tokens, so they are"
                    " not reused as parents; the journal and best/ take them all the same."
                )
            archive = archive.add(fitting)
            last_children |= _by_parent(attempts)
            journal.append(attempts)
            previous, best = best, best_of([best, *states] if best is not None else states)
            if best is not None and best != previous:
                _write_best(config, workdir, task, journal, best, verdicts)
            write_rollouts(workdir.rollouts_dir, step, _rollout_rows(places, rollouts, prompts, attempts, advantages, verdicts, policy))
            saved = time.monotonic()

            # The row comes before the checkpoint: a kill between the two repeats the step, and `truncate` then drops the row.
            timings = {
                "time/sample_s": sampled - started,
                "time/execute_s": executed - sampled,
                "time/update_s": updated - executed,
                "time/save_s": saved - updated,
                "time/checkpoint_s": checkpoint_seconds,
                "time/step_s": saved - started,
                "sample/forced_frac": sum(not r.chosen_T.all() for r in rollouts.values()) / total,
                "programs/seconds": sum(v.execution.seconds for v in verdicts.values() if not v.execution.cached),
                "programs/cached_frac": sum(v.execution.cached for v in verdicts.values()) / max(len(verdicts), 1),
            }
            row = step_row(
                step,
                attempts,
                best=best,
                timings=timings,
                advantage_metrics=advantage_metrics(advantages),
                update_metrics=update_metrics,
            )
            metrics.write(row)
            checkpoints.save(step, train_state, HostState.of(stand.first_step, archive, journal).to_json())
            checkpoint_seconds = time.monotonic() - saved
            rows.append(row)
            console.step_done(row, best, previous.score if previous is not None else None)

        console.finish(closing_lines(task, best, _private_score(journal, best), rows, workdir=workdir, learn=learn))


# ---------------------------------------------------------------------- starting and resuming


@dataclasses.dataclass
class _Stand:
    """Where a run stands before its next step.

    Attributes:
      first_step: number of the run's first step: not 0 for a run that goes on from another one's.
      step: the next step.
      archive: of the states that may become parents.
      best: the best state of the journal, be it fit for a prompt or not.
      last_children: for each parent, the attempts of the last step that used it.
    """

    first_step: int
    step: int
    train_state: TrainState | None
    archive: Archive
    best: State | None
    last_children: dict[str, list[Attempt]]
    origin: str


def _restore(
    config: Any, workdir: Workdir, checkpoints: Checkpoints, journal: Journal, fresh: TrainState | None, console: Console
) -> _Stand:
    """From the folder's last whole checkpoint; else from `train.resume_from`; else from nothing."""
    if (found := checkpoints.resume(fresh, console.note)) is not None:
        latest, train_state, row = found
        host = HostState.from_json(row, latest)
        first_step, origin = host.first_step, f"resumed after step {latest + 1}"
        attempts = journal.resume(host.journal_position, host.journal_sha256)
    elif config.train.resume_from:
        source = Path(config.train.resume_from).expanduser()
        earlier = Checkpoints(source / "checkpoints", keep=1, every=0, read_only=True) if (source / "checkpoints").is_dir() else None
        if earlier is None or (latest := earlier.latest()) is None:
            raise RunError(
                f"config.train.resume_from = {str(source)!r} holds no checkpoint. Give the folder of a run that finished at least one step,"
                " or leave it empty to start from nothing."
            )
        train_state, row = earlier.restore(latest, fresh)
        host = HostState.from_json(row, latest)
        first_step, origin = latest + 1, f"goes on from step {latest + 1} of {source}"
        # The journal comes along, so that the lineage of every program can still be told.
        rows, attempts = Journal(source / "journal.jsonl").check(host.journal_position, host.journal_sha256)
        _refuse_lost_checkpoints(workdir, journal, first_step)
        write_atomic(workdir.journal_path, rows)
    else:
        _refuse_lost_checkpoints(workdir, journal, 0)
        journal.truncate(0)
        return _Stand(0, 0, fresh, Archive((), config.reuse.capacity), None, {}, "fresh")
    archive = Archive.from_json(host.archive, config.reuse.capacity)
    last_children: dict[str, list[Attempt]] = {}
    for _, of_step in itertools.groupby(attempts, key=lambda attempt: attempt.step):
        last_children |= _by_parent(list(of_step))
    return _Stand(first_step, latest + 1, train_state, archive, best_of(_states(attempts)), last_children, origin)


def _refuse_lost_checkpoints(workdir: Workdir, journal: Journal, first_step: int) -> None:
    """Without a checkpoint a run can have got no further than into its first step; to begin again would set all the others aside."""
    last = max((attempt.step for attempt in journal.read()), default=first_step)
    if last > first_step:
        raise RunError(
            f"The journal {workdir.journal_path} goes up to step {last + 1}, but there is no checkpoint in {workdir.checkpoints_dir}: they"
            " were deleted. Put them back to resume the run, or start a new one in another folder (--workdir)."
        )


def _opening_lines(config: Any, workdir: Workdir, task: Task, executor: Executor, policy: Policy, stand: _Stand) -> list[str]:
    sizes = policy.model.config
    where = f"{config.model.dtype} on {len(jax.devices())} x {jax.devices()[0].device_kind}"
    return [
        f"model    {config.model.weights}: {sizes.num_layers} layers, width {sizes.width}, {sizes.num_experts} experts, {where}",
        f"step     {config.groups} groups x {config.group_size} rollouts, {config.train.steps} steps; {stand.origin}",
        f"programs {executor.describe()}",
        f"reward   {task.disclosure.text}",
        f"folder   {workdir.path}",
    ]


def _cache_compilations() -> None:
    """Keeps compiled programs between runs, unless the environment already says where or whether."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "discover_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# ---------------------------------------------------------------------- parts of a step


def _second_phase(config: Any, policy: Policy) -> SecondPhase | None:
    if not config.sampling.thinking_tokens:
        return None
    forced = answer_forced(config.sampling.thinking_closing, policy.tokenizer)
    return SecondPhase(config.sampling.thinking_tokens, answer_opening(policy.tokenizer), forced)


def _states(attempts: Sequence[Attempt]) -> list[State]:
    return [state for attempt in attempts if (state := attempt.state()) is not None]


def _by_parent(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    children: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        children.setdefault(attempt.parent_id, []).append(attempt)
    return children


def _failures(last_children: dict[str, list[Attempt]], parent: State) -> list[Attempt]:
    """The last attempts on a parent if all of them failed, so that the prompt can show an error; else nothing."""
    children = last_children.get(parent.id, [])
    return children if all(child.outcome is not Outcome.OK for child in children) else []


def _attempt(
    task: Task, step: int, parent: State, rollout: Rollout, code: str | None, verdict: Verdict | None, adapter_step: int
) -> Attempt:
    """Everything that became of a rollout, as the journal keeps it."""
    common = {
        "id": f"{step:04d}-{rollout.group:03d}-{rollout.index:03d}",
        "parent_id": parent.id,
        "step": step,
        "group": rollout.group,
        "index": rollout.index,
        "code": code,
        "adapter_step": adapter_step,
        "tokens": len(rollout.tokens_T),
        "stop": rollout.stop,
    }
    if verdict is None:
        detail = "The reply holds no fenced Python block in its final channel."
        outcome = Outcome.FORMAT_ERROR
        return Attempt(**common, outcome=outcome, detail=detail, stdout="", score=None, private_score=None, reward=task.failure_reward)
    score = verdict.grade.score if verdict.outcome is Outcome.OK else None
    return Attempt(
        **common,
        outcome=verdict.outcome,
        detail=verdict.execution.detail or verdict.grade.reason,
        stdout=verdict.execution.stdout[-STDOUT_CHARS:],
        score=score,
        private_score=verdict.grade.private_score if score is not None else None,
        reward=task.failure_reward if score is None else task.reward(score),
    )


def _learn(
    config: Any,
    policy: Policy,
    update: Update,
    train_state: TrainState | None,
    rollouts: Sequence[Rollout],
    advantages: Sequence[Any],
) -> tuple[TrainState | None, dict[str, float]]:
    """The update on the groups that carry a signal; where nothing is learned, the log-probability gap is measured all the same."""
    value_of = {
        (group, index): float(value)
        for group, estimated in enumerate(advantages)
        if estimated is not None
        for index, value in enumerate(estimated.values_K)
    }
    learned = [rollout for rollout in rollouts if (rollout.group, rollout.index) in value_of]
    if train_state is not None and learned:
        batches = pack(learned, [value_of[r.group, r.index] for r in learned], row_tokens=row_tokens(config), rows=config.train.rows)
        return update.update(policy.frozen, train_state, batches)
    batches = pack(rollouts, [0.0] * len(rollouts), row_tokens=row_tokens(config), rows=config.train.rows)
    lora = train_state.lora if train_state is not None else None
    return train_state, update.measure(policy.frozen, lora, batches) | {"update/skipped": 1.0}


def _rollout_rows(
    places: Sequence[tuple[int, int]],
    rollouts: dict[tuple[int, int], Rollout],
    prompts: Sequence[Prompt],
    attempts: Sequence[Attempt],
    advantages: Sequence[Any],
    verdicts: dict[tuple[int, int], Verdict],
    policy: Policy,
) -> list[dict[str, Any]]:
    """One row a rollout for rollouts/, the prompt's text with the first of its group."""
    rows = []
    for place, attempt in zip(places, attempts, strict=True):
        (group, index), rollout, verdict = place, rollouts[place], verdicts.get(place)
        estimated = advantages[group]
        rows.append(
            {
                "id": attempt.id,
                "parent_id": attempt.parent_id,
                "prompt": prompts[group].text if index == 0 else None,
                "reply": policy.tokenizer.decode(rollout.tokens_T.tolist()),
                "tokens": len(rollout.tokens_T),
                "logprob_sum": float(rollout.logprobs_T.sum()),
                "outcome": attempt.outcome.value,
                "score": attempt.score,
                "reward": attempt.reward,
                "advantage": None if estimated is None else float(estimated.values_K[index]),
                "seconds": verdict.execution.seconds if verdict is not None else None,
                "cached": verdict.execution.cached if verdict is not None else None,
            }
        )
    return rows


def _private_score(journal: Journal, best: State | None) -> float | None:
    """For the record: read from the journal when all choices have been made."""
    return next((attempt.private_score for attempt in journal.read() if best is not None and attempt.id == best.id), None)


def _write_best(config: Any, workdir: Workdir, task: Task, journal: Journal, best: State, verdicts: dict[tuple[int, int], Verdict]) -> None:
    """The bundle of a program that this step found."""
    verdict = verdicts[tuple(int(part) for part in best.id.split("-")[1:])]  # type: ignore[index]
    assert best.score is not None
    private_score = verdict.grade.private_score
    grade = {
        "id": best.id,
        "competition": task.id,
        "metric": task.metric.name,
        "higher_is_better": task.metric.higher_is_better,
        "score": best.score,
        "rows": task.score_rows,
        "interval_95": task.score_interval(best.score),
        "private_score": private_score,
        "private_rows": task.private_rows,
        "private_interval_95": None if private_score is None else task.private_score_interval(private_score),
        "grader": task.disclosure.grader,
        "chosen_by": task.disclosure.text,
        "step": best.step,
        "adapter_step": best.adapter_step,
        "seed": config.seed,
    }
    write_best(workdir.best_dir, lineage=lineage(journal.read(), best.id), submission=verdict.execution.csv or b"", grade=grade)


if __name__ == "__main__":
    cli.launch(run, dry_run.run)

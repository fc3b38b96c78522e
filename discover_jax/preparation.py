"""Prepares a run for its first step: data, sandboxes, seed programs, weights, and the state of the last checkpoint."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from discover_jax import __version__, task_checks, typed_settings
from discover_jax import config as settings
from discover_jax.archive.frontier import Frontier
from discover_jax.archive.journal import Journal
from discover_jax.archive.ranking import Ranking
from discover_jax.engine import build_optimizer, build_sampler, build_update, unused_drafts
from discover_jax.exceptions import ConfigError
from discover_jax.execution.cache import packages, verdict_row
from discover_jax.execution.executor import Executor
from discover_jax.files import write_atomic
from discover_jax.hosts.processes import Processes, least
from discover_jax.learning.train_state import init_train_state
from discover_jax.machines import device_memory, has_large_tiles
from discover_jax.policy import Policy, load_chat, load_policy
from discover_jax.runs.attempts import SEED_PROGRAMS, seed_of, seed_verdicts, stored_seeds
from discover_jax.runs.checkpoints import Checkpoints
from discover_jax.runs.console import Console
from discover_jax.runs.disclosure import Isolation, write_disclosure
from discover_jax.runs.outputs import Outputs
from discover_jax.runs.recorder import NullRecorder, RunRecorder
from discover_jax.runs.rerun import rerun_script
from discover_jax.runs.restore import RunState, restore
from discover_jax.runs.source import Source, find_source
from discover_jax.runs.summary import Result, opening_lines, scale_warning
from discover_jax.runs.tracking import Trackers
from discover_jax.runs.workdir import Workdir
from discover_jax.stages import Run
from discover_jax.tasks.configured import prepare_tasks, seed_programs
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.prepared_folder import is_stratified
from discover_jax.tasks.retests import prepare_retests
from discover_jax.types import SEED, RunKind, State, Verdict, children_read


@contextlib.contextmanager
def prepared(
    config: Any, workdir: Workdir, processes: Processes, kind: RunKind, console: Console, trackers: Trackers
) -> Iterator[tuple[Run, Policy, Mapping[str, Frontier]]]:
    """Everything that the loop needs, restored to where the run stands. The workers that run programs end with the context."""
    tasks = processes.first_then_others(lambda: prepare_tasks(config.task, folder=workdir.task_dir, seed=config.seed))
    task_checks.check_objective(config.train, tasks)
    task_checks.check_ranking(config.reuse.score, tasks)
    task_checks.check_copies(config.diversity.copies, config.diversity.copy_tolerance, tasks)
    retests = processes.first_then_others(lambda: _retests(config, tasks, workdir))
    all_tasks = [*tasks, *(each for of_task in retests.values() for each in of_task)]
    processes.agree("the prepared tables and answers", [task.fingerprint for task in all_tasks], "Give all hosts the same raw data.")
    source = find_source(config.train.resume_from, tasks, workdir, processes)
    with _executor(config, all_tasks, workdir, processes) as executor:
        hosts = _gather_hosts(config, tasks, executor, processes)
        if processes.leads:
            _disclose(config, kind, workdir, tasks, source, hosts.isolation)

        outputs = Outputs(workdir.outputs_dir)
        seeds = run_seed_programs(config.task, tasks, executor, processes, workdir.path / SEED_PROGRAMS, outputs)
        # Before the weights, which take minutes.
        chat, prompt_settings = load_chat(config), typed_settings.prompt_settings(config, hosts.unusable, all_tasks)
        task_checks.check_prompts(tasks, seeds, prompt_settings, chat)
        policy = load_policy(config, console.loading, chat)
        optimizer = build_optimizer(config)
        sampler = build_sampler(
            config,
            policy.model,
            policy.stop_ids,
            typed_settings.second_phase(config, policy.chat),
            memory=least(processes, device_memory()),
            learn=kind.learns,
            large_tiles=has_large_tiles(jax.devices()[0].device_kind),
        )

        journal = Journal(workdir.journal_path)
        checkpoints = Checkpoints(workdir.checkpoints_dir, keep=config.checkpoint.keep, every=config.checkpoint.every, processes=processes)
        fresh = init_train_state(policy.init_lora(config.seed), optimizer) if kind.learns else None
        scripts = {
            task.id: rerun_script(typed_settings.rerun_settings(config, number, stratified=is_stratified(task.settings)))
            for number, task in enumerate(tasks)
        }
        starts = start_frontiers(config.reuse, tasks, seeds)
        state = restore(tasks, workdir, checkpoints, journal, fresh, source, scripts, console.note, processes, starts=starts)
        policy = dataclasses.replace(policy, train_state=state.train_state)
        last_step = state.first_step + config.train.steps
        recorder = NullRecorder()
        if processes.leads:

            def run_again(task: AnyTask, state: State) -> Verdict:
                return executor.submit(state.code, tasks.index(task)).result()

            run_of = {"kind": kind, "seed": config.seed, "last_step": last_step}
            recorder = RunRecorder(workdir, journal, console, trackers, tasks, policy.tokenizer, scripts, state, run_again, **run_of)
            recorder.begin(config.name, _opening_lines(config, workdir, tasks, hosts.isolation.lines, policy, state))
            if kind.learns and (warning := scale_warning(tasks, config.train.advantage)):
                recorder.note(warning)
            if warning := unused_drafts(config):
                recorder.note(warning)
            if warning := task_checks.brief_warning(config.prompt.style, tasks, chat):
                recorder.note(warning)
            for name, error in hosts.unusable.items():
                recorder.note(f"{name} is installed, but programs cannot import it, so prompts do not name it: {error}")
        run = Run(
            config=config,
            kind=kind,
            processes=processes,
            tasks=tasks,
            all_tasks=all_tasks,
            retests={id: [all_tasks.index(each) for each in of_task] for id, of_task in retests.items()},
            executor=executor,
            slots_H=hosts.slots_H,
            sampler=sampler,
            updater=build_update(config, policy.model, optimizer),
            prompt_settings=prompt_settings,
            checkpoints=checkpoints,
            recorder=recorder,
            outputs=outputs,
            first_step=state.step,
            last_step=last_step,
        )
        yield run, policy, state.frontiers


@dataclasses.dataclass(frozen=True)
class _Hosts:
    """How the hosts of a run execute programs.

    Attributes:
      slots_H: number of programs that each host runs at the same time.
      isolation: of the programs of all hosts.
      unusable: packages that programs cannot import on some host, with the errors.
    """

    slots_H: list[int]
    isolation: Isolation
    unusable: Mapping[str, str]


def _gather_hosts(config: Any, tasks: Sequence[AnyTask], executor: Executor, processes: Processes) -> _Hosts:
    """Collects from every host how its executor runs programs. All processes must call it."""
    unusable = typed_settings.unusable_packages(config, tasks, executor)
    hosts = processes.gather({"slots": executor.slots, "isolated": executor.isolated, "line": executor.describe(), "unusable": unusable})
    lines = tuple(dict.fromkeys(host["line"] for host in hosts if host["slots"]))
    isolation = Isolation(all(host["isolated"] for host in hosts), lines)
    return _Hosts([host["slots"] for host in hosts], isolation, {name: error for host in hosts for name, error in host["unusable"].items()})


def _retests(config: Any, tasks: Sequence[AnyTask], workdir: Workdir) -> Mapping[str, Sequence[AnyTask]]:
    """The retests of each competition; empty without finalists."""
    if not config.finalists.count:
        return {}
    found = {
        task.id: prepare_retests(task, config.finalists.retests, folder=workdir.retests_dir / task.id, seed=config.seed) for task in tasks
    }
    if not any(found.values()):
        raise ConfigError(
            f"config.finalists.count = {config.finalists.count}: {', '.join(found)} cannot be tested again, because scores do not vary"
            " between evaluations, or because programs read what their parents returned. Set it to 0. For a problem, noisy=True in its"
            " definition and config.task.reuse_output = 'off' allow it."
        )
    return found


def run_seed_programs(
    section: Any, tasks: Sequence[AnyTask], executor: Executor, processes: Processes, file: Path, outputs: Outputs
) -> dict[str, State]:
    """Where the search of each competition starts, if not from nothing: a seed program and its verdict, by competition id.

    The first process runs the programs and stores them with their verdicts, so that a resumed run starts from the same.

    Args:
      section: config.task.
      file: in the run directory.
      outputs: gets the values that the programs returned, if their children may read them.

    Raises:
      ConfigError: a seed program has no score, or its reward is that of a failure.
      RunError: the stored programs cannot be read, or the seed programs differ from them.
    """
    if not section.seed_program and not any(task.calls for task in tasks):
        return {}

    def rows() -> list[dict[str, Any]]:
        programs = {task.id: program for task, program in zip(tasks, seed_programs(section, tasks), strict=True) if program}
        if file.exists():
            return stored_seeds(file, programs)
        numbers = {task.id: number for number, task in enumerate(tasks)}
        futures = {id: executor.submit(program, numbers[id]) for id, program in programs.items()}
        verdicts = {id: future.result() for id, future in futures.items()}
        for id, verdict in verdicts.items():  # a program without a score is not stored: it can be corrected
            seed_of(by_id[id], programs[id], verdict)
        found = [{"task": id, "program": programs[id], "verdict": verdict_row(verdict)} for id, verdict in verdicts.items()]
        write_atomic(file, json.dumps(found).encode())
        return found

    by_id = {task.id: task for task in tasks}
    seeds = {}
    for id, program, verdict in seed_verdicts(file, processes.from_first(rows)):
        seeds[id] = seed_of(by_id[id], program, verdict)
        if processes.leads and children_read(seeds[id].output):
            outputs.put(verdict.execution.result or b"")
    return seeds


def start_frontiers(reuse: Any, tasks: Sequence[AnyTask], seeds: Mapping[str, State]) -> dict[str, Frontier]:
    """The frontier of each competition before the first step.

    Args:
      reuse: config.reuse.
      seeds: seed programs by competition id; the others start from nothing.
    """

    def ranking(task: AnyTask) -> Ranking | None:
        return None if reuse.score == "raw" else Ranking(reuse.score, task.metric.higher_is_better, task.reward, task.has_row_results)

    return {task.id: Frontier.start(reuse.capacity, seed=seeds.get(task.id, SEED), ranking=ranking(task)) for task in tasks}


def check_agreement(processes: Processes, config: Any, kind: RunKind) -> None:
    """Checks that all processes are about to run the same. A difference would otherwise show only as a hang, or not at all."""
    for what, value, remedy in (
        ("their config", {"kind": kind.value, **settings.flatten(config)}, "Start all by the same command, except for --process_id."),
        ("their versions of Python or packages", [__version__, *packages()], "Install the same on all hosts: scores depend on them."),
    ):
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        processes.agree(f"{what} (SHA-256)", digest, remedy)


def _executor(config: Any, tasks: Sequence[AnyTask], workdir: Workdir, processes: Processes) -> Executor:
    return Executor(
        tasks,
        typed_settings.program_limits(config, tasks),
        workers=config.execution.workers,
        cache_dir=config.execution.cache or workdir.cache_dir,
        backend=config.execution.backend,
        allow_weaker=config.execution.allow_weaker,
        ray_address=config.execution.ray_address,
        leads=processes.leads,
    )


def _disclose(config: Any, kind: RunKind, workdir: Workdir, tasks: Sequence[AnyTask], source: Source | None, isolation: Isolation) -> None:
    """Writes disclosure.json: what reaches the search, and how programs are isolated."""
    search = {
        "learned": kind.learns,
        "advantage": config.train.advantage if kind.learns else None,
        "reuse": config.reuse.sampler,
    }
    goes_on_from = None
    if source is not None:
        isolation, goes_on_from = source.isolation.after(isolation), source.disclosed()
    write_disclosure(workdir, tasks, search=search, isolation=isolation, goes_on_from=goes_on_from)


def _opening_lines(
    config: Any, workdir: Workdir, tasks: Sequence[AnyTask], ways: Sequence[str], policy: Policy, state: RunState
) -> list[str]:
    sizes = policy.model.config
    frontiers = [(task, state.frontiers[task.id]) for task in tasks]
    size = f"{_counted(config.groups, 'group')} x {_counted(config.group_size, 'rollout')}"
    where = f"{config.model.dtype} on {len(jax.devices())} x {jax.devices()[0].device_kind}"
    if (count := jax.process_count()) > 1:
        where += f" of {count} processes"
    return [
        f"model    {config.model.weights}: {sizes.describe()}, {where}",
        f"step     {size}, {_counted(config.train.steps, 'step')}; {state.origin}",
        *(f"programs {way}" for way in ways),
        *opening_lines([Result(task, frontier.best, None, seed_score=frontier.seed.score) for task, frontier in frontiers], workdir),
        f"folder   {workdir.path}",
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"

"""Checks the requirements of a run before it starts: `python -m discover_jax.doctor --config=configs/spaceship.py:run3 ...`.

Takes the same --config and --workdir as `main`. Prints one line per check: `ok`, `FIX` with what to do, or `--` for a skipped check. The
exit code is 0 if all checks pass, otherwise 1. The doctor writes only to a temporary folder. Of the weights, it reads only the headers.

With --distributed or --coordinator, as a run on several hosts is started, it checks all hosts together instead: see `preflight.all_hosts`.
"""

import dataclasses
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from discover_jax import cli
from discover_jax.exceptions import ConfigError, DataError, DiscoverError, RunError
from discover_jax.execution.executor import Executor
from discover_jax.execution.limits import GIB
from discover_jax.extras import install_command
from discover_jax.kernels.kernel_set import PLATFORMS, find_kernel
from discover_jax.preflight import all_hosts, requirements
from discover_jax.runs.attempts import seed_of
from discover_jax.task_checks import brief_warning, check_prompts
from discover_jax.tasks.configured import prepare_tasks, seed_programs
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.problem_task import ProblemTask
from discover_jax.tasks.task import Task
from discover_jax.text.chat import ChatFormat
from discover_jax.text.prompts import installed_packages
from discover_jax.typed_settings import packages_in_prompts, program_limits, prompt_settings
from discover_jax.types import SEED, Grade, Outcome, Verdict
from discover_jax.untrusted_text import printable

_PROGRAM = """import pandas as pd


def run():
    return pd.read_csv("data/sample_submission.csv")
"""

_NO_SOLUTION = "solution = None\n"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check: its name, whether it passed (None if skipped), and what it found or what to do."""

    name: str
    ok: bool | None
    text: str


def examine(config: Any, workdir: Path) -> Iterator[Finding]:
    """Runs the checks in order, quick ones first. A check that depends on a failed one is skipped.

    Args:
      config: validated.
      workdir: the run directory, which need not exist.
    """

    def run_check(name: str, check: Callable[..., tuple[str, T]], *arguments: Any) -> Iterator[Finding]:
        """Yields the finding. Returns the check's result, or None if it failed or was skipped."""
        if any(argument is None for argument in arguments):
            yield Finding(name, None, "skipped: an earlier check failed")
            return None
        try:
            text, result = check(*arguments)
        except DiscoverError as error:
            yield Finding(name, False, str(error))
            return None
        yield Finding(name, True, text)
        return result

    yield from run_check("packages", requirements.check_packages)
    yield from run_check("devices", _devices)
    sizes = yield from run_check("weights", requirements.check_weights, config)
    chat = yield from run_check("tokenizer", requirements.check_tokenizer, config, sizes)
    yield from run_check("disk", requirements.check_disk, config, sizes, workdir)
    with tempfile.TemporaryDirectory(prefix="discover_jax-doctor-") as name:
        tasks = yield from run_check("data", _data, config, Path(name))
        yield from run_check("prompt", _prompts, config, tasks, chat)
        scores = yield from run_check("grader", _graders, tasks)
        yield from run_check("sandbox", _sandbox, config, tasks, scores, Path(name))


def _devices() -> tuple[str, None]:
    try:
        devices = jax.devices()
    except RuntimeError as error:  # the backend named by JAX_PLATFORMS cannot start
        raise ConfigError(f"jax finds no device: {error}") from error
    backend = jax.default_backend()
    if backend == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        for path, extra in (("/dev/nvidia0", "cuda"), ("/dev/accel0", "tpu")):
            if os.path.exists(path):
                raise ConfigError(f"{path} exists, but jax sees only the CPU. Run {install_command(extra)}.")
    kernels = _kernels() if backend == "gpu" else ""
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    each = f", {memory / GIB:.0f} GiB each for jax" if memory else ""
    count = jax.process_count()
    return f"{len(devices)} x {devices[0].device_kind} ({backend}), of {count} process{'es' * (count > 1)}{each}{kernels}", None


def _kernels() -> str:
    """What the kernels of this process's GPU are, for the finding.

    Raises:
      ConfigError: their packages are missing. A run would work, but many times more slowly, with one line in its log.
    """
    kernel, reason = find_kernel("decode_experts", "gpu")
    if kernel is not None:
        return ", with kernels"
    if importlib.util.find_spec(PLATFORMS["gpu"].package) is None or importlib.util.find_spec("triton") is None:
        raise ConfigError(f"The kernels for this GPU are not installed, and without them a run is many times slower: {reason}")
    return f", without kernels, thus many times slower: {reason}"


def _data(config: Any, folder: Path) -> tuple[str, list[AnyTask]]:
    tasks = prepare_tasks(config.task, folder=folder / "task", seed=config.seed)
    texts = []
    for task in tasks:
        if isinstance(task, ProblemTask):
            needed = f"; programs may need {', '.join(installed_packages(task.packages))}" if task.packages else ""
            texts.append(f"{task.id}: a problem, checked by its evaluate(){needed}")
            continue
        checked = "checksums match the definition's" if task.competition.prepared_md5 and task.reward_source == "grade" else "prepared"
        texts.append(f"{task.id}: {', '.join(f'{file.name} {file.rows:,} rows' for file in task.files if file.rows)}, {checked}")
    return "; ".join(texts), tasks


def _prompts(config: Any, tasks: list[AnyTask], chat: ChatFormat) -> tuple[str, None]:
    """Checks the length of the first prompts. The score of a seed program is not known yet."""
    seeds = {
        task.id: dataclasses.replace(SEED, code=program, score=0.0)
        for task, program in zip(tasks, seed_programs(config.task, tasks), strict=True)
        if program
    }
    lengths = check_prompts(tasks, seeds, prompt_settings(config, (), tasks), chat)
    most = config.sampling.max_prompt_tokens
    texts = [f"{id}: {length:,} of {most:,} tokens without a program's output" for id, length in lengths.items()]
    warning = brief_warning(config.prompt.style, tasks, chat)
    return "; ".join(texts) + (f". Warning: {warning}" if warning else ""), None


def _graders(tasks: list[AnyTask]) -> tuple[str, list[float | None]]:
    """The score of each competition's sample submission; None for a problem, whose evaluate() needs a sandbox."""
    found = [("evaluate() is checked in the sandbox", None) if isinstance(task, ProblemTask) else _grader(task) for task in tasks]
    return "; ".join(text for text, _ in found), [score for _, score in found]


def _grader(task: Task) -> tuple[str, float]:
    """Grades three submissions with known results: the sample, a perfect one, and the sample without its last row.

    With several splits of the data, the sample and the perfect submission are graded on each.
    """
    samples = [task.sample(run) for run in range(len(task.splits))]
    grade, perfect = _combined(task, samples), _perfect(task)
    if grade.score is None or grade.private_score is None:
        raise DataError(f"The grader rejects the sample submission: {grade.reason}")
    known = task.competition.sample_score
    if known is not None and not math.isclose(grade.private_score, known, abs_tol=1e-5):
        raise DataError(f"The sample submission scores {grade.private_score:.5f}; expected {known:.5f}.")
    if perfect is not None and task.reward(perfect) <= task.reward(grade.score):
        raise DataError(f"The answers score {perfect:.5f}, no better than the sample's {grade.score:.5f}. Check the metric's direction.")
    answers = "answers not graded: the metric does not take them as predictions" if perfect is None else f"answers {perfect:.5f}"
    shorter = task.grade(samples[-1][: samples[-1].rstrip().rfind(b"\n") + 1]).valid
    if shorter and task.competition.judge is None:
        raise DataError("The grader accepts a submission without its last row. Check that it requires every row.")
    rows = "accepts" if shorter else "rejects"
    return f"sample {grade.score:.5f}, {answers}; {rows} a submission without its last row", grade.score


def _perfect(task: Task) -> float | None:
    """The score of the answers as predictions. None if the metric does not take them.

    They are the labels; or, if the sample submission predicts something else, the better of labels and probabilities.
    """
    scores = []
    for probabilities in (False,) if task.sample_has_labels else (False, True):
        submissions = [task.answers_as_submission(run, probabilities=probabilities) for run in range(len(task.splits))]
        scores.append(_combined(task, submissions).score)
    return max((score for score in scores if score is not None), key=task.reward, default=None)


def _combined(task: Task, submissions: list[bytes]) -> Grade:
    grades = [task.grade(submission, run) for run, submission in enumerate(submissions)]
    return next((grade for grade in grades if not grade.valid), None) or task.combine(grades)


def _sandbox(config: Any, tasks: list[AnyTask], scores: list[float | None], folder: Path) -> tuple[str, None]:
    settings = config.execution
    limits = program_limits(config, tasks)
    with Executor(
        tasks,
        limits,
        workers=None if settings.backend == "ray" else 1,  # each node of a cluster runs its own canary
        cache_dir=folder / "cache",
        backend=settings.backend,
        allow_weaker=settings.allow_weaker,
        ray_address=settings.ray_address,
    ) as executor:
        seeds = seed_programs(config.task, tasks)
        programs = [(seed or _NO_SOLUTION) if task.calls else _PROGRAM for task, seed in zip(tasks, seeds, strict=True)]
        verdicts = [executor.submit(program, number).result() for number, program in enumerate(programs)]
        text, isolated = executor.describe(), executor.isolated
        unusable = executor.unusable_packages(packages_in_prompts(tasks))
    found = []
    for task, seed, verdict, score in zip(tasks, seeds, verdicts, scores, strict=True):
        if isinstance(task, ProblemTask):
            found.append(_check_problem(task, seed, verdict))
        elif verdict.outcome is not Outcome.OK or verdict.grade.score != score:
            raise RunError(
                f"A program that returns the sample submission must end as ok with score {score}; got {verdict.outcome.value} with score"
                f" {verdict.grade.score}. {verdict.execution.detail or verdict.grade.reason}"
            )
    _check_imports(unusable)
    return "; ".join([*found, "the canary could not escape" if isolated else "no canary: programs are not isolated", text]), None


def _check_imports(unusable: Mapping[str, str]) -> None:
    """Raises RunError if there are packages that are installed but that programs cannot import: `unusable`, with the errors."""
    if not unusable:
        return
    errors = "; ".join(f"{name} ({error})" for name, error in unusable.items())
    remedy = "Install what they need in a folder that sandboxes contain (/usr or Python's own)"
    if "libgomp" in errors:
        remedy = "Install the system's package for libgomp (Debian, Ubuntu: `apt-get install libgomp1`; Fedora: `dnf install libgomp`)"
    raise RunError(
        f"Programs cannot import installed packages: {errors}. {remedy}, or uninstall them: `pip uninstall {' '.join(unusable)}`. Until"
        " then, prompts do not name them."
    )


def _check_problem(task: ProblemTask, seed: str, verdict: Verdict) -> str:
    """Checks the verdict on the seed program or, without one, on a program that solves nothing."""
    reason = verdict.execution.detail or verdict.grade.reason
    if not seed:
        if verdict.outcome is Outcome.OK:
            raise RunError(f"{task.id}: evaluate() gives the score {verdict.grade.score} to a program that defines no function.")
        return f"{task.id}: evaluate() rejects a program without functions ({reason})"
    seed_of(task, seed, verdict)
    return f"{task.id}: the seed program scores {verdict.grade.score}"


def run(config: Any, workdir: Path) -> None:
    """Prints the findings.

    Raises:
      SystemExit: with code 1 if a check failed.
    """
    ok = True
    for finding in examine(config, workdir):
        mark = {True: "ok", False: "FIX", None: "--"}[finding.ok]
        print(printable(f"{mark:<3}  {finding.name:<10} {finding.text}"), flush=True)
        ok = ok and finding.ok is True
    print("Everything is ready." if ok else "Fix the items marked FIX and run the doctor again.")
    if not ok:
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(run, preflight=cli.Preflight(all_hosts.run, all_hosts.tell_failure))

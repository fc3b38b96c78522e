"""Prompts for groups of rollouts, built from the task and the parent program.

Two styles: `full` for pretrained models (sections 4.1 and 4.2 of the report) and `brief` for the apprentice, which knows only this style.
Texts depend only on their arguments, so a resumed run has the same prompts as an unbroken one.
"""

import dataclasses
import importlib.metadata
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.text.chat import ChatFormat, Rendered
from discover_jax.text.edits import INSTRUCTIONS
from discover_jax.text.structure import structure_key
from discover_jax.types import PARENT_OUTPUT, Attempt, Outcome, Prompt, State, children_read
from discover_jax.untrusted_text import one_line, without_names

STYLES = ("full", "brief")
ANSWERS = ("program", "edits")

# Distributions that programs may import; the full prompt lists those that are installed.
PACKAGES = ("numpy", "pandas", "scipy", "scikit-learn", "xgboost", "xgboost-cpu", "lightgbm", "catboost", "statsmodels")

_MOST_FILES = 50
_COLUMNS_CHARS, _COLUMN_CHARS = 2000, 100
"""Characters of a table's list of columns, and of a column's name, that a prompt shows. 2,000 are about 700 tokens."""

IDEAS = (
    "feature engineering from what the columns mean",
    "handling of missing values and categories",
    "other models",
    "ensemble methods",
    "tuning by cross-validation on the training rows",
    "thresholds on predicted probabilities",
)


class _MetricLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...


class _FileLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def columns(self) -> tuple[str, ...]: ...


class TaskLike(Protocol):
    """The part of a task that prompts use; see `discover_jax.tasks.task.Task`.

    Attributes:
      interface: the functions that a program of a problem defines; empty for a competition.
      ideas: suggestions for improvements; None for those of the settings.
      packages: packages that programs of this problem may need; empty for those of the settings.
      leaderboard: published scores; only prompts of problems show them.
    """

    @property
    def id(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def metric(self) -> _MetricLike: ...
    @property
    def files(self) -> Sequence[_FileLike]: ...
    @property
    def interface(self) -> str: ...
    @property
    def ideas(self) -> tuple[str, ...] | None: ...
    @property
    def packages(self) -> tuple[str, ...]: ...
    @property
    def leaderboard(self) -> str: ...
    def score_text(self, score: float) -> str: ...


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How prompts are written.

    Attributes:
      style: "full" or "brief". The brief style uses only `max_tokens`.
      max_tokens: longest prompt, in tokens.
      answer: "program", or "edits" to ask for edits of the parent's program; see `asks_for_edits`.
      seconds, cores, memory_gib: limits of a program, as the prompt states them.
      result_mib: limit of a submission or a returned value, in MiB; 0: the prompt does not state it.
      packages: packages that a program may import, as the prompt states them, unless the problem names others; see `installed_packages`.
      unusable: packages that are installed but that programs cannot import: no prompt names them.
      ideas: suggestions for improving a program for a competition.
      ideas_shown: number of ideas in a prompt, rotating over groups and steps; 0 for all.
      stdout_chars, error_chars: maximum length of the shown end of the parent's output, and of an error.
    """

    style: str
    max_tokens: int
    answer: str = "program"
    seconds: float = 300.0
    cores: int = 2
    memory_gib: float = 4.0
    result_mib: float = 0
    packages: tuple[str, ...] = ("numpy", "pandas", "scipy", "scikit-learn")
    unusable: frozenset[str] = frozenset()
    ideas: tuple[str, ...] = IDEAS
    ideas_shown: int = 0
    stdout_chars: int = 2000
    error_chars: int = 800

    def __post_init__(self):
        if self.style not in STYLES:
            raise ConfigError(f"config.prompt.style = {self.style!r} is not known; allowed: {', '.join(STYLES)}.")
        if self.answer not in ANSWERS:
            raise ConfigError(f"config.prompt.answer = {self.answer!r} is not known; allowed: {', '.join(ANSWERS)}.")
        if self.max_tokens < 1:
            raise ConfigError(f"config.sampling.max_prompt_tokens = {self.max_tokens} must be at least 1.")


def installed_packages(names: Sequence[str] = PACKAGES, unusable: Collection[str] = ()) -> tuple[str, ...]:
    """Those of the packages that are installed, with versions. Programs run in the same Python environment.

    Args:
      names: for pip. Default: packages for tables and models.
      unusable: names of packages to leave out, because programs cannot import them.
    """
    found = []
    for name in names:
        if name in unusable:
            continue
        try:
            found.append(f"{name.removesuffix('-cpu')} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(dict.fromkeys(found))


def brief_text(
    competition_id: str,
    metric: str,
    higher_is_better: bool,
    previous: tuple[str, float] | None,
    score_text: Callable[[float], str] = "{:.4f}".format,
) -> str:
    """The short user message that the apprentice was trained on. The corpus and runs must both use this function.

    Args:
      competition_id: id of the competition.
      metric: name of the metric.
      higher_is_better: its direction.
      previous: code and score (in the metric's own direction) of the parent program; None for a first attempt.
      score_text: how the score is shown. Default: four places, as for competitions.
    """
    head = f"competition: {competition_id}\nmetric: {metric}, {_direction(higher_is_better)} is better\n"
    if previous is None:
        return head + "write run()"
    code, score = previous
    return f"{head}previous score: {score_text(score)}\n```python\n{code}\n```\nimprove run()"


def _warn(shortened: str) -> None:
    logging.getLogger(__name__).warning("A prompt was shortened. %s", shortened)


def build_prompt(
    task: TaskLike,
    parent: State,
    recent_failures: Sequence[Attempt],
    settings: PromptSettings,
    chat: ChatFormat,
    group: int,
    step: int,
    on_shortened: Callable[[str], None] = _warn,
    inspirations: Sequence[State] = (),
) -> Prompt:
    """The prompt of one group.

    If it is too long, inspirations are left out first, the last ones before the others; then the parent's output is shortened, then the
    error. The prompt marks the cut, and `on_shortened` gets a report of it. The parent's program is never cut.

    Args:
      task: the task to solve.
      parent: the state to improve; the seed for a first attempt.
      recent_failures: the last attempts on this parent, oldest first, if all of them failed; otherwise empty. The last error is shown.
      settings: style and limits.
      chat: chat format of the policy.
      group, step: number of the group within its step, and the step; they rotate the ideas.
      on_shortened: called at most once with a line about the cut. Default: log a warning.
      inspirations: other programs to show; see `choose_inspirations`. Only the full style shows them.

    Raises:
      CapacityError: the shortened prompt still exceeds `settings.max_tokens`. See `program_fits`.
    """
    if settings.style == "brief":
        return _finish(chat.render(_brief(task, parent)), settings, parent, group)
    output = _tail(without_names(parent.stdout, chat.names), settings.stdout_chars)
    error = _tail(without_names(_error(recent_failures, task), chat.names), settings.error_chars)
    ideas = _ideas(settings.ideas if task.ideas is None else task.ideas, settings.ideas_shown, group + step)
    edits = asks_for_edits(settings, parent)
    contract = _contract(task, settings, edits=edits)
    # The program itself stays as it is: edits and improvements need its exact text.
    shown_parent = dataclasses.replace(parent, feedback=without_names(parent.feedback, chat.names))
    rendered = Rendered((), "")
    count = len(inspirations)
    attempts = [(count - left_out, output, error) for left_out in range(count)]
    attempts += [(0, cut, error) for cut in _cuts(output)] + [(0, "", cut) for cut in _cuts(error)]
    for others, shown_output, shown_error in attempts:
        request = _request(task, shown_parent, inspirations[:others], shown_output, shown_error, ideas, chat.names, edits=edits)
        rendered = chat.render(request, contract)
        if len(rendered.ids) <= settings.max_tokens:
            if (others, shown_output, shown_error) != (count, output, error):
                of_others = f", {others} of {count} other programs" if count else ""
                on_shortened(
                    f"Group {group}, built on {parent.id}: shows {len(shown_output):,} of {len(output):,} characters of the output and"
                    f" {len(shown_error):,} of {len(error):,} of the error{of_others}."
                )
            break
    return _finish(rendered, settings, parent, group)


def asks_for_edits(settings: PromptSettings, parent: State) -> bool:
    """Whether the prompt asks for edits of the parent's program. If there is none, it asks for a whole program."""
    return settings.answer == "edits" and settings.style == "full" and parent.score is not None


def choose_inspirations(states: Sequence[State], parent: State, count: int) -> list[State]:
    """The first `count` states whose programs differ in structure from the parent's and from each other.

    Args:
      states: of the archive, best first.
    """
    chosen: list[State] = []
    seen = {structure_key(parent.code)}
    for state in states if count else ():
        if (key := structure_key(state.code)) not in seen:
            seen.add(key)
            chosen.append(state)
            if len(chosen) == count:
                break
    return chosen


def check_prompt(task: TaskLike, parent: State, settings: PromptSettings, chat: ChatFormat) -> int:
    """Tokens of the shortest prompt with this parent: without output, error and other programs.

    Raises:
      CapacityError: it exceeds `settings.max_tokens`.
    """
    # With all ideas: at least as long as any prompt that shows only some of them.
    whole = dataclasses.replace(settings, ideas_shown=0)
    return len(build_prompt(task, dataclasses.replace(parent, stdout=""), (), whole, chat, group=0, step=0).tokens_P)


def program_fits(task: TaskLike, state: State, settings: PromptSettings, chat: ChatFormat) -> bool:
    """Whether a state can be a parent: whether a prompt with its program but no output or error fits `settings.max_tokens`."""
    try:
        check_prompt(task, state, settings, chat)
    except CapacityError:
        return False
    return True


def _finish(rendered: Rendered, settings: PromptSettings, parent: State, group: int) -> Prompt:
    length = len(rendered.ids)
    if length > settings.max_tokens:
        raise CapacityError(
            f"The prompt of group {group}, built on state {parent.id!r} with a program of {len(parent.code):,} characters, has"
            f" {length:,} tokens; config.sampling.max_prompt_tokens allows {settings.max_tokens:,}. Raise it to at"
            f" least {length:,}."
        )
    return Prompt(group=group, parent_id=parent.id, text=rendered.text, tokens_P=np.asarray(rendered.ids, np.int32))


def _brief(task: TaskLike, parent: State) -> str:
    previous = None if parent.score is None else (parent.code, parent.score)
    shown = {"score_text": task.score_text} if task.interface else {}  # all digits of a problem's score: the last ones count
    return brief_text(task.id, task.metric.name, task.metric.higher_is_better, previous, **shown)


def _contract(task: TaskLike, settings: PromptSettings, *, edits: bool) -> str:
    """The rules for answers and programs, and the limits; the same for every competition."""
    code = "its code" if edits else "the code block"
    rules = f"\n\n{INSTRUCTIONS}" if edits else ""
    limits = f"{settings.seconds:g} seconds in all, {settings.cores} CPU cores, {settings.memory_gib:g} GiB of memory, no GPU, no network"
    if settings.result_mib:
        what = "returned values" if task.interface else "a submission"
        limits += f", {what} of at most {settings.result_mib:g} MiB{'' if task.interface else ' as CSV'}"
    packages = ", ".join(installed_packages(task.packages, settings.unusable) or settings.packages)
    if task.interface:
        answer = "edits of your last program" if edits else "exactly one\nPython code block"
        return f"""\
You write Python programs that solve a problem. A checker calls the program's functions and scores what they return. Answer with {answer}. \
It must define: {task.interface}.

- The program is run in a fresh process: {code} is executed, then its functions are called. Include all imports.
- Functions get and return numbers, strings, lists, dicts and numpy arrays of numbers.
- Limits: {limits}.
- Installed packages: {packages}. Nothing else can be installed.
- What the program prints is kept: print what would help to improve it further.
- A program that fails, runs out of time or returns an invalid solution scores nothing.{rules}"""
    answer = "edits of your last program" if edits else "exactly one Python code block"
    return f"""\
You write Python programs that solve competitions in machine learning. Answer with {answer}. It must define a
function `run()` without arguments that returns the submission as a pandas DataFrame, with the columns and the ids of sample_submission.csv.

- Read the data by relative paths: `data/train.csv`, `data/test.csv`, `data/sample_submission.csv`. They cannot be written to.
- The program is run once, in a fresh process: {code} is executed, then `run()` is called. Include all imports.
- Limits: {limits}.
- Installed packages: {packages}. Nothing else can be installed.
- What the program prints is kept: print validation scores that would help to improve it further.
- A program that fails, runs out of time or returns an invalid submission scores nothing.{rules}"""


def _ideas(ideas: tuple[str, ...], shown: int, turn: int) -> tuple[str, ...]:
    """The ideas for this turn, in the order of the list; all of them if `shown` is 0."""
    count = len(ideas)
    if not shown or shown >= count:
        return ideas
    chosen = {(turn * shown + offset) % count for offset in range(shown)}
    return tuple(idea for index, idea in enumerate(ideas) if index in chosen)


def _request(
    task: TaskLike,
    parent: State,
    inspirations: Sequence[State],
    output: str,
    error: str,
    ideas: tuple[str, ...],
    names: Collection[str],
    *,
    edits: bool,
) -> str:
    """The competition or problem, the parent program and its result."""
    direction = _direction(task.metric.higher_is_better)
    parts = [f"# {'Problem' if task.interface else 'Competition'}: {task.id}\n\n{task.description}"]
    if task.files:
        parts.append("# Files in `data/`\n\n" + without_names(_describe_files(task.files), names))
    if task.interface:
        parts.append(f"# Evaluation\n\nSolutions are scored by {task.metric.name}; {direction} is better. Best known: {task.leaderboard}.")
    else:
        parts.append(f"# Evaluation\n\nSubmissions are scored by {task.metric.name} on the rows of test.csv; {direction} is better.")
    if parent.score is not None:
        parts.append(
            f"# Your last program\n\nHere is the last code we ran:\n\n{_fenced(parent.code, 'python')}\n\n"
            f"Previous score: {task.score_text(parent.score)} ({task.metric.name}, {direction} is better)"
        )
    if children_read(parent.output):
        parts.append(
            f"The value that it returned is in the file `{PARENT_OUTPUT}` of the working directory, with arrays as nested lists. Read it by"
            f' `json.load(open("{PARENT_OUTPUT}"))`: the new program may start from it and improve it.'
        )
    if parent.feedback:
        parts.append(f"What the checker says about it:\n\n{_fenced(parent.feedback)}")
    if output:
        parts.append(f"The end of what it printed:\n\n{_fenced(output)}")
    if error:
        subject = "The last attempt to improve it failed" if parent.score is not None else "The last attempt failed"
        parts.append(f"{subject}:\n\n{_fenced(error)}")
    if inspirations:
        shown = [
            f"Score: {task.score_text(state.score)}\n\n{_fenced(state.code, 'python')}" for state in inspirations if state.score is not None
        ]
        parts.append("\n\n".join(["# Other programs\n\nThese scored well, too. Use what is good in them.", *shown]))
    if parent.score is None:
        parts.append("Write a program that scores as well as you can make it.")
    else:
        parts.append(
            f"You are iteratively improving your solution.{_consider(ideas)}\n"
            "Unless you make a meaningful improvement, you will not be rewarded. Answer with"
            f" {'edits of your last program' if edits else 'the whole new program'}."
        )
    return "\n\n".join(parts)


def _consider(ideas: tuple[str, ...]) -> str:
    """The ideas as the end of a line, or as a list if they are sentences."""
    if any(idea.endswith(".") for idea in ideas):
        return "\n".join([" Consider:\n", *(f"- {idea}" for idea in ideas), ""])
    return f" Consider: {', '.join(ideas)}." if ideas else ""


def _describe_files(files: Sequence[_FileLike]) -> str:
    """A line for each file; long lists of files and columns are shortened in the middle."""
    lines = [_describe_file(file) for file in files]
    return "\n".join(_shortened(lines, _MOST_FILES, "- ... {:,} more files ..."))


def _describe_file(file: _FileLike) -> str:
    if file.rows is None:
        return f"- {one_line(file.name)}"
    names = map(one_line, file.columns)
    columns = [name if len(name) <= _COLUMN_CHARS else f"{name[: _COLUMN_CHARS - 3]}..." for name in names]
    fit = len(columns) if len(", ".join(columns)) <= _COLUMNS_CHARS else _COLUMNS_CHARS // (2 + max(map(len, columns)))
    shown = ", ".join(_shortened(columns, fit, "... {:,} more ..."))
    return f"- {one_line(file.name)}: {file.rows:,} rows, {len(columns):,} columns: {shown}"


def _shortened(items: list[str], most: int, mark: str) -> list[str]:
    """At most about `most` of the items: the first three quarters and the last quarter, and a mark with the number left out."""
    if len(items) <= most:
        return items
    head = max(1, most * 3 // 4)
    tail = max(1, most - head)
    return [*items[:head], mark.format(len(items) - head - tail), *items[-tail:]] if len(items) > head + tail else items


def _error(recent_failures: Sequence[Attempt], task: TaskLike) -> str:
    """The outcome and detail of the last failure."""
    if not recent_failures:
        return ""
    last = recent_failures[-1]
    if last.outcome is Outcome.FORMAT_ERROR and not last.detail:
        return "The answer held no Python code block."
    invalid = last.outcome is Outcome.INVALID_SUBMISSION and task.interface
    return f"{'invalid solution' if invalid else last.outcome.value.replace('_', ' ')}\n{last.detail}".strip()


def _tail(text: str, limit: int) -> str:
    """The end of a text in at most `limit` characters, including the mark of the cut; empty if the limit is too small."""
    mark = "[...]\n"
    text = text.strip("\n")
    if len(text) <= limit:
        return text
    return mark + text[len(text) - limit + len(mark) :] if limit > 2 * len(mark) else ""


def _cuts(text: str) -> list[str]:
    """A text's end: whole, three quarters, half, a quarter, nothing."""
    return [_tail(text, len(text) * quarters // 4) for quarters in (4, 3, 2, 1, 0)]


def _fenced(text: str, language: str = "") -> str:
    """A Markdown block whose fence is longer than any fence in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _direction(higher_is_better: bool) -> str:
    return "higher" if higher_is_better else "lower"

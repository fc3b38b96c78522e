"""Checks that settings suit the tasks of a run, before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

from discover_jax.exceptions import ConfigError
from discover_jax.tasks.prepare import AnyTask
from discover_jax.tasks.rewards import TRANSFORMS
from discover_jax.text.chat import ChatFormat
from discover_jax.text.prompts import PromptSettings, check_prompt
from discover_jax.text.tokenizer import SentencePieceTokenizer
from discover_jax.types import SEED, State


def check_objective(train: Any, tasks: Sequence[AnyTask]) -> None:
    """Checks that the best reward so far can be compared with the signals of each competition, if the estimator uses it.

    Raises:
      ConfigError: it cannot.
    """
    if train.advantage != "frontier" or train.frontier_base != "best":
        return
    ranked = [task.id for task in tasks if TRANSFORMS[task.transform].in_group]
    if ranked:
        raise ConfigError(
            f"config.train.frontier_base = 'best' compares rewards with the best reward so far, but {', '.join(ranked)} uses ranks within a"
            " group (transform 'rank_in_group'). Set config.train.frontier_base = 'group', or use another transform."
        )


def check_ranking(rule: str, tasks: Sequence[AnyTask]) -> None:
    """Checks that programs can be ranked by config.reuse.score.

    Raises:
      ConfigError: the scores of a competition have no results of single rows, or no competition's scores are measured on rows.
    """
    if rule == "raw":
        return
    if blind := _without_rows(tasks):
        raise ConfigError(
            f"config.reuse.score = {rule!r} needs the results of single rows, which the scores of {', '.join(blind)} do not have. Set it to"
            " 'raw'. Or give the competition's metric an `influence` (docs/competitions.md)."
        )
    if not any(task.has_row_results for task in tasks):
        raise ConfigError(
            f"config.reuse.score = {rule!r} has no effect: the scores of {', '.join(task.id for task in tasks)} are exact. Set it to 'raw'."
        )


def check_copies(copies: str, tolerance: float, tasks: Sequence[AnyTask]) -> None:
    """Checks that copies can be told from other programs, if config.diversity.copies lets them count as failures.

    Args:
      copies, tolerance: config.diversity.copies and config.diversity.copy_tolerance.

    Raises:
      ConfigError: equal scores of a competition do not mean equal predictions, or the score of a problem varies from run to run; or no
        task has scores to which the tolerance applies.
    """
    if tolerance and all(task.has_row_results for task in tasks):
        raise ConfigError(
            f"config.diversity.copy_tolerance = {tolerance} has no effect: copies are found by the results of single rows, which"
            f" {', '.join(task.id for task in tasks)} has. Remove it; it is for problems."
        )
    if copies == "keep":
        return
    if blind := _without_rows(tasks):
        raise ConfigError(
            f"config.diversity.copies = {copies!r} cannot recognise copies of programs for {', '.join(blind)}. The score of a noisy problem"
            " varies between equal programs, and a competition needs the results of single rows. Set it to 'keep'. For a competition, you"
            " can give its metric an `influence` (docs/competitions.md)."
        )


def _without_rows(tasks: Sequence[AnyTask]) -> list[str]:
    """Ids of the tasks whose scores are noisy and have no results of single rows."""
    return [task.id for task in tasks if task.noisy and not task.has_row_results]


def check_prompts(tasks: Sequence[AnyTask], seeds: Mapping[str, State], settings: PromptSettings, chat: ChatFormat) -> dict[str, int]:
    """Checks that the first prompts of a run fit, so that it fails before it loads weights. Returns their tokens by competition id.

    Args:
      seeds: seed programs by competition id; the others start from nothing.

    Raises:
      CapacityError: a prompt is too long even without output of programs.
    """
    return {task.id: check_prompt(task, seeds.get(task.id, SEED), settings, chat) for task in tasks}


def brief_warning(style: str, tasks: Sequence[AnyTask], chat: ChatFormat) -> str | None:
    """A warning if the model cannot know its task, because prompts of the brief style lack the description; None otherwise.

    Args:
      style: config.prompt.style.
      chat: of the model. Only the apprentice, also one that was trained again, has a SentencePiece tokenizer.
    """
    if style != "brief":
        return None
    if not isinstance(chat.tokenizer, SentencePieceTokenizer):
        return (
            "config.prompt.style = 'brief' omits the description of the task. It is meant for the apprentice, which was trained on it. For"
            " this model, set config.prompt.style = 'full', or start from configs/qwen.py or configs/spaceship.py."
        )
    if problems := [task.id for task in tasks if task.calls]:
        return (
            f"The apprentice knows only competitions, so its programs cannot solve {', '.join(problems)}. Use a pretrained model"
            " (docs/models.md)."
        )
    return None

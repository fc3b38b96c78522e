"""Settings of the task: the competition or problem, its reward, and the prompt that presents it."""

from typing import Any

from discover_jax.config.finalists import with_finalists
from discover_jax.config.setting import Rule, Setting

TASK: dict[str, Any] = {
    "competition": Setting(
        "spaceship-titanic",
        "id of a built-in competition or problem, path of a .py file that defines COMPETITION or PROBLEM, or mlebench:ID. Separate several"
        " with commas: they share the model, and groups take turns",
        tier=1,
    ),
    "raw": Setting(
        "",
        "path of the competition's raw data (CSV or zip); empty for a problem, and for a competition that includes its data. One path for"
        " each competition or problem, separated by commas; with several, write a comma within a path as `\\,`",
        tier=1,
    ),
    "seed_program": Setting(
        "",
        "path of a program to start from; it is run and scored first. Empty: a problem's own seed program; competitions start from nothing."
        " One path for each competition or problem, separated by commas",
    ),
    "reuse_output": Setting(
        "problem",
        "whether programs for a problem may read the value that their parent returned, from a file. `problem`: as the problem's definition"
        " says; `on`, `off`: for all problems of the run",
        choices=("problem", "on", "off"),
        rules=(
            Rule(
                "`on` needs the `full` prompt: `brief` does not mention the file",
                lambda config: config.task.reuse_output != "on" or config.prompt.style == "full",
                uses=("prompt.style",),
                fix="Set config.prompt.style = 'full', or remove it.",
            ),
        ),
    ),
    "reward": Setting(
        "grade",
        "rows that rewards are computed from. `grade`: the rows with private answers; `holdout`: rows held out of the public training"
        " table",
        tier=1,
        choices=("grade", "holdout"),
    ),
    "holdout_fraction": Setting(0.2, "fraction of the public training rows that `holdout` holds out", low=0.01, high=0.9),
    "holdout_folds": Setting(
        1,
        "1: no cross-validation; 2 or more: cross-validation over all training rows, with this number of folds. Each program runs once"
        " per fold, and once more for its submission",
        low=1,
        high=100,
        only_with=("task.reward", ("holdout",)),
    ),
    "selection_fraction": Setting(
        0.0,
        "fraction of the public training rows that `holdout` holds out in addition, for the choice of the best program: no reward and no"
        " prompt sees them. 0: none",
        low=0.0,
        high=0.8,
        rules=(
            Rule(
                "holdout_fraction + selection_fraction must be less than 1, and there must be no folds",
                lambda config: (
                    not config.task.selection_fraction
                    or (config.task.holdout_folds == 1 and config.task.holdout_fraction + config.task.selection_fraction < 1)
                ),
                uses=("task.holdout_fraction", "task.holdout_folds"),
                fix="Lower one of them, or set config.task.holdout_folds = 1.",
            ),
            with_finalists("task.selection_fraction", 0.0),
        ),
        only_with=("task.reward", ("holdout",)),
    ),
    "stratified": Setting(
        True,
        "whether `holdout` draws held-out rows and folds in proportion from each class, if the labels are classes. False: as earlier"
        " versions did, to start from one of their runs",
        only_with=("task.reward", ("holdout",)),
    ),
    "grader": Setting(
        "native",
        "grader of submissions. `native`: this project, with MLE-bench's rules; `mlebench`: the installed package",
        choices=("native", "mlebench"),
    ),
}

_FULL = ("prompt.style", ("full",))

PROMPT: dict[str, Any] = {
    "style": Setting(
        "full",
        "`full`: describes the competition or problem; `brief`: the short form that the apprentice was trained on",
        choices=("full", "brief"),
        rules=(
            Rule(
                "the apprentice knows only the `brief` prompt",
                lambda config: config.model.weights != "apprentice" or config.prompt.style == "brief",
                uses=("model.weights",),
                fix="Set config.prompt.style = 'brief', or set config.model.weights to another checkpoint.",
            ),
        ),
    ),
    "reasoning_effort": Setting(
        "medium",
        "reasoning effort requested in gpt-oss's system message; other models have none",
        choices=("low", "medium", "high"),
        only_with=_FULL,
    ),
    "ideas": Setting(
        0, "number of ideas for improvement that a prompt shows; they rotate over groups and steps. 0: all", low=0, only_with=_FULL
    ),
    "inspirations": Setting(
        0,
        "number of other good programs of the archive that a prompt shows with their scores, in addition to the parent; no two have the"
        " same structure. They are left out first if a prompt is too long",
        low=0,
        high=16,
        only_with=_FULL,
    ),
    "answer": Setting(
        "program",
        "what prompts ask for. `program`: a whole program; `edits`: search/replace blocks on the parent's program, if it has one. Whole"
        " programs are accepted in both cases",
        choices=("program", "edits"),
        only_with=_FULL,
    ),
    "stdout_chars": Setting(
        2000, "number of characters that a prompt shows from the end of the parent's output", unit="characters", low=0, only_with=_FULL
    ),
    "error_chars": Setting(
        800, "number of characters that a prompt shows from the end of a failed attempt's error", unit="characters", low=0, only_with=_FULL
    ),
}

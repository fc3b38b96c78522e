"""Checks and describes the tables that a competition's prepare() wrote."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from discover_jax.exceptions import ConfigError
from discover_jax.tasks import answer_types
from discover_jax.tasks.answers import TextColumns
from discover_jax.tasks.competition import Competition
from discover_jax.tasks.holdout import PUBLIC_TABLES
from discover_jax.tasks.tables import read_text_table
from discover_jax.tasks.task import Task

_ANSWERS = "private/test.csv"
_MOST_LABELS = 200
"""Labels that are looked at one by one, for a warning."""


def check_tables(definition: Competition, public: Path, private: Path) -> None:
    """Checks the tables before they are used.

    Raises:
      ConfigError: a table is missing, cannot be read, or does not fit the others.
    """

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"Competition {definition.id!r}: its prepare() {problem} See docs/competitions.md for what it must write.")

    def table(path: Path) -> pd.DataFrame:
        name = f"{path.parent.name}/{path.name}"
        if not path.is_file():
            raise refuse(f"did not write {name}.")
        try:
            return read_text_table(path.read_bytes())
        except ValueError as error:
            raise refuse(f"wrote {name}, which is not a CSV table in UTF-8: {str(error).strip().rstrip('.')}.") from error

    if not definition.id_column:  # only its judge knows the format of its tables
        for path in (public / "sample_submission.csv", private / "test.csv"):
            table(path)
        return
    tables = {f"{path.parent.name}/{path.name}": table(path) for path in [*(public / name for name in PUBLIC_TABLES), private / "test.csv"]}
    for name, found in tables.items():
        targets = {
            "public/test.csv": (),
            "public/sample_submission.csv": definition.submitted_columns,
        }.get(name, definition.label_columns)
        if missing := [column for column in (definition.id_column, *targets) if column not in found.columns]:
            raise refuse(f"wrote {name} without {', '.join(missing)}.")
        if name != "public/train.csv" and not len(found):
            raise refuse(f"wrote {name} without a row.")
        broken = [column for column in (definition.id_column, *targets) if found[column].str.contains("\r(?!\n)").any()]
        if broken:
            raise refuse(f"wrote a carriage return into column {broken[0]!r} of {name}. Programs lose it when they write a CSV table.")
    for target in definition.label_columns:
        if target in tables["public/test.csv"].columns:
            raise refuse(f"wrote the target {target!r} into public/test.csv, where every program could read it.")
        if "" in set(tables[_ANSWERS][target]):
            raise refuse(f"wrote {_ANSWERS} with answers missing.")
    ids = {name: sorted(found[definition.id_column]) for name, found in tables.items() if name != "public/train.csv"}
    if len(set(ids[_ANSWERS])) < len(ids[_ANSWERS]) or "" in ids[_ANSWERS]:
        raise refuse(f"wrote {_ANSWERS} with empty or repeated ids.")
    for name in ("public/test.csv", "public/sample_submission.csv"):
        if ids[name] != ids[_ANSWERS]:
            raise refuse(f"wrote {name} with other ids than {_ANSWERS}.")
    if definition.classes:
        for name in ("public/train.csv", _ANSWERS):
            if unknown := set(tables[name][definition.label_columns[0]]) - {*definition.class_columns, ""}:
                raise refuse(f"wrote {name} with the label {min(unknown)!r}, which is not among the competition's classes.")


def describe_tables(public: Path) -> list[dict[str, Any]]:
    """Name, rows and columns of the files that programs see. A file that is not a CSV table in UTF-8 has neither rows nor columns."""
    tables = []
    for path in sorted(path for path in public.rglob("*") if path.is_file()):
        rows, columns = None, []
        if path.suffix == ".csv" and not path.name.startswith("."):
            try:
                table = read_text_table(path.read_bytes())
                rows, columns = len(table), list(table.columns)
            except ValueError:
                rows = None  # listed by its name only; the tables that must be readable were checked before
        tables.append({"name": str(path.relative_to(public)), "rows": rows, "columns": columns})
    # train, test and sample_submission come first, in reading order; others follow by name.
    order = {name: place for place, name in enumerate(PUBLIC_TABLES)}
    return sorted(tables, key=lambda table: order.get(table["name"], len(order)))


def text_columns(definition: Competition, public: Path, private: Path | None) -> TextColumns:
    """The targets that are text, from all labels known now. A competition with a judge has none: the judge gets what pandas infers.

    Args:
      private: the answers; None if nothing may depend on them.
    """
    if definition.judge is not None:
        return TextColumns()
    if definition.classes:
        return TextColumns(answers=definition.label_columns)
    sample, train = (read_text_table((public / name).read_bytes()) for name in ("sample_submission.csv", "train.csv"))
    known = [train, *([read_text_table((private / "test.csv").read_bytes())] if private is not None else [])]
    text = tuple(column for column in definition.label_columns if answer_types.text_labels(known, column, complete=private is not None))
    return TextColumns(
        text,
        tuple(
            column
            for column in text
            if answer_types.text_predictions([label for table in known for label in table[column]], sample[column].tolist())
        ),
    )


def warn_of_hidden_labels(definition: Competition, public: Path, text: TextColumns) -> None:
    """Warns of labels that programs lose if they read the training table as pandas does by default."""
    if definition.judge is not None:
        return
    train = read_text_table((public / "train.csv").read_bytes())
    for column in definition.label_columns:
        hidden = answer_types.hidden_labels(train[column].tolist())
        if hidden and column not in text.answers:
            logging.getLogger(__name__).warning(
                "Competition %r: the label %r in column %r of train.csv counts as missing, since the others are numbers or truth values."
                " If it is a class, give it another name.",
                *(definition.id, hidden[0], column),
            )
        elif hidden:
            logging.getLogger(__name__).warning(
                "Competition %r: pandas reads the label %r in column %r as a missing value. Say in `description` that programs must read"
                " train.csv with keep_default_na=False.",
                *(definition.id, hidden[0], column),
            )


def check_ids(task: Task) -> None:
    """Checks that the ids of each submission stay different when pandas reads them, as programs and grading do.

    Raises:
      ConfigError: two ids become one.
    """
    competition = task.competition
    if competition.judge is not None:
        return  # see `warn_of_types`
    for split in task.splits:
        tables = [read_text_table((task.folder / "private" / name).read_bytes()) for name, _ in split.answers]
        if merged := answer_types.merged_ids([id for table in tables for id in table[competition.id_column]]):
            raise ConfigError(
                f"Competition {task.id!r}: pandas reads the ids {merged[0]!r} and {merged[1]!r} in column {competition.id_column!r} as the"
                " same value, so a submission cannot tell their rows apart. Let prepare() write ids that stay different, for example with a"
                " letter in front, into all tables."
            )


def warn_of_types(definition: Competition, public: Path, private: Path) -> None:
    """Warns of ids and labels that change when pandas reads them. The judge's verdicts stay as they are, so that they are MLE-bench's."""
    sample, answers = (read_text_table(path.read_bytes()) for path in (public / "sample_submission.csv", private / "test.csv"))
    for column in (column for column in sample.columns if column in answers.columns):
        texts = answers[column].tolist()
        problem = None
        if len(set(texts)) == len(texts):
            if merged := answer_types.merged_ids(texts):
                problem = f"the ids {merged[0]!r} and {merged[1]!r} as the same value. It pairs such rows by their order in the file"
        elif answer_types.is_text(texts) and (
            changed := [text for text in sorted(set(texts))[:_MOST_LABELS] if text and not answer_types.is_text([text])]
        ):
            problem = f"the label {changed[0]!r} as a number or a missing value in some submissions and as text in others"
        if problem:
            logging.getLogger(__name__).warning(
                "Competition %r: its grader, %s, reads column %r as pandas infers it, and so takes %s.",
                *(definition.id, definition.judge_version or "a judge", column, problem),
            )

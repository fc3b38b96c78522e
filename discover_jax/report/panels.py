"""The small charts of metrics.jsonl: which metrics each chart shows, and what they mean."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from discover_jax.exceptions import RunError
from discover_jax.runs.metrics import SCHEMA


@dataclasses.dataclass(frozen=True)
class Panel:
    """A small chart.

    Attributes:
      title: of the chart.
      names: (metric, label) pairs. A chart of several runs shows only the first metric, or the last one of a range.
      learned: whether only training updates produce these metrics, so that a search has none.
      form: "lines"; "range": the first line is between the second and the third; "stack": parts of a whole.
    """

    title: str
    names: tuple[tuple[str, str], ...]
    learned: bool = False
    form: str = "lines"


PANELS = (
    Panel("Advantages", (("advantage/mean", "mean"), ("advantage/min", "min"), ("advantage/max", "max")), form="range"),
    Panel("Entropy", (("entropy", "entropy"),)),
    Panel("KL to the base model", (("kl_base/mean", "KL"),), learned=True),
    Panel("Log-probability gap", (("logprob_gap/mean", "mean"), ("logprob_gap/max", "max"))),
    Panel("Gradient norm", (("grad_norm", "norm"),), learned=True),
    Panel("Tokens per rollout", (("tokens/mean", "mean"),)),
    Panel("Sampling speed", (("sample/tokens_per_s", "tokens/s"),)),
    Panel("Distance between programs", (("diversity/distance", "within groups"),)),
    Panel(
        "Time per step",
        (
            ("time/sample_s", "sample"),
            ("time/execute_s", "execute"),
            ("time/update_s", "update"),
            ("time/save_s", "save"),
            ("time/checkpoint_s", "checkpoint"),
            ("time/checkpoint_wait_s", "wait for checkpoint"),
        ),
        form="stack",
    ),
)


def panels_of(metrics: Sequence[Mapping[str, Any]], kind: str, path: Path) -> list[dict[str, Any]]:
    """The panels with one value per metrics row, null if missing, as JSON values.

    Args:
      metrics: rows of metrics.jsonl.
      kind: "train" or "search".
      path: of the file, for errors.

    Raises:
      RunError: a metric is not a number.
    """
    return [_panel(panel, metrics, kind, path) for panel in PANELS]


def _panel(panel: Panel, metrics: Sequence[Mapping[str, Any]], kind: str, path: Path) -> dict[str, Any]:
    series = [
        {"name": name, "label": label, "meaning": SCHEMA[name][1], "values": _column(metrics, name, path)} for name, label in panel.names
    ]
    absent = None
    if all(value is None for part in series for value in part["values"]):
        names = ", ".join(name for name, _ in panel.names)
        absent = (
            "A search run has no update, so it does not have this metric."
            if panel.learned and kind == "search"
            else f"metrics.jsonl does not have {names}."
        )
    return {"title": panel.title, "unit": SCHEMA[panel.names[0][0]][0], "form": panel.form, "series": series, "absent": absent}


def _column(metrics: Sequence[Mapping[str, Any]], name: str, path: Path) -> list[float | None]:
    values = [_number(row, name, path) for row in metrics]
    if name != "time/checkpoint_s":
        return values
    # A row holds the time of the checkpoint written before it. That checkpoint belongs to the step before.
    shifted = [
        after if later["step"] == row["step"] + 1 else None for row, later, after in zip(metrics, metrics[1:], values[1:], strict=False)
    ]
    return [*shifted, None] if metrics else []


def _number(row: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise RunError(f"{path}: {name} of step {row['step']} must be a number; got {value!r:.60}. Restore the original file.")

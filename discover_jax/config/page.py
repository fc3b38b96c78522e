"""The settings as text: docs/settings.md, and what `--help` prints."""

import textwrap
from collections.abc import Iterable, Iterator

from discover_jax.config import rules_of, settings
from discover_jax.config.setting import Setting

_TITLES = {
    "": "Run",
    "task": "Competition or problem, and reward",
    "model": "Model",
    "train": "Learning",
    "reuse": "Reuse of programs",
    "finalists": "Choice of the best program",
    "sampling": "Sampling",
    "mesh": "Devices",
    "prompt": "Prompt",
    "lora": "Adapter",
    "execution": "Execution",
    "diversity": "Diversity",
    "checkpoint": "Checkpoints",
    "tracking": "Tracking",
}

_HEAD = """\
<!-- Generated from discover_jax/config by `python -m discover_jax.config --write docs/settings.md`. Do not edit. -->

# Settings

A config is a Python file with a function `get_config()`, such as `configs/quickstart.py`. It starts from
`discover_jax.config.default_config()` and changes single settings: `config.train.steps = 6`. The command line overrides the file:
`--config.train.steps=6`. A misspelt name, a value that is not allowed and a broken rule are errors; one message lists them all.

The [glossary](../CONTRIBUTING.md#glossary) explains terms such as group, state and parent. [Method](algorithm.md) has the formulas.
"Derived" means that the run computes the value when it starts; `config.json` in the run directory stores the value that you set.
"""

_TABLE = "| setting | default | unit | allowed | meaning | rules |\n|---|---|---|---|---|---|"


def settings_page() -> str:
    """docs/settings.md."""
    known = settings()
    parts = [_HEAD, "## Main settings\n", _table((name, row) for name, row in known.items() if row.tier == 1)]
    parts.append("\n## Advanced settings")
    for section, title in _TITLES.items():
        rows = [(name, row) for name, row in known.items() if row.tier != 1 and name.rpartition(".")[0] == section]
        if rows:
            parts += [f"\n### {title}\n", _table(rows)]
    return "\n".join(parts) + "\n"


def settings_help(tiers: int, width: int = 100) -> str:
    """The settings of the first `tiers` tiers as text: name, default, unit, meaning and allowed values."""
    lines = []
    for name, row in settings().items():
        if row.tier <= tiers:
            unit = f" ({row.unit})" if row.unit else ""
            lines.append(f"  --config.{name}={row.default!r}{unit}")
            allowed = f" Allowed: {', '.join(row.choices)}." if row.choices else ""
            lines += textwrap.wrap(f"{row.meaning}.{allowed}", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _table(rows: Iterable[tuple[str, Setting]]) -> str:
    return "\n".join([_TABLE, *(_line(name, row) for name, row in rows)])


def _line(name: str, row: Setting) -> str:
    rules = "; ".join(rule.text for rule in rules_of(name, row))
    cells = (f"`{name}`", f"`{row.default!r}`", row.unit, ", ".join(_allowed(row)), row.meaning, rules)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _allowed(row: Setting) -> Iterator[str]:
    if row.choices:
        yield from (f"`{choice}`" if choice else "empty" for choice in row.choices)
    elif isinstance(row.default, bool):
        yield from ("`True`", "`False`")
    elif row.low is not None and row.high is not None:
        yield f"{_number(row.low)} to {_number(row.high)}"
    elif row.low is not None:
        yield f"at least {_number(row.low)}"


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"

"""Every setting of a run: default, unit, meaning, bounds and rules. Files in configs/ only override.

`default_config()` builds a locked ConfigDict from the table, so that a misspelt key is an error at once.
`validate(config)` checks each value against its row, then the rules that join several settings.
docs/settings.md is generated from the table: `python -m discover_jax.config --write docs/settings.md`.
"""

import difflib
from collections.abc import Iterator
from typing import Any

import ml_collections

from discover_jax.config.execution import EXECUTION
from discover_jax.config.finalists import FINALISTS
from discover_jax.config.model import LORA, MODEL
from discover_jax.config.reuse import REUSE
from discover_jax.config.run import CHECKPOINT, MESH, RUN, TRACKING
from discover_jax.config.sampling import SAMPLING
from discover_jax.config.setting import Rule, Setting, broken_rules, rules_of, wrong_value
from discover_jax.config.task import PROMPT, TASK
from discover_jax.config.train import DIVERSITY, TRAIN
from discover_jax.exceptions import ConfigError

__all__ = ["SETTINGS", "Rule", "Setting", "default_config", "flatten", "nearest", "rules_of", "settings", "validate"]

SETTINGS: dict[str, Any] = {
    "task": TASK,
    "model": MODEL,
    **RUN,
    "train": TRAIN,
    "reuse": REUSE,
    "finalists": FINALISTS,
    "sampling": SAMPLING,
    "mesh": MESH,
    "prompt": PROMPT,
    "lora": LORA,
    "execution": EXECUTION,
    "diversity": DIVERSITY,
    "checkpoint": CHECKPOINT,
    "tracking": TRACKING,
}
"""The table: sections by name, settings by name. Sections with settings of the first tier come first."""


def _rows(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for key, entry in table.items():
        if isinstance(entry, Setting):
            yield prefix + key, entry
        else:
            yield from _rows(entry, f"{prefix}{key}.")


def settings() -> dict[str, Setting]:
    """All settings by their dotted names, in the table's order."""
    return dict(_rows(SETTINGS))


def default_config() -> Any:
    """A ConfigDict of all defaults, locked: assigning to an unknown key is an error. Typed Any, since its attributes are its keys."""

    def build(table: dict[str, Any]) -> dict[str, Any]:
        return {key: entry.default if isinstance(entry, Setting) else build(entry) for key, entry in table.items()}

    config = ml_collections.ConfigDict(build(SETTINGS))
    return config.lock()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config (ConfigDict or nested dict) as one dict from dotted names to values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict | ml_collections.FrozenConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def nearest(name: str) -> str | None:
    """The setting whose name is most like `name`, or None if none is."""
    close = difflib.get_close_matches(name, settings(), n=1, cutoff=0.5)
    return close[0] if close else None


def validate(config: Any, *, for_run: bool = True) -> ml_collections.FrozenConfigDict:
    """Checks a whole config and freezes it.

    Args:
      config: what a file in configs/ returned, with the overrides of the command line.
      for_run: False for a dry run, which skips rules that only a run needs.

    Raises:
      ConfigError: names every wrong setting, each with what is allowed.
    """
    known = settings()
    given = flatten(config)
    problems = []
    for name in given.keys() - known.keys():
        close = nearest(name)
        problems.append(f"config.{name} is not a setting" + (f"; did you mean config.{close}?" if close else "."))
    problems += [
        f"config.{name} is missing. Start from discover_jax.config.default_config(), which has every setting."
        for name in known.keys() - given.keys()
    ]
    problems += [problem for name, row in known.items() if name in given and (problem := wrong_value(name, given[name], row))]
    if not problems:  # the rules assume that each value is valid on its own
        problems = [problem for name, row in known.items() for problem in broken_rules(name, row, config, for_run=for_run)]
    if problems:
        raise ConfigError("The config is invalid:\n" + "\n".join(f"  - {problem}" for problem in sorted(problems)))
    return ml_collections.FrozenConfigDict(config)

"""What a setting is: a default, bounds, a meaning, and the rules that join it to other settings."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on a setting that depends on other settings.

    Attributes:
      text: what is allowed, as errors and docs/settings.md state it.
      holds: (config) -> whether the config fulfils the rule.
      uses: other settings that `holds` reads; an error shows their values.
      fix: what the user should do; one or two sentences.
      runs_only: a dry run skips the rule.
    """

    text: str
    holds: Callable[[Any], bool]
    uses: tuple[str, ...]
    fix: str
    runs_only: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
      default: also gives the type; a float setting takes ints too.
      meaning: what the setting does.
      tier: 1 for the settings that a newcomer sees first, 2 for advanced ones.
      unit: empty for pure numbers and names.
      low, high: inclusive bounds.
      choices: the allowed values; empty: any.
      rules: conditions that join this setting to others.
      only_with: (name of another setting, its values): a value other than the default is an error unless the other setting has one of
        those values. A setting without effect is most likely a mistake.
    """

    default: Any
    meaning: str
    tier: int = 2
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    only_with: tuple[str, tuple[Any, ...]] | None = None


def value_of(config: Any, name: str) -> Any:
    """The value of a setting by its dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def rules_of(name: str, setting: Setting) -> tuple[Rule, ...]:
    """The rules of a setting, including the one that `only_with` stands for."""
    if setting.only_with is None:
        return setting.rules
    other, values = setting.only_with
    named = " or ".join(f"`{value}`" for value in values)
    only = Rule(
        text=f"has an effect only with `{other}` = {named}",
        holds=lambda config: value_of(config, name) == setting.default or value_of(config, other) in values,
        uses=(other,),
        fix=f"Remove it, or set config.{other} = {values[0]!r}.",
    )
    return (only, *setting.rules)


def wrong_value(name: str, value: Any, setting: Setting) -> str | None:
    """What is wrong with a value on its own, or None."""
    kind = type(setting.default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    meaning = f"({setting.meaning})"
    if not fits or (kind is not bool and isinstance(value, bool)):
        return f"config.{name} must be of type {kind.__name__}; got {value!r} of type {type(value).__name__} {meaning}."
    if setting.choices and value not in setting.choices:
        return f"config.{name} must be one of {', '.join(map(repr, setting.choices))}; got {value!r} {meaning}."
    unit = f" {setting.unit}" if setting.unit else ""
    # `not (a <= b)` rather than `a > b`, so that NaN is refused too.
    if setting.low is not None and not setting.low <= value:
        return f"config.{name} must be at least {setting.low}{unit}; got {value!r} {meaning}."
    if setting.high is not None and not value <= setting.high:
        return f"config.{name} must be at most {setting.high}{unit}; got {value!r} {meaning}."
    return None


def broken_rules(name: str, setting: Setting, config: Any, *, for_run: bool) -> Iterator[str]:
    """An error for each rule of a setting that the config breaks. Assumes that each value is valid on its own."""
    for rule in rules_of(name, setting):
        if (for_run or not rule.runs_only) and not rule.holds(config):
            given = f"config.{name} = {value_of(config, name)!r}"
            others = ", ".join(f"config.{other} = {value_of(config, other)!r}" for other in rule.uses)
            yield f"{given}{f' with {others}' if others else ''}: {rule.text}. {rule.fix}"

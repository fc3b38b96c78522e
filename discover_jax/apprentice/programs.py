"""Programs of the grammar as values: draws, edits, renders and describes them.

A program has one choice for each slot of the grammar, up to `MAX_FEATURES` added columns, and one to three models.
"""

import dataclasses
import random

from discover_jax.apprentice import grammar
from discover_jax.apprentice.grammar import BAGGED, COMBINE, FEATURES, MODELS, SLOTS, Option

MAX_FEATURES = 6
MAX_MODELS = 3
MAX_SECONDS = 2.5
"""Programs whose estimated time exceeds this are not drawn, so that a step of the loop takes seconds on two cores."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An option of a slot, by name, with the values of its settings in the order in which the option declares them."""

    option: str
    values: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A model. `bagged` is None if it is not bagged."""

    choice: Choice
    bagged: Choice | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """All choices of one program.

    Attributes:
      features: added columns, in the order of `FEATURES`, each at most once.
      slots: one choice for each of `SLOTS`, in its order.
      models: one to three, in any order.
      combine: how the models' predictions are combined.
    """

    features: tuple[Choice, ...]
    slots: tuple[Choice, ...]
    models: tuple[Model, ...]
    combine: Choice


def sample(rng: random.Random) -> Program:
    """Draws a program with an estimated time of at most `MAX_SECONDS`; see `_draw_from` for the probabilities."""
    while True:
        names = rng.sample(list(FEATURES), rng.randint(0, MAX_FEATURES))
        program = Program(
            features=tuple(_draw(name, FEATURES[name], rng) for name in FEATURES if name in names),
            slots=tuple(_draw_from(options, rng) for options in SLOTS.values()),
            models=tuple(_draw_model(rng) for _ in range(rng.randint(1, MAX_MODELS))),
            combine=_draw_from(COMBINE, rng),
        )
        if seconds(program) <= MAX_SECONDS:
            return program


def mutate(program: Program, rng: random.Random) -> tuple[Program, tuple[str, ...]]:
    """Changes one or two choices, for better or worse.

    Returns:
      The new program, and a short description of each change ("scale standard -> robust").
    """
    count = rng.choice((1, 2))
    while True:
        edited, descriptions = program, []
        edits = rng.sample((_edit_features, _edit_slot, _edit_slot, _edit_models, _edit_models, _edit_combine), count)
        for edit in edits:
            edited, words = edit(edited, rng)
            descriptions.append(words)
        if difference(program, edited) == count and seconds(edited) <= MAX_SECONDS:
            return edited, tuple(descriptions)


def difference(first: Program, second: Program) -> int:
    """Number of choices in which two programs differ, over slots, features, models and the combination."""
    slots = sum(a != b for a, b in zip(first.slots, second.slots, strict=True))
    features = len({c.option for c in set(first.features) ^ set(second.features)})
    return slots + features + (first.combine != second.combine) + _model_edits(first.models, second.models)


def _model_edits(first: tuple[Model, ...], second: tuple[Model, ...]) -> int:
    """Levenshtein distance between two lists of at most three models each."""
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return _model_edits(first[1:], second[1:])
    rest = (_model_edits(first[1:], second), _model_edits(first, second[1:]), _model_edits(first[1:], second[1:]))
    return 1 + min(rest)


def seconds(program: Program) -> float:
    """Upper estimate of the program's time on two slow cores with 7,800 rows, without imports. The parts' times are measured."""
    total = sum(SLOTS[slot][choice.option].seconds for slot, choice in zip(SLOTS, program.slots, strict=True))
    repeats = {"stack": 2.5}.get(program.combine.option, 1.0)
    for model in program.models:
        bags = int(model.bagged.values[0]) if model.bagged else 1
        total += repeats * bags * _model_seconds(model.choice)
    return total


_TIMED = {"n", "steps"}
"""A model's time is proportional to these settings. `Option.seconds` is for the last value of each grid."""


def _model_seconds(choice: Choice) -> float:
    option = MODELS[choice.option]
    time = option.seconds
    for (name, grid), value in zip(option.settings.items(), choice.values, strict=True):
        if name in _TIMED:
            time *= float(value) / float(grid[-1])
    return time


# Drawing


def _draw(name: str, option: Option, rng: random.Random) -> Choice:
    return Choice(name, tuple(rng.choice(grid) for grid in option.settings.values()))


def _draw_from(options: dict[str, Option], rng: random.Random) -> Choice:
    """Draws an option. If one skips the slot's step, it has probability 1/2; all others are equally likely."""
    plain = [name for name, option in options.items() if option in grammar.PLAIN]
    name = plain[0] if plain and rng.random() < 0.5 else rng.choice([name for name in options if name not in plain])
    return _draw(name, options[name], rng)


def _draw_model(rng: random.Random) -> Model:
    bagged = _draw("bagged", BAGGED, rng) if rng.random() < 0.15 else None
    return Model(_draw_from(MODELS, rng), bagged)


# Editing: each function makes one change and describes it


def _other_value(option: Option, choice: Choice, rng: random.Random) -> tuple[Choice, str]:
    """Another value for one setting of the choice. Its option must have settings."""
    index = rng.randrange(len(choice.values))
    name, grid = list(option.settings.items())[index]
    value = rng.choice([v for v in grid if v != choice.values[index]])
    values = (*choice.values[:index], value, *choice.values[index + 1 :])
    return Choice(choice.option, values), f"{choice.option} {name} {choice.values[index]} -> {value}"


def _other_choice(kind: str, options: dict[str, Option], choice: Choice, rng: random.Random) -> tuple[Choice, str]:
    """Another option. If the choice has settings: with probability 1/2, another value of one of them instead."""
    if choice.values and rng.random() < 0.5:
        changed, words = _other_value(options[choice.option], choice, rng)
        return changed, f"{kind} {words}"
    other = choice
    while other.option == choice.option:
        other = _draw_from(options, rng)
    return other, f"{kind} {choice.option} -> {other.option}"


def _edit_slot(program: Program, rng: random.Random) -> tuple[Program, str]:
    index = rng.randrange(len(SLOTS))
    slot, options = list(SLOTS.items())[index]
    choice, words = _other_choice(slot, options, program.slots[index], rng)
    slots = (*program.slots[:index], choice, *program.slots[index + 1 :])
    return dataclasses.replace(program, slots=slots), words


def _edit_combine(program: Program, rng: random.Random) -> tuple[Program, str]:
    choice, words = _other_choice("combine", COMBINE, program.combine, rng)
    return dataclasses.replace(program, combine=choice), words


def _edit_features(program: Program, rng: random.Random) -> tuple[Program, str]:
    features = {choice.option: choice for choice in program.features}
    name = rng.choice(list(FEATURES) if len(features) < MAX_FEATURES else list(features))
    if name not in features:
        features[name] = _draw(name, FEATURES[name], rng)
        words = f"add {name}"
    elif features[name].values and rng.random() < 0.5:
        features[name], words = _other_value(FEATURES[name], features[name], rng)
    else:
        del features[name]
        words = f"remove {name}"
    return dataclasses.replace(program, features=tuple(features[name] for name in FEATURES if name in features)), words


def _edit_models(program: Program, rng: random.Random) -> tuple[Program, str]:
    models = list(program.models)
    index = rng.randrange(len(models))
    model = models[index]
    name = model.choice.option
    action = rng.choice(("replace", "replace", "tune", "tune", "tune", "add", "remove", "bag"))
    if action == "add" and len(models) < MAX_MODELS:
        models.append(_draw_model(rng))
        words = f"add {models[-1].choice.option}"
    elif action == "remove" and len(models) > 1:
        del models[index]
        words = f"remove {name}"
    elif action == "bag":
        bagged = None if model.bagged else _draw("bagged", BAGGED, rng)
        models[index] = dataclasses.replace(model, bagged=bagged)
        words = f"bag {name}" if bagged else f"unbag {name}"
    elif action == "replace":
        models[index] = _draw_model(rng)
        words = f"{name} -> {models[index].choice.option}"
    else:
        choice, words = _other_value(MODELS[name], model.choice, rng)
        models[index] = dataclasses.replace(model, choice=choice)
    return dataclasses.replace(program, models=tuple(models)), words


# Rendering

HEAD = """def proba(m, A, b, B):
    m.fit(A, b)
    return m.predict_proba(B) if hasattr(m, "predict_proba") else np.eye(b.max() + 1)[m.predict(B)]


def run():
    train = pd.read_csv("data/train.csv")
    test = pd.read_csv("data/test.csv")
    key, target = pd.read_csv("data/sample_submission.csv").columns
    y, labels = pd.factorize(train[target], sort=True)
    n = len(train)
    X = pd.concat([train.drop(columns=target), test], ignore_index=True)"""

COLUMNS = """X = X.drop(columns=key)
num = X.select_dtypes("number").columns
cat = [c for c in X if c not in num and X[c].nunique() < 30]
X = X[[*num, *cat]]"""

ARRAY = "X = X.astype(float).fillna(0).to_numpy()"

TAIL = "return pd.DataFrame({key: test[key], target: labels[P.argmax(axis=1)]})"


def render(program: Program) -> str:
    """The program's code, without a final newline. Depends only on the program."""
    slots = {slot: (SLOTS[slot][choice.option], choice) for slot, choice in zip(SLOTS, program.slots, strict=True)}
    filled = {slot: _fill(option, choice) for slot, (option, choice) in slots.items()}
    body = [
        *(_fill(FEATURES[choice.option], choice) for choice in program.features),
        filled["drop"],
        COLUMNS,
        filled["fill"],
        filled["numbers"],
        filled["encode"],
        ARRAY,
        filled["scale"],
        filled["select"],
        filled["rows"],
        "models = [",
        *(f"    {_model_code(model)}," for model in program.models),
        "]",
        _fill(COMBINE[program.combine.option], program.combine),
        filled["shift"],
        TAIL,
    ]
    lines = "\n".join(part for part in body if part).split("\n")
    used = [option for option, _ in slots.values()] + [COMBINE[program.combine.option]]
    used += [MODELS[model.choice.option] for model in program.models]
    used += [BAGGED for model in program.models if model.bagged]
    return "\n".join([*_imports(used), "", "", HEAD, *("    " + line for line in lines)])


def _fill(option: Option, choice: Choice) -> str:
    code = option.template
    for name, value in zip(option.settings, choice.values, strict=True):
        code = code.replace("{" + name + "}", value)
    return code


def _model_code(model: Model) -> str:
    code = _fill(MODELS[model.choice.option], model.choice)
    return _fill(BAGGED, model.bagged).replace("{model}", code) if model.bagged else code


def _imports(options: list[Option]) -> list[str]:
    modules: dict[str, set[str]] = {}
    for option in options:
        for module, name in option.imports:
            modules.setdefault(module, set()).add(name)
    return [
        "import numpy as np",
        "import pandas as pd",
        *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items())),
    ]


def describe(program: Program) -> str:
    """The plan of a fresh program: a short description of each choice that writes code."""
    words = [choice.option for choice in program.features]
    for slot, choice in zip(SLOTS, program.slots, strict=True):
        if SLOTS[slot][choice.option] not in grammar.PLAIN:
            words.append(f"{slot} {choice.option}")
    words += [("bagged " if model.bagged else "") + model.choice.option for model in program.models]
    words.append(program.combine.option)
    return ", ".join(words)

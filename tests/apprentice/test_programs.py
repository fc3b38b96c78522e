"""The grammar's programs are valid Python and depend only on the seed, and edits make the changes that they describe."""

import ast
import difflib
import random

import pytest

from discover_jax.apprentice import programs
from discover_jax.apprentice.grammar import BAGGED, COMBINE, FEATURES, MODELS, SLOTS


def _options():
    for table in (FEATURES, COMBINE, MODELS, *SLOTS.values()):
        yield from table.items()
    yield "bagged", BAGGED


def _imported(tree: ast.Module) -> set[str]:
    return {alias.asname or alias.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}


def _used_classes(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id[0].isupper() and len(node.id) > 1}


def test_every_program_compiles_and_imports_what_it_uses():
    rng = random.Random(0)
    for _ in range(1000):
        code = programs.render(programs.sample(rng))
        tree = ast.parse(code)
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert functions == ["proba", "run"]
        assert _imported(tree) - {"np", "pd"} == _used_classes(tree)
        assert max(len(line) for line in code.split("\n")) <= 200
        assert "{" not in code.replace("{key: test[key], target: labels[P.argmax(axis=1)]}", "")


def test_every_option_and_value_is_drawn():
    rng = random.Random(1)
    text = "\n".join(programs.render(programs.sample(rng)) for _ in range(4000))
    for name, option in _options():
        for module, imported in option.imports:
            assert f"from {module} import" in text, name
            assert imported in text, name
        for setting, grid in option.settings.items():
            assert len(set(grid)) == len(grid) > 1, f"{name}.{setting}"
            # The option's own line occurs with every value of the grid.
            before = option.template.split("{" + setting + "}")[0].split("\n")[-1].split("}")[-1]
            for value in grid:
                assert before + value in text, f"{name}.{setting}={value}"


def test_sampling_and_rendering_depend_only_on_the_seed():
    first = [programs.render(programs.sample(random.Random(seed))) for seed in range(50)]
    second = [programs.render(programs.sample(random.Random(seed))) for seed in range(50)]
    assert first == second
    assert len(set(first)) == 50


def test_programs_are_varied():
    rng = random.Random(2)
    assert len({programs.sample(rng) for _ in range(5000)}) == 5000


def test_an_edit_makes_one_or_two_changes_and_describes_them():
    rng = random.Random(3)
    ratios = []
    for _ in range(1000):
        parent = programs.sample(rng)
        child, words = programs.mutate(parent, rng)
        assert len(words) in (1, 2)
        assert programs.difference(parent, child) == len(words)
        old, new = programs.render(parent).split("\n"), programs.render(child).split("\n")
        assert old != new
        changed = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
        # A change affects one step of the body (at most two lines removed and two added, with a guard) and the imports.
        assert len(changed) <= 8 * len(words)
        ratios.append(difflib.SequenceMatcher(None, old, new, autojunk=False).ratio())
    assert min(ratios) > 0.7


def test_difference_counts_choices():
    rng = random.Random(4)
    parent = programs.sample(rng)
    assert programs.difference(parent, parent) == 0
    child = parent
    for count in range(1, 6):
        child, _ = programs.mutate(child, rng)
        assert 0 <= programs.difference(parent, child) <= 2 * count


def test_estimated_time_counts_bags_and_folds():
    model = programs.Model(programs.Choice("sgd", ('"hinge"', "0.1", "40", "0")))
    bagged = programs.Model(model.choice, programs.Choice("bagged", ("4", "0.5")))
    plain = {slot: programs.Choice(next(iter(options))) for slot, options in SLOTS.items()}
    base = programs.Program((), tuple(plain.values()), (model,), programs.Choice("mean"))
    once = programs.seconds(base)
    assert once == pytest.approx(MODELS["sgd"].seconds)
    assert programs.seconds(programs.Program((), base.slots, (bagged,), base.combine)) == pytest.approx(4 * once)
    assert programs.seconds(programs.Program((), base.slots, (model, model), base.combine)) == pytest.approx(2 * once)
    half = programs.Model(programs.Choice("sgd", ('"hinge"', "0.1", "20", "0")))
    assert programs.seconds(programs.Program((), base.slots, (half,), base.combine)) == pytest.approx(once / 2)

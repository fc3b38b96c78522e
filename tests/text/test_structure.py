"""Programs have the same structure if only names and layout differ. The comparison accepts any text."""

import itertools
import random
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discover_jax.apprentice import programs
from discover_jax.text.structure import structure_distance, structure_key, structure_parts

BASE = """
import numpy as np
import pandas as pd
from sklearn.svm import SVC

def fit(table, depth=3):
    model = SVC(C=2.0, kernel="rbf")
    return model.fit(table, depth)

def run():
    train = pd.read_csv("data/train.csv")
    return fit(train)
"""
SAME = {
    "layout": BASE.replace("\n\n", "\n\n\n").replace("C=2.0, ", "C=2.0,\n        "),
    "comments": BASE.replace("def run():", "# the whole thing\ndef run():  # here"),
    "docstrings": BASE.replace("def run():\n", 'def run():\n    """Reads and fits."""\n'),
    "order of imports": BASE.replace("import numpy as np\nimport pandas as pd\n", "import pandas as pd\nimport numpy as np\n"),
    "names of variables": BASE.replace("train =", "rows =").replace("fit(train)", "fit(rows)").replace("table", "x").replace("model", "m"),
    "names of functions": BASE.replace("def fit(", "def learn(").replace("return fit(", "return learn("),
    "aliases": BASE.replace("pandas as pd", "pandas as p").replace("pd.read", "p.read"),
    "order of keyword arguments": BASE.replace('C=2.0, kernel="rbf"', 'kernel="rbf", C=2.0'),
    "quotes": BASE.replace('"rbf"', "'rbf'"),
}
OTHER = {
    "a constant": BASE.replace("C=2.0", "C=2.5"),
    "a default": BASE.replace("depth=3", "depth=4"),
    "a keyword": BASE.replace("C=2.0", "gamma=2.0"),
    "a method": BASE.replace("model.fit", "model.partial_fit"),
    "a class": BASE.replace("SVC", "NuSVC"),
    "a string": BASE.replace("train.csv", "test.csv"),
    "the order of statements": BASE.replace("    model", "    depth = 4\n    model"),
    "another variable": BASE.replace("model.fit(table, depth)", "model.fit(depth, table)"),
    "the entry": BASE.replace("def run", "def main"),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_structure(name):
    assert SAME[name] != BASE
    assert structure_key(SAME[name]) == structure_key(BASE)
    assert structure_distance(structure_parts(SAME[name]), structure_parts(BASE)) == 0.0


@pytest.mark.parametrize("name", OTHER)
def test_different_structure(name):
    assert OTHER[name] != BASE
    assert structure_key(OTHER[name]) != structure_key(BASE)


def test_all_pairs_differ():
    assert len({structure_key(code) for code in [BASE, *OTHER.values()]}) == len(OTHER) + 1


def test_distances_grow_with_edits():
    """For the apprentice's grammar: on average, an edited program is closer than another program."""
    rng = random.Random(0)
    near, far = [], []
    for _ in range(40):
        program, other = programs.sample(rng), programs.sample(rng)
        edited, _ = programs.mutate(program, rng)
        parts = [structure_parts(programs.render(p)) for p in (program, edited, other)]
        near.append(structure_distance(parts[0], parts[1]))
        far.append(structure_distance(parts[0], parts[2]))
        assert structure_distance(parts[1], parts[0]) == near[-1]
    assert 0.0 < sum(near) < 0.5 * sum(far)
    assert max(far) < 1.0


def test_renamed_programs_of_the_grammar_are_recognised():
    rng = random.Random(1)
    codes = [programs.render(programs.sample(rng)) for _ in range(30)]
    keys = [structure_key(code) for code in codes]
    assert len(set(keys)) == len(set(codes))
    assert [structure_key(code.replace("train", "known").replace("data/known", "data/train")) for code in codes] == keys


@pytest.mark.parametrize(
    "code",
    [
        "def run(:",
        "",
        "x = 1\0",
        "(" * 5000 + ")" * 5000,
        "-" * 50_000 + "1",
        "x" + ".a" * 20_000,
        "\ud800 = 1",
        "run = " + "[" * 150 + "]" * 150,
    ],
    ids=["no syntax", "empty", "null byte", "deep", "deep minus", "long chain", "surrogate", "nested lists"],
)
def test_any_reply_is_accepted(code):
    assert structure_key(code) == structure_key(code)
    assert structure_distance(structure_parts(code), structure_parts(code)) == 0.0


LITERALS = {
    "hexadecimal": "0x" + "f" * 3_600,
    "octal": "0o" + "7" * 6_000,
    "binary": "0b" + "1" * 20_000,
    "negative": "-0x" + "f" * 3_600,
    "longest decimal": "9" * 4_300,
    "too long decimal": "9" * 4_301,
    "infinite": "1e999",
    "imaginary": "1" * 300 + "j",
    "infinite imaginary": "1e999j",
    "bytes": repr(bytes(range(256))),
    "surrogate escape": r"'\ud800'",
    "ellipsis": "...",
}


@pytest.mark.parametrize("name", LITERALS)
@pytest.mark.parametrize(
    "code",
    ["x = {}", "def run(x={}): pass", "match x:\n    case {}: pass", "f'{{{}:>10}}'", "x[{}:{}]"],
    ids=["assigned", "default", "case", "formatted", "slice"],
)
def test_any_literal_is_accepted(code, name):
    code = code.replace("{}", LITERALS[name]).replace("{{", "{").replace("}}", "}")
    assert structure_key(code) == structure_key(code + " ")
    assert structure_distance(structure_parts(code), structure_parts(code)) == 0.0


def test_integers_too_long_for_decimals_count_by_their_value():
    number = "0x" + "f" * 3_600
    assert structure_key(f"x = {number}") == structure_key(f"y = {number.upper().replace('X', 'x')}")
    assert structure_key(f"x = {number}") != structure_key(f"x = {number[:-1]}e")


def test_a_tree_that_cannot_be_read_is_compared_as_text(monkeypatch):
    def fail(*_):
        raise TypeError

    monkeypatch.setattr("discover_jax.text.structure._label", fail)
    assert structure_key("x = 1") == structure_key("  x = 1 ")
    assert structure_key("x = 1") != structure_key("y = 1")
    assert structure_parts("x = 1 ") == {"x": 1, "=": 1, "1": 1}


def test_text_that_is_not_a_program_is_compared_as_text():
    assert structure_key("def run(:\n  x") == structure_key("def run(:\n x")
    assert structure_key("def run(:") != structure_key("def run(:)")


@given(st.lists(st.text(), min_size=3, max_size=3))
def test_distance_is_a_dissimilarity(texts):
    parts = [structure_parts(text) for text in texts]
    for first, second in itertools.permutations(parts, 2):
        assert 0.0 <= structure_distance(first, second) <= 1.0
        assert structure_distance(first, second) == structure_distance(second, first)


def test_indentation_of_blocks_counts():
    inside = textwrap.dedent("""
        def run():
            for i in range(3):
                a = i
                b = i
    """)
    outside = inside.replace("        b = i", "    b = i")
    assert structure_key(inside) != structure_key(outside)

"""Figures in README, docs and BUILD_NOTES.md come from benchmarks/measurements.csv."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = sys.modules["figures"] = importlib.util.module_from_spec(spec)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


figures = _figures()
sys.path.append(str(ROOT / "benchmarks"))  # for predictions.py, the source of a page's table


@pytest.fixture(scope="module")
def measured():
    return figures.read()  # raises for an id that is malformed or occurs twice


def test_pages_are_current(measured):
    stale = [page.name for page in figures.PAGES if figures.filled(page.read_text(), measured) != page.read_text()]
    assert not stale, "run python benchmarks/figures.py --write"


def test_no_line_of_a_sentence_begins_with_a_marker():
    """A line that begins with an HTML comment ends the paragraph before it on the site."""
    broken = [f"{page.name}: {line}" for page in figures.PAGES for line in page.read_text().splitlines() if line.startswith("<!-- figure")]
    assert not broken


def test_commands_name_scripts_that_exist(measured):
    for figure in measured.values():
        for script in re.findall(r"benchmarks/\w+\.py", figure.command):
            assert (ROOT / script).is_file(), figure.id


def test_dates_are_dates(measured):
    assert all(re.fullmatch(r"(20\d\d-\d\d-\d\d)?", figure.date) for figure in measured.values())


@pytest.mark.parametrize(
    "rows",
    ["a,1,s,,,,\na,2,s,,,,\n", "A b,1,s,,,,\n", "a__b,1,s,,,,\n", "a,1.2.3,s,,,,\n"],
    ids=["twice", "spaces and capitals", "double underscore", "no number"],
)
def test_malformed_rows_are_errors(rows, tmp_path):
    path = tmp_path / "measurements.csv"
    path.write_text(",".join(figures.COLUMNS) + "\n" + rows)
    with pytest.raises(ValueError, match=r"measurements\.csv"):
        figures.read(path)


def test_append_adds_a_row_and_replaces_it(tmp_path):
    path = tmp_path / "measurements.csv"
    path.write_text(",".join(figures.COLUMNS) + "\n")
    first = figures.append("speed", 1234.5678, "tokens/s", "python x.py", path=path)
    assert (first.value, first.unit, first.command) == ("1234.6", "tokens/s", "python x.py")
    assert first.card
    figures.append("other", 3, "rows", "python x.py", path=path)
    figures.append("speed", 20.0, "tokens/s", "python x.py", path=path)
    assert [(row.id, float(row.value)) for row in figures.read(path).values()] == [("speed", 20), ("other", 3)]


def test_placeholders_by_hand():
    rows = {id: figures.Figure(id, value, unit, "", "", "", "") for id, value, unit in [("a", "1234", "s"), ("b", "0.5", "fraction")]}
    expected = {"a": "1,234", "b": "50%", "a:.1f": "1234.0", "a/b": "2468.00", "a/a:.0%": "100%"}
    assert {expression: figures.shown(expression, rows) for expression in expected} == expected
    page = "x <!-- figure: a -->old<!-- end --> y"
    assert figures.filled(page, rows) == "x <!-- figure: a -->1,234<!-- end --> y"
    for wrong in ("c", "a*b"):
        with pytest.raises(ValueError, match="placeholder"):
            figures.shown(wrong, rows)


def test_every_template_has_a_page():
    shown = {match[2] for page in figures.PAGES for match in figures._TABLE.finditer(page.read_text())}
    assert set(figures.templates()) <= shown

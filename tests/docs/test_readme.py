"""README.md keeps its order, length and figures; links have targets; CITATION.cff names the paper; architecture.md shows the imports."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_sections_are_in_order_and_short():
    sections = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert sections == [
        *("Results", "Requirements", "Quickstart", "GPU quickstart", "Your own problem"),
        *("How it works", "Comparison", "Limitations", "Citation"),
    ]
    assert len(README.split()) <= 1100


def test_measured_figures_match_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    rows = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) == 5
    for row in rows:
        training, search, difference = (cell.strip().replace("\xa0±\xa0", " +- ") for cell in row.split("|")[3:6])
        of_both = [line for line in results.splitlines() if f"| {training} +- " in line and f"| {search} +- " in line]
        assert any(difference in line for line in of_both), row


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_pages_have_no_control_characters():
    """A script that reflows lines once left placeholders in place of operators."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")]:
        found = [f"line {n}: {line}" for n, line in enumerate(page.read_text().split("\n"), 1) if re.search(r"[\x00-\x1f\x7f-\x9f]", line)]
        assert not found, page


@pytest.mark.parametrize("page", ["README.md", "BUILD_NOTES.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_point_to_files_and_headings(page):
    """mkdocs checks the site's pages, too, but the default tests do not install it."""
    source = ROOT / page
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", source.read_text()):
        file = (source.parent / target) if target else source
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{target}#{anchor}"


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(citation)
    (paper,) = citation["references"]
    assert paper["title"] == "Learning to Discover at Test Time"
    assert paper["url"].rpartition("/")[2] in README


def test_layers_of_the_architecture_match_the_contract():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| layer |\n|---|\n")[2].partition("\n\n")[0]
    shown = [set(re.findall(r"`(\w+)`", row)) - ({"config"} if "`runs`" in row else set()) for row in table.splitlines()]
    assert shown == [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]

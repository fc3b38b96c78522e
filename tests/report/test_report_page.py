"""The page as a file: no text of a run becomes markup, its policy allows only its own script, it is small, and it contains no address."""

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess
from importlib import resources

import pytest
from hostile_run import ATTACK, REQUEST, write_hostile_run
from synthetic_run import edited, searched, write_run

from discover_jax.report import page as page_module
from discover_jax.report.page import LIMIT_BYTES, write_report


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        self.texts.setdefault(self._inside, []).append(data)

    def handle_endtag(self, tag):
        self._inside = ""


_VISIBLE = """
const assert = require("assert");
assert.strictEqual(visible("a\\tb\\n"), "a\\tb\\n");
assert.strictEqual(visible("ok \\u2714\\ufe0f Größe 中文 \\u{1f680}"), "ok \\u2714 Größe 中文 \\u{1f680}");
for (const hidden of ["\\x1b", "\\r", "\\u202e", "\\u2066", "\\u200b", "\\u200d", "\\ufeff",
                     "\\u{e0041}", "\\u{e01ef}", "\\u2028", "\\u3164", "\\ud800"])
  assert.strictEqual(visible(`yes${hidden}no`), "yes\\ufffdno", JSON.stringify(hidden));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_hidden_characters_of_programs_are_marked_on_the_page():
    source = (resources.files("discover_jax.report") / "assets" / "dom.js").read_text("utf-8")
    function = re.search(r"^function visible\(.*?^}$", source, re.MULTILINE | re.DOTALL)[0]
    subprocess.run(["node", "-e", function + _VISIBLE], check=True)
    assert re.search(r"append\(\.\.\.shown\.map\(.*visible\(String\(child\)\)", source)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    return write_report(write_hostile_run(tmp_path_factory.mktemp("hostile") / "run")).read_text()


def test_no_text_of_a_run_becomes_markup(hostile, tmp_path):
    elements = Elements()
    elements.feed(hostile)
    names = [tag for tag, _ in elements.tags]
    tame = Elements()
    tame.feed(write_report(write_run(tmp_path / "tame", searched(1, 1, 2, edited(3, 0.1)))).read_text())
    assert names == [tag for tag, _ in tame.tags]
    assert names.count("script") == 3
    assert not any(name.startswith("on") or name in ("src", "href", "style") for _, attributes in elements.tags for name in attributes)
    assert not any(text in hostile for text in (ATTACK, REQUEST, "example.org"))
    assert elements.texts["title"] == [f"run {ATTACK}"]  # escaped in the file


def test_the_policy_allows_only_the_pages_own_script_and_style(hostile):
    elements = Elements()
    elements.feed(hostile)
    (policy,) = [attributes["content"] for tag, attributes in elements.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    script, style = elements.texts["script"][-1], "".join(elements.texts["style"])
    for rule, text in (("script-src", script), ("style-src", style)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}


def test_assets_contain_no_address_and_parse_no_markup():
    for asset in (resources.files("discover_jax.report") / "assets").iterdir():
        text = asset.read_text("utf-8")
        assert re.findall(r"https?:[^\"\s]*|//[a-z0-9.-]+\.[a-z]{2,}", text) in ([], ["http://www.w3.org/2000/svg"]), asset.name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            "fetch(",
            "XMLHttp",
            "import(",
        ):
            assert word not in text, f"{asset.name}: {word}"


def test_the_same_run_gives_the_same_page(hostile, tmp_path):
    assert write_report(write_hostile_run(tmp_path / "run")).read_text() == hostile


def test_a_page_that_would_be_too_large_leaves_programs_out(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", searched(10, 6, 6, edited(60, 0.5, 0.5)))
    whole = write_report(run).stat().st_size
    monkeypatch.setattr(page_module, "LIMIT_BYTES", whole - 150_000)
    assert whole - 300_000 < write_report(run).stat().st_size < whole - 150_000


@pytest.mark.slow
@pytest.mark.parametrize(("share", "anew"), [(0.08, 0.05), (0.3, 0.3), (1.0, 1.0)])
def test_six_thousand_rollouts_stay_below_the_limit(tmp_path, share, anew):
    """Programs have 120 lines, and a child changes `share` of them. With only new programs, not all of them fit."""
    run = write_run(tmp_path / "run", searched(50, 15, 8, edited(120, share, anew)))
    assert (run / "journal.jsonl").stat().st_size > 50e6
    assert write_report(run).stat().st_size < LIMIT_BYTES == 5_000_000

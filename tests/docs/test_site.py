"""mkdocs builds the documentation without warnings, and its pages load nothing over the network."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed; `make docs` installs it")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_site_has_every_page(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").rglob("*.md")}
    assert pages == {page.relative_to(site).with_suffix("") for page in site.rglob("*.html")} - {Path("404")}


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*", text), page
        assert not re.findall(r"<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*", text), page
        assert "analytics" not in text.lower(), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_links_stay_in_the_site(site):
    """Pages name repository files outside docs/ without a link, since the site lacks them."""
    for page in site.rglob("*.html"):
        assert not re.findall(r"href=\"[^\"]*\.\./(?:discover_jax|BUILD_NOTES)[^\"]*", page.read_text()), page
    assert "BUILD_NOTES.md" in (site / "security.html").read_text()

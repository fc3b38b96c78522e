"""The page in a real browser: it renders without errors, reacts to the pointer, runs no text as a script, sends no requests."""

import json
import re
from pathlib import Path

import pytest
from browser import Browser
from hostile_run import ATTACK, write_hostile_run
from synthetic_run import DISCLOSURE, PROBLEM, attempt, edited, searched, write_run, write_seed_program

from discover_jax.report.page import write_report
from discover_jax.types import Outcome

WIDTHS = {"desk": (1200, 900, False), "phone": (390, 844, True)}
SECTIONS = ["Scores", "Rewards", "Outcomes", "Programs", "Update and sampling", "Disclosure", "Config"]
HEADINGS = "[...document.querySelectorAll('main section')].map((section) => section.querySelector(':scope > h2')?.textContent)"
POSITION_OF = """(() => {
  const box = document.querySelector('.scroll svg').getBoundingClientRect();
  const path = document.querySelector('.scroll svg path.dots.%s').getAttribute('d');
  const [x, y] = path.match(/M([\\d.]+) ([\\d.]+)/).slice(1).map(Number);
  return [box.left + x, box.top + y];
})()"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    return write_report(write_hostile_run(tmp_path_factory.mktemp("hostile") / "run"))


@pytest.fixture
def fresh(browser) -> Browser:
    """The browser, without events of earlier pages."""
    browser.view(1200, 900)
    browser.events.clear()
    return browser


def is_sound(browser: Browser) -> bool:
    assert browser.problems() == []
    assert browser.requests() == []
    return True


def shown(browser: Browser) -> str:
    """Id of the attempt whose details are shown."""
    return browser.wait("document.getElementById('attempt')?.dataset.id", lambda id: bool(id))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", WIDTHS)
def test_report_renders_without_problems(fresh, run, size, dark):
    width, height, phone = WIDTHS[size]
    fresh.view(width, height, dark=dark, phone=phone)
    fresh.open(run / "report.html")
    assert shown(fresh)
    assert fresh.wait("document.querySelectorAll('svg.chart').length", lambda charts: charts >= 10)
    assert fresh.evaluate("document.documentElement.scrollWidth") <= width  # no element is wider than the window
    assert fresh.evaluate(HEADINGS) == SECTIONS
    assert fresh.evaluate("document.querySelectorAll('h2').length") == len(SECTIONS)  # no heading is outside of a section
    light = sum(map(int, fresh.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")))
    assert (light < 200) is dark
    assert is_sound(fresh)


def test_the_tree_responds_to_hover_click_and_keys(fresh, tmp_path):
    attempts = [
        attempt(0, 0, 0, "seed", "a\nb\nc\n", 0.7),
        attempt(1, 0, 0, "0000-000-000", "a\nB\nc\n", 0.75),
        attempt(1, 0, 1, "0000-000-000", "a\n", None, outcome=Outcome.TIMEOUT, detail="after 60 s"),
    ]
    fresh.open(write_report(write_run(tmp_path / "run", attempts)))
    assert shown(fresh) == "0001-000-000"  # the best
    fresh.evaluate("document.querySelector('.scroll svg').scrollIntoView({block: 'center'})")
    fresh.hover(*fresh.evaluate(POSITION_OF % "o-timeout"))
    assert fresh.evaluate("document.querySelector('.tip').hidden") is False
    assert re.match(r"0001-000-001\b.*2\s*timeout", fresh.evaluate("document.querySelector('.tip').textContent"))
    fresh.click(*fresh.evaluate(POSITION_OF % "o-timeout"))
    fresh.wait("document.getElementById('attempt').dataset.id === '0001-000-001'")
    assert "after 60 s" in fresh.evaluate("document.querySelector('#attempt .said pre').textContent")
    assert fresh.evaluate("location.hash") == "#0001-000-001"
    fresh.evaluate("document.querySelector('.scroll svg').focus()")
    for key, id in (("ArrowUp", "0001-000-000"), ("ArrowLeft", "0000-000-000"), ("ArrowRight", "0001-000-000")):
        for kind in ("keyDown", "keyUp"):
            fresh.call("Input.dispatchKeyEvent", type=kind, key=key)
        fresh.wait(f"document.getElementById('attempt').dataset.id === '{id}'")
    fresh.evaluate("history.back()")
    fresh.wait("document.getElementById('attempt').dataset.id === '0000-000-000'")
    fresh.evaluate("[...document.querySelectorAll('#attempt button')].find((b) => /best/.test(b.textContent)).click()")
    fresh.wait("document.getElementById('attempt').dataset.id === '0001-000-000'")
    second = "[...document.querySelectorAll('.diff .row')[1].querySelectorAll('code')].map((code) => [code.className, code.textContent])"
    assert fresh.evaluate(second) == [["left out", "b"], ["right in", "B"]]
    assert is_sound(fresh)


@pytest.mark.parametrize("case", ["real", "long"])
def test_programs_and_diffs_match_the_journal(fresh, request, tmp_path, case):
    """Opens every attempt of a run by its URL. The page unpacks its program, rebuilds it from its ancestors and shows the diff."""
    if case == "real":
        run = request.getfixturevalue("run")
    else:
        run = write_run(tmp_path / "run", searched(4, 2, 2, edited(40, 0.15)))
        write_report(run)
    rows = {row["id"]: row for row in map(json.loads, (run / "journal.jsonl").read_text().splitlines())}
    for id, row in rows.items():
        fresh.open(run / "report.html", id)
        assert shown(fresh) == id
        parent = rows.get(row["parent_id"])
        if row["code"] is None:
            assert fresh.evaluate("document.querySelectorAll('.program code').length") == 0
            continue
        assert fresh.evaluate("[...document.querySelectorAll('.program code')].map((c) => c.textContent)") == row["code"].split("\n")
        if parent is not None:
            fresh.evaluate("document.querySelectorAll('.fold').forEach((fold) => fold.click())")
            for side, code in (("left", parent["code"]), ("right", row["code"])):
                lines = f"[...document.querySelectorAll('.diff code.{side}:not(.none)')].map((c) => c.textContent)"
                assert fresh.evaluate(lines) == code.split("\n")
    assert is_sound(fresh)


def test_texts_of_a_run_are_shown_verbatim(fresh, hostile):
    for id in ("0001-000-000", "0001-000-001", "0001-000-002", "0000-000-000"):
        fresh.open(hostile, id)
        assert shown(fresh) == id
        fresh.wait("document.querySelectorAll('svg.chart').length > 5")
        fresh.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert ATTACK in fresh.evaluate("document.getElementById('attempt').textContent")
        assert fresh.evaluate("document.querySelectorAll('img, iframe, link').length") == 0
    assert fresh.evaluate("window.pwned === undefined")
    assert fresh.evaluate("document.title") == f"run {ATTACK}"
    assert fresh.evaluate("document.querySelector('h1').textContent") == f"run {ATTACK}"
    assert is_sound(fresh)


def test_content_security_policy_blocks_injected_scripts(fresh, hostile):
    """This also shows that the browser's warnings reach the tests."""
    fresh.open(hostile)
    fresh.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))")
    fresh.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/pixel'}))")
    assert fresh.evaluate("fetch('https://example.org').then(() => 'answered', () => 'refused')") == "refused"
    assert fresh.evaluate("window.pwned === undefined")
    assert sum("Content Security Policy" in problem for problem in fresh.problems()) >= 3


def test_a_request_would_be_noticed(fresh, tmp_path):
    """Checks `requests` with an address at which no server listens."""
    page = tmp_path / "page.html"
    page.write_text("<script>document.documentElement.dataset.ready = 'yes'</script><img src='http://127.0.0.1:9/pixel'>")
    fresh.open(page)
    fresh.wait("document.querySelector('img').complete")
    assert fresh.requests() == ["http://127.0.0.1:9/pixel"]


def test_a_comparison_shows_all_runs(fresh, tmp_path):
    a = write_run(tmp_path / "a", searched(6, 3, 4, edited(20, 0.2)))
    b = write_run(tmp_path / "b", searched(6, 2, 4, edited(20, 0.2), seed=1), kind="search")
    fresh.open(write_report(a, [b]))
    fresh.wait("document.querySelectorAll('.line.run1').length > 2")
    assert fresh.evaluate("[...document.querySelectorAll('.runs tbody tr')].map((row) => row.cells[0].textContent)") == [
        "training",
        "search",
    ]
    assert fresh.evaluate(HEADINGS) == [*SECTIONS[:-1], "Config differences"]
    assert "rollouts" in fresh.evaluate("document.querySelector('svg.chart').textContent")  # the runs' steps differ in size
    panel = "[...document.querySelectorAll('.panel')].find((each) => /^Gradient norm/.test(each.textContent))"
    (absent,) = fresh.evaluate(f"[...{panel}.querySelectorAll('.absent')].map((note) => note.textContent)")
    assert absent.startswith("search: ")  # a search has no gradient
    assert is_sound(fresh)


def test_competitions_are_shown_one_at_a_time(fresh, tmp_path):
    """The page stores the second competition's programs after the first one's."""
    disclosure = json.loads(json.dumps(DISCLOSURE))
    disclosure["competitions"].append(disclosure["competitions"][0] | {"id": "boats"})
    attempts = [
        attempt(0, group, 0, "seed", f"of group {group}", 0.7, task=("boats", "spaceship-titanic")[group % 2]) for group in range(6)
    ]
    fresh.open(write_report(write_run(tmp_path / "run", attempts, disclosure=disclosure)))
    assert shown(fresh) == "0000-001-000"
    fresh.evaluate("Object.assign(document.querySelector('select'), {value: 'boats'}).dispatchEvent(new Event('change'))")
    assert fresh.wait("document.getElementById('attempt').dataset.id", lambda id: id == "0000-000-000")
    for group in (2, 4):
        fresh.evaluate(f"location.hash = '0000-00{group}-000'")
        fresh.wait(f"document.getElementById('attempt').dataset.id === '0000-00{group}-000'")
        assert fresh.evaluate("document.querySelector('.program code').textContent") == f"of group {group}"
    assert is_sound(fresh)


def test_scores_of_a_problem_differ_in_their_last_digits(fresh, tmp_path):
    """Gains of 1e-7 show in the chart, the lineage and the change against the parent. The seed program is a line and the origin."""
    attempts = [
        attempt(step, 0, 0, ("seed", "0000-000-000")[step], f"x = {step}", score, task="circles")
        for step, score in enumerate((2.6359827, 2.6359828))
    ]
    run = write_run(tmp_path / "run", attempts, disclosure=PROBLEM)
    write_seed_program(run, "circles", 2.3697960951)
    fresh.open(write_report(run))
    fresh.wait("document.querySelectorAll('.family .go').length >= 2")
    text = fresh.evaluate("document.body.innerText")
    for shown_text in ("one 2.63586276", "another 2.63598308", "seed program 2.3697961", "best so far 2.6359828", "+1e-7 vs. parent"):
        assert shown_text in text
    lineage = fresh.evaluate("document.querySelector('.family').textContent")
    assert lineage == "lineageseed program 2.3697961→ 2.6359827→ 2.6359828"
    assert is_sound(fresh)


@pytest.mark.parametrize("case", ["nothing yet", "no score yet", "no disclosure", "one attempt"])
def test_incomplete_runs_render(fresh, tmp_path, case):
    failure = attempt(0, 0, 0, "seed", None, None, outcome=Outcome.FORMAT_ERROR)
    attempts = {"nothing yet": [], "no score yet": [failure], "one attempt": [attempt(0, 0, 0, "seed", "a", 0.7)]}.get(
        case, searched(3, 2, 2, edited(5, 0.2))
    )
    run = write_run(tmp_path / "run", attempts)
    if case == "no disclosure":
        (run / "disclosure.json").unlink()
    fresh.open(write_report(run))
    if attempts:
        assert shown(fresh)
    assert is_sound(fresh)

"""The simulated searches in experiments/selection: scores have the noise of rows, rules do what they say, and the page shows the data."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "selection"


@pytest.fixture(scope="module")
def modules():
    """compare, landscape and rules, which are scripts next to each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        import compare
        import landscape
        import rules
    finally:
        sys.path.remove(str(FOLDER))
    return compare, landscape, rules


@pytest.fixture(scope="module")
def found(modules):
    _, landscape, rules = modules
    return landscape.search(landscape.Landscape(), rules.greedy(rules.raw, landscape.Landscape()), runs=400, steps=4, seed=1)


def test_scores_are_true_scores_plus_the_noise_of_rows(modules, found):
    """Parents are selected by the first set of rows only, so all other sets are unbiased."""
    _, landscape, _ = modules
    one = landscape.Landscape()
    truth_RN, noise_RNS = one.truth(found.easy_RN, found.open_RN), found.scores(one.rows)
    noise_RNS = noise_RNS - truth_RN[..., None]
    valid_RN = found.valid_RN
    for number in range(1, landscape.SETS):
        assert np.abs(noise_RNS[..., number][valid_RN].mean()) < 0.0015
        assert noise_RNS[..., number][valid_RN].std() == pytest.approx(np.sqrt(0.76 * 0.24 / one.rows), rel=0.1)
    chosen = noise_RNS[..., 0][np.arange(400), np.where(valid_RN, found.scores(one.rows)[..., 0], -1).argmax(axis=1)]
    assert chosen.mean() > 0.006


def test_paired_differences_have_the_variance_of_their_counts(modules, found):
    _, landscape, _ = modules
    one = landscape.Landscape()
    scores, truth = found.scores(one.rows), one.truth(found.easy_RN, found.open_RN)
    child_RN = (found.parents_RN >= 0) & found.valid_RN
    parents_RN = np.maximum(found.parents_RN, 0)
    gain_RN = truth - np.take_along_axis(truth, parents_RN, axis=1)
    fresh_RN = scores[..., 1] - np.take_along_axis(scores[..., 1], parents_RN, axis=1) - gain_RN
    difference = landscape.difference_of_counts(found.gained_RN, found.lost_RN, one.rows)
    scored_RN = scores[..., 0] - np.take_along_axis(scores[..., 0], parents_RN, axis=1)
    np.testing.assert_allclose(difference.mean[child_RN], scored_RN[child_RN], atol=1e-12)
    assert fresh_RN[child_RN].var() == pytest.approx(difference.variance[child_RN].mean(), rel=0.1)


def test_copies_equal_their_parents_and_are_no_parents(modules, found):
    _, landscape, _ = modules
    scores = found.scores(landscape.Landscape().rows)
    run, child = np.nonzero(found.copy_RN & found.valid_RN)
    assert len(run) > 100
    np.testing.assert_array_equal(scores[run, child], scores[run, found.parents_RN[run, child]])
    run, child = np.nonzero(found.parents_RN >= 0)
    assert not found.copy_RN[run, found.parents_RN[run, child]].any()
    assert found.valid_RN[run, found.parents_RN[run, child]].all()


def test_the_simulation_is_repeatable_and_its_posteriors_close_the_gap(modules):
    compare, _, _ = modules
    arguments = argparse.Namespace(scenarios="measured", runs=40, seed=3)
    rows = compare.simulate(arguments)
    assert rows == compare.simulate(arguments)
    by = {(row["parents"], row["choice"]): row for row in rows}
    assert len(by) == len(compare.PARENTS) * len(compare.CHOICES)
    assert all(row["programs"] <= 384 for row in rows)
    assert by["greedy, raw", "raw"]["gap"] > 0.014
    assert all(abs(by["greedy, raw", name]["gap"]) < 0.007 for name in ("shrunk", "finalists", "both"))
    assert all(abs(row["gap"]) < 1e-12 for row in rows if row["choice"] == "truth")
    best = {name: by[name, "truth"]["truth"] for name in compare.PARENTS}
    assert max(best, key=lambda name: best[name]) == "greedy, truth"


def test_the_page_shows_the_data(modules, capsys):
    compare, _, _ = modules
    rows = [row for row in compare.read(FOLDER / "results.csv") if row["scenario"] == "measured"]
    compare.show(rows)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    page = (FOLDER / "README.md").read_text().splitlines()
    assert [line for line in table if line not in page] == []

"""Programs in strong/ that come close to the published records, or are better than the seed program where there is no record.

So the verifiers are known to accept such solutions. Each program runs in the sandbox, on 2 cores, as in a run; seconds and scores are
printed (`pytest -m slow -s`).
"""

from pathlib import Path

import pytest

from discover_jax.execution import Executor
from discover_jax.execution.limits import ResourceLimits
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.problems import counting_inversions
from discover_jax.types import Outcome, Verdict

SECONDS = 300.0
"""Limit of a program."""
strong = Path(__file__).parent / "strong"

pytestmark = [pytest.mark.sandbox, pytest.mark.slow]


def verdict_on(folder: Path, id: str, program: str) -> Verdict:
    """The verdict of the executor on a program for a bundled problem."""
    task = prepare_task(id, raw=None, reward="grade", folder=folder / id)
    with Executor([task], ResourceLimits(seconds=SECONDS, cores=2), workers=1, cache_dir=folder / "cache") as executor:
        verdict = executor.submit(program).result(timeout=2 * SECONDS)
    print(f"{id}: {verdict.grade.score!r} in {verdict.execution.seconds:.1f} s")
    assert verdict.outcome is Outcome.OK, verdict
    return verdict


def score_of(verdict: Verdict) -> float:
    assert verdict.grade.score is not None
    return verdict.grade.score


@pytest.mark.parametrize(
    ("id", "name", "threshold"),
    [
        ("circle-packing-26", "circle_packing.py", 2.62),
        ("circle-packing-32", "circle_packing.py", 2.9379 * 0.98),
        ("erdos-overlap", "erdos_overlap.py", 0.380876 * 1.02),
        ("autocorrelation-1", "autocorrelation_1.py", 1.50287 * 1.02),
        ("autocorrelation-2", "autocorrelation_2.py", 0.9591 * 0.98),
    ],
)
def test_strong_program_is_close_to_the_record(tmp_path, id, name, threshold):
    code = (strong / name).read_text()
    if id == "circle-packing-32":
        code = code.replace("COUNT = 26", "COUNT = 32")
    verdict = verdict_on(tmp_path, id, code)
    lower_is_better = id in ("erdos-overlap", "autocorrelation-1")
    assert score_of(verdict) <= threshold if lower_is_better else score_of(verdict) >= threshold
    assert verdict.execution.seconds < SECONDS


def test_strong_program_for_bin_packing_has_half_the_excess_of_the_seed_program(tmp_path):
    verdict = verdict_on(tmp_path, "online-bin-packing", (strong / "online_bin_packing.py").read_text())
    assert score_of(verdict) < verdict.grade.metrics["excess_of_best_fit"] / 2  # the seed program is best fit


def test_strong_program_for_inversions_is_twice_as_fast_as_the_seed_program(tmp_path):
    """Compared with the score of the seed program in the same test: both suffer from other processes of the machine."""
    strong_score = score_of(verdict_on(tmp_path, "counting-inversions", (strong / "counting_inversions.py").read_text()))
    seed_score = score_of(verdict_on(tmp_path / "seed", "counting-inversions", counting_inversions.PROBLEM.seed_program))
    assert strong_score > 2 * seed_score

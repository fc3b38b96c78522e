"""The seed program of each bundled problem, through the real sandbox and checking process."""

import re

import pytest
from programs import InProcess, page_of

from discover_jax.execution import Executor, sandbox_spec, values
from discover_jax.execution.limits import ResourceLimits
from discover_jax.tasks.loading import load_definition, locate_definition
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome

CONSTRUCTIONS = ("autocorrelation-1", "autocorrelation-2", "circle-packing-26", "circle-packing-32", "erdos-overlap")
EVERY = (*CONSTRUCTIONS, "counting-inversions", "online-bin-packing")

pytestmark = pytest.mark.sandbox


QUICK = ("erdos-overlap", "online-bin-packing")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, request):
    """The verdicts on the seed programs of the problems that are tested."""
    asked = {item.callspec.params["id"] for item in request.session.items if item.path == request.path and hasattr(item, "callspec")}
    folder, ids = tmp_path_factory.mktemp("problems"), [id for id in EVERY if id in asked]
    tasks = [prepare_task(id, raw=None, reward="grade", folder=folder / id) for id in ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_spec, "PRELOAD", ())
        with Executor(tasks, ResourceLimits(seconds=100.0, cores=1), workers=1, cache_dir=folder / "cache") as executor:
            futures = [executor.submit(task.problem.seed_program, number) for number, task in enumerate(tasks)]
            return dict(zip(ids, [future.result(timeout=300) for future in futures], strict=True))


@pytest.mark.parametrize("id", [pytest.param(id, marks=[] if id in QUICK else [pytest.mark.slow]) for id in EVERY])
def test_seed_program_has_the_score_that_it_has_outside(verdicts, id):
    verdict, problem = verdicts[id], load_definition(*locate_definition(id))
    assert verdict.outcome is Outcome.OK, (verdict.grade.reason, verdict.execution.detail)
    assert verdict.grade.feedback
    if id == "counting-inversions":  # a time
        assert 0.01 < verdict.grade.score < 10
        return
    outside = InProcess(problem.seed_program)
    assert verdict.grade.score == problem.evaluate(outside).score
    (row,) = (line for line in page_of(problem).read_text().splitlines() if line.startswith("| seed program |"))
    assert any(float(number) == pytest.approx(verdict.grade.score, abs=1e-3) for number in re.findall(r"\d\.\d{6}", row))
    if id in CONSTRUCTIONS:
        assert repr(values.decode(verdict.execution.result)) == repr(outside.call("run"))

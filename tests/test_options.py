"""Every option of the method in whole runs of the apprentice, in this process: each value of each choice at least once."""

import json

import pytest

from discover_jax import config as settings
from discover_jax import main
from discover_jax.apprentice.preset import apprentice_on_cpu
from discover_jax.archive.samplers import SAMPLERS
from discover_jax.execution import sandbox
from discover_jax.learning.advantages import ESTIMATORS
from discover_jax.learning.losses import LOSSES, REDUCTIONS
from discover_jax.learning.signals import DUPLICATES
from discover_jax.runs.console import NullConsole

RUNS = {
    "the paper's on several competitions": {
        "task.competition": "digits-parity, breast-cancer, diabetes",
        "reuse.sampler": "puct",
        "reuse.children": 2,
        "train.advantage": "entropic_adaptive",
        "train.kl_coefficient": 0.1,
        "train.loss": "ppo",
        "train.num_substeps": 2,
    },
    "variety": {
        "reuse.fresh": 0.5,
        "reuse.distinct": True,
        "train.advantage": "entropic_loo",
        "train.loss": "truncated_importance_sampling",
        "train.reduction": "sequence_mean",
        "sampling.temperature_spread": 0.3,
        "diversity.novelty_bonus": 0.1,
        "diversity.duplicates": "drop",
    },
    "no reuse": {
        "reuse.sampler": "fixed",
        "train.advantage": "mean_baseline",
        "train.loss": "reinforce",
        "train.reduction": "token_mean",
        "train.measure_kl": False,
        "task.reward": "holdout",
        "task.holdout_folds": 2,
    },
}
SEVERAL = "the paper's on several competitions"
PARAMETERS = [pytest.param(name, marks=[] if name == SEVERAL else pytest.mark.slow) for name in RUNS]


def run(folder, **changes):
    config = settings.default_config()
    config.name = "options"
    config.task.competition = "digits-parity"
    apprentice_on_cpu(config)
    config.groups, config.group_size, config.train.steps = 2, 3, 2
    config.sampling.slots, config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = 6, 512, 384
    with config.unlocked():
        for name, value in changes.items():
            assert name in settings.settings()
            config.update_from_flattened_dict({name: value})
    main.run(settings.validate(config), folder, console=NullConsole())
    return rows(folder / "journal.jsonl"), rows(folder / "metrics.jsonl")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    monkeypatch.setattr(sandbox, "PRELOAD", ())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs by name, each done when it is first asked for."""
    root, done = tmp_path_factory.mktemp("options"), {}

    def result(name):
        if name not in done:
            done[name] = (root / name, *run(root / name, **RUNS[name]))
        return done[name]

    return result


def test_the_runs_use_every_choice():
    used = {(name, value) for changes in RUNS.values() for name, value in changes.items()}
    defaults = {(name, row.default) for name, row in settings.settings().items()}
    tables = {
        "reuse.sampler": SAMPLERS,
        "train.advantage": ESTIMATORS,
        "train.loss": LOSSES,
        "train.reduction": REDUCTIONS,
        "diversity.duplicates": DUPLICATES,
        "task.reward": ("grade", "holdout"),
    }
    for name, table in tables.items():
        assert set(settings.settings()[name].choices) == set(table)
        assert {(name, value) for value in table} <= used | defaults


@pytest.mark.parametrize("name", PARAMETERS)
def test_runs_end_to_end(results, name):
    _, journal, metrics = results(name)
    assert len(journal) == 12
    assert [row["step"] for row in metrics] == [0, 1]
    assert all(row["logprob_gap/mean"] < 1e-5 for row in metrics)
    assert any(row["reward"] > -1 for row in journal)
    if not all(row["update/skipped"] for row in metrics):
        assert any(row["adapter_step"] > 0 for row in journal) or metrics[0]["update/skipped"]
    if "train.kl_coefficient" in RUNS[name]:
        assert metrics[0]["kl_base/mean"] == pytest.approx(0.0, abs=1e-5)  # the adapter begins as the base model
    if RUNS[name].get("reuse.sampler") == "fixed":
        assert {row["parent_id"] for row in journal} == {"seed"}
        assert "kl_base/mean" not in metrics[0]
    if "reuse.fresh" in RUNS[name]:
        assert {row["parent_id"] for row in journal if row["group"] == 1} == {"seed"}


def test_the_groups_of_several_competitions_take_turns(results):
    folder, journal, metrics = results(SEVERAL)
    ids = ["digits-parity", "breast-cancer", "diabetes"]
    assert [journal[group * 3]["task"] for group in range(4)] == [*ids, ids[0]]
    assert all(row["parent_id"] == "seed" or row["task"] == journal[0]["task"] for row in journal)
    known = {row["id"]: row["task"] for row in journal}
    assert all(known.get(row["parent_id"], row["task"]) == row["task"] for row in journal)  # a parent is of the same competition
    assert {f"task/{id}/best_score" for id in ids} <= metrics[-1].keys()
    disclosed = json.loads((folder / "disclosure.json").read_text())["competitions"]
    assert [each["id"] for each in disclosed] == ids
    for id in ids:
        scored = [row["score"] for row in journal if row["task"] == id and row["score"] is not None]
        assert (folder / "best" / id / "solution.py").exists() == bool(scored)


@pytest.mark.slow
def test_one_of_several_competitions_goes_on_alone(results, tmp_path):
    folder, journal, _ = results(SEVERAL)
    further, metrics = run(tmp_path / "alone", **{"train.resume_from": str(folder), "train.steps": 1, "groups": 1})
    assert further[:12] == journal
    assert {row["task"] for row in further[12:]} == {"digits-parity"}
    assert {row["step"] for row in further[12:]} == {2}
    best = max((row for row in journal if row["task"] == "digits-parity" and row["score"] is not None), key=lambda row: row["score"])
    assert further[12]["parent_id"] in {row["id"] for row in journal if row["task"] == "digits-parity"}
    assert metrics[-1]["best/score"] >= best["score"]

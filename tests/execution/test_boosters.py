"""LightGBM and CatBoost (extra `boosters`) in the real sandbox: default limits, both ways to limit memory, threads, files and output."""

import dataclasses
import importlib.util
import io
import os

import pandas as pd
import pytest

from discover_jax.execution import sandbox
from discover_jax.execution.limits import ResourceLimits
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome

pytestmark = pytest.mark.sandbox

needs_boosters = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightgbm", "catboost")), reason="needs the extra boosters"
)
PROGRAM = """
import os, threading, time
import pandas as pd
import lightgbm
from catboost import CatBoostClassifier
from lightgbm import LGBMClassifier

def most_threads(action):
    found, ended = [0], threading.Event()
    before = len(os.listdir("/proc/self/task"))
    def watch():
        while not ended.wait(0.001):
            found[0] = max(found[0], len(os.listdir("/proc/self/task")))
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    ended.set()
    watcher.join()
    return found[0] - before - 1

def run():
    train, test, sample = (pd.read_csv(f"data/{name}.csv") for name in ("train", "test", "sample_submission"))
    features, target, new = train.drop(columns=["id", "even"]), train["even"], test.drop(columns="id")
    light, cat = LGBMClassifier(n_estimators=40, verbose=-1), CatBoostClassifier(iterations=40, verbose=0)
    more_light = most_threads(lambda: light.fit(features, target))
    lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(features, target), 5)
    more_cat = most_threads(lambda: cat.fit(features, target))
    print(more_light, more_cat, os.path.isdir("catboost_info"))
    sample["even"] = light.predict_proba(new)[:, 1] + cat.predict_proba(new)[:, 1] > 1
    return sample
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The bundled competition, which an ordinary user of a sandbox can read."""
    folder = tmp_path_factory.mktemp("digits")
    folder.chmod(0o755)
    return prepare_task("digits-parity", raw=None, reward="grade", folder=folder / "task")


@needs_boosters
@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False], ids=["control group", "RLIMIT_AS"])
@pytest.mark.parametrize("cores", [1, 2])
def test_both_train_under_the_default_limits_on_their_own_cores(full_spec, digits, grouped, cores):
    cpus = tuple(sorted(os.sched_getaffinity(0)))[:cores]
    if len(cpus) < cores or (grouped and full_spec.cgroups is None):
        pytest.skip("needs the cores, and a control group that can be written")
    spec = dataclasses.replace(full_spec, public=digits.public_dirs[0], cores=cpus, limits=ResourceLimits())
    box = sandbox.start(spec if grouped else dataclasses.replace(spec, cgroups=None))
    try:
        box.wait_ready()
        execution = box.run(PROGRAM)
    finally:
        box.close()
    assert execution.outcome is Outcome.OK, execution
    assert pd.read_csv(io.BytesIO(execution.result or b"")).shape == (1197, 2)
    assert digits.grade(execution.result).score > 0.9
    light, cat, wrote = execution.stdout.split()  # no warnings of joblib
    assert wrote == "True"
    assert int(light) <= cores  # OpenMP's threads beside the main one
    assert int(cat) <= cores  # CatBoost's, which it counts by the affinity


def test_counting_physical_cores_prints_nothing(spec, run_with):
    """LightGBM counts them by joblib, which fails without /sys if a program has all cores of the machine."""
    program = (
        "import joblib\nimport pandas as pd\ndef run():\n    return pd.DataFrame({'n': [joblib.cpu_count(only_physical_cores=True)]})\n"
    )
    cores = tuple(sorted(os.sched_getaffinity(0)))
    execution = run_with(dataclasses.replace(spec, cores=cores, preload=("joblib",)), program)
    assert (execution.outcome, execution.stdout) == (Outcome.OK, ""), execution
    assert 1 <= int(pd.read_csv(io.BytesIO(execution.result or b""))["n"][0]) <= len(cores)

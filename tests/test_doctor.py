"""The doctor on a working machine, and with one fault at a time."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from absl import flags, logging

from discover_jax import config as settings
from discover_jax import doctor
from discover_jax.config import validate
from discover_jax.exceptions import ConfigError, DataError, RunError
from discover_jax.execution import sandbox_spec
from discover_jax.models import folder as folders
from discover_jax.models.synthetic import write_synthetic
from discover_jax.policy import APPRENTICE
from discover_jax.preflight import requirements
from discover_jax.tasks.prepare import prepare_task
from discover_jax.tasks.task import Task

ROOT = Path(__file__).parents[1]
NAMES = ["packages", "devices", "weights", "tokenizer", "disk", "data", "prompt", "grader", "sandbox"]


def _findings(tmp_path, **changes):
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return {finding.name: finding for finding in doctor.examine(validate(config), tmp_path / "run")}


def test_all_checks_pass(tmp_path, capsys):
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.execution.workers = 1  # each starts a sandbox, which imports many packages
    doctor.run(validate(config), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in NAMES]
    assert "ready" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_dependent_checks_are_skipped_and_the_exit_code_is_1(tmp_path, capsys):
    config = runpy.run_path(str(ROOT / "configs" / "spaceship.py"))["get_config"]("run1")
    config.model.weights = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as ended:
        doctor.run(validate(config), tmp_path / "run")
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    *lines, last = printed.splitlines()
    assert "FIX" in last
    assert "ready" not in last
    marks = {line.split()[1]: line.split()[0] for line in lines}
    assert marks["weights"] == marks["data"] == "FIX"
    assert marks["tokenizer"] == marks["disk"] == marks["grader"] == marks["sandbox"] == "--"
    assert str(tmp_path / "nowhere") in printed


@pytest.fixture
def command(monkeypatch):
    """Runs `python -m discover_jax.doctor` and returns its exit code.

    It runs in this process, since a new one would import jax and orbax for seconds. Afterwards, absl is as before.
    """
    known, verbosity = set(flags.FLAGS), logging.get_verbosity()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("discover_jax.doctor", run_name="__main__")
        return ended.value.code

    yield run
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("arguments", "code", "out", "error"),
    [
        # Neither data nor weights, so that nothing slow is checked.
        (["--config.model.weights=/nowhere", "--config.task.raw=/nowhere"], 1, "Fix the items marked FIX and run the doctor again.", ""),
        (["--config.groups=0"], 2, "", "config.groups must be at least 1"),
    ],
)
def test_the_command_ends_with_a_code(command, tmp_path, capsys, arguments, code, out, error):
    assert command(f"--config={ROOT / 'configs' / 'spaceship.py'}:run1", f"--workdir={tmp_path / 'run'}", *arguments) == code
    said = capsys.readouterr()
    marks = {line.split()[1]: line.split()[0] for line in said.out.splitlines()[:-1]}
    assert marks == ({} if error else dict.fromkeys(NAMES, "--") | {"packages": "ok", "devices": "ok", "weights": "FIX", "data": "FIX"})
    assert said.out.rstrip().endswith(out)
    assert error in said.err
    assert not (tmp_path / "run").exists()


def test_weights_and_tokenizer_that_do_not_match(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    sizes = folders.read_config(APPRENTICE)
    write_synthetic(tmp_path / "small", dataclasses.replace(sizes, num_layers=2, vocab_size=512))
    found = _findings(tmp_path, model__weights=str(tmp_path / "small"), model__tokenizer=str(APPRENTICE))
    assert found["weights"].ok
    assert found["tokenizer"].ok is False
    assert re.search(r"\b2,048\b.*\b512\b", found["tokenizer"].text)
    found = _findings(tmp_path, model__weights=str(tmp_path / "small"))
    assert found["tokenizer"].ok is False
    assert "no tokenizer" in found["tokenizer"].text.lower()
    assert str(tmp_path / "small") in found["tokenizer"].text

    shutil.copytree(APPRENTICE, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    found = _findings(tmp_path, model__weights=str(tmp_path / "broken"))
    assert found["weights"].ok is False
    assert re.search(r"\b48 tensors\b.*\(4, .*\(8, ", found["weights"].text)  # experts of the files and of config.json


def test_full_disk_and_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10**8))
    found = _findings(tmp_path)
    assert found["disk"].ok is False
    assert re.search(r"\b1 GB are needed\b", found["disk"].text)
    monkeypatch.setattr(os, "access", lambda *_: False)
    disk = _findings(tmp_path)["disk"]
    assert disk.ok is False
    assert f"{tmp_path / 'run'} is not writable" in disk.text


def test_wrong_grader_is_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    grade = Task.grade
    monkeypatch.setattr(Task, "grade", lambda self, csv, run=-1: dataclasses.replace(grade(self, csv, run), private_score=0.25))
    found = _findings(tmp_path)
    assert re.search(r"\b0\.25000\b.*\b0\.50459\b", found["grader"].text)
    assert found["sandbox"].ok is None
    monkeypatch.setattr(Task, "grade", lambda self, csv, run=-1: grade(self, (self.public_dir / "sample_submission.csv").read_bytes()))
    grader = _findings(tmp_path)["grader"]
    assert grader.ok is False
    assert "no better than the sample" in grader.text


def test_sandbox_with_a_wrong_score_is_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox_spec, "PRELOAD", ())
    monkeypatch.setattr(doctor, "packages_in_prompts", lambda tasks: [])  # a program for each would import it
    monkeypatch.setattr(doctor, "_PROGRAM", "def run():\n    raise ValueError('no')\n")
    found = _findings(tmp_path)
    assert found["sandbox"].ok is False
    assert "exception" in found["sandbox"].text
    assert "ValueError: no" in found["sandbox"].text


@pytest.mark.slow  # prepares a task twice
def test_doctor_reports_no_canary_without_isolation(tmp_path):
    found = _findings(tmp_path, execution__backend="unsafe-subprocess", execution__allow_weaker=True)
    assert found["sandbox"].ok
    assert re.search(r"no canary\b.*\bunsafe-subprocess: NO ISOLATION", found["sandbox"].text)
    found = _findings(tmp_path)
    assert re.search(r"canary could not escape.*\bbubblewrap\b", found["sandbox"].text)


def test_missing_and_old_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    version = importlib.metadata.version

    def other(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "jax" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    text = _findings(tmp_path)["packages"].text
    assert re.search(r"\boptax\S* is missing", text)
    assert re.search(r"\bjax\b.*\b0\.1\.0\b.*>=0\.10\.2\b", text)


@pytest.mark.parametrize(("present", "extra"), [("/dev/nvidia0", "cuda"), ("/dev/accel0", "tpu")])
def test_accelerator_that_jax_does_not_see_is_named(tmp_path, monkeypatch, present, extra):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == present or exists(path))
    if doctor.jax.default_backend() != "cpu":
        pytest.skip("jax sees an accelerator here")
    assert f"-e '.[{extra}]'" in _findings(tmp_path)["devices"].text


def test_packages_that_programs_cannot_import_have_a_remedy():
    assert "for programs: " in requirements.check_packages()[0]
    doctor._check_imports({})
    error = "OSError: libgomp.so.1: cannot open shared object file: No such file or directory"
    with pytest.raises(RunError, match=r"lightgbm .*libgomp\.so\.1.*apt-get install libgomp1.*pip uninstall lightgbm`"):
        doctor._check_imports({"lightgbm": error})
    with pytest.raises(RunError, match=r"catboost .*sandboxes contain.*pip uninstall catboost`"):
        doctor._check_imports({"catboost": "the process died by SIGILL"})


def test_missing_kernels_of_a_gpu_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "find_kernel", lambda *_: (print, ""))
    assert doctor._kernels() == ", with kernels"
    monkeypatch.setattr(doctor, "find_kernel", lambda *_: (None, "this GPU has compute capability 7.5"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "compute capability 7.5" in doctor._kernels()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "find_kernel", lambda *_: (None, "no jax_triton. Run X."))
    with pytest.raises(ConfigError, match=r"not installed.*many times slower.*Run X"):
        doctor._kernels()


def test_a_prompt_that_is_too_long_is_named_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_sandbox", lambda *_: ("", None))
    found = _findings(tmp_path, sampling__max_prompt_tokens=10)
    assert found["prompt"].ok is False
    assert re.search(r"config\.sampling\.max_prompt_tokens allows 10\b", found["prompt"].text)
    assert re.search(r"^digits-parity: \d+ of [\d,]+ tokens", _findings(tmp_path)["prompt"].text)


METRICS = {
    "ROC AUC": ("metrics.ROC_AUC", "identity"),
    "log loss": ("metrics.LOG_LOSS", "negate"),
    "Brier score": (
        "Metric('Brier score', higher_is_better=False, function=lambda a, p: float((((a == sorted(set(a))[-1]) - p) ** 2).mean()))",
        "negate",
    ),
}
_LABELLED = """
import pandas as pd
from discover_jax.tasks import metrics
from discover_jax.tasks.competition import Competition, Metric


def prepare(raw, public, private):
    rows = pd.DataFrame({{"id": range(60), "x": range(60), "y": [[{labels}][n % 3 % 2] for n in range(60)]}})
    rows[:40].to_csv(public / "train.csv", index=False)
    rows[40:][["id", "x"]].to_csv(public / "test.csv", index=False)
    rows[40:][["id"]].assign(y=0.5).to_csv(public / "sample_submission.csv", index=False)
    rows[40:].to_csv(private / "test.csv", index=False)


COMPETITION = Competition(
    id="labels", description="y", id_column="id", target="y", metric={metric}, transform="{transform}", failure_reward=-100.0,
    prepare=prepare,
)
"""


def _labelled(tmp_path, labels, metric, transform, **options):
    path = tmp_path / "labels.py"
    path.write_text(_LABELLED.format(labels=labels, metric=metric, transform=transform))
    return prepare_task(str(path), raw=None, folder=tmp_path / "task", **({"reward": "grade"} | options))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("labels", ["'no', 'yes'", "'yes', 'no'", "0, 1", "1, 2", "-1, 1", "True, False", "'B', 'A'"])
def test_perfect_predictions_of_two_classes(tmp_path, labels, metric):
    text, score = doctor._grader(_labelled(tmp_path, labels, *METRICS[metric]))
    assert score == pytest.approx({"ROC AUC": 0.5, "log loss": 0.69315, "Brier score": 0.25}[metric])
    perfect = re.search(r"answers ([\d.-]+);", text)
    assert float(perfect[1]) == (1.0 if metric == "ROC AUC" else 0.0)


@pytest.mark.parametrize("options", [{"holdout_folds": 3}, {"holdout_fraction": 0.3}])
def test_perfect_predictions_of_held_out_rows(tmp_path, options):
    task = _labelled(tmp_path, "'no', 'yes'", "metrics.ROC_AUC", "identity", reward="holdout", **options)
    assert "answers 1.00000" in doctor._grader(task)[0]


def test_a_metric_that_takes_no_answers_is_not_checked_by_them(tmp_path):
    metric = "Metric('distance', higher_is_better=False, function=lambda a, p: float(p.sum() / 0.5) if p.max() <= 0.5 else 1 / 0)"
    text, _ = doctor._grader(_labelled(tmp_path, "'a', 'b'", metric, "negate"))
    assert "answers not graded" in text


@pytest.mark.parametrize("labels", ["'no', 'yes'", "0, 1", "1, 2"])
@pytest.mark.parametrize(("metric", "sample"), [("ROC_AUC", "0.5"), ("ACCURACY", "rows.y[0]")])
def test_a_wrong_direction_is_still_found(tmp_path, monkeypatch, labels, metric, sample):
    monkeypatch.setitem(globals(), "_LABELLED", _LABELLED.replace("y=0.5", f"y={sample}"))
    metric = f"Metric('score', higher_is_better=False, function=metrics.{metric}.function)"
    with pytest.raises(DataError, match="no better than the sample"):
        doctor._grader(_labelled(tmp_path, labels, metric, "negate"))


@pytest.mark.parametrize("id", ["mine", "mlebench-like"])
def test_checksums_of_a_users_competition_are_its_own(tmp_path, id):
    """No word of MLE-bench, whose competition it is not."""
    path = tmp_path / "labels.py"
    path.write_text(_LABELLED.format(labels="0, 1", metric="metrics.ROC_AUC", transform="identity"))
    prepared = prepare_task(str(path), raw=None, reward="grade", folder=tmp_path / "task")
    digest = hashlib.md5((prepared.folder / "public" / "train.csv").read_bytes(), usedforsecurity=False).hexdigest()
    changed = path.read_text().replace('id="labels"', f'id="{id}", prepared_md5={{"public/train.csv": "{digest}"}}')
    path.write_text(changed)
    config = settings.default_config()
    config.task.competition, config.task.reward = str(path), "grade"
    text, _ = doctor._data(config, tmp_path / "doctor")
    assert "checksums match the definition's" in text
    assert "MLE" not in text

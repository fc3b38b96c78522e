"""Whole runs with the apprentice on a bundled competition: train, search, kill -9, resume, mistakes.

They have the compiler options of users and take minutes. By default, tests/faults makes the same checks on runs of the phrase model.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

_SMALL = (
    "--config=configs/quickstart.py",
    "--config.groups=2",
    "--config.group_size=3",
    "--config.sampling.slots=6",
    "--config.sampling.max_prompt_tokens=512",
    "--config.sampling.max_new_tokens=384",
    "--config.train.rows=1",
)


STEPS = 2
_ALL_STEPS = f"--config.train.steps={STEPS}"

# The environment of users, without the settings of tests/conftest.py. All runs of a user share the folder of compiled functions.
_OF_TESTS = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _OF_TESTS}


def _command(workdir: Path, *extra: str, module: str = "main") -> list[str]:
    return [sys.executable, "-m", f"discover_jax.{module}", *_SMALL, f"--workdir={workdir}", *extra]


def _run(workdir: Path, *extra: str, module: str = "main", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(_command(workdir, *extra, module=module), capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = _run(workdir, _ALL_STEPS)
    for step in range(1, STEPS + 1):
        assert re.search(rf"^step +{step}/{STEPS}\b", done.stdout, re.MULTILINE)
    assert re.search(r"^ *learning\b.*\b\d+ rollouts\b.*\b\d+ microbatch", done.stdout, re.MULTILINE)
    assert re.search(r"^ *checkpoint\b.*\b\d+ MB\b", done.stdout, re.MULTILINE)
    assert str(workdir / "best") in done.stdout
    assert "\x1b" not in done.stdout  # piped: plain lines
    return workdir


def test_run_leaves_the_files_listed_in_the_readme(unbroken):
    metrics = _rows(unbroken / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    required = {"reward/mean", "reward/max", "best/score", "rollouts/valid_frac", "groups/constant_frac", "logprob_gap/mean"}
    required |= {"time/sample_s", "time/execute_s", "time/update_s"}
    assert all(required <= row.keys() for row in metrics)
    assert all(row["logprob_gap/mean"] < 1e-5 for row in metrics)  # one model samples and trains
    journal = _rows(unbroken / "journal.jsonl")
    assert len(journal) == STEPS * 2 * 3
    best = max((row for row in journal if row["score"] is not None), key=lambda row: row["score"])
    grade = json.loads((unbroken / "best" / "grade.json").read_text())
    assert grade["score"] == best["score"] == metrics[-1]["best/score"]
    assert (unbroken / "best" / "solution.py").read_text().rstrip() == best["code"].rstrip()
    assert (unbroken / "best" / "submission.csv").read_text().startswith("id,even")
    rollouts = pd.read_parquet(unbroken / "rollouts").sort_values(["step", "group", "index"])
    assert list(rollouts["id"]) == [row["id"] for row in journal]
    assert list(rollouts["program"].dropna()) == [row["code"] for row in journal if row["code"] is not None]
    assert (rollouts["logprob_sum"] < 0).all()
    assert list(rollouts["prompt"].notna()) == [True, False, False] * 2 * STEPS
    (events,) = (unbroken / "tensorboard").iterdir()
    assert all(events.read_bytes().count(name.encode()) == STEPS for name in required - {"reward/max"} | {"outcome/ok"})
    assert not (unbroken / "wandb_id").exists()
    disclosure = json.loads((unbroken / "disclosure.json").read_text())
    assert disclosure["competitions"][0]["reward"]["rows"] == grade["rows"] == 1197
    assert disclosure["isolation"]["isolated"] is True
    assert disclosure["search"]["learned"] is True
    assert json.loads((unbroken / "config.json").read_text())


def test_best_grade_matches_the_tasks_grade(unbroken):
    from discover_jax.tasks.prepare import prepare_task

    task = prepare_task("digits-parity", raw=None, reward="grade", folder=unbroken / "task")
    grade = json.loads((unbroken / "best" / "grade.json").read_text())
    assert task.grade((unbroken / "best" / "submission.csv").read_bytes()).score == grade["score"]


def test_kill_9_and_resume_gives_the_same_journal(unbroken, tmp_path):
    """Killed while sampling or running programs of the second step, and again soon after the restart."""
    workdir = tmp_path / "run"
    for until in (lambda: _lines(workdir / "metrics.jsonl") >= 1, lambda: True):
        process = subprocess.Popen(
            _command(workdir, _ALL_STEPS),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=_ENVIRONMENT,
        )
        deadline = time.monotonic() + 300
        while not until():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(4.0)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _run(workdir, _ALL_STEPS)
    assert (workdir / "journal.jsonl").read_bytes() == (unbroken / "journal.jsonl").read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k in ("step", "reward/mean", "loss", "best/score")} for row in _rows(w / "metrics.jsonl")]
        for w in (workdir, unbroken)
    ]
    assert timeless[0] == timeless[1]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_restarted_finished_run_does_nothing(unbroken):
    before = (unbroken / "journal.jsonl").read_bytes()
    done = _run(unbroken, _ALL_STEPS)
    assert re.search(rf"\bresume[sd]\b.*\bstep {STEPS}\b", done.stdout)
    assert (unbroken / "journal.jsonl").read_bytes() == before


def test_different_config_is_refused_with_the_differences(unbroken):
    done = _run(unbroken, _ALL_STEPS, "--config.seed=5", code=2)
    assert "seed" in done.stderr
    assert "5" in done.stderr
    assert "Traceback" not in done.stderr
    _run(unbroken, _ALL_STEPS, module="search", code=2)


def test_second_run_continues_the_first(unbroken, tmp_path):
    """As the report's run 4 continues run 3, it inherits adapter, optimiser, archive, journal and step count."""
    done = _run(tmp_path / "next", "--config.train.steps=1", f"--config.train.resume_from={unbroken}")
    assert re.search(rf"\bstep {STEPS}\b", done.stdout)
    journal = _rows(tmp_path / "next" / "journal.jsonl")
    assert journal[: STEPS * 6] == _rows(unbroken / "journal.jsonl")
    assert {row["step"] for row in journal[STEPS * 6 :]} == {STEPS}
    assert all(row["adapter_step"] >= STEPS - 1 for row in journal[STEPS * 6 :])
    done = _run(tmp_path / "none", "--config.train.steps=1", "--config.train.resume_from=/nowhere", code=2)
    assert re.search(r"/nowhere\b", done.stderr)


def test_search_has_the_same_first_step_and_never_learns(unbroken, tmp_path):
    _run(tmp_path / "search", "--config.train.steps=2", module="search")
    ours, theirs = _rows(tmp_path / "search" / "journal.jsonl"), _rows(unbroken / "journal.jsonl")
    assert [row["code"] for row in ours[:6]] == [row["code"] for row in theirs[:6]]
    assert all(row["adapter_step"] == 0 for row in ours)
    metrics = _rows(tmp_path / "search" / "metrics.jsonl")
    assert metrics[0].keys() >= {"logprob_gap/mean", "time/update_s", "update/skipped"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--config.task.competition=spaceship-titanic", "--config.task.raw=/nowhere/train.csv"), "/nowhere/train.csv"),
        (("--config.model.weights=/nowhere",), "/nowhere"),
    ],
)
def test_mistakes_are_one_clear_error_and_damage_nothing(tmp_path, extra, message):
    done = _run(tmp_path / "run", "--config.train.steps=1", *extra, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_program_too_long_for_a_prompt_is_kept_as_best_but_never_a_parent(tmp_path):
    done = _run(tmp_path / "run", "--config.train.steps=2", "--config.sampling.max_prompt_tokens=48", module="search")
    assert re.search(r"\b48 tokens\b", done.stdout)
    journal = _rows(tmp_path / "run" / "journal.jsonl")
    assert {row["parent_id"] for row in journal} == {"seed"}
    grade = json.loads((tmp_path / "run" / "best" / "grade.json").read_text())
    assert grade["score"] == max(row["score"] for row in journal if row["score"] is not None)


@pytest.mark.filterwarnings("ignore:.*(rank_pattern|save_embedding_layers|config file)")
def test_the_trained_adapter_goes_to_peft_and_back_with_equal_logits(unbroken, tmp_path):
    """Logits of the trained adapter on the run's best program: in our model, in peft over transformers, and after peft saved it."""
    torch = pytest.importorskip("torch", reason="needs torch and peft (make test installs them; PARITY=0 leaves them out)")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    import jax
    import numpy as np

    from discover_jax import config as settings
    from discover_jax.engine import build_optimizer
    from discover_jax.learning.train_state import abstract_train_state
    from discover_jax.models.adapter import load_peft
    from discover_jax.policy import APPRENTICE, load_policy
    from discover_jax.runs.checkpoints import Checkpoints

    out = tmp_path / "adapter"
    command = [sys.executable, "-m", "discover_jax.export_adapter", f"--run={unbroken}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    assert done.returncode == 0, done.stderr

    config = settings.default_config()
    config.update_from_flattened_dict(json.loads((unbroken / "config.json").read_text())["config"])
    policy = load_policy(config)
    checkpoints = Checkpoints(unbroken / "checkpoints", keep=1, every=0, read_only=True)
    wanted = abstract_train_state(policy.model.abstract_lora(), build_optimizer(config))
    state, _ = checkpoints.restore(STEPS - 1, wanted)
    checkpoints.close()
    assert state is not None
    tokens_BT = np.array([policy.tokenizer.encode((unbroken / "best" / "solution.py").read_text())], np.int32)

    @jax.jit
    def ours(lora):
        hidden_BTD = policy.model.hidden(policy.frozen, lora, tokens_BT, np.arange(tokens_BT.size)[None], np.ones_like(tokens_BT))
        return policy.model.logits(policy.frozen, lora, hidden_BTD)

    def theirs(model):
        with torch.no_grad():
            return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()

    base = transformers.GptOssForCausalLM.from_pretrained(
        APPRENTICE, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    plain = theirs(base)
    adapted = peft.PeftModel.from_pretrained(base, out).eval()
    trained = ours(state.lora)
    moved = np.abs(trained - plain).max()
    assert moved > 0.05  # after the updates, the adapter must differ from the base model
    np.testing.assert_allclose(trained, theirs(adapted), atol=2e-4, rtol=0)
    adapted.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(trained, ours(load_peft(tmp_path / "again", policy.model)))

"""The run of the fault tests: how it is started, and which of its results must be the same after any fault."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from phrase_model import write_phrase_model

from discover_jax.runs.metrics import read_metrics

STEPS = 4
_HERE = Path(__file__).parent
_CONFIG = _HERE / "phrase_config.py"
# Measured times, and values that depend on whether a verdict came from the cache.
_TIMED_METRICS = ("time/", "programs/", "sample/tokens_per_s")
_TIMED_ROLLOUTS = ("seconds", "cached")


def command(root: Path, workdir: Path, steps: int = STEPS) -> list[str]:
    """The command that starts or resumes the run in `workdir`; `root` as in `environment`."""
    config = f"--config={_CONFIG}:{root / 'model'}"
    return [sys.executable, str(_HERE / "tiny_main.py"), config, f"--config.train.steps={steps}", f"--workdir={workdir}"]


def environment(root: Path, **variables: str) -> dict[str, str]:
    """The environment of all runs with their model and compiled functions in `root`, and further variables of `tiny_main`."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }


def start(root: Path, workdir: Path, steps: int, *options: str) -> subprocess.Popen[str]:
    """Starts or resumes the run in `workdir` with further options; `finish` waits for it."""
    arguments = [*command(root, workdir, steps), *options]
    return subprocess.Popen(arguments, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What a run printed. It must succeed within 5 minutes."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def kill_after_first_step(process: subprocess.Popen[str], workdir: Path) -> None:
    """Kills a run by SIGKILL as soon as the metrics of its first step are written."""
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or b"\n" not in metrics.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()


def unbroken(root: Path, steps: int = STEPS) -> Path:
    """The folder of an uninterrupted run. Several test processes may call this: the first runs it, the others wait."""
    root.mkdir(exist_ok=True)
    workdir = root / f"unbroken-{steps}"
    with _locked(root / "lock"):
        if not (root / "model").exists():
            write_phrase_model(root / "model.part")
            (root / "model.part").rename(root / "model")
        if not workdir.exists():
            shutil.rmtree(root / "part", ignore_errors=True)
            done = subprocess.run(command(root, root / "part", steps), env=environment(root), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (root / "part").rename(workdir)
    return workdir


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def results(workdir: Path) -> dict[str, Any]:
    """The results of a run, without times: journal and best/ as bytes, metrics and rollouts as rows, arrays as SHA-256."""
    found: dict[str, Any] = {"journal.jsonl": (workdir / "journal.jsonl").read_bytes()}
    for path in (workdir / "best").rglob("*"):
        if path.is_file():
            found[str(path.relative_to(workdir))] = path.read_bytes()
    found["metrics"] = [_without(row, _TIMED_METRICS) for row in read_metrics(workdir / "metrics.jsonl")]
    for path in (workdir / "rollouts").iterdir():
        rows = json.loads(pd.read_parquet(path, engine="fastparquet").to_json(orient="records"))
        found[path.name] = [_without(row, _TIMED_ROLLOUTS) for row in rows]
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    found["last checkpoint"] = json.loads((last / "host" / "metadata").read_bytes())  # with the SHA-256 of each array and of everything
    return found


def _without(row: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(prefixes)}

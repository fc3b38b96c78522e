"""The pool: sharing and caching of verdicts, recovery from crashes, and a clean end."""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ordinary_user
import pandas as pd
import pytest
from tiny_competition import GOOD, GOOD_SCORE, BrokenGrading, CannotBeUnpickled, make

from discover_jax.exceptions import ConfigError, GradingError, RunError, SandboxError
from discover_jax.execution import Executor, ResourceLimits
from discover_jax.tasks.prepare import prepare_task
from discover_jax.types import Outcome

LIMITS = ResourceLimits(seconds=60, cores=1)
REPOSITORY = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_concurrent_duplicates_share_one_execution_and_later_ones_use_the_cache(task, tmp_path):
    """The program prints a random number from the kernel, so equal output means that it ran once."""
    program = "import os\nprint(os.urandom(8).hex())\n" + GOOD
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        verdicts = [future.result(60) for future in [pool.submit(program) for _ in range(4)]]
        assert [v.execution.cached for v in verdicts] == [False, True, True, True]
        assert len({v.execution.stdout for v in verdicts}) == 1
        began = time.monotonic()
        again = pool.submit(program)
        assert again.done()  # no sandbox was needed
        assert time.monotonic() - began < 0.1
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        from_disk = pool.submit(program).result(60)
        assert from_disk.execution.cached
        assert from_disk.execution.stdout == verdicts[0].execution.stdout
        assert from_disk.grade == verdicts[0].grade
        assert from_disk.execution.result == verdicts[0].execution.result
        fresh = pool.submit(program + "# other\n").result(60)
        assert not fresh.execution.cached
    # The cache key includes data and limits.
    for other_task, other_limits in (
        (dataclasses.replace(task, fingerprint="tiny-2"), LIMITS),
        (task, dataclasses.replace(LIMITS, seconds=61)),
    ):
        with Executor([other_task], other_limits, workers=1, cache_dir=tmp_path) as pool:
            verdict = pool.submit(program).result(60)
            assert not verdict.execution.cached
            assert verdict.execution.stdout != verdicts[0].execution.stdout


DIGITS = """
import pandas as pd
from sklearn.neighbors import KNeighborsClassifier
def run():
    train, test = pd.read_csv("data/train.csv"), pd.read_csv("data/test.csv")
    submission = pd.read_csv("data/sample_submission.csv")
    row, target = submission.columns
    features = train.columns.drop([row, target])
    submission[target] = KNeighborsClassifier(3).fit(train[features], train[target]).predict(test[features])
    return submission
"""


@pytest.mark.slow  # test_main.py runs the real preloaded packages
def test_real_competition(tmp_path):
    """The built-in competition; the score is computed independently from the answers' file."""
    task = prepare_task("digits-parity", raw=None, reward="grade", folder=tmp_path / "task")
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "cache") as pool:
        verdict = pool.submit(DIGITS).result(120)
        assert verdict.outcome is Outcome.OK, verdict.execution
        submitted = pd.read_csv(io.BytesIO(verdict.execution.result or b""))
        answers = pd.read_csv(task.folder / "private" / "test.csv")
        score = float((submitted["even"].to_numpy() == answers["even"].to_numpy()).mean())
        assert score > 0.9
        assert verdict.grade.score == pytest.approx(score, abs=1e-5)
        cheat = "import pandas as pd\nfrom sklearn.datasets import load_digits\ndef run():\n    return load_digits(as_frame=True).frame\n"
        assert pool.submit(cheat).result(120).outcome is Outcome.EXCEPTION


def test_damaged_cache_entry_is_run_again(task, tmp_path):
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        pool.submit(GOOD).result(60)
        (entry,) = tmp_path.glob("*/*.json")
        entry.write_bytes(entry.read_bytes()[:40])
        verdict = pool.submit(GOOD).result(60)
        assert (verdict.execution.cached, verdict.grade.score) == (False, GOOD_SCORE)


def test_full_disk_is_one_clear_error(task, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        monkeypatch.setattr("discover_jax.execution.cache.os.replace", no_space)
        with pytest.raises(RunError, match="No space left on device"):
            pool.submit(GOOD).result(60)
        assert list(tmp_path.glob("*/*")) == []
        monkeypatch.undo()
        assert pool.submit(GOOD).result(60).grade.score == GOOD_SCORE


def test_verdicts_are_the_same_in_every_run(task, tmp_path):
    """Seeds, hashes of strings, addresses and folders do not differ between runs."""
    program = """import random, warnings
import numpy as np
print(random.random(), np.random.rand(), hash("x"), sorted({"a", "b", "c"}, key=hash), object(), __file__)
warnings.warn("careful")
def run():
    raise ValueError(object())
"""
    found = []
    for name in ("a", "b"):
        with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / name) as pool:
            verdict = pool.submit(program).result(60)
            found.append((verdict.outcome, verdict.grade, verdict.execution.stdout, verdict.execution.detail))
    assert found[0] == found[1]
    assert found[0][3] == "line 6, in run: raise ValueError(object())\nValueError: <object object at 0x...>"
    assert "solution.py:4: UserWarning: careful" in found[0][2]
    assert "/sandbox" not in found[0][2]


def worker_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.name.startswith("execution-") and child.pid}


def test_crashed_worker_is_replaced_and_its_program_runs_again(task, tmp_path):
    others = worker_pids()
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path) as pool:
        pool.submit(GOOD).result(60)
        (old,) = worker_pids() - others
        future = pool.submit("import time\ntime.sleep(1)\n" + GOOD)
        assert wait_for(future.running, 5)
        os.kill(old, signal.SIGKILL)
        assert future.result(60).grade.score == GOOD_SCORE
        (new,) = worker_pids() - others
        assert new != old


def test_host_faults_are_never_verdicts(tmp_path):
    """The worker dies in each try: the caller gets an error, and nothing is cached."""
    task = make(tmp_path / "competition", CannotBeUnpickled)
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "cache") as pool:
        with pytest.raises(SandboxError, match=r"\b3\b[\s\S]*\b7\b"):
            pool.submit(GOOD).result(60)
        assert list((tmp_path / "cache").iterdir()) == []


def test_failing_metric_is_a_grading_error(tmp_path):
    task = make(tmp_path / "competition", BrokenGrading)
    with Executor([task], LIMITS, workers=1, cache_dir=tmp_path / "cache") as pool:
        with pytest.raises(GradingError, match="ZeroDivisionError: metric"):
            pool.submit(GOOD).result(60)
        assert pool.submit("def run():\n    1 / 0\n").result(60).outcome is Outcome.EXCEPTION


def test_close_cancels_waiting_programs_ends_running_ones_and_is_idempotent(task, tmp_path):
    others = worker_pids()
    pool = Executor([task], LIMITS, workers=1, cache_dir=tmp_path)
    running = pool.submit("import time\ntime.sleep(50)\n")
    assert wait_for(running.running, 30)
    waiting, dropped = pool.submit(GOOD), pool.submit(GOOD + "# dropped\n")
    assert dropped.cancel()
    began = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - began < 10
    assert waiting.cancelled()
    with pytest.raises(SandboxError, match="closed"):
        running.result(1)
    with pytest.raises(SandboxError, match="closed"):
        pool.submit(GOOD)
    assert worker_pids() == others


def test_settings_are_checked(task, tmp_path):
    with pytest.raises(ConfigError, match=r"backend.*'docker'"):
        Executor([task], LIMITS, cache_dir=tmp_path, backend="docker")
    with pytest.raises(ConfigError, match="allow_weaker"):
        Executor([task], LIMITS, cache_dir=tmp_path, backend="unsafe-subprocess")
    with pytest.raises(ConfigError, match="workers"):
        Executor([task], LIMITS, cache_dir=tmp_path, workers=-1)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=re.escape(str(tmp_path / "file" / "cache"))):
        Executor([task], LIMITS, cache_dir=tmp_path / "file" / "cache")


def test_describe_names_the_backend_and_what_is_weaker(task, pool, tmp_path):
    assert pool.describe().startswith("bubblewrap ")
    assert "memory" in pool.describe()
    assert "2 x 1 cores" in pool.describe()
    many = len(os.sched_getaffinity(0)) + 1
    limits = dataclasses.replace(LIMITS, cores=many, memory_bytes=1 << 50)
    with Executor([task], limits, cache_dir=tmp_path, backend="unsafe-subprocess", allow_weaker=True) as unsafe:
        assert "isolation" in unsafe.describe().lower()
        assert re.search(rf"\b{many}\b", unsafe.describe())
        assert f"{1 << 20:g} GiB" in unsafe.describe()
        assert unsafe.submit(GOOD).result(60).grade.score == GOOD_SCORE


MAIN = """
import os, sys, time
from pathlib import Path
with open(sys.argv[1], "a") as file:  # records each import of this script
    print("imported by", os.getpid(), file=file)
from tiny_competition import make
from discover_jax.execution import Executor, ResourceLimits
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    pool = Executor([make(folder / "competition")], ResourceLimits(seconds=60, cores=1), workers=1, cache_dir=folder / "cache")
    future = pool.submit("import os, time\\nif os.fork() == 0:\\n    os.setsid()\\nprint('x', flush=True)\\ntime.sleep(60)\\n")
    while not future.running():
        time.sleep(0.01)
    time.sleep(float(sys.argv[3]))
    print("running", flush=True)
    time.sleep(60)
"""


def descendants(pid: int) -> set[int]:
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    """Those that still run. Zombies do not."""
    found = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.add(pid)
        except OSError:
            continue
    return found


def commands(pids: set[int]) -> dict[int, bytes]:
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


@pytest.mark.parametrize("moment", [0.0, 4.0], ids=["while-warming", "while-running"])
def test_killed_main_process_leaves_nothing_running(tmp_path, moment):
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"}
    main = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "imports"), str(tmp_path), str(moment)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert main.stdout is not None
        assert main.stdout.readline() == "running\n"
        assert wait_for(lambda: any(b"bwrap" in command for command in commands(descendants(main.pid)).values()), 10)
        family = commands(alive(descendants(main.pid)))
    finally:
        main.kill()
        main.wait()
    assert wait_for(lambda: not alive(set(family)), 20), {pid: family[pid] for pid in alive(set(family))}
    assert (tmp_path / "imports").read_text() == f"imported by {main.pid}\n"  # workers do not import the main script, nor jax with it


@pytest.mark.skipif(not ordinary_user.possible(), reason="needs root and util-linux")
def test_ordinary_user_can_run_programs(tmp_path):
    """`make test-sandbox` runs the whole folder as an ordinary user."""
    program = (
        "import os, tempfile\nfrom pathlib import Path\nfrom tiny_competition import GOOD, make\n"
        f"from discover_jax.execution import Executor, ResourceLimits\nassert os.getuid() == {ordinary_user.UID}\n"
        "with tempfile.TemporaryDirectory() as name:\n  folder = Path(name)\n"
        "  with Executor([make(folder / 'c')], ResourceLimits(seconds=20, cores=1), workers=1, cache_dir=folder / 'cache') as pool:\n"
        "    print(pool.describe())\n    v = pool.submit(GOOD).result(60)\n    print(v.outcome, v.grade.score)\n"
    )
    environment = ordinary_user.environment("/nonexistent")
    environment["PYTHONPATH"] += f":{Path(__file__).parent}"
    command = ordinary_user.command([sys.executable, "-c", program])
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    assert re.search(r"\buid\b.*\bmemory\b", result.stdout)
    assert result.stdout.endswith("Outcome.OK 0.75\n")


def test_several_tasks_in_one_pool(tmp_path):
    """Each program sees only its own task's data and is graded by its answers. Cached verdicts are separate."""
    tasks = [make(tmp_path / name) for name in ("first", "second")]
    marked = tasks[1].public_dir / "train.csv"
    marked.write_text(marked.read_text().replace("x", "z", 1))
    tasks[1] = dataclasses.replace(tasks[1], fingerprint="tiny-2")
    program = GOOD.replace('frame["y"]', 'print(open("data/train.csv").readline())\n    frame["y"]')
    with Executor(tasks, LIMITS, workers=1, cache_dir=tmp_path / "cache") as pool:
        verdicts = [pool.submit(program, task).result(120) for task in (0, 1, 0, 1)]
    assert [verdict.execution.stdout.strip() for verdict in verdicts] == ["id,x,y", "id,z,y"] * 2
    assert [verdict.execution.cached for verdict in verdicts] == [False, False, True, True]
    assert {verdict.grade.score for verdict in verdicts} == {GOOD_SCORE}
    with pytest.raises(ConfigError, match="task"):
        Executor([], LIMITS, cache_dir=tmp_path / "cache")

"""Every way a program can end has its own outcome."""

import dataclasses
import os
import signal
import time

import pytest
from tiny_competition import GOOD, GOOD_SCORE, GOOD_WITH_PANDAS, PANDAS

from discover_jax.execution import ResourceLimits, sandbox
from discover_jax.types import Outcome

pytestmark = pytest.mark.sandbox


def test_good_program_is_graded(ask):
    verdict = ask(GOOD_WITH_PANDAS)
    assert verdict.outcome is Outcome.OK
    assert verdict.grade.score == GOOD_SCORE
    assert verdict.execution.result == b"id,y\n10,1\n11,0\n12,1\n13,0\n"
    assert verdict.execution.detail == ""
    assert 0 < verdict.execution.seconds < 60


def test_exception_names_the_programs_own_lines(ask):
    verdict = ask("import os\ndef helper(d):\n    return d['nope']\ndef run():\n    return helper(dict(a=[1]))\n")
    assert verdict.outcome is Outcome.EXCEPTION
    assert verdict.execution.detail == "line 5, in run: return helper(dict(a=[1]))\nline 3, in helper: return d['nope']\nKeyError: 'nope'"
    assert verdict.grade.valid is False
    assert verdict.grade.score is None
    assert "nope" in verdict.grade.reason


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("def run(:\n", "SyntaxError"),
        ("x = 1\n", "defines no function run()"),
        ("import sys\ndef run():\n    sys.exit(0)\n", "SystemExit: 0"),
        ("import os\ndef run():\n    os._exit(0)\n", "ended before run() returned"),
        ("import os\ndef run():\n    os._exit(3)\n", "exited with code 3"),
        ("def run():\n    return run()\n", "RecursionError"),
        ("\0", "null bytes"),
        ("def run():\n    raise ValueError('x' * 10**6)\n", "ValueError"),
    ],
)
def test_exceptions(pool, program, said):
    verdict = pool.submit(program).result(timeout=120)
    assert verdict.outcome is Outcome.EXCEPTION
    assert said in verdict.execution.detail
    assert len(verdict.execution.detail) <= 2000


LYING = """
import pandas as pd
class Lie(pd.DataFrame):
    def to_csv(self, *args, **kwargs):
        return "id,y\\n10,1\\n"
def run():
    return Lie({"a": [1]})
"""
UNPRINTABLE = """
import pandas as pd
class Bad:
    def __str__(self):
        raise OSError("no")
def run():
    return pd.DataFrame({"a": [Bad()]})
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("def run():\n    return {'id': [1]}\n", "returned dict, not a pandas.DataFrame"),
        (PANDAS + "def run():\n    return pd.DataFrame({'a': [1]})\n", "wrong columns"),
        (LYING, "returned Lie, not a pandas.DataFrame"),
        (UNPRINTABLE, "cannot be written as CSV"),
    ],
)
def test_invalid_submissions(pool, program, said):
    verdict = pool.submit(program).result(timeout=120)
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert said in verdict.grade.reason


def test_monkeypatched_pandas_does_not_change_the_score(spec, run_with, task):
    """With pandas preloaded, as in runs."""
    patched = "\nimport json\npd.DataFrame.to_csv = lambda *a, **k: open('x', 'w').write('id,y')\npd.read_csv = None\njson.dumps = None\n"
    program = GOOD_WITH_PANDAS.replace('pd.read_csv("data/sample_submission.csv")', "pd.DataFrame({'id': [10, 11, 12, 13]})") + patched
    execution = run_with(dataclasses.replace(spec, preload=("pandas",)), program)
    assert execution.outcome is Outcome.OK, execution
    assert task.grade(execution.result).score == GOOD_SCORE


FREES_A_CYCLE = (
    PANDAS
    + """
import gc, json, weakref
def run():
    held = {"preloaded": gc.get_freeze_count() > 10_000}
    class Node:
        pass
    node = Node()
    node.itself, ended = node, weakref.ref(node)
    del node
    kept = [[] for _ in range(10**5)]  # calls of ended() would hold the node while the collector runs
    held |= {"collects": gc.isenabled(), "freed": ended() is None}
    raise ValueError(json.dumps(held))
"""
)


def test_garbage_of_the_program_is_collected(spec, run_with):
    """Imports of preloaded packages run without the garbage collector, and it does not look at them later."""
    execution = run_with(dataclasses.replace(spec, preload=("pandas",)), FREES_A_CYCLE)
    assert '{"preloaded": true, "collects": true, "freed": true}' in execution.detail


def test_segmentation_fault_and_own_signals(ask):
    verdict = ask("import ctypes\ndef run():\n    ctypes.string_at(0)\n")
    assert (verdict.outcome, verdict.execution.detail) == (Outcome.KILLED, "the process died by SIGSEGV")
    verdict = ask("import os, signal\ndef run():\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert (verdict.outcome, verdict.execution.detail) == (Outcome.KILLED, "the process died by SIGKILL")


def test_too_large_results_from_the_harness_and_bypassing_it(ask):
    verdict = ask("import pandas as pd\ndef run():\n    return pd.DataFrame({'a': ['x' * 1000] * 2000})\n")
    assert verdict.outcome is Outcome.RESULT_TOO_BIG
    around = """
import os
def run():
    for fd in range(3, 64):
        try:
            while True:
                os.write(fd, b"x" * 65536)
        except OSError:
            pass
"""
    verdict = ask(around)
    assert verdict.outcome is Outcome.RESULT_TOO_BIG


RETURNS_100_MB = "import pandas as pd\ndef run():\n    return pd.DataFrame({'a': ['x' * 999] * 100_000})\n"
WRITES_100_MB = """
import os
def run():
    for fd in range(3, 64):
        try:
            for _ in range(100):
                os.write(fd, bytes(1_000_000))
        except OSError:
            pass
"""


@pytest.mark.parametrize("program", [RETURNS_100_MB, WRITES_100_MB], ids=["returned", "written"])
def test_result_of_100_megabytes_at_the_default_limit(spec, run_with, program):
    execution = run_with(spec, program, result_bytes=ResourceLimits().result_bytes)
    assert execution.outcome is Outcome.RESULT_TOO_BIG
    assert execution.result is None
    assert str(8 << 20) in execution.detail


def test_large_submission_within_its_limit(spec, run_with):
    """Copies of it for each part that passes through a pipe would take minutes."""
    program = "import pandas as pd\ndef run():\n    return pd.DataFrame({'a': ['x' * 999] * 40_000})\n"
    execution = run_with(spec, program, result_bytes=64 << 20, memory_bytes=1 << 30)
    assert execution.outcome is Outcome.OK, execution.detail
    assert execution.result is not None
    assert len(execution.result) == 2 + 40_000 * 1000
    assert execution.seconds < 10.0


def test_output_flood_is_ended(ask):
    verdict = ask("def run():\n    while True:\n        print('flood' * 1000)\n")
    assert verdict.outcome is Outcome.OUTPUT_FLOOD
    assert len(verdict.execution.stdout) < 9000


def test_stdout_keeps_head_and_tail(ask):
    program = "import sys\nprint('first')\nfor i in range(20000):\n    print(i)\nprint('last', file=sys.stderr)\n"
    verdict = ask(program + GOOD)
    assert verdict.outcome is Outcome.OK
    stdout = verdict.execution.stdout
    assert stdout.startswith("first\n0\n1\n")
    assert stdout.endswith("19999\nlast\n")
    assert "bytes left out" in stdout
    assert len(stdout) < 9000


def test_memory_hog_anonymous_and_files(ask):
    verdict = ask("def run():\n    hold = []\n    while True:\n        hold.append(bytearray(b'x') * 50_000_000)\n")
    assert verdict.outcome is Outcome.OUT_OF_MEMORY


def test_files_in_memory_count_as_memory(spec, run_with):
    """The scratch folder is larger than the program's memory, so the control group, if there is one, ends the program first."""
    fill = "with open('big', 'wb') as f:\n    for _ in range(1500):\n        f.write(b'x' * (1 << 20))\nraise RuntimeError('all written')\n"
    execution = run_with(spec, fill, scratch_bytes=1 << 31)
    assert (execution.outcome, execution.detail) == (Outcome.OUT_OF_MEMORY, "it used more than 0.88 GiB of memory")


def test_memory_without_a_control_group(spec, run_with):
    """Best effort: the address space bounds one process, and the sum of several is sampled."""
    weaker = dataclasses.replace(spec, cgroups=None)
    limit = 5 << 28  # 1.25 GiB
    alone = run_with(weaker, f"def run():\n    return bytearray({limit})\n", memory_bytes=limit)
    assert alone.outcome is Outcome.OUT_OF_MEMORY
    several = (
        "import os, time\ndef run():\n    for _ in range(6):\n        if os.fork() == 0:\n            hold = b'x' * 300_000_000\n"
        "            time.sleep(60)\n    time.sleep(60)\n"
    )
    together = run_with(weaker, several, memory_bytes=limit)
    assert together.outcome is Outcome.OUT_OF_MEMORY
    files = "import time\nwith open('big', 'wb') as f:\n    for _ in range(1300):\n        f.write(b'x' * (1 << 20))\ntime.sleep(60)\n"
    in_files = run_with(weaker, files, memory_bytes=limit, scratch_bytes=1 << 31)
    assert in_files.outcome is Outcome.OUT_OF_MEMORY


def test_timeout_ends_daemons_that_ignore_signals(spec, beside):
    program = """
import os, signal, time
def run():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.01)
        os._exit(0)
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""
    limits = dataclasses.replace(spec.limits, seconds=1.0)
    with beside():
        box = sandbox.start(dataclasses.replace(spec, limits=limits))
        try:
            box.wait_ready()
            namespace = os.open(f"/proc/{box.pid}/ns/pid", os.O_RDONLY)  # while it is open, its number is not reused
            began = time.monotonic()
            execution = box.run(program)
            assert execution.outcome is Outcome.TIMEOUT
            assert execution.stdout == "ready\n"
            assert 1.0 <= time.monotonic() - began < 4.0
        finally:
            box.close()
    inside = os.fstat(namespace).st_ino
    left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _namespace(pid) == inside]
    os.close(namespace)
    assert left == []


def _namespace(pid: str) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None


def test_orphan_with_open_pipes_does_not_delay_the_run(spec, run_with):
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n    os._exit(0)\n" + GOOD
    began = time.monotonic()
    execution = run_with(spec, program)
    assert execution.outcome is Outcome.OK
    assert time.monotonic() - began < 40  # the orphan sleeps for 60


def test_forged_replies_are_still_graded(ask):
    """A program can write to the reply's descriptor itself. It can only claim a submission, which is then graded."""

    def forging(answer: bytes) -> str:
        return (
            f"import os\ndef run():\n    for fd in range(3, 64):\n        try:\n            os.write(fd, {answer!r})\n"
            "        except OSError:\n            pass\n    os._exit(0)\n"
        )

    assert ask(forging(b"sandbox_error - 0\n")).outcome is Outcome.EXCEPTION
    assert ask(forging(b"ok - 0\n")).outcome is Outcome.EXCEPTION
    assert ask(forging(b"csv - 999\nid,y\n")).outcome is Outcome.EXCEPTION
    assert ask(forging(b"csv - 3\nid\n")).outcome is Outcome.INVALID_SUBMISSION
    text = b"id,y\n10,1\n11,0\n12,1\n13,1\n"
    verdict = ask(forging(b"csv - %d\n%s" % (len(text), text)))
    assert (verdict.outcome, verdict.grade.score) == (Outcome.OK, 1.0)


def test_main_block_of_a_program_does_not_run(ask):
    verdict = ask(GOOD + "\nif __name__ == '__main__':\n    raise SystemExit('ran twice')\n")
    assert verdict.outcome is Outcome.OK


def test_processes_and_threads_of_the_packages_work(full_spec, task, run_with):
    program = """
def double(x):
    return 2 * x
def run():  # imports are inside, since spawned processes import this module
    import joblib, multiprocessing, numpy as np, pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier
    from xgboost import XGBClassifier
    assert joblib.Parallel(n_jobs=2)(joblib.delayed(double)(i) for i in range(3)) == [0, 2, 4]
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        assert workers.map(double, [1, 2]) == [2, 4]
    x = np.arange(40.0).reshape(-1, 1); y = (x[:, 0] > 20).astype(int)
    for model in (HistGradientBoostingClassifier(max_iter=3, min_samples_leaf=2), XGBClassifier(n_estimators=3)):
        assert model.fit(x, y).predict(x).tolist() == y.tolist()
    frame = pd.read_csv("data/sample_submission.csv"); frame["y"] = [1, 0, 1, 1]
    return frame
"""
    execution = run_with(full_spec, program)
    assert execution.outcome is Outcome.OK, (execution.detail, execution.stdout)
    assert task.grade(execution.result or b"").score == 1.0


def test_unsafe_backend_names_the_same_outcomes(spec, run_with):
    unsafe = dataclasses.replace(spec, backend="unsafe-subprocess", host=None)
    assert run_with(unsafe, GOOD).outcome is Outcome.OK
    assert run_with(unsafe, "def run():\n    1 / 0\n").outcome is Outcome.EXCEPTION
    assert run_with(unsafe, "import time\ntime.sleep(60)\n", seconds=0.5).outcome is Outcome.TIMEOUT
    killed = run_with(unsafe, f"import os\nos.kill(os.getpid(), {int(signal.SIGABRT)})\n")
    assert (killed.outcome, killed.detail) == (Outcome.KILLED, "the process died by SIGABRT")

"""Calls of a program's functions, and attacks on them and on the checks, through the real launch path."""

import contextlib
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
from tiny_problem import HIDDEN, Echo, Forgetful, Naive, Paused, Squares, Sums

from discover_jax.exceptions import GradingError, SandboxError
from discover_jax.execution import Executor, memory, sandbox_spec, values
from discover_jax.execution.backend import Call, End
from discover_jax.execution.children import EndedError, HungError
from discover_jax.execution.evaluating import Evaluators
from discover_jax.execution.limits import MIB, ResourceLimits
from discover_jax.types import Answer, Outcome, Verdict

pytestmark = pytest.mark.sandbox

LIMITS = ResourceLimits(seconds=20.0, cores=1, memory_bytes=400 * MIB, result_bytes=MIB, stdout_bytes=4096)
RIGHT = "def square(x):\n    return x * x\n"
PRELOADED = "wave"
"""A module for sandboxes of competitions that nothing else imports."""
SQUARES, FRESH, NAIVE, HIDING, POSITIVE, SUMS, ECHO, PAUSED = range(8)
# Finds the harness, its channel and the key of the request that it serves.
INSIDE = """\
import json, os, sys, threading, time
channel = json.loads(sys.argv[1])["result_fd"]
main = sys.modules["__main__"]
keys = []
request = main._Calls.request
def spy(self, frame):
    key, name = request(self, frame)
    keys.append(key)
    return key, name
main._Calls.request = spy
"""


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    public = folder / "public"
    public.mkdir()
    (public / "problem.md").write_text("square(x)")
    for path in (folder, public):
        path.chmod(0o755)
    tasks = [Squares(public), Squares(public, "fresh", fresh=True), Naive(public), Squares(public, "hiding", hidden_inputs=True)]
    tasks += [Naive(public, "positive", least_score=0.0), Sums(public, "sums"), Echo(public), Paused(public)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_spec, "PRELOAD", (PRELOADED,))
        with Executor(tasks, LIMITS, workers=1, cache_dir=folder / "cache") as executor:
            yield executor
            assert executor.submit(f"{RIGHT}# after all tests\n").result(timeout=120).grade.score == 2.0


def verdict_on(executor: Executor, program: str, task: int = SQUARES) -> Verdict:
    """The verdict on a program. Afterwards, a right program still has its score."""
    verdict = executor.submit(program, task).result(timeout=120)
    after = executor.submit(f"{RIGHT}# after {hash(program)} {task}\n").result(timeout=120)
    assert (after.outcome, after.grade.score) == (Outcome.OK, 2.0)
    return verdict


def test_a_right_program_has_score_feedback_metrics_and_value(executor):
    verdict = executor.submit("print('loaded')\n" + RIGHT).result()
    grade, execution = verdict.grade, verdict.execution
    assert (verdict.outcome, grade.valid, grade.score, grade.feedback) == (Outcome.OK, True, 2.0, "all right")
    assert values.decode(execution.result) == HIDDEN[-1] ** 2
    assert execution.stdout == "loaded\n"
    assert 0 < grade.metrics["wall"] < execution.seconds
    assert grade.metrics["cpu"] < 1.0
    again = executor.submit("print('loaded')\n" + RIGHT).result()
    assert again == dataclasses.replace(verdict, execution=dataclasses.replace(execution, cached=True))


def test_time_is_measured_outside(executor):
    busy = "import time\ntime.time = time.perf_counter = time.process_time = lambda: 0.0\n"
    busy += "def square(x):\n    sum(i * i for i in range(2_000_000))\n    return x * x\n"
    metrics = executor.submit(busy).result().grade.metrics
    assert metrics["wall"] > 0.1
    assert metrics["cpu"] > 0.1


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("def square(x):\n    return x + x\n", Outcome.INVALID_SUBMISSION, "square(3.0) is not 6.0"),
        ("def cube(x):\n    return x\n", Outcome.EXCEPTION, "defines no function square()"),
        ("1 / 0", Outcome.EXCEPTION, "ZeroDivisionError"),
        ("def square(x):\n    return (lambda: x * x)\n", Outcome.INVALID_SUBMISSION, "an object of type function"),
        ("def square(x):\n    raise SystemExit\n", Outcome.EXCEPTION, "SystemExit"),
        ("def square(x):\n    while True: pass\n", Outcome.TIMEOUT, "did not end within 3 s"),
        ("def square(x):\n    return bytearray(10**9)\n", Outcome.OUT_OF_MEMORY, ""),
        ("import numpy\ndef square(x):\n    return numpy.zeros(10**6)\n", Outcome.RESULT_TOO_BIG, "1,048,576 bytes"),
        ("import os\ndef square(x):\n    os.kill(os.getpid(), 11)\n", Outcome.KILLED, "SIGSEGV"),
    ],
    ids=["wrong", "missing", "load", "type", "exit", "time", "memory", "size", "signal"],
)
def test_failures_have_their_outcome_and_reason(executor, program, outcome, reason):
    verdict = executor.submit(program).result(timeout=120)
    assert verdict.outcome is outcome
    assert reason in (verdict.execution.detail or verdict.grade.reason)
    assert not verdict.grade.valid
    assert verdict.grade.score is None


# Each attack, and the outcomes that it may have.
ATTACKS = {
    "answers before it is asked": (
        INSIDE + "os.write(channel, b'value - 4\\n9.0\\n')\n" + RIGHT,
        {Outcome.EXCEPTION},
    ),
    "answers the next call beforehand": (
        INSIDE + "def square(x):\n    os.write(channel, b'value %s 4\\n9.0\\n' % keys[0].encode())\n    return 25.0\n",
        {Outcome.EXCEPTION},
    ),
    "repeats an earlier answer": (
        INSIDE + "old = []\nreal = os.write\n"
        "def square(x):\n"
        "    if old:\n        real(channel, b'value %s 4\\n9.0\\n' % old[0].encode()); time.sleep(60)\n"
        "    old.append(keys[-1])\n    return x * x\n",
        {Outcome.EXCEPTION},
    ),
    "hangs in the middle of its answer": (
        INSIDE + "def square(x):\n    os.write(channel, b'value %s 100\\n9' % keys[-1].encode()); time.sleep(60)\n",
        {Outcome.TIMEOUT},
    ),
    "claims a huge length": (
        INSIDE + "def square(x):\n    os.write(channel, b'value %s 999999999999\\n' % keys[-1].encode())\n"
        "    while True: os.write(channel, b'0' * 65536)\n",
        {Outcome.RESULT_TOO_BIG},
    ),
    "writes noise on the channel": (
        INSIDE + "def square(x):\n    os.write(channel, bytes(range(256)) * 4); time.sleep(60)\n",
        {Outcome.EXCEPTION},
    ),
    "adds bytes to its answer": (
        INSIDE + "def square(x):\n    os.write(channel, b'value %s 4\\n9.0\\n9.0' % keys[-1].encode()); time.sleep(60)\n",
        {Outcome.EXCEPTION},
    ),
    "closes the channel": (INSIDE + "def square(x):\n    os.close(channel); time.sleep(60)\n", {Outcome.TIMEOUT, Outcome.EXCEPTION}),
    "sends a pickle as an array": (
        INSIDE + "import numpy, io\nclass Evil:\n    def __reduce__(self): return (os.system, ('touch /tmp/evil',))\n"
        "def square(x):\n"
        "    file = io.BytesIO(); numpy.save(file, numpy.array([Evil()], object), allow_pickle=True)\n"
        "    data = b'{\"array\":0}\\n' + file.getvalue()\n"
        "    os.write(channel, b'value %s %d\\n' % (keys[-1].encode(), len(data)) + data); time.sleep(60)\n",
        {Outcome.INVALID_SUBMISSION},
    ),
    "sends an array that claims 10^12 elements": (
        INSIDE + "def square(x):\n"
        "    header = b\"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\".ljust(117) + b'\\n'\n"
        "    data = b'{\"array\":0}\\n\\x93NUMPY\\x01\\x00' + len(header).to_bytes(2, 'little') + header\n"
        "    os.write(channel, b'value %s %d\\n' % (keys[-1].encode(), len(data)) + data); time.sleep(60)\n",
        {Outcome.INVALID_SUBMISSION},
    ),
    "sends JSON nested 100,000 deep": (
        INSIDE + "def square(x):\n"
        "    data = b'[' * 100000 + b']' * 100000 + b'\\n'\n"
        "    os.write(channel, b'value %s %d\\n' % (keys[-1].encode(), len(data)))\n"
        "    for i in range(0, len(data), 1000): os.write(channel, data[i:i + 1000])\n"
        "    time.sleep(60)\n",
        {Outcome.INVALID_SUBMISSION},
    ),
    "grows between calls": (
        (
            "import threading, time\nkept = []\ndef grow():\n    time.sleep(0.02)\n    while True: kept.append(bytearray(10**7))\n"
            "def square(x):\n    if x == 3.0: threading.Thread(target=grow, daemon=True).start()\n    else: time.sleep(2)\n"
            "    return x * x\n"
        ),
        {Outcome.OUT_OF_MEMORY},
    ),
    "ends between calls": (
        (
            "import os, threading, time\n"
            "def square(x):\n    threading.Timer(0.05, os._exit, (0,)).start()\n    if x != 3.0: time.sleep(2)\n    return x * x\n"
        ),
        {Outcome.EXCEPTION},
    ),
    "does not read its arguments": (
        (
            "import os\nfor fd in range(3, 32):\n    try: os.set_blocking(fd, True); import fcntl; fcntl.fcntl(fd, fcntl.F_GETFL)\n"
            "    except OSError: pass\ndef square(x):\n    os.dup2(os.open('/dev/null', os.O_RDONLY), 3); return 0.0\n"
        ),
        {Outcome.INVALID_SUBMISSION, Outcome.EXCEPTION, Outcome.TIMEOUT},
    ),
    "returns a float that lies": (
        (
            "class Nine(float):\n    def __float__(self): return 9.0\n    __repr__ = lambda self: '9.0'\n"
            "    __eq__ = lambda self, other: True\n"
            "    __hash__ = float.__hash__\ndef square(x):\n    return Nine(1.0)\n"
        ),
        {Outcome.INVALID_SUBMISSION},
    ),
    "floods the output": (
        "import sys\ndef square(x):\n    while True: sys.stdout.write('x' * 65536)\n",
        {Outcome.TIMEOUT, Outcome.OUTPUT_FLOOD},
    ),
    "looks for the arguments of later calls": (
        (
            "import sys\nhidden = '5' + '.0'\n"
            "def square(x):\n"
            "    frame, texts = sys._getframe(1), [open('/proc/self/cmdline').read(), open('/proc/self/environ').read()]\n"
            "    while frame: texts.append(repr(frame.f_locals)); frame = frame.f_back\n"
            "    return 1.0 if x == 3.0 and hidden in ''.join(texts) else x * x\n"
        ),
        {Outcome.OK},
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_calls_have_no_score(executor, name):
    program, outcomes = ATTACKS[name]
    verdict = verdict_on(executor, program)
    assert verdict.outcome in outcomes, verdict
    assert verdict.grade.valid == (verdict.outcome is Outcome.OK)


# Attacks on the time of a call. Each program is right; the test looks at its times. It computes for about 0.2 s of CPU time.
COMPUTE = "def compute():\n    end = time.process_time() + 0.2\n    while time.process_time() < end: pass\n"
BETWEEN_CALLS = (
    "import threading, time\n"
    + COMPUTE
    + "def square(x):\n    if x == 3.0: threading.Thread(target=compute, daemon=True).start()\n    return x * x\n"
)
DISOWNED_CHILD = (
    "import os, signal, time\n"
    + COMPUTE
    + "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"  # the kernel then adds a child's time to nobody's
    "def square(x):\n"
    "    reader, writer = os.pipe()\n"
    "    if x == 5.0 and os.fork() == 0:\n"
    "        compute(); os._exit(0)\n"
    "    os.close(writer); os.read(reader, 1); time.sleep(0.05)\n"
    "    return x * x\n"
)
READS_AHEAD = """\
import os, select, stat, threading, time
pipes = [fd for fd in range(32) if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISFIFO(os.fstat(fd).st_mode)]
seen = []
def look():
    time.sleep(0.3)
    seen.extend(select.select(pipes, [], [], 0)[0])
def square(x):
    if x == 3.0: threading.Thread(target=look, daemon=True).start()
    return x * x if not seen else 0.0
"""


def test_work_between_calls_counts_for_the_next_call(executor):
    metrics = executor.submit(BETWEEN_CALLS, PAUSED).result().grade.metrics
    assert metrics["cpu"] > 0.1  # a busy machine may leave it only a tenth of a core
    assert executor.submit(RIGHT, PAUSED).result().grade.metrics["cpu"] < 0.1


@pytest.mark.skipif(memory.find_cgroups() is None, reason="without a control group, CPU times are lower bounds")
def test_cpu_time_has_that_of_children_that_are_disowned(executor):
    metrics = executor.submit(DISOWNED_CHILD, PAUSED).result().grade.metrics
    assert metrics["cpu"] > 0.1  # a busy machine may leave it only a tenth of a core


def test_arguments_are_not_in_the_sandbox_before_the_clock_starts(executor):
    """A thread looks for them during the pause before the call."""
    verdict = executor.submit(READS_AHEAD, PAUSED).result()
    assert verdict.outcome is Outcome.OK, verdict


def test_busy_processes_and_threads_do_not_outlive_the_check(executor):
    """Otherwise they could disturb the times of the next programs. They leave their session, ignore signals and are orphans."""
    busy = (
        "import ctypes, os, signal, threading\n"
        "def spin():\n    while True: pass\n"
        "def square(x):\n"
        "    for _ in range(3):\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            if os.fork(): os._exit(0)\n"
        "            for number in set(range(1, 32)) - {9, 19}: signal.signal(number, signal.SIG_IGN)\n"
        "            ctypes.CDLL(None).prctl(15, b'lingering')\n"  # PR_SET_NAME
        "            threading.Thread(target=spin).start(); spin()\n"
        "    return x * x\n"
    )
    verdict = executor.submit(busy, PAUSED).result()
    assert verdict.outcome is Outcome.OK, verdict
    assert verdict.grade.metrics["cpu"] > 0.15
    assert "lingering" not in names_of_processes()


def names_of_processes() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            names.add(path.read_text().strip())
    return names


def test_state_is_kept_between_calls_unless_they_are_fresh(executor):
    counting = "seen = []\ndef square(x):\n    seen.append(x)\n    return x * x if len(seen) == 1 else 0.0\n"
    kept = executor.submit(counting, SQUARES).result()
    assert kept.outcome is Outcome.INVALID_SUBMISSION
    fresh = executor.submit(counting, FRESH).result()
    assert (fresh.outcome, fresh.grade.score) == (Outcome.OK, 2.0)


def test_sandboxes_of_problems_preload_neither_pandas_nor_the_packages_for_tables(executor):
    """Their imports would take most of the time of a fresh call."""
    program = (
        "import sys\nloaded = set(sys.modules)\n" + f"def square(x):\n    return 0.0 if loaded & {{{PRELOADED!r}, 'pandas'}} else x * x\n"
    )
    verdict = executor.submit(program, FRESH).result()
    assert verdict.outcome is Outcome.OK, verdict


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("'hang'", "took longer than 2 s"),
        ("'crash'", "the process that checks the solution ended"),
        ("{'bytes': 10**11}", "more than 1 GiB of memory"),
        ("{'bytes': -1}", "ValueError"),
        ("float('nan')", "the score is nan"),
        ("float('inf')", "the score is inf"),
        ("10**400", "OverflowError"),
        ("None", "the score is of type NoneType"),
        ("True", "the score is of type bool"),
        ("'1.0'", "the score is of type str"),
        ("__import__('numpy').array(1 + 2j)", "the score is of type ndarray"),
        ("'\\ud800'", "the score is of type str"),
    ],
)
def test_values_that_break_a_check_are_rejected(executor, value, reason):
    verdict = verdict_on(executor, f"def run():\n    return {value}\n", NAIVE)
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert reason in verdict.grade.reason


def test_program_that_never_ends_uses_its_time_once(executor):
    verdict = executor.submit("import time\ntime.sleep(60)\n", NAIVE).result(timeout=120)
    assert (verdict.outcome, verdict.execution.detail) == (Outcome.TIMEOUT, "its calls took longer than 20 s in all")


def test_metrics_that_are_not_finite_are_left_out(executor):
    grade = executor.submit("def run():\n    return [1.0, float('nan'), float('inf'), 2]\n", NAIVE).result().grade
    assert (grade.valid, grade.metrics) == (True, {"0": 1.0, "3": 2.0})
    assert len(executor.submit("def run():\n    return [1.0] * 1000\n", NAIVE).result().grade.metrics) == 32


# Clears a terminal, in both forms of the sequence; ends a line; cannot be encoded; deletes.
CONTROLS = "a\x1b[2J\x9b2J\x00\rb\r\n\tc\x07\ud800\x7f"
SHOWN = "\tc\ufffd\ufffd\ufffd"
"""The end of what is left of it. tests/test_untrusted_text.py has the rest."""


def test_control_characters_reach_no_text_of_a_verdict(executor):
    """Neither printed nor returned nor raised ones."""
    say = f"said = {CONTROLS!r}\nprint(said.replace(chr(0xd800), chr(1)))\ndef run():\n    "
    grade, execution = (verdict := executor.submit(say + "return said\n", ECHO).result()).grade, verdict.execution
    assert verdict.outcome is Outcome.OK
    ((name, value),) = grade.metrics.items()
    assert value == 1.0
    rejected = executor.submit(say + "return [said]\n", ECHO).result()
    assert rejected.outcome is Outcome.INVALID_SUBMISSION
    texts = [execution.stdout, grade.feedback, name, rejected.grade.reason]
    assert all(SHOWN.strip() in text for text in texts)
    for raising in ("raise ValueError(said)", "raise type(said.replace(chr(0), '').replace(chr(0xd800), ''), (Exception,), {})"):
        raised = executor.submit(say + raising + "\n", ECHO).result()
        assert raised.outcome is Outcome.EXCEPTION
        texts += [raised.execution.detail, raised.grade.reason]
    assert not any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text) for text in texts)


def test_score_without_a_reward_is_rejected(executor):
    verdict = executor.submit("def run():\n    return -1.0\n", POSITIVE).result()
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert "below 0.0" in verdict.grade.reason


def test_output_and_long_errors_are_not_kept_where_inputs_are_hidden(executor):
    telling = "def square(x):\n    print('input', x)\n    return x * x\n"
    assert "input 3.0" in executor.submit(telling, SQUARES).result().execution.stdout
    verdict = executor.submit(telling, HIDING).result()
    assert (verdict.outcome, verdict.execution.stdout) == (Outcome.OK, "")
    verdict = executor.submit("def square(x):\n    raise ValueError('a' * 500 + str(x) + 'b' * 300)\n", HIDING).result()
    assert len(verdict.execution.detail) <= 200
    assert "3.0" not in verdict.execution.detail


class FaultySlot:
    """Answers each call with a number; fails at the call with the number `fails_at`."""

    def __init__(self, number: float, fails_at: int = -1, error: SandboxError | None = None):
        self.number, self.calls, self.fails_at, self.error = number, 0, fails_at, error or SandboxError("the host failed")

    def ask(self, request):
        if isinstance(request, End):
            return ""
        if isinstance(request, Call):
            self.calls += 1
            if self.calls == self.fails_at:
                raise self.error
            return Answer(Outcome.OK, values.encode(self.number, 1000), "", 0.0, 0.0)
        return Answer(Outcome.OK, values.encode(None, 1000), "", 0.0, 0.0)


@pytest.fixture
def evaluators(tmp_path):
    evaluators = Evaluators(pickle.dumps([Sums(tmp_path)]), slots=1, program_seconds=20.0, start_seconds=60.0)
    yield lambda slot: evaluators.verdict(0, Sums(tmp_path), "", slot)
    evaluators.close()
    evaluators.release()


@pytest.mark.parametrize(("number", "said"), [(-1.0, "returned NoneType"), (0.0, "seconds = 0.0")])
def test_faults_of_evaluate_end_the_run_only_before_it_has_accepted_a_solution(tmp_path, number, said):
    """A later solution may provoke them, since `evaluate` works for others."""
    task = Forgetful(tmp_path)
    evaluators = Evaluators(pickle.dumps([task]), slots=1, program_seconds=20.0, start_seconds=60.0)
    try:
        with pytest.raises(GradingError, match=said):
            evaluators.verdict(0, task, "", FaultySlot(number))
        assert evaluators.verdict(0, task, "", FaultySlot(2.0)).grade.score == 2.0
        verdict = evaluators.verdict(0, task, "", FaultySlot(number))
        assert verdict.outcome is Outcome.INVALID_SUBMISSION
        assert said in verdict.grade.reason
        assert evaluators.verdict(0, task, "", FaultySlot(3.0)).grade.score == 3.0
    finally:
        evaluators.close()
        evaluators.release()


@pytest.mark.parametrize("error", [SandboxError("the host failed"), HungError("a worker hung"), EndedError("a worker ended")], ids=repr)
def test_a_host_fault_in_one_check_is_no_verdict_and_changes_no_other(evaluators, error):
    """`Sums` goes on after every error, as a careless check may."""
    assert evaluators(FaultySlot(1.0)).grade.score == 3.0
    with pytest.raises(SandboxError, match=str(error)):
        evaluators(FaultySlot(1000.0, 2, error))
    assert evaluators(FaultySlot(2.0)).grade.score == 6.0


def test_a_check_that_cannot_read_an_answer_ends_without_reading_on(evaluators):
    """What follows in the stream could be bytes of a program."""
    slot = FaultySlot(1.0)
    ask = slot.ask
    slot.ask = lambda request: Unreadable(Outcome.OK, b"1", "", 0.0, 0.0) if isinstance(request, Call) else ask(request)
    verdict = evaluators(slot)
    assert verdict.outcome is Outcome.INVALID_SUBMISSION
    assert "ended" in verdict.grade.reason
    assert evaluators(FaultySlot(2.0)).grade.score == 6.0


class Unreadable(Answer):
    """An answer that cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)

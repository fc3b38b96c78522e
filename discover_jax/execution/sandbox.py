"""One sandbox in use: warm up, run one program or call its functions, end. Also maps its end to an outcome.

All data from the sandbox are untrusted: the output is read and truncated, and answers are limited and parsed by `claims`.
"""

import contextlib
import os
import secrets
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, claims
from discover_jax.execution.claims import DETAIL_CHARACTERS, HEADER_BYTES, Claim, Expected
from discover_jax.execution.harness import PREPARE
from discover_jax.execution.limits import GIB, MIB
from discover_jax.execution.output import HeadAndTail, normalised, without_host_paths
from discover_jax.execution.quarantine import Survivor
from discover_jax.execution.sandbox_process import END_SECONDS, SandboxProcess
from discover_jax.execution.sandbox_spec import SandboxSpec
from discover_jax.types import PARENT_OUTPUT, Answer, Execution, Outcome

_WARM_SECONDS = 180.0  # imports take 2 s, but much longer on a cold disk or a busy machine
_MOST_READS = 16  # of what a pipe still holds: at most 1 MiB
_TICK_SECONDS = 0.1
_PIPE_BYTES = 1 << 16
_REQUEST_BYTES = 64 * MIB
SLOW_END = f"its processes did not end within {END_SECONDS:.0f} s of being killed"
"""Detail of a program that has no other end."""


def _encoded(value: list) -> bytes:
    from discover_jax.execution import values  # imports numpy, which a slot needs only for calls

    return values.encode(value, _REQUEST_BYTES)


class Sandbox:
    """One sandbox. Call `wait_ready`; then `run` once, or `load` once and `call` repeatedly, then `end`; then `close`.

    `close` may be called at any time and repeatedly. A program's end does not depend on how long its processes need to die: see `survivor`.
    """

    def __init__(self, spec: SandboxSpec, script: Path, options: dict, beside: Sequence[Path] = ()) -> None:
        """Starts `script options` in a sandbox without waiting for it.

        Args:
          spec: how to create it.
          script: Python file to run inside.
          options: its argument as JSON values; `result_fd` and `rlimits` are added.
          beside: further files, which lie in the same folder as the script.

        Raises:
          SandboxError: it cannot be started.
        """
        self._spec = spec
        self._process = SandboxProcess(spec, script, options, beside)
        self._output = HeadAndTail(spec.limits.stdout_bytes)
        self._answer = bytearray()
        self._outgoing = bytearray()
        self._ended_early: Claim | None = None
        self._cpu_counted = 0.0

    def _read_output(self) -> bool:
        """Reads the output so far; False at the end of the stream."""
        return self._drain(self._process.output_reader, self._output.add)

    def _read_answer(self) -> bool:
        return self._drain(self._process.answer_reader, self._answer.extend)

    @staticmethod
    def _drain(descriptor: int, take) -> bool:
        try:
            data = os.read(descriptor, 1 << 18)
        except BlockingIOError:
            return True
        take(data)
        return bool(data)

    def _failed(self, what: str) -> SandboxError:
        self._read_rest_of_output()
        said = self._output.text().strip()
        return SandboxError(f"A sandbox failed: {what}." + (f" Its output: {said[-1500:]}" if said else ""))

    def _read_rest_of_output(self) -> None:
        """Reads what the pipe holds, but not all that a process may still write."""
        for _ in range(_MOST_READS):
            before = self._output.total
            self._read_output()
            if self._output.total == before:
                break

    def wait_ready(self) -> None:
        """Waits until the imports inside are done.

        Raises:
          SandboxError: it ended before, sent something else, or took too long.
        """
        deadline = time.monotonic() + _WARM_SECONDS
        while not self._answer.endswith(b"\n"):
            poll = select.poll()
            for descriptor in (self._process.answer_reader, self._process.output_reader, self._process.exit):
                poll.register(descriptor, select.POLLIN)
            events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not events:
                raise self._failed(f"it was not ready within {_WARM_SECONDS:.0f} s")
            if self._process.output_reader in events:
                self._read_output()
            if self._process.answer_reader in events:
                self._read_answer()
            if self._process.exit in events and not self._answer.endswith(b"\n"):
                raise self._failed("it ended before it was ready")
        if self._answer != b"ready\n":
            raise self._failed(f"it sent {bytes(self._answer[:80])!r} instead of b'ready\\n'")
        self._answer.clear()
        self._output = HeadAndTail(self._spec.limits.stdout_bytes)
        if self._spec.backend == "bubblewrap" and not self._process.find_child(END_SECONDS):
            raise self._failed("bubblewrap did not report its child's pid")

    @property
    def pid(self) -> int:
        """Host pid of pid 1 inside (for the unsafe backend, of its only process); known once the sandbox is ready."""
        return self._process.pid

    def _watch(self, deadline: float, seconds: float, *, until: Callable[[], bool] = lambda: False) -> Claim | None:
        """Writes what is outgoing and reads until the program ends or `until` holds (None), or it must be killed.

        Args:
          deadline: on the monotonic clock.
          seconds: the limit that ends there, for the detail.
        """
        limits = self._spec.limits
        poll = select.poll()
        for descriptor in (self._process.answer_reader, self._process.output_reader, self._process.exit):
            poll.register(descriptor, select.POLLIN)
        if self._outgoing:
            poll.register(self._process.program_writer, select.POLLOUT)
        next_look = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= deadline:
                return Outcome.TIMEOUT, None, f"it did not end within {seconds:g} s"
            if now >= next_look:
                next_look = now + _TICK_SECONDS
                if self._process.over_memory():
                    return Outcome.OUT_OF_MEMORY, None, self._memory_detail()
            events = dict(poll.poll(min(deadline - now, next_look - now) * 1000 + 1))
            if self._process.program_writer in events and not self._write_or_drop():
                poll.unregister(self._process.program_writer)
            if self._process.output_reader in events and not self._read_output():
                poll.unregister(self._process.output_reader)
            if self._process.answer_reader in events and not self._read_answer():
                poll.unregister(self._process.answer_reader)
            if self._output.total > limits.flood_bytes:
                return Outcome.OUTPUT_FLOOD, None, f"it printed more than {limits.flood_bytes} bytes"
            if len(self._answer) > limits.result_bytes + HEADER_BYTES:
                return claims.too_long(limits.result_bytes)
            if until():
                return None
            if self._process.exit in events and not (events.keys() & {self._process.output_reader, self._process.answer_reader}):
                return None  # it has ended, and nothing is left to read

    def _write_or_drop(self) -> bool:
        """`_write_outgoing` for a program that has started: it may end, or close its end."""
        try:
            return self._write_outgoing()
        except BrokenPipeError:
            self._outgoing.clear()
            return False

    def _send(self, data: bytes) -> None:
        """Adds a frame to what is outgoing."""
        self._outgoing += b"%d\n%s" % (len(data), data)

    def _write_outgoing(self) -> bool:
        """Writes a part; whether something is left. Raises BrokenPipeError if nobody reads any more."""
        with contextlib.suppress(BlockingIOError):
            del self._outgoing[: os.write(self._process.program_writer, self._outgoing[:_PIPE_BYTES])]
        return bool(self._outgoing)

    def _send_program(self, program: str, parent_output: bytes | None = None) -> None:
        """Writes the program, which does not start before all of it has been read.

        Args:
          parent_output: see `load`; None for a program that is run.

        Raises:
          SandboxError: the sandbox ended before.
        """
        self._send(program.encode("utf-8", "replace"))
        if parent_output is not None:
            self._send(parent_output)
        try:
            while self._write_outgoing():
                select.select([self._process.exit], [self._process.program_writer], [])
        except BrokenPipeError as error:
            raise self._failed("it ended while waiting for a program") from error

    def run(self, program: str) -> Execution:
        """Runs the sandbox's only program. Blocks until all processes in the sandbox have ended, or 20 s after they were killed.

        Raises:
          SandboxError: the sandbox ended before the program started, or the host ran out of memory.
        """
        started, limit = time.monotonic(), self._spec.limits.seconds
        self._send_program(program)
        self._process.close_input()
        end = self._watch(started + limit, limit)
        seconds = time.monotonic() - started
        outcome, result, detail = self._end(end, Expected("csv", "-", "run() returned"))
        return Execution(outcome, result, self.output(), self._clean(detail)[:DETAIL_CHARACTERS], seconds)

    def load(self, program: str, parent_output: bytes, seconds: float) -> Answer:
        """Loads the sandbox's only program, in at most this time. See `call`.

        Args:
          program: its source.
          parent_output: the value that its parent returned, which it can read from a file; empty for none.
          seconds: limit of loading.
        """
        self._cpu_since_last_call()  # what the imports took is not the program's
        self._send_program(program, parent_output)
        return self.call(PREPARE, _encoded([]), seconds)

    def call(self, name: str, arguments: bytes, seconds: float) -> Answer:
        """Calls a function of the program. If the answer is not OK, the sandbox has ended.

        An answer counts only if it has the key of its request, which is random: a program can neither answer before it is asked nor repeat
        an earlier answer.

        Args:
          name: of the function.
          arguments: a list in the form of `values.encode`.
          seconds: limit of this call.

        Raises:
          SandboxError: see `run`.
        """
        if self._ended_early is not None:
            outcome, value, detail = self._ended_early
            return Answer(outcome, value, detail, 0.0, 0.0)
        expected = Expected("value", secrets.token_hex(8), f"{name}() returned" if name else "it was loaded")
        self._send(_encoded([expected.key, name]))
        self._send(arguments)
        started = time.monotonic()  # before the program can read the arguments
        end = self._watch(started + seconds, seconds, until=lambda: claims.answered(self._answer))
        wall, cpu = time.monotonic() - started, self._cpu_since_last_call()
        claim = self._claim(expected) if end is None and claims.answered(self._answer) else None
        if claim is None or claim[0] is not Outcome.OK:
            claim = self._end(end, expected, claim)
        self._answer.clear()
        outcome, value, detail = claim
        return Answer(outcome, value, self._clean(detail)[:DETAIL_CHARACTERS], wall, cpu)

    def look(self) -> None:
        """Between calls: ends a program that uses too much memory. The next call says so."""
        if self._ended_early is None and self._process.over_memory():
            self._ended_early = self._end((Outcome.OUT_OF_MEMORY, None, self._memory_detail()), Expected("value", "", ""))

    def _memory_detail(self) -> str:
        return f"it used more than {self._spec.limits.memory_bytes / GIB:.2f} GiB of memory"

    def end(self) -> str:
        """Ends the program, and returns head and tail of what it printed."""
        self._process.kill()
        self._read_rest_of_output()
        return self.output()

    def output(self) -> str:
        """Head and tail of what the program has printed so far."""
        return self._clean(self._output.text())

    def _cpu_since_last_call(self) -> float:
        """CPU time of all processes of the sandbox since this was last asked."""
        used = self._process.cpu_seconds()
        since, self._cpu_counted = max(0.0, used - self._cpu_counted), used
        return since

    def _end(self, end: Claim | None, expected: Expected, claim: Claim | None = None) -> Claim:
        """Ends the sandbox, and returns how the program ended.

        Args:
          end: why it must be killed; None if it ended by itself or answered.
          claim: its complete answer to a call; None if the last one is still to be read.
        """
        over_memory = self._process.killed_for_memory()  # raises if the host killed a process, however the program ended
        code = self._process.kill()
        if end is None and over_memory:
            return Outcome.OUT_OF_MEMORY, None, self._memory_detail()
        if code is None:
            return end or claim or (Outcome.TIMEOUT, None, SLOW_END)
        return end or claim or (claims.failure(code, expected) if code else self._claim(expected))

    def _claim(self, expected: Expected) -> Claim:
        return claims.claim_of(self._answer, expected, self._spec.limits.result_bytes)

    def _clean(self, text: str) -> str:
        text = without_host_paths(text, [(str(self._spec.public), "data"), (os.path.dirname(os.path.abspath(__file__)), "harness")])
        return normalised(text, [bubblewrap.SCRATCH, self._process.folder, *(self._spec.host.roots if self._spec.host else ())])

    @property
    def survivor(self) -> Survivor | None:
        """The process that has not ended although it was killed; None if there is none, as far as is known."""
        return self._process.survivor

    def close(self) -> None:
        """Kills remaining processes and releases what the sandbox holds.

        If there is a `survivor`, nothing is released: call it again when that has ended.
        """
        self._process.close()


def start(spec: SandboxSpec) -> Sandbox:
    """Starts a sandbox that warms up for one program."""
    here = Path(__file__)
    options = {
        "preload": spec.preload,
        "result_bytes": spec.limits.result_bytes,
        "calls": spec.calls,
        "parent_output": PARENT_OUTPUT,
    }
    return Sandbox(spec, here.with_name("harness.py"), options, beside=[here.with_name("values.py")])

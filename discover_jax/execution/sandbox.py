"""The life cycle of one sandbox: start, warm up, run one program or call its functions, end. Also maps its end to an outcome.

All data from the sandbox are untrusted: the output is read and truncated, and answers are limited and parsed by `claims`.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, claims, memory
from discover_jax.execution.claims import DETAIL_CHARACTERS, HEADER_BYTES, Claim, Expected
from discover_jax.execution.harness import PREPARE
from discover_jax.execution.limits import CORE_BYTES, GIB, MIB, ResourceLimits
from discover_jax.execution.output import HeadAndTail, normalised, without_host_paths
from discover_jax.execution.quarantine import Survivor, survivor
from discover_jax.types import PARENT_OUTPUT, Answer, Execution, Outcome

PRELOAD = (
    "pandas",
    "sklearn.compose",
    "sklearn.ensemble",
    "sklearn.impute",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "xgboost",
)
BACKENDS = ("bubblewrap", "unsafe-subprocess")
_WARM_SECONDS = 180.0  # imports take 2 s, but much longer on a cold disk or a busy machine
_END_SECONDS = 20.0
_MOST_READS = 16  # of what a pipe still holds: at most 1 MiB
_LATER_SECONDS = 1.0  # once they have not ended in this time, nobody waits for them here
_TICK_SECONDS = 0.1
_PIPE_BYTES = 1 << 16
_REQUEST_BYTES = 64 * MIB
_RESERVED = 16
"""Address space of a process for its memory, if a control group limits the memory."""
SLOW_END = f"its processes did not end within {_END_SECONDS:.0f} s of being killed"
"""Detail of a program that has no other end."""
_counter = itertools.count()


@dataclasses.dataclass(frozen=True)
class SandboxSpec:
    """How to create the sandboxes of one slot.

    Attributes:
      backend: one of BACKENDS.
      host: what bubblewrap needs; None for the unsafe backend.
      cgroups: where to create control groups; None: memory is limited on a best-effort basis.
      public: folder that programs see as data/.
      limits: of one program.
      slot, cores: number of the slot, and the CPUs leased to it.
      uid: leased uid of its programs; None: this process's own, if it is not root.
      preload: modules that a sandbox imports before it is ready, in addition to numpy.
      calls: whether its programs' functions are called one by one, instead of run() once for a submission.
    """

    backend: str
    host: bubblewrap.Host | None
    cgroups: memory.Cgroups | None
    public: Path
    limits: ResourceLimits
    slot: int
    cores: tuple[int, ...]
    uid: int | None
    preload: tuple[str, ...] = PRELOAD
    calls: bool = False


def _own_limits(spec: SandboxSpec) -> dict[str, int]:
    """Limits that the process inside sets on itself before it runs the program."""
    limits = {"RLIMIT_NOFILE": 1024, "RLIMIT_FSIZE": spec.limits.file_bytes, "RLIMIT_SIGPENDING": 512}
    if spec.backend == "bubblewrap":  # counted per user namespace; without one it would count all processes of the user
        limits["RLIMIT_NPROC"] = spec.limits.processes
    # With a control group, packages may reserve address space that they never use. It is bounded all the same: a process with terabytes of
    # mappings can need minutes to end.
    limits["RLIMIT_AS"] = spec.limits.memory_bytes * (1 if spec.cgroups is None else _RESERVED)
    return limits


def _encoded(value: list) -> bytes:
    from discover_jax.execution import values  # imports numpy, which a slot needs only for calls

    return values.encode(value, _REQUEST_BYTES)


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


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
        self._group: memory.Group | None = None
        self._folder: str | None = None
        self._process: subprocess.Popen | None = None
        self._child_pid: int | None = None  # on the host, of the process that is pid 1 inside
        self._child: int | None = None  # its descriptor
        self._descriptors: set[int] = set()
        self._output = HeadAndTail(spec.limits.stdout_bytes)
        self._answer = bytearray()
        self._outgoing = bytearray()
        self._ended_early: Claim | None = None
        self._cpu_counted = 0.0
        self._survivor: Survivor | None = None
        try:
            self._start(script, options, beside)
        except OSError as error:
            self.close()
            raise SandboxError(f"Cannot start a sandbox: {error}.") from error
        except BaseException:
            self.close()
            raise

    def _own(self, *descriptors: int) -> None:
        self._descriptors.update(descriptors)

    def _shut(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            if descriptor in self._descriptors:
                self._descriptors.remove(descriptor)
                os.close(descriptor)

    def _memory_file(self, name: str) -> int:
        descriptor = os.memfd_create(name)
        self._own(descriptor)
        return descriptor

    def _start(self, script: Path, options: dict, beside: Sequence[Path]) -> None:
        spec = self._spec
        self._output_reader, output_writer = _pipe()
        self._answer_reader, answer_writer = _pipe()
        self._status_reader, status_writer = _pipe()
        program_reader, self._program_writer = os.pipe()
        os.set_blocking(self._program_writer, False)
        self._own(self._output_reader, output_writer, self._answer_reader, answer_writer)
        self._own(self._status_reader, status_writer, program_reader, self._program_writer)
        text = json.dumps({**options, "result_fd": answer_writer, "rlimits": _own_limits(spec)})
        if spec.backend == "bubblewrap":
            command, files = self._bubblewrap_command(script, text, beside, status_writer)
            argv, stage, uid = list(command.argv), command.stage, command.uid
            keep = [answer_writer, *files, status_writer]
        else:
            argv, stage, uid = self._unsafe_command(script, text), {}, None
            keep = [answer_writer]
        if spec.cgroups is not None:
            self._group = memory.Group(spec.cgroups, f"{spec.slot}-{next(_counter)}", spec.limits.memory_bytes, spec.limits.processes)
        launch = {
            "parent": os.getpid(),
            "cgroup_procs": self._group.procs_files if self._group else [],
            "cpus": spec.cores,
            "stage": stage,
            "uid": uid,
            "rlimits": {"RLIMIT_CORE": CORE_BYTES},
            "keep": keep,
            "argv": argv,
        }
        launcher = Path(bubblewrap.launcher.__file__)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(launcher), json.dumps(launch)],
            stdin=program_reader,
            stdout=output_writer,
            stderr=output_writer,
            env={},
            cwd=self._folder or "/",
            pass_fds=keep,
            start_new_session=True,
        )
        self._exit = os.pidfd_open(self._process.pid)
        self._own(self._exit)
        self._shut(output_writer, status_writer, program_reader, *keep)

    def _bubblewrap_command(
        self, script: Path, options: str, beside: Sequence[Path], status_fd: int
    ) -> tuple[bubblewrap.Command, tuple[int, int]]:
        """The command, and the descriptors of the two files that bubblewrap reads: the system call filter and its own arguments."""
        spec = self._spec
        assert spec.host is not None
        # Created first because the command needs their numbers.
        filter_fd, args_fd = self._memory_file("filter"), self._memory_file("args")
        command = bubblewrap.command(
            spec.host,
            script=str(script),
            options=options,
            beside=[str(path) for path in beside],
            public=spec.public,
            limits=spec.limits,
            memory_bounded=spec.cgroups is not None,
            cores=len(spec.cores),
            uid=spec.uid,
            filter_fd=filter_fd,
            args_fd=args_fd,
            status_fd=status_fd,
        )
        for descriptor, content in ((filter_fd, command.filter), (args_fd, command.arguments)):
            os.pwrite(descriptor, content, 0)  # keeps the offset, which bubblewrap shares, at 0
        return command, (filter_fd, args_fd)

    def _unsafe_command(self, script: Path, options: str) -> list[str]:
        """The command without isolation. Creates the folder that it runs in."""
        self._folder = tempfile.mkdtemp(prefix="discover_jax-unsafe-")
        os.symlink(self._spec.public, os.path.join(self._folder, "data"))
        variables = [f"{name}={value}" for name, value in bubblewrap.environment(len(self._spec.cores), self._folder).items()]
        return ["/usr/bin/env", *variables, sys.executable, "-P", "-s", str(script), options]

    def _read_output(self) -> bool:
        """Reads the output so far; False at the end of the stream."""
        return self._drain(self._output_reader, self._output.add)

    def _read_answer(self) -> bool:
        return self._drain(self._answer_reader, self._answer.extend)

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
            for descriptor in (self._answer_reader, self._output_reader, self._exit):
                poll.register(descriptor, select.POLLIN)
            events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not events:
                raise self._failed(f"it was not ready within {_WARM_SECONDS:.0f} s")
            if self._output_reader in events:
                self._read_output()
            if self._answer_reader in events:
                self._read_answer()
            if self._exit in events and not self._answer.endswith(b"\n"):
                raise self._failed("it ended before it was ready")
        if self._answer != b"ready\n":
            raise self._failed(f"it sent {bytes(self._answer[:80])!r} instead of b'ready\\n'")
        self._answer.clear()
        self._output = HeadAndTail(self._spec.limits.stdout_bytes)
        if self._spec.backend == "bubblewrap" and not self._find_child(_END_SECONDS):
            raise self._failed("bubblewrap did not report its child's pid")

    def _find_child(self, seconds: float) -> bool:
        """Waits for bubblewrap to report the host pid of pid 1 inside; False if it ended before."""
        if self._child is None and select.select([self._status_reader, self._exit], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError, ProcessLookupError):  # it reported nothing, or the process has already ended
                match = re.search(rb'"child-pid":\s*(\d+)', os.read(self._status_reader, 4096))
                if match is not None:
                    self._child_pid = int(match[1])
                    self._child = os.pidfd_open(self._child_pid)
                    self._own(self._child)
        return self._child is not None

    @property
    def pid(self) -> int:
        """Host pid of pid 1 inside (for the unsafe backend, of its only process); known once the sandbox is ready."""
        assert self._process is not None
        return self._child_pid or self._process.pid

    def _over_memory(self) -> bool:
        if self._group is not None:
            return self._group.exceeded()
        used = memory.tree_bytes(self.pid)
        if self._child_pid:
            used += memory.folder_bytes(self._child_pid, bubblewrap.WRITABLE)
        return used > self._spec.limits.memory_bytes

    def _watch(self, deadline: float, seconds: float, *, until: Callable[[], bool] = lambda: False) -> Claim | None:
        """Writes what is outgoing and reads until the program ends or `until` holds (None), or it must be killed.

        Args:
          deadline: on the monotonic clock.
          seconds: the limit that ends there, for the detail.
        """
        limits = self._spec.limits
        poll = select.poll()
        for descriptor in (self._answer_reader, self._output_reader, self._exit):
            poll.register(descriptor, select.POLLIN)
        if self._outgoing:
            poll.register(self._program_writer, select.POLLOUT)
        next_look = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= deadline:
                return Outcome.TIMEOUT, None, f"it did not end within {seconds:g} s"
            if now >= next_look:
                next_look = now + _TICK_SECONDS
                if self._over_memory():
                    return Outcome.OUT_OF_MEMORY, None, self._memory_detail()
            events = dict(poll.poll(min(deadline - now, next_look - now) * 1000 + 1))
            if self._program_writer in events and not self._write_or_drop():
                poll.unregister(self._program_writer)
            if self._output_reader in events and not self._read_output():
                poll.unregister(self._output_reader)
            if self._answer_reader in events and not self._read_answer():
                poll.unregister(self._answer_reader)
            if self._output.total > limits.flood_bytes:
                return Outcome.OUTPUT_FLOOD, None, f"it printed more than {limits.flood_bytes} bytes"
            if len(self._answer) > limits.result_bytes + HEADER_BYTES:
                return claims.too_long(limits.result_bytes)
            if until():
                return None
            if self._exit in events and not (events.keys() & {self._output_reader, self._answer_reader}):
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
            del self._outgoing[: os.write(self._program_writer, self._outgoing[:_PIPE_BYTES])]
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
                select.select([self._exit], [self._program_writer], [])
        except BrokenPipeError as error:
            raise self._failed("it ended while waiting for a program") from error

    def run(self, program: str) -> Execution:
        """Runs the sandbox's only program. Blocks until all processes in the sandbox have ended, or 20 s after they were killed.

        Raises:
          SandboxError: the sandbox ended before the program started, or the host ran out of memory.
        """
        started, limit = time.monotonic(), self._spec.limits.seconds
        self._send_program(program)
        self._shut(self._program_writer)
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
        if self._ended_early is None and self._over_memory():
            self._ended_early = self._end((Outcome.OUT_OF_MEMORY, None, self._memory_detail()), Expected("value", "", ""))

    def _memory_detail(self) -> str:
        return f"it used more than {self._spec.limits.memory_bytes / GIB:.2f} GiB of memory"

    def end(self) -> str:
        """Ends the program, and returns head and tail of what it printed."""
        self._kill()
        self._read_rest_of_output()
        return self.output()

    def output(self) -> str:
        """Head and tail of what the program has printed so far."""
        return self._clean(self._output.text())

    def _cpu_since_last_call(self) -> float:
        """CPU time of all processes of the sandbox since this was last asked."""
        used = self._group.cpu_seconds() if self._group is not None else None
        used = memory.tree_cpu_seconds(self.pid) if used is None else used
        since, self._cpu_counted = max(0.0, used - self._cpu_counted), used
        return since

    def _end(self, end: Claim | None, expected: Expected, claim: Claim | None = None) -> Claim:
        """Ends the sandbox, and returns how the program ended.

        Args:
          end: why it must be killed; None if it ended by itself or answered.
          claim: its complete answer to a call; None if the last one is still to be read.
        """
        over_memory = self._group is not None and self._group.exceeded()  # raises if the host killed a process, however the program ended
        code = self._kill()
        if end is None and over_memory:
            return Outcome.OUT_OF_MEMORY, None, self._memory_detail()
        if code is None:
            return end or claim or (Outcome.TIMEOUT, None, SLOW_END)
        return end or claim or (claims.failure(code, expected) if code else self._claim(expected))

    def _claim(self, expected: Expected) -> Claim:
        return claims.claim_of(self._answer, expected, self._spec.limits.result_bytes)

    def _clean(self, text: str) -> str:
        text = without_host_paths(text, [(str(self._spec.public), "data"), (os.path.dirname(os.path.abspath(__file__)), "harness")])
        return normalised(text, [bubblewrap.SCRATCH, self._folder, *(self._spec.host.roots if self._spec.host else ())])

    def _kill(self) -> int | None:
        """Kills all processes of the sandbox and returns the exit status of the outermost one in shell convention; None if they have not
        ended in time. Then `survivor` is set, and the next call does not wait again.

        When pid 1 inside ends, the kernel ends its whole pid namespace, including daemons; before, pid 1 is not gone.
        """
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):  # already ended
            if self._spec.backend == "bubblewrap":
                # Do not kill the outer process first: if it is still preparing its child, the child would wait forever.
                if self._find_child(_END_SECONDS):
                    assert self._child is not None
                    signal.pidfd_send_signal(self._child, signal.SIGKILL)
                else:
                    process.kill()
            else:  # processes that left the process group survive, which is one reason why this backend is unsafe
                os.killpg(process.pid, signal.SIGKILL)
        seconds = _END_SECONDS if self._survivor is None else _LATER_SECONDS
        deadline = time.monotonic() + seconds
        try:
            if self._child is not None and not select.select([self._child], [], [], seconds)[0]:
                raise subprocess.TimeoutExpired("pid 1 of the sandbox", seconds)
            code = process.wait(max(_LATER_SECONDS, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._survivor = survivor(self.pid) or survivor(process.pid)
            return None
        finally:
            # Kills processes that hang or left the tree. Not earlier: bubblewrap's outer process must first reap its child.
            if self._group is not None:
                self._group.kill()
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):  # bubblewrap's outer process or init has reaped it
                os.waitid(os.P_PIDFD, self._child, os.WEXITED)
        self._survivor = None
        return code if code >= 0 else 128 - code

    @property
    def survivor(self) -> Survivor | None:
        """The process that has not ended although it was killed; None if there is none, as far as is known."""
        return self._survivor

    def close(self) -> None:
        """Kills remaining processes and releases the descriptors, control group and folder.

        If there is a `survivor`, nothing is released: call it again when that has ended.
        """
        if self._process is not None:
            if self._kill() is None and self._survivor is not None:
                return
            self._process = None
        self._shut(*list(self._descriptors))
        if self._group is not None:
            self._group.remove()
            self._group = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


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

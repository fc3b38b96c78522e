"""The life cycle of one sandbox: start, warm up, run one program, end. Also maps its end to an outcome.

All data from the sandbox are untrusted: the output is read and truncated; the answer is limited and parsed only as `KIND LENGTH` and bytes.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, memory
from discover_jax.execution.limits import CORE_BYTES, GIB, ResourceLimits
from discover_jax.execution.output import HeadAndTail, normalised
from discover_jax.types import Execution, Outcome

PRELOAD = (
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
_TICK_SECONDS = 0.1
_HEADER_BYTES = 64
_DETAIL_CHARACTERS = 2000
_CLAIMS = {
    outcome.value: outcome for outcome in (Outcome.EXCEPTION, Outcome.INVALID_SUBMISSION, Outcome.OUT_OF_MEMORY, Outcome.RESULT_TOO_BIG)
}
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
      preload: modules that a sandbox imports before it is ready, in addition to numpy and pandas.
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


def _own_limits(spec: SandboxSpec) -> dict[str, int]:
    """Limits that the process inside sets on itself before it runs the program."""
    limits = {"RLIMIT_NOFILE": 1024, "RLIMIT_FSIZE": spec.limits.file_bytes}
    if spec.backend == "bubblewrap":  # counted per user namespace; without one it would count all processes of the user
        limits["RLIMIT_NPROC"] = spec.limits.processes
    if spec.cgroups is None:
        limits["RLIMIT_AS"] = spec.limits.memory_bytes
    return limits


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


class Sandbox:
    """One sandbox. Call `wait_ready`, then `run` once, then `close`. `close` may be called at any time and repeatedly."""

    def __init__(self, spec: SandboxSpec, script: Path, options: dict) -> None:
        """Starts `script options` in a sandbox without waiting for it.

        Args:
          spec: how to create it.
          script: Python file to run inside.
          options: its argument as JSON values; `result_fd` and `rlimits` are added.

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
        try:
            self._start(script, options)
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

    def _start(self, script: Path, options: dict) -> None:
        spec = self._spec
        self._output_reader, output_writer = _pipe()
        self._answer_reader, answer_writer = _pipe()
        self._status_reader, status_writer = _pipe()
        program_reader, self._program_writer = os.pipe()
        self._own(self._output_reader, output_writer, self._answer_reader, answer_writer)
        self._own(self._status_reader, status_writer, program_reader, self._program_writer)
        text = json.dumps({**options, "result_fd": answer_writer, "rlimits": _own_limits(spec)})
        if spec.backend == "bubblewrap":
            command, files = self._bubblewrap_command(script, text, status_writer)
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

    def _bubblewrap_command(self, script: Path, options: str, status_fd: int) -> tuple[bubblewrap.Command, tuple[int, int]]:
        """The command, and the descriptors of the two files that bubblewrap reads: the system call filter and its own arguments."""
        spec = self._spec
        assert spec.host is not None
        # Created first because the command needs their numbers.
        filter_fd, args_fd = self._memory_file("filter"), self._memory_file("args")
        command = bubblewrap.command(
            spec.host,
            script=str(script),
            options=options,
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
        while self._read_output_left():
            pass
        said = self._output.text().strip()
        return SandboxError(f"A sandbox failed: {what}." + (f" Its output: {said[-1500:]}" if said else ""))

    def _read_output_left(self) -> bool:
        before = self._output.total
        self._read_output()
        return self._output.total > before

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

    def _watch(self, deadline: float) -> tuple[Outcome, str] | None:
        """Reads until the program ends by itself (None) or must be killed (outcome and detail)."""
        limits = self._spec.limits
        poll = select.poll()
        for descriptor in (self._answer_reader, self._output_reader, self._exit):
            poll.register(descriptor, select.POLLIN)
        next_look = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= deadline:
                return Outcome.TIMEOUT, f"it did not end within {limits.seconds:g} s"
            if now >= next_look:
                next_look = now + _TICK_SECONDS
                if self._over_memory():
                    return Outcome.OUT_OF_MEMORY, f"it used more than {limits.memory_bytes / GIB:.2f} GiB of memory"
            events = dict(poll.poll(min(deadline - now, next_look - now) * 1000 + 1))
            if self._output_reader in events and not self._read_output():
                poll.unregister(self._output_reader)
            if self._answer_reader in events and not self._read_answer():
                poll.unregister(self._answer_reader)
            if self._output.total > limits.flood_bytes:
                return Outcome.OUTPUT_FLOOD, f"it printed more than {limits.flood_bytes} bytes"
            if len(self._answer) > limits.result_bytes + _HEADER_BYTES:
                return Outcome.RESULT_TOO_BIG, f"the submission is longer than {limits.result_bytes} bytes of CSV"
            if self._exit in events and not (events.keys() & {self._output_reader, self._answer_reader}):
                return None  # it has ended, and nothing is left to read

    def run(self, program: str) -> Execution:
        """Runs the sandbox's only program. Blocks until all processes in the sandbox have ended.

        Raises:
          SandboxError: the sandbox ended before the program started, the host ran out of memory, or the sandbox cannot be killed.
        """
        started = time.monotonic()
        try:
            data = program.encode("utf-8", "replace")
            while data:
                data = data[os.write(self._program_writer, data) :]
        except BrokenPipeError as error:
            raise self._failed("it ended while waiting for a program") from error
        self._shut(self._program_writer)
        end = self._watch(started + self._spec.limits.seconds)
        seconds = time.monotonic() - started
        over_memory = self._group is not None and self._group.exceeded()  # raises if the host killed a process, however the program ended
        code = self._kill()
        if end is None and over_memory:
            end = Outcome.OUT_OF_MEMORY, f"it used more than {self._spec.limits.memory_bytes / GIB:.2f} GiB of memory"
        csv = None
        if end is None:
            outcome, csv, detail = self._claim(code)
        else:
            outcome, detail = end
        return Execution(outcome, csv, self._clean(self._output.text()), self._clean(detail)[:_DETAIL_CHARACTERS], seconds)

    def _claim(self, code: int) -> tuple[Outcome, bytes | None, str]:
        """The program's own answer as (outcome, csv, detail); `code` is the exit status in shell convention."""
        if code == 0:
            header, newline, payload = bytes(self._answer).partition(b"\n")
            match = re.fullmatch(rb"([a-z_]{1,32}) (\d{1,12})", header) if newline else None
            if match and int(match[2]) == len(payload):
                kind = match[1].decode()
                if kind == "csv":
                    if len(payload) > self._spec.limits.result_bytes:
                        return Outcome.RESULT_TOO_BIG, None, f"the submission is longer than {self._spec.limits.result_bytes} bytes of CSV"
                    return Outcome.OK, payload, ""
                if kind in _CLAIMS:
                    return _CLAIMS[kind], None, payload[: 4 * _DETAIL_CHARACTERS].decode("utf-8", "replace")
            return Outcome.EXCEPTION, None, "the process ended before run() returned"
        if code > 128:
            with contextlib.suppress(ValueError):  # not a signal number, so it is an ordinary exit code
                return Outcome.KILLED, None, f"the process died by {signal.Signals(code - 128).name}"
        return Outcome.EXCEPTION, None, f"the process exited with code {code} before run() returned"

    def _clean(self, text: str) -> str:
        return normalised(text, [bubblewrap.SCRATCH, self._folder, *(self._spec.host.roots if self._spec.host else ())])

    def _kill(self) -> int:
        """Kills all processes of the sandbox and returns the exit status of the outermost one in shell convention.

        When pid 1 inside ends, the kernel ends its whole pid namespace, including daemons. bubblewrap's outer process may end before it.
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
        deadline = time.monotonic() + _END_SECONDS
        try:
            if self._child is not None and not select.select([self._child], [], [], _END_SECONDS)[0]:
                raise subprocess.TimeoutExpired("pid 1 of the sandbox", _END_SECONDS)
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise self._failed(f"it did not end within {_END_SECONDS:.0f} s of being killed") from error
        finally:
            # Kills processes that hang or left the tree. Not earlier: bubblewrap's outer process must first reap its child.
            if self._group is not None:
                self._group.kill()
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):  # bubblewrap's outer process or init has reaped it
                os.waitid(os.P_PIDFD, self._child, os.WEXITED)
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        """Kills remaining processes and releases the descriptors, control group and folder."""
        if self._process is not None:
            self._kill()
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
    harness = Path(__file__).with_name("harness.py")
    return Sandbox(spec, harness, {"preload": spec.preload, "result_bytes": spec.limits.result_bytes})

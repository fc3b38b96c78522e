"""The processes of one sandbox, from their start to their end, with their pipes, control group and folder."""

import contextlib
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
from collections.abc import Sequence
from pathlib import Path

from discover_jax.exceptions import SandboxError
from discover_jax.execution import bubblewrap, memory
from discover_jax.execution.limits import CORE_BYTES
from discover_jax.execution.quarantine import Survivor, survivor
from discover_jax.execution.sandbox_spec import SandboxSpec

END_SECONDS = 20.0
"""A sandbox that was killed should have ended after this time."""
_LATER_SECONDS = 1.0  # once they have not ended in this time, nobody waits for them here
_RESERVED = 16
"""Address space of a process for its memory, if a control group limits the memory."""
_counter = itertools.count()


def _own_limits(spec: SandboxSpec) -> dict[str, int]:
    """Limits that the process inside sets on itself before it runs the program."""
    limits = {"RLIMIT_NOFILE": 1024, "RLIMIT_FSIZE": spec.limits.file_bytes, "RLIMIT_SIGPENDING": 512}
    if spec.backend == "bubblewrap":  # counted per user namespace; without one it would count all processes of the user
        limits["RLIMIT_NPROC"] = spec.limits.processes
    # With a control group, packages may reserve address space that they never use. It still has a limit: a process with terabytes of
    # mappings can need minutes to end.
    limits["RLIMIT_AS"] = spec.limits.memory_bytes * (1 if spec.cgroups is None else _RESERVED)
    return limits


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


class SandboxProcess:
    """The outermost process of a sandbox, all processes inside, and what they hold on the host.

    `close` may be called at any time and repeatedly.

    Attributes:
      output_reader, answer_reader: descriptors of what the program prints and of the harness's answers; they do not block.
      program_writer: descriptor of what the harness reads; it does not block.
      exit: descriptor that is readable once the outermost process has ended.
      folder: in which the unsafe backend runs; None with bubblewrap.
    """

    def __init__(self, spec: SandboxSpec, script: Path, options: dict, beside: Sequence[Path] = ()) -> None:
        """Starts `script options` in a sandbox without waiting for it. Arguments and errors are those of `Sandbox`."""
        self._spec = spec
        self._group: memory.Group | None = None
        self.folder: str | None = None
        self._process: subprocess.Popen | None = None
        self._child_pid: int | None = None  # on the host, of the process that is pid 1 inside
        self._child: int | None = None  # its descriptor
        self._descriptors: set[int] = set()
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

    def close_input(self) -> None:
        """Tells the harness that nothing more comes."""
        self._shut(self.program_writer)

    def _memory_file(self, name: str) -> int:
        descriptor = os.memfd_create(name)
        self._own(descriptor)
        return descriptor

    def _start(self, script: Path, options: dict, beside: Sequence[Path]) -> None:
        spec = self._spec
        self.output_reader, output_writer = _pipe()
        self.answer_reader, answer_writer = _pipe()
        self._status_reader, status_writer = _pipe()
        program_reader, self.program_writer = os.pipe()
        os.set_blocking(self.program_writer, False)
        self._own(self.output_reader, output_writer, self.answer_reader, answer_writer)
        self._own(self._status_reader, status_writer, program_reader, self.program_writer)
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
            cwd=self.folder or "/",
            pass_fds=keep,
            start_new_session=True,
        )
        self.exit = os.pidfd_open(self._process.pid)
        self._own(self.exit)
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
        self.folder = tempfile.mkdtemp(prefix="discover_jax-unsafe-")
        os.symlink(self._spec.public, os.path.join(self.folder, "data"))
        variables = [f"{name}={value}" for name, value in bubblewrap.environment(len(self._spec.cores), self.folder).items()]
        return ["/usr/bin/env", *variables, sys.executable, "-P", "-s", str(script), options]

    def find_child(self, seconds: float) -> bool:
        """Waits for bubblewrap to report the host pid of pid 1 inside; False if it ended before."""
        if self._child is None and select.select([self._status_reader, self.exit], [], [], seconds)[0]:
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

    def over_memory(self) -> bool:
        """Whether its memory exceeds the limit: as the control group counts it or, without one, as measured now.

        Raises:
          SandboxError: the host ran out of memory.
        """
        if self._group is not None:
            return self._group.exceeded()
        used = memory.tree_bytes(self.pid)
        if self._child_pid:
            used += memory.folder_bytes(self._child_pid, bubblewrap.WRITABLE)
        return used > self._spec.limits.memory_bytes

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed a process at the control group's limit. False without a control group.

        Raises:
          SandboxError: the host ran out of memory.
        """
        return self._group is not None and self._group.exceeded()

    def cpu_seconds(self) -> float:
        """CPU time of all processes of the sandbox so far."""
        used = self._group.cpu_seconds() if self._group is not None else None
        return memory.tree_cpu_seconds(self.pid) if used is None else used

    def kill(self) -> int | None:
        """Kills all processes of the sandbox and returns the exit status of the outermost one in shell convention; None if they have not
        ended in time. Then `survivor` is set, and the next call does not wait again.

        When pid 1 inside ends, the kernel ends its whole pid namespace, including daemons; before, pid 1 is not gone.
        """
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):  # already ended
            if self._spec.backend == "bubblewrap":
                # Do not kill the outer process first: if it is still preparing its child, the child would wait forever.
                if self.find_child(END_SECONDS):
                    assert self._child is not None
                    signal.pidfd_send_signal(self._child, signal.SIGKILL)
                else:
                    process.kill()
            else:  # processes that left the process group survive, which is one reason why this backend is unsafe
                os.killpg(process.pid, signal.SIGKILL)
        seconds = END_SECONDS if self._survivor is None else _LATER_SECONDS
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
            if self.kill() is None and self._survivor is not None:
                return
            self._process = None
        self._shut(*list(self._descriptors))
        if self._group is not None:
            self._group.remove()
            self._group = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

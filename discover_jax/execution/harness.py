"""Runs inside the sandbox: imports slow packages, waits for one program, and runs it: once for its submission, or one call at a time.

Started as `python harness.py OPTIONS` (JSON), with the program on standard input and a pipe for answers. It must not import this project:
the sandbox contains only this file and values.py. Once the program runs, nothing that this process sends can be trusted: the program may
have changed anything here. The worker therefore limits, parses and grades the answers.

The first answer is `ready`, after the imports. Each later one is a line `KIND KEY LENGTH` and that many bytes. KIND is csv or value, or the
value of types.Outcome that says why there is none. Standard input has frames, a line with a length and that many bytes: the program, then,
if OPTIONS has `calls`, the value that its parent returned (empty for none), and two for each call: its key and the function's name, and the
arguments. KEY is the call's, `-` for a submission.
"""

import builtins
import contextlib
import gc
import importlib
import importlib.util
import io
import json
import linecache
import os
import random
import resource
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

PROGRAM = "solution"
_OWN_FRAMES = 4  # number of the program's own frames in a traceback: enough for run() and its callees
_MESSAGE = 600  # maximum length of an exception's message: pandas may list every column


PREPARE = ""
"""Name in the request that only loads the program."""


class _TooBigError(Exception):
    pass


class _Bounded(io.StringIO):
    """A text buffer with a maximum number of characters. This is at most the number of bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._room = limit

    def write(self, text: str, /) -> int:
        self._room -= len(text)
        if self._room < 0:
            raise _TooBigError
        return super().write(text)


def _set_limits(limits: dict) -> None:
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def _describe(error: BaseException) -> str:
    """The end of the traceback: the program's own frames with line numbers, and the message."""
    summary = traceback.TracebackException.from_exception(error)
    own = [frame for frame in summary.stack if frame.filename.endswith(f"{PROGRAM}.py")]
    lines = [f"line {frame.lineno}, in {frame.name}: {(frame.line or '').strip()[:200]}" for frame in own[-_OWN_FRAMES:]]
    message = "".join(summary.format_exception_only()).strip()
    if len(message) > _MESSAGE:
        message = message[: _MESSAGE // 2] + " ... " + message[-_MESSAGE // 2 :]
    return "\n".join([*lines, message])


def _load(source: bytes) -> types.ModuleType:
    """Executes the program as a new module.

    The module is not named __main__, so that an `if __name__ == "__main__"` block, which usually calls run() a second time, does not run.
    The file is in the working directory, so that child processes can import it by name.
    """
    path = os.path.join(os.getcwd(), f"{PROGRAM}.py")
    with open(path, "wb") as file:
        file.write(source)
    module = types.ModuleType(PROGRAM)
    module.__file__ = path
    sys.modules[PROGRAM] = module
    sys.path.insert(0, os.getcwd())
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module


def _module_beside(name: str) -> types.ModuleType:
    """A module of this file's folder, without adding the folder to sys.path."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read_frame(file: io.BufferedReader) -> bytes | None:
    """The next frame; None if there will be no more."""
    line = file.readline()
    return file.read(int(line)) if line else None


class _Submission:
    """Runs the program once. The answer is the table that `run()` returns, as CSV."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._type_of = most_bytes, builtins.type
        # From before the program runs, which may replace attributes of pandas. Without preloaded pandas, the program imports it.
        self._table = self._table_type()

    @staticmethod
    def _table_type() -> tuple[type, Callable[..., Any]] | None:
        """The type of submissions and its method that writes them; None if pandas has not been imported."""
        pandas = sys.modules.get("pandas")
        return None if pandas is None else (pandas.DataFrame, pandas.DataFrame.to_csv)

    def answer(self, source: bytes) -> tuple[str, bytes]:
        run = getattr(_load(source), "run", None)
        if not callable(run):
            raise NameError("the program defines no function run()")
        frame = run()
        table = self._table or self._table_type()
        if table is None or self._type_of(frame) is not table[0]:
            return "invalid_submission", f"run() returned {self._type_of(frame).__name__}, not a pandas.DataFrame".encode()
        buffer = _Bounded(self._most_bytes)
        try:
            table[1](frame, buffer, index=False)
        except _TooBigError:
            return "result_too_big", f"the submission is longer than {self._most_bytes} bytes of CSV".encode()
        except BaseException as error:
            return "invalid_submission", f"the DataFrame cannot be written as CSV: {_describe(error)}".encode("utf-8", "replace")
        return "csv", buffer.getvalue().encode("utf-8", "replace")


class _Calls:
    """Calls functions of the program."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._values = most_bytes, _module_beside("values")
        self._module: types.ModuleType | None = None

    def keep(self, parent_output: bytes, path: str) -> None:
        """Writes the value that the parent returned to a file, for the program.

        The parent's process may have sent anything. If the bytes are not a value, or need too much memory, no file is written.
        """
        try:
            text = self._values.to_json(self._values.decode(parent_output))
        except (ValueError, MemoryError):
            return
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o444)

    def request(self, frame: bytes) -> tuple[str, str]:
        """Key and name of the function."""
        key, name = self._values.decode(frame)
        return key, name

    def answer(self, source: bytes, name: str, arguments: bytes) -> tuple[str, bytes]:
        values = self._values
        if self._module is None:
            self._module = _load(source)
        value = None
        if name != PREPARE:
            function = getattr(self._module, name, None)
            if not callable(function):
                raise NameError(f"the program defines no function {name}()")
            value = function(*values.decode(arguments))
        try:
            return "value", values.encode(value, self._most_bytes)
        except values.ValueTooBigError as error:
            return "result_too_big", f"{name}() returned too large a value: {error}".encode()
        except ValueError as error:
            return "invalid_submission", f"{name}() returned a value that cannot be sent: {error}".encode("utf-8", "replace")


def _preload(modules: Sequence[str]) -> None:
    """Imports those that are installed. The garbage collector never looks at what they keep, which takes a sixth of the imports' time."""
    gc.disable()
    for name in modules:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()  # otherwise the program's first collections would look at it
    gc.enable()


def main(options: dict) -> None:
    """Serves one program and never returns."""
    _set_limits(options["rlimits"])
    _preload(("numpy", *options["preload"]))
    import numpy

    if (joblib := sys.modules.get("joblib")) is not None:
        # Without /sys, it finds no physical cores if the program has all of the machine's. It remembers that, and warns only now, when
        # output is not the program's. LightGBM asks for it in each fit.
        joblib.cpu_count(only_physical_cores=True)
    kind_of_program = _Calls if options["calls"] else _Submission
    program = kind_of_program(options["result_bytes"])
    # Keep references: the program may replace them in os.
    write, leave, result = os.write, os._exit, options["result_fd"]

    def send(kind: str, key: str, payload: bytes) -> None:
        for data in (b"%s %s %d\n" % (kind.encode(), key.encode(), len(payload)), payload):
            left = memoryview(data)  # a slice of bytes would copy a large submission for each write to the pipe
            while left:
                left = left[write(result, left) :]

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with standard error
    data_descriptor = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    write(result, b"ready\n")
    file = open(data_descriptor, "rb")  # noqa: SIM115 - open until this process ends
    source = _read_frame(file)
    if source is None:  # the worker ended without a program
        leave(0)
        return
    if isinstance(program, _Calls) and (parent_output := _read_frame(file)):
        program.keep(parent_output, options["parent_output"])
    random.seed(0)
    numpy.random.seed(0)

    while True:
        key = "-"
        try:
            if isinstance(program, _Submission):
                kind, payload = program.answer(source)
            else:
                request, arguments = _read_frame(file), _read_frame(file)
                if request is None or arguments is None:
                    leave(0)
                    return
                key, name = program.request(request)
                kind, payload = program.answer(source, name, arguments)
        except MemoryError as error:
            kind, payload = "out_of_memory", _describe(error).encode("utf-8", "replace")
        except BaseException as error:  # includes SystemExit: exiting early is not an answer
            linecache.checkcache()
            kind, payload = "exception", _describe(error).encode("utf-8", "replace")
        with contextlib.suppress(BaseException):  # the program may have replaced or closed its streams
            sys.stdout.flush()
            sys.stderr.flush()
        send(kind, key, payload)
        if isinstance(program, _Submission):
            leave(0)  # without waiting for the program's threads or exit handlers


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

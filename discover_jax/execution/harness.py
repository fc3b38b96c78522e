"""Runs inside the sandbox: imports slow packages, waits for one program, runs it, and sends back its submission as CSV.

Started as `python harness.py OPTIONS` (JSON), with the program on standard input and a pipe for the answer. It must not import this
project: the sandbox contains only this file. Once the program runs, nothing that this process sends can be trusted: the program may have
changed anything here. The worker therefore limits, parses and grades the answer. The answer is `ready` after the imports, then one line
`KIND LENGTH` followed by that many bytes. KIND is csv, or the value of types.Outcome that says why there is no submission.
"""

import builtins
import contextlib
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

PROGRAM = "solution"
_OWN_FRAMES = 4  # number of the program's own frames in a traceback: enough for run() and its callees
_MESSAGE = 600  # maximum length of an exception's message: pandas may list every column


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


def main(options: dict) -> None:
    """Serves one program and never returns."""
    _set_limits(options["rlimits"])
    import numpy
    import pandas

    for name in options["preload"]:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    # Keep references: the program may replace them in pandas, builtins or os.
    frame_type, to_csv, type_of = pandas.DataFrame, pandas.DataFrame.to_csv, builtins.type
    write, leave, result = os.write, os._exit, options["result_fd"]

    def send(kind: str, payload: bytes) -> None:
        data = b"%s %d\n%s" % (kind.encode(), len(payload), payload)
        while data:
            data = data[write(result, data) :]

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with standard error
    data_descriptor = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    write(result, b"ready\n")
    with open(data_descriptor, "rb") as file:
        source = file.read()
    random.seed(0)
    numpy.random.seed(0)

    try:
        module = _load(source)
        run = getattr(module, "run", None)
        if not callable(run):
            raise NameError("the program defines no function run()")
        frame = run()
    except MemoryError as error:
        kind, payload = "out_of_memory", _describe(error)
    except BaseException as error:  # includes SystemExit: exiting early is not a submission
        linecache.checkcache()
        kind, payload = "exception", _describe(error)
    else:
        if type_of(frame) is not frame_type:
            kind, payload = "invalid_submission", f"run() returned {type_of(frame).__name__}, not a pandas.DataFrame"
        else:
            buffer = _Bounded(options["result_bytes"])
            try:
                to_csv(frame, buffer, index=False)
                kind, payload = "csv", buffer.getvalue()
            except _TooBigError:
                kind, payload = "result_too_big", f"the submission is longer than {options['result_bytes']} bytes of CSV"
            except BaseException as error:
                kind, payload = "invalid_submission", f"the DataFrame cannot be written as CSV: {_describe(error)}"
    with contextlib.suppress(BaseException):  # the program may have replaced or closed its streams
        sys.stdout.flush()
        sys.stderr.flush()
    send(kind, payload.encode("utf-8", "replace"))
    leave(0)  # without waiting for the program's threads or exit handlers


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

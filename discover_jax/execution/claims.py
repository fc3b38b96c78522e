"""How a program ended, by its own answer. The answer is untrusted: it is parsed only as `KIND KEY LENGTH`, a new line and its bytes."""

import contextlib
import dataclasses
import re
import signal

from discover_jax.types import Outcome

HEADER_BYTES = 64
"""Longest header of an answer."""
DETAIL_CHARACTERS = 2000
"""Longest detail of an outcome."""
_HEADER = re.compile(rb"([a-z_]{1,32}) ([a-z0-9-]{1,16}) (\d{1,12})")
_OUTCOMES = {
    outcome.value: outcome for outcome in (Outcome.EXCEPTION, Outcome.INVALID_SUBMISSION, Outcome.OUT_OF_MEMORY, Outcome.RESULT_TOO_BIG)
}
Claim = tuple[Outcome, bytes | None, str]
"""How a program ended: outcome, answer, detail."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """The answer that is awaited.

    Attributes:
      kind: of an answer that is OK.
      key: that it must have; random for a call, so that a program can neither answer before it is asked nor repeat an earlier answer.
      event: what it reports, for the detail.
    """

    kind: str
    key: str
    event: str


def answered(received: bytearray) -> bool:
    """Whether an answer is complete, or what was received cannot become one."""
    end = received.find(b"\n", 0, HEADER_BYTES + 1)  # without a copy of the answer, which may be large and is read in parts
    if end < 0:
        return len(received) > HEADER_BYTES
    match = _HEADER.fullmatch(received, 0, end)
    return match is None or len(received) - end - 1 >= int(match[3])


def too_long(most_bytes: int) -> Claim:
    """An answer of more than `most_bytes`."""
    return Outcome.RESULT_TOO_BIG, None, f"the answer is longer than {most_bytes} bytes"


def claim_of(received: bytearray, expected: Expected, most_bytes: int) -> Claim:
    """What the received bytes say about a program that has not failed.

    Args:
      most_bytes: limit of an answer.
    """
    header, newline, payload = bytes(received).partition(b"\n")
    match = _HEADER.fullmatch(header) if newline else None
    if match and match[2].decode() != expected.key:
        return Outcome.EXCEPTION, None, "it wrote an answer that nobody had asked for"
    if match and int(match[3]) == len(payload):
        kind = match[1].decode()
        if kind == expected.kind:
            return too_long(most_bytes) if len(payload) > most_bytes else (Outcome.OK, payload, "")
        if kind in _OUTCOMES:
            return _OUTCOMES[kind], None, payload[: 4 * DETAIL_CHARACTERS].decode("utf-8", "replace")
    return Outcome.EXCEPTION, None, f"the process ended before {expected.event}"


def failure(code: int, expected: Expected) -> Claim:
    """How a program ended whose process failed; `code` is its exit status in shell convention, not 0."""
    if code > 128:
        with contextlib.suppress(ValueError):  # not a signal number, so it is an ordinary exit code
            return Outcome.KILLED, None, f"the process died by {signal.Signals(code - 128).name}"
    return Outcome.EXCEPTION, None, f"the process exited with code {code} before {expected.event}"

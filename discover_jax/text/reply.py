"""Extracts the program from a rollout: a whole program, or edits of its parent's."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from discover_jax.text.chat import ChatFormat, Reply
from discover_jax.text.code import ENTRY, defines_entry, extract_program
from discover_jax.text.edits import REPLACE, SEARCH, EditError, edited, has_edits, has_marker_lines
from discover_jax.types import Rollout, StopReason

NO_PROGRAM = "The reply holds no fenced Python block in its final channel."
_NEITHER = f"The reply holds neither an edit ({SEARCH}) nor a fenced Python block in its final channel."

_MARKERS = f"The program has a line that begins with <<<<<<< or >>>>>>>. Edits begin with a line {SEARCH} and end with a line {REPLACE}."


@dataclasses.dataclass(frozen=True)
class Extracted:
    """The program in a reply: `code`, or the `reason` why there is none."""

    code: str | None
    reason: str = ""


def extracted(rollout: Rollout, chat: ChatFormat, edits_of: str = "", names: Sequence[str] = ENTRY) -> Extracted:
    """The program in the rollout's answer.

    Args:
      edits_of: a program that the answer may edit; see `edits`. An answer without edits is read as a whole program, as always, but must
        not have lines that look like edits. Empty if only whole programs are asked for.
      names: functions that the program must define.
    """
    reply, cut = chat.parse(rollout.tokens_T.tolist()), rollout.stop is StopReason.MAX_TOKENS
    if edits_of:
        for final, program in _answers(reply, cut, names):
            if has_edits(final):
                try:
                    return Extracted(edited(edits_of, final).strip("\n"))  # as whole programs
                except EditError as error:
                    return Extracted(None, str(error))
            if program is not None and defines_entry(program, names):
                break  # it replaces edits in an answer before it
    code = _program(reply, cut, names)
    if edits_of and code is not None and has_marker_lines(code):
        return Extracted(None, _MARKERS)
    return Extracted(code, "" if code is not None else _NEITHER if edits_of else NO_PROGRAM)


def program_of(rollout: Rollout, chat: ChatFormat, names: Sequence[str] = ENTRY) -> str | None:
    """The program in the rollout's answer, or None if it has none.

    A block that the token budget cut is accepted as it is.
    """
    return _program(chat.parse(rollout.tokens_T.tolist()), rollout.stop is StopReason.MAX_TOKENS, names)


def _answers(reply: Reply, cut: bool, names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The answers, the last one first, each with its program. `cut`: whether the token budget cut the reply."""
    if reply.final is not None:
        yield reply.final, extract_program(reply.final, cut, names)
    yield from ((text, extract_program(text, False, names)) for text in reply.earlier)


def _program(reply: Reply, cut: bool, names: Sequence[str]) -> str | None:
    """The program of the last answer with one that defines one of `names`, else that of the last unmarked text, else any of an answer."""
    found = [program for _, program in _answers(reply, cut, names) if program is not None]
    unmarked = (extract_program(text, False, names) for text in reply.unmarked)
    complete = (program for program in itertools.chain(found, unmarked) if program is not None and defines_entry(program, names))
    return next(complete, found[0] if found else None)

"""Extracts the program from a rollout: a whole program, or edits of its parent's."""

import dataclasses

from discover_jax.text.chat import ChatFormat
from discover_jax.text.code import extract_program
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


def extracted(rollout: Rollout, chat: ChatFormat, edits_of: str = "") -> Extracted:
    """The program in the rollout's answer.

    Args:
      edits_of: a program that the answer may edit; see `edits`. An answer without edits is read as a whole program, as always, but must
        not have lines that look like edits. Empty if only whole programs are asked for.
    """
    if edits_of:
        final = chat.parse(rollout.tokens_T.tolist()).final
        if final is not None and has_edits(final):
            try:
                return Extracted(edited(edits_of, final).strip("\n"))  # as whole programs
            except EditError as error:
                return Extracted(None, str(error))
    code = program_of(rollout, chat)
    if edits_of and code is not None and has_marker_lines(code):
        return Extracted(None, _MARKERS)
    return Extracted(code, "" if code is not None else _NEITHER if edits_of else NO_PROGRAM)


def program_of(rollout: Rollout, chat: ChatFormat) -> str | None:
    """The program in the rollout's answer, or None if it has none.

    A block that the token budget cut is accepted as it is. A block that the policy left open is not.
    """
    final = chat.parse(rollout.tokens_T.tolist()).final
    return None if final is None else extract_program(final, rollout.stop is StopReason.MAX_TOKENS)

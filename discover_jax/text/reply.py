"""Extracts the program from a rollout."""

from discover_jax.text.chat import ChatFormat
from discover_jax.text.code import extract_program
from discover_jax.types import Rollout, StopReason


def program_of(rollout: Rollout, chat: ChatFormat) -> str | None:
    """The program in the rollout's answer, or None if it has none.

    A block that the token budget cut is accepted as it is. A block that the policy left open is not.
    """
    final = chat.parse(rollout.tokens_T.tolist()).final
    return None if final is None else extract_program(final, rollout.stop is StopReason.MAX_TOKENS)

"""Extracts the program from a rollout."""

from discover_jax.text.code import extract_program
from discover_jax.text.harmony import parse
from discover_jax.text.tokenizer import Tokenizer
from discover_jax.types import Rollout, StopReason


def program_of(rollout: Rollout, tokenizer: Tokenizer) -> str | None:
    """The program in the rollout's final channel, or None if it has none.

    A block that the token budget cut is accepted as it is. A block that the policy left open is not.
    """
    final = parse(rollout.tokens_T.tolist(), tokenizer).final
    return None if final is None else extract_program(final, rollout.stop is StopReason.MAX_TOKENS)

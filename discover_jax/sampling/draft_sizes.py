"""The sizes of batches that are decoded with drafts (see `drafts`), and a warning if a run has no such batch."""

from discover_jax.sampling.schedule import half_of

MOST_READ = 128
"""Most tokens that a pass with drafts reads, of all rows. With more, arithmetic limits it, and drafts cost what they save."""
MOST_DRAFT = 15
"""Limit on the tokens of a draft: the smallest batch of the tail, 8 rows, reads `MOST_READ` tokens."""


def draft_rows(draft_tokens: int) -> int:
    """Most rows of a batch that is decoded with drafts of this many tokens; 0 without drafts."""
    return MOST_READ // (draft_tokens + 1) if draft_tokens else 0


def most_read(slots: int, draft_tokens: int) -> int:
    """Most tokens, of all rows, that a pass with drafts reads if the batch begins with this many rows; 0 without drafts."""
    return min(slots, draft_rows(draft_tokens)) * (draft_tokens + 1)


def rows_of(slots: int, rollouts: int, devices: int) -> int:
    """Rows of the batch: the smaller of slots and rollouts, rounded up to a multiple of the devices."""
    return -(-min(slots, rollouts) // devices) * devices


def largest_with_drafts(rows: int, row_devices: int, most: int) -> int:
    """The largest batch of at most `most` rows that a batch of `rows` rows is halved to; 0 if it is never so small."""
    while rows > most:
        rows = half_of(rows, row_devices)
        if not rows:
            return 0
    return rows


def drafts_warning(slots: int, rollouts: int, row_devices: int, draft_tokens: int) -> str | None:
    """A warning if `config.sampling.draft_tokens` has no effect, because no batch of a step is small enough; None otherwise.

    Args:
      slots, draft_tokens: `config.sampling.slots` and `draft_tokens`.
      rollouts: of a step.
      row_devices: see `kernels.spread.row_devices`.
    """
    most, begun = draft_rows(draft_tokens), rows_of(slots, rollouts, row_devices)
    if not draft_tokens or largest_with_drafts(begun, row_devices, most):
        return None
    smallest = begun
    while half := half_of(smallest, row_devices):
        smallest = half
    halved = f" and is halved to at least {smallest}" if smallest < begun else " and cannot be halved"
    # More slots than rollouts would change nothing.
    other = next((n for n in range(begun, 0, -1) if largest_with_drafts(rows_of(n, rollouts, row_devices), row_devices, most)), 0)
    shorter = MOST_READ // smallest - 1
    fixes = [f"draft_tokens to at most {shorter}"] * (shorter > 0) + [f"slots to {other}"] * (other > 0)
    remedy = f"Set config.sampling.{' or '.join(fixes)}." if fixes else "Set config.sampling.draft_tokens to 0, or use fewer devices."
    return (
        f"config.sampling.draft_tokens = {draft_tokens} has no effect: drafts of this length are used with at most {most} rows, but the"
        f" batch begins with {begun} rows{halved}. {remedy}"
    )

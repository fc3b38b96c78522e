"""The host part of a checkpoint: the position of the run, as JSON. Reading it checks every value."""

import dataclasses
from typing import Any

from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.records import from_row


@dataclasses.dataclass(frozen=True)
class HostState:
    """The host part of a checkpoint. It has no random state: random draws are derived from (seed, step).

    Attributes:
      first_step: number of the run's first step; not 0 for a run that continues another one.
      journal_position: length of the journal in bytes.
      journal_sha256: SHA-256 of these bytes.
      archive: archived states of all competitions, from `Archive.to_json`; `Archive.from_json` checks them.
      rewards: which rows made the scores, for each competition in the journal; `reward_rows` makes and checks them.
    """

    first_step: int
    journal_position: int
    journal_sha256: str
    archive: list[dict[str, Any]]
    rewards: list[dict[str, Any]]

    @classmethod
    def of(cls, first_step: int, archive: list[dict[str, Any]], rewards: list[dict[str, Any]], journal: Journal) -> "HostState":
        """The host state of a run whose journal is up to date."""
        return cls(first_step, journal.position, journal.digest(), archive, rewards)

    def to_json(self) -> dict[str, Any]:
        """A JSON object for `from_json`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, row: Any, step: int) -> "HostState":
        """The host state of the checkpoint of a step.

        Raises:
          RunError: a field is missing, unknown or of the wrong type, or a number is out of range.
        """
        try:
            state = from_row(cls, row)
            if not 0 <= state.first_step <= step:
                raise ValueError(f"its first_step must be between 0 and {step}; got {state.first_step}")
            if state.journal_position < 0:
                raise ValueError(f"its journal_position must be at least 0; got {state.journal_position}")
        except ValueError as error:
            raise RunError(
                f"The host state of checkpoint {step} is invalid: {error}. The checkpoint was altered or written by another version. Delete"
                " its folder to resume from the one before."
            ) from error
        return state

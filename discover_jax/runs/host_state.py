"""What a checkpoint holds beside the train state: where the run stands, as JSON, read back with distrust."""

import dataclasses
from typing import Any

from discover_jax.archive.journal import Journal
from discover_jax.exceptions import RunError
from discover_jax.records import from_row


@dataclasses.dataclass(frozen=True)
class HostState:
    """Random draws are folded from (seed, step), so there is no generator to keep.

    Attributes:
      first_step: number of the run's first step: not 0 for a run that goes on from another one's.
      journal_position: length of the journal, bytes.
      journal_sha256: of these bytes.
      archive: the states that may become parents, of all competitions, as `Archive.to_json` gives them and `Archive.from_json` checks them.
      rewards: which rows made the scores of each competition that the journal has rows of, as `reward_rows` gives and checks them.
    """

    first_step: int
    journal_position: int
    journal_sha256: str
    archive: list[dict[str, Any]]
    rewards: list[dict[str, Any]]

    @classmethod
    def of(cls, first_step: int, archive: list[dict[str, Any]], rewards: list[dict[str, Any]], journal: Journal) -> "HostState":
        """Of a run whose journal holds all that it did so far."""
        return cls(first_step, journal.position, journal.digest(), archive, rewards)

    def to_json(self) -> dict[str, Any]:
        """For `from_json`; JSON can hold it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, row: Any, step: int) -> "HostState":
        """The host state of the checkpoint of a step.

        Raises:
          RunError: a field is missing, unknown, or of another type; or a number cannot be.
        """
        try:
            state = from_row(cls, row)
            if not 0 <= state.first_step <= step:
                raise ValueError(f"its first_step is {state.first_step}, which is not between 0 and {step}")
            if state.journal_position < 0:
                raise ValueError(f"its journal_position is {state.journal_position}")
        except ValueError as error:
            raise RunError(
                f"Checkpoint {step} does not say where the run stands: {error}. It was altered, or made by another version; delete its"
                " folder to go back to the one before."
            ) from error
        return state

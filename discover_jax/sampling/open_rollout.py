"""A rollout that is not finished: what has been generated of it so far, and where its row and pages are."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from discover_jax.models.cache import Pool
from discover_jax.sampling.decoding import Rows
from discover_jax.types import Prompt, Rollout, StopReason


@dataclasses.dataclass(eq=False)
class OpenRollout:
    """An unfinished rollout.

    Attributes:
      prompt: its prompt.
      prompt_index: position of the prompt in the call.
      index: its index in the group.
      temperature: sampling temperature.
      began: number of rollouts that began before it; -1 before it begins.
      count: number of tokens so far; `tokens`, `logprobs`, `chosen` and `routes` have one array per launch.
      prompt_routes: routes of its prompt, by chunk.
      pages: pages of its prompt and its own pages, while it has a slot.
      aside: its row and pages while it is set aside.
    """

    prompt: Prompt
    prompt_index: int
    index: int
    temperature: float
    began: int = -1
    count: int = 0
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    chosen: list[np.ndarray] = dataclasses.field(default_factory=list)
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)
    prompt_routes: list[jax.Array] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    aside: tuple[Rows, list[Pool]] | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the rollout so far."""
        return len(self.prompt.tokens_P) + self.count

    def extend(self, drawn_BT: Sequence[np.ndarray], slot: int, count: int) -> int:
        """Adds what a launch drew in this slot until the rollout has `count` tokens. Returns the number of new tokens.

        Args:
          drawn_BT: `decoding.Drawn` on the host.
        """
        new = count - self.count
        self.count = count
        for kept, x_BT in zip((self.tokens, self.logprobs, self.chosen, self.routes), drawn_BT, strict=True):
            kept.append(x_BT[slot, :new].copy())  # a view would keep the whole launch's arrays in memory
        return new

    def finished(self, stop_ids: tuple[int, ...], *, record_routes: bool) -> Rollout:
        """The rollout, which has ended."""
        tokens_T = np.concatenate(self.tokens).astype(np.int32)
        return Rollout(
            group=self.prompt.group,
            index=self.index,
            prompt_tokens_P=np.asarray(self.prompt.tokens_P, np.int32),
            tokens_T=tokens_T,
            logprobs_T=np.concatenate(self.logprobs).astype(np.float32),
            chosen_T=np.concatenate(self.chosen),
            stop=StopReason.STOP_TOKEN if int(tokens_T[-1]) in stop_ids else StopReason.MAX_TOKENS,
            temperature=self.temperature,
            routes_SLX=self._routes_SLX() if record_routes else None,
        )

    def _routes_SLX(self) -> np.ndarray:
        """Routes of the prompt and of the generated tokens, except the last, which the model never reads."""
        prompt = np.concatenate([np.asarray(routes_1CLX)[0] for routes_1CLX in self.prompt_routes])
        return np.concatenate([prompt[: len(self.prompt.tokens_P)], *self.routes])[:-1]

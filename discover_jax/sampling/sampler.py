"""The sampler: prompts in, rollouts out as they finish. One decode batch of slots, refilled at once; it knows nothing of text.

A group's prompt is read once and its cache rows are copied to the group's rollouts. Decoding runs in launches of a fixed number of tokens
inside one jitted loop; between launches the host takes out what finished and refills the slots from a queue in fixed order. Scheduling
depends on tokens only, never on the clock, so a resumed run repeats it.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.models.cache import Cache, put_rows, take_rows, with_capacity
from discover_jax.sampling.draw import draw_tokens, rollout_keys
from discover_jax.types import Prompt, Rollout, StopReason

PROMPT_BUCKET = 128
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""
CACHE_BUCKET = 256
"""The cache grows with its longest row by this many places, so that early tokens do not attend to empty places."""
PROMPT_ROWS = 8
"""Prompts read at once."""
FEWEST_ROWS = 8
"""The decode batch is halved for the tail, down to this."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a call of `sample` stands: rollouts finished and in all, tokens generated, seconds since it began."""

    finished: int
    total: int
    tokens: int
    seconds: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """The decode batch on the device.

    Attributes:
      cache: of everything read so far.
      hidden_BD: the stream at each row's last token, from which the next one is drawn.
      groups_B, indices_B: int32, which rollout a row belongs to.
      counts_B: int32, tokens generated.
      alive_B: bool, False for rows that are finished or empty.
    """

    cache: Cache
    hidden_BD: jax.Array
    groups_B: jax.Array
    indices_B: jax.Array
    counts_B: jax.Array
    alive_B: jax.Array


@dataclasses.dataclass
class _Open:
    """A rollout in the making, on the host."""

    group: int
    index: int
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Sampler:
    """Samples rollouts of one model. It holds compiled programs but no weights and no state between calls.

    Args:
      model: a `discover_jax.models.gpt_oss.Model`.
      slots: rows decoded at once.
      max_prompt_tokens: longest prompt.
      max_new_tokens: budget of a rollout; the stop token counts.
      temperature: logits are divided by it.
      stop_ids: tokens that end a rollout.
      launch_steps: tokens decoded between two looks of the host.

    Raises:
      ConfigError: a number out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        launch_steps: int = 32,
    ):
        numbers = {"slots": slots, "max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens, "launch_steps": launch_steps}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name} = {value!r} cannot be used by the sampler; it must be at least 1.")
        if not temperature > 0:
            raise ConfigError(f"temperature = {temperature!r} cannot be used by the sampler; it must be above 0.")
        if not stop_ids:
            raise ConfigError("The sampler was given no stop token, so every rollout would spend its whole budget; give at least one.")
        self._model = model
        self._slots = slots
        self._max_prompt = max_prompt_tokens
        self._max_new = max_new_tokens
        self._temperature = temperature
        self._stop_ids = tuple(int(token) for token in stop_ids)
        self._launch_steps = launch_steps
        self.compilations = 0
        """Programs compiled so far: it must not grow after the first steps of a run."""

        self._read = jax.jit(self._counted(self._read_prompts, "prefill"), static_argnames="capacity")
        self._launch = jax.jit(self._counted(self._decode_launch, "decode"), donate_argnames="slots")
        self._fill = jax.jit(self._counted(self._fill_slots, "fill"), donate_argnames="slots")
        self._shape = jax.jit(self._counted(self._reshape_slots, "reshape"), static_argnames="capacity")

    def sample(
        self,
        frozen: Any,
        lora: Any,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int,
        step: int,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Rollout]:
        """Yields `group_size` rollouts for each prompt, each as soon as it is finished.

        Args:
          frozen, lora: weights; `lora` may be None.
          prompts: one for each group, in any order of group numbers.
          group_size: rollouts of a prompt.
          seed, step: fold into every draw.
          on_progress: called after each launch.

        Raises:
          CapacityError: a prompt is empty or longer than `max_prompt_tokens`.
        """
        for prompt in prompts:
            if not 1 <= len(prompt.tokens_P) <= self._max_prompt:
                raise CapacityError(
                    f"The prompt of group {prompt.group} has {len(prompt.tokens_P)} tokens; the sampler takes 1 to {self._max_prompt}."
                    " Raise config.sampling.max_prompt_tokens."
                )
        return self._run(frozen, lora, list(prompts), group_size, seed, step, on_progress)

    def _run(self, frozen, lora, prompts: list[Prompt], group_size: int, seed: int, step: int, on_progress) -> Iterator[Rollout]:
        start, tokens, finished = time.monotonic(), 0, 0
        total = len(prompts) * group_size
        if not total:
            return
        queue = collections.deque((row, index) for row in range(len(prompts)) for index in range(group_size))
        prompt_hidden, prompt_cache = self._read_all(frozen, lora, prompts)
        rows = min(self._slots, total)
        open_B: list[_Open | None] = [None] * rows
        slots = self._empty(rows, prompt_cache.capacity)
        seed_array, step_array = jnp.uint32(seed), jnp.uint32(step)
        while queue or any(open_B):
            slots, open_B = self._refill(slots, open_B, queue, prompts, prompt_hidden, prompt_cache)
            slots, open_B = self._fit(slots, open_B, queue, prompts)
            before_B = np.asarray(slots.counts_B)
            slots, tokens_BT, logprobs_BT = self._launch(frozen, lora, slots, seed_array, step_array)
            alive_B, after_B, tokens_BT, logprobs_BT = jax.device_get((slots.alive_B, slots.counts_B, tokens_BT, logprobs_BT))
            done = []
            for row, rollout in enumerate(open_B):
                if rollout is None:
                    continue
                new = int(after_B[row] - before_B[row])
                rollout.tokens.append(tokens_BT[row, :new])
                rollout.logprobs.append(logprobs_BT[row, :new])
                tokens += new
                if not alive_B[row]:
                    done.append(self._close(rollout, prompts))
                    open_B[row] = None
            finished += len(done)
            if on_progress is not None:
                on_progress(Progress(finished, total, tokens, time.monotonic() - start))
            yield from done

    # The host's side

    def _read_all(self, frozen, lora, prompts: list[Prompt]) -> tuple[jax.Array, Cache]:
        """The stream at the end of every prompt, and a cache with a row for each."""
        length = _round_up(max(len(prompt.tokens_P) for prompt in prompts), PROMPT_BUCKET)
        capacity = _round_up(length, CACHE_BUCKET)
        parts = []
        for first in range(0, len(prompts), PROMPT_ROWS):
            chunk = prompts[first : first + PROMPT_ROWS]
            tokens_RP = np.zeros((min(PROMPT_ROWS, len(prompts)), length), np.int32)
            lengths_R = np.ones(len(tokens_RP), np.int32)
            for row, prompt in enumerate(chunk):
                tokens_RP[row, : len(prompt.tokens_P)] = prompt.tokens_P
                lengths_R[row] = len(prompt.tokens_P)
            parts.append(self._read(frozen, lora, tokens_RP, lengths_R, capacity=capacity))
        hidden = jnp.concatenate([hidden for hidden, _ in parts])
        caches = [cache for _, cache in parts]
        fields = {
            field.name: jnp.concatenate([getattr(cache, field.name) for cache in caches], axis=0 if field.name == "lengths_B" else 1)
            for field in dataclasses.fields(Cache)
        }
        return hidden, Cache(**fields)

    def _empty(self, rows: int, capacity: int) -> _Slots:
        hidden = jnp.zeros((rows, self._model.config.width), self._model.dtype)
        groups, indices, counts = (jnp.zeros(rows, jnp.int32) for _ in range(3))  # three buffers, since each is donated
        return _Slots(self._model.init_cache(rows, capacity), hidden, groups, indices, counts, jnp.zeros(rows, bool))

    def _refill(self, slots: _Slots, open_B: list[_Open | None], queue, prompts, prompt_hidden, prompt_cache):
        """Gives every free slot the next rollout of the queue."""
        free = [row for row, rollout in enumerate(open_B) if rollout is None][: len(queue)]
        if not free:
            return slots, open_B
        # Padded to the batch so that one shape is compiled: places past the end are dropped.
        rows = len(open_B)
        targets, sources, groups, indices = (np.zeros(rows, np.int32) for _ in range(4))
        targets[:] = rows
        open_B = list(open_B)
        for place, row in enumerate(free):
            source, index = queue.popleft()
            group = prompts[source].group
            targets[place], sources[place], groups[place], indices[place] = row, source, group, index
            open_B[row] = _Open(source, index)
        return self._fill(slots, targets, sources, groups, indices, prompt_hidden, prompt_cache), open_B

    def _fit(self, slots: _Slots, open_B: list[_Open | None], queue, prompts: list[Prompt]):
        """Halves the batch when the tail is short enough, and grows the cache to what the next launch may need."""
        live = [row for row, rollout in enumerate(open_B) if rollout is not None]
        rows = len(open_B)
        while not queue and rows // 2 >= max(FEWEST_ROWS, len(live)):
            rows //= 2
        longest = max(len(prompts[rollout.group].tokens_P) + sum(map(len, rollout.tokens)) for rollout in open_B if rollout is not None)
        needed = min(longest + self._launch_steps, self._max_prompt + self._max_new)
        capacity = max(slots.cache.capacity, _round_up(needed, CACHE_BUCKET))
        if rows == len(open_B) and capacity == slots.cache.capacity:
            return slots, open_B
        keep = list(range(len(open_B))) if rows == len(open_B) else (live + [r for r in range(len(open_B)) if r not in live])[:rows]
        return self._shape(slots, np.asarray(keep, np.int32), capacity=capacity), [open_B[row] for row in keep]

    def _close(self, rollout: _Open, prompts: list[Prompt]) -> Rollout:
        tokens_T = np.concatenate(rollout.tokens).astype(np.int32)
        prompt = prompts[rollout.group]
        return Rollout(
            group=prompt.group,
            index=rollout.index,
            prompt_tokens_P=np.asarray(prompt.tokens_P, np.int32),
            tokens_T=tokens_T,
            logprobs_T=np.concatenate(rollout.logprobs).astype(np.float32),
            chosen_T=np.ones(len(tokens_T), bool),
            stop=StopReason.STOP_TOKEN if int(tokens_T[-1]) in self._stop_ids else StopReason.MAX_TOKENS,
        )

    # The device's side

    def _counted(self, function: Callable, name: str) -> Callable:
        """The function, counting how often it is traced, which is once for each compiled program."""

        @functools.wraps(function)
        def traced(*args, **kwargs):
            self.compilations += 1
            logging.debug("sampler compiles %s", name)
            return function(*args, **kwargs)

        return traced

    def _read_prompts(self, frozen, lora, tokens_RP: jax.Array, lengths_R: jax.Array, capacity: int) -> tuple[jax.Array, Cache]:
        return self._model.prefill(frozen, lora, tokens_RP, lengths_R, capacity)

    def _fill_slots(self, slots: _Slots, targets, sources, groups, indices, prompt_hidden, prompt_cache: Cache) -> _Slots:
        new = take_rows(with_capacity(prompt_cache, slots.cache.capacity), sources)

        def put(into: jax.Array, values) -> jax.Array:
            return into.at[targets].set(values, mode="drop")

        return _Slots(
            cache=put_rows(slots.cache, targets, new),
            hidden_BD=put(slots.hidden_BD, prompt_hidden[sources]),
            groups_B=put(slots.groups_B, groups),
            indices_B=put(slots.indices_B, indices),
            counts_B=put(slots.counts_B, 0),
            alive_B=put(slots.alive_B, True),
        )

    def _reshape_slots(self, slots: _Slots, keep_R: jax.Array, capacity: int) -> _Slots:
        rest = {field.name: getattr(slots, field.name)[keep_R] for field in dataclasses.fields(_Slots) if field.name != "cache"}
        return _Slots(cache=with_capacity(take_rows(slots.cache, keep_R), capacity), **rest)

    def _decode_launch(self, frozen, lora, slots: _Slots, seed: jax.Array, step: jax.Array) -> tuple[_Slots, jax.Array, jax.Array]:
        """Up to `launch_steps` tokens for every live row: the slots, tokens [B, steps] and their log-probabilities.

        A row's new tokens come first in its line; how many there are is the growth of its count.
        """
        keys_B = rollout_keys(seed, step, slots.groups_B, slots.indices_B)
        stop_ids = jnp.asarray(self._stop_ids, jnp.int32)
        rows = slots.alive_B.shape[0]
        tokens_TB = jnp.zeros((self._launch_steps, rows), jnp.int32)
        logprobs_TB = jnp.zeros((self._launch_steps, rows), jnp.float32)

        def going(carry) -> jax.Array:
            i, slots, *_ = carry
            return (i < self._launch_steps) & slots.alive_B.any()

        def one(carry):
            i, slots, tokens_TB, logprobs_TB = carry
            logits_BV = self._model.logits(frozen, lora, slots.hidden_BD)
            tokens_B, logprobs_B = draw_tokens(keys_B, slots.counts_B, logits_BV, self._temperature)
            counts_B = slots.counts_B + slots.alive_B
            stopped_B = (tokens_B[:, None] == stop_ids).any(axis=-1) | (counts_B >= self._max_new)
            hidden_BD, cache = self._model.decode(frozen, lora, tokens_B, slots.cache)
            # A row that is finished stays where it is: its next write falls on the same place.
            cache = dataclasses.replace(cache, lengths_B=jnp.where(slots.alive_B, cache.lengths_B, slots.cache.lengths_B))
            slots = dataclasses.replace(slots, cache=cache, hidden_BD=hidden_BD, counts_B=counts_B, alive_B=slots.alive_B & ~stopped_B)
            return i + 1, slots, tokens_TB.at[i].set(tokens_B), logprobs_TB.at[i].set(logprobs_B)

        _, slots, tokens_TB, logprobs_TB = jax.lax.while_loop(going, one, (jnp.int32(0), slots, tokens_TB, logprobs_TB))
        return slots, tokens_TB.T, logprobs_TB.T

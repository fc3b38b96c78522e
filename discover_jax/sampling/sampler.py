"""The sampler: prompts in, rollouts out as they finish. One decode batch of slots, refilled at once; it knows nothing of text.

A group's prompt is read once and its cache rows are copied to the group's rollouts. Decoding runs in launches: one jitted loop of up to a
fixed number of tokens, which ends early once enough rows are finished. Between launches the host takes out what finished and refills the
slots from a queue in fixed order. Scheduling depends on tokens only, never on the clock, so a resumed run repeats it.

Compiled shapes are few: a prefill for each bucket of prompt lengths, and a decode loop for each batch size (the slots, and their halves
for the tail). The cache always has its full capacity; attention stops at the longest row (see kernels.attention).
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
from discover_jax.models.cache import Cache, put_rows, take_rows
from discover_jax.models.sharding import sharding_for
from discover_jax.sampling.draw import draw_tokens, rollout_keys
from discover_jax.types import Program, Prompt, Rollout, StopReason

PROMPT_BUCKET = 128
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""
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


@dataclasses.dataclass(frozen=True)
class SecondPhase:
    """Makes a rollout that thinks too long begin its answer. Forced tokens are not the policy's choice and bear no log-probability.

    Attributes:
      after: tokens of the first phase; a rollout that has not begun its answer by then is given the forced tokens, then goes on freely.
      opening: tokens in a row with which an answer begins; the first of them is not among the others.
      forced: what is given; it ends in `opening` and holds no stop token.

    Raises:
      ConfigError: one of these does not hold.
    """

    after: int
    opening: tuple[int, ...]
    forced: tuple[int, ...]

    def __post_init__(self):
        if self.after < 1:
            raise ConfigError(f"A first phase of {self.after} tokens leaves nothing to sample; it must be at least 1.")
        if not self.opening or self.opening[0] in self.opening[1:]:
            raise ConfigError(f"The opening {self.opening} of an answer must not be empty nor repeat its first token.")
        if self.forced[-len(self.opening) :] != self.opening:
            raise ConfigError(f"The forced tokens {self.forced} must end in the opening {self.opening} of an answer.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """The decode batch on the device.

    Attributes:
      cache: of everything read so far.
      hidden_BD: the stream at each row's last token, from which the next one is drawn.
      groups_B, indices_B: int32, which rollout a row belongs to.
      temperatures_B: float32, that it is sampled at.
      counts_B: int32, tokens generated.
      alive_B: bool, False for rows that are finished or empty.
      opened_B: int32, how many tokens of `SecondPhase.opening` came last; it stays when all came. Always 0 without a second phase.
      forcing_B: bool, whether the last token was forced and the next one may be.
    """

    cache: Cache
    hidden_BD: jax.Array
    groups_B: jax.Array
    indices_B: jax.Array
    temperatures_B: jax.Array
    counts_B: jax.Array
    alive_B: jax.Array
    opened_B: jax.Array
    forcing_B: jax.Array


@dataclasses.dataclass
class _Open:
    """A rollout in the making, on the host: the place of its prompt, its index in the group, and what it has so far."""

    place: int
    index: int
    temperature: float
    count: int = 0
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    chosen: list[np.ndarray] = dataclasses.field(default_factory=list)


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
      temperature_spread: the rollouts of a group get temperatures from (1 - spread) to (1 + spread) times that, evenly in their order.
      stop_ids: tokens that end a rollout.
      second_phase: for rollouts that think too long; None: they may spend their whole budget.
      launch_steps: at most so many tokens a row are decoded between two looks of the host.

    Raises:
      ConfigError: a number out of range, or a second phase that does not fit into the budget.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        temperature: float,
        temperature_spread: float = 0.0,
        stop_ids: Sequence[int],
        second_phase: SecondPhase | None = None,
        launch_steps: int = 32,
    ):
        numbers = {"slots": slots, "max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens, "launch_steps": launch_steps}
        for name, value in numbers.items():
            if value < 1:
                raise ConfigError(f"{name} = {value!r} cannot be used by the sampler; it must be at least 1.")
        if not temperature > 0:
            raise ConfigError(f"temperature = {temperature!r} cannot be used by the sampler; it must be above 0.")
        if not 0 <= temperature_spread < 1:
            raise ConfigError(f"temperature_spread = {temperature_spread!r} cannot be used by the sampler; it must be from 0 to below 1.")
        if not stop_ids:
            raise ConfigError("The sampler was given no stop token, so every rollout would spend its whole budget; give at least one.")
        if second_phase is not None:
            if (needed := second_phase.after + len(second_phase.forced) + 1) > max_new_tokens:
                raise ConfigError(
                    f"A first phase of {second_phase.after} tokens and {len(second_phase.forced)} forced ones leave no room for an answer"
                    f" in max_new_tokens = {max_new_tokens}; it must be at least {needed}, or the first phase shorter."
                )
            if forbidden := set(second_phase.forced) & set(stop_ids):
                raise ConfigError(f"The forced tokens hold the stop tokens {sorted(forbidden)}, so that no answer could follow them.")
        self._second_phase = second_phase
        self._model = model
        self._slots = slots
        self._max_prompt = max_prompt_tokens
        self._max_new = max_new_tokens
        self._temperature, self._spread = temperature, temperature_spread
        self._stop_ids = tuple(int(token) for token in stop_ids)
        self._launch_steps = launch_steps
        self._capacity = _round_up(max_prompt_tokens + max_new_tokens, PROMPT_BUCKET)
        self.compilations = 0
        """Programs compiled so far: it must not grow after the first steps of a run."""

        self._read = jax.jit(self._counted(self._read_prompts, "prefill"), static_argnames="capacity")
        self._launch = jax.jit(self._counted(self._decode_launch, "decode"), donate_argnames="slots")
        self._fill = jax.jit(self._counted(self._fill_slots, "fill"), donate_argnames="slots")
        self._take = jax.jit(self._counted(self._take_slots, "take"))

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
          prompts: one for each group, in any order of group numbers; rollouts are begun in the order given.
          group_size: rollouts of a prompt.
          seed, step: fold into every draw.
          on_progress: called after each launch.

        Raises:
          CapacityError: a prompt is empty or longer than `max_prompt_tokens`.
          ConfigError: two prompts have one group number, so that their rollouts would draw alike.
        """
        groups = [prompt.group for prompt in prompts]
        if len(set(groups)) != len(groups):
            raise ConfigError(f"The sampler was given prompts of groups {groups}; each group number may occur once. Number them apart.")
        for prompt in prompts:
            if not 1 <= len(prompt.tokens_P) <= self._max_prompt:
                raise CapacityError(
                    f"The prompt of group {prompt.group} has {len(prompt.tokens_P)} tokens; the sampler takes 1 to {self._max_prompt}."
                    " Raise config.sampling.max_prompt_tokens."
                )
        return self._run(frozen, lora, list(prompts), group_size, seed, step, on_progress)

    def _run(
        self,
        frozen: Any,
        lora: Any,
        prompts: list[Prompt],
        group_size: int,
        seed: int,
        step: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[Rollout]:
        start, tokens, finished = time.monotonic(), 0, 0
        total = len(prompts) * group_size
        if not total:
            return
        temperatures_K = self._temperatures(group_size)
        queue = collections.deque(
            _Open(place, index, temperature) for place in range(len(prompts)) for index, temperature in enumerate(temperatures_K)
        )
        prompt_hidden, prompt_cache = self._read_all(frozen, lora, prompts)
        open_B: list[_Open | None] = [None] * min(self._slots, total)
        slots = self._empty(len(open_B))
        seed_array, step_array = jnp.uint32(seed), jnp.uint32(step)
        while queue or any(open_B):
            slots = self._refill(slots, open_B, queue, prompts, prompt_hidden, prompt_cache)
            if not queue:
                slots, open_B = self._shrink(slots, open_B)
            enough = jnp.int32(self._live_rows_that_end_a_launch(len(open_B), waiting=bool(queue)))
            slots, drawn = self._launch(frozen, lora, slots, seed_array, step_array, enough)
            alive_B, counts_B, tokens_BT, logprobs_BT, chosen_BT = jax.device_get((slots.alive_B, slots.counts_B, *drawn))
            done = []
            for row, rollout in enumerate(open_B):
                if rollout is None:
                    continue
                new = int(counts_B[row]) - rollout.count
                rollout.count += new
                rollout.tokens.append(tokens_BT[row, :new])
                rollout.logprobs.append(logprobs_BT[row, :new])
                rollout.chosen.append(chosen_BT[row, :new])
                tokens += new
                if not alive_B[row]:
                    done.append(self._close(rollout, prompts))
                    open_B[row] = None
            finished += len(done)
            if on_progress is not None:
                on_progress(Progress(finished, total, tokens, time.monotonic() - start))
            yield from done

    def programs(self, frozen: Any, lora: Any, prompts: int, rollouts: int) -> Iterator[Program]:
        """The programs of one call of `sample`, for the longest prompts that it takes, to be compiled without being run.

        Args:
          frozen, lora: abstract weights, laid out as the real ones will be.
          prompts, rollouts: of the call.

        Raises:
          ShardingError: slots or heads do not divide by their axes of the model's mesh.
        """
        length = _round_up(self._max_prompt, PROMPT_BUCKET)
        rows, at_once = min(self._slots, rollouts), min(PROMPT_ROWS, prompts)
        hidden = jax.ShapeDtypeStruct((prompts, self._model.config.width), self._model.dtype)
        of_prompts = hidden, self._model.abstract_cache(_round_up(prompts, at_once), length, "prompts")
        slots = self._abstract_slots(rows)

        def ids(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        reading = self._read.lower(frozen, lora, ids(at_once, length), ids(at_once), capacity=length)
        yield Program("prefill", reading, {"cache": of_prompts})
        filling = self._fill.lower(slots, *(ids(rows) for _ in range(4)), ids(rows, dtype=jnp.float32), *of_prompts)
        yield Program("fill", filling, {"cache": (slots, of_prompts)})
        decoding = self._launch.lower(frozen, lora, slots, ids(dtype=jnp.uint32), ids(dtype=jnp.uint32), ids())
        yield Program("decode", decoding, {"cache": (slots, of_prompts)})
        if (fewer := rows // 2) >= FEWEST_ROWS:
            yield Program("shrink", self._take.lower(slots, ids(fewer)), {"cache": (slots, of_prompts)})

    # The host's side

    def _temperatures(self, group_size: int) -> list[float]:
        """Of the rollouts of a group, in float32's precision, so that sampler and update divide by the same numbers."""
        places_K = np.linspace(-1.0, 1.0, group_size) if group_size > 1 else np.zeros(1)
        return (self._temperature * (1.0 + self._spread * places_K)).astype(np.float32).tolist()

    def _read_all(self, frozen: Any, lora: Any, prompts: list[Prompt]) -> tuple[jax.Array, Cache]:
        """The stream at the end of every prompt, and a cache with a row for each."""
        length = _round_up(max(len(prompt.tokens_P) for prompt in prompts), PROMPT_BUCKET)
        parts = []
        for first in range(0, len(prompts), PROMPT_ROWS):
            chunk = prompts[first : first + PROMPT_ROWS]
            tokens_RP = np.zeros((min(PROMPT_ROWS, len(prompts)), length), np.int32)
            lengths_R = np.ones(len(tokens_RP), np.int32)
            for row, prompt in enumerate(chunk):
                tokens_RP[row, : len(prompt.tokens_P)] = prompt.tokens_P
                lengths_R[row] = len(prompt.tokens_P)
            parts.append(self._read(frozen, lora, tokens_RP, lengths_R, capacity=length))
        hidden = jnp.concatenate([hidden for hidden, _ in parts])
        caches = [cache for _, cache in parts]
        fields = {
            field.name: jnp.concatenate([getattr(cache, field.name) for cache in caches], axis=0 if field.name == "lengths_B" else 1)
            for field in dataclasses.fields(Cache)
        }
        return hidden, Cache(**fields)

    def _empty(self, rows: int) -> _Slots:
        hidden = jnp.zeros((rows, self._model.config.width), self._model.dtype)
        # A buffer for each, since each is donated.
        groups, indices, counts, opened = (jnp.zeros(rows, jnp.int32) for _ in range(4))
        alive, forcing = (jnp.zeros(rows, bool) for _ in range(2))
        temperatures = jnp.ones(rows, jnp.float32)
        return _Slots(self._model.init_cache(rows, self._capacity), hidden, groups, indices, temperatures, counts, alive, opened, forcing)

    def _abstract_slots(self, rows: int) -> _Slots:
        """Shapes of `_empty`, laid out over the model's mesh if it has one."""
        slots, mesh = jax.eval_shape(lambda: self._empty(rows)), self._model.mesh
        if mesh is None:
            return slots

        def lay_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = ("batch", "width")[: leaf.ndim]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_for(axes, leaf.shape, mesh))

        rest: dict[str, Any] = {f.name: lay_out(getattr(slots, f.name)) for f in dataclasses.fields(_Slots) if f.name != "cache"}
        return _Slots(cache=self._model.abstract_cache(rows, self._capacity), **rest)

    def _refill(
        self,
        slots: _Slots,
        open_B: list[_Open | None],
        queue: collections.deque[_Open],
        prompts: list[Prompt],
        prompt_hidden: jax.Array,
        prompt_cache: Cache,
    ) -> _Slots:
        """Gives every free slot the next rollout of the queue, and notes it in `open_B`."""
        free = [row for row, rollout in enumerate(open_B) if rollout is None][: len(queue)]
        if not free:
            return slots
        # Padded to the batch so that one shape is compiled: rows past the end are dropped.
        rows_B = np.full(len(open_B), len(open_B), np.int32)
        places_B, groups_B, indices_B = (np.zeros(len(open_B), np.int32) for _ in range(3))
        temperatures_B = np.ones(len(open_B), np.float32)
        for i, row in enumerate(free):
            rollout = open_B[row] = queue.popleft()
            rows_B[i], places_B[i], groups_B[i], indices_B[i] = row, rollout.place, prompts[rollout.place].group, rollout.index
            temperatures_B[i] = rollout.temperature
        return self._fill(slots, rows_B, places_B, groups_B, indices_B, temperatures_B, prompt_hidden, prompt_cache)

    def _shrink(self, slots: _Slots, open_B: list[_Open | None]) -> tuple[_Slots, list[_Open | None]]:
        """Halves the batch for as long as its live rows fit."""
        live = [row for row, rollout in enumerate(open_B) if rollout is not None]
        rows = len(open_B)
        while rows // 2 >= max(FEWEST_ROWS, len(live)):
            rows //= 2
        if rows == len(open_B):
            return slots, open_B
        keep_R = (live + [row for row, rollout in enumerate(open_B) if rollout is None])[:rows]
        return self._take(slots, np.asarray(keep_R, np.int32)), [open_B[row] for row in keep_R]

    def _live_rows_that_end_a_launch(self, rows: int, *, waiting: bool) -> int:
        """A launch ends early when no more rows than this are live: a quarter can be refilled, or in the tail the batch can be halved."""
        if waiting:
            return rows - max(1, rows // 4)
        return rows // 2 if rows // 2 >= FEWEST_ROWS else 0

    def _close(self, rollout: _Open, prompts: list[Prompt]) -> Rollout:
        tokens_T = np.concatenate(rollout.tokens).astype(np.int32)
        prompt = prompts[rollout.place]
        return Rollout(
            group=prompt.group,
            index=rollout.index,
            prompt_tokens_P=np.asarray(prompt.tokens_P, np.int32),
            tokens_T=tokens_T,
            logprobs_T=np.concatenate(rollout.logprobs).astype(np.float32),
            chosen_T=np.concatenate(rollout.chosen),
            stop=StopReason.STOP_TOKEN if int(tokens_T[-1]) in self._stop_ids else StopReason.MAX_TOKENS,
            temperature=rollout.temperature,
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

    def _fill_slots(
        self,
        slots: _Slots,
        rows_R: jax.Array,
        places_R: jax.Array,
        groups_R: jax.Array,
        indices_R: jax.Array,
        temperatures_R: jax.Array,
        prompt_hidden: jax.Array,
        prompt_cache: Cache,
    ) -> _Slots:
        def put(into: jax.Array, values: jax.Array | int | bool) -> jax.Array:
            return into.at[rows_R].set(values, mode="drop")

        return _Slots(
            cache=put_rows(slots.cache, rows_R, take_rows(prompt_cache, places_R)),
            hidden_BD=put(slots.hidden_BD, prompt_hidden[places_R]),
            groups_B=put(slots.groups_B, groups_R),
            indices_B=put(slots.indices_B, indices_R),
            temperatures_B=put(slots.temperatures_B, temperatures_R),
            counts_B=put(slots.counts_B, 0),
            alive_B=put(slots.alive_B, True),
            opened_B=put(slots.opened_B, 0),
            forcing_B=put(slots.forcing_B, False),
        )

    def _take_slots(self, slots: _Slots, keep_R: jax.Array) -> _Slots:
        rest = {field.name: getattr(slots, field.name)[keep_R] for field in dataclasses.fields(_Slots) if field.name != "cache"}
        return _Slots(cache=take_rows(slots.cache, keep_R), **rest)

    def _force(self, slots: _Slots, tokens_B: jax.Array, logprobs_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Puts forced tokens in the place of drawn ones: tokens, log-probabilities, `opened_B` and `forcing_B` after them, each [B]."""
        phase = self._second_phase
        if phase is None:
            return tokens_B, logprobs_B, slots.opened_B, slots.forcing_B
        forced, opening = (jnp.asarray(ids, jnp.int32) for ids in (phase.forced, phase.opening))
        since_B = slots.counts_B - phase.after
        forcing_B = (slots.forcing_B | ((since_B == 0) & (slots.opened_B < len(opening)))) & (since_B < len(forced))
        tokens_B = jnp.where(forcing_B, forced.at[since_B].get(mode="clip"), tokens_B)
        # What follows the opening in a row: its next token, or, if another one came, its first.
        next_B = jnp.where(
            tokens_B == opening.at[slots.opened_B].get(mode="clip"), slots.opened_B + 1, (tokens_B == opening[0]).astype(jnp.int32)
        )
        opened_B = jnp.where(slots.opened_B == len(opening), slots.opened_B, next_B)
        return tokens_B, jnp.where(forcing_B, 0.0, logprobs_B), opened_B, forcing_B

    def _decode_launch(
        self, frozen: Any, lora: Any, slots: _Slots, seed: jax.Array, step: jax.Array, enough: jax.Array
    ) -> tuple[_Slots, tuple[jax.Array, jax.Array, jax.Array]]:
        """Up to `launch_steps` tokens for every live row, until only `enough` rows are live: the slots, and tokens, log-probabilities and
        whether they were chosen, [B, launch_steps]. A row's new tokens come first in its line; how many is the growth of its count."""
        keys_B = rollout_keys(seed, step, slots.groups_B, slots.indices_B)
        stop_ids = jnp.asarray(self._stop_ids, jnp.int32)
        rows = slots.alive_B.shape[0]
        tokens_TB = jnp.zeros((self._launch_steps, rows), jnp.int32)
        logprobs_TB = jnp.zeros((self._launch_steps, rows), jnp.float32)
        chosen_TB = jnp.ones((self._launch_steps, rows), bool)

        def going(carry: tuple[jax.Array, _Slots, tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
            i, slots, _ = carry
            return (i < self._launch_steps) & (slots.alive_B.sum() > enough)

        def one(
            carry: tuple[jax.Array, _Slots, tuple[jax.Array, jax.Array, jax.Array]],
        ) -> tuple[jax.Array, _Slots, tuple[jax.Array, jax.Array, jax.Array]]:
            i, slots, (tokens_TB, logprobs_TB, chosen_TB) = carry
            logits_BV = self._model.logits(frozen, lora, slots.hidden_BD)
            tokens_B, logprobs_B = draw_tokens(keys_B, slots.counts_B, logits_BV, slots.temperatures_B)
            tokens_B, logprobs_B, opened_B, forcing_B = self._force(slots, tokens_B, logprobs_B)
            counts_B = slots.counts_B + slots.alive_B
            stopped_B = (tokens_B[:, None] == stop_ids).any(axis=-1) | (counts_B >= self._max_new)
            hidden_BD, cache = self._model.decode(frozen, lora, tokens_B, slots.cache)
            # A finished row goes back to length 0: it may write there as it likes, and attention need not read as far as it had come.
            cache = dataclasses.replace(cache, lengths_B=jnp.where(slots.alive_B & ~stopped_B, cache.lengths_B, 0))
            slots = _Slots(
                cache=cache,
                hidden_BD=hidden_BD,
                groups_B=slots.groups_B,
                indices_B=slots.indices_B,
                temperatures_B=slots.temperatures_B,
                counts_B=counts_B,
                alive_B=slots.alive_B & ~stopped_B,
                opened_B=opened_B,
                forcing_B=forcing_B,
            )
            drawn = tokens_TB.at[i].set(tokens_B), logprobs_TB.at[i].set(logprobs_B), chosen_TB.at[i].set(~forcing_B)
            return i + 1, slots, drawn

        _, slots, (tokens_TB, logprobs_TB, chosen_TB) = jax.lax.while_loop(
            going, one, (jnp.int32(0), slots, (tokens_TB, logprobs_TB, chosen_TB))
        )
        return slots, (tokens_TB.T, logprobs_TB.T, chosen_TB.T)

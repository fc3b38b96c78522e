"""The sampler: takes prompts and yields rollouts as they finish. It decodes one batch of slots and refills a slot when its rollout ends.

Decoding runs in launches. A launch is one jitted loop over up to a fixed number of tokens; it ends early once enough rows are finished.
`schedule` decides what happens between launches. It depends only on tokens and the number of pages, never on the clock, so a resumed run
repeats it.

Few shapes are compiled: one chunk of a prompt, and a decode loop for each batch size (all slots, then half as many, and so on for the
tail), for small batches with drafts instead (see `drafts`). The cache always has its full capacity; attention reads only the pages in use.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.kernels.spread import row_devices
from discover_jax.models.cache import Cache, Pool, put_pages, take_pages
from discover_jax.models.decoder import Model
from discover_jax.models.rounding import EXACT_ROUNDING
from discover_jax.models.sharding import replicated, shardings
from discover_jax.sampling.decoding import Rows, SecondPhase, abstract_rows, decode_launch, empty_rows, put_row, take_rows
from discover_jax.sampling.draft_sizes import MOST_DRAFT, draft_rows, largest_with_drafts, rows_of
from discover_jax.sampling.drafts import draft_launch
from discover_jax.sampling.schedule import MOVED_PAGES, PAGE, Progress, SamplerFunctions, Schedule, ScheduleLimits, half_of, pages_of
from discover_jax.types import LoweredFunction, Prompt, Rollout

PROMPT_CHUNK = 512
"""Most prompt tokens that one prefill reads; a multiple of the page size."""
LAUNCH_STEPS = 32
"""Default limit on the tokens per row of a launch."""
LAUNCH_TOKENS = 4
"""Tokens per row of a launch with drafts, relative to one without: a row whose drafts are accepted needs fewer passes."""
_COLLECTIVES_IN_GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,COLLECTIVES"}
"""XLA's default list plus COLLECTIVES. By default XLA ends a CUDA graph at each collective, and decoding has two per layer. On two H200s,
the 120b with 128 rows loses 0.8 of 15.6 ms per decoding step to this."""


def most_pages(slots: int, max_prompt_tokens: int, max_new_tokens: int) -> int:
    """Pages of a device with which its `slots` never wait for a page. With `most_pages(1, ...)` it can sample one rollout at a time."""
    # The prompt keeps its own pages until all rollouts of its group have begun.
    return slots * pages_of(max_prompt_tokens + max_new_tokens) + pages_of(max_prompt_tokens)


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value!r}.")


def _check_drafts(draft_tokens: int) -> None:
    if not 0 <= draft_tokens <= MOST_DRAFT:
        raise ConfigError(f"draft_tokens must be from 0 to {MOST_DRAFT}; got {draft_tokens!r}.")


def _check_temperatures(temperature: float, spread: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0; got {temperature!r}.")
    if not 0 <= spread < 1:
        raise ConfigError(f"temperature_spread must be at least 0 and below 1; got {spread!r}.")


def _check_ends(stop_ids: Sequence[int], second_phase: SecondPhase | None, max_new_tokens: int) -> None:
    if not stop_ids:
        raise ConfigError("stop_ids is empty, so every rollout would spend its whole budget. Pass at least one stop token.")
    if second_phase is None:
        return
    if (needed := second_phase.after + len(second_phase.forced) + 1) > max_new_tokens:
        raise ConfigError(
            f"A first phase of {second_phase.after} tokens and {len(second_phase.forced)} forced tokens leave no room for an answer"
            f" in max_new_tokens = {max_new_tokens}. Set max_new_tokens to at least {needed}, or shorten the first phase."
        )
    if forbidden := set(second_phase.forced) & set(stop_ids):
        raise ConfigError(f"The forced tokens of second_phase must not contain stop tokens; got {sorted(forbidden)}.")


def check_pages(pages: int, devices: int, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Checks that the cache has room for one rollout on each device that has rows.

    Raises:
      CapacityError: it has not.
    """
    if pages < (fewest := devices * most_pages(1, max_prompt_tokens, max_new_tokens)):
        on_each = f" on each of {devices} devices" if devices > 1 else ""
        raise CapacityError(
            f"The cache has {pages * PAGE:,} tokens but needs at least {fewest * PAGE:,}: room for one rollout of up to"
            f" {max_prompt_tokens:,} + {max_new_tokens:,} tokens and its prompt{on_each}. Lower config.sampling.max_new_tokens or"
            " max_prompt_tokens, or raise config.sampling.cache_tokens."
        )


def _put(model: Model, pool: Pool, rows: Rows, one: Rows, slot: jax.Array, source: jax.Array, target: jax.Array) -> tuple[Pool, Rows]:
    return model.copy_page(pool, source, target), put_row(rows, slot, one)


class Sampler:
    """Samples rollouts of one model. It has jitted functions, but no weights and no state between calls.

    Args:
      slots: rows of the decode batch. On a mesh, the rows and their pages are spread over the data and expert axes
        (`kernels.spread.row_devices`), and the number of rows is rounded up to a multiple of the devices.
      max_prompt_tokens: longest prompt.
      max_new_tokens: budget of a rollout, including the stop token.
      temperature: logits are divided by it.
      temperature_spread: rollouts of a group get temperatures evenly spaced from (1 - spread) to (1 + spread) times `temperature`.
      stop_ids: tokens that end a rollout.
      second_phase: ends the thinking of rollouts that think too long. None: they may spend their whole budget on thinking.
      launch_steps: most tokens that one launch decodes per row.
      pages: pages of `PAGE` tokens in the cache, for all slots, rounded down to equal parts per device. None: as many as the slots can
        need.
      record_routes: whether rollouts record which experts each token was routed to, so that the update can repeat the routing.
      draft_tokens: tokens of a draft (see `drafts`); 0 for no drafts. They are used while the batch has at most
        `draft_rows(draft_tokens)` rows.

    Raises:
      ConfigError: a number is out of range, or the second phase does not fit the budget.
      CapacityError: the cache is too small for one rollout.
      ShardingError: heads are not divisible by their axis of the model's mesh.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        temperature: float,
        temperature_spread: float = 0.0,
        stop_ids: Sequence[int],
        second_phase: SecondPhase | None = None,
        launch_steps: int = LAUNCH_STEPS,
        pages: int | None = None,
        record_routes: bool = True,
        draft_tokens: int = 0,
    ):
        _check_at_least_one(slots=slots, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, launch_steps=launch_steps)
        _check_drafts(draft_tokens)
        _check_temperatures(temperature, temperature_spread)
        _check_ends(stop_ids, second_phase, max_new_tokens)
        self._row_devices = row_devices(model.mesh)
        # Collectives in CUDA graphs were never tested across processes.
        on_gpus = model.mesh is not None and jax.default_backend() == "gpu" and jax.process_count() == 1
        self._compiler_options = EXACT_ROUNDING | (_COLLECTIVES_IN_GRAPHS if on_gpus else {})
        if pages is not None:
            check_pages(pages, self._row_devices, max_prompt_tokens, max_new_tokens)
        self._model = model
        self._slots = slots
        self._max_prompt, self._max_new = max_prompt_tokens, max_new_tokens
        self._temperature, self._spread = temperature, temperature_spread
        self._stop_ids = tuple(int(token) for token in stop_ids)
        self._launch_steps = launch_steps
        self._given_pages = pages
        self._record_routes = record_routes
        self._draft_tokens = draft_tokens
        self.compilations = 0
        """Number of compilations so far. It must not grow after the first steps of a run."""

        options: dict[str, Any] = {
            "launch_steps": launch_steps,
            "max_new_tokens": max_new_tokens,
            "stop_ids": self._stop_ids,
            "second_phase": second_phase,
            "record_routes": record_routes,
        }
        ahead = functools.partial(draft_launch, model, draft_tokens=draft_tokens, launch_tokens=self._launch_tokens, **options)
        self._jit_functions(functools.partial(decode_launch, model, **options), ahead)

    @property
    def _launch_tokens(self) -> int:
        """Most tokens of a row in a launch with drafts."""
        return max(LAUNCH_TOKENS * self._launch_steps, self._draft_tokens + 1)

    def _jit_functions(self, launch: Callable, ahead: Callable) -> None:
        """Jits the functions of a launch. On a mesh, every array keeps its layout, and arrays that the host reads are replicated."""
        model = self._model
        whole, pool = replicated(model.mesh), shardings(model.abstract_pool(self._row_devices, PAGE))
        rows, one = (shardings(abstract_rows(model, count)) for count in (2 * self._row_devices, 1))
        read: Any = Cache(pool, one.ring_k_LBKWH, one.ring_v_LBKWH, *(whole, whole))  # type: ignore[arg-type] # layouts, not arrays
        self._prefill = self._jit(model.prefill, "prefill", (whole, read, whole), "cache", taken=(None, None, whole, whole, read))
        self._launch = self._jit(launch, "decode", (pool, rows, whole), "pool", "rows")
        self._draft_launch = self._jit(ahead, "decode with drafts", (pool, rows, whole, whole), "pool", "rows")
        self._put_row = self._jit(functools.partial(_put, model), "put_row", (pool, rows), "pool", "rows")
        self._take_rows = self._jit(take_rows, "take_rows", rows)
        self._take_row = self._jit(take_rows, "take_row", one)
        self._take_pages = self._jit(take_pages, "take_pages", whole)
        self._put_pages = self._jit(put_pages, "put_pages", pool, "pool")

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
        """Yields `group_size` rollouts for each prompt, each as soon as it finishes.

        Args:
          frozen, lora: weights; `lora` may be None.
          prompts: one for each group, in any order of group numbers. Rollouts begin in this order.
          group_size: rollouts per prompt.
          seed, step: folded into the key of every draw.
          on_progress: called after each launch.

        Raises:
          CapacityError: a prompt is empty or longer than `max_prompt_tokens`.
          ConfigError: two prompts have the same group number, so their rollouts would use the same random numbers.
        """
        groups = [prompt.group for prompt in prompts]
        if len(set(groups)) != len(groups):
            raise ConfigError(f"Group numbers of prompts must be unique; got {groups}.")
        for prompt in prompts:
            if not 1 <= len(prompt.tokens_P) <= self._max_prompt:
                raise CapacityError(
                    f"The prompt of group {prompt.group} has {len(prompt.tokens_P)} tokens; allowed: 1 to {self._max_prompt}."
                    " Raise config.sampling.max_prompt_tokens."
                )
        if not prompts or not group_size:
            return iter(())
        seed_array, step_array = jnp.uint32(seed), jnp.uint32(step)
        functions = SamplerFunctions(
            empty_pool=self._empty_pool,
            empty_rows=functools.partial(empty_rows, self._model),
            prefill=functools.partial(self._prefill, frozen, lora),
            launch=lambda *batch: self._launch(frozen, lora, *batch, seed_array, step_array),
            draft_launch=lambda *batch: self._draft_launch(frozen, lora, *batch, seed_array, step_array),
            put_row=self._put_row,
            take_rows=self._take_rows,
            take_row=self._take_row,
            take_pages=self._take_pages,
            put_pages=self._put_pages,
        )
        limits = self._limits(len(prompts) * group_size)
        return Schedule(functions, limits, prompts, self._temperatures(group_size)).run(on_progress)

    def lowered_functions(self, frozen: Any, lora: Any, prompts: int, rollouts: int) -> Iterator[LoweredFunction]:
        """The jitted functions of one call of `sample`, lowered for the longest prompts but not run.

        Args:
          frozen, lora: abstract weights, with the layouts of the real ones.
          prompts, rollouts: numbers of the call.

        Raises:
          ShardingError: slots, pages or heads are not divisible by their axes of the model's mesh.
        """
        del prompts  # they are read one at a time
        limits = self._limits(rollouts)
        batch = limits.slots
        pool = self._model.abstract_pool(limits.pages, PAGE)
        rows, one = (abstract_rows(self._model, count) for count in (batch, 1))

        def ids(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        live = {"cache": (pool, rows)}
        cache = Cache(pool, one.ring_k_LBKWH, one.ring_v_LBKWH, ids(self._row_devices, limits.row_pages), ids(1))
        yield LoweredFunction("prefill", self._prefill.lower(frozen, lora, ids(1, limits.chunk), ids(1), cache), live)
        pages, scalar = ids(batch, limits.row_pages), ids(dtype=jnp.uint32)
        yield LoweredFunction("decode", self._launch.lower(frozen, lora, pool, rows, pages, ids(), scalar, scalar), live)
        yield from self._lowered_drafts(frozen, lora, limits, pool)
        yield LoweredFunction("put", self._put_row.lower(pool, rows, one, ids(), ids(), ids()), live)
        yield LoweredFunction("set aside", self._take_pages.lower(pool, ids(MOVED_PAGES)), live)
        if fewer := half_of(batch, limits.row_devices):
            yield LoweredFunction("shrink", self._take_rows.lower(rows, ids(fewer)), live)

    def _lowered_drafts(self, frozen: Any, lora: Any, limits: ScheduleLimits, pool: Any) -> Iterator[LoweredFunction]:
        """The launch with drafts for the largest batch that uses it, if one does."""
        batch = largest_with_drafts(limits.slots, limits.row_devices, limits.draft_rows)
        if not batch:
            return
        rows = abstract_rows(self._model, batch)
        pages, history = (jax.ShapeDtypeStruct((batch, count), jnp.int32) for count in (limits.row_pages, limits.row_pages * PAGE))
        enough, scalar = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.uint32))
        lowered = self._draft_launch.lower(frozen, lora, pool, rows, pages, history, enough, scalar, scalar)
        yield LoweredFunction("decode with drafts", lowered, {"cache": (pool, rows)})

    def _limits(self, rollouts: int) -> ScheduleLimits:
        slots = rows_of(self._slots, rollouts, self._row_devices)
        devices = self._row_devices
        most = devices * most_pages(slots // devices, self._max_prompt, self._max_new)
        given = most if self._given_pages is None else self._given_pages // devices * devices
        return ScheduleLimits(
            slots=slots,
            row_devices=devices,
            pages=min(most, given),
            row_pages=pages_of(self._max_prompt + self._max_new),
            new_tokens=self._max_new,
            launch_steps=self._launch_steps,
            draft_rows=draft_rows(self._draft_tokens),
            draft_launch_tokens=self._launch_tokens,
            chunk=min(PROMPT_CHUNK, PAGE * pages_of(self._max_prompt)),
            stop_ids=self._stop_ids,
            record_routes=self._record_routes,
        )

    def _empty_pool(self, pages: int) -> Pool:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self._model.abstract_pool(pages, PAGE))

    def _temperatures(self, group_size: int) -> list[float]:
        """Temperatures of a group's rollouts, rounded to float32 so that sampler and update divide by the same numbers."""
        places_K = np.linspace(-1.0, 1.0, group_size) if group_size > 1 else np.zeros(1)
        return (self._temperature * (1.0 + self._spread * places_K)).astype(np.float32).tolist()

    def _jit(self, function: Callable, name: str, layouts: Any, *donated: str, taken: Any = None) -> Any:
        """Jits `function` with these layouts of results and, if `taken` is given, of arguments. Counts its compilations."""

        @functools.wraps(function)
        def traced(*args, **kwargs):
            self.compilations += 1
            logging.debug("sampler compiles %s", name)
            return function(*args, **kwargs)

        options: dict[str, Any] = {} if taken is None else {"in_shardings": taken}
        return jax.jit(traced, out_shardings=layouts, donate_argnames=donated, compiler_options=self._compiler_options, **options)

"""The host side of the sampler: between launches, it assigns rollouts to slots and pages to rollouts.

Between launches, every live row gets the pages that it may need next, and free slots are filled from the queue, both in a fixed order.
A group's prompt is read when its first rollout begins. Its rollouts share the prompt's full pages and copy the last, partial one.

If pages run out, the rollout that began last is set aside: its row and pages move to host memory. It returns to a slot before any new
rollout begins.

Each device has an equal, contiguous part of the slots and of the pages. A row's pages are on the device of its slot. All devices read
every prompt.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from discover_jax.models.cache import Cache, Pool
from discover_jax.models.sharding import fetch
from discover_jax.sampling.decoding import Drawn, Rows, new_rows
from discover_jax.sampling.open_rollout import OpenRollout
from discover_jax.sampling.pages import PageAllocator
from discover_jax.types import Prompt, Rollout

PAGE = 128
"""Tokens per page."""
FEWEST_ROWS = 8
"""Smallest decode batch; the tail does not halve it further."""
MOVED_PAGES = 16
"""Pages per transfer to or from host memory."""


def half_of(rows: int, row_devices: int) -> int:
    """Half of the rows of a batch on `row_devices` devices; 0 if the batch cannot be halved."""
    half = rows // 2
    return half if half >= FEWEST_ROWS and half % row_devices == 0 else 0


def pages_of(tokens: int) -> int:
    """Number of pages for this number of tokens."""
    return -(-tokens // PAGE)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a call of `sample`.

    Attributes:
      finished, total: numbers of rollouts.
      tokens: generated tokens so far.
      seconds: time since the call.
      utilisation: fraction of decoded slots that were live, counted only while rollouts waited for a slot; 1 if none waited.
      set_aside: number of times that a rollout was set aside.
      pages: most pages in use at once.
      passes: of a live row in launches with drafts, summed over rows.
      drafted, accepted: draft tokens, and those of them that were accepted. With drafts, a row got (passes + accepted) tokens.
    """

    finished: int
    total: int
    tokens: int
    seconds: float
    utilisation: float = 1.0
    set_aside: int = 0
    pages: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclasses.dataclass(frozen=True)
class SamplerFunctions:
    """The jitted functions that the schedule calls. Functions of the same names are in `decoding`, `models.cache` and `Model`."""

    empty_pool: Callable[[int], Pool]
    empty_rows: Callable[[int], Rows]
    prefill: Callable[[ArrayLike, ArrayLike, Cache], tuple[jax.Array, Cache, jax.Array]]
    launch: Callable[[Pool, Rows, ArrayLike, ArrayLike], tuple[Pool, Rows, Drawn]]
    draft_launch: Callable[[Pool, Rows, ArrayLike, ArrayLike, ArrayLike], tuple[Pool, Rows, Drawn, jax.Array]]
    put_row: Callable[[Pool, Rows, Rows, int, int, int], tuple[Pool, Rows]]
    take_rows: Callable[[Rows, ArrayLike], Rows]
    take_row: Callable[[Rows, ArrayLike], Rows]
    take_pages: Callable[[Pool, ArrayLike], Pool]
    put_pages: Callable[[Pool, ArrayLike, Pool], Pool]


@dataclasses.dataclass(frozen=True)
class ScheduleLimits:
    """Limits of one call.

    Attributes:
      slots: rows of the decode batch at the start, split equally over the devices.
      row_devices: number of devices over which rows and pages are split.
      pages: total number of pages, split equally over the devices.
      row_pages: most pages of one row.
      new_tokens: token budget of a rollout.
      launch_steps: most tokens that one launch decodes per row.
      draft_rows: most rows of a batch that is decoded with drafts; 0: no batch is.
      draft_launch_tokens: most tokens that one launch with drafts decodes per row.
      chunk: prompt tokens that one prefill reads.
      stop_ids: tokens that end a rollout.
      record_routes: whether rollouts record the experts that tokens were routed to.
    """

    slots: int
    row_devices: int
    pages: int
    row_pages: int
    new_tokens: int
    launch_steps: int
    draft_rows: int
    draft_launch_tokens: int
    chunk: int
    stop_ids: tuple[int, ...]
    record_routes: bool


@dataclasses.dataclass
class _Prefix:
    """A prompt after prefill: the row that its rollouts start from, its pages on each device, and its routes by chunk, if recorded."""

    row: Rows
    pages_R: list[list[int]]
    routes: list[jax.Array]


class Schedule:
    """The state of one call.

    Args:
      functions: the sampler's jitted functions.
      limits: the limits of this call.
      prompts: one per group; rollouts begin in this order.
      temperatures_K: temperatures of the rollouts of every group.
    """

    def __init__(self, functions: SamplerFunctions, limits: ScheduleLimits, prompts: Sequence[Prompt], temperatures_K: Sequence[float]):
        self._do, self._limits, self._prompts = functions, limits, prompts
        self._queue = collections.deque(
            OpenRollout(prompt, prompt_index, index, temperature)
            for prompt_index, prompt in enumerate(prompts)
            for index, temperature in enumerate(temperatures_K)
        )
        self._total = len(self._queue)
        self._aside: list[OpenRollout] = []
        self._begun = 0
        self._prefixes: dict[int, _Prefix] = {}
        each = limits.pages // limits.row_devices
        self._allocators = [PageAllocator(each, device * each) for device in range(limits.row_devices)]
        self._slots: list[OpenRollout | None] = [None] * limits.slots
        self._pool = functions.empty_pool(limits.pages)
        self._rows = functions.empty_rows(len(self._slots))
        self._nobody = functions.empty_rows(1)
        self._busy = self._offered = self._set_asides = 0
        self._drafts = False
        self._draft_sums_3 = np.zeros(3, np.int64)

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> Iterator[Rollout]:
        """Yields each rollout as soon as it is finished."""
        start, tokens, finished = time.monotonic(), 0, 0
        while finished < self._total:
            self._drafts = self._halved() <= self._limits.draft_rows
            self._give_pages()
            self._fill_slots()
            self._shrink()
            if not self._drafts and len(self._slots) <= self._limits.draft_rows:  # the last waiting rollout has begun
                self._drafts = True
                self._give_pages()
            done, new = self._decode()
            finished, tokens = finished + len(done), tokens + new
            if on_progress is not None:
                utilisation = self._busy / self._offered if self._offered else 1.0
                seconds, pages = time.monotonic() - start, sum(allocator.most_in_use for allocator in self._allocators)
                counts = (self._set_asides, pages, *self._draft_sums_3.tolist())
                on_progress(Progress(finished, self._total, tokens, seconds, utilisation, *counts))
            yield from done

    # Pages

    def _needed(self, rollout: OpenRollout, launches: int = 1) -> int:
        """Pages that the rollout needs for the next `launches` launches."""
        tokens = self._limits.draft_launch_tokens if self._drafts else self._limits.launch_steps
        return min(pages_of(rollout.length + launches * tokens), self._most(rollout))

    def _most(self, rollout: OpenRollout) -> int:
        """Most pages that the rollout can need."""
        return pages_of(len(rollout.prompt.tokens_P) + self._limits.new_tokens)

    def _device(self, slot: int) -> int:
        return slot * self._limits.row_devices // len(self._slots)

    def _live(self, device: int) -> list[OpenRollout]:
        """The live rollouts of a device, oldest first."""
        live = [rollout for slot, rollout in enumerate(self._slots) if rollout is not None and self._device(slot) == device]
        return sorted(live, key=lambda rollout: rollout.began)

    def _make_room(self, device: int, count: int, keep: int = -1) -> bool:
        """Whether a device has `count` free pages. If not, first frees all prompts except `keep`; they can be read again."""
        if self._allocators[device].free < count:
            for prompt_index in [prompt_index for prompt_index in self._prefixes if prompt_index != keep]:
                self._forget(prompt_index)
        return self._allocators[device].free >= count

    def _forget(self, prompt_index: int) -> None:
        for allocator, pages in zip(self._allocators, self._prefixes.pop(prompt_index).pages_R, strict=True):
            allocator.release(pages)

    def _take(self, device: int, count: int) -> list[int]:
        pages = self._allocators[device].take(count)
        assert pages is not None, "_make_room was not called or its result was ignored"
        return pages

    def _give_pages(self) -> None:
        """Gives every live row its pages, oldest row first. If pages run out, sets aside the rows that began last."""
        for device in range(len(self._allocators)):
            live = self._live(device)
            while live:
                missing = self._needed(live[0]) - len(live[0].pages)
                if self._make_room(device, missing):
                    live.pop(0).pages += self._take(device, missing)
                else:
                    self._set_aside(live.pop())

    def _set_aside(self, rollout: OpenRollout) -> None:
        slot = self._slots.index(rollout)
        row = self._do.take_row(self._rows, np.array([slot], np.int32))
        used = rollout.pages[: pages_of(rollout.length)]
        parts = [self._do.take_pages(self._pool, ids) for ids in self._in_parts(used)]
        rollout.aside = fetch((row, parts))
        self._allocators[self._device(slot)].release(rollout.pages)
        rollout.pages = []
        self._put(slot, self._nobody)
        self._slots[slot] = None
        self._aside = sorted([*self._aside, rollout], key=lambda rollout: rollout.began)
        self._set_asides += 1

    def _in_parts(self, pages: list[int]) -> Iterator[np.ndarray]:
        """Page numbers in parts of `MOVED_PAGES`, padded with an invalid page number."""
        for first in range(0, len(pages), MOVED_PAGES):
            part = pages[first : first + MOVED_PAGES]
            yield np.array(part + [self._limits.pages] * (MOVED_PAGES - len(part)), np.int32)

    # Slots

    def _put(self, slot: int, row: Rows, source: int = 0, target: int | None = None) -> None:
        """Puts a row into a slot. If `target` is given, also copies page `source` to page `target`."""
        target = self._limits.pages if target is None else target
        self._pool, self._rows = self._do.put_row(self._pool, self._rows, row, slot, source, target)

    def _fill_slots(self) -> None:
        full: set[int] = set()
        for slot, rollout in enumerate(self._slots):
            if rollout is None and self._device(slot) not in full and not self._fill(slot):
                full.add(self._device(slot))

    def _fill(self, slot: int) -> bool:
        """Fills a slot if a rollout waits and there is room for it. Returns whether it did."""
        # Reserve the pages that live rows need for the launch after the next. Otherwise a rollout that begins now would be set aside soon.
        spare_R = [0] * len(self._allocators)
        for other, rollout in enumerate(self._slots):
            if rollout is not None:
                spare_R[self._device(other)] += max(0, self._needed(rollout, launches=2) - len(rollout.pages))
        if self._aside:
            return self._bring_back(slot, self._aside[0], spare_R)
        return bool(self._queue) and self._begin(slot, self._queue[0], spare_R)

    def _bring_back(self, slot: int, rollout: OpenRollout, spare_R: list[int]) -> bool:
        device, needed = self._device(slot), self._needed(rollout)
        if not self._make_room(device, needed + spare_R[device]):
            return False
        rollout.pages = self._take(device, needed)
        assert rollout.aside is not None, "the rollout was not set aside"
        row, parts = rollout.aside
        used = rollout.pages[: pages_of(rollout.length)]
        for ids, part in zip(self._in_parts(used), parts, strict=True):
            self._pool = self._do.put_pages(self._pool, ids, part)
        self._put(slot, row)
        rollout.aside = None
        self._slots[slot] = self._aside.pop(0)
        return True

    def _begin(self, slot: int, rollout: OpenRollout, spare_R: list[int]) -> bool:
        device, prompt_index, length = self._device(slot), rollout.prompt_index, rollout.length
        shared = length // PAGE
        own = self._needed(rollout) - shared
        to_read = 0 if prompt_index in self._prefixes else pages_of(length)
        needed_R = [to_read + spare if to_read else 0 for spare in spare_R]
        needed_R[device] = to_read + own + spare_R[device]
        if not all(self._make_room(other, needed, keep=prompt_index) for other, needed in enumerate(needed_R)):
            return False
        prefix = self._prefixes.get(prompt_index) or self._read(prompt_index)
        pages = prefix.pages_R[device]
        rollout.pages = self._allocators[device].share(pages[:shared]) + self._take(device, own)
        own_1 = {"indices_B": jnp.array([rollout.index], jnp.int32), "temperatures_B": jnp.array([rollout.temperature], jnp.float32)}
        row = dataclasses.replace(prefix.row, **own_1)
        begun_page = {"source": pages[shared], "target": rollout.pages[shared]} if length % PAGE else {}
        self._put(slot, row, **begun_page)
        rollout.prompt_routes = prefix.routes
        rollout.began, self._begun = self._begun, self._begun + 1
        self._slots[slot] = self._queue.popleft()
        if not self._queue or self._queue[0].prompt_index != prompt_index:  # the last of its group
            self._forget(prompt_index)
        return True

    def _read(self, prompt_index: int) -> _Prefix:
        """Runs prefill on a prompt. All devices must have room for it."""
        prompt, chunk = self._prompts[prompt_index], self._limits.chunk
        length = len(prompt.tokens_P)
        pages_R = [self._take(device, pages_of(length)) for device in range(len(self._allocators))]
        pages_RM = np.zeros((len(pages_R), self._limits.row_pages), np.int32)
        pages_RM[:, : pages_of(length)] = pages_R
        empty, hidden, routes = self._do.empty_rows(1), self._nobody.hidden_BD, []
        rings = empty.ring_k_LBKWH, empty.ring_v_LBKWH
        for first in range(0, length, chunk):
            tokens = np.asarray(prompt.tokens_P[first : first + chunk], np.int32)
            padded_1C = np.pad(tokens, (0, chunk - len(tokens)))[None]
            cache = Cache(self._pool, *rings, jnp.asarray(pages_RM), jnp.array([first], jnp.int32))
            hidden, cache, routes_1CLX = self._do.prefill(padded_1C, np.array([len(tokens)], np.int32), cache)
            if self._limits.record_routes:
                routes.append(routes_1CLX)
            self._pool, rings = cache.pool, (cache.ring_k_LBKWH, cache.ring_v_LBKWH)
        row = new_rows(rings, np.array([length], np.int32), hidden, [prompt.group], [0], [1.0])
        self._prefixes[prompt_index] = _Prefix(row, pages_R, routes)
        return self._prefixes[prompt_index]

    def _waiting(self) -> bool:
        return bool(self._queue or self._aside)

    def _shrink(self) -> None:
        """Once no rollout waits, halves the batch as often as possible with room for the live rows of each device."""
        if (rows := self._halved()) == len(self._slots):
            return
        each, kept = rows // self._limits.row_devices, []
        for device in range(self._limits.row_devices):
            own = [slot for slot in range(len(self._slots)) if self._device(slot) == device]
            kept += sorted(own, key=lambda slot: self._slots[slot] is None)[:each]
        self._rows = self._do.take_rows(self._rows, np.asarray(kept, np.int32))
        self._slots = [self._slots[slot] for slot in kept]

    def _halved(self) -> int:
        """Number of rows after halving the batch as often as possible; all rows while rollouts wait."""
        devices, rows = self._limits.row_devices, len(self._slots)
        most = max(len(self._live(device)) for device in range(devices))
        while not self._waiting() and half_of(rows, devices) >= max(1, most * devices):
            rows = half_of(rows, devices)
        return rows

    # Decoding

    def _decode(self) -> tuple[list[Rollout], int]:
        """Runs one launch. Returns the finished rollouts and the number of generated tokens."""
        pages_BM = np.zeros((len(self._slots), self._limits.row_pages), np.int32)
        live = [(slot, rollout) for slot, rollout in enumerate(self._slots) if rollout is not None]
        waiting = self._waiting()
        for slot, rollout in live:
            pages_BM[slot, : len(rollout.pages)] = rollout.pages
        drawn = self._launch(pages_BM, np.int32(self._enough(len(live))))
        alive_B, counts_B, drawn_BT = jax.device_get((self._rows.alive_B, self._rows.counts_B, drawn))
        done, grown = [], []
        for slot, rollout in live:
            grown.append(rollout.extend(drawn_BT, slot, int(counts_B[slot])))
            if not alive_B[slot]:
                done.append(rollout.finished(self._limits.stop_ids, record_routes=self._limits.record_routes))
                self._allocators[self._device(slot)].release(rollout.pages)
                self._slots[slot] = None
        if waiting:
            self._busy += sum(grown)
            self._offered += len(self._slots) * max(grown)
        return done, sum(grown)

    def _launch(self, pages_BM: np.ndarray, enough: np.int32) -> Drawn:
        # Batches of a size are always decoded in the same way, so that no further functions are compiled. The batch is larger than planned
        # if a rollout was set aside and now waits.
        if len(self._slots) > self._limits.draft_rows:
            self._pool, self._rows, drawn = self._do.launch(self._pool, self._rows, pages_BM, enough)
            return drawn
        history_BS = np.zeros((len(self._slots), self._limits.row_pages * PAGE), np.int32)
        for slot, rollout in enumerate(self._slots):
            if rollout is not None:
                tokens = np.concatenate([rollout.prompt.tokens_P, *rollout.tokens])
                history_BS[slot, : len(tokens)] = tokens
        self._pool, self._rows, drawn, sums_3 = self._do.draft_launch(self._pool, self._rows, pages_BM, history_BS, enough)
        self._draft_sums_3 += jax.device_get(sums_3)
        return drawn

    def _enough(self, live: int) -> int:
        """Number of live rows at which a launch ends early: a quarter can be refilled or, in the tail, the batch can be halved."""
        if self._waiting():
            return live - max(1, live // 4)
        half = half_of(len(self._slots), self._limits.row_devices)
        return half if half < live else 0  # 0 if the rows would fit half a batch, but one device has too many of them

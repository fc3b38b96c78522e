"""An endless stream of batches of packed documents. Several processes draw it; batch i depends only on the seed and i."""

import contextlib
import dataclasses
import multiprocessing
import queue
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from discover_jax.apprentice.corpus import draw_document, encode
from discover_jax.exceptions import CapacityError
from discover_jax.text.tokenizer import SentencePieceTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed documents, several in each row. All arrays are int32 [B rows, T tokens].

    Attributes:
      tokens_BT: inputs; <|endoftext|> for padding.
      targets_BT: the token after each input.
      positions_BT: position of a token within its document, from 0.
      segments_BT: number of a token's document within its row, from 1; 0 for padding.
      mask_BT: 1 where the target belongs to the reply, else 0; the loss includes only replies.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    mask_BT: np.ndarray


_PATIENCE = 8
"""Packing ends when this many consecutive documents fit no row."""


def draw_batch(tokenizer: Tokenizer, *, rows: int, row_tokens: int, seed: int, index: int) -> Batch:
    """Packs documents into rows, each into the fullest row that has room, until `_PATIENCE` consecutive ones fit no row.

    Raises:
      CapacityError: a document is longer than a row.
    """
    rng = random.Random(f"batch {seed} {index}")
    pad = tokenizer.special("<|endoftext|>")
    arrays = {field.name: np.zeros((rows, row_tokens), np.int32) for field in dataclasses.fields(Batch)}
    batch = Batch(**arrays)
    batch.tokens_BT[:] = pad
    batch.targets_BT[:] = pad
    used_B = np.zeros(rows, np.int64)
    documents_B = np.zeros(rows, np.int64)
    misses = 0
    while misses < _PATIENCE:
        ids, prompt_length = encode(draw_document(rng), tokenizer)
        length = len(ids) - 1
        if length > row_tokens:
            raise CapacityError(f"A document of {length} tokens does not fit a row of {row_tokens} tokens. Raise row_tokens.")
        fits_B = used_B + length <= row_tokens
        if not fits_B.any():
            misses += 1
            continue
        misses = 0
        row = int(np.argmax(np.where(fits_B, used_B, -1)))
        span = slice(used_B[row], used_B[row] + length)
        documents_B[row] += 1
        batch.tokens_BT[row, span] = ids[:-1]
        batch.targets_BT[row, span] = ids[1:]
        batch.positions_BT[row, span] = np.arange(length)
        batch.segments_BT[row, span] = documents_B[row]
        batch.mask_BT[row, span] = np.arange(1, length + 1) >= prompt_length
        used_B[row] += length
    return batch


@contextlib.contextmanager
def batch_stream(tokenizer_path: Path, *, rows: int, row_tokens: int, seed: int, workers: int) -> Iterator[Callable[[], Batch]]:
    """A context whose value is a function that returns the next batch. `workers` processes draw batches ahead of time.

    The order of batches does not depend on the number of workers. The processes end with the context.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    queues = [context.Queue(maxsize=4) for _ in range(workers)]
    processes = [
        context.Process(
            target=_work, args=(out, stop, str(tokenizer_path), rows, row_tokens, seed, first, workers), daemon=True, name=f"corpus-{first}"
        )
        for first, out in enumerate(queues)
    ]
    for process in processes:
        process.start()
    taken = 0

    def next_batch() -> Batch:
        nonlocal taken
        worker = taken % workers
        while True:
            try:
                batch = queues[worker].get(timeout=5)
            except queue.Empty:
                if not processes[worker].is_alive():
                    raise RuntimeError(
                        f"Corpus process {worker} ended with exit code {processes[worker].exitcode}; its error is above."
                    ) from None
                continue
            taken += 1
            return batch

    try:
        yield next_batch
    finally:
        stop.set()
        for out, process in zip(queues, processes, strict=True):
            out.cancel_join_thread()
            process.terminate()
            process.join()


def _work(out, stop, tokenizer_path: str, rows: int, row_tokens: int, seed: int, first: int, workers: int) -> None:
    tokenizer = SentencePieceTokenizer(tokenizer_path)
    index = first
    while not stop.is_set():
        batch = draw_batch(tokenizer, rows=rows, row_tokens=row_tokens, seed=seed, index=index)
        while not stop.is_set():
            try:
                out.put(batch, timeout=1)
                break
            except queue.Full:
                continue
        index += workers

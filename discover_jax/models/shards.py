"""How the tensors of a written Hugging Face folder are divided among files."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Tensor = TypeVar("Tensor")

SHARD_BYTES = 1 << 30
"""Maximum size of a file. A tensor is never split, so a larger tensor gets a file of its own."""
INDEX = "model.safetensors.index.json"
"""The file that names the file of each tensor, if there are several."""


def name_files(pattern: str, count: int) -> list[str]:
    """The names of `count` files: `pattern` with a number and the count, but a single file has no number."""
    return [pattern.format(number=number, count=count) for number in range(1, count + 1)] if count > 1 else ["model.safetensors"]


def split_into_shards(tensors: Iterable[Tensor], size_of: Callable[[Tensor], int]) -> list[list[Tensor]]:
    """The tensors of each file, in order and at most `SHARD_BYTES` a file."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = size_of(tensor)
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    return shards

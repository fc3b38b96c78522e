"""Checksums of a checkpoint: the host state stores one for each array, and one of its own over everything."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from discover_jax.learning.train_state import TrainState
from discover_jax.models.sharding import fetch


def seal(host: dict[str, Any], train_state: TrainState | None) -> dict[str, Any]:
    """The host state as it is stored: with the checksums of the arrays, and one over everything.

    All processes must call it if arrays are spread over several.
    """
    content = {"host": host, "arrays": _checksums(train_state)}
    return {**content, "sha256": _sha256(content)}


def unseal(sealed: Any, train_state: TrainState | None) -> dict[str, Any]:
    """The host state of `seal`, after verifying it and the restored arrays.

    Raises:
      ValueError: something was altered.
    """
    if not isinstance(sealed, dict) or sealed.keys() != {"host", "arrays", "sha256"}:
        raise ValueError("the host state is not an object of host, arrays and sha256.")
    content = {"host": sealed["host"], "arrays": sealed["arrays"]}
    if not isinstance(content["host"], dict) or not isinstance(content["arrays"], dict):
        raise ValueError("host and arrays in the host state must be objects.")
    if sealed["sha256"] != _sha256(content):
        raise ValueError("checksum mismatch in the host state.")
    if train_state is not None:
        found = _checksums(train_state)
        changed = sorted(name for name in found | content["arrays"] if found.get(name) != content["arrays"].get(name))
        if changed:
            raise ValueError(f"checksum mismatch in {len(changed)} arrays: {', '.join(changed[:3])}{', ...' * (len(changed) > 3)}.")
    return content["host"]


def on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """An array in host memory, in row-major order. Needs no device memory if this process can address the whole array.

    Assembled from shards: jax would cache a conversion of the whole array in memory.
    """
    if isinstance(leaf, np.ndarray) or not leaf.is_fully_addressable:
        return np.asarray(fetch(leaf), order="C")
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1 and shards[0].data.shape == leaf.shape:
        return np.asarray(shards[0].data, order="C")
    values = np.empty(leaf.shape, leaf.dtype)
    for shard in shards:
        values[shard.index] = np.asarray(shard.data)
    return values


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Any) -> dict[str, str]:
    """SHA-256 of each array by name; independent of how the array is sharded."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(_bytes(leaf)).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bytes(leaf: jax.Array | np.ndarray) -> memoryview:
    return on_host(leaf).reshape(-1).view(np.uint8).data

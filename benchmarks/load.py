"""How fast a checkpoint folder is read, and how much memory the host needs for it.

    python -m discover_jax.models.synthetic --shape=gpt-oss-20b --out=DIR
    python benchmarks/load.py DIR [--experts=packed] [--dtype=bfloat16]

Prints the bytes that this process's devices hold, the seconds, and the peak of resident memory above what the process had before. On a CPU
the weights themselves are part of that peak. Beside it, the rate at which the same bytes come from the disk's cache in a plain read.
"""

import argparse
import resource
import time
from pathlib import Path

import jax

from discover_jax.models.folder import find_folder, load_folder


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain_read(path: Path) -> tuple[int, float]:
    """Bytes and seconds of reading all files through a buffer of 16 MiB."""
    buffer, total, started = bytearray(16 << 20), 0, time.monotonic()
    for file in sorted(find_folder(path).glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--experts", default="packed")
    arguments = parser.parse_args()
    jax.block_until_ready(jax.numpy.zeros(1))
    before = _peak()
    started = time.monotonic()
    _, tree = load_folder(arguments.folder, dtype=arguments.dtype, experts=arguments.experts)
    jax.block_until_ready(tree)
    seconds = time.monotonic() - started
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    peak = _peak() - before
    above = peak - (held if jax.default_backend() == "cpu" else 0)
    del tree
    read, read_seconds = _plain_read(arguments.folder)
    print(f"held {held / 1e9:.2f} GB on {jax.devices()[0].device_kind}, loaded in {seconds:.1f} s ({held / 1e9 / seconds:.2f} GB/s)")
    print(f"peak of the host's memory {peak / 1e9:.2f} GB, {above / 1e9:.2f} GB above what must be held there")
    print(f"a plain read of the {read / 1e9:.2f} GB afterwards: {read_seconds:.1f} s ({read / 1e9 / read_seconds:.2f} GB/s)")


if __name__ == "__main__":
    main()

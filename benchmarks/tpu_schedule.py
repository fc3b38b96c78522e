"""Reads from the TPU compiler's schedule how many cycles the update's kernels take, against those that the matrix units need.

    python benchmarks/tpu_schedule.py --chip=v5p             # minutes; needs the extra `tpu`, but no TPU
    python benchmarks/tpu_schedule.py --chip=v5p --dry       # does not record

Each kernel is compiled at the sizes of the 120b and run 3: 16 experts of 128 on a device, blocks of 256 rows, and attention of a full layer
in blocks of 512. libtpu writes the scheduled bundles of a kernel, with those that only wait, one line a cycle of a core. *cycles* is one
step of the kernel's grid: all of its loop, also the parts that run only at the first or the last step of a block. Of several parts with
products, as attention with and without a mask, the longest counts. A part without products that is longer than the products of one head
is left out: it runs once for a row. If the copies of a step take longer at the vendor's bandwidth, their time counts instead. The schedule
does not show stalls: copies that are late, conflicts in memory, the start of a kernel.

*Of peak* is the time at the vendor's FLOP/s of the operations that are needed, over that of the schedule. Needed are products without
padding and without adapters. A pass over the experts has several kernels; `experts_forward` and `experts_gradient` add them up. A gradient
is a forward and a backward pass, and needs full rematerialisation: three times a forward pass for experts, 3.5 times for attention. The
clock is assumed: at 1.75 GHz, the cores' matrix units have just the vendor's FLOP/s.

`plain_product` is XLA's own estimate of cycles for a product of 8,192 x 2,880 and 2,880 x 4,096 in bfloat16, as a projection of queries.
"""

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # for a test that loads this file by its path
import figures

CLOCK = 1.75e9
CORES = {"v5p": 2, "v6e": 1}
SLICES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
EXPERTS, WIDTH, RANK, ROWS, COLUMNS, AT_ONCE = 16, 2_880, 8, 256, 512, 16_384
VISITORS = 34_304
ROWS_OF_EXPERT = VISITORS * 4 / 128
"""Rows of an expert in a visit: of one of run 3's longest rows, of 34,192 tokens."""
HEADS, KV_HEADS, HEAD, TOKENS, BLOCK = 64, 8, 64, 34_304, 512


class Kernel(NamedTuple):
    """A kernel to compile.

    Attributes:
      name: in the figures.
      call: a function of jax arrays.
      shapes: of its arguments, and whether each is float32, bfloat16 ("") or another dtype by name.
      steps: of the grid for one block of rows, or for one pair of blocks and head of attention, divided over the cores.
      needed: floating point operations for it, without padding.
      bytes: that these steps copy from and to the memory.
      heads: that a step computes.
    """

    name: str
    call: Callable[..., Any]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    steps: float
    needed: float
    bytes: float
    heads: int = 1


def kernels() -> Iterator[Kernel]:
    """The update's kernels."""
    from discover_jax.kernels import attention_update_pallas as attention
    from discover_jax.kernels import exchange_ring_pallas as ring
    from discover_jax.kernels import experts_update_pallas as experts

    blocks = AT_ONCE // ROWS
    tiles, rows = experts.Tiles(rows=ROWS, columns=COLUMNS, blocks=blocks), blocks * ROWS
    x, low, owner = ("", (rows, WIDTH)), ("", (rows, RANK)), ("int32", (blocks,))
    matrix, bias, adapter = ("", (EXPERTS, WIDTH, WIDTH)), ("float32", (EXPERTS, WIDTH)), ("", (EXPERTS, RANK, WIDTH))
    # An expert's matrix is read once for all of its blocks. Rows are read again for each block of columns.
    steps, product = -(-WIDTH // COLUMNS), 2.0 * ROWS * WIDTH * WIDTH
    read, block = 2 * ROWS * WIDTH, 2 * WIDTH * WIDTH * ROWS / ROWS_OF_EXPERT

    def activation(x: Any, g: Any, u: Any, bg: Any, bu: Any, low: Any, ag: Any, au: Any, *owners: Any) -> Any:
        halves = [(g, bg, (low, ag)), (u, bu, (low, au))]
        return experts.activation(x, halves, experts.Owners(*owners), tiles, limit=7.0, alpha=1.702)

    def down(x: Any, w: Any, b: Any, low: Any, a: Any, weights: Any, *owners: Any) -> Any:
        return experts.grouped([(x, w)], experts.Owners(*owners), tiles, bias=b, adapter=(low, a), weights_P1=weights)

    def d_active(x: Any, w: Any, low: Any, a: Any, active: Any, gates: Any, ups: Any, weights: Any, *owners: Any) -> Any:
        options: dict[str, Any] = {"adapter": (low, a), "limit": 7.0, "alpha": 1.702}
        return experts.activation_gradient(x, w, (active, gates, ups), weights, experts.Owners(*owners), tiles, **options)

    def d_inputs(x: Any, y: Any, w: Any, v: Any, low: Any, a: Any, *owners: Any) -> Any:
        return experts.grouped([(x, w), (y, v)], experts.Owners(*owners), tiles, transposed=True, adapter=(low, a))

    def down_to_rank(x: Any, a: Any, *owners: Any) -> Any:
        return experts.grouped([(x, a)], experts.Owners(*owners), tiles, transposed=True)

    def outer(v: Any, u: Any, *owners: Any) -> Any:
        return experts.outer(v, u, EXPERTS, experts.Owners(*owners), tiles)

    both = (owner, owner)
    many = -(-WIDTH // (experts.OUTER_COLUMNS * COLUMNS))
    yield Kernel(
        "experts_activation",
        activation,
        (x, matrix, matrix, bias, bias, low, adapter, adapter, *both),
        steps,
        2 * product,
        steps * read + 3 * read + 2 * block,
    )
    weights = "float32", (rows, 1)
    yield Kernel("experts_down", down, (x, matrix, bias, low, adapter, weights, *both), steps, product, steps * read + 2 * read + block)
    # It reads the activation, gates and ups, and writes the gradients of gates and ups, and a row of lanes for each row.
    of_rows = (x, matrix, low, adapter, x, x, x, weights)
    yield Kernel("experts_d_active", d_active, (*of_rows, *both), steps, product, (steps + 5) * read + steps * 512 * ROWS + block)
    yield Kernel(
        "experts_d_inputs",
        d_inputs,
        (x, x, matrix, matrix, low, adapter, *both),
        steps,
        2 * product,
        2 * steps * read + 2 * read + 2 * block,
    )
    yield Kernel("experts_to_rank", down_to_rank, (x, adapter, *both), 1, 0.0, read)
    yield Kernel("experts_outer", outer, (("float32", (rows, RANK)), x, *both), many, 0.0, read)

    sent, part = ("float32", (VISITORS // 2, WIDTH)), ("float32", (VISITORS, WIDTH))
    yield Kernel("exchange_join", lambda x, y: ring.join(x, y, 0), (("", (1, *sent[1])),) * 2, 1, 0.0, 8 * ring.ROWS * WIDTH)
    yield Kernel("exchange_add", ring.add, (sent, sent, part), 1, 0.0, 32 * ring.ROWS * WIDTH)

    cut, half = attention.Blocks(BLOCK, TOKENS // BLOCK), 2.0 * BLOCK * BLOCK * HEAD
    q, k = ("", (1, HEADS, HEAD, TOKENS)), ("", (1, KV_HEADS, TOKENS, HEAD))
    first, of_query = ("int32", (1, TOKENS)), ("float32", (1, HEADS, 1, TOKENS))

    def forward(*arrays: Any) -> Any:
        return attention.forward(*arrays, blocks=cut)

    def backward(*arrays: Any) -> Any:
        return attention.backward(*arrays, blocks=cut)

    tile = 2 * BLOCK * HEAD
    heads = HEADS // KV_HEADS  # in one step
    yield Kernel("attention_forward", forward, (q, k, k, first, ("float32", (HEADS,))), 1 / heads, 2 * half, 2 * tile, heads)
    yield Kernel("attention_backward", backward, (q, k, k, first, q, of_query, of_query), 1 / heads, 0.0, 5 * tile, heads)


_FORWARD = {"experts_activation": 1, "experts_down": 1, "experts_to_rank": 2}
_BACKWARD = {"experts_activation": 1, "experts_d_active": 1, "experts_d_inputs": 1, "experts_to_rank": 5, "experts_outer": 5}


class Pass(NamedTuple):
    """How often each kernel runs in a pass, and what the pass needs, in operations of the forward pass."""

    kernels: dict[str, int]
    needed: float


PASSES = {
    "experts_forward": Pass(_FORWARD, 1),
    "experts_gradient": Pass({name: _FORWARD.get(name, 0) + _BACKWARD.get(name, 0) for name in {**_FORWARD, **_BACKWARD}}, 3),
    "attention_gradient": Pass({"attention_forward": 1, "attention_backward": 1}, 3.5),
}
"""With adapters."""

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2} ?)*):")


def cycles_of(text: str, heads: int = 1) -> int:
    """Cycles of a step of the grid, which computes `heads` heads, from a kernel's scheduled bundles (a file `packed-bundles-post-ra` of
    libtpu).

    Raises:
      ValueError: the text has no loop.
    """
    bundles = [(found[1], line) for line in text.splitlines() if (found := _BUNDLE.match(line))]
    start = next((at for at, (marks, _) in enumerate(bundles) if "LB" in marks), None)
    if start is None:
        raise ValueError("the schedule has no loop: it must be that of a kernel with a grid of several steps")
    parts, part, products = [], 0, False
    for _, line in bundles[start:]:
        part, products = part + 1, products or "vmatmul" in line
        if "sbr.rel" in line:
            parts.append((part, products))
            part, products = 0, False
    longest = max((length for length, has_products in parts if has_products), default=0)
    most = longest / heads if longest else math.inf
    return part + longest + sum(length for length, has_products in parts if not has_products and length <= most)


def scheduled(kernel: Kernel, slice: str, folder: Path) -> int:
    """Compiles a kernel. Returns the cycles of a step of its grid; of several kernels, their sum."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice).devices
    mesh, whole = Mesh(np.array(devices[:1]), ("one",)), PartitionSpec()
    of = [jax.ShapeDtypeStruct(shape, kind or jnp.bfloat16, sharding=NamedSharding(mesh, whole)) for kind, shape in kernel.shapes]
    before = set(folder.iterdir())
    jax.jit(jax.shard_map(kernel.call, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)).lower(*of).compile()
    new, name = sorted(set(folder.iterdir()) - before), kernel.name.split("_")[0]
    schedules = [file for file in new if re.search(rf"\d-{name}\w*[\d.]*-\d+-packed-bundles-post-ra\.txt", file.name)]
    if not schedules:
        raise RuntimeError(f"libtpu wrote no schedule of {kernel.name}; it wrote {len(new)} files")
    return sum(cycles_of(file.read_text(), kernel.heads) for file in schedules)


def plain_product(slice: str) -> tuple[float, float]:
    """Seconds of a plain product by XLA's estimate, and its floating point operations."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    one = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=slice).devices[0])
    of = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in ((8_192, WIDTH), (WIDTH, HEADS * HEAD))]
    text = jax.jit(lambda x, w: x @ w).lower(*of).compile().as_text() or ""
    return max(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / CLOCK, 2.0 * 8_192 * WIDTH * HEADS * HEAD


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chip", choices=list(SLICES), default="v5p")
    parser.add_argument("--dry", action="store_true", help="do not record")
    chip = (arguments := parser.parse_args()).chip
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"  # read when libtpu is loaded
        from discover_jax.machines import speeds_of

        peaks = getattr(speeds_of(chip), "tpu")  # noqa: B009 - not None for these names
        found: dict[str, tuple[float, float]] = {}
        for kernel in kernels():
            step, copies = scheduled(kernel, SLICES[chip], Path(folder)), kernel.bytes / peaks.bandwidth
            seconds = max(kernel.steps * step / CORES[chip] / CLOCK, copies)
            found[kernel.name] = seconds, kernel.needed / peaks.product
            print(f"{kernel.name}: {step} cycles a step, copies {copies * CLOCK * CORES[chip] / kernel.steps:.0f}", flush=True)
            for file in Path(folder).iterdir():
                file.unlink()
    seconds, operations = plain_product(SLICES[chip])
    found["plain_product"] = seconds, operations / peaks.product
    for name, one in PASSES.items():
        of_forward = sum(times * found[part][1] for part, times in PASSES.get(name.replace("gradient", "forward"), one).kernels.items())
        found[name] = sum(times * found[part][0] for part, times in one.kernels.items()), one.needed * of_forward
    for name, (seconds, least) in found.items():
        print(f"{name}: {seconds * 1e6:.3f} us, {least / seconds:.1%} of the vendor's FLOP/s")
        if not arguments.dry:
            command = f"python benchmarks/tpu_schedule.py --chip={chip}"
            figures.append(f"tpu_schedule_{chip}_{name}_us", seconds * 1e6, "us", command)
            if least:
                figures.append(f"tpu_schedule_{chip}_{name}", least / seconds, "fraction", command)


if __name__ == "__main__":
    main()

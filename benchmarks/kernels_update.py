"""The update's kernels of one layer, compared with this GPU's matrix product in the same run: forward, and forward with backward.

    python benchmarks/kernels_update.py experts [--shape=gpt-oss-120b] [--tokens=16384,65536] [--skew=0] [--tiles=128x256,64x256,128x128]
    python benchmarks/kernels_update.py attention [--heads=gpt-oss-120b] [--cases="NAME;NAME"] [--launches]

Both also take --json=FILE and --record=PREFIX, and need a GPU and the extra `cuda`. All times are the best of five repetitions.

experts: random weights, rank-8 adapters. Rates count the products of the routed rows with the base matrices: 2 x 3 x width x expert width
per row forward, and the same backward, since base weights have no gradients. `--skew` makes routing uneven; 0 is uniform. `--tiles` are
rows of a block x outputs of a wide product; the paired product has a quarter of both halves. Errors are relative to the norm, against the
plain-JAX reference in float32, with routing so uneven that some experts get no rows.

attention: one row of packed rollouts. Rates count the unmasked pairs of a query and a key: 4 H operations per pair and head forward, 10 H
backward. cuDNN's attention (jax.nn.dot_product_attention) has neither sinks nor segments, so it is measured only on rows of one rollout.
Errors are those of the outputs and of each gradient, relative to the norm, against the plain-JAX reference in float32, on a row of 2,048
tokens. `--launches` also times each kernel with other launch parameters (device time, from a trace).
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
from attention_shapes import SHAPES, Heads
from measuring import ceilings, kernel_seconds, seconds

from discover_jax.kernels import attention_update
from discover_jax.kernels.attention_update import packed_attention, windowed_attention
from discover_jax.kernels.experts import moe_reference
from discover_jax.kernels.experts_decode import TiledMatrix
from discover_jax.kernels.experts_update import GroupedTiling, Launch, moe_sorted, unpack
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out, restore
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference
from discover_jax.kernels.triton_call import compute_capability
from discover_jax.models.mxfp4 import dequantise
from discover_jax.models.synthetic import shape_of

Keep = Callable[[dict[str, Any], str], None]
"""Called with each row and its name."""

# ---------------------------------------------------------------------- experts

RANK, LIMIT, ALPHA = 8, 7.0, 1.702


def matrix(key: jax.Array, experts: int, out: int, into: int, name: str) -> TiledMatrix:
    """Random tiles whose products have about the norm of their rows."""
    keys = jax.random.split(key, 2)
    blocks = jax.random.bits(keys[0], (experts, out, into // 32, 16), jnp.uint8)
    scales = jnp.full((experts, out, into // 32), 120, jnp.uint8)
    words, factors = lay_out(blocks, scales, SLABS[name])
    return TiledMatrix(words, factors, jax.random.normal(keys[1], (experts, out), jnp.bfloat16), scale=1.0)


class Plain:
    """A matrix for the plain-JAX reference."""

    def __init__(self, weight: jax.Array, bias: jax.Array, adapter: tuple[jax.Array, jax.Array]):
        self.own = {"weight": weight, "bias": bias, "a": adapter[0], "b": adapter[1]}

    def arrays(self, *, adapted: bool) -> dict[str, jax.Array]:
        return self.own

    def apply(self, x_Ti: jax.Array, one: dict[str, jax.Array]) -> jax.Array:
        return x_Ti @ one["weight"].T + one["bias"] + (x_Ti @ one["a"].T) @ one["b"].T


def experts_errors(
    gate_up: TiledMatrix, down: TiledMatrix, leaves: tuple[Any, Any, Any], index: jax.Array, d_out: jax.Array
) -> dict[str, float]:
    """The errors of the output and of each derivative."""

    def reference(x: Any, weights: Any, adapters: Any, index: Any, *matrices: tuple[jax.Array, jax.Array]) -> jax.Array:
        plain = (Plain(*matrix, adapter) for matrix, adapter in zip(matrices, adapters, strict=True))
        options = {"experts": gate_up.words.shape[0], "adapted": True, "limit": LIMIT, "alpha": ALPHA}
        return moe_reference(x, index, weights, *plain, **options)

    def kernels(x: Any, weights: Any, adapters: Any, index: Any, *matrices: TiledMatrix) -> jax.Array:
        return moe_sorted(x, weights, adapters, index, *matrices, LIMIT, ALPHA, GroupedTiling())

    def both(function: Callable[..., jax.Array], *matrices: Any) -> list[jax.Array]:
        def passes(leaves: Any, d_out: Any, *rest: Any) -> Any:
            out, pull = jax.vjp(lambda *own: function(*own, *rest), *leaves)
            return out, pull(d_out)

        return jax.tree.leaves(jax.jit(passes)(leaves, d_out, index, *matrices))

    def plainly(tiles: TiledMatrix, *, paired: bool) -> tuple[jax.Array, jax.Array]:
        return dequantise(*restore(tiles.words, tiles.factors, paired=paired), jnp.float32), tiles.bias.astype(jnp.float32)

    with jax.default_matmul_precision("highest"):
        expected = both(reference, plainly(gate_up, paired=True), plainly(down, paired=False))
    names = ("output", "x", "weights", "a of gate_up", "b of gate_up", "a of down", "b of down")
    compared = zip(names, both(kernels, gate_up, down), expected, strict=True)
    return {name: float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())) for name, got, want in compared}


def tiles_of(text: str) -> GroupedTiling:
    """ROWSxOUTPUTS."""
    rows, outputs = map(int, text.split("x"))
    return GroupedTiling(rows, wide=Launch(outputs), paired=Launch(outputs // 4))


def measure_experts(arguments: argparse.Namespace, ceiling: dict[str, float], keep: Keep) -> dict[str, Any]:
    sizes = shape_of(arguments.shape)
    experts, share, width, hidden = sizes.num_experts, sizes.experts_per_token, sizes.width, sizes.mlp_width
    keys = jax.random.split(jax.random.key(0), 8)
    gate_up, down = matrix(keys[0], experts, 2 * hidden, width, "gate_up"), matrix(keys[1], experts, width, hidden, "down")
    shapes = ((experts, RANK, width), (experts, 2 * hidden, RANK)), ((experts, RANK, hidden), (experts, width, RANK))
    adapters = jax.tree.map(lambda s: 0.02 * jax.random.normal(keys[2], s), shapes, is_leaf=lambda node: isinstance(node[0], int))
    both = jax.jit(lambda up, low: (unpack(up, paired=True), unpack(low, paired=False)))
    moved = (
        (17 / 32 + 2) * experts * 3 * hidden * width
    )  # per weight, half a byte and its part of a scale are read, and two bytes are written
    spent = seconds(lambda: both(gate_up, down))
    unpacking = {"ms": 1e3 * spent, "of_copy": moved / spent / ceiling["copy_bytes_per_s"]}
    print(f"unpacking a layer {unpacking['ms']:.2f} ms, {unpacking['of_copy']:.0%} of the copy")

    def routing(tokens: int, skew: float) -> tuple[jax.Array, jax.Array]:
        logits = jax.random.normal(keys[5], (tokens, experts)) + skew * jax.random.normal(keys[6], (experts,))
        top, index = jax.lax.top_k(logits, share)
        return index, jax.nn.softmax(top)

    x, d_out = (jax.random.normal(key, (300, width), jnp.bfloat16).astype(jnp.float32) for key in keys[3:5])
    index, weights = routing(300, 3.0)  # some experts get no rows
    errors = experts_errors(gate_up, down, (x, weights, adapters), index, d_out)
    print(f"errors against float32: {errors}")
    for tokens in map(int, arguments.tokens.split(",")):
        x, d_out = (jax.random.normal(key, (tokens, width), jnp.float32) for key in keys[3:5])
        index, weights = routing(tokens, arguments.skew)
        forward = 2.0 * tokens * share * 3 * hidden * width
        for text in arguments.tiles.split(","):
            tiles = tiles_of(text)

            def moe(x: Any, weights: Any, adapters: Any, index: Any, gate_up: Any, down: Any, tiles: GroupedTiling = tiles) -> jax.Array:
                return moe_sorted(x, weights, adapters, index, gate_up, down, LIMIT, ALPHA, tiles)

            def gradients(d_out: Any, *leaves: Any, moe: Any = moe) -> Any:
                return jax.vjp(lambda *own: moe(*own, *leaves[3:]), *leaves[:3])[1](d_out)

            leaves = (x, weights, adapters, index, gate_up, down)
            spent = {"forward": seconds(jax.jit(moe), *leaves), "both": seconds(jax.jit(gradients), d_out, *leaves)}
            rates = {"forward": forward / spent["forward"], "both": 2 * forward / spent["both"]}
            keep({"tokens": tokens, "tiles": text, **columns(spent, rates)}, f"t{tokens}_{text}")
    return {"unpack": unpacking, "errors": errors}


# ---------------------------------------------------------------------- attention

WINDOW = 128

CASES: dict[str, tuple[list[int], int | None]] = {
    "1 x 26k": ([26_624], None),
    "1 x 8k": ([8192], None),
    "4 x 8k": ([8192] * 4, None),
    "4 x 4k": ([4096] * 4, None),
    "uneven, 32k": ([14_000, 9_000, 5_000, 2_500, 1_200, 600, 400], None),
    "32k, window": ([32_768], WINDOW),
    "uneven, 32k, window": ([14_000, 9_000, 5_000, 2_500, 1_200, 600, 400], WINDOW),
}
"""Lengths of the rollouts of a row, and the window."""

LAUNCHES = {
    "forward": [(128, 64, 3, 4), (128, 64, 2, 8), (128, 64, 3, 8), (128, 128, 2, 8), (64, 64, 3, 4), (128, 32, 3, 8)],
    "to_queries": [(64, 64, 2, 4), (64, 64, 2, 8), (128, 64, 2, 8), (128, 64, 3, 8), (128, 32, 3, 8), (64, 32, 3, 4)],
    "to_keys": [(64, 64, 2, 4), (64, 64, 3, 4), (64, 64, 2, 8), (32, 64, 2, 8), (128, 64, 2, 8), (64, 128, 2, 8), (32, 64, 3, 4)],
}
"""Launch parameters that --launches tries: queries, keys, stages, warps."""


def arrays(heads: Heads, lengths: list[int], dtype: Any = jnp.bfloat16) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Queries, keys, values and the output's gradient; segments, padded to a multiple of 128; sinks."""
    tokens = -(-sum(lengths) // 128) * 128
    keys = jax.random.split(jax.random.key(0), 5)
    numbers = (heads.heads, heads.kv_heads, heads.kv_heads, heads.heads)
    drawn = tuple(jax.random.normal(key, (1, tokens, n, heads.size), dtype) for key, n in zip(keys, numbers, strict=False))
    segments = np.zeros(tokens, np.int32)
    segments[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return drawn, jnp.asarray(segments)[None], heads.draw_sinks(keys[4], dtype)


def pairs(lengths: Sequence[int], window: int | None) -> int:
    """The number of unmasked pairs of a query and a key."""
    seen = [min(n, window or n) for n in lengths]
    return sum(w * (w + 1) // 2 + (n - w) * w for n, w in zip(lengths, seen, strict=True))


def attention_errors(heads: Heads, window: int | None) -> dict[str, float]:
    """The errors of the output and of each gradient."""
    drawn, segments, sinks = arrays(heads, [1_000, 700, 40, 200])
    options = {} if window is None else {"window": window}
    own, reference = (
        (packed_attention, packed_attention_reference) if window is None else (windowed_attention, windowed_attention_reference)
    )
    *inputs, d_out = drawn
    d_out = d_out * (segments > 0)[..., None, None]
    got, pull = jax.vjp(lambda *x: own(*x, segments, sinks, **options), *inputs)
    exact, pull_exact = jax.vjp(lambda *x: reference(*x, segments, sinks, **options), *(x.astype(jnp.float32) for x in inputs))
    found = {}
    for name, ours, theirs in zip(
        ("output", "q", "k", "v"), (got, *pull(d_out)), (exact, *pull_exact(d_out.astype(jnp.float32))), strict=True
    ):
        difference = (ours.astype(jnp.float32) - theirs) * (segments > 0)[..., None, None]
        found[name] = float(jnp.linalg.norm(difference) / jnp.linalg.norm(theirs))
    return found


def time_launches(heads: Heads, lengths: list[int], name: str) -> None:
    """Device time of each of the three kernels with each of its LAUNCHES. Launches that need more shared memory than the GPU has fail."""
    drawn, segments, sinks = arrays(heads, lengths)
    chosen = attention_update.choose_tiling(heads.size, windowed=False, capability=compute_capability())
    kernels = {"forward": "forward", "to_queries": "backward_queries", "to_keys": "backward_keys"}
    operations = {"forward": 4.0, "to_queries": 6.0, "to_keys": 8.0}
    for part, launches in LAUNCHES.items():
        for launch in launches:
            tiling = dataclasses.replace(chosen, **{part: attention_update.Launch(*launch)})

            @jax.jit
            def gradients(q: Any, k: Any, v: Any, d_out: Any, tiling: Any = tiling) -> Any:
                attend = functools.partial(attention_update.attend, window=None, tiling=tiling)
                return jax.vjp(lambda *x: attend(*x, segments, sinks), q, k, v)[1](d_out)

            label = f"{name}_{part}_{'_'.join(map(str, launch))}" + (" chosen" if getattr(chosen, part) == getattr(tiling, part) else "")
            try:
                jax.block_until_ready(gradients(*drawn))
                spent = kernel_seconds(functools.partial(gradients, *drawn), (kernels[part],))[kernels[part]]
            except Exception as error:
                print(f"{label:44s} failed: {str(error).splitlines()[0][:80]}", flush=True)
                continue
            rate = operations[part] * heads.size * heads.heads * pairs(lengths, None) / spent
            print(f"{label:44s} {1e3 * spent:7.3f} ms {rate / 1e12:4.0f} TFLOP/s", flush=True)


def measure_attention(arguments: argparse.Namespace, ceiling: dict[str, float], keep: Keep) -> dict[str, Any]:
    heads, cases = SHAPES[arguments.heads], arguments.cases.split(";")
    if not heads.sinks:  # these models have no windows either
        cases = [name for name in cases if CASES[name][1] is None]
    errors = {"full": attention_errors(heads, None)} | ({"window": attention_errors(heads, WINDOW)} if heads.sinks else {})
    print(f"errors against float32: {errors}", flush=True)
    for name in cases:
        lengths, window = CASES[name]
        drawn, segments, sinks = arrays(heads, lengths)
        own = functools.partial(windowed_attention, window=window) if window else packed_attention
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        variants: dict[str, Callable[..., jax.Array]] = {"kernels": lambda q, k, v, f=own, g=segments, s=sinks: f(q, k, v, g, s)}
        if len(lengths) == 1:
            variants["cudnn"] = functools.partial(cudnn, local_window_size=(window - 1, 0)) if window else cudnn
        label = name.replace(",", "").replace(" ", "_")
        for variant, attend in variants.items():

            def gradients(q: Any, k: Any, v: Any, d_out: Any, attend: Any = attend) -> Any:
                return jax.vjp(attend, q, k, v)[1](d_out)

            spent = {"forward": seconds(jax.jit(attend), *drawn[:3]), "both": seconds(jax.jit(gradients), *drawn)}
            forward = 4.0 * heads.size * heads.heads * pairs(lengths, window)
            rates = {"forward": forward / spent["forward"], "both": 3.5 * forward / spent["both"]}
            keep({"case": name, "heads": arguments.heads, "variant": variant, **columns(spent, rates)}, f"{label}_{variant}")
        if arguments.launches and window is None:
            time_launches(heads, lengths, label)
    return {"errors": errors}


# ---------------------------------------------------------------------- the command


def columns(spent: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Milliseconds and TFLOP/s by pass."""
    return {f"{part}_ms": 1e3 * spent[part] for part in spent} | {f"{part}_tflop_per_s": rate / 1e12 for part, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="kernel", required=True)
    experts, attention = (commands.add_parser(name) for name in ("experts", "attention"))
    experts.add_argument("--shape", default="gpt-oss-120b")
    experts.add_argument("--tokens", default="16384,65536")
    experts.add_argument("--skew", type=float, default=0.0, help="standard deviation of the experts' logits; that of the tokens' is 1")
    experts.add_argument("--tiles", default="128x256,64x256,128x128")
    attention.add_argument("--heads", default="gpt-oss-120b", choices=SHAPES, help="the model whose attention heads are measured")
    attention.add_argument("--launches", action="store_true", help="also try other launch parameters")
    attention.add_argument("--cases", default=";".join(CASES), help="names of CASES, in this module, separated by semicolons")
    for command in (experts, attention):
        command.add_argument("--json", type=Path)
        figures.add_record(command)
    arguments = parser.parse_args()
    ceiling = ceilings()
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **ceiling, "rows": []}
    rates = ceiling["matmul_flops_per_s"] / 1e12, ceiling["copy_bytes_per_s"] / 1e12
    print(f"{result['device']}: matrix product {rates[0]:.0f} TFLOP/s, copy {rates[1]:.2f} TB/s", flush=True)

    def write() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))

    def keep(row: dict[str, Any], name: str) -> None:
        result["rows"].append(row)
        told = "  ".join(f"{part} {row[f'{part}_ms']:7.2f} ms {row[f'{part}_tflop_per_s']:4.0f} TFLOP/s" for part in ("forward", "both"))
        print(f"{name:28s} {told}", flush=True)
        write()
        for part in ("forward", "both"):
            values = {f"{name}_{part}_ms": (row[f"{part}_ms"], "ms"), f"{name}_{part}": (row[f"{part}_tflop_per_s"], "TFLOP/s")}
            figures.record(arguments.record, values)

    result |= {"experts": measure_experts, "attention": measure_attention}[arguments.kernel](arguments, ceiling, keep)
    write()


if __name__ == "__main__":
    main()

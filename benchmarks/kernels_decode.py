"""The decoding kernels at gpt-oss-120b's sizes, and attention also at those of dense models, compared with this GPU's ceilings measured in
the same run.

    python benchmarks/kernels_decode.py experts [--tokens=1,8,32,128,512] [--rank=8] [--skew=0,1]
    python benchmarks/kernels_decode.py attention [--heads=gpt-oss-120b] [--cases=NAME,NAME] [--launches]
    python benchmarks/kernels_decode.py projections [--rows=1,32,128] [--rank=32] [--launches]

Each also takes --json=FILE and --record=PREFIX, and needs a GPU and the extra `cuda`. A layer's time is measured in a scan over many
layers. All times are the best of five repetitions.

experts: from the chosen experts to the summed output, on random packed weights. Rates count the packed bytes of each chosen expert once,
and the multiplications of the routed rows. Errors are relative to the norm, against float32 on dequantised weights. Routing is drawn from
normal logits. A skew is the standard deviation of an additional normal preference per expert.

attention: one new token per row attends to its pages, which are scattered over the pool. Rates count each key and value in use once.
`layer` is the loop's time per layer; for small reads, it is the host's time to launch kernels. `kernels` is the device time of the two
kernels, from a trace. Errors are relative to the largest output, against float32.

projections: queries, keys and values (2880 to 4096 + 512 + 512), and the output (4096 to 2880). 18 layers are read from their stacks, so
that no cache can hold the weights. Rates count the weights' bytes.

`--launches` also tries other launch parameters.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
import numpy as np
from attention_shapes import SHAPES, Heads
from measuring import ceilings, kernel_seconds, seconds

from discover_jax.kernels.attention import paged_attention_reference
from discover_jax.kernels.attention_decode import PagedTiling, attend_pages, paged_attention
from discover_jax.kernels.expert_rows import sort_rows
from discover_jax.kernels.experts import gated
from discover_jax.kernels.experts_decode import ExpertsTiling, TiledMatrix, choose_tiling, moe_routed, multiply
from discover_jax.kernels.mxfp4_tiles import SLABS, lay_out, restore
from discover_jax.kernels.projections import Stack, project_reference
from discover_jax.kernels.projections_decode import Launch, choose_launch, project
from discover_jax.models.mxfp4 import dequantise

# ---------------------------------------------------------------------- experts

EXPERTS, WIDTH, HIDDEN, ACTIVE = 128, 2880, 2880, 4
LIMIT, ALPHA = 7.0, 1.702
EXPERT_LAYERS = 24
"""Layers of one scan. One set of weights serves all: 1.7 GB, far more than a GPU's cache."""


def matrix(key: jax.Array, out: int, into: int, rank: int, *, paired: bool) -> TiledMatrix:
    """Random tiles, with the adapter in bfloat16, as the sampler casts it."""
    keys = jax.random.split(key, 5)
    blocks = jax.jit(lambda k: jax.random.bits(k, (EXPERTS, out, into // 32, 16), jnp.uint8))(keys[0])
    scales = jax.random.randint(keys[1], (EXPERTS, out, into // 32), 119, 123).astype(jnp.uint8)
    tiles = lay_out(blocks, scales, SLABS["gate_up" if paired else "down"])
    bias = jax.random.normal(keys[2], (EXPERTS, out), jnp.bfloat16)
    a = 0.02 * jax.random.normal(keys[3], (EXPERTS, rank, into), jnp.bfloat16)
    b = 0.02 * jax.random.normal(keys[4], (EXPERTS, out, rank), jnp.bfloat16)
    return TiledMatrix(*tiles, bias, a, b, 4.0) if rank else TiledMatrix(*tiles, bias)


def routing(tokens: int, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and their weights."""
    rng = np.random.default_rng(tokens)
    logits = rng.normal(size=(tokens, EXPERTS)) + skew * rng.normal(size=EXPERTS)
    index = np.argsort(-logits, axis=1)[:, :ACTIVE].astype(np.int32)
    weights = np.exp(np.take_along_axis(logits, index, axis=1))
    return index, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def experts_seconds(x_TD: jax.Array, index: Any, weights: Any, gate_up: TiledMatrix, down: TiledMatrix, chosen: ExpertsTiling) -> float:
    """A layer, from the chosen experts to the summed output."""

    @jax.jit
    def layers(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        def layer(x_TD: jax.Array, _: None) -> tuple[jax.Array, None]:
            own_TX = index_TX + jnp.isnan(x_TD[0, 0]).astype(jnp.int32)  # keeps the sorting inside the loop
            out_TD = moe_routed(x_TD, own_TX, weights_TX, up, low, limit=LIMIT, alpha=ALPHA, chosen=chosen)
            return (0.5 * x_TD + 1e-3 * out_TD).astype(x_TD.dtype), None

        return jax.lax.scan(layer, x_TD, length=EXPERT_LAYERS)[0]

    return seconds(layers, x_TD, jnp.asarray(index), jnp.asarray(weights), gate_up, down) / EXPERT_LAYERS


def multiply_seconds(x: jax.Array, index: Any, held: TiledMatrix, chosen: ExpertsTiling, *, paired: bool) -> float:
    """One of the layer's two kernels, with its adapter."""

    @jax.jit
    def calls(x: jax.Array, index_TX: jax.Array, held: TiledMatrix) -> jax.Array:
        rows = sort_rows(index_TX, EXPERTS, chosen.rows)

        def call(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            options = {"block": chosen.rows, "paired": paired, "share": ACTIVE if paired else 1, "limit": LIMIT, "alpha": ALPHA}
            y = multiply(x, held, rows, chosen.gate_up if paired else chosen.down, **options)
            # The next call depends on this result, so that it waits for it.
            return x + (1e-30 * y.reshape(-1)[0]).astype(x.dtype), None

        return jax.lax.scan(call, x, length=EXPERT_LAYERS)[0]

    return seconds(calls, x, jnp.asarray(index), held) / EXPERT_LAYERS


def experts_error(x_TD: jax.Array, index: Any, weights: Any, gate_up: TiledMatrix, down: TiledMatrix, chosen: ExpertsTiling) -> float:
    """The error against float32, computed expert by expert with merged adapters."""
    weights_TE = np.zeros((len(x_TD), EXPERTS), np.float32)
    np.put_along_axis(weights_TE, index, weights, axis=1)

    def dense(held: TiledMatrix, *, paired: bool) -> jax.Array:
        matrix = dequantise(*restore(held.words[None], held.factors[None], paired=paired), jnp.float32)[0]
        if held.lora_a is None or held.lora_b is None:
            return matrix
        return matrix + held.scale * held.lora_b.astype(jnp.float32) @ held.lora_a.astype(jnp.float32)

    @jax.jit
    def expected(x_TD: jax.Array, weights_TE: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        def add(total_TD: jax.Array, one: Any) -> tuple[jax.Array, None]:
            weight_T, up, low = one
            h = x_TD.astype(jnp.float32) @ dense(up, paired=True).T + up.bias.astype(jnp.float32)
            y = gated(h, limit=LIMIT, alpha=ALPHA) @ dense(low, paired=False).T + low.bias.astype(jnp.float32)
            return total_TD + weight_T[:, None] * y, None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add, jnp.zeros(x_TD.shape), (weights_TE.T, up, low))[0]

    @jax.jit
    def got(x_TD: jax.Array, index_TX: jax.Array, weights_TX: jax.Array, up: TiledMatrix, low: TiledMatrix) -> jax.Array:
        return moe_routed(x_TD.astype(jnp.float32), index_TX, weights_TX, up, low, limit=LIMIT, alpha=ALPHA, chosen=chosen)

    right = np.asarray(expected(x_TD, jnp.asarray(weights_TE), gate_up, down), np.float64)
    found = np.asarray(got(x_TD, jnp.asarray(index), jnp.asarray(weights), gate_up, down), np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def experts_row(tokens: int, skew: float, gate_up: TiledMatrix, down: TiledMatrix, most: dict[str, float]) -> dict[str, Any]:
    """One row of the table."""
    index, weights = routing(tokens, skew)
    counts = np.bincount(index.reshape(-1), minlength=EXPERTS)
    hit, chosen = int((counts > 0).sum()), choose_tiling(tokens * ACTIVE, EXPERTS)
    x_TD = jax.random.normal(jax.random.key(tokens), (tokens, WIDTH)).astype(jnp.bfloat16)
    y_RF = jax.random.normal(jax.random.key(tokens), (tokens * ACTIVE, HIDDEN)).astype(jnp.bfloat16)
    parts = {
        "gate_up": (multiply_seconds(x_TD, index, gate_up, chosen, paired=True), gate_up),
        "down": (multiply_seconds(y_RF, index, down, chosen, paired=False), down),
    }
    whole = experts_seconds(x_TD, index, weights, gate_up, down, chosen)
    packed = {name: (held.words.nbytes + held.factors.nbytes) * hit / EXPERTS for name, (_, held) in parts.items()}
    return {
        "tokens": tokens,
        "skew": skew,
        "rank": 0 if gate_up.lora_a is None else gate_up.lora_a.shape[1],
        "experts_hit": hit,
        "most_rows": int(counts.max()),
        **{f"{name}_us": 1e6 * spent for name, (spent, _) in parts.items()},
        **{f"{name}_of_copy": packed[name] / spent / most["copy_bytes_per_s"] for name, (spent, _) in parts.items()},
        "layer_us": 1e6 * whole,
        "layer_of_copy": sum(packed.values()) / whole / most["copy_bytes_per_s"],
        "layer_of_matmul": 2 * tokens * ACTIVE * 3 * WIDTH * HIDDEN / whole / most["matmul_flops_per_s"],
        "relative_error": experts_error(x_TD, index, weights, gate_up, down, chosen),
    }


def measure_experts(arguments: argparse.Namespace, most: dict[str, float], keep: Callable[[dict[str, Any], str, str], None]) -> None:
    for rank in sorted({0, arguments.rank}):
        gate_up = matrix(jax.random.key(1), 2 * HIDDEN, WIDTH, rank, paired=True)
        down = matrix(jax.random.key(2), WIDTH, HIDDEN, rank, paired=False)
        for skew, tokens in itertools.product(_floats(arguments.skew), _integers(arguments.tokens)):
            row = experts_row(tokens, skew, gate_up, down, most)
            parts = "".join(f"  {name} {row[f'{name}_us']:7.1f} us {row[f'{name}_of_copy']:4.0%}" for name in ("gate_up", "down", "layer"))
            told = f"hit {row['experts_hit']:3d}, most rows {row['most_rows']:3d}{parts}  {row['relative_error']:.1e}"
            keep(row, f"t{tokens}_skew{skew:g}_rank{rank}".replace(".", ""), told)


# ---------------------------------------------------------------------- attention

PAGE = 128
LAYERS = 18
"""Layers of a pool: the full or the sliding ones of gpt-oss-120b. Together they are far larger than a GPU's cache."""
POOL_BYTES = 4e10
"""Size limit of keys and values. Pools that would be larger have fewer layers."""
TILINGS = [
    PagedTiling(block, warps, stages, resident)
    for block, warps, stages in ((32, 1, 3), (64, 1, 2), (64, 1, 3), (64, 2, 3), (128, 4, 2))
    for resident in (4, 6)
]

CASES: dict[str, list[int]] = {
    "128 x ring": [PAGE] * 128,
    "128 x 1k": [1024] * 128,
    "128 x 2k": [2048] * 128,
    "128 x 4k": [4096] * 128,
    "128 x 8k": [8192] * 128,
    "26k + 127 x 2k": [26_000] + [2048] * 127,
    "1 to 8k": list(range(64, 8193, 64)),
    "32 x 4k": [4096] * 32,
    "1 x ring": [PAGE],
    "1 x 1k": [1024],
    "1 x 8k": [8192],
    "1 x 26k": [26_000],
}
"""Cache positions in use of each row."""


def pools(heads: Heads, pages: int) -> tuple[jax.Array, jax.Array]:
    """Random keys and values [L, P, K, s, H]."""
    shape = (pages, heads.kv_heads, PAGE, heads.size)
    layers = min(LAYERS, int(POOL_BYTES / (4 * np.prod(shape))))
    draw = jax.jit(lambda k: jax.lax.map(lambda one: jax.random.normal(one, shape, jnp.bfloat16), jax.random.split(k, layers)))
    return draw(jax.random.key(0)), draw(jax.random.key(1))


def rows_of(heads: Heads, counts: list[int], pages: int) -> tuple[jax.Array, ...]:
    """Queries, a table for rows of up to 8k (or the longest, if that is longer; for rings, of one page), counts and sinks."""
    used = [-(-count // PAGE) for count in counts]
    columns = 1 if max(used) == 1 else max(64, *used)
    table = np.full((len(counts), columns), 2**30, np.int32)
    for row, own in enumerate(np.split(np.random.default_rng(0).permutation(pages)[: sum(used)], np.cumsum(used)[:-1])):
        table[row, : used[row]] = own
    q_BNH = jax.random.normal(jax.random.key(1), (len(counts), heads.heads, heads.size), jnp.bfloat16)
    return q_BNH, jnp.asarray(table), jnp.array(counts, jnp.int32), heads.draw_sinks(jax.random.key(2), jnp.bfloat16)


def attention_loop(attend: Callable[..., jax.Array], keys: jax.Array, values: jax.Array, rows: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """A function that runs the attention of all layers in sequence."""

    @jax.jit
    def layers(q_BNH: jax.Array, keys: jax.Array, values: jax.Array, *rest: jax.Array) -> jax.Array:
        def layer(q_BNH: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            return 0.5 * q_BNH + attend(q_BNH, keys, values, i, *rest), None

        return jax.lax.scan(layer, q_BNH, jnp.arange(len(keys)))[0]

    return lambda: layers(rows[0], keys, values, *rows[1:])


def attention_error(keys: jax.Array, values: jax.Array, rows: tuple[jax.Array, ...]) -> float:
    q_BNH, *rest = rows
    got = jax.jit(paged_attention)(q_BNH, keys, values, jnp.int32(len(keys) - 1), *rest).astype(jnp.float32)

    @jax.jit
    def expected(q_BNH: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        last = (x[-1:].astype(jnp.float32) for x in (keys, values))
        return paged_attention_reference(q_BNH.astype(jnp.float32), *last, jnp.int32(0), *rest)

    with jax.default_matmul_precision("highest"):
        right = expected(q_BNH, keys, values)
    return float(jnp.abs(got - right).max() / jnp.abs(right).max())


def measure_attention(arguments: argparse.Namespace, most: dict[str, float], keep: Callable[[dict[str, Any], str, str], None]) -> None:
    heads, cases, copy = SHAPES[arguments.heads], arguments.cases.split(","), most["copy_bytes_per_s"]
    keys, values = pools(heads, max(sum(-(-count // PAGE) for count in CASES[name]) for name in cases))
    tried: dict[str, Callable[..., jax.Array]] = {"": paged_attention}
    for chosen in TILINGS if arguments.launches else ():
        label = f"_{chosen.block}_{chosen.warps}_{chosen.stages}_{chosen.resident}"
        tried[label] = functools.partial(attend_pages, chosen=chosen)
    for name, (label, attend) in itertools.product(cases, tried.items()):
        rows, bytes_read = rows_of(heads, CASES[name], keys.shape[1]), sum(CASES[name]) * heads.kv_heads * heads.size * 4
        run = attention_loop(attend, keys, values, rows)
        spent = seconds(run) / len(keys)
        kernels = kernel_seconds(run, ("attend", "merge"))
        row = {
            "case": name,
            "heads": arguments.heads,
            "layer_us": 1e6 * spent,
            "layer_of_copy": bytes_read / spent / copy,
            **{f"{kernel}_us": 1e6 * one for kernel, one in kernels.items()},
            "kernels_of_copy": bytes_read / sum(kernels.values()) / copy if kernels else 0.0,
        }
        told = f"layer {row['layer_us']:7.1f} us {row['layer_of_copy']:4.0%}  kernels {row['kernels_of_copy']:4.0%}"
        if not label:
            row["reference_us"] = 1e6 * seconds(attention_loop(paged_attention_reference, keys, values, rows)) / len(keys)
            row["relative_error"] = attention_error(keys, values, rows)
            told += f"  reference {row['reference_us']:9.1f} us  {row['relative_error']:.1e}"
        keep(row, name.replace(" + ", "_").replace(" ", "_") + label, told)


# ---------------------------------------------------------------------- projections

PROJECTIONS = {"qkv": (2880, (4096, 512, 512)), "o": (4096, (2880,))}


def stacks(width: int, outs: tuple[int, ...], rank: int) -> list[Stack]:
    """Random weights and adapters of all layers."""

    def draw(key: int, *shape: int) -> jax.Array:
        return jax.jit(lambda: shape[-1] ** -0.5 * jax.random.normal(jax.random.key(key), shape, jnp.bfloat16))()

    return [
        Stack(
            draw(i, LAYERS, out, width),
            draw(10 + i, LAYERS, out),
            *((draw(20 + i, LAYERS, rank, width), draw(30 + i, LAYERS, out, rank)) if rank else ()),
        )
        for i, out in enumerate(outs)
    ]


def projection_seconds(multiply: Callable[..., list[jax.Array]], x: jax.Array, held: list[Stack]) -> float:
    @jax.jit
    def layers(x: jax.Array, held: list[Stack]) -> jax.Array:
        def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            ys = multiply(x, held, i, 0.5)
            return x + (1e-3 * sum(y.sum(axis=1, keepdims=True) for y in ys)).astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]

    return seconds(layers, x, held) / LAYERS


def measure_projections(arguments: argparse.Namespace, most: dict[str, float], keep: Callable[[dict[str, Any], str, str], None]) -> None:
    for (name, (width, outs)), rows in itertools.product(PROJECTIONS.items(), _integers(arguments.rows)):
        held = stacks(width, outs, arguments.rank)
        x = jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16)
        pairs = zip(project(x, held, jnp.int32(1), 0.5), project_reference(x, held, jnp.int32(1), 0.5), strict=True)
        error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
        tried: dict[str, Callable[..., list[jax.Array]]] = {"xla": project_reference, "kernel": project}
        if arguments.launches:
            for outputs, parts, stages, warps in itertools.product((64, 128), (1, 2, 3, 4), (3, 5), (4, 8)):
                launch = Launch(outputs, parts, stages, warps)
                if (outputs, warps) != (64, 8) and (rows > 16 or outputs == 64):
                    tried[f"{outputs}_{parts}_{stages}_{warps}"] = functools.partial(project, chosen=launch)
        for label, multiply_all in tried.items():
            spent = projection_seconds(multiply_all, x, held)
            of_copy = 2 * width * sum(outs) / spent / most["copy_bytes_per_s"]
            row = {"what": name, "rows": rows, "how": label, "layer_us": 1e6 * spent, "layer_of_copy": of_copy, "relative_error": error}
            told = f"{row['layer_us']:7.1f} us {of_copy:5.0%}  {error:.1e}"
            keep(row, f"{name}_b{rows}_{label}", told + (f"  {choose_launch(rows, sum(outs))}" if label == "kernel" else ""))


# ---------------------------------------------------------------------- the command


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="kernel", required=True)
    experts, attention, projections = (commands.add_parser(name) for name in ("experts", "attention", "projections"))
    experts.add_argument("--tokens", default="1,8,32,128,512")
    experts.add_argument("--rank", type=int, default=8, help="rank of the experts' adapters in a second pass; 0: no second pass")
    experts.add_argument("--skew", default="0,1")
    attention.add_argument("--heads", default="gpt-oss-120b", choices=SHAPES, help="the model whose attention heads are measured")
    attention.add_argument("--launches", action="store_true", help="also try other launch parameters")
    attention.add_argument("--cases", default=",".join(CASES), help="names of CASES, in this module")
    projections.add_argument("--rows", default="1,32,128")
    projections.add_argument("--rank", type=int, default=32)
    projections.add_argument("--launches", action="store_true", help="also try other launch parameters")
    for command in (experts, attention, projections):
        command.add_argument("--json", type=Path)
        figures.add_record(command)
    arguments = parser.parse_args()
    most = ceilings()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, **versions, **most, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in (("device", result["device"]), *versions.items())))
    print(f"copy {most['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product {most['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s")

    def keep(row: dict[str, Any], name: str, told: str) -> None:
        """Called after each row, so that a later failure does not lose it."""
        result["rows"].append(row)
        print(f"{name:24s} {told}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))
        values = {f"{name}_us": (row["layer_us"], "us"), f"{name}_of_copy": (row["layer_of_copy"], "fraction")}
        figures.record(arguments.record, values)

    {"experts": measure_experts, "attention": measure_attention, "projections": measure_projections}[arguments.kernel](
        arguments, most, keep
    )


if __name__ == "__main__":
    main()

"""The update's attention at gpt-oss's heads, beside cuDNN's and this GPU's own matrix product, measured in the same run.

    python benchmarks/attention_update.py [--cases=NAME,NAME] [--json=FILE]

Forward, and forward with backward, of one row of packed rollouts. Rates count the pairs of a query and a key that see each other: 4 H
operations a pair and head forward, 10 H backward. cuDNN's attention (jax.nn.dot_product_attention) knows neither sinks nor segments, so it
stands beside rows of one rollout only. Errors are the largest of the outputs and of each gradient against the plain-JAX reference in
float32, relative to the norm, on a row of 2,048 tokens. Needs a GPU and the extra `kernels`; every figure is the best of five repetitions.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import ceilings, seconds

from discover_jax.kernels.attention_update import packed_attention, windowed_attention
from discover_jax.kernels.packed_attention import packed_attention_reference, windowed_attention_reference

HEADS, KV_HEADS, SIZE, WINDOW = 64, 8, 64, 128

CASES: dict[str, tuple[list[int], int | None]] = {
    "1 x 26k": ([26_624], None),
    "1 x 8k": ([8192], None),
    "4 x 8k": ([8192] * 4, None),
    "uneven, 32k": ([14_000, 9_000, 5_000, 2_500, 1_200, 600, 400], None),
    "32k, window": ([32_768], WINDOW),
    "uneven, 32k, window": ([14_000, 9_000, 5_000, 2_500, 1_200, 600, 400], WINDOW),
}
"""Lengths of the rollouts of a row, and the window."""


def arrays(lengths: list[int], dtype: Any = jnp.bfloat16) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Queries, keys, values and the output's gradient; segments, the row being filled up to a multiple of 128; sinks."""
    tokens = -(-sum(lengths) // 128) * 128
    keys = jax.random.split(jax.random.key(0), 5)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    drawn = tuple(jax.random.normal(key, (1, tokens, n, SIZE), dtype) for key, n in zip(keys, heads, strict=False))
    segments = np.zeros(tokens, np.int32)
    segments[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return drawn, jnp.asarray(segments)[None], jax.random.normal(keys[4], (HEADS,), dtype)


def pairs(lengths: Sequence[int], window: int | None) -> int:
    """Of a query and a key that see each other."""
    seen = [min(n, window or n) for n in lengths]
    return sum(w * (w + 1) // 2 + (n - w) * w for n, w in zip(lengths, seen, strict=True))


def passes(attend: Callable[..., jax.Array], drawn: tuple[jax.Array, ...]) -> dict[str, float]:
    """Seconds of the forward pass, and of both together."""

    def gradients(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        return jax.vjp(attend, q, k, v)[1](d_out)

    return {"forward": seconds(jax.jit(attend), *drawn[:3]), "both": seconds(jax.jit(gradients), *drawn)}


def errors(window: int | None) -> dict[str, float]:
    drawn, segments, sinks = arrays([1_000, 700, 40, 200])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ceiling = ceilings()
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **ceiling, "rows": []}
    result["errors"] = {"full": errors(None), "window": errors(WINDOW)}
    print(f"matmul {ceiling['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s; errors {result['errors']}", flush=True)
    for name in arguments.cases.split(",") if arguments.cases else CASES:
        lengths, window = CASES[name]
        drawn, segments, sinks = arrays(lengths)
        options = {} if window is None else {"window": window}
        own = functools.partial(windowed_attention, **options) if window else packed_attention
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        variants: dict[str, Callable[..., jax.Array]] = {"kernels": lambda q, k, v, f=own, g=segments, s=sinks: f(q, k, v, g, s)}
        if len(lengths) == 1:
            variants["cudnn"] = functools.partial(cudnn, local_window_size=(window - 1, 0)) if window else cudnn
        for variant, attend in variants.items():
            spent = passes(attend, drawn)
            forward = 4.0 * SIZE * HEADS * pairs(lengths, window)
            rates = {"forward": forward / spent["forward"], "both": 3.5 * forward / spent["both"]}
            row = {"case": name, "variant": variant}
            row |= {f"{part}_ms": 1e3 * spent[part] for part in spent} | {
                f"{part}_tflop_per_s": rate / 1e12 for part, rate in rates.items()
            }
            result["rows"].append(row)
            told = "  ".join(f"{part} {1e3 * spent[part]:7.2f} ms {rates[part] / 1e12:4.0f} TFLOP/s" for part in rates)
            print(f"{name:22s} {variant:8s} {told}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

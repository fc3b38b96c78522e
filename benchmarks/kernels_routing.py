"""From a router's logits to rows sorted by expert, in decoding on a GPU: plain JAX and the sorting kernel, beside kernels for both.

    python benchmarks/kernels_routing.py [--rows=1,128] [--experts=32,128]

It also takes --json=FILE and --record=PREFIX, and needs a GPU and the extra `cuda`. A layer's time is measured in a scan over 36 layers.
The number of kernels of a layer is from a trace, and includes those that make the next layer depend on this one. "fused" is what
`route_sorted` launches: one kernel for few logits, "parts" for more: one kernel that chooses and one that sorts.
`python benchmarks/sampling.py steps` and `--separate_routing` measure whole decoding steps.
"""

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import jax
import jax.numpy as jnp
from measuring import seconds, trace

from discover_jax.kernels.expert_rows import Blocks
from discover_jax.kernels.expert_rows_decode import sort_rows_of_layer
from discover_jax.kernels.experts import route_top
from discover_jax.kernels.experts_decode import choose_tiling
from discover_jax.kernels.route_decode import ONE_LAUNCH, padded_logits, route_sorted

LAYERS, CHOSEN = 36, 4
Route = Callable[[jax.Array, int, jax.Array], tuple[jax.Array, jax.Array, Blocks | None]]


def separate(logits_TE: jax.Array, experts_per_token: int, layer: jax.Array) -> tuple[jax.Array, jax.Array, Blocks]:
    """As without the fused kernel."""
    index_TX, weights_TX = route_top(logits_TE, experts_per_token)
    experts = logits_TE.shape[1]
    return index_TX, weights_TX, sort_rows_of_layer(index_TX, experts, choose_tiling(index_TX.size, experts).rows, layer)


def layers_of(route: Route) -> Any:
    """All layers in sequence."""

    @jax.jit
    def layers(logits_TE: jax.Array) -> jax.Array:
        def layer(logits_TE: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            _, weights_TX, rows = route(logits_TE, CHOSEN, i)
            assert rows is not None, "both sort"
            used = weights_TX.sum() + (rows.slots.sum() + rows.blocks.sum()).astype(jnp.float32)
            return logits_TE * (1 + 1e-30 * used), None

        return jax.lax.scan(layer, logits_TE, jnp.arange(LAYERS))[0]

    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="1,128")
    parser.add_argument("--experts", default="32,128")
    parser.add_argument("--json", type=Path)
    figures.add_record(parser)
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, **versions, "rows": {}}
    print(", ".join(f"{name} {result[name]}" for name in ("device", *versions)), flush=True)
    sizes = itertools.product(*(map(int, text.split(",")) for text in (arguments.experts, arguments.rows)))
    for (experts, rows), route in itertools.product(sizes, (separate, route_sorted)):
        if route is route_sorted and route(jnp.zeros((rows, experts)), CHOSEN, jnp.int32(0))[2] is None:
            continue  # plain JAX
        label = "separate" if route is separate else "fused" if padded_logits(rows, experts) <= ONE_LAUNCH else "parts"
        logits_TE = jax.random.normal(jax.random.key(rows), (rows, experts))
        layers = layers_of(route)
        spent = seconds(layers, logits_TE) / LAYERS
        found = trace(lambda f=layers, x=logits_TE: jax.block_until_ready(f(x)), layers.lower(logits_TE).compile().as_text())
        name, kernels = f"routing_e{experts}_b{rows}_{label}", found.events / LAYERS
        result["rows"][name] = {"layer_us": 1e6 * spent, "device_us": 1e-3 * found.whole_ns / LAYERS, "kernels": kernels}
        told = f"{1e6 * spent:7.2f} us a layer, {kernels:5.1f} kernels, busy {1e-3 * (found.whole_ns - found.idle_ns) / LAYERS:7.2f} us"
        print(f"{name:28s} {told}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))
        figures.record(arguments.record, {f"{name}_us": (1e6 * spent, "us"), f"{name}_kernels": (kernels, "kernels")})


if __name__ == "__main__":
    main()

"""Counts what compiled TPU programs and kernels move and compute, over the least that is possible. It needs no TPU.

    python benchmarks/tpu_counts.py bytes --compile=gpt-oss-120b        # of a decoding step: compiles it (minutes; needs the extra `tpu`)
    python benchmarks/tpu_counts.py bytes --compile=gpt-oss-120b --hlo=FILE    # keeps the compiled text, or reads it if the file exists
    python benchmarks/tpu_counts.py update --compile=qwen2.5-coder-1.5b # operations of the update of a dense model: compiles it, too
    python benchmarks/tpu_counts.py experts                             # operations of the update's kernels of experts (seconds)

Results are recorded in measurements.csv, except with `--dry`.

`bytes`: 128 rows with 8,192 tokens, without shared prompts. XLA's operations are counted from the compiled text (hlo_counts); a launch of
several steps shares what is outside of the loop over steps. The experts' kernel reads an expert once for each block of its rows, and the
attention kernel reads whole pages. The kernels of projections, head, norms and router read each weight once, and of biases and norms those
of all layers of a stack. These are counted from the kernels' arguments. The minimum comes from `costs_tpu.decode_needs`.

`update`: products in the compiled text and, from their grids, those of the attention kernels, with a row of 34,192 tokens on each device.
The adapter's products are included, and not in what is needed (`costs_tpu.microbatch_needs`). The loops of gpt-oss's experts depend on
the routing, so its programs cannot be counted.

`experts`: products of the kernels on the busiest device, from their grids, with padding of rows and columns, but not of the matrix units.
Needed are a forward pass, its repetition (full rematerialisation), and the gradients of activations and adapters.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax import costs, costs_tpu
from discover_jax.config import default_config
from discover_jax.costs import MeshShape
from discover_jax.engine import build_model, build_optimizer, build_sampler, build_update, microbatch_rows, row_tokens
from discover_jax.kernels.attention_update_tpu import BLOCK, packed_attention
from discover_jax.kernels.experts import route_top
from discover_jax.kernels.experts_decode_tpu import choose_rows, steps_of
from discover_jax.kernels.experts_update_tpu import Layer, choose_tiles, moe_sorted
from discover_jax.kernels.mxfp4_lanes import PARTS, powers_shape, words_shape
from discover_jax.kernels.pages_tpu import LANES, SUBLANES
from discover_jax.learning.train_state import abstract_train_state
from discover_jax.machines import Machine, find_machine
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.families import SHAPES
from discover_jax.models.sharding import make_mesh
from discover_jax.sampling.sampler import LAUNCH_STEPS
from discover_jax.sampling.schedule import PAGE

sys.path.insert(0, str(Path(__file__).parent))  # for a test that loads this file by its path
import figures
import hlo_counts
import tpu_memory

ROWS, CONTEXT = 128, 8_192


class Decoding(NamedTuple):
    """A slice, and a mesh for the decoding of a model."""

    slice: str
    mesh: MeshShape


DECODINGS = {
    "gpt-oss-120b": Decoding("v5p:2x2x2", MeshShape(1, 8)),
    "gpt-oss-20b": Decoding("v5p:2x2x1", MeshShape(1, 4)),
    "qwen2.5-coder-1.5b": Decoding("v5p:2x2x1", MeshShape(1, 1)),
}


# ---------------------------------------------------------------------- bytes of a decoding step


def decoding_config(shape: str, mesh: MeshShape) -> Any:
    """The config of the counted decoding step."""
    config = default_config()
    config.model.weights, config.model.shape = "random", shape
    config.mesh.data, config.mesh.expert = mesh.data, mesh.expert
    config.sampling.slots, config.groups, config.group_size = ROWS, ROWS // 8, 8
    config.sampling.max_prompt_tokens, config.sampling.max_new_tokens = 1_536, 8_704
    if not SHAPES[shape].num_experts:
        config.lora.mlp_rank, config.lora.expert_rank, config.lora.head_rank = 32, 0, 0
    return config


def compiled_decoding(config: Any, sizes: ModelConfig, machine: Machine) -> str:
    """The optimised HLO of a launch of decoding steps."""
    mesh = make_mesh(config.mesh.data, config.mesh.expert, 1, machine.devices)
    model = build_model(config, sizes, mesh, machine.platform)
    state = abstract_train_state(model.abstract_lora(), build_optimizer(config))
    sampler = build_sampler(config, model, stop_ids=(0,), memory=machine.memory, large_tiles=machine.large_tiles)
    functions = sampler.lowered_functions(model.abstract_frozen(), state.lora, config.groups, ROWS)
    decode = next(function for function in functions if function.name == "decode")
    return decode.lowered.compile(compiler_options=machine.options or None).as_text()


def experts_factor(sizes: ModelConfig, held: int, rows: int = ROWS, draws: int = 20) -> float:
    """Bytes that the kernel reads and writes over those of the chosen experts, for a device with `held` experts and random routing."""
    matrices = {"gate_up": (2 * sizes.mlp_width, sizes.width), "down": (sizes.width, sizes.mlp_width)}
    laid_out = sum(
        4 * math.prod(words_shape(*matrix, PARTS[name])) + math.prod(powers_shape(*matrix, PARTS[name]))
        for name, matrix in matrices.items()
    )
    block = choose_rows(rows * sizes.experts_per_token * held // sizes.num_experts, held)
    rng = np.random.default_rng(held)

    @jax.jit
    def route(logits_TE: Any) -> tuple[jax.Array, jax.Array]:
        index_TX, weights_TX = route_top(logits_TE, sizes.experts_per_token)
        return index_TX, (steps_of(jnp.minimum(index_TX, held), weights_TX, held, block, 0)[2] > 0).sum()

    read = chosen = 0
    for _ in range(draws):
        index_TX, steps = route(rng.normal(size=(rows, sizes.num_experts)).astype(np.float32))
        read += int(steps)
        chosen += len(set(np.asarray(index_TX).ravel().tolist()) & set(range(held)))
    # A row's input and its sum, for both cores of a chip: 2 x (2 + 2 x 4) bytes a value.
    moved = laid_out * read + draws * 20 * rows * sizes.width
    return moved / (chosen * sum(out * into for out, into in matrices.values()) * (1 / 2 + 1 / 32))


def cache_factor(sizes: ModelConfig, rows: int = ROWS, context: int = CONTEXT) -> float:
    """Bytes that the kernels of attention and of writing move over those of keys and values, for lengths around `context`."""
    counts = np.random.default_rng(0).integers(context * 3 // 4, context * 5 // 4, rows)
    window = sizes.sliding_window if sizes.num_sliding else 0
    read = sizes.num_full * -(-counts // PAGE) * PAGE + sizes.num_sliding * window
    # To the chip and back: the tiles with a token's place, whose lanes are places if a head does not fill them (pages_tpu).
    written = 2 * (LANES if sizes.head_size < LANES else SUBLANES) * sizes.num_layers
    return float((read + written).sum() / (sizes.num_full * counts + sizes.num_sliding * window).sum())


def other_kernel_bytes(sizes: ModelConfig, lora: LoraConfig, own: float) -> float:
    """Bytes that the kernels of projections, head, norms and router move for `own` rows: weights, and activations that they read and
    write."""
    heads, kv = sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    into, out = sizes.width + heads, heads + 2 * kv + sizes.width
    lines = (heads + 2 * kv) * sizes.qkv_bias + sizes.width * sizes.o_bias
    if sizes.num_experts:  # norms and the router with what it sends
        lines += 2 * sizes.width + sizes.num_experts
        into, out = into + 2 * 2 * sizes.width, out + 3 * sizes.width
    else:
        into, out = into + sizes.width + sizes.mlp_width, out + 2 * sizes.mlp_width + sizes.width
    repeats = sizes.num_layers // len(sizes.pattern)
    activations = sizes.num_layers * own * (4 * into + 4 * out) + own * (2 * sizes.width + 4 * sizes.vocab_size)
    return costs.other_bytes(sizes, lora) + sizes.num_layers * (repeats - 1) * 2 * lines + activations


def decoding_bytes(sizes: ModelConfig, lora: LoraConfig, mesh: MeshShape, text: str) -> dict[str, float]:
    """Bytes that a device moves in a step, by part, and under `least` the least possible.

    Raises:
      ValueError: the text has other loops than one over steps and, within, one over layers.
    """
    levels = hlo_counts.bytes_by_depth(text)
    if len(levels) != 3:
        raise ValueError(f"expected a loop over steps and one over layers, nested; found loops {len(levels) - 1} deep")
    launch, step, layers = levels
    repeats = sizes.num_layers // len(sizes.pattern)
    own = ROWS / mesh.size
    moved = {"program": launch / LAUNCH_STEPS + step + repeats * layers}
    if sizes.num_experts:
        hit = 1 - (1 - sizes.experts_per_token / sizes.num_experts) ** (ROWS / mesh.data)
        held = sizes.num_experts // mesh.expert
        chosen = hit * sizes.num_layers * held * costs.expert_bytes(sizes, lora.expert_rank)
        moved["experts"] = experts_factor(sizes, held) * chosen
    moved["other weights"] = other_kernel_bytes(sizes, lora, own)
    moved["keys and values"] = cache_factor(sizes) * own * costs.cached_bytes(sizes, CONTEXT)
    return moved | {"least": costs_tpu.decode_needs(sizes, lora, ROWS, CONTEXT, mesh).bytes}


# ---------------------------------------------------------------------- operations of the update's experts


class Routing(NamedTuple):
    """Tokens of all devices along `expert`, and how unequal the experts' load is: 0 for equal chances."""

    shape: str
    tokens: int
    expert: int
    skew: float = 0.0


ROUTINGS = {
    "20b_row": Routing("gpt-oss-20b", 34_192, 1),  # the longest row of the report's third run
    "120b_8_rows": Routing("gpt-oss-120b", 8 * 34_192, 8),
    "120b_8_rows_unequal": Routing("gpt-oss-120b", 8 * 34_192, 8, 1.0),  # loads differ by orders of magnitude
    "120b_16_short_rows": Routing("gpt-oss-120b", 16 * 4_096, 16),
}


def kernel_operations(jaxpr: Any, axes: int | None = None, turns: int = 1, pairs: int = 0) -> int:
    """Floating point operations of all products of kernels, over the first `axes` of each kernel's grid, or over all. An axis whose size is
    known at run time has `pairs` steps.

    A step of a grid runs one of a kernel's conditional parts that have products: in attention, with the mask or without.
    """
    total = most = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((axis,), _), _ = eqn.params["dimension_numbers"]
            total += 2 * turns * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[axis]
        grid = eqn.params["grid_mapping"].grid[:axes] if eqn.primitive.name == "pallas_call" else ()
        within = math.prod(size if isinstance(size, int) else pairs for size in grid) if grid else turns
        parts = [leaf for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(leaf)]
        inner = sum(kernel_operations(getattr(part, "jaxpr", part), axes, within, pairs) for part in parts)
        if eqn.primitive.name == "cond":
            most = max(most, inner)
        else:
            total += inner
    return total + most


def _is_jaxpr(leaf: Any) -> bool:
    return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")


def operations_ratio(routing: Routing, rank: int = 8) -> float:
    """Floating point operations of the kernels of a layer's experts, forward and backward, over those needed."""
    sizes, rng = SHAPES[routing.shape], np.random.default_rng(0)
    tokens, experts, chosen = routing.tokens, sizes.num_experts, sizes.experts_per_token
    width, hidden, own = sizes.width, sizes.mlp_width, sizes.num_experts // routing.expert
    logits = (rng.gumbel(size=(tokens, experts)) + 2 * routing.skew * rng.normal(size=experts)).astype(np.float32)
    index = np.argpartition(-logits, chosen, axis=1)[:, :chosen].reshape(-1)
    counts = np.bincount(index, minlength=experts).reshape(routing.expert, own)
    counts = counts[counts.sum(axis=1).argmax()]
    tiles = choose_tiles(chosen * tokens, experts, own)
    blocks = np.ceil(counts / tiles.rows).sum()

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    matrices, adapters = [], []
    for out, into in ((2 * hidden, width), (width, hidden)):
        packed = {"blocks": of(own, out, into // 32, 16, dtype=jnp.uint8), "scales": of(own, out, into // 32, dtype=jnp.uint8)}
        matrices.append(packed | {"bias": of(own, out)})
        adapters.append((of(own, rank, into), of(own, out, rank)))
    layer = Layer(7.0, 1.702, 4.0, 4.0, tiles)

    def both(x: Any, weights: Any, adapters: Any, index: Any, matrices: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda *leaves: moe_sorted(*leaves, index, *matrices, layer), x, weights, adapters)
        return out, pull(d_out)

    chosen_of = of(tokens, chosen), tuple(adapters), of(tokens, chosen, dtype=jnp.int32)
    shapes = of(tokens, width), *chosen_of, matrices, of(tokens, width, dtype=jnp.float32)
    done = blocks * kernel_operations(jax.make_jaxpr(both)(*shapes).jaxpr, axes=1)  # the columns; the second axis is the blocks
    needed = 2 * counts.sum() * (3 * 3 * width * hidden + 4 * rank * (2 * width + 3 * hidden))
    return float(done / needed)


# ---------------------------------------------------------------------- operations of a dense model's update

UPDATES = {"qwen2.5-coder-1.5b": tpu_memory.Case("v5p:2x2x2", "qwen2.5-coder-1.5b", 8, 1)}


def attention_operations(sizes: ModelConfig, tokens: int) -> int:
    """Floating point operations of the kernels of a full layer's attention, forward and backward, for a row with one segment."""

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def both(q: Any, k: Any, v: Any, segments: Any, sinks: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, segments, sinks), q, k, v)
        return out, pull(d_out)

    q, k = (of(1, tokens, heads, sizes.head_size) for heads in (sizes.num_heads, sizes.num_kv_heads))
    shapes = q, k, k, of(1, tokens, dtype=jnp.int32), of(sizes.num_heads, dtype=jnp.float32), q
    count = -(-tokens // BLOCK)
    return kernel_operations(jax.make_jaxpr(both)(*shapes).jaxpr, pairs=count * (count + 1) // 2)


def compiled_gradient(config: Any, sizes: ModelConfig, machine: Machine) -> str:
    """The optimised HLO of a microbatch's gradient."""
    mesh = make_mesh(config.mesh.data, config.mesh.expert, 1, machine.devices)
    model, optimizer = build_model(config, sizes, mesh, machine.platform), build_optimizer(config)
    state = abstract_train_state(model.abstract_lora(), optimizer)
    functions = build_update(config, model, optimizer).lowered_functions(
        model.abstract_frozen(), state, microbatch_rows(config), row_tokens(config)
    )
    gradient = next(function for function in functions if function.name == "gradient")
    return gradient.lowered.compile(compiler_options=machine.options or None).as_text()


def update_ratio(sizes: ModelConfig, tokens: int, text: str) -> float:
    """Floating point operations of a dense model's compiled gradient, with a row of `tokens` on each device, over those needed.

    Raises:
      ValueError: the number of turns of a loop is not in the text.
    """
    done = hlo_counts.product_operations(text) + sizes.num_layers * attention_operations(sizes, tokens)
    return done / costs_tpu.microbatch_needs(sizes, LoraConfig(), tokens, tokens, gradient=True).operations


# ---------------------------------------------------------------------- command line


def _text(file: Path | None, compiled: Callable[[], str]) -> str:
    """The file's text, or that of the compiled program, which is kept in the file."""
    if file is not None and file.exists():
        return file.read_text()
    text = compiled()
    if file is not None:
        file.write_text(text)
    return text


def count_bytes(shape: str, hlo: Path | None) -> float:
    """Compiles a model's decoding step, or reads its text. Prints the bytes; returns those over the least."""
    slice, mesh = DECODINGS[shape]
    sizes, config = SHAPES[shape], decoding_config(shape, mesh)
    text = _text(hlo, lambda: compiled_decoding(config, sizes, find_machine(slice, mesh.size)))
    moved = decoding_bytes(sizes, LoraConfig(**config.lora).of_model(sizes), mesh, text)
    least = moved.pop("least")
    total = sum(moved.values())
    parts = ", ".join(f"{part} {size / 1e9:.3f}" for part, size in moved.items())
    print(f"{shape} on {slice}, data {mesh.data} x expert {mesh.expert}: GB of a step on a device: {parts}; least {least / 1e9:.3f}")
    return total / least


def count_update(shape: str, hlo: Path | None) -> float:
    """Compiles the gradient of a dense model, or reads its text. Returns its operations over those needed."""
    case, sizes = UPDATES[shape], SHAPES[shape]
    config = case.config()
    text = _text(hlo, lambda: compiled_gradient(config, sizes, find_machine(case.slice, case.data)))
    return update_ratio(sizes, row_tokens(config), text)


def main() -> None:
    counts = {"bytes": (DECODINGS, count_bytes), "update": (UPDATES, count_update)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=[*counts, "experts"])
    parser.add_argument("--compile", metavar="MODEL", default="", help="for bytes and update: the model")
    parser.add_argument("--hlo", type=Path, help="file of the compiled text, written if it does not exist")
    parser.add_argument("--dry", action="store_true", help="do not record")
    arguments = parser.parse_args()
    command = f"python benchmarks/tpu_counts.py {arguments.what}"
    if arguments.what == "experts":
        found = {f"experts_{name}": operations_ratio(routing) for name, routing in ROUTINGS.items()}
    else:
        models, count = counts[arguments.what]
        if arguments.compile not in models:
            parser.error(f"{arguments.what} needs --compile, one of {', '.join(models)}; got {arguments.compile!r}")
        found = {f"{arguments.what}_{arguments.compile}": count(arguments.compile, arguments.hlo)}
        command += f" --compile={arguments.compile}"
    for name, ratio in found.items():
        print(f"{name}: {ratio:.3f} times the least")
        if not arguments.dry:
            figures.append("tpu_" + re.sub(r"\W", "_", name), ratio, "ratio", command)


if __name__ == "__main__":
    main()

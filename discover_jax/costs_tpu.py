"""Predicted seconds of sampling and of the update on TPUs, and the roofline to compare them with.

No TPU has run this package. Bytes, operations and exchanges are those of the kernels and of compiled programs; how fast a chip does them is
assumed. Each constant says where it comes from. Nothing is compiled here. These formulas are for meshes with `tensor` = 1, since only they
have kernels.

The *roofline* of a phase is what a device needs at least, at the vendor's peak: the longest of bytes (each weight that is used, and each
key and value, read once), operations (those of the update with rematerialisation) and exchange (activations gathered in bfloat16, and sums
returned in float32, once). The prediction adds up its parts as if none overlapped, with one exception: in the compiled program, the
exchange of an update's tokens around a ring overlaps with the kernels of the experts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from discover_jax.costs import (
    DECODE_BANDWIDTH_FRACTION,
    FORWARD,
    GRADIENT,
    ONE,
    REMAT_FACTORS,
    UPDATE_UNPACK_FRACTION,
    Cost,
    MeshShape,
    attention_operations,
    cached_bytes,
    expert_bytes,
    expert_weights,
    layer_weights,
    other_bytes,
)
from discover_jax.kernels.attention_update_tpu import BLOCK
from discover_jax.kernels.exchange import chunk_of
from discover_jax.kernels.expert_steps_tpu import LANES, packed_column
from discover_jax.kernels.experts_update_tpu import TOKEN_TILE, TOKENS_AT_ONCE, choose_tiles, chunk_of_ring, use_ring
from discover_jax.machines import Speeds, TpuPeaks
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.sampling.sampler import LAUNCH_STEPS, PROMPT_CHUNK

EXPERT_BYTES_FACTOR, CACHE_BYTES_FACTOR = 1.06, 1.07
"""Bytes that the kernels of decoding move over the least: experts of the 120b on 8 devices; keys and values of 128 rows with 8k tokens
(benchmarks/tpu_counts.py)."""
SMALL = 2122 / 1.75e9
"""Seconds of the smallest operation by XLA's estimate: 2,122 cycles at 1.75 GHz. The start of a kernel is counted as one."""
LAYER_SECONDS, DENSE_LAYER_SECONDS = 31e-6, 92e-6
"""Seconds of a decoding layer of experts, and of a dense one, in operations that are neither reading kernels nor exchanges.

They are the compiler's, not measured (v5p, libtpu 0.0.42.1). Experts, for the 120b with 16 rows on each of 8 chips: 14,500 cycles of XLA's
operations by its estimates, one operation without an estimate, and the starts of 9 kernels, counted as `SMALL` each; 12,000 cycles that the
kernels of norms, routing, sorting, rotation and writing take by their schedules; 1,300 in which attention does not read; and `SMALL` for
each 8 rows that are written, which wait for copies. Dense, for Qwen2.5-Coder-1.5B with 128 rows on a chip: 106,000 cycles of XLA's
operations, the starts of 6 kernels, and 23 us for writing."""
DRAW_SECONDS = 48e-12
"""Seconds per logit to draw tokens, and for the other operations of a step: XLA's estimates, 265,000 cycles for 16 rows of the 120b and
1.65 million for 128 rows of the 1.5B."""
LAUNCH_SECONDS, DENSE_LAUNCH_SECONDS = 7.2e-3, 0.3e-3
"""Seconds to copy the embedding and adapters into other layouts and types, once in a launch or a prompt's chunk: XLA's estimates, 12.5
million cycles for the 120b on 8 chips and 0.5 million for the 1.5B."""
SEPARATE_LAYER_SECONDS = 70e-6
"""The same for a layer of experts of a prompt's chunk, which uses the separate operations; by XLA's estimates in decoding, before the
kernels of a layer."""
LAYER_COLLECTIVES, SEPARATE_COLLECTIVES, STEP_COLLECTIVES = 2, 4, 4
"""Collectives of a layer of decoding, of a layer of a prompt's chunk, and of a step. In decoding, a layer gathers activations together with
experts and their weights, and adds the sums. The separate operations gather these three one by one."""
SUMS_FACTOR = 2
"""Bytes of sums over the least: XLA compiles a scattered sum as an all-reduce (v5p 2x2x2 and v6e 4x4, libtpu 0.0.42.1)."""
PASSES = {False: FORWARD, True: GRADIENT._replace(attention=3.5)}
"""Without and with the gradient. Attention's backward pass has five products: scores, the gradients of scores, queries, keys and values."""
SCHEDULE_ALLOWANCE = 1.25
"""Time of the update's kernels and products over that of the compiler's schedule, which shows neither late copies, conflicts in memory nor
the start of kernels. This is a judgement, not a measurement. Copies take at most half of a step, but nearly all of it where the next block
has another expert, whose matrices are then read within one step. That is one block in five with run 3's visits."""
EXPERTS_SMALL = {True: (0.17e-6, 0.36e-6), False: (0.28e-6, 0.84e-6)}
"""Seconds of a token and layer of gpt-oss in XLA's operations around the kernels of the experts, forward and for the gradient, with a ring
and without: casts, zeros, copies, also those at the borders of the layer. XLA's estimates for v5p at 1.75 GHz, in a compiled layer of the
120b with 34,192 tokens on each of 8 devices (tests/kernels/tpu_compile_program.py). XLA assumes a fifth to a quarter of the bandwidth for
the largest. Without a ring, compiled before the kernel for the gradient of the activation, and less the operations that it replaces. Other
chips are scaled by their bandwidth."""
RING_BYTES = 20
"""Bytes that the kernels of a ring read and write per value of a visitor, forward as well as backward. Forward: joining its halves, 4;
adding to the sums, 12; zeros, 4. Backward: joining activations and gradients, 8; adding, 8; zeros, 4. By their schedules, they take as long
as these copies (benchmarks/tpu_schedule.py)."""
_V5P_BANDWIDTH, _SMALL_WIDTH = 2765e9, 2_880
LAYER_BYTES, LAYER_BYTES_GRADIENT = 60, 210
"""Bytes that a layer's other operations read and write per token and value of its width: norms, sums, rotation, layouts of queries and
outputs. Counted by hand, as if each was fused; no whole program was counted."""
SENT_FORWARD, SENT_GRADIENT = 6, 12
"""Bytes along `expert` per value of a token. Forward: 2 of inputs (bfloat16) and 4 of sums. Backward, in bfloat16: the inputs again, the
gradients of sums, and those of inputs."""
SUMS_FORWARD, SUMS_GRADIENT = 4, 6
"""Bytes among those that are sums."""


class Needs(NamedTuple):
    """What one device needs at least: bytes of its memory, floating point operations, bytes from other devices."""

    bytes: float
    operations: float
    sent: float

    def times(self, count: float) -> "Needs":
        return Needs(*(count * value for value in self))

    def plus(self, other: "Needs") -> "Needs":
        return Needs(*(mine + its for mine, its in zip(self, other, strict=True)))

    def seconds(self, peaks: TpuPeaks, mesh: MeshShape) -> Cost:
        """Seconds of each resource at the vendor's peak. The largest is the roofline."""
        return {
            "bytes": self.bytes / peaks.bandwidth,
            "operations": self.operations / peaks.product,
            "exchange": self.sent / (peaks.link * peaks.links(mesh.expert)),
        }


NOTHING = Needs(0.0, 0.0, 0.0)


def _peaks(speeds: Speeds) -> TpuPeaks:
    assert speeds.tpu is not None, "the speeds are a TPU's"
    return speeds.tpu


def _received(mesh: MeshShape, size: float) -> float:
    """Bytes that a device receives along `expert` in a collective after which it has `size` bytes."""
    return (mesh.expert - 1) / mesh.expert * size


def _exchange_seconds(speeds: Speeds, mesh: MeshShape, size: float, times: float) -> float:
    link = speeds.link * _peaks(speeds).links(mesh.expert)
    return 0.0 if mesh.expert == 1 else _received(mesh, size) / link + times * speeds.latency


class _Shares(NamedTuple):
    """Rows or tokens of a device (own), those that its experts see, and the fraction of its experts that some of them choose."""

    own: float
    seen: float
    hit: float


def _shares(sizes: ModelConfig, mesh: MeshShape, tokens: float) -> _Shares:
    seen = tokens / mesh.data
    share = sizes.experts_per_token / sizes.num_experts if sizes.num_experts else 0.0
    return _Shares(tokens / (mesh.data * mesh.expert), seen, 1 - (1 - share) ** seen)


def _packed_bytes(sizes: ModelConfig, lora: LoraConfig, mesh: MeshShape, hit: float) -> float:
    """Bytes of the experts that a device reads in all layers."""
    return hit * sizes.num_layers * sizes.num_experts / mesh.expert * expert_bytes(sizes, lora.expert_rank) if sizes.num_experts else 0.0


def _token_weights(sizes: ModelConfig) -> float:
    """Weights that one token uses."""
    experts = sizes.experts_per_token * expert_weights(sizes) if sizes.num_experts else 0
    return sizes.num_layers * (layer_weights(sizes) + experts) + sizes.vocab_size * sizes.width


# ---------------------------------------------------------------------- sampling


def _pass_needs(sizes: ModelConfig, lora: LoraConfig, mesh: MeshShape, tokens: float, cached: float, scores: float) -> Needs:
    """What one pass over `tokens` needs. A device reads `cached` bytes of keys and values, and attention takes `scores` operations."""
    own, seen, hit = _shares(sizes, mesh, tokens)
    read = _packed_bytes(sizes, lora, mesh, hit) + other_bytes(sizes, lora) + cached
    sent = sizes.num_layers * seen * SENT_FORWARD * sizes.width if sizes.num_experts else 0.0
    return Needs(read, own * 2 * _token_weights(sizes) + scores, _received(mesh, sent))


def decode_needs(sizes: ModelConfig, lora: LoraConfig, rows: float, context: float, mesh: MeshShape = ONE) -> Needs:
    """What one token for each of `rows` rows needs; arguments as for `costs.decode_step`."""
    own = rows / (mesh.data * mesh.expert)
    position = 2 * 2 * sizes.num_kv_heads * sizes.head_size
    scores = cached_bytes(sizes, context) / position * 4 * sizes.num_heads * sizes.head_size
    return _pass_needs(sizes, lora, mesh, rows, own * cached_bytes(sizes, context), own * scores)


def prefill_needs(sizes: ModelConfig, lora: LoraConfig, tokens: float, mesh: MeshShape = ONE) -> Needs:
    """What one prompt needs, in chunks as the sampler reads it."""
    chunk = min(PROMPT_CHUNK, tokens)
    own = chunk / (mesh.data * mesh.expert)
    one = _pass_needs(sizes, lora, mesh, chunk, cached_bytes(sizes, tokens / 2), own * attention_operations(sizes, tokens))
    return one.times(tokens / chunk)


def _pass_cost(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, mesh: MeshShape, tokens: float, needs: Needs, cached: float, *, decoding: bool
) -> Cost:
    """Seconds of one pass that needs `needs`, `cached` bytes of them for keys and values. `decoding`: each row draws a token."""
    peaks, layers, (own, seen, hit) = _peaks(speeds), sizes.num_layers, _shares(sizes, mesh, tokens)
    packed = EXPERT_BYTES_FACTOR * _packed_bytes(sizes, lora, mesh, hit)
    fast = DECODE_BANDWIDTH_FRACTION * speeds.copy
    other = other_bytes(sizes, lora)
    layer_seconds = (LAYER_SECONDS if decoding else SEPARATE_LAYER_SECONDS) if sizes.num_experts else DENSE_LAYER_SECONDS
    once = (LAUNCH_SECONDS if sizes.num_experts else DENSE_LAUNCH_SECONDS) / (LAUNCH_STEPS if decoding else 1)
    logits = own * sizes.vocab_size if decoding else sizes.vocab_size
    cost = {
        # Copies run while the block before is unpacked. Larger blocks of rows cost products.
        "experts": max(
            packed / fast, packed * peaks.unpack, 2 * own * layers * sizes.experts_per_token * expert_weights(sizes) / speeds.product
        ),
        "other weights": max(other / fast, other * own / speeds.product),
        "keys and values": max(CACHE_BYTES_FACTOR * cached / fast, (needs.operations - 2 * own * _token_weights(sizes)) / speeds.product),
        "small operations": layers * layer_seconds + logits * DRAW_SECONDS + once,
        "exchange": 0.0,
    }
    if not sizes.num_experts:
        return cost | {"experts": 0.0}
    chosen = 2 * (packed_column(sizes.width) + LANES - sizes.width) if decoding else 8 * sizes.experts_per_token
    sent = layers * seen * (2 * sizes.width + chosen + SUMS_FACTOR * 4 * sizes.width)
    collectives = layers * (LAYER_COLLECTIVES if decoding else SEPARATE_COLLECTIVES) + STEP_COLLECTIVES
    return cost | {"exchange": _exchange_seconds(speeds, mesh, sent, collectives)}


def decode_step(sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, rows: float, context: float, mesh: MeshShape = ONE) -> Cost:
    """Seconds of one token for each of `rows` rows; arguments as for `costs.decode_step`."""
    cached = rows / (mesh.data * mesh.expert) * cached_bytes(sizes, context)
    return _pass_cost(sizes, lora, speeds, mesh, rows, decode_needs(sizes, lora, rows, context, mesh), cached, decoding=True)


def prefill(sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, tokens: float, mesh: MeshShape = ONE) -> Cost:
    """Seconds to read one prompt in chunks. The tokens of a chunk are split over the devices; each has all keys and values."""
    chunk = min(PROMPT_CHUNK, tokens)
    needs = prefill_needs(sizes, lora, tokens, mesh).times(chunk / tokens)
    one = _pass_cost(sizes, lora, speeds, mesh, chunk, needs, cached_bytes(sizes, tokens / 2), decoding=False)
    return {part: tokens / chunk * seconds for part, seconds in one.items()}


# ---------------------------------------------------------------------- the update


def microbatch_needs(
    sizes: ModelConfig, lora: LoraConfig, tokens: float, length: float, mesh: MeshShape = ONE, *, gradient: bool, remat: str = "layers"
) -> Needs:
    """What a microbatch's gradient needs, or one forward pass; arguments as for `costs.microbatch`. `tokens` are those of a device."""
    passes = PASSES[gradient]
    operations = passes.products * _token_weights(sizes) + passes.attention * attention_operations(sizes, length)
    read = passes.sums * (_packed_bytes(sizes, lora, mesh, 1.0) + other_bytes(sizes, lora))
    sent = (
        sizes.num_layers * tokens * mesh.expert * (SENT_GRADIENT if gradient else SENT_FORWARD) * sizes.width if sizes.num_experts else 0.0
    )
    return Needs(read, tokens * operations * (REMAT_FACTORS[remat] if gradient else 1.0), _received(mesh, sent))


def microbatch(
    sizes: ModelConfig,
    lora: LoraConfig,
    speeds: Speeds,
    tokens: float,
    length: float,
    mesh: MeshShape = ONE,
    *,
    gradient: bool,
    remat: str = "layers",
    adapter: float = 0.0,
) -> Cost:
    """Seconds of a microbatch's gradient, or of one forward pass; arguments as for `costs.microbatch`."""
    passes, peaks = PASSES[gradient], _peaks(speeds)
    weights = sizes.num_layers * sizes.num_experts / mesh.expert * expert_weights(sizes)
    unpacked = passes.unpackings * (_packed_bytes(sizes, lora, mesh, 1.0) + 2 * weights)
    of_experts = sizes.num_layers * sizes.experts_per_token * expert_weights(sizes) if sizes.num_experts else 0
    reached = peaks.schedule
    per_token = {  # operations, with padding, at the scheduled speed
        "projections": passes.products * (_token_weights(sizes) - of_experts) / reached.plain,
        "experts": passes.products
        * of_experts
        * _padding(sizes, mesh, tokens)
        / (reached.experts_gradient if gradient else reached.experts),
        "attention": passes.attention
        * attention_in_blocks(sizes, length)
        / (reached.attention_gradient if gradient else reached.attention),
    }
    again = REMAT_FACTORS[remat] if gradient else 1.0
    kernels = {part: SCHEDULE_ALLOWANCE * tokens * each / peaks.product for part, each in per_token.items()}
    exchange = 0.0
    if sizes.num_experts:
        forward = FORWARD.products / passes.products * kernels["experts"]
        if gradient:
            forward *= reached.experts_gradient / reached.experts
        exchange = _exchange_of_update(sizes, speeds, mesh, tokens, forward, kernels["experts"] - forward)
    if gradient and mesh.data > 1:
        exchange += 2 * (mesh.data - 1) / mesh.data * adapter / speeds.link + speeds.latency
    return {part: again * seconds for part, seconds in kernels.items()} | {
        "unpacking": unpacked / (UPDATE_UNPACK_FRACTION * speeds.copy),
        "rows of experts": _rows_seconds(sizes, speeds, tokens, gradient=gradient),
        "small operations": _small_seconds(sizes, speeds, mesh, tokens, gradient=gradient),
        "exchange": exchange,
    }


def _around(sizes: ModelConfig, mesh: MeshShape, tokens: float) -> bool:
    """Whether the tokens of a layer's experts go around a ring of devices."""
    return bool(sizes.num_experts) and use_ring(mesh.expert, math.ceil(tokens), sizes.experts_per_token, sizes.num_experts)


def _exchange_of_update(sizes: ModelConfig, speeds: Speeds, mesh: MeshShape, tokens: float, forward: float, backward: float) -> float:
    """Seconds of a microbatch's exchange that do not overlap with the kernels of the experts.

    Args:
      sizes, speeds, mesh: of the run.
      tokens: of a device.
      forward, backward: seconds of these kernels in each pass; `backward` is 0 without a gradient.
    """
    layers, values = sizes.num_layers, tokens * sizes.width
    passes: list[tuple[int, int, float]] = [(SENT_FORWARD, SUMS_FORWARD, forward)]
    if backward:
        passes.append((SENT_GRADIENT - SENT_FORWARD, SUMS_GRADIENT - SUMS_FORWARD, backward))
    if not _around(sizes, mesh, tokens):
        size = layers * values * mesh.expert * sum(sent + (SUMS_FACTOR - 1) * sums for sent, sums, _ in passes)
        return _exchange_seconds(speeds, mesh, size, 6 * layers)
    # Half of the tokens in each direction. Two devices, or a line of chips, have one link for both.
    links = min(2, _peaks(speeds).links(mesh.expert)) if mesh.expert > 2 else 1
    link, seconds = links * speeds.link, 0.0
    for sent, sums, kernels in passes:
        # Each visit also sends the last visitors on; the first visitors come before any visit.
        visit, first = values * sent / link + speeds.latency, values * (sent - sums) / link + speeds.latency
        seconds += layers * (first + mesh.expert * max(0.0, visit - kernels / (layers * mesh.expert)))
    # All devices gather experts and weights of the choices in each pass, and add the gradients of the weights.
    choices = layers * tokens * mesh.expert * sizes.experts_per_token * 4
    return seconds + _exchange_seconds(
        speeds, mesh, choices * (2 * len(passes) + (SUMS_FACTOR if backward else 0)), 3 * len(passes) * layers
    )


def _padding(sizes: ModelConfig, mesh: MeshShape, tokens: float) -> float:
    """Rows of the experts' blocks over those that tokens fill: half a block of each expert in a chunk, or in a visit, is padding."""
    if not sizes.num_experts:
        return 1.0
    if _around(sizes, mesh, tokens):
        chunk = chunk_of_ring(math.ceil(tokens))
    else:
        chunk = chunk_of(math.ceil(tokens), mesh.expert, TOKENS_AT_ONCE, TOKEN_TILE) * mesh.expert
    choices = chunk * sizes.experts_per_token
    rows = choose_tiles(choices, sizes.num_experts, sizes.num_experts // mesh.expert).rows
    return 1 + rows * sizes.num_experts / (2 * choices)


def attention_in_blocks(sizes: ModelConfig, length: float) -> float:
    """`costs.attention_operations`, for whole blocks of queries and keys. A rollout begins anywhere in a block."""
    blocks = length / BLOCK + 1

    def pairs(seen: float) -> float:
        """Pairs of blocks, if a block sees at most `seen` of them, its own included."""
        seen = min(seen, blocks)
        return seen * blocks - seen * (seen - 1) / 2

    window = 1 + -(-(sizes.sliding_window - 1) // BLOCK) if sizes.num_sliding else 0
    of_layers = sizes.num_full * pairs(blocks) + sizes.num_sliding * pairs(window)
    return 4 * sizes.num_heads * sizes.head_size * of_layers * BLOCK**2 / length


def _rows_seconds(sizes: ModelConfig, speeds: Speeds, tokens: float, *, gradient: bool) -> float:
    """Seconds in which XLA gathers the rows of the experts and adds their sums, per device with balanced routing.

    A choice of an expert reads and writes a row of bfloat16, and reads, adds and writes one of float32; the backward pass gathers two rows.
    """
    values = sizes.num_layers * tokens * sizes.experts_per_token * sizes.width if sizes.num_experts else 0
    return values * ((2 * 4 + 12) + (3 * 4 + 12) * gradient) / speeds.copy


def _small_seconds(sizes: ModelConfig, speeds: Speeds, mesh: MeshShape, tokens: float, *, gradient: bool) -> float:
    """Seconds of XLA's operations that are neither products nor kernels, rows of experts nor exchange; and of a ring's kernels."""
    values = sizes.num_layers * tokens * sizes.width
    seconds = values * (LAYER_BYTES_GRADIENT if gradient else LAYER_BYTES) / speeds.copy
    if sizes.num_experts:
        peaks, around = _peaks(speeds), _around(sizes, mesh, tokens)
        seconds += values / _SMALL_WIDTH * EXPERTS_SMALL[around][gradient] * _V5P_BANDWIDTH / peaks.bandwidth
        if around:
            seconds += SCHEDULE_ALLOWANCE * (1 + gradient) * values * mesh.expert * RING_BYTES / peaks.bandwidth
    return seconds


def assumptions(speeds: Speeds) -> Iterator[str]:
    """Lines that say what the predictions assume, and from where."""
    peaks = _peaks(speeds)
    read = DECODE_BANDWIDTH_FRACTION * speeds.copy / peaks.bandwidth
    unpack = UPDATE_UNPACK_FRACTION * speeds.copy / peaks.bandwidth
    yield "Nothing of this was ever run on a TPU. Bytes, operations and exchanges are counted; their speeds are assumed:"
    yield (
        f"    as this project's GPU kernels on an H200: decoding's kernels read at {read:.0%} of the vendor's bandwidth, and the update"
        f" unpacks at {unpack:.0%}"
    )
    yield (
        f"    by the compiler's schedule of the kernels: decoding unpacks experts in {peaks.unpack * peaks.bandwidth:.1f} times the time of"
        f" reading them at the vendor's bandwidth; in the update, experts reach {peaks.schedule.experts_gradient:.0%} and attention"
        f" {peaks.schedule.attention_gradient:.0%} of the vendor's FLOP/s in both passes, in blocks with padding; the prediction adds"
        f" {SCHEDULE_ALLOWANCE - 1:.0%} for stalls"
    )
    yield (
        f"    by the compiler's estimates for a program of the 120b with 128 rows, and {SMALL * 1e6:.1f} us for the start of each kernel:"
        f" small operations of a layer take {LAYER_SECONDS * 1e6:.0f} us in decoding"
    )
    yield (
        f"    by XLA's own estimates for programs of the 120b: the update's plain products reach {peaks.schedule.plain:.0%} of the vendor's"
        f" FLOP/s, and small operations of its experts take {EXPERTS_SMALL[True][True] * 1e6:.2f} us a token and layer on a v5p with"
        f" a ring, {EXPERTS_SMALL[False][True] * 1e6:.2f} us without"
    )
    yield (
        f"    guessed: links reach {speeds.link / peaks.link:.0%} of the vendor's speed, one for each dimension of the slice that `expert`"
        f" spans; a small collective takes {speeds.latency * 1e6:.0f} us; all experts have the same load. Nothing overlaps but,"
        " as in the compiled programs, the experts' kernels of the update with an exchange around a ring"
    )

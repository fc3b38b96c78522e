"""Predicted seconds of sampling and of the update on any mesh, from the roofline of each part and the traffic between devices.

These are pure functions of sizes; nothing is compiled. Each constant names its measurement. docs/scaling.md compares predictions with
measurements, and says which measurements were held out when the constants were fitted. The model of a mesh:

    tensor = 1   kernels.spread: rows and tokens are split over `data` and `expert` together, experts over `expert`. Each layer gathers its
                 rows along `expert`, each device computes its own experts for them, and the sums are scattered back.
    tensor > 1   the plain-JAX references, as XLA partitions them: each layer gathers packed experts along `expert`, so that all devices
                 compute all experts, and sums over `tensor` one expert at a time (seen in executables, jax 0.10.2).

Without kernels of experts (decoding on TPUs), the references run in both cases: each expert on a device computes every row. No overlap of
communication and computation is assumed.
"""

from typing import NamedTuple

from discover_jax.machines import Speeds
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.mxfp4 import BLOCK
from discover_jax.sampling.sampler import PROMPT_CHUNK

# ---------------------------------------------------------------------- measured constants of one H200 (docs/performance.md)

DECODE_BANDWIDTH_FRACTION = 0.90
"""Fraction of the copy bandwidth at which decoding reads weights, keys and values. It is the slope of the experts' kernel from
1 to 128 tokens."""
DECODE_LAYER_SECONDS = 74e-6
"""Fixed seconds per layer of a decoding step: one row of the 120b takes 4.0 ms, including 1.3 ms of reading."""
DECODE_ROW_SECONDS = 0.45e-6
"""Additional seconds per row and layer: 128 rows of the 120b at a context of 208 take 22.1 ms, including 17.3 ms of reading."""
DENSE_LAYER_SECONDS = 50e-6
"""The same for dense models: one row of Qwen2.5-Coder-1.5B takes 2.27 ms, and of the 7B 5.18 ms, including 0.84 and 3.8 ms of reading."""
DENSE_ROW_SECONDS = 1.65e-10
"""Additional seconds per row, layer and unit of width of dense models: at a context of 2,096, 128 rows take 5.14 ms (1.5B) and 11.30 ms
(7B)."""
UNPACK_16_FACTOR = 1.12
"""The experts' kernel unpacks a weight for 8 or for 16 rows at a time; this is the time for 16 relative to 8, measured with 512 tokens."""
PREFILL_FACTOR = 1.22
"""Time of a prompt's chunk relative to a decoding step of as many rows, with reference attention: 128 prompts of 1,024 took 12.3 s."""
UPDATE_PRODUCT_FRACTION = 0.56
"""Fraction of the matrix product's FLOP/s that the update reaches, counting full rematerialisation: 11,260 tokens/s at 4 x 8,192."""
UPDATE_UNPACK_FRACTION = 0.68
"""Fraction of the copy bandwidth at which the update unpacks a layer to bfloat16: profile of the same run."""
REMAT_FACTORS = {"none": 0.8, "layers": 1.0, "pairs": 1.07}
"""Time of the gradient relative to "layers". "pairs" was measured; "none" follows from its count of operations."""
REFERENCE_UNPACK_FRACTION = 0.16
"""Fraction of the copy bandwidth at which the references unpack, write and read one expert at a time: 4.9 tokens/s of the 120b, 4 rows."""
REFERENCE_PRODUCT_FRACTION = 0.16
"""Fraction of the matrix product's FLOP/s that the references' update reaches, unpacking an expert once a pass: a compromise between the
120b's 77 tokens/s and the 20b's 499. Both were measured before the update rounded gradients to bfloat16."""

LAYER_COLLECTIVES = 2
"""Collectives per layer of decoding: one gathers all arrays, one sums (seen in executables)."""
STEP_COLLECTIVES = 4
"""Collectives per decoding step for the values that the host reads; assumed."""

Cost = dict[str, float]
"""Seconds of each part."""


class MeshShape(NamedTuple):
    """Number of devices along each axis of a mesh."""

    data: int
    expert: int
    tensor: int = 1

    @property
    def size(self) -> int:
        return self.data * self.expert * self.tensor


ONE = MeshShape(1, 1, 1)


# ---------------------------------------------------------------------- sizes


def expert_weights(sizes: ModelConfig) -> int:
    """Weights of one expert's matrices."""
    return 3 * sizes.width * sizes.mlp_width


def expert_bytes(sizes: ModelConfig, rank: int = 0) -> int:
    """Bytes of one expert of one layer: four bits a weight, a byte of scale a block, and biases and an adapter of `rank` in bfloat16."""
    d, f = sizes.width, sizes.mlp_width
    return expert_weights(sizes) * (BLOCK // 2 + 1) // BLOCK + 2 * (2 * f + d) + 2 * rank * (2 * d + 3 * f)


def layer_weights(sizes: ModelConfig, rank: int = 0, mlp_rank: int = 0) -> int:
    """Weights of a layer without experts: projections, and router or dense MLP; with adapters of these ranks on attention and MLP."""
    d, q, kv, f = sizes.width, sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size, sizes.mlp_width
    mlp = d * sizes.num_experts if sizes.num_experts else 3 * d * f + 3 * mlp_rank * (d + f)
    return 2 * d * (q + kv) + mlp + rank * (2 * (d + q) + 2 * (d + kv))


def other_bytes(sizes: ModelConfig, lora: LoraConfig) -> int:
    """Bytes that a decoding step reads in addition to experts, keys and values: bfloat16, with the head but without the embedding."""
    d, q, kv = sizes.width, sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    vectors = q + 2 * kv + d + sizes.num_experts + 2 * d + sizes.num_heads  # biases, norms, sinks
    head = sizes.vocab_size * d + lora.head_rank * (sizes.vocab_size + d)
    return 2 * (sizes.num_layers * (layer_weights(sizes, lora.attention_rank, lora.mlp_rank) + vectors) + head + d)


def cached_bytes(sizes: ModelConfig, context: float) -> float:
    """Bytes of keys and values that one token reads: `context` positions in each full layer, at most a window in each sliding layer."""
    position = 2 * 2 * sizes.num_kv_heads * sizes.head_size
    return position * (sizes.num_full * context + sizes.num_sliding * min(context, sizes.sliding_window))


def attention_operations(sizes: ModelConfig, length: float) -> float:
    """FLOP per token of attention's two products in all layers, for a sequence of this length."""
    window = min(length, sizes.sliding_window)
    in_window = window - window * (window - 1) / (2 * length)
    return 4 * sizes.num_heads * sizes.head_size * (sizes.num_full * (length + 1) / 2 + sizes.num_sliding * in_window)


# ---------------------------------------------------------------------- communication


def network(speeds: Speeds, mesh: MeshShape, axis: str) -> tuple[float, float]:
    """Bytes/s that a device receives from its group along an axis, and seconds of a small collective there.

    Devices are numbered node by node, with `tensor` as the fastest axis. A group that spans nodes uses the network of all of its devices in
    a node, because its rings pass through all of them.
    """
    stride = {"tensor": 1, "expert": mesh.tensor, "data": mesh.tensor * mesh.expert}[axis]
    size = getattr(mesh, axis)
    if not speeds.node or stride * size <= speeds.node:
        return speeds.link, speeds.latency
    inside = min(size, max(1, speeds.node // stride))
    return min(speeds.link, inside * speeds.network), speeds.network_latency


def collective_seconds(speeds: Speeds, mesh: MeshShape, axis: str, size: float, times: float) -> float:
    """Seconds of `times` collectives along an axis after which each device has all `size` bytes."""
    parts = getattr(mesh, axis)
    bandwidth, latency = network(speeds, mesh, axis)
    return 0.0 if parts == 1 else (parts - 1) / parts * size / bandwidth + times * latency


# ---------------------------------------------------------------------- sampling


def unpackings(rows: float) -> float:
    """Cost of unpacking an expert that `rows` rows chose on average, relative to unpacking it once for 8 rows."""
    return min(max(1.0, rows / 8 + 0.5), UNPACK_16_FACTOR * max(1.0, rows / 16 + 0.5))


def _token_cost(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, mesh: MeshShape, own: float, seen: float, cached: float, *, kernels: bool
) -> Cost:
    """Seconds of one token for each row. A device has `own` rows and reads `cached` bytes of their KV cache; experts see `seen` rows.

    Of dense models, only kernels and meshes along `data` have been measured.
    """
    bandwidth, layers, t = DECODE_BANDWIDTH_FRACTION * speeds.copy, sizes.num_layers, mesh.tensor
    if not sizes.num_experts:
        return {
            "other weights": max(other_bytes(sizes, lora) / bandwidth, other_bytes(sizes, lora) * own / speeds.product),
            "keys and values": cached / bandwidth,
            "kernels": layers * (DENSE_LAYER_SECONDS + DENSE_ROW_SECONDS * sizes.width * own),
            "collectives": STEP_COLLECTIVES * network(speeds, mesh, "data")[1] if mesh.size > 1 else 0.0,
        }
    share = sizes.experts_per_token / sizes.num_experts
    device_experts = layers * _experts_per_device(sizes, mesh)
    if kernels:
        hit = 1 - (1 - share) ** seen
        experts = device_experts * hit * expert_bytes(sizes, lora.expert_rank) / bandwidth * unpackings(seen * share / hit)
    else:
        experts = device_experts / t * (_reference_unpack_seconds(sizes, speeds) + _reference_product_seconds(sizes, speeds, 2) * seen)
    other = other_bytes(sizes, lora) / t
    # Activations in bfloat16; chosen experts and their weights; sums in float32.
    sent = layers * seen * (2 * sizes.width + 8 * sizes.experts_per_token + 4 * sizes.width)
    collectives = _expert_axis_seconds(sizes, lora, speeds, mesh, sent, LAYER_COLLECTIVES, 1) + _tensor_axis_seconds(
        sizes, speeds, mesh, seen, 1
    )
    if mesh.size > 1:
        collectives += STEP_COLLECTIVES * max(network(speeds, mesh, axis)[1] for axis in ("data", "expert", "tensor"))
    return {
        "experts": experts,
        "other weights": max(other / bandwidth, other * own / speeds.product),  # a weight has two bytes, and two operations a row
        "keys and values": cached / t / bandwidth,
        # Assumed: half of the time per row is for projections and attention of the device's own rows, half for experts.
        "kernels": layers * (DECODE_LAYER_SECONDS + DECODE_ROW_SECONDS * (own + seen) / 2),
        "collectives": collectives,
    }


def _experts_per_device(sizes: ModelConfig, mesh: MeshShape) -> float:
    """Number of experts of a layer that a device computes."""
    return sizes.num_experts / (mesh.expert if mesh.tensor == 1 else 1)


def _reference_unpack_seconds(sizes: ModelConfig, speeds: Speeds) -> float:
    """Seconds in which the references unpack, write and read one expert."""
    return (expert_bytes(sizes) + 2 * 2 * expert_weights(sizes)) / (REFERENCE_UNPACK_FRACTION * speeds.copy)


def _reference_product_seconds(sizes: ModelConfig, speeds: Speeds, operations: float) -> float:
    """Seconds of one token in one expert, for this number of operations per weight."""
    return operations * expert_weights(sizes) / (REFERENCE_PRODUCT_FRACTION * speeds.product)


def _expert_axis_seconds(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, mesh: MeshShape, sent: float, times: float, gathers: float
) -> float:
    """Seconds to exchange `sent` bytes of activations along `expert`; if `tensor` > 1, to gather packed experts `gathers` times instead."""
    if mesh.tensor == 1:
        return collective_seconds(speeds, mesh, "expert", sent, times * sizes.num_layers)
    packed = sizes.num_layers * sizes.num_experts / mesh.tensor * expert_bytes(sizes, lora.expert_rank)
    return collective_seconds(speeds, mesh, "expert", gathers * packed, gathers * 11 * sizes.num_layers)  # 11 arrays a layer


def _tensor_axis_seconds(sizes: ModelConfig, speeds: Speeds, mesh: MeshShape, tokens: float, passes: float) -> float:
    """Seconds of the sums over `tensor`: one for each expert and one for attention's output, each of float32 [tokens, width]."""
    sums = passes * sizes.num_layers * (sizes.num_experts + 1)
    return 2 * collective_seconds(speeds, mesh, "tensor", sums * tokens * 4 * sizes.width, sums / 2)


def decode_step(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, rows: float, context: float, mesh: MeshShape = ONE, *, kernels: bool = True
) -> Cost:
    """Seconds of one token for each of `rows` rows.

    Args:
      sizes, lora: sizes of the model and the adapter, in bfloat16 with packed experts.
      speeds: speeds of a device.
      rows: live rows on the whole mesh, evenly distributed.
      context: mean number of tokens of a row so far.
      mesh: shape of the mesh. With `tensor` > 1, `kernels` must be False, because no kernel supports it.
      kernels: whether kernels run instead of the references.
    """
    own = rows / (mesh.data * mesh.expert)
    seen = rows / mesh.data if mesh.tensor == 1 else own
    return _token_cost(sizes, lora, speeds, mesh, own, seen, own * cached_bytes(sizes, context), kernels=kernels)


def prefill(sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, tokens: float, mesh: MeshShape = ONE, *, kernels: bool = True) -> float:
    """Seconds to read one prompt in chunks. The tokens of a chunk are split over the devices."""
    chunk = min(PROMPT_CHUNK, tokens)
    own = chunk / (mesh.data * mesh.expert)
    seen = chunk / mesh.data if mesh.tensor == 1 else own
    one = _token_cost(sizes, lora, speeds, mesh, own, seen, cached_bytes(sizes, tokens / 2), kernels=kernels)
    return PREFILL_FACTOR * tokens / chunk * sum(one.values())


# ---------------------------------------------------------------------- the update


class Passes(NamedTuple):
    """Counts of the passes over whole sequences: forward only, or with the gradient.

    Attributes:
      products: operations per weight and token. Base weights have no gradient, but the forward pass is recomputed.
      attention: operations of attention, relative to its forward pass.
      unpackings: how often the kernels unpack all experts. The references unpack an expert once a pass.
      sent: bytes along `expert` per value of a token. Forward: 2 of inputs (bfloat16) and 4 of sums. Backward: 2 of inputs again, 4 of the
        sums' gradients and 2 of the inputs' gradients.
      sums: number of sums over `tensor`, and of gathers of packed experts.
    """

    products: float
    attention: float
    unpackings: float
    sent: float
    sums: float


FORWARD, GRADIENT = Passes(2, 1, 1, 6, 1), Passes(6, 4.5, 2, 14, 3)
_SEQUENCE_COLLECTIVES = 6  # per layer


def microbatch(
    sizes: ModelConfig,
    lora: LoraConfig,
    speeds: Speeds,
    tokens: float,
    length: float,
    mesh: MeshShape = ONE,
    *,
    gradient: bool,
    kernels: bool = True,
    remat: str = "layers",
    adapter: float = 0.0,
) -> Cost:
    """Seconds of a microbatch's gradient, or of one forward pass, such as that of the KL reference model.

    Args:
      sizes, lora: sizes of the model and the adapter, in bfloat16 with packed experts.
      speeds: speeds of a device.
      tokens: tokens of the microbatch on each device. Rows are split over `data` and `expert` together.
      length: tokens of a rollout including its prompt, for attention.
      mesh: shape of the mesh. With `tensor` > 1, `kernels` must be False, because no kernel supports it.
      gradient: whether to compute the gradient or only the forward pass.
      kernels: whether kernels run instead of the references.
      remat: `config.model.remat`.
      adapter: bytes of the adapter's gradient on a device, which is summed over `data`.
    """
    passes, layers, weights, t = GRADIENT if gradient else FORWARD, sizes.num_layers, expert_weights(sizes), mesh.tensor
    dense = passes.products * (layers * layer_weights(sizes) + sizes.vocab_size * sizes.width) + passes.attention * attention_operations(
        sizes, length
    )
    if not sizes.num_experts:
        collectives = 2 * collective_seconds(speeds, mesh, "data", adapter, 1) if gradient else 0.0
        factor = REMAT_FACTORS[remat] if gradient else 1.0
        return {"products": factor * dense * tokens / (UPDATE_PRODUCT_FRACTION * speeds.product), "collectives": collectives}
    device_experts = layers * _experts_per_device(sizes, mesh)
    if kernels:
        operations = (dense + passes.products * layers * sizes.experts_per_token * weights) * tokens
        products = operations / (UPDATE_PRODUCT_FRACTION * speeds.product)
        # Unpacking does not depend on tokens: a device unpacks its own experts once a pass.
        unpacking = passes.unpackings * device_experts * (expert_bytes(sizes) + 2 * weights) / (UPDATE_UNPACK_FRACTION * speeds.copy)
    else:
        # A device's experts compute the tokens of all devices along `expert`; for `tensor` > 1, all experts compute its own tokens.
        products = dense / t * tokens / (REFERENCE_PRODUCT_FRACTION * speeds.product)
        products += layers * sizes.num_experts / t * tokens * _reference_product_seconds(sizes, speeds, passes.products)
        unpacking = device_experts / t * _reference_unpack_seconds(sizes, speeds)
    sent = layers * tokens * mesh.expert * passes.sent * sizes.width
    collectives = _expert_axis_seconds(sizes, lora, speeds, mesh, sent, _SEQUENCE_COLLECTIVES, passes.sums)
    collectives += _tensor_axis_seconds(sizes, speeds, mesh, tokens, passes.sums)
    if gradient:
        products *= REMAT_FACTORS[remat]
        collectives += 2 * collective_seconds(speeds, mesh, "data", adapter, 1)
    return {"products": products, "unpacking": unpacking, "collectives": collectives}


def apply(speeds: Speeds, adapter: float) -> float:
    """Seconds of the optimiser, which reads and writes adapter and two moments and reads the gradient, each of `adapter` bytes."""
    return 7 * adapter / speeds.copy

"""Seconds of sampling and of the update on any mesh, from the roofline of each part and what devices must send each other.

Pure functions of sizes, nothing is compiled. Each constant says which measurement it is from; docs/scaling.md compares what is predicted
with what was measured, and says which measurements no constant was fitted to. The forms that are assumed, on a mesh:

    tensor = 1   kernels.spread: rows and tokens lie on `data` and `expert` together, experts on `expert`. Each layer gathers its rows along
                 `expert`, each device computes its own experts for them, and the sums are scattered back.
    tensor > 1   the plain-JAX references, as XLA splits them: each layer's packed experts are gathered along `expert`, so that all devices
                 compute all of them, and the sums over `tensor` are made one expert at a time (seen in the compiled programs, jax 0.10.2).

Where there are no kernels (TPUs), the references run in both: every expert that a device computes sees every row. Nothing overlaps.
"""

from typing import NamedTuple

from discover_jax.machines import Speeds
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.mxfp4 import BLOCK
from discover_jax.sampling.sampler import PROMPT_CHUNK

# ---------------------------------------------------------------------- what kernels reach; one H200 (docs/performance.md)

DECODE = 0.90
"""Of the copy's bandwidth, where one step reads weights, keys and values: the slope of the experts' kernel from 1 to 128 tokens."""
START = 74e-6
"""Seconds a layer of decoding, whatever is read: one row of the 120b takes 4.0 ms, of which reading is 1.3."""
ROW = 0.45e-6
"""Seconds a row and layer beside that: 128 rows of the 120b at a context of 208 take 22.1 ms, of which reading is 17.3."""
WIDER = 1.12
"""The experts' kernel unpacks a weight once for 8 rows of its expert, or once for 16, which takes so much longer: 512 tokens."""
PREFILL = 1.22
"""A prompt's chunk, against a step of as many rows, for attention's reference: 128 prompts of 1,024 took 12.3 s."""
UPDATE = 0.56
"""Of the matrix product, all products of whole sequences, counted with full rematerialisation: 11,260 tokens/s at 4 x 8,192 tokens."""
UNPACK = 0.68
"""Of the copy's bandwidth, unpacking a layer to bfloat16: profile of the same run."""
REMAT = {"none": 0.8, "layers": 1.0, "pairs": 1.07}
"""Of the gradient's time; that of `pairs` was measured, that of `none` is its count of operations."""
REFERENCE_UNPACK = 0.16
"""Of the copy's bandwidth, one expert after another in the references, unpacked, written and read: 4.9 tokens/s of the 120b, 4 rows."""
REFERENCE_PRODUCT = 0.16
"""Of the matrix product, the references' update, which unpacks an expert once a pass: between the 120b's 77 tokens/s and the 20b's 499,
both measured before gradients were rounded to bfloat16 first."""

COLLECTIVES = 2
"""A layer of decoding: the gathered arrays together, and the sums (seen in compiled programs). `STEP_COLLECTIVES` a step, for what the host
reads, are assumed."""
STEP_COLLECTIVES = 4

Cost = dict[str, float]
"""Seconds by part."""


class MeshShape(NamedTuple):
    """Devices along each axis of the mesh."""

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
    return 3 * sizes.width * sizes.expert_width


def expert_bytes(sizes: ModelConfig, rank: int = 0) -> int:
    """Of one expert in one layer as it lies in memory: four bits a weight, a byte of scale a block, biases and an adapter in bfloat16."""
    d, f = sizes.width, sizes.expert_width
    return expert_weights(sizes) * (BLOCK // 2 + 1) // BLOCK + 2 * (2 * f + d) + 2 * rank * (2 * d + 3 * f)


def layer_weights(sizes: ModelConfig, rank: int = 0) -> int:
    """Weights of a layer's projections and router that multiply a token, with an adapter on q, k, v and o."""
    d, q, kv = sizes.width, sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    return 2 * d * (q + kv) + d * sizes.num_experts + rank * (2 * (d + q) + 2 * (d + kv))


def other_bytes(sizes: ModelConfig, lora: LoraConfig) -> int:
    """Of all that a step of decoding reads beside experts, keys and values: bfloat16, the head included, the embedding not."""
    d, q, kv = sizes.width, sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    vectors = q + 2 * kv + d + sizes.num_experts + 2 * d + sizes.num_heads  # biases, norms, sinks
    head = sizes.vocab_size * d + lora.head_rank * (sizes.vocab_size + d)
    return 2 * (sizes.num_layers * (layer_weights(sizes, lora.attention_rank) + vectors) + head + d)


def cached_bytes(sizes: ModelConfig, context: float) -> float:
    """Of the keys and values that one row's token reads at a context: all of a full layer's, a window's of a sliding one."""
    place = 2 * 2 * sizes.num_kv_heads * sizes.head_size
    return sizes.num_pairs * place * (context + min(context, sizes.sliding_window))


def scores(sizes: ModelConfig, rollout: float) -> float:
    """Operations of attention's two products, a token of a rollout of that length, over all layers."""
    window = min(rollout, sizes.sliding_window)
    seen = (rollout + 1) / 2 + window - window * (window - 1) / (2 * rollout)
    return 4 * sizes.num_heads * sizes.head_size * sizes.num_pairs * seen


# ---------------------------------------------------------------------- communication


def network(speeds: Speeds, mesh: MeshShape, axis: str) -> tuple[float, float]:
    """Bytes/s that reach a device from its group along an axis, and seconds of a small collective there.

    Devices are numbered node by node, `tensor` being the fastest axis. A group that leaves its node does so by the network of each of its
    devices in the node: its rings go through all of them.
    """
    stride = {"tensor": 1, "expert": mesh.tensor, "data": mesh.tensor * mesh.expert}[axis]
    size = getattr(mesh, axis)
    if not speeds.node or stride * size <= speeds.node:
        return speeds.link, speeds.latency
    inside = min(size, max(1, speeds.node // stride))
    return min(speeds.link, inside * speeds.network), speeds.network_latency


def _gathered(speeds: Speeds, mesh: MeshShape, axis: str, size: float, times: float) -> float:
    """Seconds of collectives along an axis that bring its devices the parts of `size` bytes that they lack, `times` of them."""
    parts = getattr(mesh, axis)
    bandwidth, latency = network(speeds, mesh, axis)
    return 0.0 if parts == 1 else (parts - 1) / parts * size / bandwidth + times * latency


# ---------------------------------------------------------------------- sampling


def unpackings(rows: float) -> float:
    """Times that the decoding kernel unpacks an expert which so many rows chose on average, in units of one block of 8 rows."""
    return min(max(1.0, rows / 8 + 0.5), WIDER * max(1.0, rows / 16 + 0.5))


def _step(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, mesh: MeshShape, own: float, seen: float, cached: float, *, kernels: bool
) -> Cost:
    """Of one token a row: `own` rows of a device, whose experts see `seen`, and `cached` bytes of keys and values that it reads."""
    bandwidth, layers, t = DECODE * speeds.copy, sizes.num_layers, mesh.tensor
    share = sizes.experts_per_token / sizes.num_experts
    held = layers * _held(sizes, mesh)
    if kernels:
        hit = 1 - (1 - share) ** seen
        experts = held * hit * expert_bytes(sizes, lora.expert_rank) / bandwidth * unpackings(seen * share / hit)
    else:
        experts = held / t * (_reference_unpacking(sizes, speeds) + _reference_product(sizes, speeds, 2) * seen)
    other = other_bytes(sizes, lora) / t
    # Activations in bfloat16, chosen experts and their weights; and sums in float32.
    sent = layers * seen * (2 * sizes.width + 8 * sizes.experts_per_token + 4 * sizes.width)
    collectives = _along_expert(sizes, lora, speeds, mesh, sent, COLLECTIVES, 1) + _along_tensor(sizes, speeds, mesh, seen, 1)
    if mesh.size > 1:
        collectives += STEP_COLLECTIVES * max(network(speeds, mesh, axis)[1] for axis in ("data", "expert", "tensor"))
    return {
        "experts": experts,
        "other weights": max(other / bandwidth, other * own / speeds.product),  # a weight is two bytes, and two operations a row
        "keys and values": cached / t / bandwidth,
        # Of what grows with rows, half is projections' and attention's, of the device's own rows, and half the experts': assumed.
        "kernels": layers * (START + ROW * (own + seen) / 2),
        "collectives": collectives,
    }


def _held(sizes: ModelConfig, mesh: MeshShape) -> float:
    """Experts of a layer that a device computes."""
    return sizes.num_experts / (mesh.expert if mesh.tensor == 1 else 1)


def _reference_unpacking(sizes: ModelConfig, speeds: Speeds) -> float:
    """Seconds in which the references unpack one expert, write it and read it."""
    return (expert_bytes(sizes) + 2 * 2 * expert_weights(sizes)) / (REFERENCE_UNPACK * speeds.copy)


def _reference_product(sizes: ModelConfig, speeds: Speeds, passes: float) -> float:
    """Seconds of one token in one expert, a pass being one operation for each weight."""
    return passes * expert_weights(sizes) / (REFERENCE_PRODUCT * speeds.product)


def _along_expert(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, mesh: MeshShape, sent: float, times: float, gathers: float
) -> float:
    """Seconds in which layers bring each other `sent` bytes of activations; or where `tensor` splits them, gather packed experts."""
    if mesh.tensor == 1:
        return _gathered(speeds, mesh, "expert", sent, times * sizes.num_layers)
    packed = sizes.num_layers * sizes.num_experts / mesh.tensor * expert_bytes(sizes, lora.expert_rank)
    return _gathered(speeds, mesh, "expert", gathers * packed, gathers * 11 * sizes.num_layers)  # so many arrays a layer


def _along_tensor(sizes: ModelConfig, speeds: Speeds, mesh: MeshShape, tokens: float, passes: float) -> float:
    """Seconds of the sums over `tensor`: one an expert, and one for attention's output, each of float32 [tokens, width]."""
    sums = passes * sizes.num_layers * (sizes.num_experts + 1)
    return 2 * _gathered(speeds, mesh, "tensor", sums * tokens * 4 * sizes.width, sums / 2)


def decode_step(
    sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, rows: float, context: float, mesh: MeshShape = ONE, *, kernels: bool = True
) -> Cost:
    """Seconds of one token for each of `rows` rows, all over the mesh, at a mean context.

    Args:
      sizes, lora: of the model, in bfloat16 with packed experts.
      speeds: of a device.
      rows: live ones; they are spread evenly.
      context: tokens that a row has so far.
      mesh: devices; where `tensor` is above 1 there are no kernels.
      kernels: whether they run; the references otherwise.
    """
    own = rows / (mesh.data * mesh.expert)
    seen = rows / mesh.data if mesh.tensor == 1 else own
    return _step(sizes, lora, speeds, mesh, own, seen, own * cached_bytes(sizes, context), kernels=kernels)


def prefill(sizes: ModelConfig, lora: LoraConfig, speeds: Speeds, tokens: float, mesh: MeshShape = ONE, *, kernels: bool = True) -> float:
    """Seconds in which one prompt is read, a chunk at a time, of which each device has its share of the tokens."""
    chunk = min(PROMPT_CHUNK, tokens)
    own = chunk / (mesh.data * mesh.expert)
    seen = chunk / mesh.data if mesh.tensor == 1 else own
    one = _step(sizes, lora, speeds, mesh, own, seen, cached_bytes(sizes, tokens / 2), kernels=kernels)
    return PREFILL * tokens / chunk * sum(one.values())


# ---------------------------------------------------------------------- the update


class _Passes(NamedTuple):
    """Over whole sequences, forward or with the gradient.

    Attributes:
      products: operations for each weight and token; base weights have no gradient, but the forward pass is computed again.
      scores: operations of attention, in units of its forward pass.
      unpackings: of all experts, by the kernels; the references unpack theirs once a pass.
      sent: bytes along `expert` for each value of a token: forward 2 in (bfloat16) and 4 of sums out; then 2 in again, 4 of the sums'
        gradients in and 2 of the inputs' out.
      sums: over `tensor`, and gathers of packed experts.
    """

    products: float
    scores: float
    unpackings: float
    sent: float
    sums: float


_FORWARD, _GRADIENT = _Passes(2, 1, 1, 6, 1), _Passes(6, 4.5, 2, 14, 3)
_SEQUENCE_COLLECTIVES = 6


def microbatch(
    sizes: ModelConfig,
    lora: LoraConfig,
    speeds: Speeds,
    tokens: float,
    rollout: float,
    mesh: MeshShape = ONE,
    *,
    gradient: bool,
    kernels: bool = True,
    remat: str = "layers",
    adapter: float = 0.0,
) -> Cost:
    """Seconds of a microbatch's gradient, or of one forward pass over it, as for the KL to the base.

    Args:
      sizes, lora: of the model, in bfloat16 with packed experts.
      speeds: of a device.
      tokens: of the microbatch on each device: rows are spread over `data` and `expert` together.
      rollout: tokens of a rollout with its prompt: what attention sees.
      mesh: devices; where `tensor` is above 1 there are no kernels.
      gradient: or forward only.
      kernels: whether they run; the references otherwise.
      remat: as `config.model.remat`.
      adapter: bytes of the adapter's gradient on a device, which are added up over `data`.
    """
    passes, layers, weights, t = _GRADIENT if gradient else _FORWARD, sizes.num_layers, expert_weights(sizes), mesh.tensor
    dense = passes.products * (layers * layer_weights(sizes) + sizes.vocab_size * sizes.width) + passes.scores * scores(sizes, rollout)
    held = layers * _held(sizes, mesh)
    if kernels:
        operations = (dense + passes.products * layers * sizes.experts_per_token * weights) * tokens
        products = operations / (UPDATE * speeds.product)
        # What is unpacked does not depend on tokens: a device's own experts, once a pass.
        unpacking = passes.unpackings * held * (expert_bytes(sizes) + 2 * weights) / (UNPACK * speeds.copy)
    else:
        # A device's own experts see the tokens of all of `expert`; or all experts see its own.
        products = dense / t * tokens / (REFERENCE_PRODUCT * speeds.product)
        products += layers * sizes.num_experts / t * tokens * _reference_product(sizes, speeds, passes.products)
        unpacking = held / t * _reference_unpacking(sizes, speeds)
    sent = layers * tokens * mesh.expert * passes.sent * sizes.width
    collectives = _along_expert(sizes, lora, speeds, mesh, sent, _SEQUENCE_COLLECTIVES, passes.sums)
    collectives += _along_tensor(sizes, speeds, mesh, tokens, passes.sums)
    if gradient:
        products *= REMAT[remat]
        collectives += 2 * _gathered(speeds, mesh, "data", adapter, 1)
    return {"products": products, "unpacking": unpacking, "collectives": collectives}


def apply(speeds: Speeds, adapter: float) -> float:
    """Seconds of the optimiser: adapter and two moments are read and written, the gradient is read; `adapter` is bytes of one of them."""
    return 7 * adapter / speeds.copy

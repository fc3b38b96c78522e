"""Predicts the time and memory of a step on every mesh of a machine's devices, without compiling.

`mesh_report` prints them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh

from discover_jax import costs, costs_tpu
from discover_jax.costs import MeshShape
from discover_jax.engine import build_optimizer, cache_pages, check_tiles, row_tokens, sampling_bytes
from discover_jax.exceptions import CapacityError, ConfigError, ShardingError
from discover_jax.kernels.kernel_set import PLATFORMS
from discover_jax.learning.train_state import abstract_train_state
from discover_jax.machines import Machine, Speeds
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.sharding import MESH_AXES, local_bytes
from discover_jax.sampling.schedule import PAGE

GRADIENTS = 2
"""Arrays of the adapter's size while the gradient runs: the sum of gradients, and the microbatch's gradient."""
MEASURED = "bfloat16", "packed"
"""config.model.dtype and experts, for which the formulas were compared with measurements."""
FILLED = 0.95
"""Fraction of the update's positions that are not padding (docs/performance.md, Packing)."""
ROUTED, ROUTED_REFERENCE = 25, 45
"""Bytes of temporary arrays of the update's experts, per unit of expert width, token and expert that reads the token.

Kernels: measured 116.2 GB with one row of 32,768 tokens, and 85.2 GB with one row on each of two devices of `expert`. References: the TPU
compiler (libtpu 0.0.42) reported 86.0 GB on a v5p with one row of 4,096 tokens on each of eight devices of `expert`, before the update had
kernels there."""
TPU_TOKEN, TPU_AT_ONCE = 138, 22 * 16_384 + 10 * 49_152
"""Bytes of temporary arrays of the update on a TPU, per unit of width: of each token, and of the rows and tokens that the experts' kernels
compute and exchange at once (experts_update_tpu). Fitted to the TPU compiler's figure for a gradient of the 120b on v6e:4x4, with an
exchange around a ring. On v5p it is 7% too high for the 120b and 12% for the 20b. The other figures were compiled without a ring: the
formula is 4 to 5% above those of the 120b, and 14 to 21% above those of the 20b (benchmarks/tpu_memory.py). The compiler takes more memory
where there is room: on v6e:4x4 it needed 14.5 GB of temporary arrays, and took 21.9."""


TPU_DENSE_HIDDEN, TPU_DENSE_TOKEN = 3 * 4 + 5 * 2, 59
"""Bytes of temporary arrays of a dense model's update on a TPU, per token and unit of MLP width and of width. In the compiled program, a
layer's backward pass makes three float32 and five bfloat16 arrays of the MLP's width. The second number is fitted to the compiler's 22.8 GB
for a gradient of Qwen2.5-Coder-1.5B on v5p:2x2x2; those on v5p:2x2x1 and v6e:4x4 are equal. No other dense model was
compiled."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt, and of a rollout without its prompt."""

    prompt: int
    rollout: int

    @property
    def both(self) -> int:
        return self.prompt + self.rollout


def lengths_of(text: str, config: Any) -> Lengths:
    """Parses "PROMPT,ROLLOUT" of the command line. An empty text means the config's limits.

    Raises:
      ConfigError: the text is not two numbers of tokens within the limits.
    """
    limits = Lengths(config.sampling.max_prompt_tokens, config.sampling.max_new_tokens)
    if not text:
        return limits
    numbers = text.split(",")
    if len(numbers) == 2 and all(number.strip().isdecimal() for number in numbers):
        given = Lengths(*map(int, numbers))
        if 0 < given.prompt <= limits.prompt and 0 < given.rollout <= limits.rollout:
            return given
    raise ConfigError(
        f"--lengths must be the mean tokens of a prompt and of a rollout, for example --lengths=1500,8000; got {text!r}. Allowed: 1 to"
        f" {limits.prompt:,} (config.sampling.max_prompt_tokens) and 1 to {limits.rollout:,} (config.sampling.max_new_tokens)."
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one mesh.

    Attributes:
      mesh: devices along each axis.
      kernels: whether the run uses kernels on this mesh.
      rows: packed rows of a microbatch: the config's, rounded up to a multiple of `data` x `expert`.
      live: rollouts decoded at the same time: the slots, or as many as the cache has room for.
      bytes: approximate peak memory of the update on one device.
      sampling, update: seconds of a step, by part.
      sampled: tokens that a step samples.
      learned: tokens that the update reads, including prompts.
      rooflines: on a TPU, what each phase of a step needs at least at the vendor's peak: seconds of each resource (see `costs_tpu`).
      obstacle: why the mesh cannot be used; empty if it can.
    """

    mesh: MeshShape
    kernels: bool = False
    rows: int = 0
    live: int = 0
    bytes: int = 0
    sampling: costs.Cost = dataclasses.field(default_factory=dict)
    update: costs.Cost = dataclasses.field(default_factory=dict)
    sampled: int = 0
    learned: int = 0
    rooflines: dict[str, costs.Cost] = dataclasses.field(default_factory=dict)
    obstacle: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.sampling.values()) + sum(self.update.values())


def shapes(devices: int) -> list[MeshShape]:
    """All meshes of this number of devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [MeshShape(devices // e // t, e, t) for e in divisors for t in divisors if devices % (e * t) == 0]


def kernels_run(config: Any, sizes: ModelConfig, platform: str, mesh: MeshShape) -> bool:
    """Whether a run on these devices uses kernels if their packages are installed, by the rules of `engine.build_model`."""
    try:
        check_tiles(config, sizes, AbstractMesh(mesh, MESH_AXES), platform)
    except ConfigError:
        return False
    kernels = PLATFORMS[platform].functions if platform in PLATFORMS else ()
    return "decode_experts" in kernels and "experts" in kernels and config.model.experts == "packed"


def abstract_model(config: Any, sizes: ModelConfig, platform: str, mesh: MeshShape, *, kernels: bool) -> Model:
    """The run's model on a mesh of absent devices, which a layout does not need. `kernels`: see `kernels_run`."""
    abstract: Any = AbstractMesh(mesh, MESH_AXES)
    experts = PLATFORMS[platform].experts if kernels and sizes.num_experts else config.model.experts
    return Model(sizes, LoraConfig(**config.lora).of_model(sizes), config.model.dtype, experts, abstract, config.model.remat)


def unmeasured(sizes: ModelConfig, mesh: MeshShape, machine: Machine, *, kernels: bool) -> str:
    """Why the formulas do not apply to this model on this mesh; empty if they do. `kernels`: whether it runs with kernels.

    On TPU7x, the compiler's update of the 1.5B takes 28.9 GB, a quarter more than the formula says.
    """
    if sizes.num_experts:
        return ""
    if machine.large_tiles:
        return "dense models take more memory on TPU7x than on other TPUs"
    if kernels and mesh.size == mesh.data:
        return ""
    return f"of dense models, {'only meshes along `data`' if kernels else 'only runs with kernels'} have been measured or compiled"


def predict(config: Any, sizes: ModelConfig, machine: Machine, mesh: MeshShape, lengths: Lengths, *, learn: bool = True) -> Prediction:
    """Predicts the time and memory of a step on one mesh.

    Args:
      config: validated, with bfloat16 and packed experts.
      sizes: the model's sizes.
      machine: its speeds must be known.
      mesh: devices along each axis.
      lengths: mean lengths of prompts and rollouts.
      learn: False for a search run, which measures instead of updating.
    """
    assert machine.speeds is not None
    kernels = kernels_run(config, sizes, machine.platform, mesh)
    split = mesh.data * mesh.expert
    rows = max(-(-config.train.rows // split), 1) * split
    if why := unmeasured(sizes, mesh, machine, kernels=kernels):
        return Prediction(mesh, kernels, rows, obstacle=f"not predicted: {why}")
    model = abstract_model(config, sizes, machine.platform, mesh, kernels=kernels)
    try:
        frozen = local_bytes(model.abstract_frozen())
        state = abstract_train_state(model.abstract_lora(), build_optimizer(config)) if learn else None
        pages = cache_pages(config, model, machine.memory, learn=learn, large_tiles=machine.large_tiles)
        sampling_needs = sum(sampling_bytes(config, model, machine.memory, learn=learn, large_tiles=machine.large_tiles).values())
    except CapacityError:
        return Prediction(mesh, kernels, rows, obstacle="the KV cache has no room for one rollout")
    except ShardingError as error:
        return Prediction(mesh, kernels, rows, obstacle=str(error))
    adapter = local_bytes(state.lora) if state is not None else 0
    tokens = rows * row_tokens(config) // split  # tokens of a microbatch on each device
    activations = activation_bytes(sizes, mesh, tokens, config.model.remat, learn=learn, kernels=machine.platform if kernels else "")
    needed = frozen + local_bytes(state) + GRADIENTS * adapter + activations
    taken = Prediction(mesh, kernels, rows, bytes=needed)
    if needed > machine.memory:
        return dataclasses.replace(taken, obstacle=f"the update needs about {needed / 1e9:.0f} GB")
    if sampling_needs > machine.memory:
        return Prediction(mesh, kernels, rows, obstacle=f"sampling with config.sampling.cache_tokens needs {sampling_needs / 1e9:.0f} GB")

    count = config.groups * config.group_size
    # A group shares its prompt's pages on one device, but may be spread over several. On average a live rollout has half of its tokens.
    shared = lengths.prompt / (config.group_size if split == 1 else 1)
    room = math.inf if pages is None else pages * PAGE // (shared + lengths.rollout / 2)
    live = max(1, int(min(config.sampling.slots, count, room)))
    learned = count * lengths.both
    step = _Step(
        (sizes, model.lora),
        machine.speeds,
        mesh,
        lengths,
        live=live,
        tokens=tokens,
        decodings=count / live * lengths.rollout,
        prompts=config.groups,
        passes=_passes(config, learned / FILLED / (rows * row_tokens(config)), learn=learn),
        remat=config.model.remat,
        adapter=adapter,
    )
    of_tpu = kernels and machine.speeds.tpu is not None
    sampling, update, rooflines = _on_tpu(step, learned) if of_tpu else _with_costs(step, kernels=kernels)
    update["optimiser"] = config.train.num_substeps * costs.apply(machine.speeds, adapter)
    tokens_of_step = {"sampled": count * lengths.rollout, "learned": learned}
    return dataclasses.replace(taken, live=live, sampling=sampling, update=update, rooflines=rooflines, **tokens_of_step)


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A pass over the rollouts of a step: whether it computes the gradient, and its microbatches, of rows of the full length."""

    gradient: bool
    microbatches: float


def _passes(config: Any, microbatches: float, *, learn: bool) -> tuple[_Pass, ...]:
    """The passes of a step. `microbatches`: as many as the rollouts fill.

    Each optimiser step and each wave has rows of its own, and thus at least one microbatch, of rows of the shortest length. With waves,
    the base model reads all rollouts at once.
    """
    train = config.train
    least = 0.5 if train.row_lengths > 1 else 1.0

    def over(parts: int, *, gradient: bool) -> _Pass:
        return _Pass(gradient, max(microbatches, least * parts))

    if not learn:
        return (over(1, gradient=False),)
    base = (over(1 if train.waves > 1 else train.num_substeps, gradient=False),)
    measures = train.measure_kl or train.kl_coefficient > 0
    return (*(base if measures else ()), over(max(train.waves, train.num_substeps), gradient=True))


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a step computes.

    Attributes:
      model: sizes of the model and of the adapter.
      speeds, mesh, lengths: see `predict`.
      live: rollouts decoded at the same time.
      tokens: of a microbatch on each device.
      decodings, prompts: decoding steps and prompts of a step.
      passes: over its rollouts.
      remat: `config.model.remat`.
      adapter: its bytes on a device.
    """

    model: tuple[ModelConfig, LoraConfig]
    speeds: Speeds
    mesh: MeshShape
    lengths: Lengths
    live: int
    tokens: int
    decodings: float
    prompts: int
    passes: tuple[_Pass, ...]
    remat: str
    adapter: int

    @property
    def context(self) -> float:
        """Mean tokens of a live rollout, with its prompt."""
        return self.lengths.prompt + self.lengths.rollout / 2


def _with_costs(step: _Step, *, kernels: bool) -> tuple[costs.Cost, costs.Cost, dict[str, costs.Cost]]:
    """Seconds of sampling and of the update by `costs`, which has no roofline."""
    options: dict[str, Any] = {"mesh": step.mesh, "kernels": kernels}
    of_model = *step.model, step.speeds
    one = costs.decode_step(*of_model, step.live, step.context, **options)
    sampling = {part: step.decodings * seconds for part, seconds in one.items()}
    sampling["prompts"] = step.prompts * costs.prefill(*of_model, step.lengths.prompt, **options)
    options |= {"remat": step.remat, "adapter": step.adapter}
    passes = [costs.microbatch(*of_model, step.tokens, step.lengths.both, gradient=one.gradient, **options) for one in step.passes]
    return sampling, _of_passes(step, passes), {}


def _of_passes(step: _Step, microbatch: Sequence[costs.Cost]) -> costs.Cost:
    """Seconds of a step's passes from those of one microbatch of each."""
    pairs = list(zip(step.passes, microbatch, strict=True))
    return {part: sum(each.microbatches * one[part] for each, one in pairs) for part in microbatch[0]}


def _on_tpu(step: _Step, learned: int) -> tuple[costs.Cost, costs.Cost, dict[str, costs.Cost]]:
    """Seconds of sampling and of the update by `costs_tpu`, and the rooflines of their phases. `learned`: tokens of the update."""
    of_model, prompt, both, mesh = (*step.model, step.speeds), step.lengths.prompt, step.lengths.both, step.mesh
    decoding = costs_tpu.decode_step(*of_model, step.live, step.context, mesh)
    sampling = {part: step.decodings * seconds for part, seconds in decoding.items() if seconds}
    sampling["prompts"] = step.prompts * sum(costs_tpu.prefill(*of_model, prompt, mesh).values())
    passes = [
        costs_tpu.microbatch(*of_model, step.tokens, both, mesh, gradient=one.gradient, remat=step.remat, adapter=step.adapter)
        for one in step.passes
    ]
    update = _of_passes(step, passes)
    # The roofline has no padding: the update reads as many tokens as there are.
    filled = learned / (step.tokens * mesh.data * mesh.expert)
    whole = costs_tpu.NOTHING
    for one in step.passes:
        whole = whole.plus(costs_tpu.microbatch_needs(*step.model, step.tokens, both, mesh, gradient=one.gradient, remat=step.remat))
    needs = {
        "decoding": costs_tpu.decode_needs(*step.model, step.live, step.context, mesh).times(step.decodings),
        "prompts": costs_tpu.prefill_needs(*step.model, prompt, mesh).times(step.prompts),
        "update": whole.times(filled),
    }
    assert step.speeds.tpu is not None
    return sampling, update, {phase: of_phase.seconds(step.speeds.tpu, mesh) for phase, of_phase in needs.items()}


def activation_bytes(sizes: ModelConfig, mesh: MeshShape, tokens: int, remat: str, *, learn: bool, kernels: str) -> int:
    """Approximate bytes that the gradient needs in addition to its arguments, for `tokens` on each device. `kernels`: the platform
    whose kernels compute the experts; empty for the references."""
    layers, stream, attention = sizes.num_layers, 4 * sizes.width, sizes.num_heads * (2 * sizes.head_size + 4)
    if not sizes.num_experts:
        # Measured: 6.0 GB for the 7B and 2.4 GB for the 1.5B, with 16,384 tokens and "layers".
        each = {"layers": layers * stream, "pairs": layers // 2 * stream, "none": layers * (stream + attention + 8 * sizes.mlp_width)}
        if kernels == "tpu":  # it keeps attention's outputs, too
            each["layers"] += layers * attention
            stream += TPU_DENSE_HIDDEN * sizes.mlp_width + TPU_DENSE_TOKEN * sizes.width
            each = {policy: kept + stream for policy, kept in each.items()}
        return (each[remat] if learn else stream) * tokens
    # On a GPU, a device gets the tokens of all devices along `expert`. In the references, all of its experts read all of these tokens; if
    # `tensor` splits the experts, all experts do. A TPU's kernels exchange and compute some tokens at a time.
    if kernels == "tpu":
        routed = (TPU_TOKEN * tokens + TPU_AT_ONCE) * sizes.width
    else:
        read = ROUTED * sizes.experts_per_token * mesh.expert if kernels else ROUTED_REFERENCE * sizes.num_experts // mesh.tensor
        routed = read * sizes.mlp_width * tokens
    kept = {"layers": layers * (stream + attention), "pairs": layers // 2 * stream, "none": 0}[remat] * tokens
    unpacked = 2 * costs.expert_weights(sizes) * (sizes.num_experts // mesh.expert if kernels else 1)
    if mesh.tensor > 1 and mesh.expert > 1:
        unpacked += sizes.num_experts // mesh.tensor * costs.expert_bytes(sizes)  # the gathered experts of one layer
    if not learn:
        return stream * tokens + routed + unpacked
    if remat == "none":  # a TPU's kernels keep only the inputs
        kept_inputs = layers * (3 * stream + attention) * tokens
        routed = routed + kept_inputs if kernels == "tpu" else layers * routed
    return kept + routed + unpacked


def recommend(config: Any, sizes: ModelConfig, machine: Machine, lengths: Lengths, *, learn: bool = True) -> list[Prediction]:
    """Predictions for all meshes of the machine's devices: usable ones, fastest first, then the others."""
    found = [predict(config, sizes, machine, mesh, lengths, learn=learn) for mesh in shapes(len(machine.devices))]
    return sorted(found, key=lambda one: (bool(one.obstacle), one.seconds, one.mesh.tensor, one.mesh.expert))

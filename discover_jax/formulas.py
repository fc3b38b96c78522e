"""The memory of a run on a machine whose compiler or kernels are missing here, by the formulas of `meshes` and `engine`.

Other code than the run's own would say little: the references of the kernels need many times the memory.
"""

from typing import Any

from discover_jax.costs import MeshShape
from discover_jax.engine import build_optimizer, microbatch_rows, row_tokens, sampling_bytes
from discover_jax.kernels.kernel_set import find_kernel
from discover_jax.learning.train_state import abstract_train_state
from discover_jax.machines import Machine
from discover_jax.meshes import GRADIENTS, MEASURED, abstract_model, activation_bytes, kernels_run, unmeasured
from discover_jax.models.config import ModelConfig
from discover_jax.models.sharding import local_bytes

_WHILE_DRAWING = "Arrays that exist only while a token is drawn are estimated"
_OF_KERNELS = (
    "for gpt-oss within 3% of the peaks measured on H200s, and on TPUs up to 6% above the compiler's figures for decoding and 21% above"
    " those for the update"
)
_OF_DENSE = "for dense models, activations are fitted to the measured ones of two models on a GPU, and to the compiler's of one on a TPU"
_OF_REFERENCES = (
    "the experts run without kernels. Only one figure of a compiler was compared there, so activations are only an order of magnitude"
)


def accuracy(config: Any, sizes: ModelConfig, machine: Machine) -> str:
    """How well the formulas agree with measurements for a run."""
    known = _OF_KERNELS if kernels_run(config, sizes, machine.platform, _mesh(config)) else _OF_REFERENCES
    return f"{known if sizes.num_experts else _OF_DENSE}. {_WHILE_DRAWING}"


def what_is_missing(machine: Machine) -> str:
    """What a dry run for this absent machine lacks to compile the run's own functions: compiler or kernels; empty if nothing."""
    if not machine.exact:
        return f"the {machine.platform.upper()} compiler is not installed"
    _, reason = find_kernel("decode_experts", machine.platform)
    return reason.rstrip(".")


def why_not(config: Any, sizes: ModelConfig, machine: Machine) -> str:
    """Why the formulas do not apply; empty if they do."""
    if (config.model.dtype, config.model.experts) != MEASURED:
        return "the formulas require config.model.dtype='bfloat16' and config.model.experts='packed'"
    mesh = _mesh(config)
    return unmeasured(sizes, mesh, machine, kernels=kernels_run(config, sizes, machine.platform, mesh))


def parts(config: Any, sizes: ModelConfig, machine: Machine, *, learn: bool) -> dict[tuple[str, str], dict[str, int]]:
    """Bytes on one device by part, for the largest function of each phase: (phase, function) -> part -> bytes.

    Args:
      config: validated; `why_not` must be empty.
      sizes: the model's sizes.
      machine: its platform decides whether the run uses kernels.
      learn: False for a search run.

    Raises:
      CapacityError: the cache has no room for one rollout.
      ShardingError: a size is not divisible by its axis of the mesh.
    """
    mesh = _mesh(config)
    kernels = machine.platform if kernels_run(config, sizes, machine.platform, mesh) else ""
    model = abstract_model(config, sizes, machine.platform, mesh, kernels=bool(kernels))
    state = abstract_train_state(model.abstract_lora(), build_optimizer(config)) if learn else None
    adapter = local_bytes(state.lora) if state is not None else 0
    resident = {"weights": local_bytes(model.abstract_frozen()), "adapter": adapter, "optimiser": local_bytes(state) - adapter}
    tokens = _tokens(config)
    activations = activation_bytes(sizes, mesh, tokens, config.model.remat, learn=learn, kernels=kernels)
    sampling = sampling_bytes(config, model, machine.memory, learn=learn, large_tiles=machine.large_tiles)
    update = ("update", "gradient") if learn else ("measuring", "base")
    return {
        ("sampling", "decode"): resident
        | {
            "cache": sampling["rings"] + sampling["pages"],
            "activations": sampling["adapter's copy for sampling"] + sampling["logits"] + sampling["copies in other layouts"],
        },
        update: resident | {"gradient": GRADIENTS * adapter, "activations": activations},
    }


def remat_totals(config: Any, sizes: ModelConfig, machine: Machine, policies: tuple[str, ...]) -> dict[str, int | None]:
    """Bytes on one device while the gradient runs, for each value of `config.model.remat`."""
    own, totals = parts(config, sizes, machine, learn=True)["update", "gradient"], {}
    mesh = _mesh(config)
    tokens = _tokens(config)
    kernels = machine.platform if kernels_run(config, sizes, machine.platform, mesh) else ""
    for remat in policies:
        totals[remat] = sum((own | {"activations": activation_bytes(sizes, mesh, tokens, remat, learn=True, kernels=kernels)}).values())
    return totals


def _mesh(config: Any) -> MeshShape:
    return MeshShape(config.mesh.data, config.mesh.expert, config.mesh.tensor)


def _tokens(config: Any) -> int:
    """Tokens of a microbatch on each device: as `meshes` recommends, a whole row at least."""
    split = config.mesh.data * config.mesh.expert
    return max(-(-microbatch_rows(config) // split), 1) * row_tokens(config)

"""Builds the jitted parts of a run from its config: model, sampler, optimiser and update. Runs and dry runs use it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import AbstractMesh, Mesh

from discover_jax.exceptions import CapacityError, ConfigError
from discover_jax.kernels import mxfp4_lanes, mxfp4_tiles
from discover_jax.kernels.kernel_set import PLATFORMS, KernelSet, kernel_set, with_layer
from discover_jax.kernels.layer_parts import HeadSizes
from discover_jax.kernels.spread import can_spread, row_devices
from discover_jax.learning.losses import RatioLimits
from discover_jax.learning.train_state import abstract_train_state, adam
from discover_jax.learning.update import Update
from discover_jax.models.config import LoraConfig, ModelConfig
from discover_jax.models.decoder import Model
from discover_jax.models.fused_layer import kind_refusal
from discover_jax.models.sharding import local_bytes
from discover_jax.sampling.decoding import SecondPhase, abstract_rows
from discover_jax.sampling.draft_sizes import drafts_warning, most_read, rows_of
from discover_jax.sampling.sampler import Sampler, check_pages, most_pages
from discover_jax.sampling.schedule import PAGE

_LOGITS = 4
"""Arrays of the logits' size that may be in memory together when a token is drawn: float32 logits, log-probabilities, and their blocks."""
_TEMPORARY = 0.03
"""Fraction of the memory reserved for other temporary arrays of sampling."""


def build_model(config: Any, sizes: ModelConfig, mesh: Mesh | None = None, platform: str | None = None) -> Model:
    """The model of these sizes. The config sets the adapter's ranks and the number format.

    Args:
      config: validated.
      sizes: sizes of the weights' folder or of `config.model.shape`.
      mesh: devices over which parameters are laid out; None for the default device.
      platform: platform whose kernels the model uses; None for that of the default device.

    Raises:
      ConfigError: the only positive rank of the adapter is for matrices that the model lacks.
    """
    lora = LoraConfig(**config.lora).of_model(sizes)
    if not any((lora.attention_rank, lora.expert_rank, lora.mlp_rank, lora.head_rank)):
        lacking, own = ("a dense MLP", "expert_rank") if sizes.num_experts else ("experts", "mlp_rank")
        raise ConfigError(
            f"The adapter would be empty: this model has no {lacking}, and all other ranks are 0. Set config.lora.attention_rank, {own} or"
            " head_rank to at least 1."
        )
    platform = platform or jax.default_backend()
    kernels = kernel_set(platform, mesh)
    reads_tiles = config.model.experts == "packed" and sizes.num_experts > 0 and _kernel_reads_tiles(config, sizes, mesh, platform, kernels)
    experts = PLATFORMS[platform].experts if reads_tiles else config.model.experts
    heads = HeadSizes(sizes.num_heads, sizes.num_kv_heads, sizes.head_size)
    of_model = heads, sizes.experts_per_token, experts, jnp.dtype(config.model.dtype)
    kernels = with_layer(kernels, platform, *of_model, refusal=kind_refusal(sizes))
    form = {"dtype": config.model.dtype, "experts": experts, "remat": config.model.remat}
    return Model(sizes, lora, mesh=mesh, kernels=kernels, **form)


def _kernel_reads_tiles(config: Any, sizes: ModelConfig, mesh: Mesh | None, platform: str, kernels: KernelSet) -> bool:
    """Whether a kernel decodes packed experts and supports this model. If it does not support the model, logs the reason."""
    if "decode_experts" not in kernels.kernels:  # `kernel_set` has logged the reason
        return False
    try:
        check_tiles(config, sizes, mesh, platform)
    except ConfigError as reason:
        logging.warning("kernel of decode_experts on %s: reference, which is many times slower. %s", platform, reason)
        return False
    return True


def check_tiles(config: Any, sizes: ModelConfig, mesh: Mesh | AbstractMesh | None, platform: str) -> None:
    """Checks that a platform's kernel for decoding packed experts, which reads its own layout of them, supports this model.

    Raises:
      ConfigError: it does not; the message has the reason.
    """
    if config.model.dtype != "bfloat16":  # the kernel would round values that the update does not round
        raise ConfigError(f"The kernel computes in bfloat16, but config.model.dtype is {config.model.dtype!r}.")
    if mesh is not None and not can_spread("decode_experts", mesh):
        raise ConfigError(f"The kernel computes whole experts, but config.mesh.tensor = {mesh.shape['tensor']} splits them.")
    matrices = {"gate_up": (2 * sizes.mlp_width, sizes.width), "down": (sizes.width, sizes.mlp_width)}
    for name, (out, into) in matrices.items():
        if platform == "tpu":
            mxfp4_lanes.check_sizes(out, into, mxfp4_lanes.PARTS[name])
        else:
            mxfp4_tiles.check_sizes(out, into, mxfp4_tiles.SLABS[name])


def build_sampler(
    config: Any,
    model: Model,
    stop_ids: Sequence[int],
    second_phase: SecondPhase | None = None,
    *,
    memory: int | None = None,
    learn: bool = True,
    large_tiles: bool = False,
) -> Sampler:
    """The sampler of a run.

    Args:
      config: validated.
      model: from `build_model`.
      stop_ids: tokens that end a rollout.
      second_phase: see `SecondPhase`.
      memory: bytes available on one device, or None if unknown. The cache uses at most what weights and buffers leave free.
      learn: whether adapter and optimiser also need memory.
      large_tiles: see `tpu_copies`.

    Raises:
      ConfigError: the sampler does not support a setting.
      CapacityError: the cache has no room for one rollout.
    """
    return Sampler(
        model,
        slots=config.sampling.slots,
        max_prompt_tokens=config.sampling.max_prompt_tokens,
        max_new_tokens=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        temperature_spread=config.sampling.temperature_spread,
        stop_ids=stop_ids,
        second_phase=second_phase,
        pages=cache_pages(config, model, memory, learn=learn, large_tiles=large_tiles),
        record_routes=config.train.replay_routing and model.config.num_experts > 0,
        draft_tokens=config.sampling.draft_tokens,
    )


def unused_drafts(config: Any) -> str | None:
    """A warning if `config.sampling.draft_tokens` has no effect; None otherwise."""
    settings, mesh = config.sampling, config.mesh
    return drafts_warning(settings.slots, config.groups * config.group_size, mesh.data * mesh.expert, settings.draft_tokens)


def cache_pages(config: Any, model: Model, memory: int | None, *, learn: bool, large_tiles: bool = False) -> int | None:
    """Pages of the cache: as configured, or as many as the memory has room for; None if there is no limit.

    Raises:
      CapacityError: there is no room for one rollout.
    """
    devices, longest = row_devices(model.mesh), (config.sampling.max_prompt_tokens, config.sampling.max_new_tokens)
    if config.sampling.cache_tokens:
        check_pages(config.sampling.cache_tokens // PAGE, devices, *longest)
        return config.sampling.cache_tokens // PAGE
    if memory is None:
        return None
    page, pages_of_1 = model.abstract_pool(devices, PAGE), most_pages(1, *longest)
    taken = beside_the_cache(config, model, memory, learn=learn, large_tiles=large_tiles)
    pages = (memory - sum(taken.values())) // local_bytes(page)
    if pages < pages_of_1:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in taken.items())
        raise CapacityError(
            f"After weights and buffers, the cache has room for only {max(pages, 0) * PAGE:,} tokens on a device with"
            f" {memory / 1e9:.1f} GB, but one rollout may need {pages_of_1 * PAGE:,} (GB: {parts}). Lower config.sampling.max_new_tokens,"
            " max_prompt_tokens or slots, or the adapter's ranks (config.lora). --dry_run shows the memory of each part."
        )
    return devices * pages


def sampling_bytes(config: Any, model: Model, memory: int, *, learn: bool, large_tiles: bool = False) -> dict[str, int]:
    """Bytes on one device during sampling, by part: `beside_the_cache`, without the reserve, and the `pages` of the cache.

    Raises:
      CapacityError: see `cache_pages`.
    """
    devices = row_devices(model.mesh)
    rows = rows_of(config.sampling.slots, config.groups * config.group_size, devices)
    most = most_pages(rows // devices, config.sampling.max_prompt_tokens, config.sampling.max_new_tokens)
    given = cache_pages(config, model, memory, learn=learn, large_tiles=large_tiles)
    taken = beside_the_cache(config, model, memory, learn=learn, large_tiles=large_tiles)
    del taken["temporary arrays"]
    pages = most if given is None else min(most, given // devices)
    return taken | {"pages": pages * local_bytes(model.abstract_pool(devices, PAGE))}


def beside_the_cache(config: Any, model: Model, memory: int, *, learn: bool, large_tiles: bool = False) -> dict[str, int]:
    """Bytes on one device that sampling needs beside the pages of the cache, by part. `large_tiles`: see `tpu_copies`."""
    devices = row_devices(model.mesh)
    rows = rows_of(config.sampling.slots, config.groups * config.group_size, devices)
    state = abstract_train_state(model.abstract_lora(), build_optimizer(config)) if learn else None
    return {
        "weights": local_bytes(model.abstract_frozen()),
        "adapter and optimiser": local_bytes(state),
        "adapter's copy for sampling": _cast_bytes(model, state.lora) if state is not None else 0,
        "rings": local_bytes(abstract_rows(model, rows)),
        "logits": _LOGITS * max(rows, most_read(rows, config.sampling.draft_tokens)) // devices * model.config.vocab_size * 4,
        "temporary arrays": int(_TEMPORARY * memory),
        "copies in other layouts": tpu_copies(model, large_tiles=large_tiles) if large_tiles or model.experts == "lanes" else 0,
    }


def _cast_bytes(model: Model, lora: Any) -> int:
    """Bytes on one device of the adapter in the model's dtype. jax 0.10's `eval_shape` does not keep the layouts of its arguments."""
    kinds = jax.eval_shape(model.cast, lora)
    each = zip(jax.tree.leaves(lora), jax.tree.leaves(kinds), strict=True)
    return sum(local_bytes(leaf) * kind.dtype.itemsize // leaf.dtype.itemsize for leaf, kind in each)


def tpu_copies(model: Model, *, large_tiles: bool = False) -> int:
    """Bytes on one device of what a TPU's compiler copies into another layout for decoding.

    Found in compiled programs (libtpu 0.0.42.1). On v5p and v6e, it copies of gpt-oss the embedding, the scales of the experts, and the
    weights of queries, keys and values, and of a dense model nothing large. On TPU7x, whose tiles have 16 rows (`large_tiles`), it copies
    the embedding, the scales and all matrices of plain products.
    """

    def copied(path: tuple[Any, ...]) -> bool:
        *_, parent, name = ("", *(key.key for key in path))
        if name == "weight":
            return large_tiles or parent in ("q", "k", "v")
        return name in ("embedding", "scales", "powers")

    if not model.config.num_experts and not large_tiles:
        return 0
    return sum(local_bytes(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_frozen()) if copied(path))


def build_optimizer(config: Any) -> optax.GradientTransformation:
    """The adapter's optimiser."""
    return adam(
        config.train.learning_rate,
        b1=config.train.adam_b1,
        b2=config.train.adam_b2,
        eps=config.train.adam_eps,
        max_grad_norm=config.train.max_grad_norm,
    )


def build_update(config: Any, model: Model, optimizer: optax.GradientTransformation) -> Update:
    """The update of a run."""
    return Update(
        model,
        optimizer,
        loss=config.train.loss,
        reduction=config.train.reduction,
        limits=RatioLimits(config.train.clip_low, config.train.clip_high, config.train.truncate),
        kl_coefficient=config.train.kl_coefficient,
        measure_kl=config.train.measure_kl,
        routes=model.routes if config.train.replay_routing and model.config.num_experts else None,
    )


def microbatch_rows(config: Any) -> int:
    """Packed rows of a microbatch: as configured, or one for each part of the mesh's data axis."""
    return config.train.rows or config.mesh.data


def row_tokens(config: Any) -> int:
    """Tokens of the longest packed row: as configured, or those of the longest prompt and rollout together."""
    return config.train.row_tokens or config.sampling.max_prompt_tokens + config.sampling.max_new_tokens

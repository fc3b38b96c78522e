"""Statistics of the update: what a microbatch measures over its chosen tokens, and the metrics of one or several optimiser steps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from discover_jax.learning.packing import Batch

Statistics = dict[str, jax.Array]


def token_statistics(logprobs_BT: jax.Array, entropy_BT: jax.Array, batch: Batch) -> Statistics:
    """Sums and extremes over the chosen tokens of one microbatch; neutral elements if it has none."""
    mask_BT = batch.mask_BT
    gap_BT = jnp.where(mask_BT, logprobs_BT - batch.sampler_logprobs_BT, 0.0)
    return {
        "gap_sum": jnp.abs(gap_BT).sum(),
        "gap_max": jnp.abs(gap_BT).max(),
        "log_ratio_min": jnp.where(mask_BT, gap_BT, jnp.inf).min(),
        "log_ratio_max": jnp.where(mask_BT, gap_BT, -jnp.inf).max(),
        "entropy_sum": jnp.where(mask_BT, entropy_BT, 0.0).sum(),
        "tokens": mask_BT.sum(dtype=jnp.int32),
    }


def metrics_of(statistics: Sequence[Statistics]) -> dict[str, float]:
    """Metrics from the statistics of all microbatches. At least one token must be chosen."""
    stacked = {key: np.asarray([each[key] for each in statistics], np.float64) for key in statistics[0]}
    tokens = stacked["tokens"].sum()
    with np.errstate(over="ignore"):  # an infinite ratio is logged, not raised
        ratio_min, ratio_max = np.exp(stacked["log_ratio_min"].min()), np.exp(stacked["log_ratio_max"].max())
    metrics = {
        "tokens": tokens,
        "logprob_gap/mean": stacked["gap_sum"].sum() / tokens,
        "logprob_gap/max": stacked["gap_max"].max(),
        "ratio/min": ratio_min,
        "ratio/max": ratio_max,
        "entropy": stacked["entropy_sum"].sum() / tokens,
    }
    if "loss" in stacked:
        metrics["loss"] = stacked["loss"].sum()
    if "limited" in stacked:
        metrics["ratio/limited_frac"] = stacked["limited"].sum() / tokens
    return {key: float(value) for key, value in metrics.items()}


def joined_metrics(substeps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combines the metrics of all optimiser steps; see `Update.update_in_substeps`."""
    if len(substeps) == 1:
        return substeps[0]
    tokens = [row["tokens"] for row in substeps]
    # Only the first substep has the sampler's weights, so only its gap shows whether sampler and trainer agree.
    joined = {"tokens": sum(tokens), **{name: substeps[0][name] for name in ("logprob_gap/mean", "logprob_gap/max")}}
    for name in substeps[0].keys() - joined.keys():
        values = [row[name] for row in substeps]
        if name in ("ratio/min", "ratio/max"):
            joined[name] = min(values) if name == "ratio/min" else max(values)
        else:
            of_tokens = name in ("entropy", "ratio/limited_frac")
            joined[name] = float(np.average(values, weights=tokens if of_tokens else None))
    return joined

"""The stages of a step's update, which takes the rollouts in waves: each as soon as its programs have ended (config.train.waves).

Groups belong to waves by their numbers, and waves are used in order, so results do not depend on when programs end.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from discover_jax.engine import microbatch_rows, row_tokens
from discover_jax.learning.packing import Batch, pack
from discover_jax.learning.step_update import StepUpdate, UpdatePlan
from discover_jax.policy import Policy
from discover_jax.stages import Run, waves
from discover_jax.types import Rollout, RolloutKey


def begin_update(run: Run, policy: Policy, rollouts: Mapping[RolloutKey, Rollout]) -> StepUpdate:
    """The update of a step before its first wave.

    With several waves, it has measured the KL to the base model on all rollouts of the step; their programs run meanwhile.
    """
    config = run.config
    plan = UpdatePlan(len(waves(run, config.groups)), config.train.num_substeps, **_shape(run))
    update = StepUpdate(run.updater, policy.frozen, policy.train_state, plan, run.recorder.passes)
    if update.measures_ahead:
        run.recorder.phase("learning", f"the base model's log-probabilities of {len(rollouts)} rollouts")
        update.measure_base([rollouts[key] for key in sorted(rollouts)])
    return update


def add_wave(run: Run, update: StepUpdate, rollouts: Mapping[RolloutKey, Rollout], advantages: Mapping[RolloutKey, float]) -> None:
    """Adds the gradient of the next wave to the update: of its groups that carry a signal. A search run learns nothing."""
    keys = sorted(advantages) if run.kind.learns else []
    parts = update.packed([rollouts[key] for key in keys], [advantages[key] for key in keys])
    if keys:
        run.recorder.phase("learning", _batches_line(len(keys), [batch for batches in parts for batch in batches]))
    update.add(parts)


def finish_update(run: Run, policy: Policy, update: StepUpdate, rollouts: Mapping[RolloutKey, Rollout]) -> tuple[Policy, dict[str, float]]:
    """The policy after all waves, and metrics.

    A search run, or a step without any signal, changes nothing and measures the log-probability gap on all rollouts.
    """
    train_state, metrics = update.finish()
    if not metrics["update/skipped"]:
        return dataclasses.replace(policy, train_state=train_state), metrics
    batches = pack([rollouts[key] for key in sorted(rollouts)], [0.0] * len(rollouts), **_shape(run))
    run.recorder.phase("learning" if run.kind.learns else "measuring", _batches_line(len(rollouts), batches))
    return policy, run.updater.measure(policy.frozen, policy.lora, batches, run.recorder.passes) | {"update/skipped": 1.0}


def _shape(run: Run) -> dict[str, int]:
    """The arguments of `pack`."""
    return {"row_tokens": row_tokens(run.config), "rows": microbatch_rows(run.config), "lengths": run.config.train.row_lengths}


def _batches_line(rollouts: int, batches: Sequence[Batch]) -> str:
    if not batches:
        return "no rollouts"
    rows, length = batches[0].mask_BT.shape
    return f"{rollouts} rollouts in {len(batches)} microbatch{'es' if len(batches) > 1 else ''} of {rows} x {length:,} tokens"

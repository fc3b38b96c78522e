"""Settings of learning: advantages, loss, optimiser, microbatches, and diversity within a group."""

from typing import Any

from discover_jax.config.setting import Rule, Setting

_PPO = ("train.loss", ("ppo",))
_BEST_OF_K = ("train.advantage", ("max_at_k", "frontier"))
_FRONTIER = ("train.advantage", ("frontier",))


def _fitting(name: str) -> tuple[Rule, ...]:
    """The rules that keep a k, in the setting `name` of this section, within the size of a group."""
    fix = f"Lower config.train.{name}, or raise config.group_size."
    uses = ("train.advantage", "group_size")
    return (
        Rule(
            "must be less than `group_size` with `max_at_k`, since its baseline needs subsets of k rollouts without the rollout itself",
            lambda config: config.train.advantage != "max_at_k" or config.train[name] < config.group_size,
            uses=uses,
            fix=fix,
        ),
        Rule(
            "must be at most `group_size` with `frontier`, since the subsets have k rollouts",
            lambda config: config.train.advantage != "frontier" or config.train[name] <= config.group_size,
            uses=uses,
            fix=fix,
        ),
    )


TRAIN: dict[str, Any] = {
    "steps": Setting(10, "steps of the run", tier=1, low=1, high=1_000_000),
    "advantage": Setting(
        "entropic",
        "estimator of the advantages in a group (docs/algorithm.md)",
        tier=1,
        choices=("mean_baseline", "entropic", "entropic_loo", "entropic_adaptive", "max_at_k", "frontier"),
        rules=(
            Rule(
                "`entropic_adaptive` requires `group_size` of at least 3, since no beta solves its equation for fewer rollouts",
                lambda config: config.train.advantage != "entropic_adaptive" or config.group_size >= 3,
                uses=("group_size",),
                fix="Raise config.group_size, or choose another estimator.",
            ),
        ),
    ),
    "beta": Setting(
        2.0,
        "inverse temperature beta of the weights exp(beta x reward)",
        low=0.0,
        high=1e6,
        only_with=("train.advantage", ("entropic", "entropic_loo")),
    ),
    "max_at_k": Setting(
        4,
        "k: the estimator aims at the best of k rollouts (docs/algorithm.md)",
        unit="rollouts",
        low=1,
        high=1_000_000,
        rules=_fitting("max_at_k"),
        only_with=_BEST_OF_K,
    ),
    "max_at_k_last": Setting(
        0,
        "k at the end of its schedule; k changes linearly from `max_at_k`. 0: k does not change",
        unit="rollouts",
        low=0,
        high=1_000_000,
        rules=_fitting("max_at_k_last"),
        only_with=_BEST_OF_K,
    ),
    "max_at_k_steps": Setting(
        0,
        "steps in which k changes from `max_at_k` to `max_at_k_last`; 0: derived, `train.steps`",
        unit="steps",
        low=0,
        high=1_000_000,
        rules=(
            Rule(
                "must be at most `train.steps`, so that the schedule ends within the run",
                lambda config: config.train.max_at_k_steps <= config.train.steps,
                uses=("train.steps",),
                fix="Set it to 0 to derive it.",
            ),
            Rule(
                "has an effect only if `train.max_at_k_last` is set",
                lambda config: not config.train.max_at_k_steps or config.train.max_at_k_last > 0,
                uses=("train.max_at_k_last",),
                fix="Remove it, or set config.train.max_at_k_last.",
            ),
        ),
        only_with=_BEST_OF_K,
    ),
    "frontier_base": Setting(
        "best",
        "what a rollout adds to. `best`: the best program so far and k - 1 other rollouts; `group`: only the other rollouts",
        choices=("best", "group"),
        only_with=_FRONTIER,
    ),
    "frontier_start": Setting(
        0,
        "steps of the run before the weight of the frontier begins to rise from 0",
        unit="steps",
        low=0,
        high=1_000_000,
        rules=(
            Rule(
                "must be less than `train.steps`, since the weight would stay 0",
                lambda config: config.train.advantage != "frontier" or config.train.frontier_start < config.train.steps,
                uses=("train.steps",),
                fix="Lower it.",
            ),
        ),
        only_with=_FRONTIER,
    ),
    "frontier_steps": Setting(
        0,
        "steps in which the weight of the frontier rises linearly from 0 to 1; 1: a switch; 0: derived, the rest of the run",
        unit="steps",
        low=0,
        high=1_000_000,
        rules=(
            Rule(
                "must be at most `train.steps` - `train.frontier_start`, so that the weight reaches 1 within the run",
                lambda config: (
                    config.train.advantage != "frontier" or config.train.frontier_start + config.train.frontier_steps <= config.train.steps
                ),
                uses=("train.steps", "train.frontier_start"),
                fix="Set it to 0 to derive it.",
            ),
        ),
        only_with=_FRONTIER,
    ),
    "failures": Setting(
        "reward",
        "signal of a failed attempt. `reward`: the failure reward; `spread`: `failure_spread` standard deviations of its group's valid"
        " signals below the lowest of them (docs/algorithm.md)",
        choices=("reward", "spread"),
    ),
    "failure_spread": Setting(
        1.0,
        "distance of a failure from the worst valid attempt of its group",
        unit="standard deviations",
        low=0.0,
        high=1e6,
        only_with=("train.failures", ("spread",)),
    ),
    "loss": Setting(
        "importance_sampling",
        "policy-gradient loss of a token",
        choices=("importance_sampling", "truncated_importance_sampling", "ppo", "reinforce"),
    ),
    "clip_low": Setting(0.2, "probability ratios (trainer / sampler) below 1 - `clip_low` are clipped", low=1e-6, high=1.0, only_with=_PPO),
    "clip_high": Setting(0.2, "probability ratios above 1 + `clip_high` are clipped", low=1e-6, high=1e6, only_with=_PPO),
    "truncate": Setting(
        2.0,
        "probability ratios (trainer / sampler) above this are truncated",
        low=1e-6,
        high=1e6,
        only_with=("train.loss", ("truncated_importance_sampling",)),
    ),
    "kl_coefficient": Setting(
        0.0,
        "weight of the penalty on the KL to the base model. The penalty is added to each token's advantage. 0: no penalty; the paper: 0.1",
        low=0.0,
        high=1e6,
        rules=(
            Rule(
                "a value above 0 requires `train.measure_kl` = True, since the penalty is computed from the measured KL",
                lambda config: not config.train.kl_coefficient or config.train.measure_kl,
                uses=("train.measure_kl",),
                fix="Set config.train.measure_kl = True, or the coefficient to 0.",
            ),
        ),
    ),
    "replay_routing": Setting(
        True,
        "the update sends each token to the experts that the sampler chose for it (arXiv 2510.11370). Otherwise, rounding sends"
        " some tokens to other experts; this causes most of the gap between the log-probabilities of sampler and trainer",
    ),
    "measure_kl": Setting(True, "measure and log the KL to the base model; costs an additional forward pass"),
    "num_substeps": Setting(
        1,
        "optimiser steps in a step; the rollouts are divided among them",
        low=1,
        high=4096,
        rules=(
            Rule(
                "must be at most `groups` x `group_size`, since each optimiser step needs at least one rollout",
                lambda config: config.train.num_substeps <= config.groups * config.group_size,
                uses=("groups", "group_size"),
                fix="Lower it, or raise config.groups or config.group_size.",
            ),
        ),
    ),
    "waves": Setting(
        1,
        "parts of the groups, in order, that the update takes one after another, each as soon as its programs have ended. With 1, the"
        " update begins when the last program has ended (docs/performance.md)",
        low=1,
        high=4096,
        rules=(
            Rule(
                "must be at most `groups`, since each wave has whole groups",
                lambda config: config.train.waves <= config.groups,
                uses=("groups",),
                fix="Lower it, or raise config.groups.",
            ),
            Rule(
                "must be 1 or a multiple of `train.num_substeps`, since each optimiser step takes whole waves",
                lambda config: config.train.waves == 1 or config.train.waves % config.train.num_substeps == 0,
                uses=("train.num_substeps",),
                fix="Set it to 1 or to a multiple.",
            ),
            Rule(
                "must be 1 with `train.failures` = `spread`, since the signal of a failure may then depend on programs of all groups",
                lambda config: config.train.waves == 1 or config.train.failures == "reward",
                uses=("train.failures",),
                fix="Set it to 1, or set config.train.failures = 'reward'.",
            ),
        ),
    ),
    "reduction": Setting(
        "sum", "how the losses of tokens combine into one loss (docs/algorithm.md)", choices=("sum", "token_mean", "sequence_mean")
    ),
    "learning_rate": Setting(4e-5, "Adam's learning rate", tier=1, low=0.0, high=10.0),
    "adam_b1": Setting(0.9, "Adam's decay of the first moment", low=0.0, high=0.999999),
    "adam_b2": Setting(0.95, "Adam's decay of the second moment", low=0.0, high=0.999999),
    "adam_eps": Setting(1e-8, "Adam's epsilon", low=0.0, high=1.0),
    "max_grad_norm": Setting(0.0, "gradients with a larger global norm are scaled down to this norm; 0: no limit", low=0.0, high=1e9),
    "row_tokens": Setting(
        0,
        "length of the longest packed row of the update; 0: derived, `sampling.max_prompt_tokens` + `sampling.max_new_tokens`",
        unit="tokens",
        low=0,
        rules=(
            Rule(
                "must be 0 or at least `sampling.max_prompt_tokens` + `sampling.max_new_tokens`, the longest rollout",
                lambda config: (
                    not config.train.row_tokens
                    or config.train.row_tokens >= config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
                ),
                uses=("sampling.max_prompt_tokens", "sampling.max_new_tokens"),
                fix="Set it to 0 to derive it.",
            ),
        ),
    ),
    "row_lengths": Setting(
        8,
        "number of available row lengths, from `row_tokens` / 2 to `row_tokens`. An update uses the length with the least padding; each"
        " length in use is compiled once",
        low=1,
        high=64,
    ),
    "rows": Setting(
        0,
        "packed rows in a microbatch; 0: derived, `mesh.data`",
        low=0,
        high=65_536,
        rules=(
            Rule(
                "must be 0 or a multiple of `mesh.data`, since the devices of that axis share the rows",
                lambda config: config.train.rows % config.mesh.data == 0,
                uses=("mesh.data",),
                fix="Set it to 0 to derive it, or to a multiple of config.mesh.data.",
                runs_only=True,
            ),
        ),
    ),
    "resume_from": Setting(
        "",
        "run directory of a finished run; the new run starts from the last adapter, optimiser state and archive of that run",
        rules=(
            Rule(
                "requires `reuse.sampler` = `greedy` or `puct`, since `fixed` ignores the archive of the finished run",
                lambda config: not config.train.resume_from or config.reuse.sampler != "fixed",
                uses=("reuse.sampler",),
                fix="Set config.reuse.sampler = 'greedy', or remove config.train.resume_from.",
            ),
        ),
    ),
}

DIVERSITY: dict[str, Any] = {
    "novelty_bonus": Setting(
        0.0,
        "bonus for a program with a score: this value x the distance (0 to 1) to the most similar other program with a score in the group",
        low=0.0,
        high=1e6,
    ),
    "duplicates": Setting(
        "keep",
        "programs of a group that differ only in names and layout. `keep`: all count; `drop`: only the first counts",
        choices=("keep", "drop"),
    ),
    "copies": Setting(
        "keep",
        "valid programs with the results of an archived program or of the seed program, or of an earlier one in the group: the same score"
        " and, for competitions, the same results of the rows. `keep`: each counts like others; `fail`: each gets the signal of a failure",
        choices=("keep", "fail"),
    ),
    "copy_tolerance": Setting(
        0.0,
        "scores of a problem are the same, for copies, if they differ by at most this much",
        unit="score",
        low=0.0,
        high=1e12,
        only_with=("diversity.copies", ("fail",)),
    ),
}

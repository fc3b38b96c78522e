"""Settings of learning: advantages, loss, optimiser, microbatches, and diversity within a group."""

from typing import Any

from discover_jax.config.setting import Rule, Setting

_PPO = ("train.loss", ("ppo",))

TRAIN: dict[str, Any] = {
    "steps": Setting(10, "steps of the run", tier=1, low=1, high=1_000_000),
    "advantage": Setting(
        "entropic",
        "estimator of the advantages in a group (docs/algorithm.md)",
        tier=1,
        choices=("mean_baseline", "entropic", "entropic_loo", "entropic_adaptive"),
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
}

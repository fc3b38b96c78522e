"""Every setting of a run: default, unit, meaning, and what is allowed. Files in configs/ only override.

`default_config()` builds a locked ConfigDict from the table below, so that a misspelt key is an error at once.
`validate(config)` checks each value against its row and then the rules that join several settings, and says what to do.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any

import ml_collections

from discover_jax.archive.selectors import USUAL_CHILDREN, fresh_groups
from discover_jax.exceptions import ConfigError
from discover_jax.models.config import REMAT, SHAPES


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table: `low` and `high` are inclusive; `choices` lists what is allowed; `unit` is empty for pure numbers and names."""

    default: Any
    meaning: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


_GIB_MAX = 1 << 20

SETTINGS: dict[str, Any] = {
    "name": Setting("", "name of the run, shown in logs; the default folder is runs/<name>"),
    "seed": Setting(0, "seed of every random draw of the run", low=0, high=2**31 - 1),
    "groups": Setting(16, "groups in a step, each built on one parent program", low=1, high=4096),
    "group_size": Setting(8, "rollouts in a group; they share one prompt", low=1, high=4096),
    "task": {
        "competition": Setting(
            "spaceship-titanic",
            "id of a built-in competition, path of a .py file that defines COMPETITION, or mlebench:ID; several, separated by commas, share"
            " the model, and groups take turns",
        ),
        "raw": Setting("", "path of the competition's raw data (CSV or zip); empty for one that brings its own; one for each of several"),
        "reward": Setting(
            "grade",
            "which rows make the reward: the private answers (as the report) or rows held out of the public table",
            choices=("grade", "holdout"),
        ),
        "holdout_fraction": Setting(0.2, "part of the public training rows that `holdout` keeps back", low=0.01, high=0.9),
        "holdout_folds": Setting(
            1,
            "holdout: 2 or more cross-validate over all training rows instead; each program runs once for each fold, and once more for its"
            " submission",
            low=1,
            high=100,
        ),
        "grader": Setting(
            "native",
            "who grades: this project, by MLE-bench's rules, or the grader of the installed package `mlebench`",
            choices=("native", "mlebench"),
        ),
    },
    "model": {
        "weights": Setting(
            "apprentice",
            "path of a checkpoint folder, `apprentice` for the small model that ships with the project, or `random` for weights of"
            " model.shape drawn on the devices (rehearsals and benchmarks)",
        ),
        "shape": Setting("", "sizes of `random` weights; empty for all others", choices=("", *SHAPES)),
        "tokenizer": Setting("", "folder of the tokenizer's files; empty for the weights' own folder"),
        "dtype": Setting("bfloat16", "type of activations and of weights that are not MXFP4", choices=("bfloat16", "float32")),
        "experts": Setting(
            "packed",
            "`packed` keeps the experts in MXFP4 on the device, laid out for its kernel if there is one; `dense` expands them once at load"
            " (small models on a CPU)",
            choices=("packed", "dense"),
        ),
        "remat": Setting(
            "layers",
            "what the update computes again instead of keeping it: all within a layer but its attention, all within a pair of layers (least"
            " memory), or nothing (most memory)",
            choices=REMAT,
        ),
    },
    "lora": {
        "attention_rank": Setting(32, "rank of the adapter on q, k, v and o; 0 leaves them out", low=0, high=1024),
        "expert_rank": Setting(
            8, "rank of the adapter on each expert's two matrices (rank 32 / 4 active experts); 0: none", low=0, high=1024
        ),
        "head_rank": Setting(32, "rank of the adapter on the output head; 0: none", low=0, high=1024),
        "alpha": Setting(32.0, "an adapter's product is scaled by alpha / rank", low=1e-3, high=1e4),
    },
    "prompt": {
        "style": Setting(
            "full", "`full` describes the competition; `brief` is the short form that the apprentice knows", choices=("full", "brief")
        ),
        "reasoning_effort": Setting("medium", "asked of the model in the system message (full style)", choices=("low", "medium", "high")),
        "ideas": Setting(0, "full style: so many ideas for improvement are shown at a time, in turn over groups and steps; 0: all", low=0),
        "stdout_chars": Setting(
            2000, "full style: at most so much of the end of what the parent printed is shown", unit="characters", low=0
        ),
        "error_chars": Setting(800, "full style: at most so much of the end of a failed child's error is shown", unit="characters", low=0),
    },
    "sampling": {
        "temperature": Setting(1.0, "logits are divided by it; the update uses the same", low=0.01, high=10.0),
        "temperature_spread": Setting(
            0.0, "rollouts of a group get temperatures from (1 - spread) to (1 + spread) times that", low=0.0, high=0.95
        ),
        "max_new_tokens": Setting(26_000, "budget of a rollout", unit="tokens", low=1, high=131_072),
        "thinking_tokens": Setting(
            0, "two phases: a rollout that has not begun its answer after so many is made to; 0: off", unit="tokens", low=0, high=131_072
        ),
        "thinking_closing": Setting("\n\nThe time to think is over; I write the program now.", "with these words, which it did not choose"),
        "max_prompt_tokens": Setting(8_192, "longest prompt", unit="tokens", low=1, high=131_072),
        "slots": Setting(128, "rollouts decoded at once; finished slots are refilled", low=1, high=4096),
        "cache_tokens": Setting(
            0,
            "tokens that the cache of keys and values holds for all slots together; 0: as many as they can need, or as the device has room"
            " for. When it is full, the rollouts that began last wait in the host's memory",
            unit="tokens",
            low=0,
            high=2**31 - 1,
        ),
    },
    "execution": {
        "seconds": Setting(300.0, "time limit of a program, from its own start", unit="s", low=0.1, high=86_400),
        "cores": Setting(2, "CPU cores leased to a program", low=1, high=1024),
        "memory_gib": Setting(4.0, "memory limit of a program", unit="GiB", low=0.25, high=_GIB_MAX),
        "workers": Setting(0, "programs at once; 0: as many as the machine's, or the ray cluster's, cores allow", low=0, high=4096),
        "cache": Setting("", "folder of verdicts that several runs on the same machine share; empty: the run's own"),
        "backend": Setting(
            "bubblewrap",
            "where programs run and what isolates them: bubblewrap on this machine; with `ray`, bubblewrap on the nodes of a ray cluster"
            " (docs/scaling.md); the unsafe one is for trusted programs only and needs allow_weaker",
            choices=("bubblewrap", "ray", "unsafe-subprocess"),
        ),
        "ray_address": Setting(
            "auto",
            "ray: `auto` for the cluster that this machine is a node of, HOST:PORT of that cluster's head, or `local` for one that is"
            " started on this machine for the run",
        ),
        "allow_weaker": Setting(False, "accept an isolation weaker than bubblewrap's; the summary of the run then says so"),
    },
    "reuse": {
        "sampler": Setting(
            "greedy",
            "which states become parents: the best mostly, those of the highest PUCT score, or always the empty seed",
            choices=("greedy", "puct", "fixed"),
        ),
        "epsilon": Setting(0.125, "greedy: probability of a uniformly random kept state instead of the best", low=0.0, high=1.0),
        "exploration": Setting(1.0, "puct: weight c of the bonus for states that were built on seldom", low=0.0, high=1e6),
        "children": Setting(
            USUAL_CHILDREN,
            "so many best children of each parent are kept for reuse; 0: all; -1: as the sampler is defined, 2 for puct and all for greedy",
            low=USUAL_CHILDREN,
            high=1_000_000,
        ),
        "fresh": Setting(0.0, "part of a step's groups that start from nothing, whatever the sampler says", low=0.0, high=1.0),
        "distinct": Setting(False, "groups of a step build on different parents, as far as the archive goes"),
        "capacity": Setting(1000, "states kept for reuse (the journal keeps all)", low=1, high=1_000_000),
    },
    "train": {
        "steps": Setting(10, "steps of the run", low=1, high=1_000_000),
        "advantage": Setting(
            "entropic", "estimator of advantages within a group", choices=("mean_baseline", "entropic", "entropic_loo", "entropic_adaptive")
        ),
        "beta": Setting(2.0, "entropic, entropic_loo: inverse temperature of the weights exp(beta * reward)", low=0.0, high=1e6),
        "loss": Setting(
            "importance_sampling",
            "policy-gradient loss of a token",
            choices=("importance_sampling", "truncated_importance_sampling", "ppo", "reinforce"),
        ),
        "clip_low": Setting(0.2, "ppo: ratios below 1 - this are clipped", low=1e-6, high=1.0),
        "clip_high": Setting(0.2, "ppo: ratios above 1 + this are clipped", low=1e-6, high=1e6),
        "truncate": Setting(2.0, "truncated_importance_sampling: largest ratio", low=1e-6, high=1e6),
        "kl_coefficient": Setting(
            0.0, "weight of the penalty on leaving the base model, in a token's advantage (the paper: 0.1)", low=0.0, high=1e6
        ),
        "replay_routing": Setting(
            True,
            "the update sends every token to the experts that the sampler chose for it (arXiv 2510.11370); rounding may make the two choose"
            " differently otherwise, which is most of what their log-probabilities differ by",
        ),
        "measure_kl": Setting(True, "log the KL to the base model even without a penalty, which costs a forward pass of the update"),
        "num_substeps": Setting(1, "optimiser steps in a step, each on its part of the rollouts", low=1, high=4096),
        "reduction": Setting("sum", "how token losses make the batch's loss", choices=("sum", "token_mean", "sequence_mean")),
        "learning_rate": Setting(4e-5, "Adam's step", low=0.0, high=10.0),
        "adam_b1": Setting(0.9, "Adam's decay of the first moment", low=0.0, high=0.999999),
        "adam_b2": Setting(0.95, "Adam's decay of the second moment", low=0.0, high=0.999999),
        "adam_eps": Setting(1e-8, "Adam's epsilon", low=0.0, high=1.0),
        "max_grad_norm": Setting(0.0, "gradients are scaled down to this global norm; 0: never", low=0.0, high=1e9),
        "row_tokens": Setting(
            0, "length of the longest packed row of the update; 0: longest prompt + budget of a rollout", unit="tokens", low=0
        ),
        "row_lengths": Setting(
            8,
            "lengths, from half of row_tokens up, among which an update takes the one that leaves the least padding; it is compiled once"
            " for each that is used",
            low=1,
            high=64,
        ),
        "rows": Setting(1, "packed rows in a microbatch", low=1, high=65_536),
        "resume_from": Setting("", "folder of a finished run whose last adapter, optimiser and archive this run starts from"),
    },
    "diversity": {
        "novelty_bonus": Setting(
            0.0,
            "added to the signal of a program that scored, times its distance (0 to 1) to the nearest other one of its group",
            low=0.0,
            high=1e6,
        ),
        "duplicates": Setting(
            "keep",
            "of programs of a group that are the same but for names and layout, `drop` lets the first alone count",
            choices=("keep", "drop"),
        ),
    },
    "checkpoint": {
        "keep": Setting(2, "latest checkpoints kept", low=1, high=10_000),
        "every": Setting(0, "also keep each checkpoint whose step is a multiple of this; 0: none", low=0, high=1_000_000),
    },
    "tracking": {
        "wandb": Setting(
            "off",
            "Weights & Biases (extra `tracking`): `online` sends metrics and settings there, `offline` writes them below the run's folder"
            " for `wandb sync`, `off` does neither; event files for TensorBoard are always written",
            choices=("off", "online", "offline"),
        ),
        "project": Setting("discover_jax", "project at Weights & Biases"),
        "entity": Setting("", "user or team at Weights & Biases; empty: the account's default"),
    },
    "mesh": {
        "data": Setting(1, "mesh axis over which rollouts are spread", low=1, high=65_536),
        "expert": Setting(1, "mesh axis over which experts are spread", low=1, high=65_536),
        "tensor": Setting(1, "mesh axis over which heads and the vocabulary are spread", low=1, high=65_536),
    },
}


def _rows(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for key, entry in table.items():
        if isinstance(entry, Setting):
            yield prefix + key, entry
        else:
            yield from _rows(entry, f"{prefix}{key}.")


def settings() -> dict[str, Setting]:
    """All settings by their dotted names, in the table's order."""
    return dict(_rows(SETTINGS))


def default_config() -> Any:
    """A ConfigDict with every default, locked: assigning to an unknown key is an error. Typed Any, since its attributes are its keys."""

    def build(table: dict[str, Any]) -> dict[str, Any]:
        return {key: entry.default if isinstance(entry, Setting) else build(entry) for key, entry in table.items()}

    config = ml_collections.ConfigDict(build(SETTINGS))
    return config.lock()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config (ConfigDict or nested dict) as one dict from dotted names to values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict | ml_collections.FrozenConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_value(name: str, value: Any, row: Setting) -> str | None:
    """What is wrong with a value, or None."""
    kind = type(row.default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (kind is not bool and isinstance(value, bool)):
        return f"config.{name} = {value!r} is a {type(value).__name__}; it must be a {kind.__name__} ({row.meaning})."
    if row.choices and value not in row.choices:
        return f"config.{name} = {value!r} is not known; allowed: {', '.join(row.choices)} ({row.meaning})."
    # `not (a <= b)` rather than `a > b`, so that NaN is refused too.
    unit = f" {row.unit}" if row.unit else ""
    if row.low is not None and not row.low <= value:
        return f"config.{name} = {value!r} is too small; the least is {row.low}{unit} ({row.meaning})."
    if row.high is not None and not value <= row.high:
        return f"config.{name} = {value!r} is too large; the most is {row.high}{unit} ({row.meaning})."
    return None


_FORCED_TOKENS = 6
"""Of `harmony.answer_forced`, beside those of its closing words and if each of its own words is one token."""


def _contradictions(config: Any) -> Iterator[str]:
    """Rules that join several settings."""
    if config.execution.backend == "unsafe-subprocess" and not config.execution.allow_weaker:
        yield (
            "config.execution.backend = 'unsafe-subprocess' runs the model's programs without isolation. Set"
            " config.execution.allow_weaker=True as well if you accept that, or use 'bubblewrap'."
        )
    yield from _of_the_cluster(config.execution)
    if config.task.holdout_folds > 1 and config.task.reward != "holdout":
        yield (
            f"config.task.holdout_folds = {config.task.holdout_folds} with config.task.reward = {config.task.reward!r}: folds are parts of"
            " the reward 'holdout'. Set config.task.reward='holdout', or leave the folds at 1."
        )
    if not (config.lora.attention_rank or config.lora.expert_rank or config.lora.head_rank):
        yield "all ranks in config.lora are 0: nothing to train. Set one, or use discover_jax.search for a run without training."
    if config.group_size == 1:
        yield "config.group_size = 1: a group of one has no other rollouts to compare with, so its advantage is always 0; use 2 or more."
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    if config.train.row_tokens and config.train.row_tokens < longest:
        yield (
            f"config.train.row_tokens = {config.train.row_tokens} is shorter than the longest rollout: max_prompt_tokens + max_new_tokens ="
            f" {longest}. Set it to 0 or to at least {longest}."
        )
    if (config.model.weights == "random") != bool(config.model.shape):
        yield (
            f"config.model.weights = {config.model.weights!r} with config.model.shape = {config.model.shape!r}: weights='random' needs a"
            f" shape ({', '.join(SHAPES)}), and only it."
        )
    defaults = settings()
    for name, value, needed in (
        ("reuse.epsilon", config.reuse.epsilon, config.reuse.sampler == "greedy"),
        ("reuse.exploration", config.reuse.exploration, config.reuse.sampler == "puct"),
        ("train.beta", config.train.beta, config.train.advantage in ("entropic", "entropic_loo")),
        ("train.clip_low", config.train.clip_low, config.train.loss == "ppo"),
        ("train.clip_high", config.train.clip_high, config.train.loss == "ppo"),
        ("train.truncate", config.train.truncate, config.train.loss == "truncated_importance_sampling"),
        ("reuse.children", config.reuse.children, config.reuse.sampler != "fixed"),
        ("reuse.capacity", config.reuse.capacity, config.reuse.sampler != "fixed"),
        ("prompt.ideas", config.prompt.ideas, config.prompt.style == "full"),
        ("prompt.reasoning_effort", config.prompt.reasoning_effort, config.prompt.style == "full"),
        ("prompt.stdout_chars", config.prompt.stdout_chars, config.prompt.style == "full"),
        ("prompt.error_chars", config.prompt.error_chars, config.prompt.style == "full"),
        ("sampling.thinking_closing", config.sampling.thinking_closing, config.sampling.thinking_tokens > 0),
        ("tracking.project", config.tracking.project, config.tracking.wandb != "off"),
        ("tracking.entity", config.tracking.entity, config.tracking.wandb != "off"),
    ):
        if value != defaults[name].default and not needed:
            yield f"config.{name} = {value!r} has no effect with the other settings ({defaults[name].meaning}); leave it out."
    if config.reuse.sampler == "fixed" and (config.reuse.distinct or config.reuse.fresh):
        yield "config.reuse.sampler = 'fixed' starts every group from nothing: leave out reuse.distinct and reuse.fresh."
    else:
        yield from _idle_variety(config)
    if config.train.kl_coefficient and not config.train.measure_kl:
        yield (
            f"config.train.kl_coefficient = {config.train.kl_coefficient} with config.train.measure_kl = False: the penalty is made of the"
            " KL. Leave measure_kl at True, or the coefficient at 0."
        )
    needed = config.sampling.thinking_tokens + _FORCED_TOKENS + 1
    if config.sampling.thinking_tokens and needed > config.sampling.max_new_tokens:
        yield (
            f"config.sampling.thinking_tokens = {config.sampling.thinking_tokens} with config.sampling.max_new_tokens ="
            f" {config.sampling.max_new_tokens}: no room for an answer is left. What ends the thinking takes {_FORCED_TOKENS} tokens and"
            f" those of thinking_closing; raise max_new_tokens to more than {needed}, or lower thinking_tokens."
        )
    if config.train.advantage == "entropic_adaptive" and config.group_size < 3:
        yield (
            f"config.train.advantage = 'entropic_adaptive' with config.group_size = {config.group_size}: no beta solves its equation for"
            " fewer than three rollouts. Use larger groups, or another estimator."
        )
    if config.train.num_substeps > config.groups * config.group_size:
        yield (
            f"config.train.num_substeps = {config.train.num_substeps} is more than a step's {config.groups * config.group_size} rollouts;"
            " each optimiser step needs at least one."
        )
    if config.model.weights == "apprentice" and config.prompt.style != "brief":
        yield "the apprentice knows only the brief prompt: set config.prompt.style='brief', or config.model.weights to another folder."
    if config.reuse.sampler == "fixed" and config.train.resume_from:
        yield (
            "config.reuse.sampler = 'fixed' never looks at the archive that config.train.resume_from brings along;"
            " use 'greedy', or start fresh."
        )


def _of_the_cluster(execution: Any) -> Iterator[str]:
    address = execution.ray_address
    if execution.backend != "ray":
        if address != "auto":
            yield (
                f"config.execution.ray_address = {address!r} has no effect with config.execution.backend = {execution.backend!r}: set"
                " config.execution.backend='ray', or leave the address out."
            )
    elif address not in ("auto", "local") and not re.fullmatch(r"[\w.\-]+:\d+|\[[\da-fA-F:.]+\]:\d+", address):
        yield (
            f"config.execution.ray_address = {address!r} is no address; allowed: auto, local, or HOST:PORT of the head as `ray start"
            " --head` shows it (not ray://..., which is for clients outside of a cluster: join it with this machine by `ray start"
            " --address=...`)."
        )


def _idle_variety(config: Any) -> Iterator[str]:
    """`reuse.fresh` and `reuse.distinct` where a step's groups, or a competition's share of them, are too few for them to matter."""
    competitions = config.task.competition.count(",") + 1
    # Groups take turns, so a competition has one of these numbers of them in a step.
    shares = {config.groups // competitions, -(-config.groups // competitions)} - {0}
    of = f"config.groups = {config.groups}" + (f" for {competitions} competitions" if competitions > 1 else "")
    fresh = config.reuse.fresh
    if fresh and all(fresh_groups(fresh, share) == share for share in shares):
        yield (
            f"config.reuse.fresh = {fresh} with {of} starts every group from nothing, whatever config.reuse.sampler says. Lower it, or use"
            " config.reuse.sampler='fixed'."
        )
    if fresh and all(fresh_groups(fresh, share) == 0 for share in shares):
        yield f"config.reuse.fresh = {fresh} with {of} has no effect: it rounds to no group. Raise it, or leave it out."
    if config.reuse.distinct and max(shares) == 1:
        yield f"config.reuse.distinct = True with {of} has no effect: one group has no other to differ from. Leave it out."


def _obstacles(config: Any) -> Iterator[str]:
    """Rules for a run, which a dry run can do without."""
    if config.train.rows % config.mesh.data:
        yield (
            f"config.train.rows = {config.train.rows} with config.mesh.data = {config.mesh.data}: the rows of a microbatch are spread over"
            f" the mesh's data axis. Set rows to {config.mesh.data} or a multiple."
        )
    if config.model.weights == "random" and not config.model.tokenizer:
        yield "config.model.weights = 'random' brings no tokenizer: set config.model.tokenizer to a folder that has one."


def validate(config: Any, *, for_run: bool = True) -> ml_collections.FrozenConfigDict:
    """Checks a whole config and freezes it.

    Args:
      config: what a file in configs/ returned, with the command line's overrides.
      for_run: False for a dry run, which may ask about things that no run can have yet.

    Raises:
      ConfigError: naming every wrong setting at once, each with what is allowed.
    """
    known = settings()
    given = flatten(config)
    problems = []
    for name in given.keys() - known.keys():
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        problems.append(f"config.{name} is not a setting" + (f"; did you mean config.{close[0]}?" if close else "."))
    for name in known.keys() - given.keys():
        problems.append(f"config.{name} is missing; start from discover_jax.config.default_config(), which has every setting.")
    problems += [p for name, row in known.items() if name in given and (p := _check_value(name, given[name], row))]
    if not problems:  # the joint rules assume that each value alone is sound
        problems = [*_contradictions(config), *(_obstacles(config) if for_run else ())]
    if problems:
        raise ConfigError("The config cannot be used:\n" + "\n".join(f"  - {p}" for p in sorted(problems)))
    return ml_collections.FrozenConfigDict(config)

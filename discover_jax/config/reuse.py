"""Settings of reuse: which states become parents, and which states the archive keeps."""

from typing import Any

from discover_jax.archive.ranking import RULES
from discover_jax.archive.selectors import USUAL_CHILDREN, fresh_groups
from discover_jax.config.setting import Rule, Setting


def _shares(config: Any) -> set[int]:
    """Numbers of groups that a task can have in a step; groups take turns over the tasks."""
    tasks = config.task.competition.count(",") + 1
    return {config.groups // tasks, -(-config.groups // tasks)} - {0}


def _fresh(config: Any) -> list[bool | None]:
    """For each share of groups: True if all of them start fresh, False if none does, else None."""
    counts = [(fresh_groups(config.reuse.fresh, share), share) for share in _shares(config)]
    return [count > 0 if count in (0, share) else None for count, share in counts]


_REUSING = ("reuse.sampler", ("greedy", "puct"))

REUSE: dict[str, Any] = {
    "sampler": Setting(
        "greedy",
        "parent selector. `greedy`: mostly the best state; `puct`: the states with the highest PUCT score; `fixed`: always the seed",
        tier=1,
        choices=("greedy", "puct", "fixed"),
    ),
    "score": Setting(
        "raw",
        "score by which parents and the best program are ranked. `raw`: as measured; `ties`: a gain or loss within the noise of the rows"
        " counts as a tie; `posterior`: the posterior mean of the true score, which shrinks lucky scores",
        choices=RULES,
    ),
    "epsilon": Setting(
        0.125,
        "probability that a group's parent is a uniformly random archived state instead of the best one",
        low=0.0,
        high=1.0,
        only_with=("reuse.sampler", ("greedy",)),
    ),
    "exploration": Setting(
        1.0, "weight c of the PUCT bonus for states that were rarely parents", low=0.0, high=1e6, only_with=("reuse.sampler", ("puct",))
    ),
    "children": Setting(
        USUAL_CHILDREN,
        f"number of best children of each parent that the archive keeps; 0: all; {USUAL_CHILDREN}: derived, 2 with `puct` and all with"
        f" `greedy`",
        low=USUAL_CHILDREN,
        high=1_000_000,
        only_with=_REUSING,
    ),
    "fresh": Setting(
        0.0,
        "fraction of a step's groups that start from the seed instead of a selected parent",
        low=0.0,
        high=1.0,
        rules=(
            Rule(
                "must leave at least one group of a competition or problem to the parent selector",
                lambda config: not all(fresh is True for fresh in _fresh(config)),
                uses=("groups", "task.competition"),
                fix="Lower it, or set config.reuse.sampler = 'fixed' to start every group from the seed.",
            ),
            Rule(
                "a value above 0 must round to at least one group of a competition or problem",
                lambda config: not config.reuse.fresh or not all(fresh is False for fresh in _fresh(config)),
                uses=("groups", "task.competition"),
                fix="Raise it or config.groups, or remove it.",
            ),
        ),
        only_with=_REUSING,
    ),
    "distinct": Setting(
        False,
        "groups of a step get different parents if the archive has enough states",
        rules=(
            Rule(
                "requires a competition or problem with at least 2 groups in a step",
                lambda config: not config.reuse.distinct or max(_shares(config)) > 1,
                uses=("groups", "task.competition"),
                fix="Remove it, or raise config.groups.",
            ),
        ),
        only_with=_REUSING,
    ),
    "capacity": Setting(1000, "maximum number of states in the archive; the journal keeps all", low=1, high=1_000_000, only_with=_REUSING),
}

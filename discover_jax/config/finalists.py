"""Settings of the choice of the best program by retests."""

from typing import Any

from discover_jax.config.setting import Rule, Setting, value_of


def with_finalists(name: str, default: float) -> Rule:
    """A setting has no effect without finalists."""
    return Rule(
        "has an effect only with finalists.count",
        lambda config: value_of(config, name) == default or config.finalists.count > 0,
        uses=("finalists.count",),
        fix="Set config.finalists.count, or remove it.",
    )


FINALISTS: dict[str, Any] = {
    "count": Setting(
        0,
        "number of best programs that are tested again at the end, on rows that no reward depended on; the winner is the best program of"
        " the run. 0: the best program is the one with the highest reward",
        low=0,
        high=1024,
        rules=(
            Rule(
                "must be 0 or at least 2, and at most reuse.capacity",
                lambda config: config.finalists.count == 0 or 2 <= config.finalists.count <= config.reuse.capacity,
                uses=("reuse.capacity",),
                fix="Lower it, or raise config.reuse.capacity.",
            ),
            Rule(
                "requires training rows that give no reward",
                lambda config: not config.finalists.count or config.task.holdout_folds == 1,
                uses=("task.holdout_folds",),
                fix="Set config.task.holdout_folds = 1: with folds, every training row gives rewards.",
            ),
        ),
    ),
    "retests": Setting(
        4,
        "number of retests. Each has other rows, or is another evaluation of a problem with noisy scores. Each retest keeps the better half"
        " of the finalists for the next",
        low=1,
        high=64,
        rules=(with_finalists("finalists.retests", 4),),
    ),
    "every": Setting(
        0,
        "also choose the best program in this way after each step whose number is a multiple of this; 0: only at the end",
        low=0,
        rules=(
            with_finalists("finalists.every", 0),
            Rule(
                "must be less than train.steps",
                lambda config: config.finalists.every == 0 or config.finalists.every < config.train.steps,
                uses=("train.steps",),
                fix="Lower it, or remove it: the choice is made after the last step anyway.",
            ),
        ),
    ),
}
